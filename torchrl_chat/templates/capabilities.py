"""The kinds of turn that a template may or may not be bridged for, each with a conversation to try it on.

One list: of it is what ``ChatTemplate(..., require=...)`` asks for by name, and what the audit shows. The conversations
are short, so that their tokens can be read, and of words that can be found again.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torchrl_chat.messages import Message
from torchrl_chat.templates.kinds import ARGUMENTS, calling

SYSTEM: Message = {"role": "system", "content": "Be brief and kind."}
USER: Message = {"role": "user", "content": "How high is it?"}
ANSWER: Message = {"role": "assistant", "content": "The answer is 1600 metres."}
NEXT: Message = {"role": "user", "content": "And in feet?"}
MORE: Message = {"role": "user", "content": "Please be exact."}
REASONING = "The user asks for a height."
DEPTH = 16


class Probe(NamedTuple):
    """A conversation that ends with an answer, and what follows it."""

    name: str  # in reports of the audit
    title: str  # the same for people
    messages: tuple[Message, ...]
    new: tuple[Message, ...]
    capability: str | None = None  # what ``require`` calls it
    stopped: bool = True  # whether the policy ended the turn itself


def probes(tool: str, arguments: Mapping[str, Any]) -> tuple[Probe, ...]:
    """Every kind of turn, with calls of this tool.

    Args:
        tool: its name.
        arguments: of each call.
    """
    ids = [
        f"callnr{i:03d}" for i in range(2)
    ]  # nine letters and digits: some templates (Mistral's) refuse any other
    call, calls = calling(tool, arguments, ids[:1]), calling(tool, arguments, ids)
    first, second = (
        {"role": "tool", "content": f"{1608 + i} m", "name": tool, "tool_call_id": ident}
        for i, ident in enumerate(ids)
    )
    raw = {**ANSWER, "content": f"{tool}(it)"}
    inline = {**ANSWER, "content": f"<think>\n{REASONING}\n</think>\n\n{ANSWER['content']}"}
    apart = {**ANSWER, "reasoning_content": REASONING}
    return (
        Probe("user_turns", "user turns", (USER, ANSWER), (NEXT,), "user"),
        Probe(
            "user_turns_after_system", "user turns after a system prompt", (SYSTEM, USER, ANSWER), (NEXT,), "system"
        ),
        Probe("system_mid_conversation", "a system message mid-conversation", (USER, ANSWER), (SYSTEM,)),
        Probe("tool_turn", "tool turns, one call", (USER, call), (first,), "tool"),
        Probe("tool_turn_two_results", "tool turns, two results", (USER, calls), (first, second), "tools"),
        Probe("tool_turn_raw", "tool turns, the call as raw text", (USER, raw), (first,), "raw_tool"),
        Probe("tools_in_prompt", "tools in the system prompt", (USER, call), (first,)),
        Probe("reasoning_in_content", "reasoning in the content", (USER, inline), (NEXT,)),
        Probe("reasoning_content", "reasoning as reasoning_content", (USER, apart), (NEXT,), "reasoning"),
        Probe("several_new_messages", "several new messages at once", (USER, ANSWER), (NEXT, MORE)),
        Probe(
            "result_and_user", "a tool result and a user message at once", (USER, call), (first, NEXT), "several"
        ),
        Probe("truncated_turns", "turns cut by a limit", (USER, ANSWER), (NEXT,), "truncated", stopped=False),
        Probe("empty_answers", "empty answers", (USER, {**ANSWER, "content": ""}), (NEXT,)),
        Probe("depth", f"{DEPTH} turns", (USER, ANSWER) * DEPTH, (NEXT,), "depth"),
    )


CAPABILITIES: Mapping[str, Probe] = MappingProxyType(
    {probe.capability: probe for probe in probes("lookup", ARGUMENTS) if probe.capability}
)
"""What can be asked for with ``ChatTemplate(..., require=...)``: user turns, with a system prompt; one tool result,
several, one after the raw text of a call; an answer with reasoning; several messages at once; a turn cut by a
limit; sixteen turns."""
