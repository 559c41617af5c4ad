"""What comes back from a tool call: the message for the model, and what became of the call.

Law of this file: whatever a tool returned or raised, there is a text of bounded length that can be tokenized.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torchrl_chat.messages import Message

_EXCERPT = 80


class ToolStatus(StrEnum):
    """What became of a tool call.

    ``OK``: it ran, and the content is its result. ``ERROR``: it ran and failed, or could not be run. ``TIMEOUT``: it
    did not end within its deadline. ``UNKNOWN_TOOL``: there is no tool of that name. ``INVALID_ARGUMENTS``: the
    arguments do not fit the tool's schema; it was not run. ``MALFORMED``: the call could not be read; nothing was run.
    """

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    UNKNOWN_TOOL = "unknown_tool"
    INVALID_ARGUMENTS = "invalid_arguments"
    MALFORMED = "malformed"


class ToolError(Exception):
    """A tool's way to fail with a message for the model, which is told the message alone."""


class ToolTimeout(ToolError):
    """A tool that keeps its deadline itself has ended a call."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The answer to one tool call."""

    message: Message
    """``{"role": "tool", "tool_call_id", "name", "content"}``."""
    status: ToolStatus
    seconds: float = 0.0
    """How long the call took, without the time that it waited for its turn."""
    left_out: int = 0
    """How many characters of the result were left out because it was too long."""
    still_running: bool = False
    """Whether the call was given up at its deadline, but could not be stopped."""

    @property
    def content(self) -> str:
        """The text for the model."""
        return self.message["content"]


def as_text(value: Any) -> str:
    """The result of a tool as text: a string as it is, anything else as JSON, or as its ``repr`` where it has none.

    Example:
        >>> as_text({"sum": 3, "unit": "€"}), as_text("3"), as_text(None)
        ('{"sum": 3, "unit": "€"}', '3', 'null')
    """
    if isinstance(value, str):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError):  # keys that are no strings, a value that contains itself
        return repr(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)  # the same text in every process
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for method in ("model_dump", "tolist", "isoformat"):  # pydantic; arrays and numbers of numpy and torch; dates
        if callable(found := getattr(value, method, None)) and not isinstance(value, type):
            return found()
    return str(value)


def clean(text: str) -> str:
    """The text with what cannot be encoded (half a surrogate pair) replaced.

    Example:
        >>> clean("a\\ud800b")
        'a?b'
    """
    return text.encode("utf-8", "replace").decode("utf-8")


def cut(text: str, limit: int) -> tuple[str, int]:
    """The text, cut in the middle if it is longer than ``limit`` characters, and how many were left out.

    The note that says so counts, so the result is never longer than the limit.

    Example:
        >>> cut("a" * 500 + "b" * 500, 50)
        ('aaaaaaa\\n[... 987 characters left out ...]\\nbbbbbb', 987)
    """
    if len(text) <= limit:
        return text, 0
    note = "\n[... {:,} characters left out ...]\n"
    room = max(0, limit - len(note.format(len(text))))
    tail = room // 2
    head = room - tail
    left_out = len(text) - room
    return text[:head] + note.format(left_out) + (text[-tail:] if tail else ""), left_out


def error_text(error: BaseException) -> str:
    """An exception in the words of its type and message; no traceback.

    Example:
        >>> error_text(KeyError("x")), error_text(ToolError("no such city"))
        ("Error: KeyError: 'x'", 'Error: no such city')
    """
    try:
        text = str(error).strip()
    except Exception:  # an exception that cannot say what it is
        text = ""
    name = type(error).__name__
    if isinstance(error, ToolError):
        return f"Error: {text or name}"
    return f"Error: {name}: {text}" if text else f"Error: {name}"


def unknown_text(name: str, names: Collection[str]) -> str:
    """The answer to a call of a tool that there is none of.

    Example:
        >>> unknown_text("wether", ["weather", "now"])
        "Error: there is no tool 'wether'; did you mean 'weather'? The tools are: weather, now."
    """
    near = difflib.get_close_matches(name[:64], names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"Error: there is no tool {_short(name)!r}{hint} The tools are: {', '.join(names) or '(none)'}."


def example_arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the right types, to show how a call is written: those that a tool needs, or all where it needs none.

    Args:
        parameters: the tool's JSON schema.

    Example:
        >>> example_arguments({"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]})
        {'a': 1}
    """
    known = parameters.get("properties") or {}
    names = [name for name in known if name in (parameters.get("required") or known)]
    return {name: _example(known[name]) for name in names}


def _example(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return "..."
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    by_kind: dict[Any, Any] = {
        "integer": 1,
        "number": 1.5,
        "boolean": True,
        "array": [],
        "object": {},
        "null": None,
    }
    return by_kind.get(kind, "...")


_WRONG = {
    "unclosed": "it is not closed: the text ends, or the next call begins, before its end",
    "missing_name": "it names no tool",
}


def malformed_text(call: Mapping[str, Any], call_format: str, signature: str | None = None) -> str:
    """The answer to a call that could not be read: what was wrong, where, and how it is written right.

    Args:
        call: an entry of a message's ``invalid_tool_calls``.
        call_format: how the model is to write a call.
        signature: of the tool that the call names, if there is such a tool.

    Example:
        >>> print(malformed_text({"name": "add", "arguments": '{"a": }', "status": "invalid_json"}, "{...}"))
        Error: this call of add could not be read: its JSON is wrong: Expecting value, near '{"a": }'. Nothing was run. Write a call as:
        {...}
    """
    name, raw, status = call.get("name"), call.get("arguments"), call.get("status", "invalid_json")
    wrong = _WRONG.get(status) or _json_fault(raw)
    if status == "unclosed" and isinstance(raw, str) and (fault := _json_fault(raw, "")):
        wrong += f" ({fault})"
    which = f"this call of {_short(name)}" if isinstance(name, str) and name else "this tool call"
    text = f"Error: {which} could not be read: {wrong}. Nothing was run. Write a call as:\n{call_format}"
    return f"{text}\nThe tool is {signature}." if signature else text


def _json_fault(raw: Any, other: str = "it is not written in the format of a call") -> str:
    """What is wrong with the JSON of a call."""
    if not isinstance(raw, str):
        kind = {list: "an array", type(None): "missing", bool: "a boolean"}.get(type(raw), "no object")
        return f"its arguments are {kind}, not a JSON object"
    text = raw.strip()
    if not text.startswith(("{", "[", '"')):
        return other and f"{other}, near {_short(text)!r}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20]
        return f"its JSON is wrong: {error.msg}, near {near!r}" if near else f"its JSON is wrong: {error.msg}"
    except (ValueError, RecursionError):
        return "its JSON holds a number that is too long, or is nested too deeply"
    if not isinstance(value, dict):
        return "its arguments are not a JSON object"
    return other


def _short(text: str) -> str:
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "..."
