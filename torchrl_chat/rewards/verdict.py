"""What a verifier says of one answer."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Verdict(NamedTuple):
    """The result of grading one response."""

    score: float
    """The reward, usually between 0 and 1."""
    answer: str | None
    """The final answer that was found in the response; ``None`` if there is none."""
    correct: bool
    """Whether that answer is right."""


class Verifier(Protocol):
    """A callable that grades a response against a reference."""

    def __call__(self, response: str, reference: Any) -> Verdict | float:
        """The verdict, or the bare score."""
        ...
