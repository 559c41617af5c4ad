"""OpenAI chat completions: ``POST /v1/chat/completions``.

Written from OpenAI's API reference, and from what nine agent frameworks send (``docs/refused.md`` has the refusals). The extensions
are those that servers of open models have: ``reasoning_content``, and ``return_token_ids`` with ``prompt_token_ids`` and
``token_ids`` as vLLM spells them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_chat.gateway.bodies import begun
from torchrl_chat.gateway.calls import (
    Asked,
    Call,
    Choice,
    Delta,
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
    stop_strings,
)
from torchrl_chat.messages import Message

_ROLES = ("system", "developer", "user", "assistant", "tool")
_NUMBERS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, 10.0),
}
_USUAL = frozenset({"model", "messages", "stream"})
# What is asked for and cannot be left out unseen: the agent would take what comes for what it wanted.
_REFUSED = {
    "functions": "'functions' is the older form of 'tools': send 'tools'.",
    "function_call": "'function_call' is the older form of 'tool_choice': send 'tools' and 'tool_choice'.",
    "logit_bias": "'logit_bias' would change what the policy samples: it is not to be had.",
    "audio": "'audio' is not to be had: this model writes text.",
    "web_search_options": "'web_search_options' is not to be had: give the model a tool that searches.",
    "continue_final_message": "'continue_final_message' is not to be had: an answer begins with what the model samples.",
    "prompt_logprobs": "'prompt_logprobs' is not to be had: log-probs are those of what was sampled.",
}


class ChatCompletions:
    """The dialect."""

    name = "chat completions"
    path = "/chat/completions"
    history = "messages"
    count_path: str | None = None

    # ------------------------------------------------------------------ reading
    def parse(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Call:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        messages = given(body, "messages", list, "a list of messages")
        if not messages:
            raise Refusal("'messages' is absent or empty: give at least one message.", param="messages")
        further = (
            {} if body.keys() <= _USUAL else _further(body)
        )  # looking for all that there may be takes its time
        idempotency, retry = retries(headers)
        return Call(
            messages=_messages(messages),
            stream=given(body, "stream", bool, "true or false") or False,
            model=text_of(given(body, "model", str, "a string") or "", "model"),
            key=idempotency,
            retry=retry,
            **further,
        )

    # ------------------------------------------------------------------ writing
    def write(self, call: Call, reply: Reply) -> Mapping[str, Any]:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        choices = []
        for place, choice in enumerate(reply.choices):
            entry: dict[str, Any] = {
                "index": place,
                "message": {**choice.message, "refusal": None},
                "finish_reason": choice.finish,
                "logprobs": _log_probs(choice) if call.told.get("log_probs") else None,
            }
            if call.told.get("ids"):
                entry["token_ids"] = list(choice.ids)
            choices.append(entry)
        body: dict[str, Any] = {
            "id": f"chatcmpl-{reply.name}",
            "object": "chat.completion",
            "created": reply.created,
            "model": reply.model,
            "choices": choices,
            "usage": _usage(reply),
        }
        if call.told.get("ids"):
            body["prompt_token_ids"] = list(reply.prompt_ids)
        return body

    def events(self, call: Call) -> ChatEvents:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        return ChatEvents(call)

    def refusal(self, refusal: Refusal) -> Mapping[str, Any]:
        """See :class:`~torchrl_chat.gateway.calls.Dialect`."""
        kind = OPENAI_ERRORS.get(refusal.kind, "invalid_request_error")
        error = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}
        return {"error": error}

    def count(self, tokens: int) -> Mapping[str, Any]:
        """Tokens are not counted in this dialect: it has no address for it."""
        raise NotImplementedError


class ChatEvents:
    """Writes the chunks of a stream."""

    def __init__(self, call: Call):
        self._call = call
        self._head: dict[str, Any] = {}

    def begin(self, name: str, created: int, model: str, usage: Usage) -> bytes:
        """The role of each choice. The content is null: whether anything is said beside calls is not known yet."""
        self._head = {
            "id": f"chatcmpl-{name}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
        }
        return b"".join(self._chunk(place, {"role": "assistant", "content": None}) for place in range(self._call.n))

    def delta(self, delta: Delta) -> bytes:
        """A piece; a call has its ``index`` on every one of its chunks."""
        if delta.kind == "content":
            return self._chunk(delta.choice, {"content": delta.text})
        if delta.kind == "reasoning":
            return self._chunk(delta.choice, {"reasoning_content": delta.text})
        call: dict[str, Any] = {"index": delta.call}
        if delta.kind == "call":
            call |= {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
        else:
            call["function"] = {"arguments": delta.text}
        return self._chunk(delta.choice, {"tool_calls": [call]})

    def end(self, reply: Reply) -> bytes:
        """Why each choice ended, usage where it was asked for, and the mark of the end."""
        told, out = self._call.told, []
        for place, choice in enumerate(reply.choices):
            more: dict[str, Any] = {}
            if told.get("log_probs"):
                more["logprobs"] = _log_probs(choice)
            if told.get("ids"):
                more["token_ids"] = list(choice.ids)
            out.append(self._chunk(place, {}, choice.finish, **more))
        if told.get("usage"):
            out.append(event({**self._head, "choices": [], "usage": _usage(reply)}))
        out.append(b"data: [DONE]\n\n")
        return b"".join(out)

    def fail(self, refusal: Refusal) -> bytes:
        """An error in the middle: the SDK raises it."""
        return event(ChatCompletions().refusal(refusal))

    def ping(self) -> bytes:
        """A comment."""
        return b": waiting\n\n"

    def _chunk(self, place: int, delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": place, "delta": delta, "logprobs": None, "finish_reason": finish, **more}
        chunk = {**self._head, "choices": [choice]}
        if self._call.told.get("usage"):
            chunk["usage"] = None
        return event(chunk)


# ---------------------------------------------------------------------- parts of a request
def _further(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a request says beside its messages, as fields of the call."""
    refuse(body, _REFUSED)
    modalities = given(body, "modalities", list, "a list of words")
    if modalities is not None and modalities != ["text"]:
        raise Refusal("'modalities' has others than 'text': this model writes text.", param="modalities")
    tools = _tools(given(body, "tools", list, "a list of tools") or ())
    notes: list[str] = []
    if body.get("parallel_tool_calls") is False:
        notes.append("'parallel_tool_calls': false is not enforced: what the policy samples is what it says.")
    if not shows_tools(body.get("tool_choice"), tools, notes):
        tools = ()
    options = given(body, "stream_options", dict, "an object") or {}
    log_probs = given(body, "logprobs", bool, "true or false") or False
    if number(body, "top_logprobs", 0, 20, whole=True):
        raise Refusal(
            "'top_logprobs' is not to be had: log-probs are those of the sampled tokens alone.",
            param="top_logprobs",
        )
    return {
        "tools": tools,
        "asked": Asked(_settings(body), stop_strings(body, "stop", (str, list))),
        "n": number(body, "n", 1, 128, whole=True) or 1,
        "told": {
            "usage": bool(options.get("include_usage")),
            "log_probs": log_probs,
            "ids": bool(given(body, "return_token_ids", bool, "true or false")),
            "notes": tuple(notes),
        },
    }


def _messages(said: Sequence[Any]) -> tuple[Message, ...]:
    read, known = begun(said)
    return (*known, *(_message(said[i], f"messages[{i}]") for i in range(read, len(said))))


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise Refusal(
            f"{where} is {named(message)}: expected an object with 'role' and 'content'.", param="messages"
        )
    role, content = message.get("role"), message.get("content")
    if len(message) == 2 and type(content) is str and role in ("user", "system") and content.isascii():
        return message
    if role not in _ROLES:
        shown = repr(role)[:40] if isinstance(role, str) else named(role)
        raise Refusal(f"{where}.role is {shown}: expected one of {', '.join(_ROLES)}.", param="messages")
    plain: Message = {"role": role, "content": None}
    if content is not None:
        kinds = ("text", "refusal") if role == "assistant" else ("text",)
        plain["content"] = (
            content if type(content) is str and content.isascii() else text_of(content, f"{where}.content", kinds)
        )
    if role == "assistant":
        for key in ("function_call", "audio"):
            if message.get(key):
                raise Refusal(
                    f"{where}.{key} is not to be had: an answer has text and 'tool_calls'.", param="messages"
                )
        for key in ("reasoning_content", "reasoning"):
            if isinstance(said := message.get(key), str):
                plain["reasoning_content"] = text_of(said, f"{where}.{key}")
                break
        if calls := given(message, "tool_calls", list, f"in {where} a list of calls"):
            plain["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
        elif content is None:
            plain["content"] = ""
        return plain
    if content is None:
        raise Refusal(f"{where}.content is absent: give a string, which may be empty.", param="messages")
    if role == "tool":
        ident = message.get("tool_call_id")
        if not isinstance(ident, str) or not ident:
            raise Refusal(
                f"{where}.tool_call_id is {named(ident)}: expected the id of the call that it answers.",
                param="messages",
            )
        plain["tool_call_id"] = ident
    return plain


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise Refusal(f"{where} is {named(call)}: expected an object.", param="messages")
    if (kind := call.get("type") or "function") != "function":
        raise Refusal(f"{where}.type is {str(kind)[:40]!r}: only functions are called here.", param="messages")
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refusal(f"{where}.function has no name: expected {{'name', 'arguments'}}.", param="messages")
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, (str, dict)):
        raise Refusal(f"{where}.function.arguments is {named(arguments)}: expected a JSON text.", param="messages")
    if isinstance(arguments, str):
        text_of(arguments, f"{where}.function.arguments")
    ident = call.get("id")
    if ident is not None and not isinstance(ident, str):
        raise Refusal(f"{where}.id is {named(ident)}: expected a string.", param="messages")
    shown = {"name": function["name"], "arguments": "{}" if arguments is None else arguments}
    return {"id": ident, "type": "function", "function": shown}


def _tools(tools: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    found = []
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise Refusal(f"tools[{place}] is {named(tool)}: expected an object.", param="tools")
        if (kind := tool.get("type", "function")) != "function":
            raise Refusal(
                f"tools[{place}].type is {str(kind)[:40]!r}: only functions are called here.", param="tools"
            )
        found.append(tool_schema(tool.get("function"), f"tools[{place}].function"))
    return tuple(found)


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = settings(body, _NUMBERS, ("seed", "top_k"))
    asked = [number(body, key, 1, whole=True) for key in ("max_completion_tokens", "max_tokens")]
    if limits := [limit for limit in asked if limit is not None]:
        found["max_tokens"] = min(limits)
    wanted = given(body, "response_format", dict, "an object")
    if wanted is not None and wanted.get("type") != "text":
        if wanted.get("type") not in ("json_object", "json_schema"):
            raise Refusal(
                "'response_format.type' is unknown: expected 'text', 'json_object' or 'json_schema'.",
                param="response_format",
            )
        found["response_format"] = wanted
    return found


# ---------------------------------------------------------------------- parts of an answer
def _usage(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.kept},
    }


def _log_probs(choice: Choice) -> dict[str, Any] | None:
    if choice.log_probs is None:
        return None
    return {"content": log_prob_entries(choice), "refusal": None}
