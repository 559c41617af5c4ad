"""OpenEnv's wire protocol: frames, error codes, limits; bytes in, bytes out.

A client sends one JSON object a frame, ``{"type": "reset" | "step" | "state" | "mcp" | "close", "data": {...}}``, and
gets one reply a frame, in order. What cannot be read raises :class:`ProtocolError`, which knows its reply; the
session goes on. Everything is as in ``openenv`` 0.10 and ``openenv-core`` 0.3; the extensions (``RATE_LIMITED``,
``UNAUTHORIZED``, delta observations, resumed sessions) are seen only by those who ask for them.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from torchrl_chat.messages import is_deeper

M = TypeVar("M", bound=BaseModel)
FRAME_TYPES = ("reset", "step", "state", "mcp", "close")
_KEYS = frozenset({"type", "data"})
_MAX_ERRORS = 8
_MAX_SHOWN = 300  # characters of a client's own input in an error


class ErrorCode(enum.StrEnum):
    """The codes of error frames. The session survives the first group and ends with the second."""

    INVALID_JSON = "INVALID_JSON"
    UNKNOWN_TYPE = "UNKNOWN_TYPE"
    VALIDATION_ERROR = "VALIDATION_ERROR"
    EXECUTION_ERROR = "EXECUTION_ERROR"
    RATE_LIMITED = "RATE_LIMITED"

    CAPACITY_REACHED = "CAPACITY_REACHED"
    FACTORY_ERROR = "FACTORY_ERROR"
    SESSION_ERROR = "SESSION_ERROR"
    UNAUTHORIZED = "UNAUTHORIZED"


class CloseCode(enum.IntEnum):
    """WebSocket close codes that the server uses (RFC 6455, section 7.4)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    TAKEN_OVER = 4001  # another socket has resumed this session


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What a client may ask for.

    Attributes:
        max_message_bytes: size of one frame or request body.
        max_depth: nesting of its JSON.
        max_sessions: sessions at a time.
        max_sessions_per_address: of them, those of one address. Three quarters if ``None``, so that no client takes every
            place; all where there are fewer than four.
        idle_seconds: a session without a request for so long is closed; ``None`` for never.
        attach_seconds: a session that was made over ``/mcp`` and that nobody has attached to within so long is closed.
        resume_seconds: how long a resumable session outlives its socket.
        requests_per_second: of one connection (of one address over HTTP); ``None`` for no limit. Twice as many
            may come at once.
        step_seconds: a step (or reset) that takes longer is answered with an error; ``None`` for no limit.
        request_seconds: a connection whose request has not arrived whole within so long is closed.
    """

    max_message_bytes: int = 16 * 2**20
    max_depth: int = 64
    max_sessions: int = 1024
    max_sessions_per_address: int | None = None
    idle_seconds: float | None = 3600.0
    attach_seconds: float = 60.0
    resume_seconds: float = 120.0
    requests_per_second: float | None = None
    step_seconds: float | None = 600.0
    request_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: expected a positive number.")

    @property
    def sessions_of_one(self) -> int:
        """How many sessions one address may have."""
        if self.max_sessions_per_address is not None:
            return min(self.max_sessions_per_address, self.max_sessions)
        return math.ceil(0.75 * self.max_sessions)


Limits = ServerLimits
"""The name from before :class:`~torchrl_chat.conversation.Limits` were those of a conversation everywhere."""


class ProtocolError(Exception):
    """A request that cannot be served.

    Attributes:
        code: the error code of the reply.
        message: what is wrong, for people.
        details: further entries of the reply's ``data``.
    """

    def __init__(self, code: ErrorCode, message: str, **details: Any):
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    def frame(self) -> bytes:
        """The reply."""
        data = {"message": self.message, "code": str(self.code), **self.details}
        return b'{"type":"error","data":%b}' % dumps(data)


class Frame(NamedTuple):
    """What a client sent."""

    type: str
    data: dict[str, Any]


def dumps(value: Any) -> bytes:
    """JSON of a value, compact; not a number and infinity become ``null``, unknown objects their text."""
    return orjson.dumps(value, default=_fallback, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)


def _fallback(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return list(value)
    return str(value)


def loads(raw: bytes | str, limits: ServerLimits) -> Any:
    """A JSON value within the limits.

    Raises:
        ProtocolError: ``INVALID_JSON``, or ``VALIDATION_ERROR`` for a value beyond the limits.
    """
    if len(raw) > limits.max_message_bytes:
        raise ProtocolError(
            ErrorCode.VALIDATION_ERROR, f"the message has {len(raw)} bytes, {limits.max_message_bytes} are allowed."
        )
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(ErrorCode.INVALID_JSON, f"Invalid JSON: {error}") from None
    brackets = (
        ("[", "{") if isinstance(raw, str) else (b"[", b"{")
    )  # counting them costs less than looking at every value
    if sum(map(raw.count, brackets)) > limits.max_depth and is_deeper(value, limits.max_depth):  # type: ignore[arg-type]
        raise ProtocolError(
            ErrorCode.VALIDATION_ERROR, f"the JSON is nested deeper than {limits.max_depth} levels."
        )
    return value


def parse_frame(raw: bytes | str, limits: ServerLimits) -> Frame:
    """The frame that a client sent.

    Raises:
        ProtocolError: naming what is wrong with it.
    """
    value = loads(raw, limits)
    if not isinstance(value, dict):
        raise ProtocolError(
            ErrorCode.VALIDATION_ERROR, f"a message is a JSON object with 'type' and 'data', not {_kind(value)}."
        )
    kind = value.get("type")
    if kind not in FRAME_TYPES:
        raise ProtocolError(
            ErrorCode.UNKNOWN_TYPE,
            f"Unknown message type: {short(kind)}; expected one of {', '.join(FRAME_TYPES)}.",
        )
    if extra := value.keys() - _KEYS:
        names = ", ".join(short(key) for key in sorted(extra)[:_MAX_ERRORS])
        raise ProtocolError(ErrorCode.VALIDATION_ERROR, f"a message has 'type' and 'data' only, not {names}.")
    data = value.get("data", {} if kind != "step" else None)
    if not isinstance(data, dict):
        raise ProtocolError(
            ErrorCode.VALIDATION_ERROR, f"'data' of a {kind} message is an object, not {_kind(data)}."
        )
    return Frame(kind, data)


def checked(model: type[M], data: Any, what: str) -> M:
    """The data as a model.

    Raises:
        ProtocolError: the model refuses them: which fields, and why; the input itself is not repeated.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = [
            {"type": item["type"], "loc": list(item["loc"])[:8], "msg": item["msg"][:_MAX_SHOWN]}
            for item in error.errors(include_url=False, include_input=False, include_context=False)[:_MAX_ERRORS]
        ]
    lines = "; ".join(f"{'.'.join(map(str, item['loc'])) or what}: {item['msg']}" for item in found)
    raise ProtocolError(ErrorCode.VALIDATION_ERROR, f"Invalid {what}: {lines}", errors=found)


def short(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
