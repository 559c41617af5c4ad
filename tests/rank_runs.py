"""What tests of several processes share: a view to learn from, short runs of the recipes, and what must be the same of two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from recipe_runs import script
from tensordict import TensorDict

from torchrl_chat.recipes.watching import of_the_run


def rows(count: int, seed: int = 0) -> TensorDict:
    """A padded view of rows of some lengths, which begin alike."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (count, 14), generator=draw)
    ids[:, :5] = ids[:1, :5]
    lengths = torch.randint(7, 15, (count,), generator=draw)
    attention = torch.arange(14) < lengths[:, None]
    sampled = attention & (torch.arange(14) >= 5)
    return TensorDict(
        tokens=TensorDict(full=ids, batch_size=count),
        masks=TensorDict(all_attention_mask=attention, all_assistant_mask=sampled, batch_size=count),
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        advantage=torch.randn(count, generator=draw),
        batch_size=count,
    )


QUICK = ["--prompts", "6", "--group_size", "8", "--minibatch", "48", "--epochs", "1", "--eval", "7"]
QUICK += ["--save_every", "2", "--rollouts", "2", "--show_every", "0", "--lr", "1e-4"]


def run(name: str, folder: str, *words: str) -> None:
    """A run of a recipe, in a process as torchrun would start it."""
    module = script(name)
    sys.argv = [name, *QUICK, "--out", folder, *words]
    module.main()


def books(folder: Path) -> tuple[list[list], list[dict], list[dict]]:
    """Trained episodes and metrics of each step, and the evaluations."""
    found = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("trained", "metrics", "evaluations")
    )
    trained, metrics, evaluations = found
    return [row["episodes"] for row in trained], [of_the_run(row) for row in metrics], evaluations


def check_same(folder: Path, other: Path, tolerance: float = 1e-4) -> None:
    """The same episodes in the same order, the same curve."""
    (trained, metrics, evaluations), (trained_there, metrics_there, evaluations_there) = map(books, (folder, other))
    assert trained == trained_there
    assert evaluations == evaluations_there
    for here, there in zip(metrics, metrics_there, strict=True):
        assert here.keys() == there.keys()
        apart = {
            k: (here[k], there[k]) for k in here if here[k] != pytest.approx(there[k], abs=tolerance, rel=1e-3)
        }
        assert not apart, apart
