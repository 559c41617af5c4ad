"""The optional package ``renderers`` as a parser: sampled ids to an answer, for the model families that it knows.

It is asked only where a user names a family (``ChatTemplate(..., renderer="qwen3")``); the bridge itself never
depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchrl_chat.templates.codec import TokenCodec
from torchrl_chat.templates.parsing import ParsedAnswer
from torchrl_chat.templates.toolcalls import CallStatus, ParsedCall

_STATUS = {status.value: status for status in CallStatus}


class RenderersParser:
    """Parses answers with one of the package's hand-written renderers.

    Args:
        tokenizer: the tokenizer.
        codec: its codec.
        name: the renderer's name, e.g. ``"qwen3"`` (``renderers.config_from_name``).
        tools: JSON schemas of the tools.

    Raises:
        ImportError: the package is not installed.
        ValueError: it has no renderer of that name.
    """

    def __init__(self, tokenizer: Any, codec: TokenCodec, name: str, tools: Sequence[Any] | None = None):
        try:
            from renderers import config_from_name, create_renderer
        except ImportError as error:
            raise ImportError(
                f"renderer={name!r} needs the package renderers: pip install 'torchrl_chat[renderers]'"
            ) from error
        try:
            self.renderer = create_renderer(tokenizer, config_from_name(name))
        except (KeyError, ValueError) as error:
            raise ValueError(f"the package renderers has no renderer {name!r}: {error}") from error
        self.codec = codec
        self.tools = list(tools) if tools else None

    def parse(self, prompt: Sequence[int] | None, sampled: Sequence[int]) -> ParsedAnswer | None:
        """The answer that ``sampled`` ids are; ``None`` where the package cannot read them.

        Args:
            prompt: the ids before them, where they are known.
            sampled: the ids, the tokens that end the turn included.
        """
        try:
            response = self.renderer.parse_response(
                list(sampled), tools=self.tools, prompt_ids=None if prompt is None else list(prompt)
            )
        except Exception:  # whatever a parser raises on sampled text, the text is still an answer
            return None
        calls = tuple(self._call(call, sampled) for call in response.tool_calls)
        return ParsedAnswer(response.content, response.reasoning_content, calls)

    def _call(self, call: Any, sampled: Sequence[int]) -> ParsedCall:
        status = _STATUS.get(call.status.value, CallStatus.INVALID_JSON)
        span = (0, 0)
        if call.token_span is not None:
            span = tuple(len(text) for text in self.codec.decode([sampled[:end] for end in call.token_span]))  # type: ignore[assignment]
        return ParsedCall(call.name, call.arguments, status, span, call.id)
