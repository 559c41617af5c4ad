"""The training scripts with vLLM as the sampler, in the environment that has it: pytest tests/vllm_learning.py.

The trained model's weights go to the engine after every update; see tests/test_recipes_learning.py for what is asked.
"""

from __future__ import annotations

import pytest
from test_recipes import QUICK, jsonl, run_killed, same_run
from test_recipes_learning import learns_the_tool, test_digits  # noqa: F401

pytest.importorskip("vllm", reason="vLLM is not installed here: run `make vllm`", exc_type=ImportError)


@pytest.fixture
def backend() -> str:
    return "vllm"


def test_two_turns_with_a_tool(tmp_path):
    learns_the_tool(tmp_path / "run", "grpo", "vllm")


def test_kill_and_resume(tmp_path):
    once = ["--minibatch", "16", "--epochs", "1", "--max_new_tokens", "4"]  # one update a step
    arguments = [*QUICK, "--backend", "vllm", *once]
    told = run_killed(tmp_path / "killed", "grpo", 2, arguments, seed=1)
    whole = run_killed(tmp_path / "whole", "grpo", 0, arguments)
    assert (told["status"], len(told["killed"]), told["orphans"]) == (0, 2, [])
    assert whole["status"] == 0
    same_run(tmp_path / "killed", tmp_path / "whole", exact=False)
    # The engine samples with the weights of the trained model, after each update and behind a resume.
    assert [row["ess"] for row in jsonl(tmp_path / "killed" / "metrics.jsonl")] == pytest.approx(
        [1.0] * 6, abs=1e-4
    )
