"""Actions, observations and states."""

from torchrl_chat.openenv import ChatAction, ChatObservation, ChatState

__all__ = ["ChatAction", "ChatObservation", "ChatState"]
