"""The package as a whole: what importing it costs, what it exports, and that its examples run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import need_shared

import torchrl_chat
from torchrl_chat.messages import MessageError, as_messages

ROOT = Path(__file__).parent.parent


def imported_by(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_is_cheap():
    assert not {"torch", "torchrl", "transformers", "datasets"} & imported_by("import torchrl_chat")


@pytest.mark.parametrize("room", ["rewards", "messages", "tools", "sandbox"])
def test_ground_floor_knows_no_torch(room):
    assert not {"torch", "torchrl", "transformers"} & imported_by(f"import torchrl_chat.{room}")


def test_templates_know_no_torchrl():
    assert "torchrl" not in imported_by("import torchrl_chat.templates")


@pytest.mark.by_day(2)
def test_optional_packages_are_not_imported():
    loaded = imported_by("import torchrl_chat.envs, torchrl_chat.policies")
    loaded -= imported_by("import torchrl.envs")  # which takes ray, where it is installed
    optional = {
        "matplotlib",
        "tqdm.auto.tqdm",
        "reasoning_gym",
        "ray",
        "vllm",
        "peft",
        "openai",
        "starlette",
        "torchdata",
    }
    assert not optional & loaded


def test_every_export_is_there():
    for name in torchrl_chat.__all__:
        assert getattr(torchrl_chat, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = torchrl_chat.nothing


# Programs one after the other, each as if it ran alone: starting Python with torchrl costs more than what they do.
ONE_AFTER_THE_OTHER = """
import json, runpy, sys
for k, words in enumerate(json.loads(sys.stdin.read())):
    if k:
        print("\\f", end="", flush=True)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
"""


def printed(*commands: tuple[str, ...]) -> list[str]:
    """What each of these programs prints."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER],
        input=json.dumps(commands), capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\f")


class TestMessages:
    def test_forms(self):
        message = {"role": "user", "content": "x"}
        assert as_messages("x") == as_messages(message) == as_messages([message]) == [message]
        assert as_messages("x", role="tool")[0]["role"] == "tool"
        assert as_messages(
            [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
        )
        assert as_messages([{"role": "user", "content": [{"type": "text", "text": "x"}]}])

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (3, "is a int"),
            ([], "is empty"),
            (["x"], r"\[0\] is a str"),
            ([{"role": "", "content": "x"}], "has no 'role'"),
            ([{"role": "user"}], "has no 'content'"),
            ([{"role": "user", "content": 3}], "'content' of type int"),
        ],
    )
    def test_refused(self, value, reason):
        with pytest.raises(MessageError, match=reason):
            as_messages(value)


@pytest.mark.by_day(2, place=1)
def test_examples_run():
    data = need_shared("data/gsm8k/test.jsonl")
    gsm8k = ("--data", str(data), "--questions", "2", "--max-new-tokens", "8")
    several, user, rollout = printed(
        ("examples/multi_turn.py",), ("examples/user_simulator.py",), ("examples/gsm8k_rollout.py", *gsm8k)
    )
    assert several.count("Another one?") == 2
    shown = re.findall(r"(\d+) sampled: ([.^]+)\n", several)
    assert len(shown) == 2
    assert all(mask.count("^") == int(count) for count, mask in shown)
    assert user.count("I give up. <done>") == 2
    assert "0 of 2 right" in rollout


@pytest.mark.full
def test_the_tool_example_runs(tmp_path):
    """That it learns takes minutes; tests/test_recipes_learning.py shows it."""
    few = ("--warm_steps", "20", "--steps", "2", "--prompts", "2", "--group_size", "2", "--epochs", "1")
    [out] = printed(("examples/python_tool.py", *few, "--eval", "8", "--out", str(tmp_path / "run")))
    assert re.search(r"pass rate after training: [01]\.\d+ \(before: [01]\.\d+\)", out)
    assert re.search(r"user: '(mul|add|sub) \d \d' \| assistant: ", out)
