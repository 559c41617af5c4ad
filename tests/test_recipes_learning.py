"""The training scripts learn, and go on after being killed."""

from __future__ import annotations

import pytest
from conftest import of_the_day
from recipe_runs import QUICK, RECIPES, ROOT, learns_the_digits, learns_the_tool, run_killed, same_run

pytestmark = [pytest.mark.learn, pytest.mark.timeout(1500)]

SEEDS = (0, 1, 2)


# A recipe in every run, another on the next day, and in time each with every seed.
@pytest.mark.parametrize(("name", "seed"), of_the_day(*((name, seed) for seed in SEEDS for name in RECIPES)))
def test_digits(tmp_path, name, seed):
    learns_the_digits(tmp_path / "run", name, "transformers", seed)


@pytest.mark.full
@pytest.mark.parametrize("variant", ["rloo", "reinforce++", "maxrl", "gspo", "cispo", "gmpo", "sapo"])
def test_variants(tmp_path, variant):
    # With the bounds of their papers, which are for long answers: of one token a step changes little, or more than is bounded.
    least = 0.8 if variant in ("gspo", "cispo") else 0.9
    learns_the_digits(tmp_path / "run", "grpo", "transformers", 0, "--variant", variant, least=least)


@pytest.mark.full
@pytest.mark.timeout(3600)  # a machine with other work takes longer than the limit of the rest
@pytest.mark.parametrize("name", ["grpo", "python_tool"])
def test_two_turns_with_a_tool(tmp_path, name):
    learns_the_tool(tmp_path / "run", name, "transformers")


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_two_turns_of_an_agent(tmp_path):
    """The same task and settings, played by an agent of the openai SDK through the gateway."""
    learns_the_tool(
        tmp_path / "run", "grpo", "transformers", "--agent", f"{ROOT / 'examples' / 'tool_agent.py'}:agent"
    )


@pytest.mark.parametrize("kills", [5, pytest.param(10, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", of_the_day(*RECIPES))
def test_kills(tmp_path, name, kills):
    arguments = [*QUICK, "--steps", "32" if kills > 5 else "16", "--max_new_tokens", "4"]
    same_run(*run_killed(tmp_path, name, kills, arguments))
