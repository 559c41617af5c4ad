"""GSM8K as an environment."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torchrl.envs import StepCounter

from torchrl_chat.envs.chat import InputMode
from torchrl_chat.envs.dataset import DatasetChatEnv
from torchrl_chat.envs.loading import renamed
from torchrl_chat.rewards import GSM8KVerifier
from torchrl_chat.transforms.reward import RewardTransform


class GSM8KEnv(DatasetChatEnv):
    """Grade-school word problems with verifiable answers (Cobbe et al. 2021, arXiv:2110.14168).

    Each conversation starts with a ``question``; the policy's answer is graded against the dataset's
    ``answer``: reward 1 if the number is right, 0 if not. The dialogue ends with the answer, or after
    ``max_steps`` turns.

    Keyword Args:
        dataset: the hub name, or a local folder or file with the columns ``question`` and ``answer``.
        max_steps: the number of turns after which the dialogue is truncated.
        compute_reward: whether rewards are computed.
        last_number: accept the last number of an answer that is not marked (``#### 42``, ``\\boxed{42}``,
            ``<answer>42</answer>``).
        format_reward: the reward of a wrong answer that is at least marked.

    The others are as for :class:`DatasetChatEnv`.

    Example:
        >>> env = GSM8KEnv(dataset="gsm8k/train.jsonl", tokenizer=tokenizer, num_envs=8, repeats=4)
        >>> rollout = env.rollout(1, policy)  # doctest: +SKIP
    """

    SYSTEM_PROMPT = (
        "Solve the user's problem. Think step by step inside <think></think>, then give the final number, "
        "and nothing but the number, inside <answer></answer>."
    )

    def __init__(
        self,
        *,
        dataset: Any = "openai/gsm8k",
        shuffle: bool = True,
        name: str | None = None,
        split: str | None = "train",
        num_envs: int = 1,
        repeats: int | None = None,
        batch_size_dl: int = 1,
        seed: int | None = None,
        group_repeats: bool = False,
        tokenizer: Any = None,
        device: torch.device | str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        apply_template: bool | None = None,
        compute_reward: bool = True,
        collate_fn: Callable[[Any], Any] | None = None,
        max_steps: int = 1,
        input_mode: InputMode = "history",
        system_prompt: str | None = None,
        last_number: bool = False,
        format_reward: float = 0.0,
        ray_backend: bool = False,
        dataloader_actor_name: str | None = None,
    ):
        if ray_backend and dataloader_actor_name is None:
            dataloader_actor_name = "gsm8k_dataloader"
        if name is None and dataset == "openai/gsm8k":
            name = "main"
        super().__init__(
            dataset=dataset,
            shuffle=shuffle,
            name=name,
            split=split,
            num_envs=num_envs,
            repeats=repeats,
            batch_size_dl=batch_size_dl,
            seed=seed,
            group_repeats=group_repeats,
            tokenizer=tokenizer,
            device=device,
            template_kwargs=template_kwargs,
            apply_template=apply_template,
            collate_fn=collate_fn or functools.partial(renamed, key="question", to="query"),
            input_mode=input_mode,
            system_prompt=system_prompt,
            ray_backend=ray_backend,
            dataloader_actor_name=dataloader_actor_name,
        )
        self._grade(max_steps, compute_reward, last_number, format_reward)

    def _grade(self, max_steps: int, compute_reward: bool, last_number: bool, format_reward: float) -> None:
        if max_steps:
            self.append_transform(StepCounter(max_steps=max_steps))
        if compute_reward:
            verifier = GSM8KVerifier(last_number=last_number, format_reward=format_reward)
            self.append_transform(RewardTransform(verifier))

    @classmethod
    def from_dataloader(
        cls,
        dataloader: Any,
        *,
        max_steps: int = 1,
        compute_reward: bool = True,
        last_number: bool = False,
        format_reward: float = 0.0,
        **kwargs: Any,
    ) -> GSM8KEnv:
        """The environment over an existing dataloader, whose batches have ``query`` and ``answer``."""
        self = super().from_dataloader(dataloader, **kwargs)
        self._grade(max_steps, compute_reward, last_number, format_reward)
        return self
