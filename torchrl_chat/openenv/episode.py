"""What an episode may take, why it ended, and one turn of it as servers and callers read it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrl_chat.messages import Message
from torchrl_chat.openenv.models import ChatObservation
from torchrl_chat.openenv.tokens import TokenRow
from torchrl_chat.transcript import Transcript
from torchrl_chat.transforms.stop import StopReason


class EpisodeEnded(ValueError):
    """A step after the episode's end; the text says why it ended. Reset begins the next one."""


@dataclass(frozen=True, kw_only=True)
class EpisodeLimits:
    """The limits of an episode; the same as :class:`~torchrl_chat.Budget` has them for batches.

    Attributes:
        max_turns: answers of the policy.
        max_turn_tokens: sampled tokens in one answer; a longer one is cut there and counts as cut.
        max_tokens: sampled tokens of the episode; the answer that would exceed it is cut there.
        max_context: tokens of the whole sequence. What closes a turn may stand beyond it.
        max_seconds: seconds since the reset, looked at after each turn.
    """

    max_turns: int | None = None
    max_turn_tokens: int | None = None
    max_tokens: int | None = None
    max_context: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: expected a positive number, or None.")

    @property
    def in_tokens(self) -> bool:
        """Whether there is a limit on tokens."""
        return not (self.max_turn_tokens is self.max_tokens is self.max_context is None)

    def tokens_left(self, transcript: Transcript, sampled: int) -> int | None:
        """How many tokens the policy may sample now; ``None`` without a limit."""
        left = [
            limit - used
            for limit, used in (
                (self.max_turn_tokens, 0),
                (self.max_tokens, sampled),
                (self.max_context, len(transcript)),
            )
            if limit is not None
        ]
        return max(0, min(left)) if left else None

    def reason(self, transcript: Transcript, turns: int, sampled: int, started: float) -> StopReason:
        """Which limit ends the episode now."""
        if self.max_tokens is not None and sampled >= self.max_tokens:
            return StopReason.MAX_TOKENS
        if self.max_context is not None and len(transcript) >= self.max_context:
            return StopReason.CONTEXT_FULL
        if self.max_turns is not None and turns >= self.max_turns:
            return StopReason.MAX_TURNS
        if self.max_seconds is not None and time.monotonic() - started >= self.max_seconds:
            return StopReason.MAX_TIME
        return StopReason.RUNNING


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The conversation after a reset or a step, and how much of it is new.

    Attributes:
        messages: the whole conversation.
        transcript: its ledger.
        kept: how many messages and tokens are those of the turn before.
        reward: the reward; ``None`` after a reset.
        done: whether the episode has ended.
        metadata: stop reason, tokens left, parts of the reward.
        observation: what a transform made of it, where there is one.
    """

    messages: Sequence[Message]
    transcript: Transcript
    kept: tuple[int, int]
    reward: float | None = None
    done: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    observation: ChatObservation | None = None

    def tokens_from(self, start: int) -> list[int]:
        """The token ids from a position on."""
        return self.transcript.tokens[start:].tolist()

    def as_observation(self) -> ChatObservation:
        """The same as OpenEnv's observation: all messages, all tokens."""
        if self.observation is not None:
            return self.observation
        # The ledger is valid; checking each message and token again would cost more than the turn.
        return ChatObservation.model_construct(
            messages=[dict(message) for message in self.messages],
            tokens=TokenRow(self.tokens_from(0)),
            reward=self.reward,
            done=self.done,
            metadata=dict(self.metadata),
            delta=None,
        )
