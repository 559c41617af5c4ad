"""Answers of any kind, streams added up, histories spelled as agents spell them, and bodies with one thing wrong."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from agents import THINKING, Recorder, templates_of
from hypothesis import strategies as st

from torchrl_chat.gateway import Gateway, Settings
from torchrl_chat.gateway.calls import Choice, Delta, Reply, ToolCall, Usage
from torchrl_chat.openenv.protocol import ServerLimits


# ---------------------------------------------------------------------- a gateway whose model says what a test says
class Script:
    """What the model says: texts one after the other, or what a function says."""

    def __init__(self) -> None:
        self.lines = lambda ask: f"answer to {ask.messages[-1]['content']}"

    def __call__(self, ask: Any) -> Any:
        return self.lines(ask)

    def says(self, *lines: Any) -> None:
        left = iter(lines)
        self.lines = lambda ask: next(left)


@contextlib.contextmanager
def served(script: Script) -> Iterator[Gateway]:
    templates = templates_of(THINKING)
    with Gateway(
        Recorder(templates, script),
        templates.plain.tokenizer,
        template={"chat_template": templates.plain.renderer.source},
        settings=Settings(patience=0.05),
        server=ServerLimits(max_message_bytes=100_000, max_sessions=50),
    ) as gateway:
        yield gateway


def untouched(session: Any) -> bool:
    """Whether a session is as it was made."""
    session = session.session
    return not (session.turns or session.tree.roots or session._exchanges or session.findings or session.report)


# ---------------------------------------------------------------------- answers
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def choices(draw: Any) -> Choice:
    """An answer as a session tells it: content is null only beside calls, and blanks beside calls are none."""
    calls = []
    for place in range(draw(st.integers(0, 3))):
        spaced = json.dumps(
            draw(st.dictionaries(words, values, max_size=3)), indent=draw(st.sampled_from([None, 1]))
        )
        broken = draw(st.integers(0, 9)) == 0
        calls.append(ToolCall(f"call_{place}x", draw(st.sampled_from(["look", "add"])), spaced + "}" * broken))
    content = draw(words | st.just("") | st.just(" \n"))
    if calls and not content.strip():
        content = None
    finish = "tool_calls" if calls else draw(st.sampled_from(["stop", "length"]))
    stopped = draw(st.sampled_from([None, "END"])) if finish == "stop" else None
    return Choice(content, draw(st.none() | words), tuple(calls), finish, stopped)


@st.composite
def pieces(draw: Any, choice: Choice) -> list[Delta]:
    """An answer in pieces, cut anywhere."""
    found = []
    for kind, text in (("reasoning", choice.reasoning or ""), ("content", choice.content or "")):
        while text:
            size = draw(st.integers(1, len(text)))
            found.append(Delta(0, kind, text[:size]))
            text = text[size:]
    for place, call in enumerate(choice.calls):
        found.append(Delta(0, "call", "", place, call.id, call.name))
        cut = draw(st.integers(0, len(call.arguments)))
        found += [
            Delta(0, "arguments", part, place) for part in (call.arguments[:cut], call.arguments[cut:]) if part
        ]
    return found


def reply_of(choice: Choice, name: str = "abc1") -> Reply:
    return Reply(name, (choice,), Usage(7, 5, 3), 1, "m")


def streamed(dialect: Any, call: Any, reply: Reply, told: list[Delta]) -> list[dict]:
    """The events of an answer, as a client reads them."""
    writer = dialect.events(call)
    usage = Usage(reply.usage.prompt, 0, reply.usage.kept)
    parts = [writer.begin(reply.name, reply.created, reply.model, usage), writer.ping()]
    return events_of(b"".join([*parts, *map(writer.delta, told), writer.end(reply)]))


def events_of(raw: bytes) -> list[dict]:
    """The data of each event; its name is its type."""
    found = []
    for block in raw.decode().split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def added_up_messages(events: list[dict]) -> dict:
    """The message that the events of a stream of the Messages API add up to."""
    message: dict = {}
    partial: dict[int, str] = {}
    open_at = None
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            assert not message
            message = copy.deepcopy(event["message"])
        elif kind == "content_block_start":
            assert open_at is None
            assert event["index"] == len(message["content"])
            open_at = event["index"]
            message["content"].append(copy.deepcopy(event["content_block"]))
        elif kind == "content_block_delta":
            assert event["index"] == open_at
            block, delta = message["content"][open_at], event["delta"]
            of = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
            if delta["type"] == "input_json_delta":
                partial[open_at] = partial.get(open_at, "") + delta["partial_json"]
            else:
                block[of[delta["type"]]] += delta[of[delta["type"]]]
        elif kind == "content_block_stop":
            assert event["index"] == open_at
            if open_at in partial:
                message["content"][open_at]["input"] = json.loads(partial[open_at])
            open_at = None
        elif kind == "message_delta":
            message |= event["delta"]
            message["usage"] = {**message["usage"], **event["usage"]}
        else:
            assert kind in ("ping", "message_stop")
    assert events[-1]["type"] == "message_stop"
    return message


def added_up_items(events: list[dict]) -> list[dict]:
    """The items that the events of a stream of the Responses API add up to: by their deltas, and as each ends."""
    items: list[dict] = []
    ended: list[dict] = []
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind in ("created", "in_progress", "completed", "incomplete"):
            continue
        assert event["output_index"] == len(ended)
        if kind == "output_item.added":
            assert len(items) == len(ended)
            items.append(copy.deepcopy(event["item"]))
            continue
        item = items[-1]
        if kind == "output_item.done":
            ended.append(event["item"])
            item["status"] = event["item"]["status"]
            continue
        assert event["item_id"] == item["id"]
        if kind == "content_part.added":
            item["content"].append(copy.deepcopy(event["part"]))
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            item["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert (event["arguments"], event["name"]) == (item["arguments"], item["name"])
        elif kind == "content_part.done":
            assert event["part"] == item["content"][event["content_index"]]
        else:
            assert kind in ("output_text.done", "reasoning_text.done")
            assert event["text"] == item["content"][event["content_index"]]["text"]
    assert items == ended
    return items


# ---------------------------------------------------------------------- bodies with one thing wrong
JUNK: Mapping[str, Any] = {
    "null": None,
    "boolean": True,
    "integer": 7,
    "number": 2.5,
    "string": "junk",
    "list": [],
    "object": {},
    "nulls": [None],
    "odd object": {"type": "junk"},
}


def spoiled(body: Mapping[str, Any], takes: Mapping[str, str], count: int, seed: str) -> list[tuple[str, dict]]:
    """Bodies that have one value of a kind which does not belong there.

    Args:
        body: a good one.
        takes: for each place, ``"input.0.role"``, the kinds of :data:`JUNK` that may stand there.
        count: how many.
        seed: which of all.
    """
    found = []
    for path, kinds in takes.items():
        for kind in JUNK.keys() - set(kinds.split(", ")):
            spoilt = json.loads(json.dumps(body))
            inner, keys = spoilt, [int(key) if key.isdigit() else key for key in path.split(".")]
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = JUNK[kind]
            found.append((f"{path} is {kind}", spoilt))
    found.sort(key=lambda each: each[0])
    return random.Random(seed).sample(found, count)
