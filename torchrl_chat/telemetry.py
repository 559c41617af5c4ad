"""OpenTelemetry spans of turns, engine calls, tools and grades, named as the GenAI semantic conventions name them.

They are made while a program has a tracer provider of its own, and else nothing is: opentelemetry is not imported here, only found
where the program has imported it. So whoever wants spans sets up the SDK (or starts with ``opentelemetry-instrument``), and whoever
does not pays for looking it up.

Law of this file: no prompt, answer, argument, message of an error or key stands in a span, unless the conventions' own variable
``OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`` is ``SPAN_ONLY`` or ``SPAN_AND_EVENT``; and keys not even then.

The conventions are those of github.com/open-telemetry/semantic-conventions-genai, as of November 2026: their status is
"development", and names may change. What they have no name for begins with ``torchrl_chat.``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

CAPTURE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
Kind = Literal["INTERNAL", "CLIENT", "SERVER"]


class Span:
    """A span, or where there are none, nothing: then it is false, and what is set is dropped. A context manager.

    What is raised within it ends it as an error, of which only the type is told.
    """

    __slots__ = ("_entered", "_failed", "_span")

    def __init__(self, entered: Any = None):
        self._entered, self._failed = entered, False
        self._span: Any = None

    def __bool__(self) -> bool:
        return self._entered is not None

    def __enter__(self) -> Span:
        if self._entered is not None:
            self._span = self._entered.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._entered is None:
            return
        if kind is not None and not self._failed:
            self.fail(kind.__name__)
        self._entered.__exit__(kind, error, trace)

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes; those that are ``None`` are left out."""
        if self._span is not None:
            self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def fail(self, kind: str) -> None:
        """Say that it ended in an error.

        Args:
            kind: which, in a word: the name of an exception, say.
        """
        if self._span is not None:
            from opentelemetry.trace import Status, StatusCode

            self._failed = True
            self._span.set_attribute("error.type", kind)
            self._span.set_status(Status(StatusCode.ERROR))

    def event(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Add an event; attributes that are ``None`` are left out."""
        if self._span is not None:
            self._span.add_event(name, {key: value for key, value in attributes.items() if value is not None})


_NONE = Span()
_NO_TRACE = contextlib.nullcontext()


def on() -> bool:
    """Whether spans are made: the program has imported opentelemetry and set a tracer provider."""
    trace = sys.modules.get("opentelemetry.trace")
    return trace is not None and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def content() -> bool:
    """Whether spans may hold what was said, by the conventions' own variable."""
    return os.environ.get(CAPTURE, "").upper() in ("SPAN_ONLY", "SPAN_AND_EVENT")


def behind(headers: Mapping[str, str]) -> contextlib.AbstractContextManager[None]:
    """Spans made within belong to the trace that a request's headers name (W3C Trace Context), where spans are made.

    Args:
        headers: the request's, by their names in lower case: ``traceparent``, ``tracestate``, or what the program's propagators read.
    """
    if not on() or sys.modules["opentelemetry.trace"].get_current_span().get_span_context().is_valid:
        return _NO_TRACE  # a server that makes spans of its own has read them
    return _behind(headers)


@contextlib.contextmanager
def _behind(headers: Mapping[str, str]) -> Iterator[None]:
    from opentelemetry import context, propagate

    token = context.attach(propagate.extract(headers, getter=_lower()))
    try:
        yield
    finally:
        context.detach(token)


@functools.cache
def _lower() -> Any:
    """Reads headers whose names are in lower case, however a propagator spells them."""
    from opentelemetry.propagators.textmap import DefaultGetter

    class Lower(DefaultGetter):
        def get(self, carrier: Mapping[str, Any], key: str) -> list[str] | None:
            return super().get(carrier, key.lower())

    return Lower()


def span(operation: str, subject: str = "", kind: Kind = "INTERNAL") -> Span:
    """A span of an operation on something: ``chat gpt-4``, ``execute_tool search``.

    Args:
        operation: the conventions' ``gen_ai.operation.name``.
        subject: what its name ends with: a model, a tool.
        kind: the kind of the span, as the conventions have it.

    Example:
        >>> with span("execute_tool", "search") as made:  # nobody has set a provider
        ...     made.set({"gen_ai.tool.name": "search"})
        >>> bool(made)
        False
    """
    if not on():
        return _NONE
    trace = sys.modules["opentelemetry.trace"]
    return Span(
        trace.get_tracer("torchrl_chat").start_as_current_span(
            f"{operation} {subject}".rstrip(),
            kind=trace.SpanKind[kind],
            attributes={"gen_ai.operation.name": operation},  # at the start: what samplers of traces look at
            record_exception=False,
            set_status_on_exception=False,
        )
    )


def inference(operation: str, model: str, provider: str, kind: Kind = "INTERNAL") -> Span:
    """A span of a model that samples.

    Args:
        operation: ``chat`` of messages, ``text_completion`` of ids.
        model: its name; of one that lies in a folder, the folder's.
        provider: the conventions' ``gen_ai.provider.name``: who answers, or which library samples.
        kind: ``CLIENT`` where another process samples.
    """
    if not on():
        return _NONE
    name = os.path.basename(os.path.normpath(model)) if os.path.isabs(model) else model
    made = span(operation, name, kind)
    return _WithModel(made, name, provider)


class _WithModel(Span):
    """A span whose model and provider are set as it begins."""

    __slots__ = ("_model", "_provider")

    def __init__(self, made: Span, model: str, provider: str):
        super().__init__(made._entered)
        self._model, self._provider = model, provider

    def __enter__(self) -> Span:
        super().__enter__()
        self.set({"gen_ai.provider.name": self._provider, "gen_ai.request.model": self._model or None})
        return self


_SETTINGS = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "max_tokens")


def asked(settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The attributes of a request's settings, of those that the conventions know.

    Args:
        settings: settings of sampling by OpenAI's names; others are left out.
        more: further ones: ``seed``, ``choice.count`` ..., left out where they are ``None``.

    Example:
        >>> asked({"temperature": 0.5, "logprobs": 1}, seed=3)
        {'gen_ai.request.temperature': 0.5, 'gen_ai.request.seed': 3}
    """
    known = {name: settings.get(name) for name in _SETTINGS} | more
    return {f"gen_ai.request.{name}": value for name, value in known.items() if _plain(value)}


def _plain(value: Any) -> bool:
    return isinstance(value, (str, bool, int, float)) and not (isinstance(value, int) and abs(value) >= 2**63)


def used(prompt: int | None, sampled: int | None, reasons: Iterable[str | None]) -> dict[str, Any]:
    """The attributes of an answer: tokens of the prompt and of what was sampled, and why each of the answers ended."""
    return {
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.output_tokens": sampled,
        "gen_ai.response.finish_reasons": [reason for reason in reasons if reason] or None,
    }


def words(messages: Sequence[Mapping[str, Any]], reasons: Sequence[str | None] | None = None) -> str:
    """Messages as the JSON of ``gen_ai.input.messages``, or with reasons of ``gen_ai.output.messages``.

    Example:
        >>> words([{"role": "user", "content": "Hi"}])
        '[{"role": "user", "parts": [{"type": "text", "content": "Hi"}]}]'
    """
    told = [{"role": message.get("role", ""), "parts": _parts(message)} for message in messages]
    if reasons is not None:
        told = [
            {**message, "finish_reason": reason or "stop"} for message, reason in zip(told, reasons, strict=True)
        ]
    return json.dumps(told, ensure_ascii=False, default=str)


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    said, parts = message.get("content"), []
    if message.get("role") == "tool":
        return [{"type": "tool_call_response", "id": message.get("tool_call_id"), "response": said}]
    if message.get("reasoning_content"):
        parts.append({"type": "reasoning", "content": message["reasoning_content"]})
    if isinstance(said, str) and said:
        parts.append({"type": "text", "content": said})
    elif isinstance(said, Sequence) and not isinstance(said, str):
        parts += [{"type": "text", "content": part.get("text")} for part in said if part.get("type") == "text"]
    for call in message.get("tool_calls") or ():
        function = call.get("function", {})
        parts.append(
            {
                "type": "tool_call",
                "id": call.get("id"),
                "name": function.get("name"),
                "arguments": function.get("arguments"),
            }
        )
    return parts
