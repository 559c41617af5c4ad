"""The `anthropic` SDK against a gateway, unmodified: what it reads, held to its own types; prints JSON. See ``test_gateway_sdks.py``."""

from __future__ import annotations

import json

import anthropic
from anthropic import Anthropic, beta_tool
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import TypeAdapter

EVENT = TypeAdapter(RawMessageStreamEvent)
TOOL = {"name": "look", "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}}}
ASKED = {"model": "m", "max_tokens": 64_000, "system": "Be brief.", "tools": [TOOL]}
# The SDK sends no request of so many tokens unless it is streamed, or told how long to wait.
client = Anthropic(max_retries=0, timeout=60)


def whole(history: list) -> Message:
    reply = client.messages.with_raw_response.create(messages=history, **ASKED)
    return Message.model_validate(json.loads(reply.text()), strict=True)


def raw(history: list) -> Message:
    """By the events alone, each held to its type."""
    kinds = []
    for event in client.messages.create(messages=history, stream=True, **ASKED):
        EVENT.validate_python(event.to_dict(), strict=True)
        kinds.append(event.type)
    assert kinds[0] == "message_start", kinds
    assert kinds[-2:] == ["message_delta", "message_stop"], kinds
    # The same body again is another sample: what was read is not gone on from.
    return helped(history)


def helped(history: list) -> Message:
    """By the SDK's own adding up."""
    with client.messages.stream(messages=history, **ASKED) as events:
        for _ in events:
            pass
        return events.get_final_message()


def conversation() -> list:
    history: list = [{"role": "user", "content": "hi"}]
    told = []
    for turn, ask in enumerate((whole, raw, whole, helped)):
        message = ask(history)
        told.append([message.stop_reason, [block.type for block in message.content]])
        history.append(message.to_param())
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": json.dumps(block.input)}
            for block in message.content
            if block.type == "tool_use"
        ]
        history.append({"role": "user", "content": results or f"go on {turn}"})
    counted = client.messages.count_tokens(
        messages=history, model="m", system="Be brief.", tools=[TOOL]
    ).input_tokens
    usage = whole(history).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    return told


@beta_tool
def look(q: str) -> str:
    """Look it up."""
    if q == "broken":
        raise ValueError("not today")
    return f"found {q}"


def runner(stream: bool) -> list:
    """The SDK's own loop. It asks for a thread first, and sends its history itself when it is refused one."""
    running = client.beta.messages.tool_runner(
        model="m",
        max_tokens=512,
        tools=[look],
        messages=[{"role": "user", "content": f"{'stream' if stream else 'run'} it"}],
        stream=stream,
    )
    told = []
    for step in running:
        message = step.get_final_message() if stream else step
        told.append([message.stop_reason, [block.type for block in message.content]])
    return told


def errors() -> dict:
    """The classes of the SDK that refusals become, and whether their bodies are of the dialect's form."""
    found = {}
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    user = {"role": "user", "content": "hi"}
    asked = {
        "image": {"messages": [{"role": "user", "content": [image]}]},
        "thread": {"messages": [user], "extra_body": {"thread": {"type": "create"}}},
        "key": {"messages": [user]},
        "engine": {"messages": [user]},
    }
    for what, more in asked.items():
        try:
            asking = client.with_options(api_key="wrong") if what == "key" else client
            asking.messages.create(**{**ASKED, **more})
        except anthropic.APIStatusError as error:
            found[what] = type(error).__name__
            ErrorResponse.model_validate(error.body)
    try:
        helped([user])
    except anthropic.APIStatusError as error:
        found["stream"] = [type(error).__name__, error.message]
    return found


print(
    json.dumps(
        {
            "version": anthropic.__version__,
            "conversation": conversation(),
            "runner": runner(False),
            "streamed runner": runner(True),
            "errors": errors(),
        }
    )
)
