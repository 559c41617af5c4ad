"""What a message is, and the checks that a conversation passes before anything renders it.

A message is a plain dict, ``{"role": str, "content": str, ...}``, exactly as chat templates and
OpenAI-style APIs know it: nothing is wrapped, so nothing has to be unwrapped. The content may be given as
a list of text parts (``[{"type": "text", "text": ...}]``), which is the text of them all, or as ``None``
beside ``tool_calls``.

Law of this file: a conversation that passes :func:`as_messages` can be handed to any template; one
that does not is refused with the key and the position that are wrong. A part that is no text (an image, a
sound) is refused: its pixels would not travel in the ledger, and templates write a lone pad token for it, or
its Python ``repr``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
"""One ``{"role", "content", ...}`` of the chat format. Treated as immutable everywhere."""


class MessageError(ValueError):
    """A message, or a list of messages, is malformed; the text names the key and the position."""


def as_messages(value: Any, *, role: str = "user", where: str = "messages") -> list[Message]:
    """One conversation from a string, a message, or a list of messages.

    Args:
        value: a string (becomes one message of ``role``), a message, or a sequence of messages.
        role: the role given to a bare string.
        where: how error messages name this value, e.g. ``"query of row 3"``.

    Returns:
        A new list with the messages, each checked; a content of text parts is their text.

    Raises:
        MessageError: a role or content is missing or of the wrong type, a part of a content is no text, or there
            is no message.

    Example:
        >>> as_messages("2 + 2?")
        [{'role': 'user', 'content': '2 + 2?'}]
        >>> as_messages({"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]})
        [{'role': 'user', 'content': '2 + 2?'}]
    """
    if isinstance(value, str):
        _check_text(value, where)
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        return [check_message(value, where)]
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        if not value:
            raise MessageError(f"{where} is empty: give a string or at least one message.")
        return [check_message(message, f"{where}[{i}]") for i, message in enumerate(value)]
    raise MessageError(
        f"{where} is a {type(value).__name__}: expected a string, a message "
        f'{{"role": ..., "content": ...}} or a list of messages.'
    )


def check_message(message: Any, where: str = "message") -> Message:
    """The message itself, as a dict, if a template can render it; a content of text parts is their text.

    Raises:
        MessageError: naming ``where`` and the offending key, or part of the content.
    """
    if not isinstance(message, Mapping):
        raise MessageError(f"{where} is a {type(message).__name__}, not a message dict.")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise MessageError(f"{where} has no 'role': got {role!r}, expected a non-empty string.")
    content = message.get("content")
    if message.get("tool_calls"):
        _check_calls(message["tool_calls"], where)
        if content is None:
            return dict(message)
    if content is None:
        raise MessageError(
            f"{where} (role {role!r}) has no 'content': give a string (it may be empty), a list of text "
            f"parts, or 'tool_calls'."
        )
    if isinstance(content, str):
        _check_text(content, f"{where} (role {role!r})")
        return dict(message)
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        for i, part in enumerate(content):
            _check_part(part, f"{where} (role {role!r}): part {i} of its 'content'")
        return {**message, "content": content_text(dict(message))}
    raise MessageError(
        f"{where} (role {role!r}) has a 'content' of type {type(content).__name__}: expected a string "
        f"or a list of text parts."
    )


def _check_part(part: Mapping[str, Any], which: str) -> None:
    kind = part.get("type", "text")
    if kind != "text":
        raise MessageError(
            f"{which} is of type {kind!r}, with {sorted(map(str, part.keys() - {'type'}))}: only text parts "
            f'{{"type": "text", "text": ...}} reach the model here. Leave it out, or say in words what it shows.'
        )
    if not isinstance(part.get("text"), str):
        raise MessageError(f"{which} has the 'text' {part.get('text')!r:.40}: expected a string.")
    _check_text(part["text"], which)


def is_deeper(value: Any, depth: int) -> bool:
    """Whether a JSON value has lists and objects in more than so many levels.

    Example:
        >>> is_deeper([{"a": []}], 3), is_deeper([{"a": []}], 2)
        (False, True)
    """
    level = [value] if isinstance(value, (list, dict)) else []
    while level:
        if depth <= 0:
            return True
        depth -= 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if type(inner) is list or type(inner) is dict
        ]
    return False


def half_character(text: str) -> int | None:
    """The position of the first half of a surrogate pair: Python keeps it in a string, and no tokenizer can read it.

    Example:
        >>> half_character("ab\\ud83d"), half_character("\\U0001f600")
        (2, None)
    """
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _check_text(text: str, where: str) -> None:
    at = half_character(text)
    if at is not None:
        raise MessageError(
            f"{where} has half a surrogate pair, {text[at]!a}, at position {at}: no text that can be encoded."
        )


def _check_calls(calls: Any, where: str) -> None:
    if isinstance(calls, Sequence) and not isinstance(calls, str):
        for i, call in enumerate(calls):
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise MessageError(
                    f"{where}: tool_calls[{i}] is {call!r:.80}: expected "
                    '{"id": ..., "type": "function", "function": {"name": ..., "arguments": {...}}}.'
                )
        return
    raise MessageError(f"{where}: 'tool_calls' is a {type(calls).__name__}, expected a list of calls.")


def content_text(message: Message) -> str:
    """The text of a message: its string content, or its text parts joined."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    return "".join(part.get("text", "") for part in content if part.get("type", "text") == "text")
