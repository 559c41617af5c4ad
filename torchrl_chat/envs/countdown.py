"""The Countdown game as an environment: generated, endless, offline."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from torchrl_chat.envs.task import TaskEnv
from torchrl_chat.rewards.countdown import countdown_rows
from torchrl_chat.rewards.tasks import TASKS

_TEST_SHARE = 10  # one problem of ten belongs to the test split


class CountdownEnv(TaskEnv):
    """Reach a target from given numbers with + - * / and parentheses (as in TinyZero, Pan et al. 2025).

    Every problem is generated from an expression, so it has a solution. Which split a problem belongs to depends on the
    problem itself: no problem is in both, whatever the seeds.

    Keyword Args:
        size: how many problems are generated before they repeat.
        seed: the seed of the problems and of their order.
        split: ``"train"`` or ``"test"``.
        numbers: how many numbers a problem may have.
        low, high: the smallest and the largest number.
        target: the smallest and the largest target.
        dataset: rows with ``query``, ``target`` and ``nums`` instead of generated ones.
        use_all: every number exactly once; otherwise at most once.
        format_reward: the reward of an expression that can be read but is wrong.

    The others are as for :class:`TaskEnv`.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> env = CountdownEnv(size=100, seed=0, tokenizer=tokenizer, num_envs=4)
        >>> sorted(env.reset()["answer"][0])
        ['nums', 'target']
    """

    TASK = TASKS["countdown"]
    SYSTEM_PROMPT = (
        "Solve the user's problem. Think step by step inside <think></think>, then give the expression inside "
        "<answer></answer>."
    )

    def __init__(
        self,
        *,
        size: int = 1000,
        seed: int | None = None,
        split: str | None = "train",
        numbers: Sequence[int] = (3, 4),
        low: int = 1,
        high: int = 99,
        target: tuple[int, int] = (10, 99),
        dataset: Any = None,
        **kwargs: Any,
    ):
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        if dataset is None:
            if split not in ("train", "test"):
                raise ValueError(f"split={split!r}: generated problems are 'train' or 'test'.")
            if size < 1:
                raise ValueError(f"size={size}: expected at least one problem.")
            dataset = _generated(size, seed, split == "test", numbers=numbers, low=low, high=high, target=target)
        super().__init__(dataset=dataset, seed=seed, split=split, **kwargs)


def _generated(size: int, seed: int, test: bool, **settings: Any) -> list[dict[str, Any]]:
    """The first problems of one split."""
    rows: dict[str, dict[str, Any]] = {}
    # The rows of a seed are drawn one by one, until the split has enough; a narrow range may not have as many.
    drawn = countdown_rows(size * _TEST_SHARE * 20, seed, **settings)
    for row in drawn:
        problem = f"{sorted(row['nums'])} {row['target']}"
        if (zlib.crc32(problem.encode()) % _TEST_SHARE == 0) == test:
            rows.setdefault(problem, row)
            if len(rows) == size:
                break
    if not rows:
        raise ValueError(f"no problem of the {'test' if test else 'train'} split within {settings}.")
    return list(rows.values())
