"""The environments that ``torchrl-chat serve`` knows by name, and those that a module of the user's makes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchrl_chat.conversation import MessageEnv
from torchrl_chat.named import named
from torchrl_chat.openenv.chat.environment import ChatEnvironment
from torchrl_chat.openenv.chat.pool import EnvPool, TorchRLEnvironment

NAMES = ("chat", "countdown", "digits", "gsm8k", "ifeval", "math", "reasoning-gym:TASK")


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
        from torchrl_chat.templates import ChatTemplate

        shared = ChatTemplate(tokenizer, **template)
        return functools.partial(ChatEnvironment, shared, system_prompt=system_prompt, **given), "chat_env"
    kind, _, task = name.partition(":")
    if task and kind != "reasoning-gym":
        return _of_module(name, tokenizer, template, given), task
    make, splits = _makers(kind, task, tokenizer, data, system_prompt, seed, template)

    def equipped(split: str) -> Any:
        env = make(split)
        if python_tool:
            from torchrl_chat.transforms import PythonInterpreter

            env = env.append_transform(PythonInterpreter())
        return _limited(env, given)

    return functools.partial(TorchRLEnvironment, EnvPool(equipped, splits, kind)), kind


def _limited(env: Any, limits: dict[str, Any]) -> Any:
    if not limits:
        return env
    from torchrl_chat.transforms import Budget

    return env.append_transform(Budget(**limits))


def _makers(
    kind: str,
    task: str,
    tokenizer: Any,
    data: str | None,
    system_prompt: str | None,
    seed: int,
    template: dict[str, Any],
) -> tuple[Callable[[str], Any], tuple[str, ...]]:
    """What makes the TorchRL environment of a split, and the splits."""
    from torchrl_chat import envs

    shared: dict[str, Any] = {
        "tokenizer": tokenizer,
        "input_mode": "tokens",
        "template_kwargs": template,
        "system_prompt": system_prompt,
    }
    rows = {**shared, "shuffle": False, "seed": seed}
    if kind == "chat":
        return lambda split: envs.ChatEnv(batch_size=(1,), **shared), ("train",)
    if kind == "digits":
        return functools.partial(_digits, data, rows), ("train",)
    if kind == "reasoning-gym" and task:
        return lambda split: envs.ReasoningGymEnv(task, **rows), ("train",)
    tasks = {"countdown": envs.CountdownEnv, "gsm8k": envs.GSM8KEnv, "math": envs.MATHEnv, "ifeval": envs.IFEvalEnv}
    if kind not in tasks:
        raise ValueError(
            f"there is no environment {kind!r}: expected {', '.join(NAMES)}, module:function or module:Class."
        )
    cls: Any = tasks[kind]
    splits = ("train",) if kind == "ifeval" else ("train", "test")
    return lambda split: cls(dataset=data, split=split, **rows), splits


def _digits(data: str | None, rows: dict[str, Any], split: str) -> Any:
    from torchrl_chat.envs import DatasetChatEnv
    from torchrl_chat.rewards import NumberVerifier
    from torchrl_chat.tiny import last_digit_rows
    from torchrl_chat.transforms import EndOfDialogue, RewardTransform

    env = DatasetChatEnv(dataset=data or last_digit_rows(seed=rows["seed"]), **rows)
    env = env.append_transform(EndOfDialogue())
    return env.append_transform(RewardTransform(NumberVerifier()))


def _of_module(name: str, tokenizer: Any, template: dict[str, Any], limits: dict[str, Any]) -> Callable[[], Any]:
    make = named(name)
    if isinstance(make, type) and issubclass(make, MessageEnv):
        from torchrl_chat.envs import MessageChatEnv

        episode: type[MessageEnv] = make
        options: dict[str, Any] = {"input_mode": "tokens", "template_kwargs": template, "shuffle": False, "seed": 0}

        def conversation(split: str) -> Any:
            return _limited(MessageChatEnv(episode, tokenizer=tokenizer, **options), limits)

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
