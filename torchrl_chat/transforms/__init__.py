"""torchrl transforms that act on a turn."""

from torchrl_chat.transforms.reward import RewardTransform

__all__ = ["RewardTransform"]
