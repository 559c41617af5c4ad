"""The environment that a transform stands in, known by what it can do: transforms are a floor below environments."""

from __future__ import annotations

from typing import Any

from torchrl.envs import Transform


def chat_env(transform: Transform) -> Any:
    """The :class:`~torchrl_chat.ChatEnv` under a transform.

    Raises:
        TypeError: it stands in no environment, or in another one.
    """
    env = getattr(transform.parent, "base_env", None)
    if not hasattr(env, "append_messages"):
        raise TypeError(f"{type(transform).__name__} works in a ChatEnv, not in {type(env).__name__}.")
    return env
