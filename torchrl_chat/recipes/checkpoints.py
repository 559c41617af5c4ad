"""Checkpoints that are there as a whole or not at all, whenever the process is killed.

A checkpoint is a folder ``step-000120`` with the model and its tokenizer, as transformers reads them, and
``state.pt``: optimizer, environment, random states, and whatever else the run needs to go on as if nothing had
happened. It is written under another name, brought to the disk, and then renamed.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_STATE = "state.pt"


def random_states() -> dict[str, Any]:
    """The states of all global generators: Python's, NumPy's, torch's on the CPU and on each CUDA device."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the generators back to where :func:`random_states` found them; those of CUDA where their number is the same."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def save_model(
    path: str | os.PathLike[str], model: Any, tokenizer: Any, state: Mapping[str, Any] | None = None
) -> None:
    """Write a folder with a model, its tokenizer and a state: as a whole or not at all.

    Args:
        path: the folder; it must not exist.
        model: a transformers model.
        tokenizer: its tokenizer.
        state: what ``torch.save`` takes; none is written if ``None``.

    Raises:
        OSError: the folder exists and is not empty, or cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # a process was killed while it wrote
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if state is not None:
        torch.save(dict(state), partial / _STATE)
    for file in partial.rglob("*"):
        to_disk(file)
    to_disk(partial)
    os.rename(partial, target)
    to_disk(target.parent)


def load_weights(path: str | os.PathLike[str], model: Any) -> None:
    """Give a model the weights of a folder that :func:`save_model` wrote, in place, in the model's own dtype."""
    stored = type(model).from_pretrained(path, dtype=next(model.parameters()).dtype)
    model.load_state_dict(stored.state_dict())


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    model: Any,
    tokenizer: Any,
    state: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of a step, and remove old ones.

    Args:
        folder: where the checkpoints are.
        step: how many steps are done.
        model, tokenizer, state: see :func:`save_model`.

    Keyword Args:
        keep: how many are left, the new one included.

    Returns:
        the checkpoint's folder.

    Raises:
        ValueError: ``keep`` is not positive.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: expected at least 1 checkpoint.")
    path = Path(folder) / f"step-{step:06d}"
    save_model(path, model, tokenizer, state)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a checkpoint. It is a pickle: load only what you trust."""
    return torch.load(Path(path) / _STATE, map_location="cpu", weights_only=False)


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, oldest first.

    Example:
        >>> checkpoints("runs/none")
        []
    """
    found = Path(folder).glob("step-*")
    return sorted((path for path in found if path.name[5:].isdigit()), key=lambda path: int(path.name[5:]))


def to_disk(path: str | os.PathLike[str]) -> None:
    """See that what was written to a file, or the names in a folder, survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
