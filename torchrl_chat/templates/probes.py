"""The conversation that the audit tries: short, so that its tokens can be read, and of words that it can find again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torchrl_chat.messages import Message

SYSTEM: Message = {"role": "system", "content": "Be brief and kind."}
USER: Message = {"role": "user", "content": "How high is it?"}
ANSWER: Message = {"role": "assistant", "content": "The answer is 1600 metres."}
NEXT: Message = {"role": "user", "content": "And in feet?"}
MORE: Message = {"role": "user", "content": "Please be exact."}
REASONING = "The user asks for a height."
PLACE = "Zermatt"  # stands in calls alone: where it is missing, the template leaves calls out
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_elevation",
        "description": "Says how high a place is.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Name of the place."},
                "digits": {"type": "integer", "description": "How many digits to give."},
                "feet": {"type": "boolean", "description": "Whether to give feet instead of metres."},
                "sources": {"type": "array", "items": {"type": "string"}, "description": "Where to look."},
            },
            "required": ["place"],
        },
    },
}
_BY_TYPE: dict[Any, Any] = {
    "integer": 3,
    "number": 0.5,
    "boolean": True,
    "array": ["atlas", "survey"],
    "object": {"unit": "m"},
}


def calling(tools: Sequence[Any], count: int) -> Message:
    """An answer with structured calls of the first tool, with every argument that it has."""
    properties = (tools[0]["function"].get("parameters") or {}).get("properties") or {"place": None}
    arguments: dict[str, Any] = {}
    for name, schema in properties.items():
        kind = schema.get("type") if isinstance(schema, dict) else None
        arguments[name] = _BY_TYPE.get(kind, PLACE) if arguments and isinstance(kind, str) else PLACE
    function = {"name": tool_name(tools), "arguments": arguments}
    calls = [{"id": call_id(i), "type": "function", "function": function} for i in range(count)]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(tools: Sequence[Any], number: int = 0) -> Message:
    """The result of one of these calls."""
    content, ident = f"{1608 + number} m", call_id(number)
    return {"role": "tool", "content": content, "name": tool_name(tools), "tool_call_id": ident}


def call_id(number: int) -> str:
    """Nine letters and digits: some templates (Mistral's) refuse any other id."""
    return f"callnr{number:03d}"


def tool_name(tools: Sequence[Any]) -> str:
    """The name of the first tool."""
    return tools[0]["function"]["name"]


def plain_call(answer: Message) -> str:
    """A call as text, in a form that many models write."""
    function = answer["tool_calls"][0]["function"]
    arguments = json.dumps(function["arguments"])
    return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
