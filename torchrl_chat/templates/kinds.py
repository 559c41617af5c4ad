"""Kinds of conversations and of extensions: what a proof is about, and is kept under."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchrl_chat.messages import Message

ARGUMENTS: Mapping[str, Any] = {"q": "it", "limit": 3, "exact": True, "tags": ["a", "b"], "share": 0.5}
"""Arguments of a call that is tried: several, of several types, which templates write in several ways."""


def call_of(name: str | None, arguments: Any, ident: str) -> dict[str, Any]:
    """An entry of a message's ``tool_calls``."""
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(
    name: str, arguments: Mapping[str, Any], ids: Sequence[str], role: str = "assistant", content: str = ""
) -> Message:
    """An answer with structured calls of one tool, one for each id."""
    calls = [call_of(name, dict(arguments), ident) for ident in ids]
    return {"role": role, "content": content, "tool_calls": calls}


_FIELDS = frozenset({"role", "content", "name", "tool_call_id"})


class Roles(NamedTuple):
    """The roles of a regular conversation: a system message or none, then turns of user or tools and policy."""

    system: str | None
    user: str
    tool: str | None
    policy: str


@dataclass(frozen=True, slots=True)
class Course:
    """The course that a conversation has taken, as far as proofs depend on it; each turn adds to it.

    A regular conversation is an optional system message, then turns of a user or of tools, each answered by
    the policy. Keeping its course beside it spares every turn to look at all earlier messages again.

    Example:
        >>> course = Course("assistant").then([{"role": "user", "content": "2 + 2?"}])
        >>> course.roles
        Roles(system=None, user='user', tool=None, policy='assistant')
    """

    policy: str = "assistant"  # the role whose messages are sampled
    roles: Roles | None = None  # the roles so far; ``None`` if the conversation is irregular (or has no user yet)
    last: str | None = None  # the role of the last message
    texts: bool = True  # whether every content is a text, or left out beside tool calls
    # whether no tool call was passed over without a result, no result came without a call, and each call has
    # an id of its own
    answered: bool = True
    calls: bool = False  # whether the last message calls tools
    extra: frozenset[str] = frozenset()  # fields of messages besides role and content
    begun: bool = False  # whether the policy has answered already
    call_ids: tuple[str, ...] = ()  # the ids of all tool calls so far, in order

    @classmethod
    def of(cls, messages: Sequence[Message], policy: str = "assistant") -> Course:
        """The course of a whole conversation."""
        return cls(policy).then(messages)

    def then(self, messages: Iterable[Message]) -> Course:
        """The course after further messages."""
        course = self
        for message in messages:
            plain = len(message) == 2 and type(message.get("content")) is str
            # Behind calls each conversation has a course of its own, and telling it from others would take all of their ids.
            known = plain and not course.call_ids
            course = _after_text(course, message["role"]) if known else course._after(message)
        return course

    def _after(self, message: Message) -> Course:
        policy, roles, last, extra, call_ids = self.policy, self.roles, self.last, self.extra, self.call_ids
        role, content, answered, calls = message["role"], message.get("content"), self.answered, False
        if self.calls and (roles is None or role != roles.tool) and role in (policy, roles and roles.user):
            answered = False
        if last == policy and not self.calls and roles is not None and role not in (policy, roles.user):
            answered = False  # a result that no structured call asked for
        begun = self.begun or role == policy
        if len(message) != 2 or content is None:
            extra = extra | (message.keys() - _PLAIN)
            if made := message.get("tool_calls"):
                calls = True
                ids = tuple(str(call.get("id")) for call in made)
                # Of two calls of one id, a template may take the one for the other.
                answered = answered and len({*call_ids, *ids}) == len(call_ids) + len(ids)
                call_ids += ids
        return Course(
            policy=policy,
            roles=_then(roles, last, role, policy, begun),
            last=role,
            texts=self.texts and (content is None or type(content) is str),
            answered=answered,
            calls=calls,
            extra=extra,
            begun=begun,
            call_ids=call_ids,
        )

    @property
    def shape(self) -> Roles:
        """The roles, or those of the simplest conversation if this one is irregular."""
        return self.roles or Roles(None, "user", None, self.policy)


@functools.lru_cache(maxsize=1024)
def _after_text(course: Course, role: str) -> Course:
    """The course after a message of a role and a text: the same few, turn after turn and row after row."""
    return course._after({"role": role, "content": ""})


_PLAIN = {"role", "content"}


def _then(roles: Roles | None, last: str | None, role: str, policy: str, begun: bool) -> Roles | None:
    """The roles of a conversation that one of ``role`` joins."""
    if last is None:
        return None if role == policy else Roles(None, role, None, policy)
    if roles is None:
        return None
    if role == policy:
        return roles if last != policy else None
    if last == policy:
        if role == roles.user or role == roles.tool:
            return roles
        return roles._replace(tool=role) if roles.tool is None and role != roles.system else None
    if not begun and roles.system is None and role != roles.user:
        # Two messages before the first answer: a system prompt and a question. Later it is no beginning.
        return Roles(roles.user, role, None, policy)
    return roles if role == roles.tool == last else None


class AnswerKind(NamedTuple):
    """How an answer is rendered: as text, or with structured tool calls beside or without a text."""

    calls: int = 0
    said: bool = True

    @classmethod
    def of(cls, answer: Message) -> AnswerKind:
        """The kind of an answer."""
        calls = answer.get("tool_calls")
        return cls(len(calls), bool(answer.get("content"))) if calls else _TEXT

    def example(self, policy: str) -> Message:
        """An answer of this kind."""
        if not self.calls:
            return {"role": policy, "content": "an answer"}
        ids = [f"abcdefgh{i}" for i in range(self.calls)]
        return calling("lookup", ARGUMENTS, ids, policy, "let me see" if self.said else "")


_TEXT = AnswerKind()
_TEXT_KEYS = ("content", "role")


class Kind(NamedTuple):
    """All that a compiled tail may depend on, besides the fields of the messages."""

    roles: Roles
    answer: AnswerKind
    new: tuple[tuple[str, tuple[str, ...], int], ...]  # role, keys and the call that it answers (-1: none)
    add_generation_prompt: bool

    @classmethod
    def of(cls, roles: Roles, answer: Message, new: Sequence[Message], add_generation_prompt: bool) -> Kind | None:
        """The kind of an extension; ``None`` where a message carries more than text."""
        calls = answer.get("tool_calls") or ()
        ids = [call.get("id") if isinstance(call, dict) else None for call in calls]
        kinds: list[tuple[str, tuple[str, ...], int]] = []
        for message in new:
            if len(message) == 2 and type(message.get("content")) is str:
                kinds.append((message["role"], _TEXT_KEYS, -1))
                continue
            if not message.keys() <= _FIELDS or not all(isinstance(value, str) for value in message.values()):
                return None
            place = -1
            if calls and "tool_call_id" in message and message["tool_call_id"] in ids:
                place = ids.index(message["tool_call_id"])
                name = calls[place].get("function", {}).get("name")
                if message.get("name", name) != name:
                    return None
            kinds.append((message["role"], tuple(sorted(message)), place))
        return cls(roles, AnswerKind.of(answer), tuple(kinds), add_generation_prompt)
