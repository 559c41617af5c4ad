"""A tokenizer's chat template as a bridge: render a first prompt, extend it by new messages, exactly."""

from torchrl_chat.templates.bridge import BridgeError
from torchrl_chat.templates.chat_template import ChatTemplate
from torchrl_chat.templates.rendering import ChatTemplateError

__all__ = ["BridgeError", "ChatTemplate", "ChatTemplateError"]
