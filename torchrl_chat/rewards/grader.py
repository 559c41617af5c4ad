"""``Grader``: a batch of answers graded by one verifier, whatever it is, without ever hanging or losing the batch.

Law of this file: there is a verdict for every episode. A grade that fails costs its own row only, which gets the failure
score and the reason.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import time
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, Literal

from torchrl_chat import telemetry
from torchrl_chat._loop import LoopThread
from torchrl_chat.rewards.compose import Composition, as_verifier
from torchrl_chat.rewards.pool import Outcome, VerifierPool
from torchrl_chat.rewards.verdict import Episode, Verdict, arguments, as_verdict, level_of
from torchrl_chat.rewards.worker import Reason


class Grader:
    """Grades batches of episodes.

    Each verifier is run where it belongs: one with ``isolate = True`` in a :class:`VerifierPool`, after its ``quick``
    way, if it has one, has decided the easy rows; a coroutine function on an event loop, all rows at once; any other
    right here. The components of a composition are run one by one, each in its own way.

    Args:
        verifier: see :mod:`torchrl_chat.rewards.verdict`; a rubric ``(action, observation) -> float``; or a
            composition of them.
        deadline: seconds for one grade in a worker or on the event loop. A verifier's own ``deadline`` wins. A coroutine
            that blocks the loop instead of awaiting cannot be ended: what blocks belongs in a worker.
        workers: worker processes. Defaults to the cores that this process may use.
        memory_limit: bytes of memory that a worker may take; ``None`` for no limit.
        isolate: ``True`` to grade everything but coroutines in worker processes, ``False`` to grade nothing there,
            ``"auto"`` for what the verifier says.
        failure_score: the score of a row whose grade failed.

    Example:
        >>> from torchrl_chat.rewards import Episode, NumberVerifier
        >>> with Grader(NumberVerifier()) as grader:
        ...     [verdict.score for verdict in grader.grade([Episode.of("7", "7"), Episode.of("8", "7")])]
        [1.0, 0.0]
    """

    def __init__(
        self,
        verifier: Any,
        *,
        deadline: float = 10.0,
        workers: int | None = None,
        memory_limit: int | None = 1 << 29,
        isolate: bool | Literal["auto"] = "auto",
        failure_score: float = 0.0,
    ):
        if deadline <= 0:
            raise ValueError(f"deadline is {deadline}: expected a positive number of seconds.")
        self.verifier = as_verifier(verifier)
        self.deadline = deadline
        self.workers = workers
        self.memory_limit = memory_limit
        self.isolate = isolate
        self.failure_score = failure_score
        self.failures: Counter[str] = Counter()
        """How many grades failed so far, by the first word of the reason."""
        self.seconds = 0.0
        """How long grading took so far."""
        self._pools: dict[int, VerifierPool] = {}
        self._loop: LoopThread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pools": {}, "_loop": None}

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the components that verdicts report in ``parts``."""
        return tuple(getattr(self.verifier, "components", ()))

    def close(self) -> None:
        """End worker processes and the event loop's thread; they start anew if needed."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        if self._loop is not None:
            closing = getattr(self.verifier, "aclose", None)
            if closing is not None and self._loop.alive:
                self._loop.run(closing())
            self._loop.close()
            self._loop = None

    def grade(self, episodes: Sequence[Episode], groups: Sequence[Hashable] | None = None) -> list[Verdict]:
        """The verdict of each episode.

        Args:
            episodes: the answers.
            groups: for each episode, a value that the answers to the same dataset row share; without it, all
                episodes are one group. Only read by verifiers of groups.

        Returns:
            a verdict an episode, in order. A failed one has the failure score, and the reason in ``failure``.
        """
        if not episodes:
            return []
        of: dict[int, Hashable] = {}
        if groups is not None:  # a copy each: the same episode may stand in two groups
            episodes = [copy.copy(episode) for episode in episodes]
            of = dict(zip(map(id, episodes), groups, strict=True))

        def grade(verifier: Any, some: Sequence[Episode]) -> list[Verdict]:
            if isinstance(verifier, Composition):
                return verifier.combine(some, grade)
            return self._run(verifier, list(some), [of.get(id(episode)) for episode in some])

        start = time.perf_counter()
        with telemetry.span("evaluate", type(self.verifier).__name__) as span:
            verdicts = grade(self.verifier, episodes)
            if span:
                _tell(span, type(self.verifier).__name__, verdicts)
        self.seconds += time.perf_counter() - start
        self._report(verdicts)
        return [
            verdict if verdict.failure is None else verdict._replace(score=self.failure_score, correct=False)
            for verdict in verdicts
        ]

    def _report(self, verdicts: Sequence[Verdict]) -> None:
        failed = [(row, verdict.failure) for row, verdict in enumerate(verdicts) if verdict.failure is not None]
        if not failed:
            return
        kinds = Counter(reason.partition(":")[0] for _, reason in failed)
        self.failures.update(kinds)
        row, reason = failed[0]
        warnings.warn(
            f"{len(failed)} of {len(verdicts)} grades failed ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}); "
            f"their score is {self.failure_score}. The first, row {row}: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )

    # ------------------------------------------------------------------ one verifier
    def _run(self, verifier: Any, episodes: list[Episode], groups: list[Hashable]) -> list[Verdict]:
        if level_of(verifier) == "group":
            return self._by_groups(verifier, episodes, groups)
        calls = [arguments(verifier, episode) for episode in episodes]
        outcomes: list[Outcome | None] = [None] * len(calls)
        if hasattr(verifier, "quick") and self._isolated(verifier):
            outcomes = [
                None if (outcome := _tried(verifier.quick, call)) == _UNDECIDED else outcome for call in calls
            ]
        rest = [i for i, outcome in enumerate(outcomes) if outcome is None]
        for i, outcome in zip(rest, self._call(verifier, [calls[i] for i in rest]), strict=True):
            outcomes[i] = outcome
        return [_judged(o, e) for o, e in zip(outcomes, episodes, strict=True) if o is not None]

    def _by_groups(self, verifier: Any, episodes: list[Episode], groups: list[Hashable]) -> list[Verdict]:
        members: dict[Hashable, list[int]] = {}
        for i, group in enumerate(groups):
            members.setdefault(group, []).append(i)
        outcomes = self._call(verifier, [([episodes[i] for i in rows],) for rows in members.values()])
        verdicts: dict[int, Verdict] = {}
        for rows, (values, failure) in zip(members.values(), outcomes, strict=True):
            if failure is None and (not isinstance(values, Sequence) or len(values) != len(rows)):
                failure = f"error: a verifier of groups returned {values!r:.80} for {len(rows)} answers"
            for place, i in enumerate(rows):
                outcome = Outcome(None, failure) if failure else Outcome(values[place], None)
                verdicts[i] = _judged(outcome, episodes[i])
        return [verdicts[i] for i in range(len(episodes))]

    def _call(self, verifier: Any, calls: list[tuple[Any, ...]]) -> list[Outcome]:
        """Call the verifier where it belongs."""
        if not calls:
            return []
        deadline = getattr(verifier, "deadline", None) or self.deadline
        if _is_async(verifier) or not self._isolated(verifier):
            outcomes = [_tried(verifier, call) for call in calls]
            if any(hasattr(outcome.value, "__await__") for outcome in outcomes):
                if self._loop is None or not self._loop.alive:  # never started, or before a fork
                    self._loop = LoopThread("torchrl_chat.grader")
                return self._loop.run(_all_of(outcomes, deadline))
            return outcomes
        pool = self._pools.get(id(verifier))
        if pool is None:
            pool = VerifierPool(verifier, workers=self.workers, deadline=deadline, memory_limit=self.memory_limit)
            self._pools[id(verifier)] = pool
        return pool.map(calls)

    def _isolated(self, verifier: Any) -> bool:
        return getattr(verifier, "isolate", False) if self.isolate == "auto" else self.isolate


_UNDECIDED = Outcome(None, None)
# What costs the row in which it is raised. SystemExit and the other two are no Exception, and yet a verifier's doing: one
# that was a script calls sys.exit. KeyboardInterrupt is the user's.
_COSTS_ITS_ROW = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)


def _tried(verifier: Any, call: tuple[Any, ...]) -> Outcome:
    """A call in this thread."""
    try:
        return Outcome(verifier(*call), None)
    except _COSTS_ITS_ROW as error:  # whatever a verifier raises, the other rows are not lost
        return Outcome(None, Reason.of(error))


async def _contained(awaitable: Any) -> Outcome:
    """What is awaited; a task that lets one of these through would take the event loop, and its thread, with it."""
    try:
        return Outcome(await awaitable, None)
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        return Outcome(None, Reason.of(error))


async def _all_of(outcomes: list[Outcome], deadline: float) -> list[Outcome]:
    """The outcomes with their coroutines awaited, all at once."""

    async def one(outcome: Outcome) -> Outcome:
        if not hasattr(outcome.value, "__await__"):
            return outcome
        try:
            return await asyncio.wait_for(_contained(outcome.value), deadline)
        except TimeoutError:
            return Outcome(None, f"timeout: no verdict within {deadline:g} s")
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # Ctrl-C: the batch itself is given up
                raise
            return Outcome(None, f"error: {type(error).__name__}: {error}")
        except Exception as error:
            return Outcome(None, Reason.of(error))

    return list(await asyncio.gather(*map(one, outcomes)))


def _judged(outcome: Outcome, episode: Episode) -> Verdict:
    """The verdict of a call; a failed one where it returned nothing, or nonsense."""
    failure = outcome.failure
    if failure is None:
        try:
            return as_verdict(outcome.value, episode.response)
        except _COSTS_ITS_ROW as error:  # no verdict, or one of odd values
            failure = f"error: {error}"
    return Verdict(0.0, None, False, {}, failure)


def _is_async(verifier: Any) -> bool:
    called = verifier if inspect.isroutine(verifier) else type(verifier).__call__
    return inspect.iscoroutinefunction(called)


def _tell(span: telemetry.Span, name: str, verdicts: Sequence[Verdict]) -> None:
    """Say in a span what the verdicts are: an event each, as the conventions have it."""
    failed = [verdict for verdict in verdicts if verdict.failure is not None]
    span.set({"torchrl_chat.batch.size": len(verdicts), "torchrl_chat.batch.failed": len(failed)})
    for verdict in verdicts:
        told: dict[str, Any] = {"gen_ai.evaluation.name": name}
        if verdict.failure is not None:
            told["error.type"] = verdict.failure.partition(":")[0]
        else:
            label = {True: "correct", False: "incorrect", None: None}[verdict.correct]
            told |= {"gen_ai.evaluation.score.value": float(verdict.score), "gen_ai.evaluation.score.label": label}
        span.event("gen_ai.evaluation.result", told)
