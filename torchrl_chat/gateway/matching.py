"""When two spellings are the same message: the rules by which an agent's history is recognised, as a table.

An agent sends its whole history with each request, and frameworks spell it anew: arguments as other JSON, a content that is
absent instead of null, reasoning that is dropped or moved. Each rule of :data:`RULES` names one such difference that is
harmless, with a function that takes it away; a message without all of them is :class:`Said`, and two messages are the same where
that is. What no rule covers is an edit, and :func:`difference` says in words what was edited.

Law of this file: no rule makes two messages equal that tell a model different things. Reasoning is the one exception, and a named
one (``A5``): an answer that comes back without its reasoning is the recorded answer, because that only decides *which* answer is
meant; the recorded tokens, reasoning included, stay in the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchrl_chat.messages import Message

_KEPT = ("role", "content", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")
_OPEN, _CLOSE = "<think>", "</think>"
POLICY = "assistant"
"""The role that the model plays in every dialect."""


class Said(NamedTuple):
    """A message without the harmless differences."""

    role: str
    text: str
    reasoning: str | None = None
    calls: tuple[tuple[str, Hashable], ...] = ()
    """Name and arguments of each call: the JSON value, frozen, or the text where it is no JSON."""
    ids: tuple[str | None, ...] = ()
    """The ids of the calls. They tell two answers apart that are the same otherwise, and are no part of what is the same."""
    answers: str | None = None
    """Of a result: the id of the call that it belongs to."""

    @property
    def key(self) -> Hashable:
        """Equal for messages that may be the same: of an answer without reasoning, ids and outer blanks."""
        if self.role == POLICY:
            return POLICY, self.text.strip(), self.calls
        return self.role, self.text, self.answers


@dataclass(frozen=True)
class Rule:
    """One rule of the table."""

    name: str
    """``"A3"``, as in the documentation."""
    what: str
    """What it says, in a sentence."""
    apply: Callable[[dict[str, Any]], None] | None = None
    """Takes the difference out of a message, in place; ``None`` for a rule about whole requests, which the session's tree keeps."""


# ---------------------------------------------------------------------- rules about one message
def _absent(message: dict[str, Any]) -> None:
    for key in [key for key, value in message.items() if value is None or key not in _KEPT]:
        del message[key]
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    message.setdefault("content", "")


def _fields(message: dict[str, Any]) -> None:
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [
            {"id": call.get("id"), "name": function.get("name"), "arguments": function.get("arguments")}
            for call in calls
            for function in (call.get("function") or call,)
        ]


def _arguments(message: dict[str, Any]) -> None:
    for call in message.get("tool_calls") or ():
        if "arguments" in call:
            call["arguments"] = frozen_arguments(call["arguments"])


def _parts(message: dict[str, Any]) -> None:
    if isinstance(content := message.get("content"), list):
        texts = [part.get("text", "") for part in content if part.get("type", "text").endswith("text")]
        message["content"] = "".join(texts)


def _reasoning(message: dict[str, Any]) -> None:
    told = message.pop("reasoning_content", None) or message.get("reasoning")
    content = message.get("content")
    if isinstance(content, str) and message["role"] == POLICY:
        begun = content.lstrip()
        if begun.startswith(_OPEN) and _CLOSE in begun and not told:
            told, _, content = begun[len(_OPEN) :].partition(_CLOSE)
        if told is not None:  # the newlines between the two go with the reasoning, in whichever field they stand
            message["content"] = content.lstrip("\n")
    if told is not None:
        message["reasoning"] = told


def _newlines(message: dict[str, Any]) -> None:
    if message.get("reasoning") is not None:
        message["reasoning"] = message["reasoning"].strip("\n")


def _blank(message: dict[str, Any]) -> None:
    if message.get("tool_calls") and isinstance(message.get("content"), str) and not message["content"].strip():
        message["content"] = ""


def _system(message: dict[str, Any]) -> None:
    if message["role"] in ("developer", "system"):
        message["role"] = "system"
        if isinstance(message.get("content"), str):
            message["content"] = message["content"].strip()


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("A1", "Keys that are null are absent, and keys that no template reads are not looked at.", _absent),
        Rule("A2", "Of a call only its id, its name and its arguments count.", _fields),
        Rule("A3", "Arguments are compared as JSON values in their key order, numbers by value.", _arguments),
        Rule("A4", "A content of text parts is their text.", _parts),
        Rule("A5", "Reasoning may be absent, under either name, or in the content between think tags.", _reasoning),
        Rule("A6", "Beside calls, a content of blanks is none.", _blank),
        Rule("A7", "A developer is a system; outer blanks of a system prompt do not count.", _system),
        Rule("A8", "Calls are matched by their place; results by their call's place, so renamed ids are followed."),
        Rule("A9", "An answer that a request names is the one that it goes on from."),
        Rule("A10", "An empty final answer may be left out of the history."),
        Rule(
            "B1", "An answer may be left out: the conversation goes on from the prompt, the answer ends a branch."
        ),
        Rule("B2", "A retry gets the answer of the first try; two equal requests are two samples."),
        Rule("B3", "Results and the next user's message may come together."),
        Rule("B4", "Another system prompt, or other tools, begin a sequence of their own."),
        Rule("B5", "A conversation without a common beginning begins a sequence of its own."),
        Rule("C1", "Newlines around the reasoning do not count.", _newlines),
    )
}
"""The rules, in the order in which they are applied; the letters are those of the documentation."""

_ABOUT_MESSAGES = [rule for rule in RULES.values() if rule.apply is not None]


def said(message: Message, without: Collection[str] = ()) -> Said:
    """A message without its harmless differences.

    Args:
        message: in the package's form; arguments may be texts or values.
        without: names of rules that are not applied.

    Example:
        >>> call = {"function": {"name": "f", "arguments": '{"a": 1e2}'}}
        >>> said({"role": "assistant", "content": None, "tool_calls": [{**call, "index": 0}]}).calls
        (('f', ('object', ('a', 100.0))),)
    """
    content = message.get("content")
    if type(content) is str and not without:  # most messages have no difference to take away
        role, keys = message["role"], len(message)
        if keys == 2 and (role == "user" or (role == POLICY and _OPEN not in content)):
            return Said(role, content)
        if keys == 3 and role == "tool" and type(message.get("tool_call_id")) is str:
            return Said(role, content, None, (), (), message["tool_call_id"])
    plain = dict(message)
    for rule in _ABOUT_MESSAGES:
        if rule.name not in without:
            rule.apply(plain)  # type: ignore[misc]
    calls = plain.get("tool_calls") or ()
    content = plain.get("content")
    return Said(
        plain["role"],
        content if isinstance(content, str) else repr(content),
        plain.get("reasoning"),
        tuple(
            (call["name"], _hashable(call["arguments"])) if "name" in call else ("", repr(call)) for call in calls
        ),
        tuple(call.get("id") for call in calls),
        plain.get("tool_call_id"),
    )


def frozen_arguments(arguments: Any) -> Hashable:
    """The arguments of a call as a value that can be compared: the JSON value, or the text where it is no JSON.

    What pydantic-ai sends for a text that it could not read, ``{"INVALID_JSON": text}``, is that text.

    Example:
        >>> frozen_arguments('{"a": 1.50, "b": [true]} ') == frozen_arguments({"a": 1.5, "b": [True]})
        True
        >>> frozen_arguments('{"INVALID_JSON": "{cut"}')
        '{cut'
    """
    value = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments.strip()
        if isinstance(value, str):  # a JSON text of a text: no object, and not the text itself
            return "string", value
    if isinstance(value, dict) and len(value) == 1 and isinstance(raw := value.get("INVALID_JSON"), str):
        return raw.strip()
    try:
        return _frozen(value)
    except RecursionError:
        return str(arguments)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return "object", *((key, _frozen(inner)) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return "list", *map(_frozen, value)
    if isinstance(value, bool) or value is None:
        return "constant", value
    if isinstance(value, float) and value != value:
        return "constant", "nan"
    return value  # of numbers, Python compares the values: 1 is 1.0, and integers of any size are exact


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


# ---------------------------------------------------------------------- an answer that comes back
def difference(sent: Said, recorded: Said) -> str | None:
    """What differs between an answer as it comes back and as it was given, in words; ``None`` where it is the same.

    The words name places and lengths, and repeat nothing of either.

    Args:
        sent: what a request has.
        recorded: what was answered.
    """
    if len(sent.calls) != len(recorded.calls):
        return f"it has {len(sent.calls)} tool calls instead of {len(recorded.calls)}"
    for place, (mine, theirs) in enumerate(zip(sent.calls, recorded.calls, strict=True)):
        if mine[0] != theirs[0]:
            return f"its tool call {place} names another function"
        if mine[1] != theirs[1]:
            return f"the arguments of its tool call {place} have other values"
    if sent.text != recorded.text and not _moved(sent, recorded):
        if sent.text.strip() == recorded.text.strip():
            return "its text has other blanks at its ends"
        return (
            f"its text differs from character {_common(sent.text, recorded.text)} on "
            f"({len(sent.text)} characters instead of {len(recorded.text)})"
        )
    if sent.reasoning and sent.reasoning.strip() and sent.reasoning != (recorded.reasoning or ""):
        what = "where there was none" if not recorded.reasoning else "that differs"
        return f"it has reasoning {what}"
    return None


def _moved(sent: Said, recorded: Said) -> bool:
    """Whether only the newlines behind a reasoning that was moved or dropped are missing."""
    told = sent.reasoning is not None or recorded.reasoning is not None
    return told and sent.text.lstrip("\n") == recorded.text.lstrip("\n")


def _common(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:  # the longest common beginning, by halves
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
