"""OpenAI Responses: ``POST /v1/responses``.

Written from OpenAI's API reference, from the SDK's types, and from what agent frameworks send (``docs/refused.md`` has the refusals). An
answer is up to three kinds of items: a ``reasoning`` item, whose text is the model's own; a ``message``, unless blanks are all that it says
beside calls; and a ``function_call`` for each call. A request may send items back, or name the answer that it goes on from
(``previous_response_id``): the session remembers every answer, whatever ``store`` says, which is only repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchrl_chat.gateway.bodies import begun
from torchrl_chat.gateway.calls import (
    Asked,
    Call,
    Choice,
    Delta,
    Kind,
    Refusal,
    Reply,
    Usage,
    given,
    named,
    number,
    retries,
    text_of,
    tool_schema,
)
from torchrl_chat.gateway.dialects.shared import (
    OPENAI_ERRORS,
    event,
    log_prob_entries,
    refuse,
    settings,
    shows_tools,
)
from torchrl_chat.messages import Message

_ROLES = ("system", "developer", "user", "assistant")
_INPUT = ("input_text", "text")
_OUTPUT = ("output_text", "refusal", "text")
_NUMBERS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_LOG_PROBS = "message.output_text.logprobs"
_REFUSED = {
    "conversation": "'conversation' is not to be had: name the answer to go on from ('previous_response_id'), or send all items.",
    "background": "'background' is not to be had: an answer is waited for, or streamed.",
    "prompt": "'prompt' is not to be had: there are no stored prompts here. Send 'instructions' and 'input'.",
    "context_management": "'context_management' is not to be had: what the model sees is what the agent sends.",
    "moderation": "'moderation' is not to be had: nothing is moderated here.",
    "stop": "'stop' is none of this dialect's keys: chat completions take it.",
}
_OWN = re.compile(r"^(?:rs|msg|fc)_([0-9a-z]+?)(?:_[0-9]+)?$")
"""The names that items have here; a client may put its own in their place."""


class Responses:
    """The dialect."""

    name = "responses"
    path = "/responses"
    history = "input"
    count_path: str | None = "/responses/input_tokens"

    # ------------------------------------------------------------------ reading
    def parse(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Call:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        refuse(body, _REFUSED)
        tools = _tools(given(body, "tools", list, "a list of tools") or ())
        notes: list[str] = []
        if given(body, "parallel_tool_calls", bool, "true or false") is False:
            notes.append("'parallel_tool_calls': false is not enforced: what the policy samples is what it says.")
        shown = shows_tools(body.get("tool_choice"), tools, notes)
        if given(body, "truncation", str, "'auto' or 'disabled'") == "auto":
            notes.append("'truncation': 'auto' is not done: a prompt that does not fit is refused.")
        if number(body, "top_logprobs", 0, 20, whole=True):
            raise Refusal(
                "'top_logprobs' is not to be had: log-probs are those of the sampled tokens alone.",
                param="top_logprobs",
            )
        number(body, "n", 1, 1, whole=True)
        include = given(body, "include", list, "a list of words") or ()
        previous = given(body, "previous_response_id", str, "the id of an answer")
        instructions = given(body, "instructions", str, "a string")
        if instructions is not None:
            instructions = text_of(instructions, "instructions")
        idempotency, retry = retries(headers)
        return Call(
            messages=tuple(_messages(body.get("input"))),
            tools=tools if shown else (),
            asked=Asked(_settings(body)),
            stream=given(body, "stream", bool, "true or false") or False,
            model=text_of(given(body, "model", str, "a string") or "", "model"),
            previous=None if previous is None else previous.removeprefix("resp_"),
            # They are not carried over from the answer that is named.
            instructions=instructions if instructions or previous is None else "",
            key=idempotency,
            retry=retry,
            told={
                "log_probs": _LOG_PROBS in include,
                "notes": tuple(notes),
                "said": {
                    "instructions": instructions,
                    "metadata": given(body, "metadata", dict, "an object") or {},
                    "max_output_tokens": body.get("max_output_tokens"),
                    "parallel_tool_calls": body.get("parallel_tool_calls", True) is not False,
                    "previous_response_id": previous,
                    "reasoning": given(body, "reasoning", dict, "an object"),
                    "store": given(body, "store", bool, "true or false") is not False,
                    "text": body.get("text") or {"format": {"type": "text"}},
                    "tool_choice": body.get("tool_choice") or "auto",
                    "tools": list(body.get("tools") or ()),
                    "truncation": body.get("truncation") or "disabled",
                },
            },
        )

    # ------------------------------------------------------------------ writing
    def write(self, call: Call, reply: Reply) -> Mapping[str, Any]:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        choice = reply.choices[0]
        cut = choice.finish == "length"
        return {
            **_head(call, reply.name, reply.created, reply.model),
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": _items(reply.name, choice, bool(call.told.get("log_probs"))),
            "usage": {
                "input_tokens": reply.usage.prompt,
                "input_tokens_details": {"cached_tokens": reply.usage.kept, "cache_write_tokens": 0},
                "output_tokens": reply.usage.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": reply.usage.prompt + reply.usage.completion,
            },
        }

    def events(self, call: Call) -> ResponseEvents:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        return ResponseEvents(call)

    def refusal(self, refusal: Refusal) -> Mapping[str, Any]:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        return {"error": _error(refusal)}

    def count(self, tokens: int) -> Mapping[str, Any]:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        return {"object": "response.input_tokens", "input_tokens": tokens}


class ResponseEvents:
    """Writes the events of a stream: each item begins, grows and ends before the next one begins."""

    def __init__(self, call: Call):
        self._call = call
        self._name, self._number, self._index = "", 0, -1
        self._item: dict[str, Any] | None = None
        self._text: list[str] = []

    def begin(self, name: str, created: int, model: str, usage: Usage) -> bytes:
        """The answer, without anything in it."""
        self._name = name
        head = _head(self._call, name, created, model)
        return self._event("response.created", response=head) + self._event("response.in_progress", response=head)

    def delta(self, delta: Delta) -> bytes:
        """A piece; where it belongs to another item than the last one, that ends."""
        if delta.kind == "call":
            item = _call_item(self._name, delta.call, delta.id, delta.name, "", "in_progress")
            return self._end() + self._begin(item)
        if delta.kind == "arguments":
            return self._grow("response.function_call_arguments.delta", delta.text)
        begun = b""
        kind = "reasoning" if delta.kind == "reasoning" else "message"
        if self._item is None or self._item["type"] != kind:
            make = _reasoning_item if kind == "reasoning" else _message_item
            begun = self._end() + self._begin(make(self._name, None, "in_progress"))
        if kind == "reasoning":
            return begun + self._grow("response.reasoning_text.delta", delta.text, content_index=0)
        return begun + self._grow("response.output_text.delta", delta.text, content_index=0, logprobs=[])

    def end(self, reply: Reply) -> bytes:
        """The end of the last item, and the whole answer."""
        body = Responses().write(self._call, reply)
        out = []
        if len(body["output"]) > self._index + 1:  # an empty text has no piece
            out += [self._end(), self._begin(_message_item(self._name, None, "in_progress"))]
        out.append(self._end(body["output"][-1]))
        out.append(self._event(f"response.{body['status']}", response=body))
        return b"".join(out)

    def fail(self, refusal: Refusal) -> bytes:
        """An error in the middle: as the reference has it, and under ``error`` besides, where the SDK looks."""
        error = _error(refusal)
        return self._event("error", code=error["code"], message=error["message"], param=error["param"], error=error)

    def ping(self) -> bytes:
        """A comment."""
        return b": waiting\n\n"

    def _event(self, kind: str, **more: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **more}, kind)

    def _begin(self, item: dict[str, Any]) -> bytes:
        self._item, self._index, self._text = item, self._index + 1, []
        out = self._event("response.output_item.added", output_index=self._index, item=item)
        if (part := _part(item, "")) is not None:
            out += self._of_item("response.content_part.added", content_index=0, part=part)
        return out

    def _grow(self, kind: str, text: str, **more: Any) -> bytes:
        self._text.append(text)
        return self._of_item(kind, delta=text, **more)

    def _end(self, whole: dict[str, Any] | None = None) -> bytes:
        """The end of an item, if one has begun: as it is in the answer, or of what was told of it."""
        item, text = self._item, "".join(self._text)
        if item is None:
            return b""
        kind, self._item = item["type"], None
        if kind == "function_call":
            whole = whole or {**item, "arguments": text, "status": "completed"}
            out = self._of_item("response.function_call_arguments.done", item, name=item["name"], arguments=text)
        else:
            whole = whole or {**item, "content": [_part(item, text)], "status": "completed"}
            part = whole["content"][0]
            more = {"logprobs": part["logprobs"]} if kind == "message" else {}
            done = "response.output_text.done" if kind == "message" else "response.reasoning_text.done"
            out = self._of_item(done, item, content_index=0, text=text, **more)
            out += self._of_item("response.content_part.done", item, content_index=0, part=part)
        return out + self._event("response.output_item.done", output_index=self._index, item=whole)

    def _of_item(self, kind: str, item: Mapping[str, Any] | None = None, **more: Any) -> bytes:
        ident = (item or self._item or {})["id"]
        return self._event(kind, item_id=ident, output_index=self._index, **more)


# ---------------------------------------------------------------------- parts of a request
def _messages(said: Any) -> Iterator[Message]:
    """Items as messages: those of one answer are one message."""
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    if not isinstance(said, list) or not said:
        found = "empty" if isinstance(said, (list, str)) else named(said)
        raise Refusal(f"'input' is {found}: expected a string, or a list of items.", param="input")
    answer: Message | None = None
    name: str | None = None
    read, known = begun(said)
    yield from known
    for place in range(read, len(said)):
        item, where = said[place], f"input[{place}]"
        if not isinstance(item, dict):
            raise Refusal(f"{where} is {named(item)}: expected an item, an object.", param="input")
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind in ("reasoning", "function_call") or (kind == "message" and item.get("role") == "assistant"):
            own = _OWN.match(item["id"]) if isinstance(item.get("id"), str) else None
            if answer is not None and _is_next(answer, kind, name, own and own[1]):
                yield _whole(answer)
                answer, name = None, None
            answer = answer or {"role": "assistant", "content": None}
            name = name or (own and own[1])
            _add(answer, item, kind, where)
            continue
        if answer is not None:
            yield _whole(answer)
            answer, name = None, None
        yield _other(item, kind, where)
    if answer is not None:
        yield _whole(answer)


def _is_next(answer: Message, kind: str, name: str | None, own: str | None) -> bool:
    """Whether an item belongs to another answer than the items before it."""
    if name is not None and own is not None:
        return name != own
    if kind == "function_call":
        return False
    has = answer.get("tool_calls") or answer["content"] is not None
    return bool(has or (kind == "reasoning" and answer.get("reasoning_content") is not None))


def _add(answer: Message, item: Mapping[str, Any], kind: str, where: str) -> None:
    if kind == "message":
        content = text_of(item.get("content"), f"{where}.content", _OUTPUT)
        answer["content"] = content if answer["content"] is None else answer["content"] + content
    elif kind == "reasoning":
        # A summary and what is encrypted are not the model's words; an answer may come back without its reasoning.
        parts = given(item, "content", list, f"in {where} a list of parts")
        if parts:
            text = text_of(parts, f"{where}.content", ("reasoning_text", "text"))
            answer["reasoning_content"] = answer.get("reasoning_content", "") + text
    else:
        answer.setdefault("tool_calls", []).append(_call(item, where))


def _whole(answer: Message) -> Message:
    if answer["content"] is None and not answer.get("tool_calls"):
        answer["content"] = ""
    return answer


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in ("call_id", "name"):
        if not isinstance(item.get(key), str) or not item[key]:
            raise Refusal(f"{where}.{key} is {named(item.get(key))}: expected a string.", param="input")
    arguments = item.get("arguments")
    if arguments is not None and not isinstance(arguments, str):
        raise Refusal(f"{where}.arguments is {named(arguments)}: expected a JSON text.", param="input")
    text = text_of(arguments or "{}", f"{where}.arguments")
    return {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": text}}


def _other(item: Mapping[str, Any], kind: Any, where: str) -> Message:
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            shown = repr(role)[:40] if isinstance(role, str) else named(role)
            raise Refusal(f"{where}.role is {shown}: expected one of {', '.join(_ROLES)}.", param="input")
        return {"role": role, "content": text_of(item.get("content"), f"{where}.content", _INPUT)}
    if kind == "function_call_output":
        ident = item.get("call_id")
        if not isinstance(ident, str) or not ident:
            raise Refusal(
                f"{where}.call_id is {named(ident)}: expected the id of the call that it answers.", param="input"
            )
        text = text_of(item.get("output"), f"{where}.output", (*_INPUT, "output_text"))
        return {"role": "tool", "tool_call_id": ident, "content": text}
    if kind == "item_reference":
        raise Refusal(
            f"{where} is a reference: send the item itself, or name its answer in 'previous_response_id'.",
            param="input",
        )
    shown = repr(kind)[:40] if isinstance(kind, str) else named(kind)
    raise Refusal(
        f"{where}.type is {shown}: expected 'message', 'reasoning', 'function_call' or 'function_call_output'.",
        param="input",
    )


def _tools(tools: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    found = []
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise Refusal(f"tools[{place}] is {named(tool)}: expected an object.", param="tools")
        if (kind := tool.get("type", "function")) != "function":
            raise Refusal(
                f"tools[{place}].type is {str(kind)[:40]!r}: only functions are called here; there are no hosted tools.",
                param="tools",
            )
        found.append(tool_schema(tool, f"tools[{place}]"))
    return tuple(found)


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = settings(body, _NUMBERS)
    if (limit := number(body, "max_output_tokens", 1, whole=True)) is not None:
        found["max_tokens"] = limit
    wanted = given(given(body, "text", dict, "an object") or {}, "format", dict, "in 'text' an object")
    if wanted is not None and wanted.get("type") != "text":
        if wanted.get("type") not in ("json_object", "json_schema"):
            raise Refusal(
                "'text.format.type' is unknown: expected 'text', 'json_object' or 'json_schema'.", param="text"
            )
        # As chat completions spell it: engines know that form.
        inner = {key: value for key, value in wanted.items() if key != "type"}
        form = {"json_schema": inner} if wanted["type"] == "json_schema" else {}
        found["response_format"] = {"type": wanted["type"], **form}
    return found


# ---------------------------------------------------------------------- parts of an answer
def _head(call: Call, name: str, created: int, model: str) -> dict[str, Any]:
    """An answer in progress. Its sampling settings are null: they are the session's."""
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "temperature": None,
        "top_p": None,
        "usage": None,
        **call.told.get("said", {}),
    }


def _items(name: str, choice: Choice, log_probs: bool) -> list[dict[str, Any]]:
    items = []
    if choice.reasoning:
        items.append(_reasoning_item(name, choice.reasoning, "completed"))
    if choice.content or not choice.calls:
        item = _message_item(name, choice.content or "", "incomplete" if choice.finish == "length" else "completed")
        if log_probs:
            item["content"][0]["logprobs"] = log_prob_entries(choice)
        items.append(item)
    items += [
        _call_item(name, place, call.id, call.name, call.arguments, "completed")
        for place, call in enumerate(choice.calls)
    ]
    return items


def _reasoning_item(name: str, text: str | None, status: str) -> dict[str, Any]:
    item: dict[str, Any] = {"id": f"rs_{name}", "type": "reasoning", "summary": [], "status": status}
    return {**item, "content": [] if text is None else [_part(item, text)], "encrypted_content": None}


def _message_item(name: str, text: str | None, status: str) -> dict[str, Any]:
    item: dict[str, Any] = {"id": f"msg_{name}", "type": "message", "role": "assistant", "status": status}
    return {**item, "content": [] if text is None else [_part(item, text)]}


def _call_item(name: str, place: int, ident: str, function: str, arguments: str, status: str) -> dict[str, Any]:
    return {
        "id": f"fc_{name}_{place}",
        "type": "function_call",
        "call_id": ident,
        "name": function,
        "arguments": arguments,
        "status": status,
    }


def _part(item: Mapping[str, Any], text: str) -> dict[str, Any] | None:
    """The one part that an item's text is; ``None`` for a call."""
    if item["type"] == "reasoning":
        return {"type": "reasoning_text", "text": text}
    if item["type"] == "message":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return None


def _error(refusal: Refusal) -> dict[str, Any]:
    code = refusal.code
    if refusal.kind is Kind.MISSING and refusal.param == "previous_response_id":
        code = "previous_response_not_found"
    kind = OPENAI_ERRORS.get(refusal.kind, "invalid_request_error")
    return {"message": refusal.message, "type": kind, "param": refusal.param, "code": code}
