"""Random agents against random templates: whatever an agent does to its history, each sampled id is trained once, behind what it saw.

An agent here re-spells, drops reasoning, renames ids, forks, edits, leaves answers out, tries again, and runs branches side by side. The
law (``agents.check_law``) compares what is trained with what the engine was really asked. And every message has a word of its own,
so that a prompt can be compared with the request that it was made of: a branch that saw another's words would show them.
"""

from __future__ import annotations

import asyncio
import json
import re
import unittest.mock

import pytest
from agents import TOOLS, Recorder, check_law
from hypothesis import given, settings
from hypothesis import strategies as st
from random_templates import features, made, source, tokenizer

from torchrl_chat.gateway.calls import Call, Refusal
from torchrl_chat.gateway.sessions import Session
from torchrl_chat.gateway.settings import Settings
from torchrl_chat.gateway.templates import Templates

WORD = re.compile(r"w[0-9]+x|r[0-9]+x")  # of a message; of a reasoning
# What a template that leaves words of others out, or says them twice, is for is tested with the bridge.
USUAL = {
    "tools": ("plain", "grouped", "json"),
    "calls": ("json", "xml", "list"),
    "system": ("own", "own", "default", "into_first"),
    "count": (("", 0), ("index", 0), ("reminder", 3), ("every", 3)),  # not one that quotes earlier words
    "generation": ("", "", "<think>\n\n</think>\n\n"),  # reasoning that the prompt opens, the talker does not close
}


class Talker:
    """What a model says: a word of its own each time, now and then with reasoning, with calls, or with nothing."""

    def __init__(self, draw):
        self.draw, self.count = draw, 0

    def __call__(self, ask):
        kind = self.draw(st.sampled_from(["text", "text", "reasoning", "call", "calls", "empty"]))
        self.count += 1
        word = f"w{self.count}x"
        if kind == "empty":
            return ""
        if kind == "reasoning":
            return f"<think>\nr{self.count}x\n</think>\n\n{word}"
        if kind == "text":
            return word
        made = [{"name": "look", "arguments": {"q": f"{word} {i}"}} for i in range(1 + (kind == "calls"))]
        return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in made)


class Agent:
    """A history, and what an agent does with it."""

    def __init__(self, draw, session: Session, said: list[int]):
        self.draw, self.session, self.said = draw, session, said
        self.messages = [self.new("user")]
        if draw(st.booleans()):
            self.messages.insert(0, self.new("system"))
        self.bodies: list[tuple[Call, bytes]] = []

    def new(self, role: str) -> dict:
        self.said[0] += 1
        return {"role": role, "content": f"w{self.said[0]}x"}

    async def step(self) -> None:
        """One request, and what the agent makes of the answer."""
        draw, said = self.draw, self.messages
        sent = [self.spelled(message) for message in said]
        again = bool(self.bodies) and draw(st.integers(0, 6)) == 0
        n = draw(st.sampled_from([1, 1, 1, 2]))
        call = Call(messages=tuple(sent), tools=TOOLS if draw(st.integers(0, 19)) else (), n=n)
        self.said[0] += 1  # two equal requests are two samples, unless one says that it is a retry
        body = f"{sent} {self.said[0]}".encode()
        if again:
            old, body = self.bodies[-1]
            call = Call(messages=old.messages, tools=old.tools, n=old.n, retry=1)
        try:
            exchange = self.session.open(call, body)
            reply = await exchange.reply()
        except Refusal:  # the template says that it has no such conversation
            self.messages = [self.new("user")]
            return
        exchange.deliver()
        for answer in exchange.answers:  # what a prompt shows is what its request says, and nothing else
            prompt = answer.transcript.tokens[: answer.transcript.spans[-1].start]
            [text] = self.session.templates.plain.codec.decode([prompt.tolist()])
            assert [word for word in WORD.findall(text) if word.startswith("w")] == words(call.messages)
        if again:
            return
        self.bodies.append((call, body))
        choice = reply.choices[draw(st.integers(0, n - 1))]
        message = choice.message
        follows = [
            {"role": "tool", "tool_call_id": each["id"], "content": self.new("tool")["content"]}
            for each in message.get("tool_calls") or ()
        ]
        if not follows or draw(st.integers(0, 4)) == 0:
            follows.append(self.new("user"))
        odd = ["left out", "left out", "edit", "edit", "fork", "fork", "compact", "words", "system"]
        what = draw(st.sampled_from(["on"] * 14 + odd))
        if what == "left out":
            self.messages = [*said, self.new("user")]
        elif what == "edit":
            at = len(said) - 1 - draw(st.integers(0, min(3, len(said) - 1)))
            changed = {**said[at], "content": self.new("user")["content"]}
            self.messages = [*said[:at], changed, *said[at + 1 :], message, *follows]
        elif what == "fork":
            starts = [i for i, each in enumerate(said) if each["role"] == "user"]
            self.messages = [*said[: draw(st.sampled_from(starts))], self.new("user")]
        elif what == "compact":
            self.messages = [self.new("user")]
        elif what == "words":
            self.messages = [*said, {"role": "assistant", "content": self.new("user")["content"]}, self.new("user")]
        elif what == "system":
            rest = said[1:] if said[0]["role"] == "system" else said
            self.messages = [self.new("system"), *rest, message, *follows]
        else:
            self.messages = [*said, message, *follows]

    def spelled(self, message: dict) -> dict:
        """A message as a framework might send it back."""
        draw, message = self.draw, dict(message)
        if message["role"] != "assistant":
            return {**message, "name": None} if draw(st.booleans()) else message
        if "reasoning_content" in message and draw(st.booleans()):
            told = message.pop("reasoning_content")
            if draw(st.booleans()):
                message["reasoning"] = told
        if calls := message.get("tool_calls"):
            indent = draw(st.sampled_from([None, 1]))
            message["tool_calls"] = [
                {
                    **call,
                    "index": i,
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": json.dumps(json.loads(call["function"]["arguments"]), indent=indent),
                    },
                }
                for i, call in enumerate(calls)
            ]
            if not message["content"]:
                message["content"] = draw(st.sampled_from([None, "", "\n"]))
        return message


def words(messages) -> list[str]:
    """The words of messages, in order; those of reasoning left out."""
    text = " ".join(
        f"{message.get('content') or ''} {json.dumps(message.get('tool_calls') or '')}" for message in messages
    )
    return [word for word in WORD.findall(text) if word.startswith("w")]


def play(data, f, steps: int) -> None:
    """Play some agents in one session; all the laws."""
    draw = data.draw
    templates = Templates(tokenizer(), chat_template=source(f))
    templates.of(
        templates.key(TOOLS), TOOLS
    )  # made in a thread otherwise, and then draws come in the order of chance
    talker = Talker(draw)
    session = Session("random", Recorder(templates, talker, draw(st.integers(0, 99))), templates, Settings())
    said = [1000]

    async def all_of_it() -> None:
        agents = [Agent(draw, session, said) for _ in range(draw(st.integers(1, 3)))]
        for _ in range(steps):
            some = draw(st.lists(st.sampled_from(agents), min_size=1, max_size=3, unique=True))
            await asyncio.gather(*(agent.step() for agent in some))

    async def here(function, *arguments):
        return function(*arguments)

    # In a thread it would end by chance before or after what others draw meanwhile.
    with unittest.mock.patch("asyncio.to_thread", here):
        asyncio.run(all_of_it())
    if not session.turns:
        return
    check_law(session)


@st.composite
def usual(draw):
    f = draw(features(at_most=2))
    return made(**{**vars(f), **{key: draw(st.sampled_from(values)) for key, values in USUAL.items()}})


@settings(max_examples=4)
@given(data=st.data(), f=usual())
def test_random_agents_and_random_templates(data, f):
    play(data, f, 9)


@pytest.mark.full
@settings(max_examples=120)
@given(data=st.data(), f=usual())
def test_many_random_agents_and_random_templates(data, f):
    play(data, f, 12)
