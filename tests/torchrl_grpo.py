"""GRPO of torchrl's own parts (collector, buffer, advantage, loss) over our environments and policies: that they fit."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import torch
from torchrl.collectors.llm import LLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.objectives.llm.grpo import GRPOLoss

from torchrl_chat.training import ExactMCAdvantage


def grpo(env, policy, *, steps: int, group_size: int, minibatch: int, lr: float = 1e-3):
    """Train the policy's model; what each step measured."""
    rows = env.batch_size.numel()
    buffer = ReplayBuffer(
        storage=LazyStackStorage(rows),
        sampler=SamplerWithoutReplacement(),
        batch_size=minibatch,
        transform=ExactMCAdvantage(grpo_size=group_size),
    )
    loss_of = GRPOLoss(policy, clip_epsilon=0.2, entropy_bonus=False, masking_strategy="sft")
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=lr)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The env passed to LLMCollector is missing transforms", FutureWarning)
        collector = LLMCollector(env, policy=policy, dialog_turns_per_batch=rows, total_dialog_turns=rows * steps)
    try:
        for step, batch in enumerate(collector):
            batch = batch.reshape(-1)
            buffer.empty()
            buffer.extend(batch)
            sizes = []
            for few in buffer:
                output = loss_of(few)
                optimizer.zero_grad()
                output.loss_objective.backward()
                optimizer.step()
                sizes.append(float(output.ESS))
            yield SimpleNamespace(step=step, reward=float(batch["next", "reward"].mean()), ess=sizes)
    finally:
        collector.shutdown()
