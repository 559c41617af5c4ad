"""Spans of a gateway's turns and of what its engine samples, where somebody watches: see :mod:`torchrl_chat.telemetry`."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from torchrl_chat import telemetry
from torchrl_chat.conversation import Turn
from torchrl_chat.endpoint import Endpoint
from torchrl_chat.gateway.calls import Call, Choice, Refusal, Reply
from torchrl_chat.gateway.engines import Ask, Engine

if TYPE_CHECKING:
    from torchrl_chat.gateway.sessions import Session

_PROVIDER = "torchrl_chat"


async def watched(answering: Awaitable[Reply], session: Session, call: Call) -> Reply:
    """The reply to a request, with a span of the turn: ``chat MODEL``, of the conversation that is the session."""
    if not telemetry.on():
        return await answering
    with telemetry.inference("chat", call.model, _PROVIDER) as span:
        span.set({"gen_ai.conversation.id": session.name})
        more = {"choice.count": call.n if call.n != 1 else None, "stream": call.stream or None}
        span.set(telemetry.asked(call.asked.values, **more))
        try:
            reply = await answering
        except Refusal as refusal:
            span.fail(refusal.kind.name.lower())
            raise
        span.set({"gen_ai.response.id": reply.name})
        reasons = [choice.finish for choice in reply.choices]
        span.set(telemetry.used(reply.usage.prompt, reply.usage.completion, reasons))
        if telemetry.content():
            span.set({"gen_ai.input.messages": telemetry.words(call.messages)})
            span.set({"gen_ai.output.messages": telemetry.words([*map(_message, reply.choices)], reasons)})
    return reply


def _message(choice: Choice) -> dict[str, Any]:
    calls = [{"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in choice.calls]
    said = {"role": "assistant", "content": choice.content, "tool_calls": calls}
    return said if choice.reasoning is None else {**said, "reasoning_content": choice.reasoning}


async def sampled(engine: Engine, ask: Ask, model: str = "") -> Turn:
    """What an engine samples, with a span of it; a server's is made by the client that asks it."""
    if isinstance(engine, Endpoint):
        return await engine.sample(ask)
    with telemetry.inference("text_completion", model, type(engine).__name__) as span:
        turn = await engine.sample(ask)
        if span:
            span.set(telemetry.asked(ask.settings, seed=ask.seed, max_tokens=ask.limit))
            count = None if turn.ids is None else len(turn.ids)
            span.set(telemetry.used(len(ask.prompt), count, [turn.finish_reason]))
    return turn
