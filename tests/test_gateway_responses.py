"""OpenAI Responses over HTTP: the SDK, answers that a request names, streams, and what is refused."""

from __future__ import annotations

import re

import pytest
from agents import calling, check_law
from dialects import Script, served, untouched
from openai import APIError, BadRequestError, NotFoundError, OpenAI, PermissionDeniedError

from torchrl_chat.conversation import Limits
from torchrl_chat.gateway import Settings

SCRIPT = Script()
TOOL = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    "strict": False,
}
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


@pytest.fixture(scope="module")
def connected():
    """One client for all tests: a new one reads the machine's certificates."""
    with OpenAI(base_url="http://127.0.0.1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def client(connected, session):
    return client_of(connected, session)


def client_of(connected, session) -> OpenAI:
    return connected.with_options(base_url=session.base_url, api_key=session.api_key)


def make(client, stream, **asked):
    """The response to a request, however it comes."""
    if not stream:
        return client.responses.create(model="m", **asked)
    with client.responses.stream(model="m", **asked) as events:
        for _ in events:
            pass
        return events.get_final_response()


def outputs(response) -> list[dict]:
    return [
        {"type": "function_call_output", "call_id": item.call_id, "output": item.arguments}
        for item in response.output
        if item.type == "function_call"
    ]


LINES = [calling("a", "b"), THOUGHT + "two", THOUGHT + calling("c", said="see:"), "four"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("named", [False, True], ids=["items", "named"])
def test_an_agent_of_the_sdk_makes_one_sequence(session, client, stream, named):
    SCRIPT.says(*LINES)
    history: list = [{"role": "user", "content": "hi"}]
    previous, texts, kinds = None, [], []
    for turn in range(4):
        more = {"previous_response_id": previous} if previous else {}
        response = make(client, stream, input=history, instructions="x", tools=[TOOL], **more)
        texts.append(response.output_text)
        kinds.append([item.type for item in response.output])
        assert response.status == "completed"
        history = [] if named else [*history, *response.output]
        previous = response.id if named else None
        history += outputs(response) or [{"role": "user", "content": f"go on {turn}"}]
    assert texts == ["", "two", "see:", "four"]
    assert kinds == [
        ["function_call", "function_call"],
        ["reasoning", "message"],
        ["reasoning", "message", "function_call"],
        ["message"],
    ]
    assert check_law(session.session) == 1
    assert session.report["counts"] == {"begins": 1}


def test_an_answer_that_is_named_is_gone_on_from_as_the_reference_says(session, client):
    """Instructions and tools are those of each request: what it leaves out is not there."""
    SCRIPT.says("one", "two", "three", "four")
    first = client.responses.create(model="m", input="hi", instructions="Be brief.")
    again = client.responses.create(
        model="m", input="go on", instructions="Be brief.", previous_response_id=first.id
    )
    assert check_law(session.session) == 1
    client.responses.create(model="m", input="more", previous_response_id=again.id)
    assert check_law(session.session) == 2
    roles = [message["role"] for message in session.transcript.messages]
    assert roles == ["user", "assistant", "user", "assistant", "user", "assistant"]
    client.responses.create(
        model="m", input="more", instructions="Be brief.", previous_response_id=again.id, tools=[TOOL]
    )
    assert check_law(session.session) == 3
    assert session.transcript.messages[0] == {"role": "system", "content": "Be brief."}


def test_a_system_prompt_among_the_items_stays(session, client):
    first = client.responses.create(
        model="m", input=[{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    )
    client.responses.create(model="m", input="go on", previous_response_id=first.id)
    assert check_law(session.session) == 1


def test_an_answer_can_be_gone_on_from_twice(session, client):
    first = client.responses.create(model="m", input="hi")
    for text in ("this", "that"):
        client.responses.create(model="m", input=text, previous_response_id=first.id)
    assert check_law(session.session) == 2
    with pytest.raises(NotFoundError) as refused:
        client.responses.create(model="m", input="x", previous_response_id="resp_nobody")
    assert refused.value.code == "previous_response_not_found"


def test_what_a_whole_answer_holds(session, client):
    SCRIPT.says(THOUGHT + "one")
    asked = {"input": "hi", "instructions": "x", "metadata": {"a": "b"}, "store": False, "tools": [TOOL]}
    counted = client.responses.input_tokens.count(model="m", input="hi", instructions="x", tools=[TOOL])
    response = client.responses.create(
        model="any", include=["message.output_text.logprobs"], temperature=0.3, max_output_tokens=64_000, **asked
    )
    assert (response.model, response.metadata, response.instructions) == ("any", {"a": "b"}, "x")
    assert (response.store, response.temperature) == (False, None)
    reasoning, message = response.output
    assert reasoning.content[0].text == "hm"
    [answer] = session.session.tree.answers
    span = answer.transcript.spans[-1]
    assert [entry.logprob for entry in message.content[0].logprobs] == [-0.25] * (span.end - span.start)
    assert response.usage.input_tokens == counted.input_tokens == span.start
    assert response.usage.output_tokens == span.end - span.start
    assert any("temperature" in finding for finding in session.report["findings"])


def test_an_answer_that_is_cut_off_is_incomplete(session, client):
    SCRIPT.says("one two three four five six", "one two three four five six")
    response = client.responses.create(model="m", input="hi", max_output_tokens=4)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    events = list(client.responses.create(model="m", input="hi", max_output_tokens=4, stream=True))
    assert events[-1].type == "response.incomplete"


def test_an_empty_answer_may_be_left_out(session, client):
    SCRIPT.says("one", "", "two")
    first = client.responses.create(model="m", input="hi")
    history = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "go on"}]
    assert client.responses.create(model="m", input=history).output_text == ""
    client.responses.create(model="m", input=[*history, {"role": "user", "content": "say something"}])
    assert check_law(session.session) == 1


def test_errors_of_the_middle_are_raised_by_the_sdk(session, client):
    SCRIPT.says(ValueError("out of memory"), "two")
    with pytest.raises(APIError, match="out of memory"):
        make(client, True, input="hi")
    assert make(client, True, input="hi").output_text == "two"
    assert check_law(session.session) == 1


def test_an_agent_over_its_budget_is_told_so(gateway, connected):
    SCRIPT.__init__()
    with gateway.session(settings=Settings(limits=Limits(max_turns=1))) as session:
        client = client_of(connected, session)
        client.responses.create(model="m", input="hi")
        with pytest.raises(PermissionDeniedError, match="max_turns, 1") as refused:
            client.responses.create(model="m", input="hi")
        assert refused.value.code == "max_turns"
    with gateway.session(settings=Settings(limits=Limits(max_context=50))) as session:
        client = client_of(connected, session)
        with pytest.raises(BadRequestError) as refused:
            client.responses.create(model="m", input="x " * 200)
        assert refused.value.code == "context_length_exceeded"


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}
REFUSED = {  # what a body has, and what the refusal names
    "no input": ({"input": None}, "input"),
    "an empty input": ({"input": []}, "input"),
    "an image": ({"input": [IMAGE]}, "input_image"),
    "an image of a tool": (
        {"input": [{"type": "function_call_output", "call_id": "x", "output": IMAGE["content"]}]},
        "input_image",
    ),
    "a reference": ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "reference"),
    "a custom call": ({"input": [{"type": "custom_tool_call", "call_id": "x", "input": ""}]}, "custom_tool_call"),
    "a computer": ({"input": [{"type": "computer_call_output", "call_id": "x"}]}, "computer_call_output"),
    "a compaction": ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "compaction"),
    "another role": ({"input": [{"role": "tool", "content": "x"}]}, "'tool'"),
    "a search": ({"tools": [{"type": "web_search"}]}, "web_search"),
    "a server's tools": ({"tools": [{"type": "mcp", "server_label": "x"}]}, "mcp"),
    "a custom tool": ({"tools": [{"type": "custom", "name": "x"}]}, "custom"),
    "a named tool": ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "look"}}, "tool_choice"),
    "allowed tools": (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
        "tool_choice",
    ),
    "a required tool of none": ({"tool_choice": "required"}, "tool_choice"),
    "a conversation": ({"conversation": "conv_1"}, "previous_response_id"),
    "the background": ({"background": True}, "background"),
    "a stored prompt": ({"prompt": {"id": "x"}}, "prompt"),
    "context management": ({"context_management": [{"type": "compaction"}]}, "context_management"),
    "moderation": ({"moderation": {"model": "x"}}, "moderation"),
    "top log-probs": ({"top_logprobs": 2}, "top_logprobs"),
    "a JSON answer": ({"text": {"format": {"type": "json_object"}}}, "response_format"),
    "a schema": (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}},
        "response_format.*json_schema",
    ),
    "an unknown format": ({"text": {"format": {"type": "grammar"}}}, "text.format"),
    "stop strings": ({"stop": ["x"]}, "stop"),
    "two answers": ({"n": 2}, "'n'"),
    "no tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "a hot temperature": ({"temperature": 3}, "temperature"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_to_be_had_is_refused_in_a_sentence(session, client, what):
    more, words = REFUSED[what]
    with pytest.raises(BadRequestError) as refused:
        client.post("/responses", cast_to=object, body={"model": "m", "input": "hi", **more})
    error = refused.value.body
    assert error["type"] == "invalid_request_error"
    assert re.search(words, error["message"]), error
    assert len(error["message"].split()) > 4
    assert untouched(session)


def test_what_is_not_enforced_is_noted(session, client):
    client.responses.create(
        model="m",
        input=[{"role": "developer", "content": "x"}, {"type": "message", "role": "user", "content": "hi"}],
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        truncation="auto",
        reasoning={"effort": "low"},
        extra_body={"something_new": {"a": 1}},
    )
    found = " ".join(session.report["findings"])
    for words in ("'required' is not enforced", "'parallel_tool_calls'", "'truncation'"):
        assert words in found
    for path in ("/responses/resp_1", "/responses/resp_1/cancel", "/responses/compact"):
        with pytest.raises(NotFoundError, match="nothing at this address"):
            client.post(path, cast_to=object, body={})
