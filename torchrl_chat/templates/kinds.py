"""Kinds of conversations and of extensions: what a proof is about, and is kept under."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torchrl_chat.messages import Message

_FIELDS = frozenset({"role", "content", "name", "tool_call_id"})


class Roles(NamedTuple):
    """The roles of a regular conversation: a system message or none, then turns of user or tools and policy."""

    system: str | None
    user: str
    tool: str | None
    policy: str

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of(cls, roles: tuple[str, ...]) -> Roles | None:
        """The roles of a conversation that ends with the policy's message; ``None`` if it is irregular."""
        if len(roles) < 2:
            return None
        policy = roles[-1]
        start = 0 if roles[1] == policy else 1
        system, user, tool = (roles[0] if start else None), roles[start], None
        if policy in (system, user) or system == user:
            return None
        previous = policy
        for role in roles[start:]:
            if role == policy:
                if previous == policy:
                    return None
            elif role == user:
                if previous != policy:
                    return None
            else:
                tool = tool or role
                if role != tool or role == system or previous == user or roles[start] == tool:
                    return None
            previous = role
        return cls(system, user, tool, policy)


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
        calls = [
            {"id": f"abcdefgh{i}", "type": "function", "function": {"name": "lookup", "arguments": {"q": "it"}}}
            for i in range(self.calls)
        ]
        return {"role": policy, "content": "let me see" if self.said else "", "tool_calls": calls}


_TEXT = AnswerKind()


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
        kinds = []
        for message in new:
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
