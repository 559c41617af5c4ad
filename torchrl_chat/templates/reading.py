"""Reading: what a policy sampled, as ids, to the message that it is and the way in which the turn ended."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torchrl_chat.messages import Message
from torchrl_chat.templates.bridge import BY_TEXT, BridgeError, Close, Suffix
from torchrl_chat.templates.kinds import AnswerKind, Course, Roles
from torchrl_chat.templates.parsing import AnswerParser, ParsedAnswer, RenderersParser
from torchrl_chat.templates.rendering import Renderer
from torchrl_chat.templates.toolcalls import CallStatus

_QUESTION = Course.of([{"role": "user", "content": "?"}])
_A_CALL = AnswerKind(1, False)
OPENING_IDS = 12
"""How many of a prompt's last ids tell whether it has opened the reasoning: more than any delimiter takes."""


class Parsed(NamedTuple):
    """What a policy sampled, read as a message."""

    message: Message  # the same as a message of the conversation
    answer: ParsedAnswer  # content, reasoning and tool calls, without the tokens that end the turn
    text: str  # all of the sampled text, special tokens spelled out
    ended: bool  # whether the turn ended by itself, rather than by a length limit
    stop: int | None  # the token that ended it, if the template knows it as one
    close: Close | BridgeError  # how the template closes such a turn, or why that is not known
    missing: Suffix = Suffix()  # the end of a call that is complete but for it: the engine took it away

    @property
    def ending(self) -> Suffix | None:
        """What closes the turn behind what was sampled, itself not sampled; ``None`` where that is not known."""
        if isinstance(self.close, BridgeError):
            return None
        suffix = self.close.suffix(self.stop)
        if not self.missing.text:
            return suffix
        return Suffix(self.missing.text + suffix.text, (*self.missing.ids, *suffix.ids))


@dataclass(eq=False)
class Reader:
    """Reads the answers of one chat template."""

    renderer: Renderer
    parser: AnswerParser
    peer: RenderersParser | None  # another parser that is asked first
    close: Callable[[Roles, AnswerKind], Close | BridgeError]  # of turns in such conversations, with such answers

    def __post_init__(self) -> None:
        self.codec = self.renderer.codec
        self.eos = self.renderer.tokenizer.eos_token_id
        self._known: dict[Roles, list[Close]] = {}

    def read(
        self,
        sampled: Sequence[Sequence[int]],
        courses: Sequence[Course] | None,
        finish_reasons: Sequence[str | None] | None,
        prompts: Sequence[Sequence[int]] | None,
    ) -> list[Parsed]:
        """See :meth:`ChatTemplate.parse_batch <torchrl_chat.ChatTemplate.parse_batch>`."""
        courses = [_QUESTION] * len(sampled) if courses is None else courses
        reasons = finish_reasons or [None] * len(sampled)
        texts, opened = self.codec.decode(sampled), self._opened(prompts, len(sampled))
        before: Sequence[Sequence[int] | None] = [None] * len(sampled) if prompts is None else prompts
        return list(map(self._parse, sampled, texts, courses, reasons, opened, before))

    def _parse(
        self,
        ids: Sequence[int],
        text: str,
        course: Course,
        reason: str | None,
        thinking: bool,
        prompt: Sequence[int] | None,
    ) -> Parsed:
        last, content = ids[-1], text
        shape = course.shape
        if shape not in self._known:  # the closes that an answer may have, before it is known what it is
            kinds = (AnswerKind(), _A_CALL) if self.parser.parse_calls else (AnswerKind(),)
            closes = [self.close(shape, kind) for kind in kinds]
            self._known[shape] = [close for close in closes if isinstance(close, Close)]
        known = self._known[shape]
        lead = known[0].lead if known else ""
        stopped = [(close, stop) for close in known if (stop := close.stop(last, text)) is not None]
        ends = last == self.eos or any(close.ends(stop) for close, stop in stopped)
        # Which of the closes applies is known once the answer is parsed; that it ended, and with what, before.
        if stopped and (ends or reason not in (None, "length")):
            rests = [
                close.without_end(text, stop, "" if stop == BY_TEXT else self.codec.token_text(stop))
                for close, stop in stopped
            ]
            content, ends = min(rests, key=len), True
        elif ends:
            content = text.removesuffix(self.codec.token_text(last))
        ended = ends if reason is None else reason != "length"
        answer = self.peer.parse(prompt, ids) if self.peer is not None else None
        missing, ends_call = "", False
        if answer is None:
            answer = self.parser.parse((content if ended else text).removeprefix(lead), thinking)
            if last != self.eos and not any(_ends_turn(close, stop, text) for close, stop in stopped):
                answer, missing, ends_call = self._with_last_call(
                    answer, text.removeprefix(lead), thinking, reason not in (None, "length"), content is not text
                )
        message = answer.message(course.policy, len(course.call_ids))
        own = self.close(shape, AnswerKind.of(message))
        stop = own.stop(last, text) if ended and isinstance(own, Close) and not ends_call else None
        taken = self._taken(missing, own) if missing and isinstance(own, Close) else Suffix()
        return Parsed(message, answer, text, ended, stop, own, taken)

    def _with_last_call(
        self, answer: ParsedAnswer, text: str, thinking: bool, by_itself: bool, stripped: bool
    ) -> tuple[ParsedAnswer, str, bool]:
        """An answer whose end may belong to its last call, or may have been taken away by the engine.

        Returns:
            the answer, the end of the call that was taken away, and whether the turn ends with the call.
        """
        # A token that ends a call is no end of the turn, though a policy may well stop there.
        whole = self.parser.parse(text, thinking) if stripped else answer
        whole, missing = self.parser.completed(text, thinking, whole, by_itself)
        made, before = _made(whole), _made(answer)
        if missing or made > before or (made == before > 0 and len(whole.content) <= len(answer.content)):
            return whole, missing, True
        return answer, "", False

    def _taken(self, missing: str, close: Close) -> Suffix:
        """What the engine took of the end of a call, but for what the template's end of the turn begins with."""
        for stop, heads in close.heads.items():  # a token that ends the turn as well
            if any(heads) and stop != BY_TEXT:
                missing = missing.removesuffix(self.codec.token_text(stop))
        if not missing:
            return Suffix()
        encode = self.codec.encode if self.codec.opens(missing) else self.codec.encode_continuation
        return Suffix(missing, tuple(encode([missing])[0]))

    def _opened(self, prompts: Sequence[Sequence[int]] | None, rows: int) -> list[bool]:
        """For each row, whether the generation prompt has opened the reasoning."""
        if not self.parser.openings:
            return [False] * rows
        if prompts is None:
            return [self._opens_reasoning] * rows
        ends = self.codec.decode([prompt[-OPENING_IDS:] for prompt in prompts])
        return [self.parser.opened_by(end) for end in ends]

    @functools.cached_property
    def _opens_reasoning(self) -> bool:
        """Whether the usual generation prompt opens the reasoning."""
        return self.parser.opened_by(self.renderer.tried([{"role": "user", "content": "hi"}], True))


def _made(answer: ParsedAnswer) -> int:
    """How many calls were made."""
    return sum(call.status is CallStatus.OK for call in answer.calls)


def _ends_turn(close: Close, stop: int, text: str) -> bool:
    """Whether a token that the template writes at the end of a turn ends this one, and not a call in it."""
    heads = tuple(filter(None, close.heads.get(stop, ())))  # empty for a token that closes a call
    return bool(heads) and (stop in close.main or text.endswith(heads))
