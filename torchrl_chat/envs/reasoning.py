"""The procedural tasks of the package ``reasoning-gym`` as an environment: endless, offline, verifiable."""

from __future__ import annotations

from typing import Any

import torch
from torchrl.envs import StepCounter

from torchrl_chat.envs.chat import InputMode
from torchrl_chat.envs.dataset import DatasetChatEnv
from torchrl_chat.rewards.reasoning_gym import ReasoningGymVerifier, load_task, task_rows
from torchrl_chat.transforms.reward import RewardTransform


class ReasoningGymEnv(DatasetChatEnv):
    """One of ``reasoning-gym``'s hundred task generators (Stojanovski et al. 2025, arXiv:2505.24760).

    Rows are generated from the seed; each answer is scored by the task's own ``score_answer``. Needs the
    extra ``reasoning-gym``.

    Keyword Args:
        task: the name of a generator, e.g. ``"chain_sum"``.
        size: how many rows are generated before they repeat.
        seed: the seed of the rows and of their order.
        task_kwargs: settings of the generator, e.g. ``{"min_terms": 2, "max_terms": 2}``.
        max_steps: the number of turns after which the dialogue is truncated.

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
        num_envs: int = 1,
        repeats: int | None = None,
        group_repeats: bool = False,
        tokenizer: Any = None,
        device: torch.device | str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        input_mode: InputMode = "history",
        system_prompt: str | None = None,
        max_steps: int = 1,
    ):
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        settings = {**(task_kwargs or {}), "size": size, "seed": seed}
        load_task(task, settings)  # an unknown name is refused here, with the names that there are
        super().__init__(
            dataset=task_rows(task, settings),
            shuffle=shuffle,
            num_envs=num_envs,
            repeats=repeats,
            seed=seed,
            group_repeats=group_repeats,
            tokenizer=tokenizer,
            device=device,
            template_kwargs=template_kwargs,
            input_mode=input_mode,
            system_prompt=system_prompt,
        )
        if max_steps:
            self.append_transform(StepCounter(max_steps=max_steps))
        self.append_transform(RewardTransform(ReasoningGymVerifier(task, settings), reference_key="index"))

    @classmethod
    def from_dataloader(cls, dataloader: Any, **kwargs: Any) -> ReasoningGymEnv:
        """Not to be had: the rows of a task come from its generator."""
        raise TypeError("ReasoningGymEnv generates its rows: ReasoningGymEnv(task=..., size=..., seed=...).")
