"""What an agent says as a ledger has it, and what was sampled as its agent is told it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torchrl_chat.conversation import Transcript, Turn
from torchrl_chat.gateway.calls import Call, Choice, Finish, ToolCall
from torchrl_chat.gateway.matching import POLICY
from torchrl_chat.gateway.tree import CallName, Match
from torchrl_chat.messages import Message
from torchrl_chat.templates import ChatTemplate
from torchrl_chat.templates.kinds import AnswerKind

_COUNTED = re.compile(r"call[0-9]{5,}")  # the ids that the parser makes up, where a format writes none


def turn_kind(match: Match) -> tuple[Hashable, ...]:
    """What a prompt's kind is: the conversation's, the answer's that is continued, and that of what follows it."""
    if match.answer is None:
        return ("begins",)
    transcript = match.answer.transcript
    roles = tuple(message["role"] for message in match.messages[match.start :])
    return transcript.course.shape, AnswerKind.of(transcript.messages[-1]), transcript.stop is None, roles


def for_ledger(messages: Sequence[Message], calls: Mapping[str, CallName]) -> list[Message]:
    """Messages as templates take them: arguments as values, results with their call's id and name in the ledger.

    Args:
        messages: what follows a ledger, or a whole conversation; in that, calls are numbered as the parser numbers those that
            it reads, so that a prompt does not depend on ids that somebody drew.
        calls: the calls that were sampled, by the ids that the messages have for them.
    """
    known, count, found = dict(calls), 0, []
    for message in messages:
        role = message["role"]
        if role == POLICY:
            plain: Message = {"role": role, "content": message.get("content") or ""}
            for field_name in ("reasoning_content", "reasoning"):
                if message.get(field_name):
                    plain["reasoning_content"] = message[field_name]
                    break
            made = []
            for call in message.get("tool_calls") or ():
                own = known.get(call.get("id"))
                counted = own is None or _COUNTED.fullmatch(own.id)
                own = CallName(f"call{count:05d}" if counted else own.id, call["function"]["name"])  # type: ignore[union-attr]
                if call.get("id"):
                    known[call["id"]] = own
                count += 1
                made.append(
                    {"id": own.id, "type": "function", "function": {"name": own.name, "arguments": _value(call)}}
                )
            if made:
                plain["tool_calls"] = made
            found.append(plain)
        elif role == "tool":
            own = known.get(message.get("tool_call_id") or "")
            plain = {"role": role, "content": message.get("content") or ""}
            if own is not None:
                plain |= {"tool_call_id": own.id, "name": own.name}
            elif message.get("tool_call_id"):
                plain["tool_call_id"] = message["tool_call_id"]
            found.append(plain)
        else:
            found.append(
                {"role": "system" if role == "developer" else role, "content": message.get("content") or ""}
            )
    return found


def _value(call: Mapping[str, Any]) -> Any:
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def stopped(turn: Turn, stops: Sequence[str], template: ChatTemplate) -> tuple[str | None, Turn]:
    """The stop string that comes first in a turn, and the turn up to the token that completes it.

    A sampler that watches for the string would have ended there: what is beyond was sampled for nobody. The string stays in the ledger,
    and is left out of what is said.
    """
    if not stops or turn.ids is None:
        return None, turn
    ids = turn.ids.tolist()
    [text] = template.codec.decode([ids])
    found = [(text.find(stop) + len(stop), stop) for stop in stops if stop and stop in text]
    if not found:
        return None, turn
    _, stop = min(found)
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if stop in template.codec.decode([ids[:middle]])[0]:
            high = middle
        else:
            low = middle + 1
    log_probs = None if turn.log_probs is None else turn.log_probs[:low]
    versions = tuple(span for span in turn.versions if span[0] < low)
    return stop, Turn(turn.ids[:low], log_probs, None, "stop", turn.limit, versions)


def told(
    after: Transcript, stop: str | None, call: Call, template: ChatTemplate, names: Callable[[], str]
) -> tuple[Choice, dict[str, CallName]]:
    """The last answer of a ledger as its agent is told it, and its calls by the ids that the agent is told.

    Args:
        after: the ledger.
        stop: the agent's stop string that ended it, which it is not told.
        call: the request.
        template: reads single tokens, where the agent asks for them.
        names: makes names for calls that no other call has.
    """
    message = after.messages[-1]
    known: dict[str, CallName] = {}
    calls = []
    for made in message.get("tool_calls") or ():
        function, own = made["function"], f"call_{names()}"
        known[own] = CallName(made["id"], function["name"])
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(ToolCall(own, function["name"], arguments))
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content")
    if stop is not None:  # it stands at the end of what was sampled, wherever that is
        content, reasoning = content.partition(stop)[0], reasoning and reasoning.partition(stop)[0]
    finish: Finish = "tool_calls" if calls else "stop" if after.ended or stop is not None else "length"
    ids: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    log_probs: tuple[float, ...] | None = None
    if call.told.get("log_probs") or call.told.get("ids"):
        last = after.spans[-1]
        row = after.token_array[last.start : last.end].tolist()
        ids, pieces = tuple(row), tuple(template.codec.decode([[token] for token in row]))
        if after.scored:
            log_probs = tuple(after.log_probs[last.start : last.end].tolist())
    shown = None if calls and not content.strip() else content
    return Choice(shown, reasoning, tuple(calls), finish, stop, ids, pieces, log_probs), known
