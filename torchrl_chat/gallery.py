"""Environments by the names of the command line: ``train``, ``eval``, ``play`` and ``serve`` know the same ones.

This file is read for its names by commands that make nothing: what an environment is made of is imported where one is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl_chat import tiny
from torchrl_chat.named import is_name, named
from torchrl_chat.rewards.tasks import LOCAL, TASKS

SPLITS = {
    "gsm8k": ("train", "test"),
    "math": ("train", "test"),
    "countdown": ("train", "test"),
    "ifeval": ("train",),
}
"""The splits of the environments that have some."""

NAMES = (
    "digits",
    "sums",
    "python-tool",
    *SPLITS,
    *LOCAL,
    "reasoning-gym:TASK",
    "module:Class or file.py:Class of a MessageEnv",
)
"""What there is."""


def check_name(name: str, data: str | None = None) -> None:
    """Say that a name or a path is wrong before anything is loaded.

    Args:
        name: one of :data:`NAMES`.
        data: a local copy of its rows.

    Raises:
        ValueError: there is no such environment or path, or the environment takes no ``data``, or cannot do without.
    """
    kind, _, task = name.partition(":")
    if kind == "reasoning-gym" and task:
        from torchrl_chat.rewards.reasoning_gym import load_task

        load_task(task, {"size": 1, "seed": 0})  # names the tasks that there are
        if data is not None:
            raise ValueError(f"data={data!r}: {name} makes its rows itself.")
    elif is_name(name):
        named(name)
    elif name in LOCAL and data is None:
        raise ValueError(f"{name} needs data (--data PATH): {TASKS[name].rows}.")
    elif name not in NAMES:
        raise ValueError(f"there is no environment {name!r}: expected {', '.join(NAMES)}.")
    looks_local = data is not None and (
        data.startswith((".", "/", "~")) or Path(data).suffix or data.count("/") > 1
    )
    if data is not None and looks_local and not Path(data).expanduser().exists():
        told = f" {name} needs {TASKS[name].rows}." if name in LOCAL else ""
        raise ValueError(f"data={data!r}: there is no such dataset file or folder.{told}")


def tiny_alphabet(name: str) -> str:
    """The characters that a tiny tokenizer needs for an environment."""
    return {"digits": tiny.DIGIT_ALPHABET, "python-tool": tiny.TOOL_ALPHABET}.get(name, tiny.TEXT_ALPHABET)


def make_env(
    name: str,
    *,
    data: str | None = None,
    split: str | None = None,
    size: int | None = None,
    limits: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """The environment of a name; each of its conversations is graded at its end.

    Args:
        name: one of :data:`NAMES`.
        data: a local copy of its rows.
        split: the split; by default the first of :data:`SPLITS`.
        size: how many rows are made, where rows are made.
        limits: arguments of a :class:`~torchrl_chat.Budget` for conversations of several turns; the others end by themselves.
        seed: of the rows that are made, and of their order.
        options: of :class:`~torchrl_chat.DatasetChatEnv`: ``tokenizer``, ``input_mode``, ``num_envs``, ``repeats`` ...

    Raises:
        ValueError: there is no such environment, or it takes no ``data``.

    Example:
        >>> env = make_env("digits", tokenizer=tiny.tiny_tokenizer(), input_mode="tokens", num_envs=2)
        >>> env.batch_size
        torch.Size([2])
    """
    from torchrl_chat import envs, transforms
    from torchrl_chat.rewards import NumberVerifier

    check_name(name, data)
    options |= {"seed": seed} | ({} if data is None else {"dataset": data})
    kind, _, task = name.partition(":")
    if kind == "reasoning-gym":
        if size is not None:
            options["size"] = size
        return envs.ReasoningGymEnv(task, **options)
    if is_name(name):
        env = envs.MessageChatEnv(named(name), **options)
        return env.append_transform(transforms.Budget(**limits)) if limits else env
    if name in SPLITS:
        if name == "countdown" and data is None and size is not None:
            options["size"] = size
        cls: Any = {
            "gsm8k": envs.GSM8KEnv,
            "math": envs.MATHEnv,
            "ifeval": envs.IFEvalEnv,
            "countdown": envs.CountdownEnv,
        }[name]
        return cls(split=split or SPLITS[name][0], **options)
    if name in LOCAL:
        local: Any = {
            "aime": envs.AIMEEnv,
            "math-500": envs.MATH500Env,
            "gpqa": envs.GPQAEnv,
            "mmlu-pro": envs.MMLUProEnv,
            "humaneval": envs.HumanEvalEnv,
        }[name]
        return local(split=split, **options)
    if name in ("digits", "sums"):
        make_rows = tiny.last_digit_rows if name == "digits" else tiny.sum_rows
        options.setdefault("dataset", make_rows(size or 2048, seed=seed))
        env = envs.DatasetChatEnv(**options)
        env = env.append_transform(transforms.EndOfDialogue())
        return env.append_transform(transforms.RewardTransform(NumberVerifier()))
    options.setdefault("dataset", tiny.arithmetic_rows(size or 4096, seed))
    env = envs.DatasetChatEnv(**options)
    env = env.append_transform(transforms.PythonInterpreter(deadline=2.0))
    env = env.append_transform(transforms.UserSimulator([]))  # an answer without a program is the last one
    env = env.append_transform(transforms.Budget(**{**(limits or {}), "max_turns": 2}))
    return env.append_transform(transforms.RewardTransform(NumberVerifier(surrounded=0.0), end_on_answer=False))
