"""Compiled tails: what a template writes as constant text around the fields of the new messages.

Rendering a whole conversation for every turn costs more with every turn. For a conversation of a regular
shape the tail is nearly always constant around a few fields, whatever was said before. That is proved by
probing: over conversations of many depths, with and without tool turns, and with every string that the
template's own code looks for in every place where it might look. Where a probe disagrees there is no rule,
and the template is rendered.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torchrl_chat.messages import Message
from torchrl_chat.templates.bridge import BridgeError, Derivation, Tail

PLAIN = (
    "plain words",
    "4",
    "naïve café — 北京 🎉",
    'a "quoted" {"k": [1, 2]} & <b>it</b>\'s {{ x }}',
    "first\n\nsecond\n\n\nthird: 1,234.56",
    '{"temperature": 22, "unit": "C"}',
    "true",
)
"""Contents that a template may escape, parse or reflow."""

EDGED = ("\n  two lines\nwith edges \t\n", " x ", "", " ")
"""Contents whose edges a template may trim."""

_FIELDS = frozenset({"role", "content", "name", "tool_call_id"})
_SENTINEL = re.compile(r"Qz9\d{4}zQ")


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


class Slot(NamedTuple):
    """Where a field of a message stands in a tail, and how the template edits it."""

    where: str  # "new", "call" or "system"
    place: int
    field: str
    edit: Callable[[str], str]


def _same(text: str) -> str:
    return text


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _json_stripped(text: str) -> str:
    return _json(text.strip())


EDITS: tuple[Callable[[str], str], ...] = (_same, str.strip, str.lstrip, str.rstrip, _json, _json_stripped)


@dataclass(frozen=True, slots=True)
class Rule:
    """A compiled tail.

    Attributes:
        tail: the tail of the probe, with its stop tokens.
        parts: constant texts and slots, in order; ``None`` if the text depends on more than the new messages, so
            that the template is rendered.
        triggers: strings in a new message's content that make the template write something else.
    """

    tail: Tail
    parts: tuple[str | Slot, ...] | None
    triggers: tuple[str, ...]

    def text(self, system: str, answer: Message, new: Sequence[Message]) -> str:
        """The tail's text for these messages."""
        assert self.parts is not None
        return "".join(
            part if isinstance(part, str) else part.edit(_field(part, system, answer, new)) for part in self.parts
        )


def _field(slot: Slot, system: str, answer: Message, new: Sequence[Message]) -> str:
    if slot.where == "new":
        return new[slot.place][slot.field]
    if slot.where == "system":
        return system
    call = answer["tool_calls"][slot.place]
    return call["id"] if slot.field == "id" else call["function"]["name"]


class Compiler:
    """Compiles the tails of one template.

    Args:
        derivation: the template.
        prove: proves the tail of one probe conversation.
    """

    def __init__(
        self,
        derivation: Derivation,
        prove: Callable[[Sequence[Message], Message, Sequence[Message], bool], Tail],
    ):
        self.derivation = derivation
        self.prove = prove

    def compile(self, kind: Kind) -> Rule:
        """The rule of one kind of extension.

        Raises:
            BridgeError: the extension is refused for every conversation of this kind.
        """
        slots, system, answer, new = _probe(kind)
        histories = list(self._histories(kind, system))
        agp = kind.add_generation_prompt
        tail = self.prove(histories[0], answer, new, agp)
        parts = _split(tail.text, slots)
        rendered = Rule(tail, None, ())
        try:
            if any(_split(self.derivation.tail(h, answer, new, agp), slots) != parts for h in histories[1:]):
                return rendered
            if any(self._looks_back(h, answer, new, agp, tail.text) for h in self._short(histories)):
                return rendered
            return self._with_edits(kind, histories, tail, parts, answer, new) or rendered
        except BridgeError:
            return rendered  # some conversations of this kind only are refused: each is tried on its own

    # ------------------------------------------------------------------ probes
    def _histories(self, kind: Kind, system: str) -> Iterator[list[Message]]:
        """Conversations up to the answer, of many depths."""
        roles = kind.roles
        head = [{"role": roles.system, "content": system}] if roles.system else []
        ask = {"role": roles.user, "content": "the question"}
        for depth in (0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 33, 64):
            yield [*head, *_plain_rounds(roles, depth), ask]
        if roles.tool is not None:
            rounds = _tool_round(roles)
            for depth in (1, 2, 5):
                yield [*head, *rounds * depth, ask]
                yield [*head, *_plain_rounds(roles, depth), *rounds[:-1]]

    def _short(self, histories: Sequence[list[Message]]) -> list[list[Message]]:
        """The conversations in which every message in turn carries what the template looks for."""
        with_tools = [h for h in histories if any("tool_calls" in message for message in h)]
        return [histories[1], *with_tools[:1]]

    def _looks_back(
        self, before: Sequence[Message], answer: Message, new: Sequence[Message], agp: bool, expected: str
    ) -> bool:
        """Whether a string in an earlier message, or in the answer, changes the tail."""
        for literal in self.derivation.renderer.literals:
            said = f"some {literal} words"
            for i in range(len(before)):
                [message], _ = self.derivation.renderer.guard([{**before[i], "content": said}])
                text = self.derivation.tail([*before[:i], message, *before[i + 1 :]], answer, new, agp)
                was = before[i]["content"]
                if text != (expected.replace(was, message["content"]) if was else expected):
                    return True
        return False

    def _with_edits(
        self,
        kind: Kind,
        histories: Sequence[list[Message]],
        tail: Tail,
        parts: tuple[str | Slot, ...],
        answer: Message,
        new: Sequence[Message],
    ) -> Rule | None:
        """The rule with the edit of every content found, and the contents that it does not hold for."""
        first = parts[0] if isinstance(parts[0], str) else ""
        if len(first) < max(tail.resume.values(), default=0):
            return None
        rules = [Rule(tail, tuple(_edited(part, edit) for part in parts), ()) for edit in EDITS]
        system = histories[0][0]["content"] if kind.roles.system else ""
        agp = kind.add_generation_prompt
        contents = (*PLAIN, *EDGED)
        for i, content in enumerate(contents):
            said = [{**message, "content": content} for message in new]
            text = self.derivation.tail(histories[i % len(histories)], answer, said, agp)
            rules = [rule for rule in rules if rule.text(system, answer, said) == text]
        if not rules:
            return None
        rule, triggers = rules[0], []
        for literal in self.derivation.renderer.literals:
            for content in (f"some {literal} words", literal):
                said = [{**message, "content": content} for message in new]
                try:
                    agrees = rule.text(system, answer, said) == self.derivation.tail(
                        histories[0], answer, said, agp
                    )
                except BridgeError:
                    agrees = False
                if not agrees:
                    triggers.append(literal)
                    break
        return Rule(tail, rule.parts, tuple(triggers))


def _edited(part: str | Slot, edit: Callable[[str], str]) -> str | Slot:
    return part if isinstance(part, str) or part.field != "content" else part._replace(edit=edit)


def _plain_rounds(roles: Roles, depth: int) -> list[Message]:
    return [
        message
        for turn in range(depth)
        for message in (
            {"role": roles.user, "content": f"question {turn}"},
            {"role": roles.policy, "content": f"answer {turn}"},
        )
    ]


def _tool_round(roles: Roles) -> list[Message]:
    """A turn that calls a tool, the tool's result, and an answer."""
    assert roles.tool is not None
    call = {"id": "abcdefgh9", "type": "function", "function": {"name": "lookup", "arguments": {"q": "it"}}}
    return [
        {"role": roles.user, "content": "look it up"},
        {"role": roles.policy, "content": "", "tool_calls": [call]},
        {"role": roles.tool, "content": "found", "name": "lookup", "tool_call_id": "abcdefgh9"},
        {"role": roles.policy, "content": "here it is"},
    ]


def _probe(kind: Kind) -> tuple[dict[str, Slot], str, Message, list[Message]]:
    """An answer and new messages whose every field is a sentinel, and what each sentinel stands for."""
    slots: dict[str, Slot] = {}

    def sentinel(where: str, index: int, field: str) -> str:
        text = f"Qz9{len(slots):04d}zQ"
        slots[text] = Slot(where, index, field, _same)
        return text

    system = sentinel("system", 0, "content")
    answer = kind.answer.example(kind.roles.policy)
    names: list[str] = []
    ids: list[str] = []
    for i, call in enumerate(answer.get("tool_calls", ())):
        call["id"] = sentinel("call", i, "id")
        call["function"]["name"] = sentinel("call", i, "name")
        ids.append(call["id"])
        names.append(call["function"]["name"])
    new: list[Message] = []
    for i, (role, keys, place) in enumerate(kind.new):
        message = {"role": role}
        for key in keys:
            if key == "content" or (key in ("name", "tool_call_id") and place < 0):
                message[key] = sentinel("new", i, key)
            elif key == "name":
                message[key] = names[place]
            elif key == "tool_call_id":
                message[key] = ids[place]
        new.append(message)
    return slots, system, answer, new


def _split(text: str, slots: dict[str, Slot]) -> tuple[str | Slot, ...]:
    """A tail as constant texts and slots."""
    parts: list[str | Slot] = []
    at = 0
    for match in _SENTINEL.finditer(text):
        if match.group() in slots:
            parts += [text[at : match.start()], slots[match.group()]]
            at = match.end()
    return (*parts, text[at:])
