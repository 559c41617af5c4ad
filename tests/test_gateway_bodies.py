"""What is read of a body from where an earlier one of its session ended is what is read of it whole."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time

import httpx
import pytest
from dialects import Script, served
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat.gateway.bodies import Bodies, History
from torchrl_chat.gateway.calls import Refusal, loads
from torchrl_chat.gateway.dialects import DIALECTS
from torchrl_chat.gateway.dialects.chat import ChatCompletions

CHAT = ChatCompletions()
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['"messages":[', "]}", "\\", "é]"]
)


def spelled(draw, value):
    """A value as some client spells it."""
    spaces = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:  ")]))
    return json.dumps(value, separators=spaces, ensure_ascii=draw(st.booleans()))


@st.composite
def histories(draw):
    """Bodies of one agent: each goes on from one of those before it, or changes something of it."""
    dialect = draw(st.sampled_from(DIALECTS))
    key = dialect.history
    head = draw(
        st.sampled_from(
            [
                "",
                '"model":"m",',
                '"metadata":{"messages":[1],"input":[]},',
                f'"{key}":[{{"role":"user","content":"x"}}],',
            ]
        )
    )
    tail = draw(
        st.sampled_from(
            ["", ',"model":"n"', ',"user":"messages\\":["', f',"{key}":[{{"role":"user","content":"y"}}]']
        )
    )
    found, known = [], [[]]
    for _ in range(draw(st.integers(2, 6))):
        items = list(draw(st.sampled_from(known)))
        if items and draw(st.integers(0, 3)) == 0:
            items[draw(st.integers(0, len(items) - 1))] = spelled(draw, {"role": "user", "content": draw(texts)})
        if items and draw(st.booleans()):
            items.append(spelled(draw, {"role": "assistant", "content": draw(texts)}))
        items.append(spelled(draw, {"role": "user", "content": draw(texts)}))
        known.append(items)
        joined = draw(st.sampled_from([",", " , "])).join(items)
        found.append(f'{{{head}"{key}": [{joined}]{tail}}}'.encode())
        if draw(st.integers(0, 4)) == 0:
            found.append(found[-1][: draw(st.integers(1, len(found[-1])))])  # cut off
    return dialect, found


def outcome(function):
    """What a function returns, or why it refuses."""
    try:
        return function(), None
    except Refusal as refusal:
        return None, refusal.message


@settings(max_examples=150, deadline=None)
@given(histories())
def test_a_body_says_the_same_whatever_was_read_before(told):
    dialect, raws = told
    bodies = Bodies()
    for raw in raws:
        value, why = outcome(lambda raw=raw: loads(raw))
        if why is not None:
            assert outcome(lambda raw=raw: bodies.read(raw, dialect.path, dialect.history))[1] == why
            continue
        body = bodies.read(raw, dialect.path, dialect.history)
        assert body.value == value
        assert body.digest == hashlib.sha256(dialect.path.encode() + raw).digest()
        call = dialect.parse(body.value, {})
        assert call == dialect.parse(value, {})
        bodies.keep(body, call.messages)


def raw_of(messages, **more):
    return json.dumps({"model": "m", "messages": messages, **more}).encode()


def user(text):
    return {"role": "user", "content": text}


def read(bodies, raw):
    body = bodies.read(raw, CHAT.path, CHAT.history)
    call = CHAT.parse(body.value, {})
    bodies.keep(body, call.messages)
    return body.value["messages"], call


def test_what_is_known_is_not_read_again():
    bodies, messages, known = Bodies(), [], ()
    for turn in range(12):
        messages += [user(f"é {turn}")]
        items, call = read(bodies, raw_of(messages))
        assert getattr(items, "read", 0) == len(known)
        assert all(mine is theirs for mine, theirs in zip(call.messages, known, strict=False))
        known = call.messages
        messages += [{"role": "assistant", "content": f"answer {turn}"}]
    assert len(bodies) < len(raw_of(messages))  # one beginning is held, however many requests there were
    items, _ = read(bodies, raw_of([user("another"), *messages[1:], user("on")]))
    assert not isinstance(items, History)  # an edit is read whole
    bodies.forget()
    assert not len(bodies)


def test_the_place_of_a_message_is_told_behind_what_is_known():
    bodies = Bodies()
    read(bodies, raw_of([user("a"), user("b")]))
    with pytest.raises(Refusal, match=r"messages\[2\]\.role"):
        read(bodies, raw_of([user("a"), user("b"), {"role": "nobody", "content": ""}]))
    deep = json.loads("[" * 70 + "]" * 70)
    with pytest.raises(Refusal, match="nested deeper"):
        read(bodies, raw_of([user("a"), user("b"), {"role": "user", "content": deep}]))


def test_what_is_held_is_bounded():
    bodies = Bodies()
    for number in range(40):
        read(bodies, raw_of([user(f"{number} " + "x" * 300_000)]))
    assert len(bodies) < 2**22 + 10**6


def asking(session, raw):
    auth = {"Authorization": f"Bearer {session.api_key}"}
    response = httpx.post(f"{session.base_url}/chat/completions", content=raw, headers=auth, timeout=60)
    assert response.status_code == 200
    return response.json()["choices"][0]["message"]


def test_the_request_after_an_answer_is_read_from_where_its_own_ended():
    """However soon it comes: a body is remembered by the time its answer has gone out."""

    class Watched(Bodies):
        def __init__(self):
            super().__init__()
            self.known = []

        def read(self, *given):
            body = super().read(*given)
            self.known.append(len(getattr(body.value["messages"], "known", ())))
            return body

    with served(Script()) as gateway:
        session = gateway.session()
        session.session.bodies = Watched()
        messages = []
        for turn in range(5):
            messages.append(user(f"turn {turn}"))
            messages.append(asking(session, raw_of(messages)))
        assert session.session.bodies.known == [0, 1, 3, 5, 7]


def test_a_body_is_remembered_while_its_answer_is_sampled():
    script, seen = Script(), []
    with served(script) as gateway:
        session = gateway.session()

        async def slow(ask):
            until = time.monotonic() + 60
            while not len(session.session.bodies) and time.monotonic() < until:
                await asyncio.sleep(0.001)
            seen.append(len(session.session.bodies))
            return "done"

        script.lines = slow
        asking(session, raw_of([user("hi")]))
        assert seen[0] > 0


def test_a_finished_session_holds_no_body():
    with served(Script()) as gateway:
        session = gateway.session()
        asking(session, raw_of([user("hi")]))
        asking(session, raw_of([user("on")]))  # by then the first was remembered
        assert len(session.session.bodies)
        session.finish(1.0)
        assert not len(session.session.bodies)
