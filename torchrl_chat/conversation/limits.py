"""The limits of an episode: how much the policy may still sample, and which limit ends it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torchrl_chat.conversation.stop import StopReason
from torchrl_chat.conversation.transcript import Transcript
from torchrl_chat.templates import BridgeError, ChatTemplate
from torchrl_chat.templates.kinds import AnswerKind

NO_LIMIT = 2**31 - 1
_IN_TOKENS = ("max_turn_tokens", "max_tokens", "max_context")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an episode may take; one meaning for batches (:class:`~torchrl_chat.Budget`) and for served episodes.

    Raises:
        ValueError: a limit is not positive.

    Example:
        >>> from torchrl_chat import ChatTemplate, Transcript
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> template = ChatTemplate(tokenizer)
        >>> messages = [{"role": "user", "content": "2 + 2?"}]
        >>> transcript = Transcript.start(template.render(messages), messages)
        >>> Limits(max_turn_tokens=64).tokens_left(transcript, template)
        64
    """

    max_turns: int | None = None
    """Answers of the policy. One that it has to write anew counts again."""
    max_turn_tokens: int | None = None
    """Sampled tokens in one answer, counted afresh where it is written anew."""
    max_tokens: int | None = None
    """Sampled tokens in one episode, over all branches."""
    max_context: int | None = None
    """Tokens of the whole sequence, those that close the last turn included."""
    max_tool_calls: int | None = None
    """Tool calls of the policy, those that cannot be read included; the call beyond the last ends the episode."""
    max_seconds: float | None = None
    """Seconds of wall time since the reset, looked at after each turn."""
    end_on_cut: bool = False
    """Whether an answer that ``max_turn_tokens`` cuts ends the episode."""

    def __post_init__(self) -> None:
        for name in self.names():
            value = getattr(self, name)
            if value is not None and (value < 0 if name == "max_tool_calls" else value <= 0):
                raise ValueError(f"{name} is {value}: expected a positive number, or None.")

    @classmethod
    def names(cls) -> list[str]:
        """The names of all limits."""
        return [field.name for field in fields(cls) if field.name.startswith("max_")]

    @property
    def in_tokens(self) -> list[str]:
        """The names of the limits given that count tokens."""
        return [name for name in _IN_TOKENS if getattr(self, name) is not None]

    def tokens_left(self, transcript: Transcript, template: ChatTemplate | None, sampled: int | None = None) -> int:
        """How many tokens the policy may sample in its next turn; :data:`NO_LIMIT` without a limit.

        Args:
            transcript: the conversation.
            template: its chat template; ``None`` where turns are not closed by one.
            sampled: how many tokens the episode has sampled, where it is more than this conversation.
        """
        left = NO_LIMIT if self.max_turn_tokens is None else self.max_turn_tokens
        if self.max_tokens is not None:
            left = min(left, self.max_tokens - (transcript.total_sampled if sampled is None else sampled))
        if self.max_context is not None:
            left = min(left, self.max_context - len(transcript) - _closing(transcript, template))
        return max(0, left)

    def reason(
        self,
        transcript: Transcript,
        template: ChatTemplate | None,
        *,
        had: int = NO_LIMIT,
        seconds: float = 0.0,
        calls: int = 0,
        sampled: int | None = None,
        turns: int | None = None,
    ) -> StopReason:
        """Which limit ends the episode behind a turn; ``RUNNING`` if none does.

        Args:
            transcript: the conversation behind the turn.
            template: its chat template.
            had: how many tokens the policy might sample in the turn.
            seconds: the wall time since the reset.
            calls: how many tools the policy has called.
            sampled, turns: how many tokens the episode has sampled, in how many answers, where it is more than this conversation.
        """
        total = transcript.total_sampled if sampled is None else sampled
        if had <= 0:
            return StopReason.CONTEXT_FULL
        if self.max_tool_calls is not None and calls > self.max_tool_calls:
            return StopReason.MAX_TOOL_CALLS
        if self.max_tokens is not None and total >= self.max_tokens:
            return StopReason.MAX_TOKENS
        if self.end_on_cut and self._was_cut(transcript):
            return StopReason.MAX_TURN_TOKENS
        if self.tokens_left(transcript, template, total) <= 0 or self._filled(transcript, template):
            return StopReason.CONTEXT_FULL
        if self.max_turns is not None and (transcript.turns if turns is None else turns) >= self.max_turns:
            return StopReason.MAX_TURNS
        if self.max_seconds is not None and seconds >= self.max_seconds:
            return StopReason.MAX_TIME
        return StopReason.RUNNING

    def _was_cut(self, transcript: Transcript) -> bool:
        if self.max_turn_tokens is None:
            return False
        span = transcript.spans[-1]
        # Of an answer that was written anew, the beginning was sampled in an earlier sequence.
        sampled = int(transcript.mask[span.start : span.end].sum())
        return not transcript.ended and sampled == self.max_turn_tokens

    def _filled(self, transcript: Transcript, template: ChatTemplate | None) -> bool:
        """Whether the last answer was cut because the context was full."""
        if self.max_context is None or transcript.ended or not transcript.spans:
            return False
        return transcript.spans[-1].end + _closing(transcript, template) >= self.max_context


def _closing(transcript: Transcript, template: ChatTemplate | None) -> int:
    """How many tokens are added to close a turn that is cut: room for them is kept."""
    if template is None:
        return 0
    closes = [template.close_of(transcript.course.shape, kind) for kind in (AnswerKind(), AnswerKind(1, False))]
    known = [close for close in closes if not isinstance(close, BridgeError)]
    return max((len(s.ids) for close in known for s in (close.cut, *close.stops.values())), default=0)
