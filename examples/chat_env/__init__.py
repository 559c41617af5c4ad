"""The chat environment, under the names that OpenEnv's own has."""

from torchrl_chat.openenv import ChatAction, ChatEnv, ChatObservation, ChatState

__all__ = ["ChatAction", "ChatEnv", "ChatObservation", "ChatState"]
