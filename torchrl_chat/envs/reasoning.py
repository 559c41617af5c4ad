"""The procedural tasks of the package ``reasoning-gym`` as an environment: endless, offline, verifiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchrl.envs import StepCounter

from torchrl_chat.envs.dataset import DatasetChatEnv
from torchrl_chat.envs.rows import GeneratedRows
from torchrl_chat.rewards import Episode, Grader, Verdict
from torchrl_chat.rewards.reasoning_gym import ReasoningGymVerifier, task_rows
from torchrl_chat.transforms.ending import EndOfDialogue
from torchrl_chat.transforms.reward import RewardTransform


class ReasoningGymEnv(DatasetChatEnv):
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
        max_steps: as for :class:`~torchrl_chat.envs.TaskEnv`.
        compute_reward: whether rewards are computed.
        floors: whether an empty answer gets what the task's scorer gives it: 0.01 to 0.05 in twelve tasks, else 0.
        deadline, workers: as for :class:`~torchrl_chat.RewardTransform`.

    The others are as for :class:`DatasetChatEnv`.

    Example:
        >>> env = ReasoningGymEnv(task="chain_sum", tokenizer=tokenizer, num_envs=4)  # doctest: +SKIP
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
        max_steps: int | None = None,
        compute_reward: bool = True,
        floors: bool = True,
        deadline: float = 10.0,
        workers: int | None = None,
        **kwargs: Any,
    ):
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        settings = {**(task_kwargs or {}), "size": size, "seed": seed}
        rows = GeneratedRows(task_rows(task, settings), {"task": task, **(task_kwargs or {})})
        super().__init__(dataset=rows, shuffle=shuffle, seed=seed, **kwargs)
        if max_steps is None:
            self._grow(EndOfDialogue())
        elif max_steps:
            self._grow(StepCounter(max_steps=max_steps))
        grader = Grader(ReasoningGymVerifier(task, settings, floors=floors), deadline=deadline, workers=workers)
        self.__dict__["_grader"], self.__dict__["_rows"] = grader, rows
        if compute_reward:
            self._grow(RewardTransform(grader, reference_key="entry"))

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
        if len(predictions) != len(indices):
            raise ValueError(f"{len(predictions)} predictions for {len(indices)} rows.")
        pairs = zip(predictions, indices, strict=True)
        return self.__dict__["_grader"].grade([Episode.of(text, rows[index]["entry"]) for text, index in pairs])

    @classmethod
    def from_dataloader(cls, dataloader: Any, **kwargs: Any) -> ReasoningGymEnv:
        """Not to be had: the rows of a task come from its generator."""
        raise TypeError("ReasoningGymEnv generates its rows: ReasoningGymEnv(task=..., size=..., seed=...).")
