"""What holds for Responses and Messages whatever is said: streams add up, histories are recognised, bad bodies are refused."""

from __future__ import annotations

import json
import math

import httpx
import orjson
import pytest
from agents import calling, check_law
from conftest import DAY
from dialects import (
    Script,
    added_up_items,
    added_up_messages,
    choices,
    pieces,
    reply_of,
    served,
    spoiled,
    streamed,
    untouched,
)
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from torchrl_chat.gateway.calls import Call, Choice, Kind, Refusal, ToolCall, loads
from torchrl_chat.gateway.dialects import DIALECTS, ChatCompletions, Messages, Responses
from torchrl_chat.gateway.matching import difference, said

USER = {"role": "user", "content": "hi"}
EVENT = TypeAdapter(ResponseStreamEvent)


def sent(body: dict) -> dict:
    """A body as it comes over the wire."""
    return loads(orjson.dumps(body) if all_small(body) else json.dumps(body).encode())


def all_small(value) -> bool:
    if isinstance(value, dict):
        return all(map(all_small, value.values()))
    if isinstance(value, list):
        return all(map(all_small, value))
    return not isinstance(value, int) or abs(value) < 2**63


def written(dialect, call: Call, choice: Choice) -> dict:
    return json.loads(orjson.dumps(dialect.write(call, reply_of(choice))))


# ---------------------------------------------------------------------- streams
@given(st.data())
def test_events_of_responses_add_up_to_the_body(data):
    choice = data.draw(choices())
    call = Responses().parse({"model": "m", "input": "hi", "instructions": "x"}, {})
    body = written(Responses(), call, choice)
    Response.model_validate(body, strict=True)
    events = streamed(Responses(), call, reply_of(choice), data.draw(pieces(choice)))
    for event in events:
        EVENT.validate_python(event)
    assert added_up_items(events) == body["output"]
    assert events[-1]["response"] == body
    assert events[-1]["type"] == f"response.{body['status']}"
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert (body["status"] == "incomplete") == (choice.finish == "length")


@given(st.data())
def test_events_of_messages_add_up_to_the_body(data):
    choice, omitted = data.draw(choices()), data.draw(st.booleans())
    thinking = {"type": "adaptive", "display": "omitted" if omitted else "summarized"}
    call = Messages().parse({"model": "m", "messages": [USER], "max_tokens": 9, "thinking": thinking}, {})
    body = written(Messages(), call, choice)
    events = streamed(Messages(), call, reply_of(choice), data.draw(pieces(choice)))
    assert added_up_messages(events) == body
    thoughts = [block["thinking"] for block in body["content"] if block["type"] == "thinking"]
    assert thoughts == ([] if choice.reasoning is None else ["" if omitted else choice.reasoning])
    calls = [block for block in body["content"] if block["type"] == "tool_use"]
    assert [block["id"] for block in calls] == [call.id for call in choice.calls]
    assert all(isinstance(block["input"], dict) for block in calls)
    assert (
        sum(value for key, value in body["usage"].items() if key != "output_tokens")
        == reply_of(choice).usage.prompt
    )


def test_arguments_are_told_as_they_were_sampled():
    arguments = '{"a": 1.0, "b": 12345678901234567890123, "c": 1e2, "a": 2}'
    choice = Choice(None, calls=(ToolCall("call_x", "look", arguments),), finish="tool_calls")
    assert arguments in orjson.dumps(Messages().write(Call(()), reply_of(choice))).decode()


# ---------------------------------------------------------------------- histories that come back
def spelled_items(draw, body: dict) -> list[dict]:
    """The items of an answer as the frameworks send them: without ids or not, text as a string or not, reasoning or not."""
    items, has_ids, lean = [], draw(st.booleans()), draw(st.booleans())
    drops = draw(st.booleans())
    for item in body["output"]:
        item = dict(item)
        if item["type"] == "reasoning" and drops:
            continue
        if lean:
            item.pop("status")
            item.pop("encrypted_content", None)
        else:
            item |= {"async_": None, "caller": None, "namespace": None, "phase": None}
        if not has_ids and item["type"] != "reasoning":
            item.pop("id")
        if item["type"] == "message":
            text = item["content"][0]["text"]
            kind = draw(st.sampled_from(["whole", "bare", "string"]))
            if kind == "bare":
                item["content"] = [{"type": "output_text", "text": text}]
            elif kind == "string":
                item = {"role": "assistant", "content": text}
        if item.get("type") == "function_call":
            item["arguments"] = respelled(draw, item["arguments"])
        items.append(item)
    return items


def spelled_blocks(draw, body: dict):
    """The blocks of an answer as the frameworks send them."""
    drops, has_calls = draw(st.booleans()), any(block["type"] == "tool_use" for block in body["content"])
    blocks = []
    for block in body["content"]:
        block = dict(block)
        if block["type"] == "thinking" and drops:
            if draw(st.booleans()):
                blocks.append({"type": "redacted_thinking", "data": "AAAA"})
            continue
        if block["type"] == "text" and not block["text"].strip() and has_calls and draw(st.booleans()):
            continue
        if block["type"] == "tool_use":
            block["input"] = json.loads(respelled(draw, json.dumps(block["input"])))
            block |= draw(st.sampled_from([{}, {"caller": None}, {"cache_control": None}]))
        blocks.append(dict(reversed(block.items())))
    if [block["type"] for block in blocks] == ["text"] and draw(st.booleans()):
        return blocks[0]["text"]
    return blocks


def respelled(draw, arguments: str) -> str:
    """A JSON text of the same value, or the same text."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    kind = draw(st.sampled_from(["same", "compact", "spaced", "escaped"]))
    if kind == "same":
        return arguments
    return json.dumps(value, ensure_ascii=kind == "escaped", separators=(",", ":") if kind == "compact" else None)


@given(st.data())
def test_an_answer_of_responses_that_comes_back_is_recognised(data):
    call = Responses().parse({"model": "m", "input": "hi"}, {})
    answers = data.draw(st.lists(choices(), min_size=1, max_size=3))
    items: list[dict] = []
    for place, choice in enumerate(answers):
        body = json.loads(orjson.dumps(Responses().write(call, reply_of(choice, f"a{place}"))))
        items += [*spelled_items(data.draw, body), {"role": "user", "content": f"go on {place}"}]
    found = Responses().parse(sent({"model": "m", "input": items}), {}).messages
    check_recognised(found, answers)


@given(st.lists(choices(), min_size=2, max_size=3))
def test_answers_of_responses_that_follow_each_other_are_told_apart_by_their_ids(answers):
    items: list[dict] = []
    for place, choice in enumerate(answers):
        items += json.loads(orjson.dumps(Responses().write(Call(()), reply_of(choice, f"a{place}"))))["output"]
    found = Responses().parse(sent({"model": "m", "input": [*items, USER]}), {}).messages
    assert len(found) == len(answers) + 1
    for message, choice in zip(found, answers, strict=False):
        assert difference(said(message), said(choice.message)) is None


@given(st.data())
def test_an_answer_of_messages_that_comes_back_is_recognised(data):
    answers = data.draw(st.lists(choices(), min_size=1, max_size=3))
    messages: list[dict] = []
    for place, choice in enumerate(answers):
        blocks = spelled_blocks(data.draw, written(Messages(), Call(()), choice))
        messages += [{"role": "assistant", "content": blocks}, {"role": "user", "content": f"go on {place}"}]
    found = Messages().parse(sent({"model": "m", "messages": messages}), {}).messages
    check_recognised(found, answers)


def check_recognised(found, answers) -> None:
    assert [message["role"] for message in found] == ["assistant", "user"] * len(answers)
    for message, choice in zip(found[::2], answers, strict=True):
        recorded = said(choice.message)
        assert difference(said(message), recorded) is None
        assert said(message).key == recorded.key


def test_results_become_messages_of_their_own():
    blocks = [
        {"type": "text", "text": "first"},
        {"type": "tool_result", "tool_use_id": "a", "content": "7", "is_error": False},
        {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "8"}]},
        {"type": "tool_result", "tool_use_id": "c"},
        {"type": "text", "text": "and "},
        {"type": "text", "text": "then?"},
    ]
    found = Messages().parse({"messages": [{"role": "user", "content": blocks}]}, {}).messages
    assert [(message["role"], message["content"]) for message in found] == [
        ("user", "first"),
        ("tool", "7"),
        ("tool", "8"),
        ("tool", ""),
        ("user", "and then?"),
    ]
    assert [message.get("tool_call_id") for message in found] == [None, "a", "b", "c", None]


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_refusal_has_the_form_of_its_dialect(dialect, kind):
    body = dialect.refusal(Refusal("No.", kind, param="x", code="word"))
    json.loads(orjson.dumps(body))
    check_form(dialect, body)
    assert "word" in str(body)


def check_form(dialect, body: dict) -> None:
    error = body["error"]
    assert error["message"]
    assert error["type"].endswith(("_error", "_too_large"))
    if isinstance(dialect, Messages):
        assert body["type"] == "error"
        assert set(error) <= {"type", "message", "details"}
    else:
        assert set(error) == {"type", "message", "param", "code"}


SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}
RESPONSES = {
    "model": "m",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "see"}]},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "7"}]},
    ],
    "tools": [{"type": "function", "name": "look", "description": "d", "parameters": SCHEMA}],
    "text": {"format": {"type": "text"}},
}
LEFT_OUT = "null, list"
RESPONSES_TAKES = {
    "model": "null, string",
    "input": "string",
    "input.0": "",
    "input.0.role": "",
    "input.0.content": "string, list",
    "input.0.content.0": "",
    "input.0.content.0.type": "",
    "input.0.content.0.text": "string",
    "input.1.content": LEFT_OUT,
    "input.1.content.0": "",
    "input.1.content.0.text": "string",
    "input.2.content": "string, list",
    "input.2.content.0": "",
    "input.2.content.0.text": "string",
    "input.3.call_id": "string",
    "input.3.name": "string",
    "input.3.arguments": "null, string",
    "input.3.type": "null",
    "input.4.call_id": "string",
    "input.4.output": "string, list",
    "input.4.output.0": "",
    "instructions": "null, string",
    "tools": LEFT_OUT,
    "tools.0": "",
    "tools.0.type": "",
    "tools.0.name": "string",
    "tools.0.description": "null, string",
    "tools.0.parameters": "null, object, odd object",
    "tool_choice": "null",
    "temperature": "null",
    "top_p": "null",
    "max_output_tokens": "null, integer",
    "text": "null, object, odd object",
    "text.format": "null",
    "stream": "null, boolean",
    "store": "null, boolean",
    "metadata": "null, object, odd object",
    "reasoning": "null, object, odd object",
    "include": "null, list, nulls",
    "parallel_tool_calls": "null, boolean",
    "previous_response_id": "null, string",
    "truncation": "null, string",
    "top_logprobs": "null",
}
MESSAGES = {
    "model": "m",
    "max_tokens": 64_000,
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "see"},
                {"type": "tool_use", "id": "c", "name": "look", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "7"}]}],
        },
    ],
    "tools": [{"name": "look", "description": "d", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto"},
    "output_config": {},
}
MESSAGES_TAKES = {
    "model": "null, string",
    "max_tokens": "null, integer",
    "system": "null, string, list",
    "system.0": "",
    "system.0.text": "string",
    "messages": "",
    "messages.0": "",
    "messages.0.role": "",
    "messages.0.content": "string, list",
    "messages.0.content.0": "",
    "messages.0.content.0.type": "",
    "messages.0.content.0.text": "string",
    "messages.1.content": "string, list",
    "messages.1.content.0": "",
    "messages.1.content.0.thinking": "string",
    "messages.1.content.1.text": "string",
    "messages.1.content.2.id": "string",
    "messages.1.content.2.name": "string",
    "messages.1.content.2.input": "object, odd object",
    "messages.2.content.0.tool_use_id": "string",
    "messages.2.content.0.content": "null, string, list",
    "messages.2.content.0.content.0": "",
    "messages.2.content.0.is_error": "null, boolean",
    "tools": LEFT_OUT,
    "tools.0": "",
    "tools.0.type": "null, object, list",
    "tools.0.name": "string",
    "tools.0.description": "null, string",
    "tools.0.input_schema": "object, odd object",
    "tool_choice": "null, object",
    "tool_choice.type": "",
    "tool_choice.disable_parallel_tool_use": "null, boolean",
    "temperature": "null",
    "top_p": "null",
    "top_k": "null, integer",
    "stop_sequences": LEFT_OUT,
    "stream": "null, boolean",
    "thinking": "null, object, odd object",
    "output_config": "null, object, odd object",
    "output_config.format": "null",
    "thread": "null",
}


@pytest.fixture(scope="module")
def gateway():
    with served(Script()) as gateway:
        yield gateway


@pytest.mark.parametrize(
    ("dialect", "body", "takes"),
    [(Responses(), RESPONSES, RESPONSES_TAKES), (Messages(), MESSAGES, MESSAGES_TAKES)],
    ids=["responses", "messages"],
)
def test_a_body_with_one_thing_wrong_is_refused_and_touches_no_session(gateway, dialect, body, takes):
    with gateway.session() as session, gateway.session() as other, httpx.Client() as client:
        url = f"{session.base_url}{dialect.path}"
        headers = {"authorization": f"Bearer {session.api_key}"}
        for what, spoilt in spoiled(body, takes, 60, f"{DAY} {dialect.name}"):
            reply = client.post(url, json=spoilt, headers=headers)
            assert reply.status_code == 400, (what, reply.text)
            check_form(dialect, reply.json())
            assert reply.json()["error"]["type"] == "invalid_request_error"
            assert untouched(session), what
        assert untouched(other)
        assert client.post(url, json=body, headers=headers).status_code == 200
        assert session.session.turns == 1


def test_what_dialects_write_can_be_written_whatever_it_repeats():
    """Integers of more than 64 bits, which the JSON of the gateway's own library does not have."""
    huge = int(math.pow(2, 70))
    with served(Script()) as gateway, gateway.session() as session:
        tool = {"type": "function", "name": "f", "parameters": {"type": "object", "maximum": huge}}
        for stream in (False, True):
            raw = json.dumps({"input": "hi", "tools": [tool], "metadata": {"a": huge}, "stream": stream})
            reply = httpx.post(
                f"{session.base_url}/responses",
                content=raw,
                headers={"authorization": f"Bearer {session.api_key}"},
            )
            assert reply.status_code == 200, reply.text
            assert str(huge) in reply.text


HALF = '{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {"a": "\\ud83d"}}]}'


@pytest.mark.parametrize("number", [1, 10**30])
def test_half_a_character_is_refused_wherever_it_stands(number):
    raw = f'{{"messages": [{HALF}, {{"role": "user", "content": "hi"}}], "x": {number}}}'
    with pytest.raises(Refusal, match="surrogate"):
        loads(raw.encode())
    assert loads(raw.replace("\\ud83d", "\\ud83d\\ude00").encode())["x"] == number


def test_one_session_may_be_asked_in_several_dialects():
    script = Script()
    script.says(calling("a", "b"), "<think>\nhm\n</think>\n\ntwo", calling("c"), "four")
    with served(script) as gateway, gateway.session() as session, httpx.Client() as client:

        def post(path, body):
            reply = client.post(
                f"{session.base_url}{path}",
                content=orjson.dumps(body),
                headers={"authorization": f"Bearer {session.api_key}"},
            )
            assert reply.status_code == 200, reply.text
            return reply.json()

        function = {"name": "look", "parameters": SCHEMA}
        chat: dict = {"messages": [USER], "tools": [{"type": "function", "function": function}]}
        message = post("/chat/completions", chat)["choices"][0]["message"]
        calls = message["tool_calls"]
        blocks: list[dict] = [
            {
                "type": "tool_use",
                "id": call["id"],
                "name": "look",
                "input": json.loads(call["function"]["arguments"]),
            }
            for call in calls
        ]
        results = [{"type": "tool_result", "tool_use_id": call["id"], "content": "7"} for call in calls]
        history = [USER, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
        tools = [{"name": "look", "input_schema": SCHEMA}]
        message = post("/messages", {"messages": history, "tools": tools})
        named = {"previous_response_id": f"resp_{message['id'].removeprefix('msg_')}"}
        items: dict = {"tools": [{"type": "function", **function}]}
        answer = post("/responses", {**items, **named, "input": "go on"})
        output = {"type": "function_call_output", "call_id": answer["output"][0]["call_id"], "output": "8"}
        post("/responses", {**items, "previous_response_id": answer["id"], "input": [output]})
        assert check_law(session.session) == 1
        assert session.report["counts"] == {"begins": 1}


def test_each_dialect_has_paths_of_its_own():
    paths = [dialect.path for dialect in DIALECTS] + [dialect.count_path for dialect in DIALECTS]
    assert len(set(paths) - {None}) == 2 * len(DIALECTS) - 1
    assert isinstance(DIALECTS[0], ChatCompletions)  # errors at other addresses are spelled as its
