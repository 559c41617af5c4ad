"""The client."""

from torchrl_chat.openenv import ChatEnv

__all__ = ["ChatEnv"]
