"""An episode that is a conversation: what a reset or a step made of it, as servers and callers read it."""

from __future__ import annotations

import copy
import uuid
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrl_chat.conversation import Limits, Transcript
from torchrl_chat.messages import Message
from torchrl_chat.openenv.chat.ledger import Ledger
from torchrl_chat.openenv.interfaces import Environment, Rubric
from torchrl_chat.openenv.models import ChatAction, ChatObservation, ChatState
from torchrl_chat.openenv.tokens import TokenRow

EpisodeLimits = Limits
"""The limits of a served episode are those of any other; the name from before they were one."""


class EpisodeEnded(ValueError):
    """A step after the episode's end; the text says why it ended. Reset begins the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """The conversation after a reset or a step, and how much of it is new.

    Attributes:
        ledger: the whole conversation, and how many of its messages and tokens are those of the turn before.
        reward: the reward; ``None`` after a reset.
        done: whether the episode has ended.
        metadata: stop reason, tokens left, parts of the reward.
        observation: what a transform made of it, where there is one.
    """

    ledger: Ledger
    reward: float | None = None
    done: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    observation: ChatObservation | None = None

    @property
    def messages(self) -> Sequence[Message]:
        """The whole conversation."""
        return self.ledger.transcript.messages

    def as_observation(self) -> ChatObservation:
        """The same as OpenEnv's observation: all messages, all tokens."""
        if self.observation is not None:
            return self.observation
        # The ledger is valid; checking each message and token again would cost more than the turn.
        return ChatObservation.model_construct(
            messages=[dict(message) for message in self.messages],
            tokens=TokenRow(self.ledger.transcript.token_array.tolist()),
            reward=self.reward,
            done=self.done,
            metadata=dict(self.metadata),
            delta=None,
        )


class Conversation(Environment[ChatAction, ChatObservation, ChatState]):
    """An environment whose episode is a conversation; a subclass says what its turns are."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, transform: Callable[[Any], Any] | None = None, rubric: Rubric | None = None):
        super().__init__(transform=transform, rubric=rubric)
        self._ledger: Ledger | None = None
        self._episode_id: str | None = None
        self._step_count = 0
        self._stop: str | None = None  # why the episode has ended

    @abstractmethod
    def reset_turn(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> StepOutcome:
        """Begin an episode, as servers do: of the result nothing is copied."""

    @abstractmethod
    def step_turn(self, action: ChatAction, timeout_s: float | None = None) -> StepOutcome:
        """Take one turn, as servers do: of the result nothing is copied."""

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> ChatObservation:
        """Begin an episode; see :meth:`reset_turn`."""
        return self.reset_turn(seed=seed, episode_id=episode_id, **kwargs).as_observation()

    def step(self, action: ChatAction, timeout_s: float | None = None, **kwargs: Any) -> ChatObservation:
        """Take one turn; see :meth:`step_turn`."""
        return self.step_turn(action, timeout_s).as_observation()

    @property
    def transcript(self) -> Transcript | None:
        """The ledger of the conversation; ``None`` before the first reset."""
        return None if self._ledger is None else self._ledger.transcript

    @property
    def state(self) -> ChatState:
        """The history so far; a copy."""
        state = ChatState(episode_id=self._episode_id, step_count=self._step_count)
        ledger = self._current
        if ledger is not None:
            state.history_messages = copy.deepcopy(list(ledger.transcript.messages))
            state.history_tokens = ledger.segments()
        return state

    # ------------------------------------------------------------------ for subclasses
    @property
    def _current(self) -> Ledger | None:
        return self._ledger

    def _begun(self, ledger: Ledger, episode_id: str | None, metadata: dict[str, Any]) -> StepOutcome:
        self._ledger, self._step_count, self._stop = ledger, 0, None
        self._episode_id = uuid.uuid4().hex if episode_id is None else episode_id
        return StepOutcome(ledger=ledger, metadata=metadata)

    def _stepped(self, outcome: StepOutcome) -> StepOutcome:
        self._ledger = outcome.ledger
        self._step_count += 1
        if outcome.done:
            self._stop = str(outcome.metadata.get("stop_reason", "truncated"))
        return outcome

    def _check_running(self) -> None:
        if self._stop is not None:
            raise EpisodeEnded(f"the episode has ended ({self._stop}): reset begins the next one.")
