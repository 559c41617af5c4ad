"""Training scripts as a user runs them, whole or killed at random points, and what must hold of the runs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from torchrl_chat.recipes import checkpoints as saving
from torchrl_chat.rollouts import read_rollouts

ROOT = Path(__file__).parents[1]
RECIPES = ("grpo", "ppo", "expert_iteration")
QUICK = [
    "--steps",
    "6",
    "--prompts",
    "4",
    "--group_size",
    "4",
    "--minibatch",
    "8",
    "--eval",
    "16",
    "--save_every",
    "2",
]


def script(name: str):
    """A script of the examples as a module; of the one that is in the package, that."""
    if name == "grpo":
        return importlib.import_module("torchrl_chat.recipes.grpo")
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their own module
    spec.loader.exec_module(module)
    return module


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def learn(folder: Path, name: str, backend: str, seed: int, *arguments: str) -> dict:
    """Run a script as a user does; its result."""
    script = ["-m", "torchrl_chat.cli.main", "train"] if name == "grpo" else [str(ROOT / "examples" / f"{name}.py")]
    command = [sys.executable, *script, "--backend", backend, "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--out", str(folder), *arguments],
        capture_output=True, text=True, timeout=2400, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def check_books(folder: Path) -> None:
    """Every step is in the books, no episode was trained twice, and what was trained is what was sampled."""
    metrics, trained = jsonl(folder / "metrics.jsonl"), jsonl(folder / "trained.jsonl")
    assert [row["step"] for row in metrics] == [row["step"] for row in trained] == list(range(len(metrics)))
    every = [tuple(key) for row in trained for key in row["episodes"]]
    assert len(every) == len(set(every))
    assert all(0 < row.get("ess", 1.0) <= 1 + 1e-4 for row in metrics)


def learns_the_digits(
    folder: Path, name: str, backend: str, seed: int, *arguments: str, least: float = 0.9
) -> None:
    """From random weights, with the script's defaults."""
    result = learn(folder, name, backend, seed, *arguments)
    assert result["before"] < 0.1
    assert result["after"] > least
    check_books(folder)


def learns_the_tool(folder: Path, name: str, backend: str, *arguments: str) -> None:
    """The two-turn task is learned, and what the interpreter wrote is no part of what is trained."""
    result = learn(folder, name, backend, 0, "--dataset", "python-tool", *arguments)
    assert result["before"] < 0.4
    assert result["after"] > 0.9
    check_books(folder)
    last = list(read_rollouts(folder / "rollouts.jsonl"))[-16:]
    used = [[m["role"] for m in e["messages"]] == ["user", "assistant", "tool", "assistant"] for e in last]
    assert sum(used) >= 14
    assert all(len(e["sequences"][0]["sampled"]) == 2 for e, turns in zip(last, used, strict=True) if turns)


def run_killed(folder: Path, name: str, kills: int, arguments: list[str], seed: int = 0) -> tuple[Path, Path]:
    """Kill and resume a script, and run it whole: the folders of both, when both have ended well and nothing was left behind."""
    folders = folder / "killed", folder / "whole"
    command = [
        sys.executable,
        str(Path(__file__).with_name("recipe_kills.py")),
        str(ROOT / "examples" / f"{name}.py"),
    ]
    done = subprocess.run(
        [*command, *map(str, folders), str(kills), str(seed), *arguments],
        capture_output=True, text=True, timeout=1500, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert (told["statuses"], len(told["killed"]), told["orphans"]) == ([0, 0], kills, [])
    return folders


def same_run(one: Path, other: Path, *, exact: bool = True) -> None:
    """Two runs trained the same episodes, each once, in the same order, to the same weights."""
    from safetensors.torch import load_file

    assert jsonl(one / "trained.jsonl") == jsonl(other / "trained.jsonl")
    every = [tuple(key) for row in jsonl(one / "trained.jsonl") for key in row["episodes"]]
    assert len(every) == len(set(every)) > 0
    steps = [row["step"] for row in jsonl(one / "metrics.jsonl")]
    assert steps == list(range(len(steps)))

    def written(folder: Path) -> list:
        drop = ("id", "metadata")
        return [{k: v for k, v in e.items() if k not in drop} for e in read_rollouts(folder / "rollouts.jsonl")]

    if not exact:
        return
    assert written(one) == written(other)
    ends = [
        load_file(saving.checkpoints(folder / "checkpoints")[-1] / "model.safetensors") for folder in (one, other)
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
