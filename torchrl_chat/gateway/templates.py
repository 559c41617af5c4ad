"""The chat templates of a gateway: one for each set of tools that its agents bring, made when it is first seen."""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import orjson

from torchrl_chat.templates import ChatTemplate

_log = logging.getLogger("torchrl_chat.gateway")

_PROVED = 10_000  # kinds of turn that are remembered; one that is not is written in a thread once more
_MOST = 64  # sets of tools that are remembered; one that is not is made anew, and its proofs are kept elsewhere


class Templates:
    """A tokenizer's chat template with whatever tools a request brings.

    Args:
        tokenizer: a Hugging Face tokenizer.
        **options: of :class:`~torchrl_chat.ChatTemplate`: ``chat_template``, ``enable_thinking=False`` ...
    """

    def __init__(self, tokenizer: Any, **options: Any):
        if isinstance(tokenizer, ChatTemplate):
            raise TypeError(
                "give the tokenizer itself: each request brings its own tools, and a ChatTemplate has them inside."
            )
        self._tokenizer, self._options = tokenizer, options
        self._made: OrderedDict[bytes, ChatTemplate] = OrderedDict()
        self._lock = threading.Lock()
        self._proved: set[Hashable] = set()
        self._warned = False
        self.plain = self.of(b"")

    @staticmethod
    def key(tools: Sequence[Mapping[str, Any]]) -> bytes:
        """What a set of tools is known by: the same for schemas that differ in the order of their keys only."""
        if not tools:
            return b""
        try:
            return orjson.dumps(list(tools), option=orjson.OPT_SORT_KEYS)
        except TypeError:  # integers of more than 64 bits
            return json.dumps(list(tools), sort_keys=True).encode()

    def proved(self, kind: Hashable) -> bool:
        """Whether such a turn was written before, and so costs its own tokens only."""
        return kind in self._proved

    def prove(self, kind: Hashable) -> None:
        """Remember that such a turn was written."""
        if len(self._proved) >= _PROVED:  # agents choose tools and the order of roles, and so the kinds
            self._proved.clear()
        self._proved.add(kind)

    def get(self, key: bytes) -> ChatTemplate | None:
        """The template of a set of tools, if it is made already."""
        with self._lock:
            template = self._made.get(key)
            if template is not None:
                self._made.move_to_end(key)
            return template

    def of(self, key: bytes, tools: Sequence[Mapping[str, Any]] = ()) -> ChatTemplate:
        """The template of a set of tools.

        Args:
            key: what :meth:`key` says of them.
            tools: the tools.

        Raises:
            ChatTemplateError: there is no chat template.
        """
        if (template := self.get(key)) is not None:
            return template
        template = ChatTemplate(self._tokenizer, tools=list(tools) or None, **self._options)
        if template.tools_warning and not self._warned:
            self._warned = True
            _log.warning(
                "the chat template does not write the tools that agents bring; findings of their sessions say more"
            )
        with self._lock:
            if self._made.get(key) is None:
                self._made[key] = template
            while len(self._made) > _MOST:
                self._made.popitem(last=False)
            return self._made.get(key, template)
