"""What stands between finished episodes and an optimizer: the training view, log-probs, advantages, losses.

Plain functions of tensors (N, T) with a mask; torchrl's own losses take the view as it is.
"""

from torchrl_chat.training.advantages import gae, group_advantages, token_rewards, whitened
from torchrl_chat.training.losses import kl_estimate, masked_mean, policy_loss
from torchrl_chat.training.scoring import Scores, microbatches, sequence_log_probs
from torchrl_chat.training.view import training_view

__all__ = [
    "Scores",
    "gae",
    "group_advantages",
    "kl_estimate",
    "masked_mean",
    "microbatches",
    "policy_loss",
    "sequence_log_probs",
    "token_rewards",
    "training_view",
    "whitened",
]
