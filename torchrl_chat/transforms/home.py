"""The environment that a transform stands in, known by what it can do: transforms are a floor below environments."""

from __future__ import annotations

from typing import Any, TypeVar

from torchrl.envs import Compose, Transform

_T = TypeVar("_T", bound=Transform)


def chat_env(transform: Transform) -> Any:
    """The :class:`~torchrl_chat.ChatEnv` under a transform.

    Raises:
        TypeError: it stands in no environment, or in another one.
    """
    env = getattr(transform.parent, "base_env", None)
    if not hasattr(env, "append_messages"):
        raise TypeError(f"{type(transform).__name__} works in a ChatEnv, not in {type(env).__name__}.")
    return env


def alike(transform: _T, kind: type[_T]) -> list[_T]:
    """The transforms of a class in the environment that a transform stands in, itself among them, in their order."""
    found: list[_T] = []

    def look(other: Any) -> None:
        if isinstance(other, Compose):
            for part in other.transforms:
                look(part)
        elif isinstance(other, kind):
            found.append(other)

    look(getattr(transform.container, "transform", transform))
    return found
