"""What a template makes of the past: earlier answers without their reasoning, a system prompt that moved.

Under the history policy ``"template"`` the model is to see what its template writes for the whole
conversation. Where that differs from what it saw so far, the tokens of the past are put together anew: the
template's text in between, and of each earlier answer the ids that were sampled, minus what the template
leaves out. How the template writes an answer is seen with sentinels in its reasoning, its content and its
last tool call; of the calls, only where they end, for they stay as they were sampled, however the template
spells them.

Law of this file: a sampled id that stays is the id that was sampled; nothing sampled is tokenized again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torchrl_chat.messages import Message
from torchrl_chat.templates.backends import unmarked
from torchrl_chat.templates.bridge import (
    BY_TEXT,
    TRIMS,
    Bridge,
    BridgeError,
    Close,
    call_with,
    shared_prefix,
    unescaped,
    unused,
)
from torchrl_chat.templates.parsing import REASONING, AnswerParser, CallStatus
from torchrl_chat.templates.rendering import ChatTemplateError

_Edit = Callable[[str], str]


class Span(NamedTuple):
    """Where an answer's sampled tokens stand in a sequence."""

    message: int  # the position of the answer among the messages
    start: int
    end: int
    stop: int | None  # the token that ended it
    lost: str = ""  # text in front of it that stands for the rest of a token cut in two by a rewriting


class Rewritten(NamedTuple):
    """A new sequence for the same conversation, up to the last answer's sampled tokens."""

    ids: list[int]
    spans: tuple[Span, ...]


class _Answer(NamedTuple):
    """How the template writes one answer: marked text in front of it, and what stays of it."""

    before: str
    words: str  # from its reasoning or content on, what was said put in
    front: str  # what stands between these and its last call's last argument
    opens_with: str  # what comes first: its reasoning, its content or a call
    calls: bool
    keeps_reasoning: bool
    keeps_stop: bool  # whether the token that ended it still ends it
    edit: _Edit  # what becomes of the content
    end: str  # what the token that ended it stands for


_CALLS = "\0"  # stands for the calls of an answer, however they are spelled
_LONGEST_OPENING = 64  # more than any template writes in front of a call's own words


@dataclass(eq=False)
class Rewriter:
    """Puts sequences together anew, as one template writes the past."""

    bridge: Bridge
    parser: AnswerParser
    close: Callable[[Sequence[Message]], Close]  # how a turn is closed, given the conversation up to its answer

    def __post_init__(self) -> None:
        self.codec, self.renderer = self.bridge.codec, self.bridge.renderer

    def rewrite(
        self,
        ids: Sequence[int],
        spans: Sequence[Span],
        messages: Sequence[Message],
        new: Sequence[Message],
        agp: bool,
    ) -> Rewritten | None:
        """See :meth:`ChatTemplate.rewrite <torchrl_chat.ChatTemplate.rewrite>`."""
        written, rest, real = self._written(spans, messages, new, agp)
        out: list[int] = []
        moved: list[Span] = []
        got: list[str] = []
        wanted: list[str] = []
        position = 0
        stop: int | None = None
        for span, answer in zip(spans, written, strict=True):
            unsampled, sampled = list(ids[position : span.start]), list(ids[span.start : span.end])
            end = [span.stop] if span.stop is not None and span.stop != BY_TEXT else []
            core = sampled[: len(sampled) - len(end)]
            # Texts are compared as the tokenizer reads them back: some tokens swallow blanks beside them.
            between = self._between(answer.before, stop, not moved)
            seen, said, before = self.codec.decode([unsampled, core, between])
            seen = seen.removesuffix(span.lost)
            message = messages[span.message]
            parted = message.get("tool_calls") or any(message.get(key) is not None for key in REASONING)
            content_at, call_at = self._places(said, seen) if parted else (0, len(said))
            begin = 0 if answer.keeps_reasoning else content_at
            if answer.opens_with == "call":
                answer = answer._replace(before=self._in_front_of_call(answer.before, said[begin:]))
                between = self._between(answer.before, stop, not moved)
                before = self.codec.decode([between])[0]
            if before == seen + said[:begin]:  # what looks dropped was empty, and stands there as it was sampled
                answer = answer._replace(keeps_reasoning=True)
                before = seen
            lost, kept = self._pieces(core, said, begin, message, answer)
            lost = lost or (span.lost if kept == core else "")
            # The template's text may end with what the policy itself wrote first, "<think>" for one.
            if lost:
                between = self._between(answer.before + lost, stop, not moved)
            elif answer.keeps_reasoning and before.startswith(seen) and said.startswith(before[len(seen) :]):
                between = unsampled
            elif answer.keeps_reasoning and (shared := _overlap(unmarked(answer.before), said)):
                between = self._between(answer.before[:-shared], stop, not moved)
            ended = end * answer.keeps_stop
            start = len(out) + len(between)
            out += [*between, *kept, *ended]
            stop = span.stop if answer.keeps_stop else None
            moved.append(Span(span.message, start, len(out), stop, lost))
            position = span.end
            wanted += [answer.before, self._in_front_of_calls(answer, said[call_at:]), answer.end]
            front, words, token = self.codec.decode([between, kept, ended])
            if answer.calls:  # the calls stay as they were sampled, to the end
                front = front[: len(front) - max(begin + len(lost) - call_at, 0)]
                words = words[: max(len(words) - len(said) + call_at, 0)] + _CALLS
                token = answer.end if answer.keeps_stop else ""
            got += [front, words, token]
        if out == list(ids[:position]):
            return None
        tolerance = len(_unspaced(token if written[-1].calls else self.codec.token_text(out[-1])))
        with_calls = any(answer.calls for answer in written)
        self._check("".join(got), unmarked("".join([*wanted, rest])) if with_calls else real, real, tolerance)
        return Rewritten(out, tuple(moved))

    @staticmethod
    def _check(got: str, wanted: str, real: str, tolerance: int) -> None:
        """Blanks and the spelling of calls aside, what was put together must be the template's own text."""
        first, *others = _unspaced(wanted).split(_CALLS)
        real, at = _unspaced(real), len(first)
        agrees = real.startswith(first)
        for text in others:
            found = real.find(text, at)
            agrees, at = agrees and found >= 0, max(found + len(text), at)
        if not agrees or not real.endswith((first, *others)[-1]):
            raise BridgeError(
                "the past cannot be put together: what the chat template writes beside a call depends on the arguments "
                "of the call, or on what is said beside it."
            )
        got, wanted = _unspaced(unescaped(got)), _unspaced(unescaped(wanted))
        agree = len(shared_prefix([got, wanted]))
        if len(got) - agree > tolerance:
            raise BridgeError(
                f"the past cannot be put together as the chat template writes it: {got[max(agree - 30, 0) : agree + 30]!r} "
                f"stands where it writes {wanted[max(agree - 30, 0) : agree + 30]!r}."
            )

    # ------------------------------------------------------------------ what the template writes
    def _written(
        self, spans: Sequence[Span], messages: Sequence[Message], new: Sequence[Message], agp: bool
    ) -> tuple[list[_Answer], str, str]:
        """How the template writes each sampled answer; the text behind the last one; its text of the whole conversation."""
        guarded, _ = self.renderer.guard([*messages, *new])
        probe = [dict(message) for message in guarded]
        fields: dict[str, tuple[int, str, str]] = {}  # sentinel -> answer, what it is, what was said
        stem = unused(guarded)
        for i, span in enumerate(spans):
            message = probe[span.message]
            for key in REASONING:
                if message.get(key):
                    fields[f"{stem}r{i}R"] = (i, "reasoning", message[key])
                    message[key] = f"{stem}r{i}R"
            if message.get("content") or not message.get("tool_calls"):
                # A call without a text stays without one: templates write the two differently.
                fields[f"{stem}c{i}C"] = (i, "content", message.get("content") or "")
                message["content"] = f"{stem}c{i}C"
        try:
            real, words = self.renderer.text(guarded, agp), self.renderer.text(probe, agp)
            # With the real calls, nothing but the words differs.
            edits = self._edits(words, real, self._found(words, fields))
            text = words
            for i, span in enumerate(spans):
                if calls := probe[span.message].get("tool_calls"):
                    fields[f"{stem}t{i}T"] = (i, "call", "")
                    probe[span.message]["tool_calls"] = [*calls[:-1], call_with(calls[-1], f"{stem}t{i}T")]
                    text = ""
            text = text or self.renderer.text(probe, agp)
        except ChatTemplateError as error:
            raise BridgeError(str(error)) from error
        found = self._found(text, fields)
        answers, start = [], 0
        for i, span in enumerate(spans):
            mine = [(at, end, kind, said) for at, end, (owner, kind, said) in found if owner == i]
            kinds = [kind for _, _, kind, _ in mine]
            message = messages[span.message]
            if "content" not in kinds and "call" not in kinds:
                raise BridgeError(f"the chat template drops an earlier answer: {message['content']!r:.80}.")
            edit = edits.get(i, str)
            before, pos, inside, front = text[start : mine[0][0]], mine[0][0], "", ""
            for at, end, kind, said in mine:
                if kind == "call":
                    front = text[pos:at]
                else:
                    inside += text[pos:at] + (edit(said) if kind == "content" else said)
                pos = end
            skipped, length, keeps_stop = self._close_length(text[pos:], span, messages)
            ended = text[pos + skipped : pos + length]
            keeps = "reasoning" in kinds or all(message.get(key) is None for key in REASONING)
            answers.append(
                _Answer(before, inside, front, kinds[0], "call" in kinds, keeps, keeps_stop, edit, ended)
            )
            start = pos + length
        return answers, text[start:], unmarked(real)

    @staticmethod
    def _found(text: str, fields: dict[str, tuple[int, str, str]]) -> list[tuple[int, int, tuple[int, str, str]]]:
        """Where the sentinels stand, in order."""
        if not fields:
            return []
        return [(m.start(), m.end(), fields[m.group()]) for m in re.finditer("|".join(fields), text)]

    @staticmethod
    def _edits(text: str, real: str, found: Sequence[tuple[int, int, tuple[int, str, str]]]) -> dict[int, _Edit]:
        """What becomes of each answer's content, by walking the sentinels' text along the real one."""
        edits: dict[int, _Edit] = {}
        pos = found[0][0] if found else 0
        for k, (_, end, (owner, kind, said)) in enumerate(found):
            literal = text[end : found[k + 1][0] if k + 1 < len(found) else len(text)]
            edit = next((e for e in TRIMS if real.startswith(e(said) + literal, pos)), None)
            if edit is None and not said:
                pos = real.find(literal, pos) + len(literal)
                continue
            if edit is None:
                raise BridgeError(
                    f"the chat template changes the words of an earlier answer: {said!r:.80} is not in "
                    f"{real[pos : pos + 80]!r}, where it should stand."
                )
            if kind == "content":
                edits[owner] = edit
            pos += len(edit(said)) + len(literal)
        return edits

    def _close_length(self, text: str, span: Span, messages: Sequence[Message]) -> tuple[int, int, bool]:
        """Of the text behind an answer: what closes its calls, what its own stop token covers too, and whether that stays."""
        calls = messages[span.message].get("tool_calls")  # behind a call stand its own closing words first
        if span.stop is None and not calls:
            return 0, 0, True
        close = self.close(messages[: span.message + 1])
        if span.stop is None:  # what ends the turn was not sampled: it follows
            heads = [head for heads in close.heads.values() for head in heads if head]
            # Where the template ends such a turn with nothing of its own, the end is behind the token that closes the call.
            closers = [
                self.codec.control_texts[stop]
                for stop, some in close.heads.items()
                if "" in some and stop != BY_TEXT
            ]
            places = [at for head in heads if (at := text.find(head)) >= 0]
            places = places or [at + len(closer) for closer in closers if (at := text.find(closer)) >= 0]
            at = min(places, default=0)
            return at, at, True
        stop = close.body if span.stop == BY_TEXT else self.codec.control_texts[span.stop]
        for head in close.heads.get(span.stop, ()):
            if calls and not head:  # the token closes the call itself
                at = text.find(stop)
                return (at + len(stop), at + len(stop), True) if at >= 0 else (0, 0, False)
            at = text.find(head) if calls else 0
            if at >= 0 and text.startswith(head, at) and head.endswith(stop):
                return at, at + len(head), True
        return 0, 0, False

    # ------------------------------------------------------------------ pieces
    def _pieces(
        self, sampled: list[int], said: str, begin: int, message: Message, answer: _Answer
    ) -> tuple[str, list[int]]:
        """What stays of an answer's sampled tokens, and the text of a token of which only the end stays."""
        content = message.get("content") or ""
        kept = answer.edit(content)
        trims = kept != content and not message.get("tool_calls")
        if answer.keeps_reasoning and not trims:
            return "", sampled
        begin = 0 if answer.keeps_reasoning else begin
        end = rest = len(said)
        at = said.find(content, begin)
        if trims and at >= 0:
            begin = max(begin, at + content.find(kept))
            end, rest = at + content.find(kept) + len(kept), at + len(content)
        place = functools.partial(self.codec.place_of, sampled)
        first = place(begin)
        last = max(place(end + 1) - 1, first)
        lost = said[begin : len(self.codec.decode([sampled[:first]])[0])] if first <= len(sampled) else ""
        return lost, [*sampled[first:last], *(sampled[place(rest) :] if rest > end else [])]

    def _between(self, text: str, stop: int | None, first: bool) -> list[int]:
        marked = unmarked(text) != text
        if first:
            return (self.codec.encode_guarded if marked else self.codec.encode)([text])[0]
        return self.bridge.ids(stop, text, marked)

    @functools.cached_property
    def _header(self) -> str:
        """What opens an answer both in a generation prompt and in a history."""
        asked: list[Message] = [{"role": "user", "content": "hi"}]
        sentinel = unused(asked)
        try:
            bare, prompt = self.renderer.text(asked, False), self.renderer.text(asked, True)
            history = self.renderer.text([*asked, {"role": "assistant", "content": sentinel}], False)
        except ChatTemplateError:
            return ""
        if not prompt.startswith(bare) or not history.startswith(bare):
            return ""
        return shared_prefix([prompt[len(bare) :], history[len(bare) : history.find(sentinel)]])

    def _in_front_of_call(self, before: str, call: str) -> str:
        """The text in front of an answer that begins with a call, without the call's own first words."""
        at = before.rfind(self._header) if self._header else -1
        # Behind the answer's own opening the first call is the first; without one the text of others stands there too.
        place = (
            self._call_in(before, call, at + len(self._header)) if at >= 0 else self._call_in(before, call, None)
        )
        found = place if place >= 0 else max(at, 0) + len(self._header) * (at >= 0)
        return before[:found] if found else before

    def _in_front_of_calls(self, answer: _Answer, calls: str) -> str:
        """The words of an answer as the template writes them, and :data:`_CALLS` in place of its calls."""
        if not answer.calls:
            return answer.words
        if answer.opens_with == "call":  # what stands in front of it is cut off already
            return _CALLS
        place = self._call_in(answer.front, calls, 0)
        return answer.words + answer.front[: place if place >= 0 else None] + _CALLS

    @staticmethod
    def _call_in(text: str, call: str, start: int | None) -> int:
        """Where the template's text holds the first words of a sampled call, or as many of them as it does; or -1.

        Args:
            text: the template's text.
            call: the text of the call, and what follows it.
            start: where its first place is looked for; ``None`` for its last place.
        """
        for words in dict.fromkeys((call, call.lstrip())):
            for k in range(min(len(words), _LONGEST_OPENING), 2, -1):
                at = text.rfind(words[:k]) if start is None else text.find(words[:k], start)
                if at >= 0:
                    return at
        return -1

    def _places(self, said: str, seen: str) -> tuple[int, int]:
        """Where an answer's content begins in its sampled text, behind its reasoning, and where its first call does."""
        parsed = self.parser.parse(said, self.parser.opened_by(seen[-200:]))
        calls = [call.span[0] for call in parsed.calls if call.status is CallStatus.OK]
        return parsed.start, min(calls, default=len(said))


def _overlap(text: str, said: str) -> int:
    """How many characters the end of ``text`` shares with the start of ``said``."""
    return next((k for k in range(min(len(text), len(said), 200), 0, -1) if text.endswith(said[:k])), 0)


def _unspaced(text: str) -> str:
    return "".join(text.split())
