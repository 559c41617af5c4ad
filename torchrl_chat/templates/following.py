"""What follows an assistant turn, as text: its close, the new messages, the generation prompt; proved once, then compiled.

Rendering a whole conversation for every turn costs more with every turn. For a conversation of a regular
shape the tail is nearly always constant around a few fields, whatever was said before. That is proved by
probing: over conversations of many depths, with and without tool turns, and with every string that the
template's own code looks for in every place where it might look. Where a probe disagrees there is no rule,
and the template is rendered.

Law of this file: what is proved of a template with a tokenizer is proved once in a process, for all that render alike.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torchrl_chat.messages import Message
from torchrl_chat.templates.backends import unmarked
from torchrl_chat.templates.bridge import (
    CONTENTS,
    TRIMS,
    Bridge,
    BridgeError,
    Close,
    Tail,
    check_real,
    forms,
    twin,
)
from torchrl_chat.templates.codec import TokenCodec
from torchrl_chat.templates.kinds import AnswerKind, Course, Kind, Roles, calling
from torchrl_chat.templates.looks import SMALL
from torchrl_chat.templates.rendering import at_another_time, remembered_texts

PLAIN = (*CONTENTS, '{"temperature": 22, "unit": "C"}', "true")
"""Contents that a template may escape, parse or reflow."""

EDGED = ("\n  two lines\nwith edges \t\n", " x ", "", " ")
"""Contents whose edges a template may trim."""

_SENTINEL = re.compile(r"Qz9\d{4}zQ")
_Case = tuple[Sequence[Message], Message, Sequence[Message]]
"""The messages before an answer, the answer, what follows it."""


class Slot(NamedTuple):
    """Where a field of a message stands in a tail, and how the template edits it."""

    where: str  # "new", "call" or "system"
    place: int
    field: str
    edit: Callable[[str], str]


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _json_stripped(text: str) -> str:
    return _json(text.strip())


EDITS = (*TRIMS, _json, _json_stripped)


@dataclass(frozen=True, slots=True)
class Rule:
    """A compiled tail."""

    tail: Tail  # the tail of the probe, with its stop tokens
    # constant texts and slots, in order; ``None`` if the text depends on more than the new messages, so that
    # the template is rendered
    parts: tuple[str | Slot, ...] | None
    # strings in a field of the new messages, or the name of a call, that make the template write something
    # else
    triggers: tuple[str, ...]
    folds_case: bool = False  # whether the template looks for them in any case
    reads: frozenset[str] = field(init=False)
    """For fields of what the tail has slots: ``"system"``, ``"call"``, ``"new"``."""

    def __post_init__(self) -> None:
        slots = frozenset(part.where for part in self.parts or () if isinstance(part, Slot))
        object.__setattr__(self, "reads", slots)

    def text(self, system: str, answer: Message, new: Sequence[Message]) -> str:
        """The tail's text for these messages."""
        assert self.parts is not None
        return "".join(
            [
                part if type(part) is str else part.edit(_field(part, system, answer, new))  # type: ignore[union-attr, arg-type]
                for part in self.parts
            ]
        )

    def edited(self, where: str, edit: Callable[[str], str]) -> Rule:
        """The rule with another edit of the contents in one kind of slot."""
        parts = tuple(
            part._replace(edit=edit)
            if isinstance(part, Slot) and part.where == where and part.field == "content"
            else part
            for part in self.parts or ()
        )
        return replace(self, parts=parts)

    def holds(self, answer: Message, new: Sequence[Message]) -> bool:
        """Whether none of the fields carries what makes the template write something else."""
        if not self.triggers:
            return True
        fields = [value for message in new for key, value in message.items() if key != "role"]
        fields += [call["function"]["name"] for call in answer.get("tool_calls") or ()]
        if self.folds_case:
            fields = [value.casefold() for value in fields]
        return not any(trigger in value for trigger in self.triggers for value in fields)


def _field(slot: Slot, system: str, answer: Message, new: Sequence[Message]) -> str:
    if slot.where == "new":
        return new[slot.place][slot.field]
    if slot.where == "system":
        return system
    call = answer["tool_calls"][slot.place]
    return call["id"] if slot.field == "id" else call["function"]["name"]


@dataclass
class Proofs:
    """What was proved of one template with one tokenizer."""

    closes: dict[tuple[Roles, AnswerKind], Close | BridgeError] = field(default_factory=dict)
    rules: dict[Kind, Rule | BridgeError | None] = field(default_factory=dict)
    tails: dict[Any, Tail | BridgeError] = field(default_factory=dict)
    capabilities: dict[str, str | None] = field(default_factory=dict)


_proofs: weakref.WeakKeyDictionary[TokenCodec, dict[Any, Proofs]] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Follower:
    """The continuations of one chat template: proved once, compiled where their text is constant."""

    bridge: Bridge

    def __post_init__(self) -> None:
        self.renderer = self.bridge.renderer
        # Of all ChatTemplate objects that render alike: many environments, one proof.
        self.proofs = _proofs.setdefault(self.bridge.codec, {}).setdefault(self.renderer.key, Proofs())

    def close(self, roles: Roles, kind: AnswerKind) -> Close | BridgeError:
        """How a turn of a conversation of these roles, with this kind of answer, is closed; or why that is not known."""
        key = (roles, kind)
        close = self.proofs.closes.get(key)
        if close is None:
            close = self.proofs.closes[key] = _or_error(lambda: self.bridge.close(roles, kind))
        return close

    def follow(
        self, messages: Sequence[Message], new: Sequence[Message], course: Course, stop: int | None, agp: bool
    ) -> tuple[int | None, str, bool]:
        """Behind which token the text goes on, the text, and whether it carries marks."""
        answer, roles = messages[-1], course.roles
        close = raised(self.close(course.shape, AnswerKind.of(answer)))
        guarded, marked = self.renderer.guard(new)
        # Rules are proved for texts, and for messages without fields that only few have.
        ordinary = course.texts and course.answered and self.renderer.looks.keys.isdisjoint(course.extra)
        rule = self._rule(roles, answer, new, agp) if roles is not None and ordinary else None
        if rule is not None and rule.parts is not None and rule.holds(answer, new):
            system = ""
            if "system" in rule.reads:
                [first], also = self.renderer.guard(messages[:1])
                system, marked = first["content"], marked or also
            if "call" in rule.reads:
                [answer], also = self.renderer.guard([answer])
                marked = marked or also
            text = rule.text(system, answer, guarded)
            rest = text[rule.tail.cut if stop is None else rule.tail.resume.get(stop, rule.tail.cut) :]
        else:
            self._check_new(new, course.policy)
            probe = rule.tail if rule is not None else self._proved(messages, new, agp)
            rest, marked = self._rendered(probe, messages, new, stop, agp)
        certain = close.suffix(stop).text
        if not rest.startswith(certain):
            raise BridgeError(
                f"the chat template continues this turn with {rest[: len(certain) + 20]!r}, others with {certain!r}."
            )
        return None if certain else stop, rest[len(certain) :], marked

    def _rendered(
        self, probe: Tail, messages: Sequence[Message], new: Sequence[Message], stop: int | None, agp: bool
    ) -> tuple[str, bool]:
        """What the template writes behind this very turn, checked against its text of the whole conversation."""
        guarded, marked = self.renderer.guard([*messages, *new])
        before, answer, after = guarded[: len(messages) - 1], guarded[len(messages) - 1], guarded[len(messages) :]
        text = self.bridge.tail(before, answer, after, agp)
        check_real(unmarked(text), new)
        tail = probe.placed(text)
        if tail is None:
            raise BridgeError(
                f"the chat template ends this turn with {text[: probe.end]!r}, others with "
                f"{probe.text[probe.cut : probe.end]!r}: what ends a turn depends on what the messages say."
            )
        self.bridge.check_answer(before, answer, after, agp, text[tail.cut :])
        return tail.after(stop), marked

    def _check_new(self, new: Sequence[Message], policy: str) -> None:
        if not new:
            raise BridgeError("there is no new message to extend the conversation by.")
        if any(message["role"] == policy for message in new):
            raise BridgeError(f"a message of role {policy!r} is sampled by the policy, not appended.")

    def _proved(self, messages: Sequence[Message], new: Sequence[Message], agp: bool) -> Tail:
        """Prove a rendered extension once for conversations of these roles and kinds of message."""
        kinds = tuple((m["role"], *sorted(m.keys() - {"content"})) for m in (*messages, *new))
        key = (kinds, len(new), AnswerKind.of(messages[-1]), agp)
        if key not in self.proofs.tails:
            probes = twin([*messages[:-1], *new])
            before, following = probes[: len(messages) - 1], probes[len(messages) - 1 :]
            self.proofs.tails[key] = _or_error(lambda: self.bridge.prove(before, messages[-1], following, agp))
        return raised(self.proofs.tails[key])

    def _rule(self, roles: Roles, answer: Message, new: Sequence[Message], agp: bool) -> Rule | None:
        """The compiled tail of this kind of extension, if there is one."""
        kind = Kind.of(roles, answer, new, agp)
        if kind is None:
            return None
        if kind not in self.proofs.rules:
            self._check_new(new, roles.policy)
            with remembered_texts():
                self.proofs.rules[kind] = _or_error(lambda: self._compiled(kind))
        return raised(self.proofs.rules[kind])

    # ------------------------------------------------------------------ compiled
    def _compiled(self, kind: Kind) -> Rule:
        """The rule of one kind of extension.

        Raises:
            BridgeError: the extension is refused for every conversation of this kind.
        """
        slots, system, answer, new = _probe(kind)
        histories = list(self._histories(kind, system))
        agp = kind.add_generation_prompt
        tail = self.bridge.prove(histories[0], answer, new, agp)
        rendered = Rule(tail, None, ())
        if self.renderer.looks.beyond_probes is not None:
            return rendered
        parts = _split(tail.text, slots)
        constant = "".join(part for part in parts if isinstance(part, str)).casefold()
        if "qz9" in constant or len(str(parts[0])) < tail.end:
            return rendered  # a field is written in another form, or in front of where the turn ends
        try:
            if any(_split(self.bridge.tail(h, answer, new, agp), slots) != parts for h in histories[1:]):
                return rendered
            with at_another_time():
                if _split(self.bridge.tail(histories[0], answer, new, agp), slots) != parts:
                    return rendered
            # In these, every message in turn carries what the template looks for.
            with_tools = [h for h in histories if any("tool_calls" in message for message in h)]
            short = [histories[1], *with_tools[:2]]
            if any(self._looks_back(h, answer, new, agp, tail.text) for h in short):
                return rendered
            if not all(self.bridge.steady(h, answer, new, agp, tail) for h in short[:1]):
                return rendered
            return self._with_edits(kind, histories, Rule(tail, parts, ()), answer, new) or rendered
        except BridgeError:
            return rendered  # some conversations of this kind only are refused: each is tried on its own

    # ------------------------------------------------------------------ probes
    def _histories(self, kind: Kind, system: str) -> Iterator[list[Message]]:
        """Conversations up to the answer, of many depths, no two messages alike."""
        roles = kind.roles
        head = [{"role": roles.system, "content": system}] if roles.system else []
        for depth in (*range(2 * SMALL + 3), 64):
            yield [*head, *_plain_rounds(roles, depth), {"role": roles.user, "content": f"the question {depth}"}]
        if roles.tool is not None:
            for depth in (1, 2, 5):
                rounds = [message for k in range(depth) for message in _tool_round(roles, k)]
                yield [*head, *rounds, {"role": roles.user, "content": f"after {depth} tools"}]
                yield [*head, *_plain_rounds(roles, depth), *rounds[:-1]]

    def _looks_back(
        self, before: Sequence[Message], answer: Message, new: Sequence[Message], agp: bool, expected: str
    ) -> bool:
        """Whether a string in an earlier message changes the tail, or stands in it."""
        said = [literal for s in self.renderer.looks.literals for literal in forms(s)]
        lengths = ["", *("x" * n for n in range(1, SMALL + 2)), "long " * 40]
        for i, old in enumerate(before):
            if i and old["content"] and old["content"] in expected:
                return True
            for content in (*lengths, *said):
                if not content and "tool_calls" in old:
                    continue
                [message], _ = self.renderer.guard([{**old, "content": content}])
                text = self.bridge.tail([*before[:i], message, *before[i + 1 :]], answer, new, agp)
                was = old["content"]  # only a system prompt may stand in the tail: it has a slot
                wanted = message["content"]
                if text != expected and not (
                    i == 0 and was in expected and any(text == expected.replace(was, e(wanted)) for e in EDITS)
                ):
                    return True
        return False

    def _with_edits(
        self, kind: Kind, histories: Sequence[list[Message]], rule: Rule, answer: Message, new: Sequence[Message]
    ) -> Rule | None:
        """The rule with the edit of every slot found, and the contents that it does not hold for."""
        agp = kind.add_generation_prompt
        history = histories[0]

        def agrees(candidate: Rule, before: Sequence[Message], said: Message, after: Sequence[Message]) -> bool:
            system = before[0]["content"] if kind.roles.system else ""
            try:
                return candidate.text(system, said, after) == self.bridge.tail(before, said, after, agp)
            except BridgeError:
                return False

        def fitting(rule: Rule, where: str, cases: Sequence[_Case]) -> Rule | None:
            """The rule with the first edit of this kind of slot that agrees with the template in all cases."""
            candidates = (rule.edited(where, edit) for edit in EDITS)
            return next((one for one in candidates if all(agrees(one, *case) for case in cases)), None)

        contents = enumerate((*PLAIN, *EDGED, *("x" * n for n in range(1, SMALL + 2))))
        plain = [(histories[i % len(histories)], answer, [{**m, "content": c} for m in new]) for i, c in contents]
        fitted = fitting(rule, "new", plain)
        if fitted is not None and "system" in fitted.reads:
            systems = [[{**history[0], "content": c}, *history[1:]] for c in (*PLAIN, *EDGED)]
            fitted = fitting(fitted, "system", [(system, answer, new) for system in systems])
        if fitted is None:
            return None
        others = [_renamed(answer, new, name) for name in ("python", "Look_Up", "a.b-c")]
        # Some templates have ids of one form only.
        others += [_identified(answer, new, identity) for identity in ("call_1", "7", "call-00001-abcdef")]
        if not all(agrees(fitted, history, said, after) for said, after in others):
            return None
        triggers = []
        for literal in self.renderer.looks.literals:
            cases = [(answer, [{**m, "content": c} for m in new]) for c in forms(literal)]
            if any("name" in m for m in new) or answer.get("tool_calls"):
                cases.append(_renamed(answer, new, literal))
            guard = self.renderer.guard
            if not all(agrees(fitted, history, said, guard(after)[0]) for said, after in cases):
                triggers.append(literal.casefold() if self.renderer.looks.folds_case else literal)
        return replace(fitted, triggers=tuple(triggers), folds_case=self.renderer.looks.folds_case)


def _or_error(prove: Callable[[], Any]) -> Any:
    """What was proved, or what forbids it."""
    try:
        return prove()
    except BridgeError as error:
        return error


def raised(value: Any) -> Any:
    """The value of a proof; what forbade it is raised."""
    if isinstance(value, BridgeError):
        raise value
    return value


# ---------------------------------------------------------------------- probes
def _renamed(answer: Message, new: Sequence[Message], name: str) -> tuple[Message, list[Message]]:
    """The messages with another name of their tools."""
    if calls := answer.get("tool_calls"):
        named = [{**call, "function": {**call["function"], "name": name}} for call in calls]
        answer = {**answer, "tool_calls": named}
    return answer, [{**m, "name": name} if "name" in m else m for m in new]


def _identified(answer: Message, new: Sequence[Message], identity: str) -> tuple[Message, list[Message]]:
    """The messages with other ids of their calls."""
    calls = answer.get("tool_calls") or ()
    ids = {call["id"]: f"{identity}{i}" for i, call in enumerate(calls)}
    if calls:
        answer = {**answer, "tool_calls": [{**call, "id": ids[call["id"]]} for call in calls]}
    return answer, [
        {**m, "tool_call_id": ids.get(m["tool_call_id"], identity)} if "tool_call_id" in m else m for m in new
    ]


def _plain_rounds(roles: Roles, depth: int) -> list[Message]:
    return [
        message
        for turn in range(depth)
        for message in (
            {"role": roles.user, "content": f"question {turn}"},
            {"role": roles.policy, "content": f"answer {turn}"},
        )
    ]


def _tool_round(roles: Roles, number: int) -> list[Message]:
    """A turn that calls a tool, the tool's result, and an answer."""
    assert roles.tool is not None
    identity = f"abcdefg{number:02d}"
    return [
        {"role": roles.user, "content": f"look it up {number}"},
        calling("lookup", {"q": "it"}, [identity], roles.policy),
        {"role": roles.tool, "content": f"found {number}", "name": "lookup", "tool_call_id": identity},
        {"role": roles.policy, "content": f"here it is {number}"},
    ]


def _probe(kind: Kind) -> tuple[dict[str, Slot], str, Message, list[Message]]:
    """An answer and new messages whose every field is a sentinel, and what each sentinel stands for."""
    slots: dict[str, Slot] = {}

    def sentinel(where: str, index: int, field: str) -> str:
        text = f"Qz9{len(slots):04d}zQ"
        slots[text] = Slot(where, index, field, str)
        return text

    system = sentinel("system", 0, "content")
    answer = kind.answer.example(kind.roles.policy)
    calls = answer.get("tool_calls", ())
    for i, call in enumerate(calls):
        call["id"] = sentinel("call", i, "id")
        call["function"]["name"] = sentinel("call", i, "name")
    new: list[Message] = []
    for i, (role, keys, place) in enumerate(kind.new):
        message = {"role": role}
        for key in keys:
            if place >= 0 and key == "name":
                message[key] = calls[place]["function"]["name"]
            elif place >= 0 and key == "tool_call_id":
                message[key] = calls[place]["id"]
            elif key != "role":
                message[key] = sentinel("new", i, key)
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
