"""``ChatEnvironment``: OpenEnv's chat environment, in this process or behind a server, over a token-exact ledger."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from torchrl_chat._loop import LoopThread
from torchrl_chat.conversation import Limits, StopReason, Turn
from torchrl_chat.messages import Message, MessageError, as_messages, check_message
from torchrl_chat.openenv.chat.episode import Conversation, EpisodeEnded, StepOutcome
from torchrl_chat.openenv.chat.ledger import Ledger, Writer, writer_of
from torchrl_chat.openenv.interfaces import Rubric
from torchrl_chat.openenv.models import ChatAction, ChatObservation, EnvironmentMetadata, ResetRequest
from torchrl_chat.openenv.tokens import behind_prompt

_LIGHT_TOKENS = 2048
_INITIAL = {"messages", "query"}


class ChatEnvironment(Conversation):
    """A conversation as an OpenEnv environment: ``reset``, ``step``, ``state``.

    An action is what the policy sampled (``tokens``), or its answer as ``text``, or ``messages`` of others. The observation
    is the whole conversation, as messages and as token ids. The ids are the prompt for the policy's next turn: everything
    it sampled stands there id for id, and between the answers what the tokenizer's own chat template writes. After a
    message of a user or a tool they end with what opens the policy's turn.

    A step either happens as a whole or not at all: a bad id, a message that the template refuses, a rubric that raises
    leave the episode as it was.

    Args:
        tokenizer: a tokenizer or processor of transformers, or a :class:`~torchrl_chat.ChatTemplate`, which many
            environments may share. An object that has only ``apply_chat_template`` and ``decode`` does as well; then
            every message is rendered alone, as OpenEnv does it.
        system_prompt: the first message of every episode.
        system_role: its role.
        transform: a callable that changes every observation.
        rubric: ``(action, observation) -> float``, sync or async: the reward of a step. OpenEnv's rubrics work as they are.
            It is called with the observation after the step, its ``done`` already set.
        max_turns, max_turn_tokens, max_tokens, max_context, max_seconds: see :class:`~torchrl_chat.conversation.Limits`.
        recognise_messages: whether tokens that are the whole rendering of one message become that message, of its own
            role, where it is not the policy's turn. OpenEnv's client sends messages so.
        strip_prompt: whether tokens that begin with the whole prompt are taken for the prompt and the answer behind it, as
            ``generate`` of transformers returns them.
        **template: arguments of :class:`~torchrl_chat.ChatTemplate`, such as ``chat_template`` or ``tools``.

    Raises:
        ChatTemplateError: the tokenizer has no chat template.

    Example:
        >>> from torchrl_chat.openenv import ChatAction
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> env = ChatEnvironment(tokenizer, system_prompt="Be brief.", max_turns=1)
        >>> env.reset(seed=0).messages
        [{'role': 'system', 'content': 'Be brief.'}]
        >>> observation = env.step(env.message_to_action({"role": "user", "content": "2 + 2?"}))
        >>> observation = env.step(ChatAction(text="4"))
        >>> observation.done, observation.metadata["stop_reason"]
        (True, 'max_turns')
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str | None = None,
        system_role: str = "system",
        transform: Callable[[Any], Any] | None = None,
        rubric: Rubric | None = None,
        *,
        max_turns: int | None = None,
        max_turn_tokens: int | None = None,
        max_tokens: int | None = None,
        max_context: int | None = None,
        max_seconds: float | None = None,
        recognise_messages: bool = True,
        strip_prompt: bool = True,
        **template: Any,
    ):
        super().__init__(transform=transform, rubric=rubric)
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.system_role = system_role
        self.limits = Limits(
            max_turns=max_turns,
            max_turn_tokens=max_turn_tokens,
            max_tokens=max_tokens,
            max_context=max_context,
            max_seconds=max_seconds,
        )
        self.recognise_messages = recognise_messages
        self.strip_prompt = strip_prompt
        self._writer: Writer = writer_of(tokenizer, **template)
        self._started = time.monotonic()
        self._loop: LoopThread | None = None

    # ------------------------------------------------------------------ OpenEnv's methods
    def reset_turn(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> StepOutcome:
        """Begin an episode.

        Args:
            seed: nothing here is random; it is checked only.
            episode_id: its identifier, at most 255 characters; a new one if ``None``.
            **kwargs: ``messages`` (or ``query``): what the conversation begins with, behind the system prompt. Others
                are not used, and are named under ``"ignored"`` in the metadata.

        Raises:
            ValueError: a bad seed, episode id or message.
        """
        prepared = self._prepare(seed, episode_id, kwargs)
        self._reset_rubric()
        return self._begin(*prepared)

    def step_turn(self, action: ChatAction, timeout_s: float | None = None) -> StepOutcome:
        """Append one turn.

        Args:
            action: see :class:`ChatAction`.
            timeout_s: seconds that an async rubric may take.

        Raises:
            EpisodeEnded: the episode has ended.
            ResponseError: an id that the tokenizer does not have.
            BridgeError: the chat template refuses the message here, or its continuation cannot be proved exact.
            TimeoutError: the rubric took too long.
        """
        outcome, observation = self._propose(action)
        if observation is not None and self.rubric is not None:
            reward = self._apply_rubric(action, observation)
            if inspect.isawaitable(reward):
                if self._loop is None:
                    self._loop = LoopThread("torchrl_chat.rubric")
                reward = self._loop.run(_awaited(reward, timeout_s))
            observation.reward = _reward(reward)
        return self._commit(outcome, observation)

    async def reset_async(
        self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any
    ) -> ChatObservation:
        """:meth:`reset`, for a running event loop."""
        prepared = self._prepare(seed, episode_id, kwargs)
        await self._reset_rubric_async()
        return self._begin(*prepared).as_observation()

    async def step_async(
        self, action: ChatAction, timeout_s: float | None = None, **kwargs: Any
    ) -> ChatObservation:
        """:meth:`step`, for a running event loop; an async rubric is awaited in it."""
        outcome, observation = self._propose(action)
        if observation is not None and self.rubric is not None:
            async with asyncio.timeout(timeout_s):
                observation.reward = _reward(await self._apply_rubric_async(action, observation))
        return self._commit(outcome, observation).as_observation()

    def message_to_action(self, message: Message) -> ChatAction:
        """The action that appends a message: its tokens as they would stand behind the present conversation.

        Raises:
            ValueError: the message has no role or content, or the template refuses it here.
        """
        if not isinstance(message, Mapping) or message.get("content") is None:
            raise MessageError("the message has no 'content': expected {'role': ..., 'content': ...}.")
        checked = check_message(message)
        ledger = self._written(self._current, [checked], None)
        return ChatAction(tokens=ledger.transcript.token_array[ledger.kept[1] :].tolist(), messages=[checked])

    def get_metadata(self) -> EnvironmentMetadata:
        """Name, description and version."""
        return EnvironmentMetadata(
            name="chat_env",
            description="A conversation, token-exact over turns, whatever the chat template.",
            version="1.0.0",
        )

    def prepare(self) -> None:
        """Try a question. What is wrong with the chat template raises here."""
        self._writer.add(self._prepare(None, None, {})[0], [{"role": "user", "content": "?"}])

    def close(self) -> None:
        """End the thread in which async rubrics run."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def is_light(self, action: ChatAction) -> bool:
        """Whether a step takes so little that a server may run it in its event loop."""
        return (
            self.rubric is None
            and self.transform is None
            and action.messages is None
            and len(action.tokens or action.text or ()) <= _LIGHT_TOKENS
            and self._writer.is_quick(self._current)
        )

    # ------------------------------------------------------------------ one reset
    @property
    def _current(self) -> Ledger:
        if self._ledger is None:
            self._begin(*self._prepare(None, None, {}))
        assert self._ledger is not None
        return self._ledger

    def _prepare(
        self, seed: int | None, episode_id: str | None, kwargs: dict[str, Any]
    ) -> tuple[Ledger, str | None, dict[str, Any]]:
        request = ResetRequest(seed=seed, episode_id=episode_id)
        messages: list[Message] = []
        if self.system_prompt is not None:
            messages.append({"role": self.system_role, "content": self.system_prompt})
        for key in ("messages", "query"):
            if kwargs.get(key) is not None:
                messages += as_messages(kwargs[key], where=key)
        metadata: dict[str, Any] = {}
        if ignored := sorted(kwargs.keys() - _INITIAL):
            metadata["ignored"] = ignored
        return self._writer.start(messages), request.episode_id, metadata

    def _begin(self, ledger: Ledger, episode_id: str | None, metadata: dict[str, Any]) -> StepOutcome:
        self._started = time.monotonic()
        outcome = self._begun(ledger, episode_id, metadata | self._left(ledger))
        return outcome if self.transform is None else self._transformed(outcome, outcome.as_observation())

    # ------------------------------------------------------------------ one step
    def _propose(self, action: ChatAction) -> tuple[StepOutcome, ChatObservation | None]:
        """What a step would make of the episode, none of which has happened yet; as an observation where anybody looks at it."""
        self._check_running()
        ledger = self._current
        messages = action.messages
        if messages is None and action.tokens is not None and self.recognise_messages and not ledger.awaits_policy:
            message = self._writer.recognise(action.tokens)
            messages = None if message is None else [message]
        after = self._written(ledger, messages, action)
        transcript, seconds = after.transcript, time.monotonic() - self._started
        stop = self.limits.reason(transcript, self._writer.template, seconds=seconds)
        metadata = self._left(after)
        if stop is not StopReason.RUNNING:
            metadata["stop_reason"] = stop.word
        if transcript.turns > ledger.transcript.turns and transcript.spans:
            span = transcript.spans[-1]
            metadata["sampled"] = [span.start, span.end]
        outcome = StepOutcome(ledger=after, reward=0.0, done=stop is not StopReason.RUNNING, metadata=metadata)
        return outcome, None if self.rubric is self.transform is None else outcome.as_observation()

    def _written(self, ledger: Ledger, messages: Sequence[Message] | None, action: ChatAction | None) -> Ledger:
        """The ledger after an action."""
        if messages is None:
            assert action is not None
            if action.tokens is None:
                return self._answered(ledger, Turn(text=action.text, finish_reason=action.finish_reason or "stop"))
            strip = self.strip_prompt
            ids = behind_prompt(action.tokens, ledger.transcript.tokens) if strip else action.tokens
            return self._answered(ledger, Turn.of(ids, action.finish_reason))
        before, kept = len(ledger.ends), len(ledger.transcript)
        for message in messages:
            if message["role"] != "assistant":
                ledger = self._writer.add(ledger, [message])
            else:
                if message.keys() != {"role", "content"} or not isinstance(message["content"], str):
                    raise MessageError(
                        "an assistant message is given by its 'content' alone, a string, or as tokens."
                    )
                ledger = self._answered(ledger, Turn(text=message["content"], finish_reason="stop"))
            kept = min(kept, ledger.kept[1])
        return replace(ledger, kept=(before, kept))

    def _answered(self, ledger: Ledger, turn: Turn) -> Ledger:
        """The ledger with an answer, without what is beyond the limits, as if the policy had been stopped there."""
        if self.limits.in_tokens:
            turn.limit = self.limits.tokens_left(ledger.transcript, self._writer.template)
            if turn.limit == 0:
                raise EpisodeEnded("no tokens are left in this episode: reset begins the next one.")
        return self._writer.answer(ledger, turn)

    def _left(self, ledger: Ledger) -> dict[str, Any]:
        if not self.limits.in_tokens:
            return {}
        return {"tokens_left": self.limits.tokens_left(ledger.transcript, self._writer.template)}

    def _transformed(self, outcome: StepOutcome, observation: ChatObservation) -> StepOutcome:
        """The outcome with what the transform makes of its observation."""
        changed = self._apply_transform(observation)
        if not isinstance(changed, ChatObservation):
            try:
                fields = {n: getattr(changed, n) for n in ChatObservation.model_fields if hasattr(changed, n)}
                changed = ChatObservation.model_validate(fields)
            except (ValidationError, TypeError) as error:
                raise ValueError(f"the transform returned no observation: {error}") from error
        return replace(
            outcome,
            observation=changed,
            reward=None if changed.reward is None else float(changed.reward),
            done=changed.done,
            metadata=changed.metadata,
        )

    def _commit(self, outcome: StepOutcome, observation: ChatObservation | None) -> StepOutcome:
        """Let the step happen; everything that may fail has gone well, but for the transform, which is called first."""
        if observation is not None:
            if self.transform is not None:
                outcome = self._transformed(outcome, observation)
            else:
                outcome = replace(outcome, reward=observation.reward)
        return self._stepped(outcome)


def _reward(value: Any) -> float:
    """A rubric's value as a reward.

    Raises:
        ValueError: it is no finite number.
    """
    with contextlib.suppress(TypeError, ValueError):
        reward = float(value)
        if math.isfinite(reward):
            return reward
    raise ValueError(f"the rubric returned {value!r:.60}: expected a finite number.")


async def _awaited(value: Any, timeout_s: float | None) -> Any:
    async with asyncio.timeout(timeout_s):
        return await value
