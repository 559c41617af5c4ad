"""What a server that samples ids replies, whole or piece by piece: of its JSON, as much as is read.

The entry of a token has four fields, and one of them counts: no values are made of the others. What is not as it should be is told by
its place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import msgspec


class Entry(msgspec.Struct, gc=False):
    """A token's log-prob, as chat completions and vLLM's route for ids tell it."""

    logprob: float


class LogProbs(msgspec.Struct):
    """The log-probs of a choice, in either form."""

    content: list[Entry] | None = None
    token_logprobs: list[float | None] | None = None


class Weights(msgspec.Struct):
    """From which token on which weights have sampled, as vLLM tells it."""

    start: int
    version: str | int | None = None


class Choice(msgspec.Struct):
    """An answer, or a piece of one."""

    token_ids: list[int] | None = None
    logprobs: LogProbs | None = None
    finish_reason: str | None = None
    text: str | None = None
    weight_versions: list[Weights] | None = None

    @property
    def log_probs(self) -> list[float]:
        """The log-prob of each token; none at all where one of them is not told."""
        told = self.logprobs
        if told is None:
            return []
        if (values := told.token_logprobs) is not None:
            known = [value for value in values if value is not None]
            return known if len(known) == len(values) else []
        return [entry.logprob for entry in told.content or ()]

    @property
    def versions(self) -> tuple[tuple[int, int | None], ...]:
        """The weights as a ledger has them: ``(start, version)``, ``None`` for a version that is no number."""
        return tuple(
            (each.start, int(number) if (number := str(each.version)).isdecimal() else None)
            for each in self.weight_versions or ()
        )


class Tokens(msgspec.Struct):
    """How many tokens the model read and wrote."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Sampled(msgspec.Struct):
    """A reply, or an event of a stream."""

    choices: list[Choice] | None = None
    usage: Tokens | None = None
    error: Any = None


class _Cost(msgspec.Struct):
    usage: Tokens | None = None


class MalformedReply(ValueError):
    """A reply is not what it should be; the text names the place in it.

    Attributes:
        usage: how many tokens it cost all the same.
    """

    def __init__(self, reason: str, usage: Tokens | None = None):
        super().__init__(f"the server's reply is malformed: {reason}")
        self.usage = usage


_DECODER = msgspec.json.Decoder(Sampled)


def decoded(raw: bytes) -> Sampled:
    """A reply from its JSON.

    Raises:
        MalformedReply: it is none.

    Example:
        >>> reply = decoded(b'{"choices": [{"token_ids": [7], "logprobs": {"content": [{"token": "a", "logprob": -0.5}]}}]}')
        >>> [choice] = reply.choices
        >>> choice.token_ids, choice.log_probs
        ([7], [-0.5])
    """
    try:
        return _DECODER.decode(raw)
    except msgspec.ValidationError as error:
        raise _malformed(error, functools.partial(msgspec.json.decode, raw)) from None
    except msgspec.DecodeError as error:
        raise MalformedReply(f"it is no JSON ({error}).") from None


def converted(value: Any) -> Sampled:
    """A reply from its JSON value, as a library has read it.

    Raises:
        MalformedReply: it is none.
    """
    try:
        return msgspec.convert(value, Sampled)
    except msgspec.ValidationError as error:
        raise _malformed(error, functools.partial(msgspec.convert, value)) from None


def _malformed(error: Exception, read: Callable[..., _Cost]) -> MalformedReply:
    """What is wrong, with what it cost, where that can be read."""
    usage = None
    with contextlib.suppress(msgspec.ValidationError):
        usage = read(type=_Cost).usage
    return MalformedReply(f"{error}.", usage)
