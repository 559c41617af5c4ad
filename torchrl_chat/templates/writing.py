"""A tool call written in a template's own format, so that it is read back as the call that was meant.

The template writes it first. An argument that does not come back (left out, or with a quote that ends it too early) is
written again: a sentinel is put in its place, and the sentinel replaced by other spellings of the value until one is read
as that value.

Law of this file: what is returned was read back, by the parser that reads what a policy samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torchrl_chat.schemas import kind_of
from torchrl_chat.templates.parsing import AnswerParser
from torchrl_chat.templates.toolcalls import CallStatus, ParsedCall
from torchrl_chat.templates.values import Values

Write = Callable[[str, Mapping[str, Any]], Iterable[str]]
"""The turn that is one call, as the template writes it: each way in which it may be cut out of the template's text."""


def written_call(name: str, arguments: Mapping[str, Any], parser: AnswerParser, write: Write) -> str | None:
    """A call that is read back as itself; ``None`` if no way to write it is.

    Args:
        name: the tool's name.
        arguments: its arguments, JSON values.
        parser: what reads it back.
        write: the template.
    """
    values = parser.values
    if (
        name not in values.parameters
    ):  # nothing is known of its types: that they are spelled so is all that can be asked
        typed = {key: {"type": kind_of(value)} for key, value in arguments.items()}
        values = Values([{"name": name, "parameters": {"properties": typed}}], lambda: parser.values.manner)

    def read(text: str) -> ParsedCall | None:
        found = [call for call in parser.parse(text, values=values).calls if call.name == name]
        return found[0] if len(found) == 1 and found[0].status is CallStatus.OK else None

    for text in write(name, arguments):
        call = read(text)
        if call is not None and same(call.arguments, dict(arguments)):
            return text[slice(*call.span)].strip()
        respelled = _respelled(name, arguments, call.arguments if call else {}, read, write)
        if respelled is not None:
            return respelled
    return None


def _respelled(
    name: str,
    arguments: Mapping[str, Any],
    found: Mapping[str, Any],
    read: Callable[[str], ParsedCall | None],
    write: Write,
) -> str | None:
    """A call whose arguments that did not come back are spelled otherwise."""
    lost = {key: f"Qz{i:03d}lost9zQ" for i, key in enumerate(arguments) if not _came_back(key, arguments, found)}
    for text in write(name, {**arguments, **lost}):
        for key, sentinel in lost.items():
            for spelled in _spellings(text, sentinel, arguments[key]):
                call = read(spelled)
                if call is not None and _came_back(key, arguments, call.arguments):
                    text = spelled
                    break
            else:
                return None
        call = read(text)
        if call is not None and same(call.arguments, dict(arguments)):
            return text[slice(*call.span)].strip()
    return None


def _came_back(key: str, arguments: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return key in found and same(found[key], arguments[key])


def _spellings(text: str, sentinel: str, value: Any) -> Iterator[str]:
    """The text with other spellings of a value in place of the sentinel, and of quotes around it."""
    at = text.find(sentinel)
    if at < 0:
        return
    end = at + len(sentinel)
    quoted = text[at - 1 : at] == text[end : end + 1] != "" and text[at - 1] in "'\""
    spelled = json.dumps(value, ensure_ascii=False)
    for form in dict.fromkeys([spelled, repr(value), json.dumps(value)]):
        if quoted:
            yield text[: at - 1] + form + text[end + 1 :]
        yield text[:at] + form + text[end:]


def same(one: Any, other: Any) -> bool:
    """Equality as JSON has it, with types: true is not 1, and 1 is not 1.0.

    Example:
        >>> same({"a": [1]}, {"a": [1]}), same([1], [True]), same(1, 1.0)
        (True, False, False)
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return kind_of(one) == kind_of(other) and bool(one == other)
