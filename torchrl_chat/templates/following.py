"""What follows an assistant turn: its close, the new messages, the generation prompt, as text; proved once, then compiled.

Law of this file: what is proved of a template with a tokenizer is proved once in a process, for all that render alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrl_chat.messages import Message
from torchrl_chat.templates.backends import unmarked
from torchrl_chat.templates.bridge import BridgeError, Close, Derivation, Tail
from torchrl_chat.templates.codec import TokenCodec
from torchrl_chat.templates.compiled import Compiler, Rule
from torchrl_chat.templates.kinds import AnswerKind, Course, Kind, Roles
from torchrl_chat.templates.proof import Prover, check_real, twin
from torchrl_chat.templates.rendering import remembered_texts


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
    """The continuations of one chat template."""

    derivation: Derivation

    def __post_init__(self) -> None:
        self.renderer = self.derivation.renderer
        self.prover = Prover(self.derivation)
        self.compiler = Compiler(self.prover)
        # Of all ChatTemplate objects that render alike: many environments, one proof.
        self.proofs = _proofs.setdefault(self.derivation.codec, {}).setdefault(self.renderer.key, Proofs())

    def close(self, roles: Roles, kind: AnswerKind) -> Close | BridgeError:
        """How a turn of a conversation of these roles, with this kind of answer, is closed; or why that is not known."""
        key = (roles, kind)
        close = self.proofs.closes.get(key)
        if close is None:
            close = self.proofs.closes[key] = _or_error(lambda: self.prover.close(roles, kind))
        return close

    def opening(self, messages: Sequence[Message], course: Course) -> str:
        """What opens a turn of the policy right behind one of its own."""
        before, answer = messages[:-1], messages[-1]
        ended = self.derivation.tail(before, answer, [], False)
        opened = self.derivation.tail(before, answer, [], True)
        if not opened.startswith(ended) or opened == ended:
            raise BridgeError(
                f"the chat template opens no turn behind an answer: it ends with {ended[-60:]!r} either way."
                if opened == ended
                else f"the chat template ends an answer with {opened[:60]!r} where another follows, else with {ended[:60]!r}."
            )
        self.prover.check_answer(before, answer, [], True, opened)
        return opened[len(ended) :]

    def follow(
        self,
        messages: Sequence[Message],
        new: Sequence[Message],
        course: Course,
        stop: int | None,
        agp: bool,
    ) -> tuple[int | None, str, bool]:
        """Behind which token the text goes on, the text, and whether it carries marks."""
        answer, roles = messages[-1], course.roles
        close = raised(self.close(course.shape, AnswerKind.of(answer)))
        guarded, marked = self.renderer.guard(new)
        rule = self._rule(roles, answer, new, agp) if roles is not None and self._ordinary(course) else None
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
        text = self.derivation.tail(before, answer, after, agp)
        check_real(unmarked(text), new)
        tail = probe.placed(text)
        if tail is None:
            raise BridgeError(
                f"the chat template ends this turn with {text[: probe.end]!r}, others with "
                f"{probe.text[probe.cut : probe.end]!r}: what ends a turn depends on what the messages say."
            )
        self.prover.check_answer(before, answer, after, agp, text[tail.cut :])
        return tail.after(stop), marked

    def _ordinary(self, course: Course) -> bool:
        """Whether a conversation is of the form that rules are proved for: texts, no fields that only few have."""
        return course.texts and course.answered and self.renderer.looks.keys.isdisjoint(course.extra)

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
            self.proofs.tails[key] = _or_error(lambda: self.prover.prove(before, messages[-1], following, agp))
        return raised(self.proofs.tails[key])

    def _rule(self, roles: Roles, answer: Message, new: Sequence[Message], agp: bool) -> Rule | None:
        """The compiled tail of this kind of extension, if there is one."""
        kind = Kind.of(roles, answer, new, agp)
        if kind is None:
            return None
        if kind not in self.proofs.rules:
            self._check_new(new, roles.policy)
            with remembered_texts():
                self.proofs.rules[kind] = _or_error(lambda: self.compiler.compile(kind))
        return raised(self.proofs.rules[kind])


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
