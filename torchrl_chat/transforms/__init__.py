"""torchrl transforms that act on a turn."""

from torchrl_chat.transforms.budgets import Budget
from torchrl_chat.transforms.reward import RewardTransform
from torchrl_chat.transforms.stop import StopReason
from torchrl_chat.transforms.thinking import AddThinkingPrompt

__all__ = ["AddThinkingPrompt", "Budget", "RewardTransform", "StopReason"]
