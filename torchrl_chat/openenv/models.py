"""The objects that cross the wire: actions, observations, states, as OpenEnv's chat environment has them.

Plain JSON throughout: token ids are lists of integers, messages are dicts. The field names and their meaning are
those of OpenEnv (``openenv`` 0.10 and ``openenv-core`` 0.3), so that its clients and servers understand them; every
field beyond its own is optional and left out where it is not used. Nothing of OpenEnv is imported.

Law of this file: an object that exists is valid. Token ids are integers, never rounded, never negative, one row.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    WithJsonSchema,
    model_validator,
)

from torchrl_chat.messages import Message as AnyMessage
from torchrl_chat.messages import check_message
from torchrl_chat.openenv.tokens import TokenRow

_MESSAGE_SCHEMA = {
    "type": "object",
    "properties": {"role": {"type": "string"}, "content": {}},
    "required": ["role"],
    "additionalProperties": True,
}

Message = Annotated[AnyMessage, AfterValidator(check_message), WithJsonSchema(_MESSAGE_SCHEMA)]
"""One ``{"role", "content", ...}`` of the chat format; ``tool_calls``, ``name`` and parts are let through."""


def _one_row(value: Any) -> Any:
    """Tensors and arrays to lists, and a batch of one row (``[[1, 2]]``) to that row."""
    if not isinstance(value, list) and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, list):
        raise ValueError(f"tokens is a {type(value).__name__}: expected a list of token ids.")
    if not value or (not isinstance(value[0], (list, tuple)) and not hasattr(value[0], "tolist")):
        return value
    if len(value) > 1:
        raise ValueError(f"tokens has {len(value)} rows: an action is one turn, give one row of token ids.")
    return _one_row(value[0])


TokenId = Annotated[int, Strict(), Field(ge=0)]
TokenIds = Annotated[
    list[TokenId],
    Field(min_length=1, fail_fast=True, description="token ids of one turn"),
    BeforeValidator(_one_row),
    AfterValidator(TokenRow),
]
"""At least one token id; the first bad one is reported, not all of them."""


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, arbitrary_types_allowed=True)


class Action(_Wire):
    """What an agent does; the base of every action."""

    metadata: dict[str, Any] = Field(default_factory=dict, description="additional metadata of the action")


class Observation(_Wire):
    """What an agent sees; the base of every observation."""

    done: bool = Field(default=False, description="whether the episode has ended")
    reward: bool | int | float | None = Field(default=None, description="reward of the last action")
    metadata: dict[str, Any] = Field(default_factory=dict, description="additional metadata of the observation")


class State(BaseModel):
    """What the environment knows of its episode; the base of every state."""

    model_config = ConfigDict(extra="allow", validate_assignment=True, arbitrary_types_allowed=True)

    episode_id: str | None = Field(default=None, description="the episode's identifier")
    step_count: int = Field(default=0, ge=0, description="steps taken in this episode")


class ChatAction(Action):
    """One turn: what the policy sampled as ``tokens`` or ``text``, or ``messages`` that somebody else wrote.

    At least one of the three is there. ``messages`` win over ``tokens``: an action that
    ``ChatEnvironment.message_to_action`` made carries both.

    Attributes:
        tokens: the sampled ids, exactly.
        text: the answer as a text, of a policy that has no ids; it is tokenized once, when it arrives.
        messages: messages to append, such as a user's question or the results of tools.
        finish_reason: why the policy stopped: ``"stop"``, ``"length"``; told by the last id if ``None``.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) naming the field.

    Example:
        >>> ChatAction(tokens=[[1, 2]]).tokens
        [1, 2]
    """

    tokens: TokenIds | None = None
    text: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    finish_reason: Annotated[str, Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tokens is None and self.text is None and self.messages is None:
            raise ValueError("the action is empty: give 'tokens' (at least 1 item), 'text' or 'messages'.")
        return self


class Delta(_Wire):
    """How a delta observation continues what the client has: keep so many messages and tokens, append the new ones."""

    messages: int = Field(ge=0, description="how many of the client's messages stay")
    tokens: int = Field(ge=0, description="how many of the client's tokens stay")


class ChatObservation(Observation):
    """The conversation as messages, and the same as token ids: the prompt that a policy reads next.

    Attributes:
        messages: the conversation; only the new messages in a delta observation.
        tokens: its token ids, a :class:`TokenRow`; only the new ones in a delta observation.
        delta: what a delta observation continues; ``None`` where the observation is whole.
    """

    messages: list[Message] = Field(default_factory=list)
    tokens: Annotated[list[int], AfterValidator(TokenRow)] = Field(default_factory=TokenRow)
    delta: Delta | None = None


class ChatState(State):
    """The whole history of the episode.

    Attributes:
        history_messages: the messages so far.
        history_tokens: the ids that each of them brought, a list a message: together they are the ledger. Messages
            that were appended at once stand with the last of them.
    """

    history_messages: list[Message] = Field(default_factory=list)
    history_tokens: list[Annotated[list[int], AfterValidator(TokenRow)]] = Field(default_factory=list)


class EnvironmentMetadata(_Wire):
    """What ``/metadata`` tells of an environment."""

    name: str
    description: str
    readme_content: str | None = None
    version: str | None = None
    author: str | None = None
    documentation_url: str | None = None


class ResetRequest(BaseModel):
    """The arguments of a reset; others are handed to the environment."""

    model_config = ConfigDict(extra="allow")

    seed: Annotated[int, Strict(), Field(ge=0, lt=2**63)] | None = None
    episode_id: Annotated[str, Field(max_length=255)] | None = None


SessionId = Annotated[str, Field(description="a session made with keep=true or openenv/session/create")]


class KeepingResetRequest(ResetRequest):
    """The body of ``POST /reset``."""

    keep: Annotated[bool, Strict()] = Field(default=False, description="keep the environment as a session")
    session_id: SessionId | None = None


class StepRequest(BaseModel):
    """The body of ``POST /step``; other entries are let through."""

    model_config = ConfigDict(extra="allow")

    action: dict[str, Any]
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    request_id: Annotated[str, Field(max_length=255)] | None = None
    session_id: SessionId | None = None


class CloseRequest(BaseModel):
    """The body of ``POST /close``."""

    session_id: SessionId


class TaskRequest(_Wire):
    """The body of the Task API's requests."""

    split: str
    index: Annotated[int, Strict()] | None = None
    start: Annotated[int, Strict()] | None = None
    stop: Annotated[int, Strict()] | None = None
