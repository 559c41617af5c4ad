"""The procedural tasks of the package ``reasoning-gym`` as an environment: endless, offline, verifiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchrl_chat.envs.rows import GeneratedRows
from torchrl_chat.envs.task import GRADING, GradedEnv
from torchrl_chat.rewards import Verdict
from torchrl_chat.rewards.reasoning_gym import ReasoningGymVerifier, task_rows


class ReasoningGymEnv(GradedEnv):
    """One of ``reasoning-gym``'s hundred task generators (Stojanovski et al. 2025, arXiv:2505.24760).

    Rows are generated from the seed; each answer is scored by the task's own ``score_answer``, but for what
    :class:`~torchrl_chat.rewards.reasoning_gym.ReasoningGymVerifier` tells. Needs the extra ``reasoning-gym``.

    A row travels with its conversation, in the column ``"entry"``, as its generator made it, and is graded by that; so are the
    rows in ``state_dict()``, and an environment that loads the state goes on with them. Several tasks (``isomorphic_strings``,
    ``polynomial_multiplication``, ``ransom_note``, ``word_ladder``, ``knight_swap``, ``codeio`` in 0.1.25) give other rows in
    another process, whatever the seed.

    Keyword Args:
        task: the name of a generator, e.g. ``"chain_sum"``.
        size: how many rows are generated before they repeat.
        seed: the seed of the rows and of their order.
        task_kwargs: settings of the generator, e.g. ``{"min_terms": 2, "max_terms": 2}``.
        floors: whether an empty answer gets what the task's scorer gives it: 0.01 to 0.05 in twelve tasks, else 0.
        max_steps, compute_reward, deadline, workers: as for :class:`~torchrl_chat.envs.TaskEnv`.

    The others are as for :class:`DatasetChatEnv`.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> env = ReasoningGymEnv(task="chain_sum", tokenizer=tokenizer, num_envs=4)
    """

    SYSTEM_PROMPT = "Solve the task. Put your final answer inside <answer></answer>."

    def __init__(
        self,
        task: str = "chain_sum",
        *,
        size: int = 1000,
        seed: int | None = None,
        task_kwargs: dict[str, Any] | None = None,
        shuffle: bool = False,
        floors: bool = True,
        **kwargs: Any,
    ):
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        settings = {**(task_kwargs or {}), "size": size, "seed": seed}
        rows = GeneratedRows(task_rows(task, settings), {"task": task, **(task_kwargs or {})})
        grading = {key: kwargs.pop(key) for key in kwargs.keys() & GRADING}
        super().__init__(dataset=rows, shuffle=shuffle, seed=seed, **kwargs)
        self.__dict__["_rows"] = rows
        self._graded(ReasoningGymVerifier(task, settings, floors=floors), "entry", **grading)

    def score(self, predictions: Sequence[str], indices: Sequence[int] | None = None) -> list[Verdict]:
        """Grade answers offline, as the environment would.

        Args:
            predictions: the responses, as texts.
            indices: which rows they answer (the column ``"index"``). By default all rows, in order.

        Raises:
            ValueError: there are not as many predictions as rows.
            IndexError: there is no such row.
        """
        rows: GeneratedRows = self.__dict__["_rows"]
        indices = range(len(rows)) if indices is None else indices
        return self._scored(predictions, [rows[index]["entry"] for index in indices])

    @classmethod
    def from_dataloader(cls, dataloader: Any, **kwargs: Any) -> ReasoningGymEnv:
        """Not to be had: the rows of a task come from its generator."""
        raise TypeError("ReasoningGymEnv generates its rows: ReasoningGymEnv(task=..., size=..., seed=...).")
