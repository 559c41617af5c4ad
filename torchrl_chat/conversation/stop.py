"""Why an episode ended."""

from __future__ import annotations

from enum import IntEnum


class StopReason(IntEnum):
    """Why an episode ended; the values are what stands in ``("next", "stop_reason")``.

    Example:
        >>> StopReason(2).name
        'MAX_TURNS'
    """

    RUNNING = 0
    """It goes on."""
    ANSWERED = 1
    """The environment ended it: an answer was given, a tool or a user simulator said stop."""
    MAX_TURNS = 2
    """The policy has answered as often as it may."""
    MAX_TURN_TOKENS = 3
    """The last answer was cut at the limit of one turn."""
    MAX_TOKENS = 4
    """The policy has sampled as many tokens as it may in one episode."""
    CONTEXT_FULL = 5
    """The next prompt, or the answer to it, does not fit in the context."""
    MAX_TOOL_CALLS = 6
    """The policy has called tools more often than it may."""
    MAX_TIME = 7
    """The episode has taken as long as it may."""
    TRUNCATED = 8
    """Another transform truncated it (``StepCounter``, say)."""
    ERROR = 9
    """The row failed: a server's error, a lost session, an answer or a message that cannot enter the ledger; why is told in
    ``"env_failure"``, ``"tool_failure"`` or ``"user_failure"``."""

    @property
    def word(self) -> str:
        """How files, servers and pages write it.

        Example:
            >>> StopReason.MAX_TURNS.word
            'max_turns'
        """
        return self.name.lower()

    @classmethod
    def of(cls, reason: int | None, *, terminated: bool, done: bool) -> StopReason:
        """The reason of an episode, also where nobody wrote one: what its flags say.

        Args:
            reason: what stands in ``("next", "stop_reason")``; 0 or ``None`` where nothing does.
            terminated, done: the flags of the last step.
        """
        if reason:
            return cls(reason)
        if terminated:
            return cls.ANSWERED
        return cls.TRUNCATED if done else cls.RUNNING
