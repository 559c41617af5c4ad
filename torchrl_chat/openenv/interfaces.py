"""OpenEnv's interfaces under their own names: tokenizers, transforms, environments, and who provides tasks.

They are duck-typed on both sides: an environment written against OpenEnv can be served here, and one written
against these classes has every method that OpenEnv's server calls.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from torchrl_chat.openenv.models import Action, EnvironmentMetadata, Message, Observation, State

ActT = TypeVar("ActT", bound=Action)
ObsT = TypeVar("ObsT", bound=Observation)
StateT = TypeVar("StateT", bound=State)


class ModelTokenizer(Protocol):
    """A tokenizer with a chat template. Those of transformers are; so is anything with these two methods."""

    def apply_chat_template(
        self, conversation: list[Message], tokenize: bool = True, return_tensors: str | None = None, **kwargs: Any
    ) -> Any:
        """The conversation as text, or as token ids."""
        ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """The text of token ids."""
        ...


class Transform(ABC, Generic[ObsT]):
    """Changes an observation on its way out: a reward, a metric. Any callable of one argument does as well."""

    @abstractmethod
    def __call__(self, observation: ObsT) -> ObsT:
        """The observation, changed or another one."""


Rubric = Callable[[Any, Any], float | Awaitable[float]]
"""``(action, observation) -> reward``, sync or async; OpenEnv's rubrics are such callables, with a ``reset``."""


@runtime_checkable
class TaskProvider(Protocol):
    """An environment over a dataset: what OpenEnv's Task API asks for. ``reset(split=, index=)`` selects a task."""

    def list_splits(self) -> list[Any]:
        """The splits, by name."""
        ...

    def list_tasks(self, split: str) -> list[Any]:
        """The tasks of a split; of a long one, the first of them."""
        ...

    def num_tasks(self, split: str) -> int:
        """How many tasks a split has."""
        ...

    def get_task(self, split: str, index: int) -> Any:
        """One task. Raises ``IndexError`` where there is none of that index."""
        ...

    def get_task_range(self, split: str, start: int | None = None, stop: int | None = None) -> list[Any]:
        """The tasks from ``start`` up to ``stop``."""
        ...


class Environment(ABC, Generic[ActT, ObsT, StateT]):
    """One episode at a time: ``reset``, ``step``, ``state``, ``close``.

    Args:
        transform: changes every observation.
        rubric: computes the reward of a step.

    Attributes:
        SUPPORTS_CONCURRENT_SESSIONS: whether a server may have several of them in one process.
    """

    SUPPORTS_CONCURRENT_SESSIONS: bool = False

    def __init__(self, transform: Callable[[Any], Any] | None = None, rubric: Rubric | None = None):
        self.transform = transform
        self.rubric = rubric

    @abstractmethod
    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> ObsT:
        """Begin an episode."""

    @abstractmethod
    def step(self, action: ActT, timeout_s: float | None = None, **kwargs: Any) -> ObsT:
        """Take one step."""

    async def reset_async(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> ObsT:
        """:meth:`reset`, for a running event loop."""
        return self.reset(seed=seed, episode_id=episode_id, **kwargs)

    async def step_async(self, action: ActT, timeout_s: float | None = None, **kwargs: Any) -> ObsT:
        """:meth:`step`, for a running event loop."""
        return self.step(action, timeout_s=timeout_s, **kwargs)

    @property
    @abstractmethod
    def state(self) -> StateT:
        """What the environment knows of its episode; a copy."""

    def get_metadata(self) -> EnvironmentMetadata:
        """Name, description and version."""
        name = type(self).__name__
        return EnvironmentMetadata(name=name, description=f"{name} environment", version="1.0.0")

    def close(self) -> None:
        """Give back what the environment holds."""

    # ------------------------------------------------------------------ hooks of subclasses
    def _apply_transform(self, observation: ObsT) -> ObsT:
        return observation if self.transform is None else self.transform(observation)

    def _apply_rubric(self, action: ActT, observation: ObsT) -> Any:
        """The rubric's reward (0.0 without one); a coroutine where the rubric is one."""
        return 0.0 if self.rubric is None else self.rubric(action, observation)

    async def _apply_rubric_async(self, action: ActT, observation: ObsT) -> Any:
        reward = self._apply_rubric(action, observation)
        return await reward if inspect.isawaitable(reward) else reward

    def _reset_rubric(self) -> None:
        reset = getattr(self.rubric, "reset", None)
        if callable(reset):
            reset()

    async def _reset_rubric_async(self) -> None:
        reset = getattr(self.rubric, "reset_async", None)
        if not callable(reset):
            return self._reset_rubric()
        result = reset()
        if inspect.isawaitable(result):
            await result
