"""``ChatClient``, the client of OpenEnv's chat environment: messages and token ids over the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_chat.messages import check_message
from torchrl_chat.openenv.client.generic import GenericClient, StepResult
from torchrl_chat.openenv.models import ChatAction, ChatObservation, ChatState
from torchrl_chat.openenv.tokens import TokenRow
from torchrl_chat.templates import ChatTemplate


class ChatClient(GenericClient):
    """One conversation with a chat environment, OpenEnv's own or this package's.

    OpenEnv calls it ``ChatEnv``, and so does ``torchrl_chat.openenv``; :class:`torchrl_chat.ChatEnv` is an environment. For
    many conversations at once, as one TorchRL environment, see :class:`~torchrl_chat.openenv.OpenEnvChatEnv`.

    Arguments and behaviour are those of :class:`GenericClient`; ``delta`` is on.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)  # the server's
        >>> with ChatClient(url) as client:  # "http://localhost:8000", say
        ...     result = client.reset()
        ...     action = client.message_to_action({"role": "user", "content": "Hello!"}, tokenizer)
        ...     print(client.step(action).observation.messages)
        [{'role': 'user', 'content': 'Hello!'}]
    """

    def __init__(self, base_url: str, *, delta: bool = True, **options: Any):
        super().__init__(base_url, delta=delta, **options)
        self._template: tuple[Any, ChatTemplate] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._template = None

    def message_to_action(self, message: Mapping[str, Any], tokenizer: Any) -> ChatAction:
        """A message as an action: its token ids, as the tokenizer's chat template writes it.

        Args:
            message: ``{"role": ..., "content": ...}``.
            tokenizer: a Hugging Face tokenizer with a chat template; that of the server.

        Raises:
            MessageError: (a ``ValueError``) the message has no role or no content.
            ChatTemplateError: the tokenizer has no chat template, or the template refuses a conversation of this message.
        """
        checked = check_message(message)
        if self._template is None or self._template[0] is not tokenizer:
            self._template = (tokenizer, ChatTemplate(tokenizer))
        return ChatAction(tokens=self._template[1].render([checked], add_generation_prompt=False))

    # ------------------------------------------------------------------ over the wire
    def _step_payload(self, action: Any) -> dict[str, Any]:
        if isinstance(action, ChatAction):
            return _fields(action)
        if (isinstance(action, Sequence) and not isinstance(action, (str, bytes))) or hasattr(action, "tolist"):
            return _fields(ChatAction(tokens=action))
        return super()._step_payload(action)

    def _parse_result(self, payload: dict[str, Any]) -> StepResult:
        fields = payload.get("observation") or {}
        # Whole conversations are not checked again at every step: the server has made them.
        observation = ChatObservation.model_construct(
            messages=fields.get("messages") or [],
            tokens=TokenRow(fields.get("tokens") or ()),
            done=bool(payload.get("done")),
            reward=payload.get("reward"),
            metadata=fields.get("metadata") or payload.get("metadata") or {},
        )
        return StepResult(observation, payload.get("reward"), bool(payload.get("done")))

    def _parse_state(self, payload: dict[str, Any]) -> ChatState:
        return ChatState.model_validate(payload)


ChatEnv = ChatClient
"""OpenEnv's name for it."""


def _fields(action: ChatAction) -> dict[str, Any]:
    """An action as JSON's own types. A stock server refuses fields that it does not know: what is not used is not sent."""
    if action.messages or action.metadata:
        return {"metadata": action.metadata, **action.model_dump(mode="json", exclude_none=True)}
    used = {"tokens": action.tokens, "text": action.text, "finish_reason": action.finish_reason}
    return {"metadata": {}, **{name: value for name, value in used.items() if value is not None}}
