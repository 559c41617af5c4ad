"""What a template makes of the past: earlier answers without their reasoning, a system prompt that moved.

Under the history policy ``"template"`` the model is to see what its template writes for the whole
conversation. Where that differs from what it saw so far, the tokens of the past are put together anew: the
template's text in between, and of each earlier answer the ids that were sampled, minus what the template
leaves out. How the template writes an answer is seen with sentinels in its reasoning, its content and its
last tool call.

Law of this file: a sampled id that stays is the id that was sampled; nothing sampled is tokenized again.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torchrl_chat.messages import Message
from torchrl_chat.templates.bridge import BY_TEXT, BridgeError, Close, Derivation, call_with, shared_prefix, unused
from torchrl_chat.templates.codec import unmarked
from torchrl_chat.templates.parsing import AnswerParser
from torchrl_chat.templates.proof import unescaped
from torchrl_chat.templates.rendering import ChatTemplateError

_REASONING = ("reasoning_content", "reasoning", "thinking")
_Edit = Callable[[str], str]
_EDITS: tuple[_Edit, ...] = (lambda text: text, str.strip, str.lstrip, str.rstrip)


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
    keeps_reasoning: bool
    opens_with: str  # what comes first: its reasoning, its content or a call
    keeps_stop: bool  # whether the token that ended it still ends it
    edit: _Edit  # what becomes of the content


class Rewriter:
    """Puts sequences together anew, as one template writes the past.

    Args:
        derivation: the template.
        parser: reads its answers.
        close: how a turn is closed, given the conversation up to its answer.
    """

    def __init__(
        self,
        derivation: Derivation,
        parser: AnswerParser,
        close: Callable[[Sequence[Message]], Close],
    ):
        self.derivation = derivation
        self.codec = derivation.codec
        self.renderer = derivation.renderer
        self.parser = parser
        self.close = close

    def rewrite(
        self,
        ids: Sequence[int],
        spans: Sequence[Span],
        messages: Sequence[Message],
        new: Sequence[Message],
        agp: bool,
    ) -> Rewritten | None:
        """The past as the template writes it once ``new`` follows; ``None`` if it stays as it is.

        Args:
            ids: the sequence so far.
            spans: the sampled answers in it, in order.
            messages: the conversation, the last of them sampled.
            new: the messages that follow.
            agp: whether a generation prompt follows them.

        Raises:
            BridgeError: the template changes the words of an earlier answer.
        """
        written, real = self._written(spans, messages, new, agp)
        out: list[int] = []
        moved: list[Span] = []
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
            begin = 0 if answer.keeps_reasoning else self._content_at(said, seen)
            if answer.opens_with == "call":
                answer = answer._replace(before=self._in_front_of_call(answer.before, said[begin:]))
                between = self._between(answer.before, stop, not moved)
                before = self.codec.decode([between])[0]
            if before == seen + said[:begin]:  # what looks dropped was empty, and stands there as it was sampled
                answer = answer._replace(keeps_reasoning=True)
                before = seen
            lost, pieces = self._pieces(core, said, begin, message, answer)
            lost = lost or (span.lost if pieces == core else "")
            # The template's text may end with what the policy itself wrote first, "<think>" for one.
            if lost:
                between = self._between(answer.before + lost, stop, not moved)
            elif answer.keeps_reasoning and before.startswith(seen) and said.startswith(before[len(seen) :]):
                between = unsampled
            elif answer.keeps_reasoning and (shared := _overlap(unmarked(answer.before), said)):
                between = self._between(answer.before[:-shared], stop, not moved)
            pieces = pieces + end * answer.keeps_stop
            start = len(out) + len(between)
            out += [*between, *pieces]
            stop = span.stop if answer.keeps_stop else None
            moved.append(Span(span.message, start, len(out), stop, lost))
            position = span.end
        if out == list(ids[:position]):
            return None
        # Blanks aside it must be the template's own text, or the pieces were put together wrongly.
        got, wanted = (_unspaced(unescaped(text)) for text in (self.codec.decode([out])[0], real))
        agree = len(shared_prefix([got, wanted]))
        if len(got) - agree > len(_unspaced(self.codec.token_text(out[-1]))):
            raise BridgeError(
                f"the past cannot be put together as the chat template writes it: {got[agree - 30 : agree + 30]!r} stands "
                f"where it writes {wanted[agree - 30 : agree + 30]!r}."
            )
        return Rewritten(out, tuple(moved))

    # ------------------------------------------------------------------ what the template writes
    def _written(
        self, spans: Sequence[Span], messages: Sequence[Message], new: Sequence[Message], agp: bool
    ) -> tuple[list[_Answer], str]:
        """How the template writes each sampled answer, and its text of the whole conversation."""
        guarded, _ = self.renderer.guard([*messages, *new])
        probe = [dict(message) for message in guarded]
        fields: dict[str, tuple[int, str, str]] = {}  # sentinel -> answer, what it is, what was said
        stem = unused(guarded)
        for i, span in enumerate(spans):
            message = probe[span.message]
            for key in _REASONING:
                if message.get(key):
                    fields[f"{stem}r{i}R"] = (i, "reasoning", message[key])
                    message[key] = f"{stem}r{i}R"
            if message.get("content") or not message.get("tool_calls"):
                # A call without a text stays without one: templates write the two differently.
                fields[f"{stem}c{i}C"] = (i, "content", message.get("content") or "")
                message["content"] = f"{stem}c{i}C"
            if message.get("tool_calls"):
                fields[f"{stem}t{i}T"] = (i, "call", "")
                message["tool_calls"] = [
                    *message["tool_calls"][:-1],
                    call_with(message["tool_calls"][-1], f"{stem}t{i}T"),
                ]
        try:
            text, real = self.renderer.text(probe, agp), self.renderer.text(guarded, agp)
        except ChatTemplateError as error:
            raise BridgeError(str(error)) from error
        found = [(m.start(), m.end(), fields[m.group()]) for m in re.finditer("|".join(fields), text)]
        edits = self._edits(text, real, found)
        answers, start = [], 0
        for i, span in enumerate(spans):
            mine = [(at, end, kind) for at, end, (owner, kind, _) in found if owner == i]
            kinds = [kind for _, _, kind in mine]
            if "content" not in kinds and "call" not in kinds:
                raise BridgeError(
                    f"the chat template drops an earlier answer: {messages[span.message]['content']!r:.80}."
                )
            thought = any(messages[span.message].get(key) is not None for key in _REASONING)
            before, start = text[start : mine[0][0]], mine[-1][1]
            length, keeps_stop = self._close_length(text[start:], span, messages)
            answers.append(_Answer(before, not thought or "reasoning" in kinds, kinds[0], keeps_stop, edits[i]))
            start += length
        return answers, unmarked(real)

    @staticmethod
    def _edits(text: str, real: str, found: Sequence[tuple[int, int, tuple[int, str, str]]]) -> dict[int, _Edit]:
        """What becomes of each answer's content, by walking the sentinels' text along the real one."""
        edits: dict[int, _Edit] = {}
        pos = found[0][0] if found else 0
        for k, (_, end, (owner, kind, said)) in enumerate(found):
            literal = text[end : found[k + 1][0] if k + 1 < len(found) else len(text)]
            edit = next((e for e in _EDITS if real.startswith(e(said) + literal, pos)), None)
            if edit is None and (kind == "call" or not said):
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
        return {owner: edits.get(owner, _EDITS[0]) for _, _, (owner, _, _) in found}

    def _close_length(self, text: str, span: Span, messages: Sequence[Message]) -> tuple[int, bool]:
        """How much of the text behind an answer its own stop token covers, and whether that token stays."""
        if span.stop is None:
            return 0, True
        close = self.close(messages[: span.message + 1])
        stop = close.body if span.stop == BY_TEXT else self.codec.control_texts[span.stop]
        calls = messages[span.message].get("tool_calls")  # behind a call stand its own closing words first
        for head in close.heads.get(span.stop, ()):
            at = text.find(head) if calls else 0
            if at >= 0 and text.startswith(head, at) and head.endswith(stop):
                return at + len(head), True
        return 0, False

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
        ends = [0, *(len(text) for text in self.codec.decode([sampled[:k] for k in range(1, len(sampled) + 1)]))]
        first = bisect.bisect_left(ends, begin)
        last = max(bisect.bisect_right(ends, end) - 1, first)
        lost = said[begin : ends[first]] if first < len(ends) else ""
        return lost, [*sampled[first:last], *(sampled[bisect.bisect_left(ends, rest) :] if rest > end else [])]

    def _between(self, text: str, stop: int | None, first: bool) -> list[int]:
        marked = unmarked(text) != text
        if first:
            return (self.codec.encode_guarded if marked else self.codec.encode)([text])[0]
        return self.derivation.ids(stop, text, marked)

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
        start = at + len(self._header) if at >= 0 else 0
        places = (before.rfind(call[:k], start) for k in range(min(len(call), 32), 2, -1))
        found = next((place for place in places if place >= 0), start)
        return before[:found] if found else before

    def _content_at(self, said: str, seen: str) -> int:
        """Where an answer's content begins in its sampled text, behind its reasoning."""
        return self.parser.parse(said, self.parser.opened_by(seen[-200:])).start


def _overlap(text: str, said: str) -> int:
    """How many characters the end of ``text`` shares with the start of ``said``."""
    return next((k for k in range(min(len(text), len(said), 200), 0, -1) if text.endswith(said[:k])), 0)


def _unspaced(text: str) -> str:
    return "".join(text.split())
