"""One request of an agent and its answer, whatever dialect they are spelled in; and what a dialect is.

A dialect (OpenAI chat completions, OpenAI Responses, Anthropic Messages) is a translator and nothing else: it reads a body
into a :class:`Call`, writes a :class:`Reply` as a body or as events, and spells a :class:`Refusal` as its clients expect
errors. It knows neither sessions nor tokens. What a conversation is, which request continues which, what is sampled and what is
trained is decided behind it, once for all dialects.

None of these values is written to, once it is made. Of most, nothing but this sentence says so: a frozen dataclass is made several times as
slowly, and each request makes some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

import orjson

from torchrl_chat.messages import Message, half_character, is_deeper

# ---------------------------------------------------------------------- what is asked


class Kind(StrEnum):
    """Kinds of refusal; a dialect has a status and a word for each."""

    INVALID = "invalid"
    """The request is malformed, or asks for what is not to be had: 400."""
    CONTEXT = "context"
    """The prompt does not fit in the context: 400."""
    UNAUTHORIZED = "unauthorized"
    """No key, or a wrong one: 401."""
    BUDGET = "budget"
    """The session has used up its budget, or is finished: 403, which no SDK tries again."""
    MISSING = "missing"
    """There is no such session, answer or route: 404."""
    METHOD = "method"
    """The route exists and wants another method: 405."""
    CONFLICT = "conflict"
    """An idempotency key that another request has used: 409."""
    TOO_LARGE = "too_large"
    """The body is too large: 413."""
    BUSY = "busy"
    """Too many requests or sessions at once: 429."""
    ENGINE = "engine"
    """The engine failed, or sampled what cannot be entered: 500."""
    GONE = "gone"
    """The gateway is closing: 503."""


STATUS: Mapping[Kind, int] = {
    Kind.INVALID: 400,
    Kind.CONTEXT: 400,
    Kind.UNAUTHORIZED: 401,
    Kind.BUDGET: 403,
    Kind.MISSING: 404,
    Kind.METHOD: 405,
    Kind.CONFLICT: 409,
    Kind.TOO_LARGE: 413,
    Kind.BUSY: 429,
    Kind.ENGINE: 500,
    Kind.GONE: 503,
}
"""The HTTP status of each kind."""


class Refusal(Exception):
    """A request that is not answered, and why, in a sentence.

    Args:
        message: the sentence: what is wrong and what to do. It may name keys and positions of the request, and holds no secrets.
        kind: see :class:`Kind`.
        param: the key of the request that is refused, ``"tool_choice"``.
        code: a word for programs, such as ``"max_turns"``; the kind's own word if ``None``.
    """

    def __init__(
        self, message: str, kind: Kind = Kind.INVALID, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code or ("context_length_exceeded" if kind is Kind.CONTEXT else None)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.kind]


@dataclass(frozen=True, slots=True)
class Asked:
    """The sampling settings that a request brings; what becomes of them is the session's affair."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """``"temperature"``, ``"top_p"``, ``"top_k"``, ``"min_p"``, ``"seed"``, ``"max_tokens"``, ``"presence_penalty"``,
    ``"frequency_penalty"``, ``"response_format"`` ..., as far as they are given."""
    stop: tuple[str, ...] = ()
    """Strings at which an answer ends; they are left out of what is said."""


@dataclass(slots=True)
class Call:
    """One request of an agent, free of any dialect."""

    messages: tuple[Message, ...]
    """The conversation in the package's form (:mod:`torchrl_chat.messages`): ``tool_calls`` are
    ``{"id", "type": "function", "function": {"name", "arguments": str}}``, reasoning is ``reasoning_content``, results have the
    role ``tool`` and a ``tool_call_id``. With :attr:`previous`: only what follows that answer."""
    tools: tuple[Mapping[str, Any], ...] | None = ()
    """Schemas as chat templates take them, ``{"type": "function", "function": {...}}``; ``None``: those of :attr:`previous`."""
    asked: Asked = Asked()
    """The settings that the request brings."""
    stream: bool = False
    """Whether the answer comes as events."""
    n: int = 1
    """How many answers."""
    model: str = ""
    """The model's name as the request has it; any is served."""
    previous: str | None = None
    """The name of the answer that the request goes on from (:attr:`Reply.name`), where the dialect holds history."""
    instructions: str | None = None
    """A system prompt that stands beside the messages; it becomes the first message. With :attr:`previous`: ``""`` for none, ``None`` for
    the one that stood there."""
    key: str | None = None
    """An idempotency key."""
    retry: int = 0
    """How often the client's library has tried already, as far as it says so."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What only the dialect's writer reads: whether usage was asked for, log-probs ..."""


# ---------------------------------------------------------------------- what is answered
@dataclass(slots=True)
class ToolCall:
    """A call of a tool in an answer."""

    id: str
    """Unique over the server."""
    name: str
    arguments: str
    """A JSON text."""


Finish = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
class Choice:
    """One answer."""

    content: str | None
    """What is said, without reasoning and calls; ``None`` where nothing is said beside calls."""
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    finish: Finish = "stop"
    stopped_by: str | None = None
    """The stop string that ended it, if one did."""
    ids: tuple[int, ...] = ()
    """What was sampled; empty unless the request asks for tokens or their log-probs."""
    pieces: tuple[str, ...] = ()
    """The text of each of them."""
    log_probs: tuple[float, ...] | None = None

    @property
    def message(self) -> Message:
        """The answer as a message, as an agent would send it back."""
        message: Message = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.calls
            ]
        return message


@dataclass(slots=True)
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    completion: int = 0
    """Sampled, in all choices."""
    kept: int = 0
    """Of the prompt, those that an earlier answer of the session had in its sequence already: what a prefix cache holds."""


@dataclass(slots=True)
class Reply:
    """The answer to a request."""

    name: str
    """Unique over the server, of letters and digits; a dialect puts its own prefix before it (``chatcmpl-NAME``)."""
    choices: tuple[Choice, ...]
    usage: Usage
    created: int = 0
    """Seconds since 1970."""
    model: str = ""
    prompt_ids: tuple[int, ...] = ()
    """The prompt's ids; empty unless the request asks for tokens."""


@dataclass(slots=True)
class Delta:
    """A piece of an answer, as it becomes known."""

    choice: int
    kind: Literal["reasoning", "content", "call", "arguments"]
    """``"call"`` begins a call; ``"arguments"`` goes on with it."""
    text: str = ""
    """The piece: of the reasoning, the content, the arguments."""
    call: int = -1
    """Which call of the choice, from 0."""
    id: str = ""
    """Of a call that begins."""
    name: str = ""
    """Of a call that begins."""


def deltas(choice: int, answer: Choice, size: int = 512) -> list[Delta]:
    """A whole answer in pieces of at most ``size`` characters, in the order reasoning, content, calls."""
    found = [
        Delta(choice, kind, text[at : at + size])  # type: ignore[arg-type]
        for kind, text in (("reasoning", answer.reasoning or ""), ("content", answer.content or ""))
        for at in range(0, len(text), size)
    ]
    for place, call in enumerate(answer.calls):
        found.append(Delta(choice, "call", "", place, call.id, call.name))
        found.append(Delta(choice, "arguments", call.arguments, place))
    return found


# ---------------------------------------------------------------------- a dialect
class EventWriter(Protocol):
    """Writes one streamed answer; made for each request, so it may count what it has written."""

    def begin(self, name: str, created: int, model: str, usage: Usage) -> bytes:
        """What comes first, before anything is sampled; ``usage`` has the prompt's tokens."""
        ...

    def delta(self, delta: Delta) -> bytes:
        """A piece of an answer."""
        ...

    def end(self, reply: Reply) -> bytes:
        """What comes behind the last piece; every piece of ``reply`` was written."""
        ...

    def fail(self, refusal: Refusal) -> bytes:
        """The end of a stream that cannot go on."""
        ...

    def ping(self) -> bytes:
        """Something that clients ignore: it keeps a quiet connection open."""
        ...


class Dialect(Protocol):
    """A dialect; one object serves all requests, so it holds nothing of any."""

    name: str
    """As docs and reports call it."""
    path: str
    """Where its requests go, below the base URL: ``"/chat/completions"``."""
    # A dialect may have a `history`, too, the key under which a body's history stands: what was read of it is not read again, if `parse`
    # asks `torchrl_chat.gateway.bodies.begun`.
    count_path: str | None
    """Where tokens are counted without sampling, if the dialect has that."""

    def parse(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Call:
        """The request.

        Args:
            body: the body, a JSON object.
            headers: the headers, names in lower case.

        Raises:
            Refusal: it is malformed, or asks for what is not to be had.
        """
        ...

    def write(self, call: Call, reply: Reply) -> Mapping[str, Any]:
        """The body of an answer."""
        ...

    def events(self, call: Call) -> EventWriter:
        """What writes the answer as events."""
        ...

    def refusal(self, refusal: Refusal) -> Mapping[str, Any]:
        """The body of an error; its status is the refusal's own."""
        ...

    def count(self, tokens: int) -> Mapping[str, Any]:
        """The body that says how many tokens a prompt has."""
        ...


# ---------------------------------------------------------------------- what dialects share
_DIGITS = bytes(48 if 48 <= byte <= 57 else 32 for byte in range(256))
_LONG = b"0" * 19  # a long integer, when all digits are noughts: ten times as fast to find as by a pattern


def loads(raw: bytes, max_depth: int = 64) -> Any:
    """A JSON value, integers of any size exact.

    Raises:
        Refusal: it is no JSON, or nested too deep.
    """
    import json

    try:
        # orjson makes floats of integers beyond 64 bits.
        value = json.loads(raw, parse_constant=_no_number) if _LONG in raw.translate(_DIGITS) else orjson.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else _where(error)
        raise Refusal(f"the body is not JSON: {reason}.") from None
    if (b"\\ud" in raw or b"\\uD" in raw) and half_character(json.dumps(value, ensure_ascii=False)) is not None:
        raise Refusal("the body has half a surrogate pair: no text that can be encoded.")
    if raw.count(b"[") + raw.count(b"{") > max_depth and is_deeper(value, max_depth):
        raise Refusal(f"the body is nested deeper than {max_depth} levels.")
    return value


def dumps(value: Any) -> bytes:
    """A JSON text. A value may hold integers of any size, as those have that :func:`loads` read."""
    import json

    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        return json.dumps(value, ensure_ascii=False, default=str).encode()


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _where(error: Exception) -> str:
    # The message alone: a decoder's error holds the document.
    line, column = getattr(error, "lineno", None), getattr(error, "colno", None)
    said = str(getattr(error, "msg", error))[:100]
    return said if line is None else f"{said.partition(':')[0]}, line {line}, column {column}"


def given(body: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], expected: str) -> Any:
    """The value of a key, ``None`` where it is absent or null.

    Raises:
        Refusal: it is of another type.
    """
    value = body.get(key)
    if value is None:
        return None
    # A boolean is an integer for Python.
    if not isinstance(value, kinds) or (
        isinstance(value, bool) and bool not in (kinds if isinstance(kinds, tuple) else (kinds,))
    ):
        raise Refusal(f"{key!r} is {_named(value)}: expected {expected}.", param=key)
    return value


def number(body: Mapping[str, Any], key: str, least: float, most: float = float("inf"), whole: bool = False) -> Any:
    """A number of a request within bounds, ``None`` where it is absent or null.

    Raises:
        Refusal: it is none, or beyond its bounds.
    """
    value = given(body, key, int if whole else (int, float), "an integer" if whole else "a number")
    if value is not None and not least <= value <= most:
        bounds = f"from {least:g} to {most:g}" if most < float("inf") else f"of at least {least:g}"
        raise Refusal(f"{key!r} is {str(value)[:20]}: expected a number {bounds}.", param=key)
    return value


def text_of(content: Any, where: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """The text of a content that is a string, or a list of parts of these kinds.

    Raises:
        Refusal: a part is of another kind (an image, say), or is no text.
    """
    if isinstance(content, str):
        return _encodable(content, where)
    if not isinstance(content, list):
        raise Refusal(f"{where} is {_named(content)}: expected a string, or a list of parts.", param=where)
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            shown = repr(kind)[:40] if isinstance(part, dict) else _named(part)
            raise Refusal(
                f"{where}[{place}] is of the type {shown}: this gateway takes {' and '.join(kinds)} parts; images, sounds "
                "and files do not reach the model here.",
                param=where,
            )
        said = part.get("text", part.get("refusal") if kind == "refusal" else None)
        if not isinstance(said, str):
            raise Refusal(f"{where}[{place}].text is {_named(said)}: expected a string.", param=where)
        texts.append(_encodable(said, f"{where}[{place}]"))
    return "".join(texts)


def _encodable(text: str, where: str) -> str:
    if (at := half_character(text)) is not None:
        raise Refusal(
            f"{where} has half a surrogate pair at position {at}: no text that can be encoded.", param=where
        )
    return text


def tool_schema(function: Any, where: str) -> dict[str, Any]:
    """A function's schema as chat templates take it: name, description and parameters; what else is there does not reach the model.

    Raises:
        Refusal: it has no name, or parameters that are no object.
    """
    if not isinstance(function, dict):
        raise Refusal(f"{where} is {_named(function)}: expected an object with a name.", param="tools")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise Refusal(f"{where}.name is {_named(name)}: expected the function's name.", param="tools")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise Refusal(
            f"{where}.parameters is {_named(parameters)}: expected a JSON schema, an object.", param="tools"
        )
    schema: dict[str, Any] = {"name": name}
    description = function.get("description")
    if description is not None:
        if not isinstance(description, str):
            raise Refusal(f"{where}.description is {_named(description)}: expected a string.", param="tools")
        schema["description"] = _encodable(description, f"{where}.description")
    return {"type": "function", "function": {**schema, "parameters": parameters}}


def retries(headers: Mapping[str, str]) -> tuple[str | None, int]:
    """The idempotency key and the number of tries before this one, as headers tell them."""
    try:
        count = int(headers.get("x-stainless-retry-count", "0"))
    except ValueError:
        count = 0
    return headers.get("idempotency-key") or headers.get("x-idempotency-key") or None, max(count, 0)


def _named(value: Any) -> str:
    names: dict[type, str] = {
        type(None): "absent or null",
        bool: "a boolean",
        str: "a string",
        list: "a list",
        dict: "an object",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"a {type(value).__name__}")


named = _named
"""What a value of a request is, in words: requests are not repeated in errors."""
