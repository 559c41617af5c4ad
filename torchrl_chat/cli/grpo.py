"""GRPO (Shao et al. 2024, arXiv:2402.03300) on a dataset environment, with torchrl's own parts.

Collector, replay buffer and ``GRPOLoss`` are torchrl's, and so is ``MCAdvantage`` but for what is mended in
:class:`~torchrl_chat.training.ExactMCAdvantage`; this file is the loop between them.
Left out of the textbook algorithm: the KL penalty against a reference model (on-policy batches and a
clipped ratio hold small models well enough).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torchrl.collectors.llm import LLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import EnvBase
from torchrl.objectives.llm.grpo import GRPOLoss

from torchrl_chat import columns
from torchrl_chat.playing import play
from torchrl_chat.policies import TransformersPolicy
from torchrl_chat.training import ExactMCAdvantage, take_step


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """The settings of the loop."""

    steps: int  # batches to collect and learn from
    group_size: int  # answers to each question
    epochs: int  # passes over each batch
    minibatch: int  # conversations an optimizer step; divides the batch
    lr: float  # learning rate of AdamW at the first step
    final_lr_share: float  # of it at the last step, falling in a line
    entropy: float  # coefficient of the entropy bonus
    clip: float = 0.2  # clip range of the ratio
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one step measured."""

    step: int
    reward: float  # mean over the batch
    pass_rate: float  # share of right answers in the batch, sampled before the update
    loss: float | None  # of the optimizer steps that were taken; None where none was
    ess: float | None  # effective sample size, 1.0 before the first update of a batch
    response_length: float  # sampled tokens a conversation, mean
    skipped: int  # optimizer steps that were left out, since their loss or gradients were not finite
    seconds: float


def grpo(env: EnvBase, policy: TransformersPolicy, config: GRPOConfig) -> Iterator[StepMetrics]:
    """Train the policy's model; yields after every step.

    Args:
        env: a dataset environment with rewards, whose batch holds whole groups.
        policy: the policy to train, in place.
        config: the settings.

    Raises:
        ValueError: the batch is no multiple of the group size and of the minibatch.
        NotFiniteError: several optimizer steps in a row were not finite.
    """
    rows = env.batch_size.numel()
    if rows % config.group_size or rows % config.minibatch:
        raise ValueError(
            f"a batch has {rows} conversations: not a multiple of the group size {config.group_size} and of the "
            f"minibatch {config.minibatch}."
        )
    buffer = ReplayBuffer(
        storage=LazyStackStorage(rows),
        sampler=SamplerWithoutReplacement(),
        batch_size=config.minibatch,
        transform=ExactMCAdvantage(grpo_size=config.group_size),
    )
    loss_module = GRPOLoss(
        policy,
        clip_epsilon=config.clip,
        entropy_bonus=config.entropy > 0,
        entropy_coeff=config.entropy,
        masking_strategy="sft",
    )
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    with warnings.catch_warnings():
        # That torchrl 0.15 will append an InitTracker, which this policy has no use for; the collector has no way to say so.
        warnings.filterwarnings("ignore", "The env passed to LLMCollector is missing transforms", FutureWarning)
        collector = LLMCollector(
            env, policy=policy, dialog_turns_per_batch=rows, total_dialog_turns=rows * config.steps
        )
    try:
        yield from _learn(collector, policy, buffer, loss_module, optimizer, config)
    finally:
        collector.shutdown()


def _learn(
    collector: LLMCollector,
    policy: TransformersPolicy,
    buffer: ReplayBuffer,
    loss_module: GRPOLoss,
    optimizer: torch.optim.Optimizer,
    config: GRPOConfig,
) -> Iterator[StepMetrics]:
    start = time.perf_counter()
    for step, batch in enumerate(collector):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - (1 - config.final_lr_share) * step / config.steps)
        batch = batch.reshape(-1)
        buffer.empty()
        buffer.extend(batch)
        losses, sizes, skipped = [], [], 0
        for _ in range(config.epochs if len(buffer) else 0):  # of what could not be graded nothing is in it
            for minibatch in buffer:
                output = loss_module(minibatch.to(policy.device))
                loss = output.loss_objective
                if config.entropy > 0:
                    loss = loss + output.loss_entropy
                optimizer.zero_grad()
                loss.backward()
                patience = 5 * config.epochs  # a bad row comes back in each pass
                if take_step(optimizer, loss, max_grad_norm=config.max_grad_norm, patience=patience):
                    losses.append(float(loss.detach()))
                    sizes.append(float(output.ESS))
                else:
                    skipped += 1
        now = time.perf_counter()
        yield StepMetrics(
            step=step,
            reward=float(batch["next", "reward"].mean()),
            pass_rate=float(batch["next", "success"].float().mean()),
            loss=sum(losses) / len(losses) if losses else None,
            ess=sum(sizes) / len(sizes) if sizes else None,
            response_length=_mean_length(batch),
            skipped=skipped,
            seconds=now - start,
        )
        start = time.perf_counter()


def _mean_length(batch: TensorDictBase) -> float:
    rows = columns.read_field(batch.get("tokens"), "response", batch.batch_size) or []
    return sum(map(len, rows)) / max(1, len(rows))


def evaluate(env: EnvBase, policy: TransformersPolicy, count: int, max_turns: int = 64) -> list[TensorDictBase]:
    """Play ``count`` fresh conversations to their end, graded.

    Args:
        env: a dataset environment with rewards.
        policy: it samples as it is set to.
        count: how many conversations; whole batches are played, the rest is cut off.
        max_turns: after so many turns a dialogue that has not ended counts as it is.

    Returns:
        finished rows (see :func:`~torchrl_chat.playing.play`), batch after batch.
    """
    batches: list[TensorDictBase] = []
    while count > 0:
        batches.append(play(env, policy, max_turns=max_turns).reshape(-1)[:count])
        count -= len(batches[-1])
    return batches


def pass_rate(graded: Sequence[TensorDictBase]) -> float:
    """The share of right answers; NaN of none."""
    return float(torch.cat([batch["success"].flatten() for batch in graded]).float().mean()) if graded else math.nan
