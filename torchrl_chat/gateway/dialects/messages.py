"""Anthropic Messages: ``POST /v1/messages``, and ``POST /v1/messages/count_tokens``.

Written from Anthropic's API reference, from the SDK's types, and from what agent frameworks send (``docs/refused.md`` has the refusals). An
answer is up to three kinds of blocks: ``thinking``, whose text is the model's own, with a signature that says nothing; ``text``, unless blanks
are all that it says beside calls; and ``tool_use`` for each call. Prompts are not cached here: what a prefix cache could hold is told
as read from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from torchrl_chat.gateway.bodies import begun
from torchrl_chat.gateway.calls import (
    Asked,
    Call,
    Choice,
    Delta,
    Kind,
    Refusal,
    Reply,
    ToolCall,
    Usage,
    given,
    named,
    number,
    retries,
    text_of,
    tool_schema,
)
from torchrl_chat.gateway.dialects.shared import event, refuse, settings, shows_tools, stop_strings
from torchrl_chat.messages import Message

_ROLES = ("user", "assistant", "system")
_NUMBERS = {"temperature": (0.0, 1.0), "top_p": (0.0, 1.0)}
_ERRORS: Mapping[Kind, str] = {
    Kind.UNAUTHORIZED: "authentication_error",
    Kind.BUDGET: "permission_error",
    Kind.MISSING: "not_found_error",
    Kind.TOO_LARGE: "request_too_large",
    Kind.BUSY: "rate_limit_error",
    Kind.ENGINE: "api_error",
    Kind.GONE: "overloaded_error",
}
_FINISHES = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_REFUSED = {
    "mcp_servers": "'mcp_servers' is not to be had: tools run at the agent. Send them in 'tools'.",
    "container": "'container' is not to be had: nothing runs at this server.",
    "context_management": "'context_management' is not to be had: what the model sees is what the agent sends.",
    "compaction": "'compaction' is not to be had: what the model sees is what the agent sends.",
    "fallbacks": "'fallbacks' is not to be had: there is one model here.",
}
_NO_THREADS = (
    "thread_unsupported_request"  # the word by which the SDK's tool runner sends its whole history from then on
)
_UNREAD = "INVALID_JSON"  # the key under which arguments go that are no object: a rule of the gateway reads it (A3)


class Messages:
    """The dialect."""

    name = "messages"
    path = "/messages"
    history = "messages"
    count_path: str | None = "/messages/count_tokens"

    # ------------------------------------------------------------------ reading
    def parse(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Call:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        if body.get("thread") is not None:
            raise Refusal(
                "'thread' is not to be had: history is not held here. Send the whole conversation, without 'thread'.",
                param="thread",
                code=_NO_THREADS,
            )
        refuse(body, _REFUSED)
        tools = _tools(given(body, "tools", list, "a list of tools") or ())
        notes: list[str] = []
        choice = given(body, "tool_choice", dict, "an object with a 'type'") or {"type": "auto"}
        if given(choice, "disable_parallel_tool_use", bool, "in 'tool_choice' true or false"):
            notes.append("'disable_parallel_tool_use' is not enforced: what the policy samples is what it says.")
        word = choice.get("type")
        # As other dialects have it: an object names a tool, and what is no choice is none.
        shown = shows_tools({} if word == "tool" else "" if word is None else word, tools, notes, "any")
        thinking = given(body, "thinking", dict, "an object") or {}
        system = body.get("system")
        idempotency, retry = retries(headers)
        return Call(
            messages=tuple(_messages(body.get("messages"))),
            tools=tools if shown else (),
            asked=Asked(_settings(body), stop_strings(body, "stop_sequences")),
            stream=given(body, "stream", bool, "true or false") or False,
            model=text_of(given(body, "model", str, "a string") or "", "model"),
            instructions=None if system is None else text_of(system, "system") or None,
            key=idempotency,
            retry=retry,
            told={"notes": tuple(notes), "omitted": thinking.get("display") == "omitted"},
        )

    # ------------------------------------------------------------------ writing
    def write(self, call: Call, reply: Reply) -> Mapping[str, Any]:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        choice = reply.choices[0]
        return {
            **_head(reply.name, reply.model),
            "content": _blocks(reply.name, choice, bool(call.told.get("omitted"))),
            **_end_of(choice),
            "usage": _usage(reply.usage),
        }

    def events(self, call: Call) -> MessageEvents:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        return MessageEvents(call)

    def refusal(self, refusal: Refusal) -> Mapping[str, Any]:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        error: dict[str, Any] = {
            "type": _ERRORS.get(refusal.kind, "invalid_request_error"),
            "message": refusal.message,
        }
        if refusal.code is not None:
            error["details"] = {"error_code": refusal.code}
        return {"type": "error", "error": error, "request_id": None}

    def count(self, tokens: int) -> Mapping[str, Any]:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        return {"input_tokens": tokens}


class MessageEvents:
    """Writes the events of a stream: each block starts, grows and stops before the next one starts."""

    def __init__(self, call: Call):
        self._omitted = bool(call.told.get("omitted"))
        self._name, self._index, self._kind = "", -1, ""
        self._arguments: list[str] = []

    def begin(self, name: str, created: int, model: str, usage: Usage) -> bytes:
        """The message, without anything in it."""
        self._name = name
        ends = {"stop_reason": None, "stop_sequence": None, "stop_details": None}
        message = {**_head(name, model), "content": [], **ends, "usage": _usage(usage)}
        return event({"type": "message_start", "message": message}, "message_start")

    def delta(self, delta: Delta) -> bytes:
        """A piece; where it belongs to another block than the last one, that stops."""
        if delta.kind == "call":
            block = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
            return self._stop() + self._start("tool_use", block)
        if delta.kind == "arguments":
            self._arguments.append(delta.text)
            return b""
        kind = "thinking" if delta.kind == "reasoning" else "text"
        begun = b""
        if kind != self._kind:
            block = _thinking("", "") if kind == "thinking" else {"type": "text", "text": ""}
            begun = self._stop() + self._start(kind, block)
        if kind == "thinking" and self._omitted:
            return begun
        return begun + self._grow(f"{kind}_delta", kind, delta.text)

    def end(self, reply: Reply) -> bytes:
        """The last block stops; why the answer ended, and its tokens."""
        choice, out = reply.choices[0], [self._stop()]
        if not choice.content and not choice.calls:  # an empty text has no piece
            out += [self._start("text", {"type": "text", "text": ""}), self._stop()]
        last = {"type": "message_delta", "delta": _end_of(choice), "usage": _usage(reply.usage)}
        return b"".join([*out, event(last, "message_delta"), event({"type": "message_stop"}, "message_stop")])

    def fail(self, refusal: Refusal) -> bytes:
        """An error in the middle: the SDK raises it."""
        return event(Messages().refusal(refusal), "error")

    def ping(self) -> bytes:
        """The dialect's own."""
        return event({"type": "ping"}, "ping")

    def _start(self, kind: str, block: Mapping[str, Any]) -> bytes:
        self._kind, self._index, self._arguments = kind, self._index + 1, []
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return event(start, "content_block_start")

    def _grow(self, kind: str, key: str, text: str) -> bytes:
        delta = {"type": kind, key: text}
        return event({"type": "content_block_delta", "index": self._index, "delta": delta}, "content_block_delta")

    def _stop(self) -> bytes:
        kind, self._kind = self._kind, ""
        if not kind:
            return b""
        last = b""
        if kind == "thinking":
            last = self._grow("signature_delta", "signature", _signature(self._name))
        elif kind == "tool_use":  # what is told of a call is told at once, as an object
            last = self._grow("input_json_delta", "partial_json", _object("".join(self._arguments)))
        return last + event({"type": "content_block_stop", "index": self._index}, "content_block_stop")


# ---------------------------------------------------------------------- parts of a request
def _messages(said: Any) -> Iterator[Message]:
    if not isinstance(said, list) or not said:
        found = "empty" if isinstance(said, list) else named(said)
        raise Refusal(f"'messages' is {found}: expected a list of messages.", param="messages")
    read, known = begun(said)
    yield from known
    for place in range(read, len(said)):
        message, where = said[place], f"messages[{place}]"
        if not isinstance(message, dict):
            raise Refusal(
                f"{where} is {named(message)}: expected an object with 'role' and 'content'.", param="messages"
            )
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            shown = repr(role)[:40] if isinstance(role, str) else named(role)
            raise Refusal(f"{where}.role is {shown}: expected one of {', '.join(_ROLES)}.", param="messages")
        if role == "assistant":
            if place == len(said) - 1:
                raise Refusal(
                    f"{where} is the last, and of the assistant: an answer begins with what the model samples, and not with "
                    "words that are given to it.",
                    param="messages",
                )
            yield _answer(content, f"{where}.content")
        elif role == "user" and isinstance(content, list):
            yield from _user(content, f"{where}.content")
        else:
            yield {"role": role, "content": text_of(content, f"{where}.content")}


def _user(blocks: Sequence[Any], where: str) -> Iterator[Message]:
    """Results are messages of their own; the texts between them are one."""
    texts: list[Any] = []
    for place, block in enumerate(blocks):
        if not isinstance(block, dict) or block.get("type") != "tool_result":
            texts.append(_text(block, f"{where}[{place}]"))
            continue
        if any(texts):
            yield {"role": "user", "content": "".join(texts)}
            texts = []
        ident, content = block.get("tool_use_id"), block.get("content")
        if not isinstance(ident, str) or not ident:
            raise Refusal(
                f"{where}[{place}].tool_use_id is {named(ident)}: expected the id of the call that it answers.",
                param="messages",
            )
        given(block, "is_error", bool, f"in {where}[{place}] true or false")
        text = "" if content is None else text_of(content, f"{where}[{place}].content")
        yield {"role": "tool", "tool_call_id": ident, "content": text}
    if any(texts) or len(texts) == len(blocks):  # an empty text beside results says nothing
        yield {"role": "user", "content": "".join(texts)}


def _answer(content: Any, where: str) -> Message:
    if isinstance(content, str):
        return {"role": "assistant", "content": text_of(content, where)}
    if not isinstance(content, list):
        raise Refusal(f"{where} is {named(content)}: expected a string, or a list of blocks.", param="messages")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for place, block in enumerate(content):
        at = f"{where}[{place}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            thoughts.append(text_of([{"type": "text", "text": block.get("thinking")}], at))
        elif kind == "tool_use":
            calls.append(_call(block, at))
        elif kind != "redacted_thinking":  # which nobody here can read: as an answer without its reasoning
            texts.append(_text(block, at))
    message: Message = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _text(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind != "text":
        shown = repr(kind)[:40] if isinstance(block, dict) else named(block)
        raise Refusal(
            f"{where} is of the type {shown}: this gateway takes texts, calls and their results; images, documents and what "
            "other servers run do not reach the model here.",
            param="messages",
        )
    return text_of([block], where)


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in ("id", "name"):
        if not isinstance(block.get(key), str) or not block[key]:
            raise Refusal(f"{where}.{key} is {named(block.get(key))}: expected a string.", param="messages")
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise Refusal(f"{where}.input is {named(arguments)}: expected an object.", param="messages")
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": arguments}}


def _tools(tools: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    found = []
    for place, tool in enumerate(tools):
        where = f"tools[{place}]"
        if not isinstance(tool, dict):
            raise Refusal(f"{where} is {named(tool)}: expected an object.", param="tools")
        if (kind := tool.get("type") or "custom") != "custom":
            raise Refusal(
                f"{where}.type is {str(kind)[:40]!r}: tools have a schema of their own here; those that a model was trained on, "
                "or that a server runs, are not to be had.",
                param="tools",
            )
        if not isinstance(schema := tool.get("input_schema"), dict):
            raise Refusal(
                f"{where}.input_schema is {named(schema)}: expected a JSON schema, an object.", param="tools"
            )
        plain = {"name": tool.get("name"), "description": tool.get("description"), "parameters": schema}
        found.append(tool_schema(plain, where))
    return tuple(found)


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = settings(body, _NUMBERS, ("top_k",))
    if (limit := number(body, "max_tokens", 1, whole=True)) is not None:
        found["max_tokens"] = limit
    config = given(body, "output_config", dict, "an object") or {}
    wanted = given(config, "format", dict, "in 'output_config' an object")
    if wanted is None:
        wanted = given(body, "output_format", dict, "an object")
    if wanted is not None:
        if wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), dict):
            raise Refusal("'output_config.format' is no 'json_schema' with a 'schema'.", param="output_config")
        # As chat completions spell it: engines know that form.
        schema = {"name": "answer", "schema": wanted["schema"]}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    return found


# ---------------------------------------------------------------------- parts of an answer
def _head(name: str, model: str) -> dict[str, Any]:
    return {"id": f"msg_{name}", "type": "message", "role": "assistant", "model": model}


def _blocks(name: str, choice: Choice, omitted: bool) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if choice.reasoning:
        blocks.append(_thinking("" if omitted else choice.reasoning, _signature(name)))
    if choice.content or not choice.calls:
        blocks.append({"type": "text", "text": choice.content or ""})
    return [*blocks, *map(_tool_use, choice.calls)]


def _thinking(text: str, signature: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": signature}


def _tool_use(call: ToolCall) -> dict[str, Any]:
    # As it was sampled: reading and writing it would make other numbers.
    arguments = orjson.Fragment(_object(call.arguments))
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _object(arguments: str) -> str:
    """A JSON text of an object: the arguments, or what stands for them."""
    try:
        if isinstance(json.loads(arguments, parse_constant=_none), dict):
            return arguments
    except (ValueError, RecursionError):
        pass
    return json.dumps({_UNREAD: arguments}, ensure_ascii=False)


def _none(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _signature(name: str) -> str:
    """Clients send it back as it is; nothing is read from it."""
    return f"sig_{name}"


def _end_of(choice: Choice) -> dict[str, Any]:
    stopped = choice.finish == "stop" and choice.stopped_by is not None
    return {
        "stop_reason": "stop_sequence" if stopped else _FINISHES[choice.finish],
        "stop_sequence": choice.stopped_by if stopped else None,
        "stop_details": None,
    }


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt - usage.kept,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.kept,
        "output_tokens": usage.completion,
    }
