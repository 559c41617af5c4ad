"""What an agent's episode is worth: the package's verifiers on its final answer, or a function of the whole session."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

from torchrl_chat.gateway.sessions import Session
from torchrl_chat.rewards import Episode, Grader, Verdict

WHOLE = "session"
"""The value of ``grades`` of a function that is called with the whole session."""


class Rewarder:
    """Grades finished episodes.

    Args:
        verifier: a verifier of :mod:`torchrl_chat.rewards`, which gets the final answer of the session's last sequence (and, if it
            ``grades`` messages or episodes, the conversation and the dataset row); or a :class:`~torchrl_chat.rewards.Grader`; or a
            function with ``grades = "session"``, which is called with the :class:`~torchrl_chat.gateway.sessions.Session` itself, its
            tree and its row, and returns a number or a :class:`~torchrl_chat.rewards.Verdict`.
        reference_key: the column of the dataset row with the reference; or a list of columns, handed over as one dict.
        on_failure: as for :class:`~torchrl_chat.RewardTransform`: whether an episode without a grade counts with the failure score, or
            is left out of training.
        grading: options of :class:`~torchrl_chat.rewards.Grader`.
    """

    def __init__(
        self,
        verifier: Any,
        *,
        reference_key: str | list[str] = "answer",
        on_failure: Literal["score", "mask"] = "score",
        **grading: Any,
    ):
        if on_failure not in ("score", "mask"):
            raise ValueError(f"on_failure={on_failure!r}: expected 'score' or 'mask'.")
        self._whole = verifier if getattr(verifier, "grades", None) == WHOLE else None
        if isinstance(verifier, Grader) and grading:
            raise ValueError(f"{', '.join(grading)}: the Grader that is given has these options itself.")
        self.grader = None
        if self._whole is None:
            self.grader = verifier if isinstance(verifier, Grader) else Grader(verifier, **grading)
        self.reference_key, self.on_failure = reference_key, on_failure

    def grade(self, sessions: Sequence[Session], groups: Sequence[Hashable] | None = None) -> list[dict[str, Any]]:
        """What :meth:`Session.finish <torchrl_chat.gateway.sessions.Session.finish>` is given for each session.

        Args:
            sessions: sessions whose agents are done.
            groups: what the sessions of one group share, for verifiers of groups.

        Raises:
            KeyError: a row has no reference.
        """
        if self.grader is not None:
            verdicts = self.grader.grade([self._episode(session) for session in sessions], groups)
        else:
            verdicts = [self._of_whole(session) for session in sessions]
        return [self._end(verdict) for verdict in verdicts]

    def close(self) -> None:
        """End the grader's worker processes."""
        if self.grader is not None:
            self.grader.close()

    def _of_whole(self, session: Session) -> Verdict:
        assert self._whole is not None
        try:
            found = self._whole(session)
            verdict = found if isinstance(found, Verdict) else Verdict(float(found), None, float(found) > 0)
            if not math.isfinite(verdict.score):
                raise ValueError(f"the score is {verdict.score}")
        except Exception as error:  # one episode's affair
            return Verdict(0.0, None, False, {}, f"error: {type(error).__name__}: {error}"[:400])
        return verdict

    def _end(self, verdict: Verdict) -> dict[str, Any]:
        masked = verdict.failure is not None and self.on_failure == "mask"
        return {
            "reward": None if masked else verdict.score,
            "success": verdict.correct,
            "parts": dict(verdict.parts),
            "grade_failure": verdict.failure or "",
            "extracted": str(verdict.answer or ""),
        }

    def _episode(self, session: Session) -> Episode:
        row, key = session.row, self.reference_key
        wanted = key if isinstance(key, list) else [key]
        if missing := [name for name in wanted if name not in row]:
            raise KeyError(
                f"the row of session {session.name!r} has no {missing[0]!r}: it has {sorted(row)}. Give reference_key=..., or a row."
            )
        reference = {name: row[name] for name in key} if isinstance(key, list) else row[key]
        ledger = session.transcript()
        if ledger is None or ledger.answer is None:
            return Episode({"role": "assistant", "content": ""}, reference, (), row)
        return Episode(
            ledger.messages[ledger.answer],
            reference,
            ledger.messages[: ledger.answer + 1],
            row,
            session.sampled,
            ledger.ended is False,
        )
