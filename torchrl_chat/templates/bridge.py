"""The bridge: what a chat template writes after an assistant turn, derived from the template itself.

A chat template is a program over whole conversations; the ledger needs its *suffixes*. They are
derived by rendering the conversation with a sentinel as the end of the assistant's answer and taking
what stands after it (the *tail*)::

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nSENTINEL<|im_end|>\\n<|im_start|>user\\n...
                                                                  ^ tail    ^ a turn that ended by itself
                                                                              goes on here

A policy that ended its turn sampled a *stop token*; its prompt goes on behind that token's place in the
tail. One that was cut by a limit goes on at the tail's start. What comes before the sentinel is never
used: the template may rewrite it as it likes, the ledger keeps what was there.

What is derived rests on three assumptions, and each is tried on a suite of probes before anything is built on it:

- what follows an answer does not depend on what the answer says (whole renderings with real contents must
  end with the tail that the sentinel showed);
- the new messages are in the tail, whole and in order;
- the tokenizer does not merge across the place where the tail is joined to what was sampled.

Law of this file: a tail is what the template wrote for this very conversation, or a :class:`BridgeError`
that names what the template does instead, with the smallest example.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from torchrl_chat.messages import Message, content_text
from torchrl_chat.templates.kinds import AnswerKind, Roles
from torchrl_chat.templates.rendering import ChatTemplateError, Renderer, at_another_time

_T = TypeVar("_T", str, list[int])
BY_TEXT = -1
"""Stands for the stop token where a template ends its turns with plain text alone."""

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


class BridgeError(ChatTemplateError):
    """An exact extension cannot be proved for this template; the text says which behaviour forbids it."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What a template writes behind the text of an answer."""

    text: str  # all of it, up to the end of the new messages and the generation prompt
    # for every token that may end the turn, where in ``text`` a turn that ended with it goes on
    resume: Mapping[int, int]
    body: str = ""  # text that the template writes in front of the stop token; nearly always empty
    cut: int = 0  # where a turn that was cut by a limit goes on: at the start, or behind the end of a tool call
    limit: int = 0  # where the content of the first new message stands

    @property
    def end(self) -> int:
        """Where the end of the turn ends, whatever token it was ended with."""
        return max(self.cut, *self.resume.values(), 0)

    def after(self, stop: int | None) -> str:
        """What is still missing behind a turn that ended with ``stop``, or was cut (``None``)."""
        return self.text[self.cut if stop is None else self.resume.get(stop, self.cut) :]

    def placed(self, text: str) -> Tail | None:
        """The places of this tail in another text of the same kind; ``None`` if its turn ends differently.

        What stands in front of ``cut`` depends on the arguments of the call; what ends the turn must not.
        """
        ending = self.text[self.cut : self.end]
        if not self.cut:
            return Tail(text, self.resume, self.body, 0, self.limit) if text.startswith(ending) else None
        # With what opens the next message, if that is constant: a later message may end as this turn does.
        at = text.find(self.text[self.cut : self.limit])
        at = text.find(ending) if at < 0 and ending else at
        if at < 0:
            return None
        shift = at - self.cut
        resume = {}
        for stop, place in self.resume.items():
            # The token that closes the call stands in front of the cut; what is between them is the template's.
            if place > self.cut or text[place + shift : at] == self.text[place : self.cut]:
                resume[stop] = place + shift
        return Tail(text, resume, self.body, at, self.limit + shift)


@dataclass(frozen=True, slots=True)
class Suffix:
    """Text that the template adds, and its ids."""

    text: str = ""
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Close:
    """How a template ends an assistant turn, as far as that is certain whatever follows."""

    lead: str  # whitespace that the policy is expected to write before its content (one space, for Mistral)
    body: str  # text between content and stop token that is not content
    # the tokens that a policy is expected to end its turns with: one, or one for each kind of message that
    # follows, where a template has the next message's opener end the turn
    main: tuple[int, ...]
    # for each token that may end the turn, what surely comes behind it (``"\n"`` in ChatML)
    stops: Mapping[int, Suffix]
    cut: Suffix  # what surely comes behind a turn that was cut by a limit, the stop token included
    # for each stop token, the texts by which the template ends a turn that ended with it, longest first: up to and with the
    # stop token, or what stands in its place once a message follows; behind the end of a call. Empty for a
    # token that closes the call itself
    heads: Mapping[int, tuple[str, ...]]

    @property
    def by_text(self) -> bool:
        """Whether turns end with plain text: then the text of what was sampled tells whether one ended."""
        return BY_TEXT in self.stops

    def stop(self, last_id: int, text: str = "") -> int | None:
        """The stop token, if the last sampled id is one; or :data:`BY_TEXT`, if the text ends as turns do."""
        if last_id in self.stops:
            return last_id
        return BY_TEXT if BY_TEXT in self.stops and text.endswith(self.body) else None

    def ends(self, stop: int | None) -> bool:
        """Whether a turn that stopped so has ended: behind the first of several closing tokens it may be a cut."""
        return stop is not None and (stop in self.main or not (self.cut.text or self.suffix(stop).text))

    def without_end(self, text: str, stop: int, token: str) -> str:
        """The sampled text without what ends the turn: the stop token, and what the template has in front of it."""
        for head in self.heads.get(stop, ()):
            if text.endswith(head):
                return text.removesuffix(head)
        return text.removesuffix(token).removesuffix(self.body)

    def suffix(self, stop: int | None) -> Suffix:
        """What surely follows a turn that ended with ``stop``, or was cut (``None``)."""
        return self.cut if stop is None else self.stops.get(stop, self.cut)


@dataclass(eq=False)
class Bridge:
    """Derives the tails of one template, and proves them."""

    renderer: Renderer

    def __post_init__(self) -> None:
        self.codec = self.renderer.codec

    # ------------------------------------------------------------------ tails as text
    def tail(
        self, before: Sequence[Message], answer: Message, new: Sequence[Message], add_generation_prompt: bool
    ) -> str:
        """The text behind the answer when ``new`` follows it.

        Raises:
            BridgeError: the template raises, or does not write the answer.
        """
        sentinel = unused((*before, answer, *new))
        # The last thing that it says: its last call's argument, else its content. Where a template leaves tool calls
        # out, those that the policy wrote are in the ledger all the same; the tail is then what follows the content.
        endings = [{**answer, "content": sentinel}]
        if calls := answer.get("tool_calls"):
            endings.insert(0, {**answer, "tool_calls": [*calls[:-1], call_with(calls[-1], sentinel)]})
        for ending in endings:
            try:
                text = self.renderer.text([*before, ending, *new], add_generation_prompt)
            except ChatTemplateError as error:
                raise BridgeError(str(error)) from error
            at = text.rfind(sentinel)
            if at >= 0:
                return text[at + len(sentinel) :]
        raise BridgeError(
            f"the chat template does not write an answer of role {answer['role']!r}: a sentinel as its content "
            f"is missing from {text[-120:]!r}."
        )

    def lead(self, before: Sequence[Message], policy: str) -> str:
        """Whitespace between the generation prompt and an answer's content."""
        sentinel = unused(before)
        prompt = self.renderer.tried(before, True)
        full = self.renderer.tried([*before, {"role": policy, "content": sentinel}], False)
        lead = full[len(prompt) : full.rfind(sentinel)] if full.startswith(prompt) else ""
        return "" if lead.strip() else lead

    def resume(
        self, before: Sequence[Message], answer: Message, new: Sequence[Message], add_generation_prompt: bool
    ) -> Tail:
        """The tail of a *probe* conversation, whose new contents are distinct, with its stop tokens.

        Raises:
            BridgeError: see :meth:`tail`; or a new message is dropped.
        """
        text = self.tail(before, answer, new, add_generation_prompt)
        try:
            last = self.tail(before, answer, [], False)
        except BridgeError:
            last = text  # templates that refuse a conversation that ends with an answer
        limit = check_written(text, new)
        controls = self.codec.controls
        resume: dict[int, int] = {}
        shared = min(len(shared_prefix([last, text])), limit)
        for match in self.codec.control_tokens(last, 0, shared):
            resume.setdefault(controls[match.group()], match.end())
        stop = self.codec.first_special(last) or next(iter(self.codec.control_tokens(last)), None)
        if stop is not None:
            body, stop_id = last[: stop.start()], controls[stop.group()]
            if stop_id not in resume:
                resume[stop_id] = self._counterpart(before, body, stop.group(), text, limit)
        else:
            body = last if text.startswith(last) else last.rstrip("\n")
        body = body if text.startswith(body) else ""
        # The token that closes the turn once a message follows, or the next message's own opener: a policy
        # may end its turn with it, whatever the template writes behind the last message.
        follower = self.codec.first_special(text, len(body), limit)
        if follower is not None:
            resume.setdefault(controls[follower.group()], follower.end())
        if answer.get("tool_calls"):
            return self._behind_call(before, answer, new, add_generation_prompt, Tail(text, resume, body, 0, limit))
        if body.strip() or (body and not resume):
            resume.setdefault(BY_TEXT, len(body))
        return Tail(text, resume, body, 0, limit)

    def _behind_call(
        self, before: Sequence[Message], answer: Message, new: Sequence[Message], agp: bool, tail: Tail
    ) -> Tail:
        """The tail of an answer with tool calls: where the last call ends, and the turn's end begins.

        The sentinel stands in the call's arguments; what closes the call (``"}}\\n</tool_call>"``) was sampled
        with it. The turn's end is what also stands behind an answer in words.
        """
        resume = dict(tail.resume)
        try:
            plain = self.resume(before, {"role": answer["role"], "content": "words"}, new, agp)
        except BridgeError:
            plain = None
        if plain is not None and plain.text and tail.text.endswith(plain.text):
            behind = len(tail.text) - len(plain.text)
            for stop, place in plain.resume.items():
                resume.setdefault(stop, behind + place)
            cut, body = self._in_front_of_end(before, tail.text, behind), plain.body
        else:
            end = max(resume.values(), default=0)
            closing = next((self.codec.control_texts[stop] for stop, place in resume.items() if place == end), "")
            cut, body = end - len(closing), ""
        return Tail(tail.text, resume, body, cut, tail.limit)

    def _in_front_of_end(self, before: Sequence[Message], text: str, cut: int) -> int:
        """The cut, in front of a token that ends turns: a template may write it behind a call alone, not behind words."""
        tokens = list(self.codec.control_tokens(text, 0, cut))
        if tokens and not text[tokens[-1].end() : cut].strip():
            ends = (self.renderer.tokenizer.eos_token, self._closer(before))
            return tokens[-1].start() if tokens[-1].group() in ends else cut
        return cut

    def _counterpart(self, before: Sequence[Message], body: str, stop: str, text: str, limit: int) -> int:
        """Where a turn goes on that ended with a token which the template writes only behind the last message.

        What stands in its place once a message follows is another closing token (``<|return|>`` becomes
        ``<|end|>``), or nothing at all.
        """
        again = text.find(stop, 0, limit)
        if again >= 0 and not text[:again].replace(body, "", 1).strip():
            return again + len(stop)
        if not text.startswith(body):
            body = ""
        other = self.codec.first_special(text, len(body), limit)
        if other is not None and other.group() == self._closer(before):
            return other.end()
        return len(body)

    def _closer(self, before: Sequence[Message]) -> str | None:
        """The special token that the template writes behind the message before the answer."""
        sentinel = unused(before)
        text = self.renderer.tried([*before[:-1], {**before[-1], "content": sentinel}], True)
        match = self.codec.first_special(text, max(text.rfind(sentinel), 0))
        return match and match.group()

    # ------------------------------------------------------------------ tails as ids
    def ids(self, stop: int | None, text: str, guarded: bool = False) -> list[int]:
        """Ids of a suffix as it continues a turn that ended with ``stop``, or was cut."""
        return self.ids_batch([(stop, text, guarded)])[0]

    def ids_batch(self, suffixes: Sequence[tuple[int | None, str, bool]]) -> list[list[int]]:
        """:meth:`ids` of many suffixes, each with its stop token and whether it carries marks."""
        # A text that begins with a control token has no merge with what precedes it: one call for all of these.
        codec = self.codec
        plain = [i for i, (_, text, marked) in enumerate(suffixes) if not marked and codec.opens(text)]
        encoded = dict(zip(plain, codec.encode([suffixes[i][1] for i in plain]), strict=True))
        return [encoded[i] if i in encoded else self._one(*suffix) for i, suffix in enumerate(suffixes)]

    def _one(self, stop: int | None, text: str, marked: bool) -> list[int]:
        encode = self.codec.encode_guarded if marked else self.codec.encode
        if not text:
            return []
        if stop is not None and stop != BY_TEXT and not self.codec.opens(text):
            return encode([self.codec.control_texts[stop] + text])[0][1:]
        # The words of a cut turn go on: up to the first control token nothing may be put in front of them.
        first = next(self.codec.control_tokens(text), None)
        cut = first.start() if first else len(text)
        continued = self.codec.encode_guarded if marked else self.codec.encode_continuation
        head = continued([text[:cut]])[0] if cut else []
        return head + (encode([text[cut:]])[0] if cut < len(text) else [])

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
                    tails.append(self.resume(before, answer, new, True))
            except BridgeError as error:
                refusals.append(error)
        if not tails:
            raise refusals[0]
        try:
            last = self.tail(before, answer, [], False)
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
        heads = {}
        for stop in stops:
            found = dict.fromkeys(t.text[t.cut : t.resume[stop]] for t in tails if t.resume.get(stop, -1) > 0)
            heads[stop] = tuple(sorted(found, key=len, reverse=True))
        main = tuple({self._main(tail): None for tail in tails if tail.resume})
        lead = self.lead(before, roles.policy)
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
                return Suffix(text, tuple(self.ids(stop, text)))
        return Suffix()

    # ------------------------------------------------------------------ one kind of conversation
    def prove(self, before: Sequence[Message], answer: Message, new: Sequence[Message], agp: bool) -> Tail:
        """The tail of a probe conversation, proved for a plain answer.

        Raises:
            BridgeError: the template or the tokenizer disagrees.
        """
        tail = self.resume(before, answer, new, agp)
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
                if self.tail(before, said, new, agp)[tail.cut :] != tail.text[tail.cut :]:
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
            suffix = self.ids(stop, rest[first:]) if rest[first:] else []
            if stop not in (None, BY_TEXT) and not full.endswith(self.codec.control_texts[stop] + rest):
                continue  # the template writes another token in its place
            if suffix and ids[-len(suffix) :] != suffix:
                raise BridgeError(
                    f"the tokenizer merges across the end of an assistant turn: {rest[:60]!r} alone is not the "
                    f"end of the ids of the whole conversation."
                )


# ---------------------------------------------------------------------- sentinels and checks
def call_with(call: Any, sentinel: str) -> Any:
    """A tool call whose last argument is the sentinel."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    others = dict(arguments) if isinstance(arguments, Mapping) else {}
    return {**call, "function": {**function, "arguments": {**others, next(reversed(others), "value"): sentinel}}}


def check_written(text: str, new: Sequence[Message]) -> int:
    """Where the first new message's content stands in a tail that holds all of them, in order.

    Raises:
        BridgeError: a message is not in the tail, or not behind the one before it.
    """
    first, at = len(text), 0
    for i, message in enumerate(new):
        content = content_text(message).strip()
        found = text.find(content, at)
        if found < 0:
            raise BridgeError(
                f"the chat template drops a message of role {message['role']!r} after an assistant turn: its "
                f"content {content[:60]!r} is not in {text[:160]!r}."
            )
        first = found if i == 0 else first
        at = found + len(content)
    return first


def shared_prefix(texts: Sequence[_T]) -> _T:
    """The longest text that all of them begin with; of lists, the longest list."""
    low, high = min(texts), max(texts)  # every other one lies between these two, character by character
    return low[: next((i for i, c in enumerate(low) if high[i] != c), len(low))]


def unused(messages: Sequence[Message]) -> str:
    """A sentinel that stands in none of the messages."""
    said = repr(messages)
    number = 0
    while (sentinel := f"Qz{number:05d}zQ") in said:
        number += 1
    return sentinel


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
