"""The environments that ``torchrl-chat serve`` knows by name, and those that a module of the user's makes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchrl_chat import envs, gallery, transforms
from torchrl_chat.conversation import MessageEnv
from torchrl_chat.named import is_name, named
from torchrl_chat.openenv.chat.environment import ChatEnvironment
from torchrl_chat.openenv.chat.pool import EnvPool, TorchRLEnvironment
from torchrl_chat.templates import ChatTemplate

NAMES = (
    "chat",
    *(name for name in gallery.NAMES if name != gallery.ROWS),  # there is nothing here to say what grades them
    "module:function, called with the tokenizer",
)


def factory_of(
    name: str,
    tokenizer: Any,
    *,
    data: str | None = None,
    system_prompt: str | None = None,
    seed: int = 0,
    python_tool: bool = False,
    template: dict[str, Any] | None = None,
    **limits: float | None,
) -> tuple[Callable[[], Any], str]:
    """What makes the environment of a session, and the environment's name.

    Args:
        name: one of :data:`NAMES`; or ``module:Class``, a :class:`~torchrl_chat.MessageEnv`; or ``module:function``, called
            with the tokenizer, which returns a :class:`~torchrl_chat.ChatEnv`, a dataset environment, an
            :class:`EnvPool`, or an object with OpenEnv's ``reset`` and ``step``. ``file.py`` does for a module.
        tokenizer: shared by all sessions.
        data: a local copy of the dataset.
        system_prompt: instead of the environment's own.
        seed: of generated problems.
        python_tool: whether fenced Python code in an answer is run in a sandbox, its output appended.
        template: arguments of :class:`~torchrl_chat.ChatTemplate`.
        **limits: see :class:`~torchrl_chat.conversation.Limits`.

    Raises:
        ValueError: there is no such environment.
    """
    given: dict[str, Any] = {key: value for key, value in limits.items() if value is not None}
    template = template or {}
    if name == "chat" and not python_tool:
        shared = ChatTemplate(tokenizer, **template)
        return functools.partial(ChatEnvironment, shared, system_prompt=system_prompt, **given), "chat_env"
    kind, _, task = name.partition(":")
    if is_name(name) and kind != "reasoning-gym":
        return _of_module(name, tokenizer, template, given), task
    if name != "chat":
        gallery.check_name(name, data)
    shown = {
        "tokenizer": tokenizer,
        "input_mode": "tokens",
        "template_kwargs": template,
        "system_prompt": system_prompt,
    }

    def make(split: str) -> Any:
        env: Any = (
            envs.ChatEnv(batch_size=(1,), **shown)
            if name == "chat"
            else gallery.make_env(name, data=data, split=split, seed=seed, shuffle=False, **shown)
        )
        if python_tool:
            env = env.append_transform(transforms.PythonInterpreter())
        return _limited(env, given)

    splits = gallery.SPLITS.get(name, ("train",))
    return functools.partial(TorchRLEnvironment, EnvPool(make, splits, kind)), kind


def _limited(env: Any, limits: dict[str, Any]) -> Any:
    return env.append_transform(transforms.Budget(**limits)) if limits else env


def _of_module(name: str, tokenizer: Any, template: dict[str, Any], limits: dict[str, Any]) -> Callable[[], Any]:
    make = named(name)
    if isinstance(make, type) and issubclass(make, MessageEnv):
        episode: type[MessageEnv] = make
        options: dict[str, Any] = {"input_mode": "tokens", "template_kwargs": template, "shuffle": False, "seed": 0}

        def conversation(split: str) -> Any:
            return _limited(envs.MessageChatEnv(episode, tokenizer=tokenizer, **options), limits)

        return functools.partial(TorchRLEnvironment, EnvPool(conversation, name=make.__name__))
    first = make(tokenizer)
    if isinstance(first, EnvPool):
        return functools.partial(TorchRLEnvironment, first)
    if hasattr(getattr(first, "base_env", first), "append_messages"):
        pool = EnvPool(lambda split: make(tokenizer), name=name.partition(":")[2])
        return functools.partial(TorchRLEnvironment, pool)
    if not (hasattr(first, "reset") and hasattr(first, "step")):
        raise ValueError(f"{name} returned a {type(first).__name__}: expected an environment or an EnvPool.")
    return functools.partial(make, tokenizer)
