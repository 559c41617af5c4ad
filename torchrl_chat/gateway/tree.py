"""What a session really saw and sampled, as a tree; and where in it a request's messages stand.

A :class:`Place` is a point in a conversation: what was said up to there. An :class:`Answer` is what was sampled at a place, with the
ledger behind it. A request walks down from a root as far as its messages are known; the deepest answer on its way is the one that
it continues, and what stands behind that answer is appended to its ledger by the bridge, id for id.

Laws of this file: a sequence of tokens is only ever extended, so that no branch holds what it did not see; and over all sequences each
sampled token is under exactly one mask.
"""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torchrl_chat.conversation import Branch, Transcript
from torchrl_chat.conversation.transcript import IDS, LOG_PROBS, MASK, Tape
from torchrl_chat.gateway.matching import POLICY, Said, difference, said
from torchrl_chat.messages import Message

Kind = Literal["begins", "continues", "forks", "restarts"]

_RECENT = 16  # requests whose way through the tree is remembered: as many branches may be on their way at once


class CallName(NamedTuple):
    """A call as results refer to it."""

    id: str
    """Its id in the ledger."""
    name: str
    """Its function."""


@dataclass(eq=False, slots=True)
class Place:
    """A point in a conversation."""

    children: dict[Hashable, Place] = field(default_factory=dict)
    """What others said next, by :attr:`~torchrl_chat.gateway.matching.Said.key`; and words of the model that it did not sample here,
    by all that they say, reasoning and blanks included: whoever goes on behind them has a prompt that shows them."""
    answers: list[Answer] = field(default_factory=list)
    """What was sampled here."""
    asked: int = 0
    """How many answers were asked for here, those on their way included."""


@dataclass(eq=False, slots=True)
class Answer:
    """What was sampled at a place."""

    name: str
    """The name of the reply that told it; of several choices, the first is the one that the name stands for."""
    tools: Hashable
    """What the tools that its prompt shows are known by."""
    said: Said
    """As it was told to the agent."""
    transcript: Transcript
    """The ledger behind it; what was sampled here is its last span."""
    calls: Mapping[str, CallName]
    """Its calls, in order, by their ids as the agent was told them."""
    parent: Answer | None = None
    """The answer whose tokens its own sequence begins with, every one of them; ``None`` where a sequence begins."""
    place: Place = field(default_factory=Place)
    """The place behind it."""
    delivered: bool = False
    """Whether anybody has got it."""
    extended: bool = False
    """Whether a later answer's sequence begins with it."""
    system: str | None = None
    """The system prompt that stood beside the messages of its request."""
    spelled: Message | None = None
    """As an agent sent it back last: it will spell it alike next time."""
    kind: Kind = "begins"
    """What its request did: see :attr:`Match.kind`."""
    reason: str = ""
    """Why, in a sentence without any of the words of the conversation."""

    @property
    def empty(self) -> bool:
        """Whether it says nothing and calls nothing (``A10``)."""
        return not self.said.calls and not self.said.text.strip()


@dataclass(slots=True)
class Match:
    """Where a request's messages stand."""

    place: Place
    """The place of their end."""
    answer: Answer | None
    """The answer that is continued; ``None`` where a sequence begins."""
    messages: Sequence[Message]
    """The whole conversation; of a request that names an answer, with the messages up to that."""
    start: int
    """Where in it that stands which is appended: 0 where a sequence begins."""
    calls: Mapping[str, CallName]
    """The calls that results refer to, by the ids that the request has for them."""
    kind: Kind
    """In a word: the session's first sequence; the newest answer of a sequence is continued; an earlier answer is continued; a
    further sequence begins."""
    reason: str
    """The same in a sentence, without any of the words of the conversation."""
    system: str | None = None
    """The system prompt that stands beside the messages: the first of them."""


class Tree:
    """The tree of one session."""

    def __init__(self) -> None:
        self.roots: dict[Hashable, Place] = {}
        """One for each set of tools (``B4``)."""
        self.answers: list[Answer] = []
        """In the order in which they were entered."""
        self.names: dict[str, Answer] = {}
        """By the names of their replies."""
        self._recent: OrderedDict[tuple[Hashable, int, Place], Match] = OrderedDict()

    # ------------------------------------------------------------------ matching
    def match(
        self,
        tools: Hashable,
        messages: Sequence[Message],
        previous: Answer | None = None,
        system: str | None = None,
    ) -> Match:
        """Where messages stand; places that were not there are made, a place being nothing but a key.

        Args:
            tools: what the request's tools are known by.
            messages: the conversation; with ``previous``, what follows that answer.
            previous: the answer that the request names (``A9``).
            system: the system prompt that stands beside the messages, ``""`` for none; ``None``: that of ``previous``, if there is one.
        """
        edited = None
        if previous is not None:
            before, had = previous.transcript.messages, previous.system
            system = had if system is None else system
            if previous.tools == tools and (system or "").strip() == (had or "").strip():
                found = self._walk(previous.place, [*before, *messages], len(before), previous, None)
                found.system = had
                return found
            edited = "the answer that it names was given to another system prompt, or with other tools (B4)"
            messages = [*before[had is not None :], *messages]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        if tools not in self.roots:
            if self.roots:
                edited = edited or "its tools are others than before (B4)"
            self.roots[tools] = Place()
        messages = tuple(messages)
        known = None if edited else self._known(tools, messages)
        match = None
        if known is not None:
            match = self._walk(known.place, messages, len(known.messages), known.answer, None, known)
            if match.kind == "restarts":  # of answers that say the same, that request may have meant another
                known = match = None
        if match is None:
            match = self._walk(self.roots[tools], messages, 0, None, edited)
        self._recent[tools, len(messages), match.place] = match
        if known is not None:
            self._recent.pop((tools, len(known.messages), known.place), None)
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        match.system = system or None
        return match

    def _known(self, tools: Hashable, messages: tuple[Message, ...]) -> Match | None:
        """A match of an earlier request that these messages begin with, spelled alike: its way is not gone once more.

        A history is compared as a whole then, which costs next to nothing; going its way costs something for each message.
        """
        for (of, count, _), match in reversed(self._recent.items()):
            if (
                of == tools
                and count < len(messages)
                and match.kind != "restarts"
                and messages[:count] == match.messages
            ):
                return match
        return None

    def _walk(
        self,
        place: Place,
        messages: Sequence[Message],
        first: int,
        answer: Answer | None,
        edited: str | None,
        known: Match | None = None,
    ) -> Match:
        """Go down from a place as far as messages are known, and make the rest of the way.

        Args:
            place: where the first message to look at stands.
            messages: the conversation.
            first: the number of that message.
            answer: the answer that the way to the place goes through last.
            edited: what is known to be edited already.
            known: the match of the way to the place.
        """
        start = first if known is None else known.start
        calls = dict(known.calls if known is not None else answer.calls if answer is not None else {})
        strange = False  # whether words of the model stand behind the last answer that it did not sample
        own: dict[str, str] = {}  # the calls of such words, by their ids: what results are known by (A8)
        for at in range(first, len(messages)):
            message = messages[at]
            key: Hashable
            if message["role"] == POLICY:
                found, why = _recorded(place, message, messages[at + 1 :])
                if found is not None:
                    if found.calls:
                        calls.update(_renamed(message, found))
                        own = {name: number for name, number in own.items() if name not in calls}
                    if strange:  # the way to it is exact, strange words included: its prompt shows all of them
                        edited = None
                    answer, start, place, strange = found, at + 1, found.place, False
                    continue
                strange = True
                edited = edited or f"message {at} (assistant) is not what was sampled there: {why}"
                key = "words", _words(message)
                own.update((name, f"{at} {number}") for number, name in enumerate(said(message).ids) if name)
            else:
                told = said(message)
                if told.answers is not None:
                    # A result is known by its call, whatever the call's id is in this request (A8).
                    if told.answers in own:
                        told = told._replace(answers=own[told.answers])
                    elif told.answers in calls:
                        told = told._replace(answers=calls[told.answers].id)
                key = told.key
                if key not in place.children and (empty := _left_out(place)) is not None:
                    answer, start, place, strange = empty, at, empty.place, False
            following = place.children.get(key)
            if following is None:
                if place.children or place.answers:
                    edited = edited or f"message {at} ({message['role']}) {_strays(place, message['role'])}"
                following = place.children[key] = Place()
            place = following
        if strange:
            answer = None
        elif start == len(messages):
            edited, answer = edited or "it ends with an answer of the model, and nothing follows", None
        if answer is None:
            new = "nothing of it was sampled before (B5)" if self.answers else "the first request of the session"
            return Match(place, None, messages, 0, calls, "restarts" if self.answers else "begins", edited or new)
        again = "the same prompt is answered once more" if place.answers else "its history is known"
        forks = answer.extended or bool(place.answers)
        return Match(place, answer, messages, start, calls, "forks" if forks else "continues", edited or again)

    def forget(self) -> None:
        """Let go of the requests that are remembered: no more will come."""
        self._recent.clear()

    # ------------------------------------------------------------------ growing
    def enter(self, place: Place, answer: Answer) -> None:
        """Take in what was sampled at a place."""
        place.answers.append(answer)
        self.answers.append(answer)
        self.names.setdefault(answer.name, answer)
        if answer.parent is not None:
            answer.parent.extended = True

    # ------------------------------------------------------------------ what is trained
    def sequences(self) -> list[tuple[Answer, list[Answer]]]:
        """The sequences that the session sampled: the last answer of each, and the answers that are trained in it, oldest first.

        The sequence of the session's last answer stands last, and trains all of its answers; each of the others those
        that no sequence behind it trains. Answers that nobody got are in none.
        """
        given = [answer for answer in self.answers if answer.delivered]
        going = {id(answer.parent) for answer in given if answer.parent is not None}
        owned: set[int] = set()
        found = []
        for leaf in reversed([answer for answer in given if id(answer) not in going]):
            mine = []
            for answer in _line(leaf):
                if id(answer) in owned:  # and so are all before it
                    break
                mine.append(answer)
            owned.update(map(id, mine))
            found.append((leaf, mine[::-1]))
        return found[::-1]

    def calls(self) -> list[dict[str, Any]]:
        """The tree as a rollout file has it (``docs/reference/rollouts.md``): a call for each answer, in the order of :attr:`answers`.

        Of a mere line there is none: each answer continues the one before, and the messages of the last have it all.
        """
        before = None
        for answer in self.answers:
            if answer.parent is not before or not answer.delivered:
                break
            before = answer
        else:
            return []
        sequences = self.sequences()
        where = {id(answer): number for number, (_, trained) in enumerate(sequences) for answer in trained}
        numbers = {id(answer): number for number, answer in enumerate(self.answers)}
        last = {id(answer) for answer in _line(sequences[-1][0])} if sequences else set()
        calls = []
        for answer in self.answers:
            ledger, parent = answer.transcript, answer.parent
            span = ledger.spans[-1]
            call: dict[str, Any] = {
                "parent": None if parent is None else numbers[id(parent)],
                "kind": answer.kind,
                "reason": answer.reason,
                "sequence": where.get(id(answer)),
                "span": [span.start, span.end],
            }
            if id(answer) in last:
                call["until"] = len(ledger.messages)
            else:
                call["messages"] = list(ledger.messages[0 if parent is None else len(parent.transcript.messages) :])
            if parent is None or parent.tools != answer.tools:
                call["tools"] = _tool_names(answer.tools)
            calls.append(call)
        return calls

    def ledger(self) -> Transcript | None:
        """The session as one ledger: its last sequence, the others as its branches; ``None`` where nothing was sampled."""
        found = self.sequences()
        if not found:
            return None
        *others, last = (_masked(leaf, trained) for leaf, trained in found)
        given = [answer.transcript for answer in self.answers if answer.delivered]
        return dataclasses.replace(
            last,
            branches=tuple(Branch(t.tokens, t.mask, t.log_probs, t.versions) for t in others),
            turns=len(given),
            scored=all(transcript.scored for transcript in given),
        )


def _recorded(place: Place, message: Message, rest: Sequence[Message]) -> tuple[Answer | None, str]:
    """The answer of a place that a message is; or why it is none of them.

    Args:
        place: where it was sampled.
        message: the message.
        rest: what stands behind it.
    """
    answers = place.answers
    if len(answers) == 1 and answers[0].spelled == message:
        return answers[0], ""
    if not answers:
        return None, "nothing was sampled behind this prompt"
    fits = _fits(place, message)
    if not fits:
        return None, difference(said(message), answers[-1].said) or "it is the answer to another prompt"
    best = fits[0]
    if len(fits) > 1:
        sent = said(message)
        # Ids are the surest sign, then the reasoning; of answers that are the same, the one that the rest has gone on from.
        best = max(
            fits,
            key=lambda answer: (
                bool(sent.ids) and sent.ids == answer.said.ids,
                bool(sent.reasoning) and sent.reasoning == answer.said.reasoning,
                _leads_on(answer.place, rest),
                answer.delivered,
            ),
        )
    best.spelled, best.delivered = message, True  # who sends it back has got it
    return best, ""


def _fits(place: Place, message: Message) -> list[Answer]:
    """The answers of a place that a message may be."""
    sent = said(message)
    return [
        answer for answer in place.answers if answer.said.key == sent.key and difference(sent, answer.said) is None
    ]


def _leads_on(place: Place, rest: Sequence[Message]) -> tuple[int, bool]:
    """How many of the answers behind a place are known there, and whether nobody has gone on from the last of them."""
    at = place
    for number, message in enumerate(rest):
        if message["role"] == POLICY:
            further = [_leads_on(answer.place, rest[number + 1 :]) for answer in _fits(at, message)]
            if further:
                count, fresh = max(further)
                return 1 + count, fresh
        key = ("words", _words(message)) if message["role"] == POLICY else said(message).key
        if (following := at.children.get(key)) is None:
            break
        at = following
    return 0, not place.children and not place.answers


def _words(message: Message) -> Said:
    """All that words of the model say, but for the ids of their calls."""
    return said(message)._replace(ids=())


def _renamed(message: Message, answer: Answer) -> dict[str, CallName]:
    """The calls of an answer by the ids that a message has for them: calls are matched by their places (``A8``)."""
    known = dict(answer.calls)
    sent = message.get("tool_calls") or ()
    known.update(
        (call["id"], own) for call, own in zip(sent, answer.calls.values(), strict=False) if call.get("id")
    )
    return known


def _left_out(place: Place) -> Answer | None:
    """An empty answer that the agent does not send back (``A10``)."""
    return next((answer for answer in place.answers if answer.empty and answer.delivered), None)


def _strays(place: Place, role: str) -> str:
    """What is said of a message that was not expected at a place."""
    if not any(isinstance(key, tuple) and key[0] == role for key in place.children):
        return (
            "follows a prompt whose answer is left out (B1)" if place.answers else "stands where another role stood"
        )
    return "is not the one that stood there before"


def _tool_names(tools: Hashable) -> list[str]:
    """The names of the functions that a prompt shows."""
    schemas = json.loads(tools) if isinstance(tools, bytes) and tools else []
    return [str((schema.get("function") or schema).get("name", "?")) for schema in schemas]


def _line(answer: Answer) -> Iterator[Answer]:
    """An answer and those whose tokens its sequence begins with, newest first."""
    at: Answer | None = answer
    while at is not None:
        yield at
        at = at.parent


def _masked(leaf: Answer, trained: Sequence[Answer]) -> Transcript:
    """The ledger of a sequence, true under its mask on what these answers sampled only."""
    transcript = leaf.transcript
    if sum(1 for _ in _line(leaf)) == len(trained):
        return transcript
    tape = Tape.of(transcript.token_array.tolist())
    source = transcript.tape.arrays
    for answer in trained:
        last = answer.transcript.spans[-1]
        span = slice(last.start, last.end)
        for part in (MASK, LOG_PROBS):
            tape.arrays[part][span] = source[part][span]
    assert tape.arrays[IDS][transcript.length - 1] == source[IDS][transcript.length - 1]
    return dataclasses.replace(transcript, tape=tape)
