"""Real chat templates behind the gateway: an agent that re-spells its history and drops reasoning makes one sequence, exact to the id."""

from __future__ import annotations

import asyncio

import pytest
from agents import Recorder, ask, check_law, result, user
from conftest import CORPUS, corpus_tokenizer, of_the_day

from torchrl_chat.gateway.sessions import Session
from torchrl_chat.gateway.settings import Settings
from torchrl_chat.gateway.templates import Templates

FUNCTION = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = ({"type": "function", "function": FUNCTION},)
NAMES = (*CORPUS, "lc_Qwen-Qwen3-0.6B", "lc_deepseek-ai-DeepSeek-V3.1")

pytestmark = pytest.mark.corpus


def session_of(name: str, tools: tuple) -> Session:
    """A session whose model calls a tool, thinks, and says something, in turns."""
    templates = Templates(corpus_tokenizer(name))
    template = templates.of(templates.key(tools), tools)

    def script(asked):
        turn = sum(message["role"] == "assistant" for message in asked.messages)
        if tools and turn % 3 == 1 and (call := template.call_text("get_weather", {"city": f"Tromsø {turn}"})):
            return call
        if turn % 3 == 2 and "<think>" in template.renderer.source:
            return f"<think>\nI think {turn}.\n</think>\n\nAnswer {turn}."
        return f"Answer {turn}  of some words."

    engine = Recorder(templates, script, seed=1)
    engine.template = template
    return Session("corpus", engine, templates, Settings())


@pytest.mark.parametrize("name", of_the_day(*NAMES, share=10))
@pytest.mark.parametrize("compacted", [False, True], ids=["plain", "compacted"])
def test_an_agent_on_a_real_template_makes_one_sequence(name, compacted):
    session = session_of(name, TOOLS)

    async def played() -> None:
        messages = [user("hello")]
        for turn in range(8):
            if compacted and turn == 4:  # a summary in the place of the past
                messages = [user("A summary: we said hello. Go on.")]
            message = dict((await ask(session, messages, tools=TOOLS)).choices[0].message)
            if turn % 2:
                message.pop("reasoning_content", None)
            messages.append(message)
            calls = message.get("tool_calls")
            messages += result(message, *["7 °C"] * len(calls)) if calls else [user(f"go on {turn}")]

    asyncio.run(played())
    assert check_law(session) == 1 + compacted
    assert session.turns == 8
