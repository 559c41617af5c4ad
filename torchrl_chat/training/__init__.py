"""What stands between finished episodes and an optimizer: the training view, log-probs, advantages, losses.

Plain functions of tensors (N, T) with a mask; torchrl's own losses take the view as it is. ``ExactGRPOLoss`` and
``ExactMCAdvantage`` are torchrl's with a defect less each, imported (with torchrl's objectives) when they are asked for.
"""

from typing import Any

from torchrl_chat.training.advantages import gae, group_advantages, token_rewards, whitened
from torchrl_chat.training.corrections import importance_weights
from torchrl_chat.training.distillation import distillation_advantages
from torchrl_chat.training.losses import kl_estimate, masked_mean, policy_loss, token_shares
from torchrl_chat.training.scoring import (
    Scores,
    microbatches,
    of_columns,
    scored,
    sequence_log_probs,
    teacher_of,
)
from torchrl_chat.training.terms import TokenTerms
from torchrl_chat.training.updates import NotFiniteError, Step, take_step
from torchrl_chat.training.view import training_view

__all__ = [
    "ExactGRPOLoss",
    "ExactMCAdvantage",
    "NotFiniteError",
    "Scores",
    "Step",
    "TokenTerms",
    "distillation_advantages",
    "gae",
    "group_advantages",
    "importance_weights",
    "kl_estimate",
    "masked_mean",
    "microbatches",
    "of_columns",
    "policy_loss",
    "scored",
    "sequence_log_probs",
    "take_step",
    "teacher_of",
    "token_rewards",
    "token_shares",
    "training_view",
    "whitened",
]


def __getattr__(name: str) -> Any:
    if name in ("ExactGRPOLoss", "ExactMCAdvantage"):
        from torchrl_chat.training import grpo

        return getattr(grpo, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
