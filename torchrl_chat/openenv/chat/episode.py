"""What a reset or a step made of an episode, as servers and callers read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrl_chat.conversation import Limits, Transcript
from torchrl_chat.messages import Message
from torchrl_chat.openenv.models import ChatObservation
from torchrl_chat.openenv.tokens import TokenRow

EpisodeLimits = Limits
"""The limits of a served episode are those of any other; the name from before they were one."""


class EpisodeEnded(ValueError):
    """A step after the episode's end; the text says why it ended. Reset begins the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
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
