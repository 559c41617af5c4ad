"""The training scripts with vLLM as the sampler, in the environment that has it: ``make vllm``.

The trained model's weights go to the engine after every update; tests/test_recipes_learning.py asks the same of transformers.
"""

from __future__ import annotations

import pytest
from in_ranks import in_ranks
from rank_runs import check_same, run
from recipe_runs import (
    QUICK,
    RECIPES,
    jsonl,
    learns_the_digits,
    learns_the_tool,
    run_killed,
    same_run,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]


@pytest.fixture(autouse=True)
def vllm():
    return pytest.importorskip("vllm", reason="vLLM is not installed here: run `make vllm`", exc_type=ImportError)


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_digits(tmp_path, name, seed):
    learns_the_digits(tmp_path / "run", name, "vllm", seed)


@pytest.mark.full
def test_two_turns_with_a_tool(tmp_path):
    learns_the_tool(tmp_path / "run", "grpo", "vllm")


@pytest.mark.full
def test_two_processes_with_an_engine_each_are_one(tmp_path):
    """On the CPU; the weights that are handed over are gathered from both."""
    words = ["--backend", "vllm", "--steps", "4", "--max_new_tokens", "2", "--lr", "1e-3"]
    for count in (1, 2):
        in_ranks(count, run, "grpo", str(tmp_path / str(count)), *words)
    check_same(tmp_path / "1", tmp_path / "2", tolerance=1e-3)
    assert [row["ess"] for row in jsonl(tmp_path / "2" / "metrics.jsonl")] == pytest.approx([1.0] * 4, abs=1e-4)


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.by_day(2)
def test_kill_and_resume(tmp_path, kills):
    once = ["--minibatch", "16", "--epochs", "1", "--max_new_tokens", "4"]  # one update a step
    arguments = [*QUICK, "--backend", "vllm", *once]
    killed, whole = run_killed(tmp_path, "grpo", kills, arguments, seed=1)
    same_run(killed, whole, exact=False)
    # The engine samples with the weights of the trained model, after each update and behind a resume.
    assert [row["ess"] for row in jsonl(killed / "metrics.jsonl")] == pytest.approx([1.0] * 6, abs=1e-4)
