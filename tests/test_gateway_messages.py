"""Anthropic Messages over HTTP: blocks, streams, tokens counted, and what is refused."""

from __future__ import annotations

import json
import re

import httpx
import pytest
from agents import calling, check_law
from dialects import Script, added_up_messages, events_of, served, untouched

from torchrl_chat.conversation import Limits
from torchrl_chat.gateway import Settings

SCRIPT, CLIENT = Script(), httpx.Client()
TOOL = {"name": "look", "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}}}
USER = {"role": "user", "content": "hi"}
THOUGHT = "<think>\nhm\n</think>\n\n"


@pytest.fixture(scope="module")
def gateway():
    with served(SCRIPT) as gateway:
        yield gateway


@pytest.fixture
def session(gateway):
    SCRIPT.__init__()
    gateway.engine.sampled.clear()
    with gateway.session() as session:
        yield session


def post(session, path="/messages", **asked) -> httpx.Response:
    """As the SDK asks: with its own key header, and a version."""
    headers = {"x-api-key": session.api_key, "anthropic-version": "2023-06-01"}
    body = {"model": "m", "max_tokens": 64_000, "messages": [USER], **asked}
    return CLIENT.post(f"{session.root_url}/v1{path}?beta=true", json=body, headers=headers)


def make(session, stream=False, **asked) -> dict:
    reply = post(session, stream=stream, **asked)
    assert reply.status_code == 200, reply.text
    return added_up_messages(events_of(reply.content)) if stream else reply.json()


def results(message: dict) -> list[dict]:
    return [
        {"type": "tool_result", "tool_use_id": block["id"], "content": json.dumps(block["input"])}
        for block in message["content"]
        if block["type"] == "tool_use"
    ]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_agent_makes_one_sequence(session, stream):
    SCRIPT.says(calling("a", "b"), THOUGHT + "two", THOUGHT + calling("c", said="see:"), "four")
    history, kinds, reasons = [USER], [], []
    system: object = "Be brief."
    for turn in range(4):
        message = make(session, stream, messages=history, system=system, tools=[TOOL])
        kinds.append([block["type"] for block in message["content"]])
        reasons.append(message["stop_reason"])
        history.append({"role": "assistant", "content": message["content"]})
        history.append({"role": "user", "content": results(message) or f"go on {turn}"})
        system = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief.", "cache_control": None}]
    assert kinds == [["tool_use", "tool_use"], ["thinking", "text"], ["thinking", "text", "tool_use"], ["text"]]
    assert reasons == ["tool_use", "end_turn", "tool_use", "end_turn"]
    assert check_law(session.session) == 1
    assert session.report["counts"] == {"begins": 1}


def test_results_and_words_may_come_together(session):
    SCRIPT.says(calling("a"), "two")
    message = make(session, tools=[TOOL])
    told = [*results(message), {"type": "text", "text": "and then?"}]
    history = [USER, {"role": "assistant", "content": message["content"]}, {"role": "user", "content": told}]
    make(session, messages=history, tools=[TOOL])
    assert check_law(session.session) == 1


def test_tokens_are_counted_as_the_answer_counts_them(session):
    SCRIPT.says("one", "two")
    asked: dict = {"messages": [USER], "system": "x", "tools": [TOOL]}
    counted = post(session, "/messages/count_tokens", **asked).json()
    assert not session.session.turns
    first = make(session, **asked)
    assert counted == {"input_tokens": first["usage"]["input_tokens"]}
    asked["messages"] = [
        USER,
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": "more"},
    ]
    counted = post(session, "/messages/count_tokens", **asked).json()
    [event, *rest] = events_of(post(session, stream=True, **asked).content)
    for usage in (event["message"]["usage"], rest[-2]["usage"]):
        assert usage["cache_read_input_tokens"] > 0
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted["input_tokens"]
    assert check_law(session.session) == 1


def test_why_an_answer_ends(session):
    SCRIPT.says("Thought. END of it", "one two three four five six", "")
    message = make(session, stop_sequences=["END", "never"])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    assert message["content"] == [{"type": "text", "text": "Thought. "}]
    message = make(session, max_tokens=3)
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    message = make(session)
    assert (message["stop_reason"], message["content"]) == ("end_turn", [{"type": "text", "text": ""}])


def test_threads_are_refused_in_the_way_that_the_sdk_knows(session):
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_0"}):
        reply = post(session, thread=thread)
        assert reply.status_code == 400
        assert reply.json()["error"]["details"]["error_code"] == "thread_unsupported_request"
    assert untouched(session)


def test_errors_have_the_form_of_the_dialect(gateway, session):
    SCRIPT.says(ValueError("out of memory"), ValueError("out of memory"), "two")
    events = events_of(post(session, stream=True, messages=[USER, USER]).content)
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "api_error"
    assert "out of memory" in events[-1]["error"]["message"]
    assert post(session, messages=[USER, USER]).status_code == 500
    with gateway.session() as other:
        wrong = CLIENT.post(f"{session.root_url}/v1/messages", json={}, headers={"x-api-key": other.api_key})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (401, "authentication_error")
    with gateway.session(settings=Settings(limits=Limits(max_turns=1))) as short:
        make(short)
        reply = post(short)
        assert reply.status_code == 403
        assert reply.headers["x-should-retry"] == "false"
        error = reply.json()["error"]
        assert (error["type"], error["details"]) == ("permission_error", {"error_code": "max_turns"})


def test_late_system_messages_and_unknown_keys_are_taken(session):
    make(
        session,
        messages=[USER, {"role": "assistant", "content": "one"}, {"role": "system", "content": "x"}, USER],
        metadata={"user_id": "me"},
        service_tier="auto",
        cache_control={"type": "ephemeral"},
        thinking={"type": "enabled", "budget_tokens": 1024},
        tools=[{**TOOL, "strict": True, "cache_control": {"type": "ephemeral"}}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        something_new={"a": 1},
    )
    roles = [message["role"] for message in session.transcript.messages]
    assert roles == ["user", "assistant", "system", "user", "assistant"]
    found = " ".join(session.report["findings"])
    assert "'any' is not enforced" in found
    assert "'disable_parallel_tool_use'" in found


def test_tools_that_are_not_to_be_used_are_not_shown(session):
    make(session, tools=[TOOL], tool_choice={"type": "none"})
    assert set(session.session.tree.roots) == {b""}
    make(session, tools=[TOOL], tool_choice={"type": "auto"})
    assert len(session.session.tree.roots) == 2


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
CALL = {"type": "tool_use", "id": "x", "name": "look", "input": {}}
REFUSED = {  # what a body has, and what the refusal names
    "no messages": ({"messages": None}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "an image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "'image'"),
    "an image of a tool": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}]}
            ]
        },
        "'image'",
    ),
    "a document": ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
    "a call of a server": (
        {"messages": [{"role": "assistant", "content": [{**CALL, "type": "server_tool_use"}]}, USER]},
        "server_tool_use",
    ),
    "the beginning of an answer": ({"messages": [USER, {"role": "assistant", "content": "The"}]}, "begins with"),
    "another role": ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
    "an image in the system prompt": ({"system": [IMAGE]}, "system"),
    "a search": ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    "a shell": ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
    "a tool without a schema": ({"tools": [{"name": "x"}]}, "input_schema"),
    "a named tool": ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "look"}}, "tool_choice"),
    "a required tool of none": ({"tool_choice": {"type": "any"}}, "tool_choice"),
    "servers": ({"mcp_servers": [{"type": "url", "url": "x", "name": "y"}]}, "mcp_servers"),
    "a container": ({"container": "x"}, "container"),
    "context management": ({"context_management": {"edits": [{}]}}, "context_management"),
    "compaction": ({"compaction": {"type": "x"}}, "compaction"),
    "fallbacks": ({"fallbacks": [{"model": "x"}]}, "fallbacks"),
    "a schema": (
        {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
        "response_format.*json_schema",
    ),
    "an unknown format": ({"output_config": {"format": {"type": "xml"}}}, "output_config"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "a hot temperature": ({"temperature": 1.5}, "temperature"),
    "many stops": ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_to_be_had_is_refused_in_a_sentence(session, what):
    more, words = REFUSED[what]
    reply = post(session, **more)
    assert reply.status_code == 400, reply.text
    assert reply.json()["type"] == "error"
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.search(words, error["message"]), error
    assert len(error["message"].split()) > 4
    assert untouched(session)
