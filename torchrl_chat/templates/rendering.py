"""Messages to text with the model's own Jinja template, contents guarded.

The template is used as it is: never replaced, never patched, never chosen by the model's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_chat.messages import Message
from torchrl_chat.templates.codec import TokenCodec


class ChatTemplateError(ValueError):
    """The tokenizer has no chat template, or the template refuses the messages."""


class Renderer:
    """Renders conversations with one tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        codec: its codec; its special tokens decide which contents need guarding.
        chat_template: Jinja source used instead of ``tokenizer.chat_template``.
        tools: JSON schemas handed to the template with every conversation.
        template_kwargs: further variables for the template, e.g. ``enable_thinking=False``.

    Raises:
        ChatTemplateError: if there is no chat template at all.
    """

    def __init__(
        self,
        tokenizer: Any,
        codec: TokenCodec,
        chat_template: str | None,
        tools: Sequence[Any] | None,
        template_kwargs: dict[str, Any],
    ):
        if chat_template is None and not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise ChatTemplateError(
                f"tokenizer {name!r} has no chat template: set tokenizer.chat_template, or pass "
                f"chat_template=... with the Jinja source that the model was trained with."
            )
        self.tokenizer = tokenizer
        self.codec = codec
        self._kwargs: dict[str, Any] = dict(template_kwargs)
        if tools:
            self._kwargs["tools"] = list(tools)
        if chat_template is not None:
            self._kwargs["chat_template"] = chat_template

    def text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The template's text; raises :class:`ChatTemplateError` where the template does."""
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **self._kwargs
            )
        except (jinja2.TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
            roles = [message.get("role") for message in messages]
            raise ChatTemplateError(
                f"the chat template refuses a conversation with the roles {roles}: {error}"
            ) from error

    def guard(self, messages: Sequence[Message]) -> tuple[Sequence[Message], bool]:
        """The messages with look-alikes of special tokens marked, and whether there were any.

        Every string of a message is looked at (content, parts, names, tool calls), but for its role.
        """
        if not any(map(self._spells, messages)):
            return messages, False
        return [{**self._marked(message), "role": message["role"]} for message in messages], True

    def _spells(self, value: Any) -> bool:
        if isinstance(value, str):
            return self.codec.spells_special(value)
        if isinstance(value, Mapping):
            return any(self._spells(entry) for key, entry in value.items() if key != "role")
        return isinstance(value, (list, tuple)) and any(map(self._spells, value))

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.codec.mark_specials(value)
        if isinstance(value, Mapping):
            return {key: self._marked(entry) for key, entry in value.items()}
        return [self._marked(entry) for entry in value] if isinstance(value, (list, tuple)) else value
