"""What an episode ends with, as drivers, verifiers and agents say it: checked before anything is changed by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrl_chat.conversation import StopReason


class AgentError(RuntimeError):
    """An agent ended before it was done; the text says how."""


def checked_end(
    reward: float | None = None,
    *,
    success: bool | None = None,
    parts: Mapping[str, float] | None = None,
    failure: str = "",
    grade_failure: str = "",
    extracted: str = "",
    stop: StopReason = StopReason.ANSWERED,
) -> dict[str, Any]:
    """What a session has at its end, by the names of its attributes.

    Args:
        reward, success, parts, failure, grade_failure, extracted, stop: see :meth:`Session.finish <torchrl_chat.gateway.sessions.Session.finish>`.

    Raises:
        ValueError: a value that it cannot be.
    """
    worth = None if reward is None else _finite("reward", reward)
    if not isinstance(parts, Mapping | None):
        raise ValueError(f"parts is a {type(parts).__name__}: expected numbers by their names, or None.")
    if success not in (None, True, False):
        raise ValueError(f"success is {repr(success)[:40]}: expected True, False or None.")
    for name, text in (("failure", failure), ("grade_failure", grade_failure), ("extracted", extracted)):
        if not isinstance(text, str | None):
            raise ValueError(f"{name} is a {type(text).__name__}: expected a text.")
    return {
        "reward": worth,
        "success": bool(success) if success is not None else None if worth is None else worth > 0,
        "reward_parts": {str(name): _finite(f"parts[{name!r}]", value) for name, value in (parts or {}).items()},
        "failure": failure or "",
        "grade_failure": grade_failure or "",
        "extracted": extracted or "",
        "stop": StopReason.ERROR if failure else StopReason(stop),
    }


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
        if abs(number) < float("inf"):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {repr(value)[:40]}: expected a finite number.")
