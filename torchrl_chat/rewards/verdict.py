"""What is graded, and what a verifier says of it.

A verifier is any callable. What it is called with is told by its attribute ``grades`` (see :func:`grades`):

====================  =============================================================================
``grades``            called as
====================  =============================================================================
``"text"`` (default)  ``verifier(response, reference)``: the text of the answer, without its reasoning
``"message"``         ``verifier(message, reference)``: the whole assistant message, as a dict
``"messages"``        ``verifier(messages, reference)``: the conversation up to that message
``"episode"``         ``verifier(episode)``: an :class:`Episode`
``"group"``           ``verifier(episodes)``: all answers to one dataset row at once; returns as many
====================  =============================================================================

It returns a :class:`Verdict` or a bare number, or is a coroutine function that does. Two further attributes are
read where they are there: ``isolate = True`` says that a grade may hang or eat memory, so that it belongs in a worker
process; ``quick(response, reference)`` may return the verdict of an easy case in bounded time, or ``None``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from torchrl_chat.messages import Message, content_text

Level: TypeAlias = Literal["text", "message", "messages", "episode", "group"]
"""What a verifier is called with."""

_F = TypeVar("_F", bound=Callable[..., Any])


class Verdict(NamedTuple):
    """The result of grading one response."""

    score: float
    """The reward, usually between 0 and 1."""
    answer: str | None
    """The final answer that was found in the response; ``None`` if there is none."""
    correct: bool
    """Whether that answer is right."""
    parts: Mapping[str, float] = {}  # never written to
    """The components of the score, by name."""
    failure: str | None = None
    """Why there is no grade, if there is none: ``"timeout: ..."``, ``"crash: ..."``, ``"memory: ..."``,
    ``"judge: ..."``, ``"error: ..."``."""


class Verifier(Protocol):
    """A callable that grades a response against a reference."""

    def __call__(self, response: Any, reference: Any, /) -> Verdict | float:
        """The verdict, or the bare score."""
        ...


@dataclass(frozen=True)
class Episode:
    """One answer with all that a verifier may want to look at.

    Example:
        >>> Episode.of("42", "#### 42").message
        {'role': 'assistant', 'content': '42'}
    """

    message: Message
    """The assistant message that is graded: ``content``, and ``reasoning_content`` and ``tool_calls`` where parsed."""
    reference: Any = None
    """What the answer is compared with: the value of the dataset's reference column."""
    messages: Sequence[Message] = ()
    """The conversation up to and with ``message``."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the dataset row."""
    length: int | None = None
    """How many tokens the policy sampled in this episode, where that is known."""
    truncated: bool = False
    """Whether the answer was cut off by a limit, so that it did not end by itself."""

    @classmethod
    def of(cls, response: str | Message, reference: Any = None, **more: Any) -> Episode:
        """An episode of a bare answer: its text or its message."""
        message = {"role": "assistant", "content": response} if isinstance(response, str) else dict(response)
        return cls(message, reference, more.pop("messages", (message,)), **more)

    @property
    def response(self) -> str:
        """The text of the answer, without its reasoning."""
        return content_text(self.message)


def grades(level: Level) -> Callable[[_F], _F]:
    """Say what a scoring function is called with.

    Example:
        >>> @grades("episode")
        ... def short(episode):
        ...     return float((episode.length or 0) < 100)
        >>> level_of(short)
        'episode'
    """
    if level not in ("text", "message", "messages", "episode", "group"):
        raise ValueError(f"grades({level!r}): expected 'text', 'message', 'messages', 'episode' or 'group'.")

    def mark(function: _F) -> _F:
        function.grades = level  # type: ignore[attr-defined]
        return function

    return mark


def level_of(verifier: Any) -> Level:
    """What the verifier is called with."""
    return getattr(verifier, "grades", "text")


def as_verdict(value: Any, answer: str | None) -> Verdict:
    """A verifier's return value as a verdict of finite numbers; a bare number counts as right from 1 on.

    Raises:
        TypeError: the value is neither a verdict nor a number.
        ValueError: a score or a part is no finite number in float32.
    """
    if isinstance(value, Verdict):
        score, correct = _finite(value.score, "score"), bool(value.correct)
        parts = {str(name): _finite(part, name) for name, part in value.parts.items()} if value.parts else {}
        return Verdict(score, value.answer, correct, parts, value.failure)
    score = _finite(value, "score")
    return Verdict(score, answer, score >= 1.0)


def _finite(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"a verifier returned {value!r:.80} ({type(value).__name__}) as {name}: expected a Verdict or a number."
        ) from None
    except OverflowError:
        number = float("inf")
    if not abs(number) <= 3.4e38:
        raise ValueError(f"a verifier returned {number} as {name}: expected a finite number.")
    return number


def arguments(verifier: Any, episode: Episode) -> tuple[Any, ...]:
    """What the verifier is called with for one episode: no more of it than the verifier reads.

    Not for verifiers of groups.
    """
    level = level_of(verifier)
    if level == "text":
        return episode.response, episode.reference
    if level == "message":
        return episode.message, episode.reference
    if level == "messages":
        return list(episode.messages), episode.reference
    return (episode,)
