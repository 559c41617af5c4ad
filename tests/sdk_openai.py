"""The `openai` SDK's Responses against a gateway, unmodified: what it reads, held to its own types; prints JSON. See ``test_gateway_sdks.py``."""

from __future__ import annotations

import json

import openai
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

EVENT = TypeAdapter(ResponseStreamEvent)
PARAMETERS = {"type": "object", "properties": {"q": {"type": "string"}}}
TOOL = {"type": "function", "name": "look", "parameters": PARAMETERS, "strict": False}
ASKED = {"model": "m", "instructions": "Be brief.", "tools": [TOOL]}
client = OpenAI(max_retries=0, timeout=60)


def whole(**asked) -> Response:
    reply = client.responses.with_raw_response.create(**ASKED, **asked)
    return Response.model_validate(json.loads(reply.text), strict=True)


def streamed(**asked) -> Response:
    with client.responses.stream(**ASKED, **asked) as events:
        for event in events:
            if hasattr(event, "to_dict") and "snapshot" not in event.to_dict():
                EVENT.validate_python(event.to_dict())
        return events.get_final_response()


def conversation(named: bool) -> list:
    history: list = [{"role": "user", "content": f"named {named}"}]
    more: dict = {}
    told = []
    for turn, ask in enumerate((whole, streamed, whole, streamed)):
        response = ask(input=history, **more)
        told.append([response.status, [item.type for item in response.output]])
        if named:
            history, more = [], {"previous_response_id": response.id}
        history += [] if named else response.output
        results = [
            {"type": "function_call_output", "call_id": item.call_id, "output": item.arguments}
            for item in response.output
            if item.type == "function_call"
        ]
        history += results or [{"role": "user", "content": f"go on {turn}"}]
    return told


def errors() -> dict:
    found = {}
    asked = {
        "reference": {"input": [{"type": "item_reference", "id": "x"}]},
        "previous": {"input": "hi", "previous_response_id": "resp_x"},
        "key": {"input": "hi", "extra_headers": {"authorization": "Bearer wrong"}},
        "engine": {"input": "hi"},
    }
    for what, more in asked.items():
        try:
            client.responses.create(**ASKED, **more)
        except openai.APIStatusError as error:
            found[what] = [type(error).__name__, error.code]
    try:
        streamed(input="hi")
    except openai.APIError as error:
        found["stream"] = [type(error).__name__, error.message]
    return found


print(
    json.dumps(
        {
            "version": openai.__version__,
            "items": conversation(False),
            "named": conversation(True),
            "errors": errors(),
        }
    )
)
