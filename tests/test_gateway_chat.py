"""OpenAI chat completions over HTTP: the SDK, streams, refusals, keys, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from pathlib import Path

import httpx
import pytest
from agents import TOOLS, Recorder, calling, check_law, client_of, templates_of
from openai import BadRequestError, OpenAI, PermissionDeniedError

from torchrl_chat.conversation import Limits
from torchrl_chat.gateway import Gateway, Refusal, Settings
from torchrl_chat.gateway.dialects.chat import _REFUSED, ChatCompletions
from torchrl_chat.gateway.matching import RULES
from torchrl_chat.openenv.protocol import ServerLimits


class Script:
    """What the model says, replaced by each test."""

    def __init__(self):
        self.lines = lambda ask: f"answer to {ask.messages[-1]['content']}"

    def __call__(self, ask):
        return self.lines(ask)


SCRIPT = Script()


@pytest.fixture(scope="module")
def gateway():
    templates = templates_of()
    engine = Recorder(templates, SCRIPT)
    with Gateway(
        engine,
        templates.plain.tokenizer,
        template={"chat_template": templates.plain.renderer.source},
        settings=Settings(patience=0.05),
        server=ServerLimits(max_message_bytes=100_000, max_sessions=50),
    ) as gateway:
        yield gateway


@pytest.fixture
def session(gateway):
    SCRIPT.__init__()
    gateway.engine.sampled.clear()
    with gateway.session() as session:
        yield session


def says(*lines):
    left = iter(lines)
    SCRIPT.lines = lambda ask: next(left)


def streamed(client, messages, **more):
    with client.chat.completions.stream(model="m", messages=messages, **more) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_agent_of_the_sdk_makes_one_sequence(session, stream):
    says(calling("a", "b"), "two", calling("c", said="see:"), "four")
    client, messages = client_of(session), [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]
    make = (
        streamed
        if stream
        else lambda client, messages, **more: client.chat.completions.create(model="m", messages=messages, **more)
    )
    finishes = []
    for turn in range(4):
        choice = make(client, messages, tools=list(TOOLS)).choices[0]
        finishes.append(choice.finish_reason)
        messages.append(choice.message)
        for call in choice.message.tool_calls or ():
            messages.append({"role": "tool", "tool_call_id": call.id, "content": call.function.arguments})
        if not choice.message.tool_calls:
            messages.append({"role": "user", "content": f"go on {turn}"})
    assert finishes == ["tool_calls", "stop", "tool_calls", "stop"]
    assert [message.content for message in messages if not isinstance(message, dict)] == [
        None,
        "two",
        "see:",
        "four",
    ]
    assert check_law(session.session) == 1
    assert session.report["counts"] == {"begins": 1}


def test_what_a_whole_answer_holds(session):
    says("one", "two")
    client = client_of(session)
    reply = client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "hi"}],
        n=2,
        logprobs=True,
        extra_body={"return_token_ids": True},
    )
    assert reply.model == "any"
    assert reply.id.startswith("chatcmpl-")
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert [choice.message.content for choice in reply.choices] == ["one", "two"]
    answers = session.session.tree.answers
    for choice, answer in zip(reply.choices, answers, strict=True):
        span = answer.transcript.spans[-1]
        assert choice.token_ids == answer.transcript.tokens[span.start : span.end].tolist()
        assert [entry.logprob for entry in choice.logprobs.content] == [-0.25] * len(choice.token_ids)
    assert reply.prompt_token_ids == answers[0].transcript.tokens[: answers[0].transcript.spans[-1].start].tolist()
    assert reply.usage.prompt_tokens == len(reply.prompt_token_ids)
    assert reply.usage.completion_tokens == sum(len(choice.token_ids) for choice in reply.choices)


def test_a_stream_says_what_the_whole_answer_says(session):
    says(*[calling("a", said="some words " * 30)] * 2)
    client, ask = client_of(session), [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(model="m", messages=ask, tools=list(TOOLS)).choices[0].message
    chunks = list(
        client.chat.completions.create(
            model="m", messages=ask, tools=list(TOOLS), stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.content
    calls = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]
    assert all(call.index == 0 for call in calls)
    assert calls[0].function.name == "look"
    assert "".join(call.function.arguments or "" for call in calls) == whole.tool_calls[0].function.arguments
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []


def test_an_engine_that_tells_its_tokens_is_streamed(gateway, session):
    told = []

    async def slow(ask):
        ids = gateway.engine.spelled("word " * 60)
        for end in range(1, len(ids)):
            ask.told(ids[:end])
            await asyncio.sleep(0)
        told.append(time.monotonic())
        await asyncio.sleep(0.05)
        return "word " * 60

    SCRIPT.lines = slow
    client, seen = client_of(session), []
    for chunk in client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hi"}], stream=True
    ):
        seen.append((time.monotonic(), chunk.choices[0].delta.content or ""))
    text = "".join(piece for _, piece in seen)
    assert text == "word " * 60
    assert any(piece for when, piece in seen[:-2])


def test_a_stream_says_nothing_beyond_a_stop_string(gateway, session):
    """Though the engine samples on, and tells it."""
    text = "word " * 20 + "STOP" + " more" * 40

    async def on(ask):
        ids = gateway.engine.spelled(text)
        for end in range(1, len(ids)):
            ask.told(ids[:end])
            await asyncio.sleep(0)
        return text

    SCRIPT.lines = on
    stream = client_of(session).chat.completions.create(model="m", messages=[USER], stream=True, stop="STOP")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "word " * 20


def test_developers_parts_and_unknown_keys_are_taken(session):
    body = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "hi", "name": "me"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "strict": True}}],
        "tool_choice": "required",
        "max_tokens": 64_000,
        "store": True,
        "reasoning_effort": "low",
        "something_new": {"a": 1},
    }
    reply = httpx.post(f"{session.base_url}/chat/completions", json=body, headers=auth(session))
    assert reply.status_code == 200, reply.text
    assert session.session.tree.answers[0].transcript.messages[0] == {"role": "system", "content": "Be brief."}
    assert any("'required' is not enforced" in finding for finding in session.report["findings"])


def auth(session) -> dict:
    return {"authorization": f"Bearer {session.api_key}"}


USER = {"role": "user", "content": "hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
A_CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
REFUSED = {  # what a body has beside the others, and what the refusal names
    "no messages": ({"messages": None}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "messages that are a text": ({"messages": "hi"}, "messages"),
    "a message that is a text": ({"messages": ["hi"]}, r"messages\[0\]"),
    "no role": ({"messages": [{"content": "x"}]}, r"messages\[0\].role"),
    "another role": ({"messages": [{"role": "function", "content": "x"}]}, "'function'"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\].content"),
    "a content that is a number": ({"messages": [{"role": "user", "content": 3}]}, "a number"),
    "an image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "image_url"),
    "a part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud83d"}]}, "surrogate"),
    "a result without a call": ({"messages": [USER, {"role": "tool", "content": "x"}]}, "tool_call_id"),
    "calls that are no list": ({"messages": [USER, {"role": "assistant", "tool_calls": {}}, USER]}, "tool_calls"),
    "a call without a function": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}, USER]},
        r"tool_calls\[0\].function",
    ),
    "a custom call": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{**A_CALL, "type": "custom"}]}, USER]},
        "custom",
    ),
    "arguments that are a list": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": []}}]}]},
        "arguments",
    ),
    "the older call": (
        {"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}]},
        "function_call",
    ),
    "functions": ({"functions": [{"name": "f"}]}, "functions"),
    "tools that are an object": ({"tools": {}}, "tools"),
    "a custom tool": ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "custom"),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "name"),
    "parameters that are a list": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "parameters",
    ),
    "a named tool": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
    ),
    "a required tool of none": ({"tool_choice": "required"}, "tool_choice"),
    "an unknown choice": ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    "no n": ({"n": 0}, "'n'"),
    "a large n": ({"n": 100}, "'n'"),
    "a half n": ({"n": 1.5}, "'n'"),
    "a true n": ({"n": True}, "'n'"),
    "top log-probs": ({"logprobs": True, "top_logprobs": 3}, "top_logprobs"),
    "log-probs that are a number": ({"logprobs": 1}, "logprobs"),
    "a bias": ({"logit_bias": {"1": 5}}, "logit_bias"),
    "a JSON answer": ({"response_format": {"type": "json_object"}}, "response_format"),
    "an unknown format": ({"response_format": {"type": "xml"}}, "response_format"),
    "sound": ({"modalities": ["text", "audio"]}, "modalities"),
    "a voice": ({"audio": {"voice": "x"}}, "audio"),
    "a search": ({"web_search_options": {"a": 1}}, "web_search_options"),
    "a hot temperature": ({"temperature": 3}, "temperature"),
    "a temperature that is a text": ({"temperature": "1"}, "temperature"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "stops that are numbers": ({"stop": [1]}, "stop"),
    "many stops": ({"stop": ["x"] * 17}, "stop"),
    "a stream that is a text": ({"stream": "yes"}, "stream"),
    "a beginning": ({"continue_final_message": True}, "continue_final_message"),
    "a model that is a number": ({"model": 3}, "model"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_to_be_had_is_refused_in_a_sentence(session, what):
    more, words = REFUSED[what]
    raw = json.dumps({"model": "m", "messages": [USER], **more})
    reply = httpx.post(
        f"{session.base_url}/chat/completions",
        content=raw,
        headers={**auth(session), "content-type": "application/json"},
    )
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    if "surrogate" not in words:  # orjson refuses those itself
        assert re.search(words, error["message"]), error
    assert len(error["message"].split()) > 4
    assert not session.session.turns


def test_every_refused_key_stands_in_the_documentation():
    text = (
        (Path(__file__).parent.parent / "docs" / "refused.md")
        .read_text()
        .partition("## Agents and their requests")[2]
    )
    for key in [*_REFUSED, "tool_choice", "response_format", "top_logprobs", "modalities", "messages", "tools"]:
        assert f"`{key}`" in text, key
    matching = (Path(__file__).parent.parent / "docs" / "agent" / "index.md").read_text()
    assert all(f"| {name} |" in matching for name in RULES if name.startswith("A"))


RAW = {
    "no JSON": (b"{", 400),
    "a list": (b"[]", 400),
    "a number": (b"3", 400),
    "nothing": (b"", 400),
    "no UTF-8": (b'{"a": "\xff"}', 400),
    "too deep": (b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}", 400),
    "very deep": (b"[" * 50_000, 400),
    "infinity": (b'{"temperature": Infinity}', 400),
    "a long number": (b'{"n": 123456789012345678901234567890}', 400),
    "a very long number": (b'{"messages": [{"role": "user", "content": "hi"}], "n": ' + b"9" * 400 + b"}", 400),
    "too large": (b'{"model": "' + b"x" * 100_001 + b'"}', 413),
}


@pytest.mark.parametrize("what", RAW)
def test_bodies_that_cannot_be_read_are_refused(session, what):
    raw, status = RAW[what]
    reply = httpx.post(f"{session.base_url}/chat/completions", content=raw, headers=auth(session))
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


# ---------------------------------------------------------------------- who may do what
def test_sessions_are_let_in_by_their_own_key(gateway, session):
    with gateway.session() as other:
        asked = {"model": "m", "messages": [USER]}
        for key in ("", other.api_key, "wrong"):
            reply = httpx.post(
                f"{session.base_url}/chat/completions",
                json=asked,
                headers={"authorization": f"Bearer {key}"} if key else {},
            )
            assert reply.status_code == 401
            assert reply.json()["error"]["type"] == "authentication_error"
        assert not session.session.turns
        by_key = httpx.post(f"{gateway.url}/v1/chat/completions", json=asked, headers=auth(other))
        assert by_key.status_code == 200
        assert (other.session.turns, session.session.turns) == (1, 0)
        anthropic = httpx.post(
            f"{session.base_url}/chat/completions", json=asked, headers={"x-api-key": session.api_key}
        )
        assert anthropic.status_code == 200


def test_agents_are_no_drivers(gateway, session):
    for method, path in (
        ("POST", "/sessions"),
        ("GET", "/sessions"),
        ("POST", f"/s/{session.name}/finish"),
        ("GET", f"/s/{session.name}/"),
    ):
        reply = httpx.request(
            method, gateway.url + path, json={"reward": 1.0} if method == "POST" else None, headers=auth(session)
        )
        assert reply.status_code == 401, path
    assert not session.session.finished


def test_a_driver_over_http(gateway):
    SCRIPT.__init__()
    headers = {"authorization": f"Bearer {gateway.token}"}
    made = httpx.post(f"{gateway.url}/sessions", json={"row": {"answer": "7"}, "seed": 3}, headers=headers).json()
    client = OpenAI(base_url=made["base_url"], api_key=made["api_key"])
    assert client.models.list().data[0].id == "policy"
    client.chat.completions.create(model="m", messages=[USER])
    shown = httpx.get(f"{gateway.url}/s/{made['name']}/", headers=headers).json()
    assert (shown["answers"], shown["stop"]) == (1, "running")
    bad = httpx.post(f"{gateway.url}/s/{made['name']}/finish", json={"rewards": 1}, headers=headers)
    assert bad.status_code == 400
    for end in ({"parts": {"a": "x"}}, {"failure": {"a": 1}}, {"reward": 10**400}):
        assert httpx.post(f"{gateway.url}/s/{made['name']}/finish", json=end, headers=headers).status_code == 400
    huge = httpx.post(f"{gateway.url}/sessions", json={"seed": 10**30}, headers=headers)
    assert huge.status_code == 400
    done = httpx.post(f"{gateway.url}/s/{made['name']}/finish", json={"reward": 0.5}, headers=headers).json()
    assert (done["reward"], done["stop"], done["success"]) == (0.5, "answered", True)
    [session] = [each for each in gateway.take() if each.name == made["name"]]
    assert session.row == {"answer": "7"}
    with pytest.raises(PermissionDeniedError, match="finished"):
        client.chat.completions.create(model="m", messages=[USER])
    taken = httpx.post(f"{gateway.url}/sessions", json={"name": made["name"]}, headers=headers)
    assert taken.status_code == 409


def test_addresses_that_are_not_there(gateway, session):
    for path, status in (("/v1/nothing", 404), ("/s/nobody/v1/chat/completions", 404), ("/", 404)):
        assert httpx.post(gateway.url + path, json={}, headers=auth(session)).status_code == status
    assert httpx.get(f"{session.base_url}/chat/completions", headers=auth(session)).status_code == 405
    assert httpx.get(f"{gateway.url}/health").json()["status"] == "healthy"
    foreign = httpx.get(f"{gateway.url}/health", headers={"host": "example.org"})
    assert foreign.status_code == 400
    page = httpx.post(
        f"{session.base_url}/chat/completions", json={}, headers={**auth(session), "origin": "https://example.org"}
    )
    assert page.status_code == 401


def test_implicit_sessions_take_the_key_that_they_are_begun_with():
    templates = templates_of()
    with Gateway(
        Recorder(templates, SCRIPT),
        templates.plain.tokenizer,
        template={"chat_template": templates.plain.renderer.source},
        implicit=True,
        server=ServerLimits(max_sessions=3),
    ) as gateway:
        SCRIPT.__init__()
        asked = {"model": "m", "messages": [USER]}

        def post(path, key=""):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            return httpx.post(f"{gateway.url}{path}/chat/completions", json=asked, headers=headers).status_code

        headers = {"authorization": "Bearer k"}
        assert httpx.get(f"{gateway.url}/s/mine/v1/models", headers=headers).status_code == 200
        for raw in (b"{", b"[]", b'{"messages": 3}'):
            bad = httpx.post(f"{gateway.url}/s/mine/v1/chat/completions", content=raw, headers=headers)
            assert bad.status_code == 400
        assert not gateway.table.open
        assert [post("/s/mine/v1", "k"), post("/s/mine/v1", "k"), post("/s/mine/v1", "other")] == [200, 200, 401]
        assert [post("/v1", "own"), post("/v1", "own"), post("/v1")] == [200, 200, 200]
        assert sorted(gateway.table.open) == sorted({"mine", "default", *gateway.table.open})
        assert len(gateway.table.open) == 3
        assert post("/s/more/v1", "k") == 429
        names = list(gateway.table.open)
    assert {session.name for session in gateway.take()} == set(names)
    for public in (False, True):
        given = {"implicit": True, "public": public, "host": "0.0.0.0"}
        with contextlib.nullcontext() if public else pytest.raises(ValueError, match="public=True"):
            Gateway(Recorder(templates, SCRIPT), templates.plain.tokenizer, **given)


def test_an_agent_over_its_budget_is_told_so(gateway):
    SCRIPT.__init__()
    with gateway.session(settings=Settings(limits=Limits(max_turns=1))) as session:
        client = client_of(session)
        client.chat.completions.create(model="m", messages=[USER])
        with pytest.raises(PermissionDeniedError, match="max_turns, 1") as refused:
            client.chat.completions.create(model="m", messages=[USER])
        assert refused.value.code == "max_turns"
        assert session.report["stop"] == "max_turns"
    with gateway.session(settings=Settings(limits=Limits(max_context=50))) as session:
        with pytest.raises(BadRequestError) as refused:
            client_of(session).chat.completions.create(
                model="m", messages=[{"role": "user", "content": "x " * 200}]
            )
        assert refused.value.code == "context_length_exceeded"


# ---------------------------------------------------------------------- what goes wrong on the way
def test_the_sdk_tries_an_engine_that_failed_again(session):
    says(ValueError("out of memory"), "two")
    reply = client_of(session).chat.completions.create(model="m", messages=[USER])
    assert reply.choices[0].message.content == "two"
    assert check_law(session.session) == 1


def test_an_error_in_a_stream_is_an_event(session):
    async def fail(ask):
        await asyncio.sleep(0.01)
        return ValueError("out of memory")

    SCRIPT.lines = fail
    with pytest.raises(Exception, match="out of memory"):
        list(client_of(session).chat.completions.create(model="m", messages=[USER], stream=True))
    SCRIPT.__init__()
    assert client_of(session).chat.completions.create(model="m", messages=[USER]).choices


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_everything(gateway, session, stream):
    began = []

    async def slow(ask):
        began.append(ask)
        await asyncio.sleep(60)

    SCRIPT.lines = slow
    asked = {"model": "m", "messages": [USER], "stream": stream}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{session.base_url}/chat/completions", json=asked, headers=auth(session), timeout=0.2)
    assert began
    waited = time.monotonic()
    while session.session.flying and time.monotonic() - waited < 20:
        time.sleep(0.01)
    assert not session.session.flying
    assert not gateway.run(lambda: session.session._exchanges)
    SCRIPT.__init__()
    assert client_of(session).chat.completions.create(model="m", messages=[USER]).choices
    assert session.session.turns == 1


def test_an_answer_that_was_cut_off_is_given_again(session):
    """The half of it was for nobody: the same request gets the whole."""
    line = "word " * 200
    says(line, "another")
    asked = {"model": "m", "messages": [USER]}
    exchange = None

    def lose():
        nonlocal exchange
        call = ChatCompletions().parse(asked, {})
        exchange = session.session.open(call, b"/chat/completions" + raw)

    raw = json.dumps(asked).encode()
    session._gateway.run(lose)
    reply = httpx.post(f"{session.base_url}/chat/completions", content=raw, headers=auth(session)).json()
    assert reply["choices"][0]["message"]["content"] == line
    assert exchange.delivered
    assert check_law(session.session) == 1


def test_nothing_of_what_is_said_stands_in_the_log(gateway, session, caplog):
    caplog.set_level("DEBUG", logger="torchrl_chat")
    says(ValueError("the secret"), "the answer")
    httpx.post(
        f"{session.base_url}/chat/completions",
        json={"model": "m", "messages": [{"role": "user", "content": "the question"}]},
        headers=auth(session),
    )
    session.finish(1.0)
    told = " ".join(
        f"{record.getMessage()} {record.__dict__}" for record in caplog.records if "torchrl" in record.name
    )
    assert session.name in told
    for secret in ("the question", "the answer", "the secret", session.api_key, gateway.token):
        assert secret not in told


def test_a_port_that_is_taken_is_told(gateway):
    templates = templates_of()
    other = Gateway(Recorder(templates, SCRIPT), templates.plain.tokenizer, port=gateway.port)
    with pytest.raises(OSError, match="cannot be listened at"):
        other.start()
    with pytest.raises(ValueError, match="token is empty"):
        Gateway(gateway.engine, templates.plain.tokenizer, token=" ")
    with pytest.raises(Refusal):
        gateway.session("no/name")
