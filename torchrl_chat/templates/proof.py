"""The proof: a derived tail against the template itself and against the tokenizer, on a suite of probes.

What :mod:`~torchrl_chat.templates.bridge` derives rests on three assumptions, and each is tried here before
anything is built on it:

- what follows an answer does not depend on what the answer says (whole renderings with real contents must
  end with the tail that the sentinel showed);
- the new messages are in the tail, whole and in order;
- the tokenizer does not merge across the place where the tail is joined to what was sampled.

Law of this file: what passed is used, what failed raises :class:`BridgeError` with the smallest example.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

from torchrl_chat.messages import Message, content_text
from torchrl_chat.templates.bridge import (
    BY_TEXT,
    BridgeError,
    Close,
    Derivation,
    Suffix,
    Tail,
    check_written,
    shared_prefix,
    unused,
)
from torchrl_chat.templates.kinds import AnswerKind, Roles
from torchrl_chat.templates.rendering import ChatTemplateError, at_another_time

CONTENTS = (
    "plain words",
    "42",
    "naïve café — 北京 🎉",
    'a "quoted" {"k": [1, 2]} & <b>it</b>\'s {{ x }}',
    "first\n\nsecond\n\n\nthird: 1,234.56",
)
"""Contents that templates are known to treat specially, none with blank edges: those a template may trim."""

ANSWERS = (*CONTENTS, "<think>\nmuse\n</think>\n\n42", "muse\n</think>\n\n42")

TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)
"""What templates do to the edges of a content."""


@dataclass(eq=False)
class Prover:
    """Proves the tails of one template."""

    derivation: Derivation

    def __post_init__(self) -> None:
        self.renderer, self.codec = self.derivation.renderer, self.derivation.codec

    # ------------------------------------------------------------------ what is certain whatever follows
    def close(self, roles: Roles, kind: AnswerKind) -> Close:
        """How a turn of this kind is closed, as far as every continuation agrees.

        Raises:
            BridgeError: no continuation can be derived.
        """
        system = [{"role": roles.system, "content": "Be brief."}] if roles.system else []
        before = [*system, {"role": roles.user, "content": "first question"}]
        answer = kind.example(roles.policy)
        tails: list[Tail] = []
        refusals: list[BridgeError] = []
        # What ends a turn at one time of two only is not certain.
        times: list[Callable[[], AbstractContextManager[None]]] = [nullcontext]
        if self.renderer.tells_time:
            times.append(at_another_time)
        for new, time in itertools.product(_continuations(roles, kind.calls), times):
            try:
                with time():
                    tails.append(self.derivation.resume(before, answer, new, True))
            except BridgeError as error:
                refusals.append(error)
        if not tails:
            raise refusals[0]
        try:
            last = self.derivation.tail(before, answer, [], False)
        except BridgeError:
            last = ""
        # Nothing of the next message is certain: texts count up to where it says something.
        certain = [tail.text[: tail.limit] for tail in tails]
        stops = {}
        for stop in {stop: None for tail in tails for stop in tail.resume}:
            # Where a continuation does not know the token, the turn goes on as if it had been cut.
            afters = [text[tail.resume.get(stop, tail.cut) :] for tail, text in zip(tails, certain, strict=True)]
            afters.append(self._behind(last, stop, tails[0]))
            stops[stop] = self._suffix(stop, afters)
        cut = [text[tail.cut :] for tail, text in zip(tails, certain, strict=True)]
        heads = {
            stop: tuple({t.text[t.cut : t.resume[stop]]: None for t in tails if t.resume.get(stop, -1) > 0})
            for stop in stops
        }
        main = tuple({self._main(tail): None for tail in tails if tail.resume})
        lead = self.derivation.lead(before, roles.policy)
        return Close(lead, tails[0].body, main, stops, self._suffix(None, [*cut, last[tails[0].cut :]]), heads)

    def _behind(self, last: str, stop: int, tail: Tail) -> str:
        """What follows a stop token where no message does."""
        text = tail.body if stop == BY_TEXT else self.codec.control_texts[stop]
        place = tail.resume.get(stop, 0)
        if 0 < place <= tail.cut and last.startswith(tail.text[:place]):  # the token closes the call
            return last[place:]
        at = last.find(text, min(tail.cut, len(last)))
        return last[at + len(text) :] if at >= 0 else ""

    def _main(self, tail: Tail) -> int:
        """The token that ends the turn, of several that close something at its end: eos, or else the last one."""
        eos = self.renderer.tokenizer.eos_token_id
        if eos in tail.resume:
            return eos
        return max(tail.resume, key=lambda stop: (stop in self.codec.special_ids, tail.resume[stop]))

    def _suffix(self, stop: int | None, texts: Sequence[str]) -> Suffix:
        """What all texts begin with, cut back to in front of a control token."""
        shared = len(shared_prefix(texts))
        for cut in range(shared, 0, -1):
            if all(len(text) == cut or self.codec.opens(text[cut:]) for text in texts):
                text = texts[0][:cut]
                return Suffix(text, tuple(self.derivation.ids(stop, text)))
        return Suffix()

    # ------------------------------------------------------------------ one kind of conversation
    def prove(self, before: Sequence[Message], answer: Message, new: Sequence[Message], agp: bool) -> Tail:
        """The tail of a probe conversation, proved for a plain answer.

        Raises:
            BridgeError: the template or the tokenizer disagrees.
        """
        tail = self.derivation.resume(before, answer, new, agp)
        full = self.check_answer(before, answer, new, agp, tail.text[tail.cut :])
        if full.endswith(tail.text[tail.cut :]):  # a blank answer may be left out altogether
            self._check_tokens(full, tail)
        return tail

    def check_answer(
        self, before: Sequence[Message], answer: Message, new: Sequence[Message], agp: bool, end: str
    ) -> str:
        """The template's text of a whole conversation, which must end with ``end``, whatever the answer says.

        Raises:
            BridgeError: the template refuses the answer, or writes something else behind it.
        """
        try:
            full = self.renderer.text([*before, answer, *new], agp)
        except ChatTemplateError as error:
            raise BridgeError(str(error)) from error
        if not full.endswith(end) and (answer.get("content") or answer.get("tool_calls")):
            raise BridgeError(
                f"what the chat template writes after an answer depends on the answer: after {_shown(answer)} it "
                f"writes {full[-len(end) - 20 :]!r}, after other answers {end!r}."
            )
        return full

    def steady(
        self, before: Sequence[Message], answer: Message, new: Sequence[Message], agp: bool, tail: Tail
    ) -> bool:
        """Whether the tail is the same for every kind of answer that the template's code could tell apart."""
        for said in self._variations(answer):
            try:
                self.check_answer(before, said, new, agp, tail.text[tail.cut :])
                if self.derivation.tail(before, said, new, agp)[tail.cut :] != tail.text[tail.cut :]:
                    return False
            except BridgeError:
                return False
        return True

    def _variations(self, answer: Message) -> Iterator[Message]:
        """Answers of the same kind that say something else."""
        contents = ANSWERS if answer.get("content") else ("",)
        for content in (*contents, *(form for s in self.renderer.looks.literals for form in forms(s))):
            if content or not answer.get("content"):
                guarded, _ = self.renderer.guard([{**answer, "content": content}])
                yield guarded[0] if answer.get("content") or not content else answer
        yield {**answer, "reasoning_content": "hm"}

    def _check_tokens(self, full: str, tail: Tail) -> None:
        [ids] = self.codec.encode([full])
        for stop in (None, *tail.resume):
            rest = tail.after(stop)
            first = (
                0
                if stop not in (None, BY_TEXT)
                else next((m.start() for m in self.codec.control_tokens(rest)), len(rest))
            )
            suffix = self.derivation.ids(stop, rest[first:]) if rest[first:] else []
            if stop not in (None, BY_TEXT) and not full.endswith(self.codec.control_texts[stop] + rest):
                continue  # the template writes another token in its place
            if suffix and ids[-len(suffix) :] != suffix:
                raise BridgeError(
                    f"the tokenizer merges across the end of an assistant turn: {rest[:60]!r} alone is not the "
                    f"end of the ids of the whole conversation."
                )


def _continuations(roles: Roles, calls: int) -> list[list[Message]]:
    """What may follow: results of the calls, or of a call in raw text; a user's message."""
    results = [
        {"role": roles.tool or "tool", "content": f"found {i}", "name": "lookup", "tool_call_id": f"abcdefgh{i}"}
        for i in range(max(calls, 1))
    ]
    user = [{"role": roles.user, "content": "next question"}]
    return [results, user] if calls else [user, results]


def twin(messages: Sequence[Message], start: int = 0) -> list[Message]:
    """The messages with contents that differ from each other and from everything that was said."""
    sentinel = unused(messages)
    return [
        # A call without a text is another kind of message than one with a text.
        m if m.get("tool_calls") and not m.get("content") else {**m, "content": f"{sentinel}{start + i}"}
        for i, m in enumerate(messages)
    ]


def check_real(text: str, new: Sequence[Message]) -> None:
    """Whether every new message stands in a tail with real contents, in order.

    Raises:
        BridgeError: one is missing.
    """
    with suppress(BridgeError):
        check_written(text, new)
        return
    # A template may write some of them as JSON: then only letters and digits are compared, in order still.
    written, at = loosely(unescaped(text)), 0
    for message in new:
        content = content_text(message).strip()
        ends = [
            found + len(said)
            for said in (loosely(content), loosely(unescaped(content)))
            if (found := written.find(said, at)) >= 0
        ]
        if not ends:
            raise BridgeError(
                f"the chat template drops or rewrites a message of role {message['role']!r}: its content "
                f"{content[:60]!r} is not in {text[-160:]!r}, at least not behind the message before it."
            )
        at = min(ends)


def forms(literal: str) -> tuple[str, ...]:
    """Texts in which a template would find what it looks for, at either end, in the middle or alone."""
    return (f"some {literal} words", f"{literal} words", f"words {literal}", literal)


def _shown(message: Message) -> str:
    calls = message.get("tool_calls")
    return f"{message.get('content')!r}" + (f" with {len(calls)} tool call(s)" if calls else "")


def loosely(text: str) -> str:
    """The letters and digits of a text: what stays of it however it is spaced, quoted or escaped."""
    return "".join(c for c in text if c.isalnum())


def unescaped(text: str) -> str:
    """The text without JSON's escapes, near enough to find a content in it."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m.group(1), 16)), text)
    return re.sub(r"\\[nrtbf]", "", text)
