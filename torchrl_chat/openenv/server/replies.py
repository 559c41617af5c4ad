"""Replies as JSON whose earlier part is kept: a turn costs what is new in it, and one copy of the bytes.

A whole observation repeats the conversation in every reply. Its messages and tokens are written as JSON once, when
they are new, and kept as bytes; only what holds them together is written anew.
"""

from __future__ import annotations

from typing import Any

import orjson

from torchrl_chat.openenv.chat.episode import StepOutcome
from torchrl_chat.openenv.protocol import dumps


class Replies:
    """The replies of one session.

    Args:
        delta: whether observations hold only what is new (see :class:`~torchrl_chat.openenv.models.Delta`).
    """

    def __init__(self, delta: bool = False):
        self.delta = delta
        self._messages = bytearray()
        self._tokens = bytearray()
        self._counts = (0, 0)

    def forget(self) -> None:
        """The client may not have what was sent: the next observation is whole."""
        self._messages.clear()
        self._tokens.clear()
        self._counts = (0, 0)

    def result(self, turn: Any) -> bytes:
        """The ``data`` of an observation frame, and the body of an HTTP response."""
        if not isinstance(turn, StepOutcome):
            return _foreign(turn)
        if turn.observation is not None:
            self.forget()
            return _foreign(turn.observation)
        return self._delta(turn) if self.delta else self._whole(turn)

    def _whole(self, turn: StepOutcome) -> bytes:
        had = self._counts
        messages, tokens = self._kept(turn)
        if messages < had[0] or not messages:
            self._messages.clear()
            messages = 0
        if tokens < had[1] or not tokens:
            self._tokens.clear()
            tokens = 0
        _extend(self._messages, dumps(list(turn.messages[messages:])))
        _extend(self._tokens, _ids(turn, tokens))
        return _result(turn, self._messages, self._tokens)

    def _delta(self, turn: StepOutcome) -> bytes:
        messages, tokens = self._kept(turn)
        delta = b',"delta":{"messages":%d,"tokens":%d}' % (messages, tokens)
        return _result(turn, dumps(list(turn.messages[messages:]))[1:-1], _ids(turn, tokens)[1:-1], delta)

    def _kept(self, turn: StepOutcome) -> tuple[int, int]:
        """How many messages and tokens the client has, and will go on to have."""
        messages, tokens = map(min, self._counts, turn.ledger.kept)
        self._counts = len(turn.messages), len(turn.ledger.transcript)
        return messages, tokens


def _ids(turn: StepOutcome, start: int) -> bytes:
    return orjson.dumps(turn.ledger.transcript.tokens[start:].numpy(), option=orjson.OPT_SERIALIZE_NUMPY)


def _extend(kept: bytearray, items: bytes) -> None:
    """Append the items of a JSON list to others."""
    inner = items[1:-1]
    if inner:
        if kept:
            kept += b","
        kept += inner


def _result(turn: StepOutcome, messages: bytes | bytearray, tokens: bytes | bytearray, delta: bytes = b"") -> bytes:
    metadata = dumps(turn.metadata)
    return b"".join(
        (
            b'{"observation":{"messages":[',
            messages,
            b'],"tokens":[',
            tokens,
            b"]",
            delta,
            b',"metadata":',
            metadata,
            b'},"reward":',
            orjson.dumps(turn.reward),
            b',"done":true' if turn.done else b',"done":false',
            b',"metadata":' + metadata + b"}" if turn.metadata else b"}",
        )
    )


def _foreign(observation: Any) -> bytes:
    """An observation of any environment that follows OpenEnv's interface."""
    if hasattr(observation, "model_dump"):
        fields = observation.model_dump(exclude_none=False)
    else:
        fields = dict(observation if isinstance(observation, dict) else vars(observation))
    if fields.get("delta", 0) is None:
        del fields["delta"]
    data = {"reward": fields.pop("reward", None), "done": bool(fields.pop("done", False)), "observation": fields}
    if fields.get("metadata"):
        data["metadata"] = fields["metadata"]
    return dumps(data)
