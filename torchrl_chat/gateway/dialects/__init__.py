"""The dialects that agents speak, by name. A new one is a module with a :class:`~torchrl_chat.gateway.calls.Dialect`, and a line here."""

from __future__ import annotations

from torchrl_chat.gateway.calls import Dialect
from torchrl_chat.gateway.dialects.chat import ChatCompletions
from torchrl_chat.gateway.dialects.messages import Messages
from torchrl_chat.gateway.dialects.responses import Responses

DIALECTS: tuple[Dialect, ...] = (ChatCompletions(), Responses(), Messages())
"""What a gateway serves."""

__all__ = ["DIALECTS", "ChatCompletions", "Messages", "Responses"]
