"""The ledger lives in :mod:`torchrl_chat.conversation`; this line keeps the name under which it was imported."""

from torchrl_chat.conversation.transcript import Branch, Transcript

__all__ = ["Branch", "Transcript"]
