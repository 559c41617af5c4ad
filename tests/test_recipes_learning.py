"""The training scripts learn, on three seeds each, and go on after ten kills each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipes import QUICK, RECIPES, ROOT, jsonl, run_killed, same_run

from torchrl_chat.rollouts import read_rollouts


@pytest.fixture
def backend() -> str:
    """What samples; tests/vllm_learning.py has another one."""
    return "transformers"


def learn(folder: Path, name: str, backend: str, seed: int, *arguments: str) -> dict:
    """Run a script as a user does; its result."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--backend", backend, "--seed", str(seed)]
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


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_digits(tmp_path, name, backend, seed):
    result = learn(tmp_path / "run", name, backend, seed)
    assert result["before"] < 0.1
    assert result["after"] > 0.9
    check_books(tmp_path / "run")


def learns_the_tool(folder: Path, name: str, backend: str) -> None:
    """The two-turn task is learned, and what the interpreter wrote is no part of what is trained."""
    result = learn(folder, name, backend, 0, "--dataset", "python-tool")
    assert result["before"] < 0.4
    assert result["after"] > 0.9
    check_books(folder)
    last = list(read_rollouts(folder / "rollouts.jsonl"))[-16:]
    used = [[m["role"] for m in e["messages"]] == ["user", "assistant", "tool", "assistant"] for e in last]
    assert sum(used) >= 14
    assert all(len(e["sequences"][0]["sampled"]) == 2 for e, turns in zip(last, used, strict=True) if turns)


@pytest.mark.parametrize("name", ["grpo", "python_tool"])
def test_two_turns_with_a_tool(tmp_path, name):
    learns_the_tool(tmp_path / "run", name, "transformers")


@pytest.mark.parametrize("name", RECIPES)
def test_ten_kills(tmp_path, name):
    arguments = [*QUICK, "--steps", "32", "--max_new_tokens", "4"]
    told = run_killed(tmp_path / "killed", name, 10, arguments)
    whole = run_killed(tmp_path / "whole", name, 0, arguments)
    assert (told["status"], len(told["killed"]), told["orphans"]) == (0, 10, [])
    assert whole["status"] == 0
    same_run(tmp_path / "killed", tmp_path / "whole")
