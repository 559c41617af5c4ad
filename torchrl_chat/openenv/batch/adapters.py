"""What an OpenEnv environment's observations say, and how an answer becomes its action: two small functions each.

OpenEnv leaves the fields of actions and observations to each environment. An :class:`Adapter` is what
:class:`~torchrl_chat.openenv.OpenEnvChatEnv` has to know about one of them; a new environment takes two functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torchrl_chat.conversation import Transcript
from torchrl_chat.messages import Message, content_text


@dataclass(frozen=True)
class Answer:
    """What the policy answered, as text and as ids.

    Attributes:
        message: the answer as a message; tool calls and reasoning are parsed where the environment parses them.
        ids: the sampled ids, with the token that ended the turn; empty without a tokenizer.
        finish_reason: ``"stop"`` if the policy ended the turn itself, ``"length"`` if it was cut.
        messages: the whole conversation, the answer last.
    """

    message: Message
    ids: list[int]
    finish_reason: str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """The answer's words, without reasoning and special tokens."""
        return content_text(self.message)

    @classmethod
    def of(cls, transcript: Transcript) -> Answer:
        """The last answer of a conversation."""
        span = transcript.spans[-1]
        return cls(
            message=transcript.messages[-1],
            ids=transcript.token_array[span.start : span.end].tolist(),
            finish_reason="stop" if transcript.ended else "length",
            messages=transcript.messages,
        )


@dataclass(frozen=True)
class Adapter:
    """How to speak with one kind of environment.

    An exception in either function ends that row, with its text as the reason; the others go on.

    Attributes:
        to_messages: an observation (a dict) to what it says: a string (a message of the user), a message, a list of
            messages, or ``None`` if it says nothing.
        to_action: an :class:`Answer` to the fields of the action.
        cumulative: whether observations hold the whole conversation, answers included, and not only what is new.
        keep: whether the observation itself is worth a column of the TensorDict.

    Example:
        >>> adapter = Adapter(lambda seen: f"You are at {seen['x']}, {seen['y']}.", lambda said: {"action": said.text})
        >>> adapter.to_messages({"x": 0, "y": 4})
        'You are at 0, 4.'
    """

    to_messages: Callable[[dict[str, Any]], str | Message | Sequence[Message] | None]
    to_action: Callable[[Answer], Mapping[str, Any]]
    cumulative: bool = False
    keep: bool = True


# ---------------------------------------------------------------------- ready-made
def _messages(observation: dict[str, Any]) -> list[Message]:
    return observation.get("messages") or []


def _as_tokens(answer: Answer) -> dict[str, Any]:
    if not answer.ids:
        raise ValueError("the action is made of token ids, and there are none: give the environment a tokenizer.")
    return {"tokens": answer.ids}


def _as_finished_tokens(answer: Answer) -> dict[str, Any]:
    return {**_as_tokens(answer), "finish_reason": answer.finish_reason}


def _as_text(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text}


CHAT_ENV = Adapter(_messages, _as_tokens, cumulative=True, keep=False)
"""OpenEnv's own ``chat_env``: the sampled ids. The server has the same tokenizer."""

CHAT = Adapter(_messages, _as_finished_tokens, cumulative=True, keep=False)
"""The chat environment of this package: the sampled ids, and whether they were cut."""

CHAT_TEXT = Adapter(_messages, _as_text, cumulative=True, keep=False)
"""The same with text, for a server with another tokenizer than the policy's."""


def _echoed(observation: dict[str, Any]) -> str | None:
    if error := observation.get("error"):
        return f"Error: {_words(error)}"
    if observation.get("result") is not None:
        return _words(observation["result"])
    metadata = observation.get("metadata") or {}  # which openenv-core 0.3 does not send
    return metadata.get("message") or metadata.get("error") or "Say something."


def _call(answer: Answer, tool: str, argument: str) -> dict[str, Any]:
    return {"type": "call_tool", "tool_name": tool, "arguments": {argument: answer.text}}


ECHO_ENV = Adapter(_echoed, partial(_call, tool="echo_message", argument="message"))
"""OpenEnv's ``echo_env``: the answer is the argument of its tool, whose result follows."""


def _shown(observation: dict[str, Any], name: str) -> str | None:
    value = observation.get(name)
    return None if value is None or value == "" else _words(value)


def _said(
    answer: Answer, name: str, parse: Callable[[str], Any] | None, others: Mapping[str, Any]
) -> dict[str, Any]:
    return {**others, name: answer.text if parse is None else parse(answer.text)}


def text_adapter(
    observation: str, action: str, parse: Callable[[str], Any] | None = None, **others: Any
) -> Adapter:
    """An environment that speaks in one field and is answered in one.

    Args:
        observation: the field of the observation that is shown; other values than strings are shown as JSON.
        action: the field of the action that takes the answer.
        parse: what makes the field's value of the answer's text; what it raises ends the row.
        others: further fields of every action.

    Example:
        >>> text_adapter("question", "answer").to_messages({"question": "6 * 7?"})
        '6 * 7?'
    """
    return Adapter(partial(_shown, name=observation), partial(_said, name=action, parse=parse, others=others))


def _words(value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("data"), str):  # an MCP tool's result
        return value["data"]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
