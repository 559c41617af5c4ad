"""The public SDKs of both dialects, from their packages, in an environment of their own: what they read is held to their own types."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from agents import calling, check_law
from dialects import Script, served

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("TORCHRL_CHAT_AGENTS_PYTHON", ROOT / ".agents" / "bin" / "python"))
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="the environment of public agents is made by `python3 scripts/environment.py agents`; or name a Python that "
        "has `openai` and `anthropic` in TORCHRL_CHAT_AGENTS_PYTHON",
    ),
]
THOUGHT = "<think>\nhm\n</think>\n\n"


def told(program: str, script: Script, cwd: Path):
    """What a program prints at a session of its own, and that session."""
    with served(script) as gateway, gateway.session() as session:
        run = subprocess.run(
            [str(PYTHON), "-P", str(ROOT / "tests" / program)],
            env={**os.environ, **session.environment()},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        return json.loads(run.stdout), session.session, check_law(session.session)


def test_the_anthropic_sdk_and_its_tool_runner(tmp_path):
    script = Script()
    two = THOUGHT + "two"
    script.says(
        *[calling("a", "b"), two, two, THOUGHT + calling("c", said="see:"), "four", "five"],
        *[THOUGHT + calling("a", "broken"), "done"],
        *[calling("a", "b"), THOUGHT + calling("c"), "done"],
        *[ValueError("out of memory")] * 2,
    )
    found, session, sequences = told("sdk_anthropic.py", script, tmp_path)
    assert found["conversation"] == [
        ["tool_use", ["tool_use", "tool_use"]],
        ["end_turn", ["thinking", "text"]],
        ["tool_use", ["thinking", "text", "tool_use"]],
        ["end_turn", ["text"]],
    ]
    assert found["runner"] == [["tool_use", ["thinking", "tool_use", "tool_use"]], ["end_turn", ["text"]]]
    assert [reason for reason, _ in found["streamed runner"]] == ["tool_use", "tool_use", "end_turn"]
    stream = found["errors"].pop("stream")
    assert "out of memory" in stream[1]
    assert found["errors"] == {
        "image": "BadRequestError",
        "thread": "ThreadUnsupportedRequestError",
        "key": "AuthenticationError",
        "engine": "InternalServerError",
    }
    # One for each conversation, and the one sample that was only read.
    assert sequences == 4, "\n".join(session.findings)
    texts = [message["content"] for message in session.transcript().messages if message["role"] == "tool"]
    assert texts == ["found a", "found b", "found c"]


def test_the_responses_of_the_openai_sdk(tmp_path):
    script = Script()
    lines = [calling("a", "b"), THOUGHT + "two", THOUGHT + calling("c", said="see:"), "four"]
    script.says(*lines, *lines, *[ValueError("out of memory")] * 2)
    found, _, sequences = told("sdk_openai.py", script, tmp_path)
    assert (
        found["items"]
        == found["named"]
        == [
            ["completed", ["function_call", "function_call"]],
            ["completed", ["reasoning", "message"]],
            ["completed", ["reasoning", "message", "function_call"]],
            ["completed", ["message"]],
        ]
    )
    stream = found["errors"].pop("stream")
    assert "out of memory" in stream[1]
    assert found["errors"] == {
        "reference": ["BadRequestError", None],
        "previous": ["NotFoundError", "previous_response_not_found"],
        "key": ["AuthenticationError", None],
        "engine": ["InternalServerError", None],
    }
    assert sequences == 2
