"""Capabilities: the kinds of turn that a template may or may not be bridged for, each with a probe.

The record of what is proved. A capability is asked of the bridge itself, with a small conversation, so that its
verdict is what an environment will meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from torchrl_chat.messages import Message
from torchrl_chat.templates.bridge import BridgeError
from torchrl_chat.templates.kinds import ARGUMENTS

if TYPE_CHECKING:
    from torchrl_chat.templates.chat_template import ChatTemplate


class Probe(NamedTuple):
    """A conversation that ends with an answer, and what follows it."""

    messages: tuple[Message, ...]
    new: tuple[Message, ...]
    stopped: bool = True  # whether the policy ended the turn itself


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _result(number: int) -> Message:
    return {"role": "tool", "content": f"found {number}", "name": "lookup", "tool_call_id": f"call0000{number}"}


def _calls(count: int) -> Message:
    function = {"name": "lookup", "arguments": dict(ARGUMENTS)}
    calls = [{"id": f"call0000{i}", "type": "function", "function": function} for i in range(count)]
    return {"role": "assistant", "content": "", "tool_calls": calls}


_ASKED, _NEXT = _user("What is it?"), _user("And the next?")
_SYSTEM: Message = {"role": "system", "content": "Be brief."}

CAPABILITIES: Mapping[str, Probe] = MappingProxyType(
    {
        "user": Probe((_ASKED, _answer("It is this.")), (_NEXT,)),
        "system": Probe((_SYSTEM, _ASKED, _answer("It is this.")), (_NEXT,)),
        "tool": Probe((_ASKED, _calls(1)), (_result(0),)),
        "tools": Probe((_ASKED, _calls(2)), (_result(0), _result(1))),
        "raw_tool": Probe((_ASKED, _answer("lookup(it)")), (_result(0),)),
        "reasoning": Probe((_ASKED, {**_answer("It is this."), "reasoning_content": "Let me see."}), (_NEXT,)),
        "several": Probe((_ASKED, _calls(1)), (_result(0), _NEXT)),
        "truncated": Probe((_ASKED, _answer("It is thi")), (_NEXT,), stopped=False),
        "depth": Probe((*(_ASKED, _answer("It is this.")) * 16,), (_NEXT,)),
    }
)
"""What can be asked for with ``ChatTemplate(..., require=...)``: user turns, with a system prompt; one tool result,
several, one after the raw text of a call; an answer with reasoning; several messages at once; a turn cut by a
limit; sixteen turns."""


def refusal(template: ChatTemplate, name: str) -> str | None:
    """Why ``template`` refuses a kind of turn; ``None`` if it is proved.

    Raises:
        ValueError: there is no such capability.
    """
    if name not in CAPABILITIES:
        raise ValueError(f"there is no capability {name!r}: expected one of {', '.join(CAPABILITIES)}.")
    probe = CAPABILITIES[name]
    try:
        close = template.close(probe.messages)
        stop = close.main[0] if probe.stopped and close.main else None
        template.follow_batch([probe.messages], [probe.new], stops=[stop])
    except BridgeError as error:
        return str(error)
    return None
