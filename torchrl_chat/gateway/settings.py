"""What a session of the gateway decides, and its agent does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torchrl_chat.conversation import Limits

AGENTS = frozenset({"max_tokens", "stop"})
"""What an agent may set unless the session says otherwise: where its answers end, not how they are sampled."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a session decides, and its agent does not.

    Raises:
        ValueError: a value that it cannot have.
    """

    limits: Limits = field(default_factory=Limits)
    """What the episode may take; counted over all of its sequences, but for ``max_context``, which each sequence has."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the engine gets with each request, of those that it takes."""
    allow: frozenset[str] = AGENTS
    """Names of the settings that the agent may choose; others of its settings are not looked at."""
    history: Literal["keep", "template"] = "keep"
    """Whether the past stays as it was sampled, or is written anew as the template does it, in a sequence of its own."""
    max_choices: int = 16
    """How many answers one request may ask for."""
    patience: float = 5.0
    """Seconds that sampling goes on for a client that has left: it may come back, with a retry."""

    def __post_init__(self) -> None:
        if self.history not in ("keep", "template"):
            raise ValueError(f"history={self.history!r}: expected 'keep' or 'template'.")
        if self.max_choices < 1:
            raise ValueError(f"max_choices is {self.max_choices}: expected at least 1.")
