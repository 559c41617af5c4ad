"""Verifiers made of verifiers: weighted sums, gates and sequences, and OpenEnv's rubrics as verifiers.

Law of this file: a composition grades a whole batch, component by component, so that each component keeps its own way
to be run (in a worker process, on an event loop, or here); see :class:`~torchrl_chat.rewards.grader.Grader`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

from torchrl_chat.rewards.verdict import Episode, Level, Verdict, arguments, as_verdict, level_of
from torchrl_chat.rewards.worker import Reason

Grade: TypeAlias = Callable[[Any, Sequence[Episode]], list[Verdict]]
"""Grades episodes with a component: ``grade(verifier, episodes)``."""

_NOT_ASKED = Verdict(0.0, None, False)


class Composition:
    """What weighted sums, gates and sequences have in common.

    Args:
        verifiers: the verifiers, or rubrics, by the names under which their scores are reported.
    """

    def __init__(self, verifiers: Mapping[str, Any]):
        self.names = tuple(verifiers)
        self.verifiers = [as_verifier(verifier) for verifier in verifiers.values()]

    @property
    def components(self) -> tuple[str, ...]:
        """The names in :attr:`Verdict.parts <torchrl_chat.rewards.Verdict.parts>`: of the verifiers, and of their own parts."""
        return tuple(
            part
            for name, verifier in zip(self.names, self.verifiers, strict=True)
            for part in (name, *(f"{name}.{inner}" for inner in getattr(verifier, "components", ())))
        )

    @property
    def grades(self) -> Level:
        """``"group"`` if any component compares the answers of a group, ``"episode"`` otherwise."""
        return "group" if any(level_of(verifier) == "group" for verifier in self.verifiers) else "episode"

    @property
    def isolate(self) -> bool:
        """Whether a grade of any component may hang."""
        return any(getattr(verifier, "isolate", False) for verifier in self.verifiers)

    @property
    def deadline(self) -> float | None:
        """The seconds that the components ask for, together; ``None`` if none of them does."""
        return sum(getattr(verifier, "deadline", None) or 0 for verifier in self.verifiers) or None

    def combine(self, episodes: Sequence[Episode], grade: Grade) -> list[Verdict]:
        """The verdict of each episode, from those that ``grade`` gets from the components."""
        raise NotImplementedError

    def _told(self, verdict: Verdict, row: Sequence[Verdict]) -> Verdict:
        """The verdict with the scores of the components as its parts, and the first failure among them as its own."""
        parts: dict[str, float] = {}
        failure = None
        for name, one in zip(self.names, row, strict=True):
            parts[name] = one.score
            parts.update({f"{name}.{inner}": value for inner, value in one.parts.items()})
            if one.failure and failure is None:
                failure = Reason(f"{one.failure} (in {name})")
                failure.traceback = getattr(one.failure, "traceback", "")
        return verdict._replace(parts=parts, failure=failure)

    def __call__(self, graded: Episode | Sequence[Episode]) -> Any:
        """Grade one episode (or a group, see :attr:`grades`) here and now."""
        if isinstance(graded, Episode):
            return self.combine([graded], grade_here)[0]
        return self.combine(graded, grade_here)


class WeightedSum(Composition):
    """The weighted sum of several scores; answer and correctness are those of the first component.

    The verdict's ``parts`` hold each component's own score under its name, unweighted, and its parts as
    ``"name.part"``. Where a component failed, so has the sum.

    Args:
        components: by name, a verifier, or a verifier and its weight (1 by default).

    Raises:
        ValueError: there is no component.

    Example:
        >>> from torchrl_chat.rewards import Episode, NumberVerifier
        >>> reward = WeightedSum({"right": NumberVerifier(), "brief": (lambda response, _: len(response) < 9, 0.5)})
        >>> reward(Episode.of("it is 7", "7"))
        Verdict(score=1.5, answer='7', correct=True, parts={'right': 1.0, 'brief': 1.0}, failure=None)
    """

    def __init__(self, components: Mapping[str, Any]):
        if not components:
            raise ValueError(
                "WeightedSum needs at least one component: {'name': verifier} or {'name': (verifier, weight)}."
            )
        pairs = {name: value if isinstance(value, tuple) else (value, 1.0) for name, value in components.items()}
        super().__init__({name: verifier for name, (verifier, _) in pairs.items()})
        self.weights = [float(weight) for _, weight in pairs.values()]

    def combine(self, episodes: Sequence[Episode], grade: Grade) -> list[Verdict]:
        """See :class:`Composition`."""
        verdicts = []
        for row in zip(*[grade(verifier, episodes) for verifier in self.verifiers], strict=True):
            score = sum(weight * verdict.score for weight, verdict in zip(self.weights, row, strict=True))
            verdicts.append(self._told(row[0]._replace(score=score), row))
        return verdicts


class Gate(Composition):
    """The score of ``then`` where ``condition`` scores at least ``threshold``; otherwise ``otherwise``.

    ``then`` is only asked where the gate is open, so an expensive verifier costs nothing for the rest.

    Args:
        condition: the verifier that opens the gate; its score is reported as ``"condition"``.
        then: the verifier behind it; its score is reported as ``"then"``, 0 where the gate is closed.
        threshold: from which score on the gate is open.
        otherwise: the score where it is closed.

    Example:
        >>> from torchrl_chat.rewards import Episode, NumberVerifier
        >>> Gate(lambda response, _: "<think>" not in response, NumberVerifier())(Episode.of("7", "7")).score
        1.0
    """

    def __init__(self, condition: Any, then: Any, *, threshold: float = 1.0, otherwise: float = 0.0):
        super().__init__({"condition": condition, "then": then})
        self.threshold = threshold
        self.otherwise = otherwise

    def combine(self, episodes: Sequence[Episode], grade: Grade) -> list[Verdict]:
        """See :class:`Composition`."""
        condition, then = self.verifiers
        gates = grade(condition, episodes)
        opened = [i for i, gate in enumerate(gates) if gate.failure is None and gate.score >= self.threshold]
        behind = dict(zip(opened, grade(then, [episodes[i] for i in opened]) if opened else [], strict=True))
        closed = Verdict(self.otherwise, None, False)
        return [
            self._told(behind.get(i, closed), (gate, behind.get(i, _NOT_ASKED))) for i, gate in enumerate(gates)
        ]


class Sequential(Composition):
    """One verifier after another; the first that scores 0 (or fails) ends it, with 0. The score is the last one's.

    This is OpenEnv's ``Sequential``. Verifiers behind a 0 are not asked.

    Args:
        verifiers: the verifiers, in order; the scores are reported as ``"0"``, ``"1"``, ...

    Raises:
        ValueError: there is no verifier.

    Example:
        >>> from torchrl_chat.rewards import Episode, NumberVerifier
        >>> Sequential(lambda response, _: len(response) < 9, NumberVerifier())(Episode.of("it is 7", "7")).score
        1.0
    """

    def __init__(self, *verifiers: Any):
        if not verifiers:
            raise ValueError("Sequential needs at least one verifier.")
        super().__init__({str(place): verifier for place, verifier in enumerate(verifiers)})

    def combine(self, episodes: Sequence[Episode], grade: Grade) -> list[Verdict]:
        """See :class:`Composition`."""
        rows: list[list[Verdict]] = [[] for _ in episodes]
        going = list(range(len(episodes)))
        for verifier in self.verifiers:
            graded = grade(verifier, [episodes[i] for i in going]) if going else []
            for i, verdict in zip(going, graded, strict=True):
                rows[i].append(verdict)
            going = [i for i in going if rows[i][-1].score != 0 and rows[i][-1].failure is None]
        return [self._told(row[-1], [*row, *[_NOT_ASKED] * (len(self.names) - len(row))]) for row in rows]


class Rubric:
    """An OpenEnv rubric ``(action, observation) -> float``, sync or async, as a verifier.

    The rubric gets objects with the attributes that OpenEnv's chat environment gives: ``action.message``,
    ``action.content`` and ``observation.messages``, ``.reference``, ``.metadata`` (the dataset row), ``.done``.

    Args:
        rubric: the callable.

    Example:
        >>> from torchrl_chat.rewards import Episode
        >>> Rubric(lambda action, observation: float(action.content == observation.reference))(Episode.of("7", "7"))
        1.0
    """

    grades: Level = "episode"

    def __init__(self, rubric: Callable[[Any, Any], Any]):
        self.rubric = rubric
        self.isolate = getattr(rubric, "isolate", False)
        self.deadline = getattr(rubric, "deadline", None)
        self.components = tuple(getattr(rubric, "components", ()))

    def __call__(self, episode: Episode) -> Any:
        """Grade one episode."""
        action = SimpleNamespace(message=episode.message, content=episode.response, metadata={})
        observation = SimpleNamespace(
            messages=list(episode.messages),
            reference=episode.reference,
            metadata=dict(episode.row),
            done=True,
            reward=None,
        )
        return self.rubric(action, observation)


def as_verifier(value: Any) -> Any:
    """A verifier from whatever may stand for one: a verifier, or a rubric known by its parameters' names.

    Raises:
        TypeError: the value cannot be called, or not with a response and a reference.
    """
    if isinstance(value, type):
        raise TypeError(f"{value.__name__} is a class: give a verifier that is made of it, {value.__name__}(...).")
    if not callable(value):
        raise TypeError(
            f"{value!r:.80} is no verifier: expected a callable (response, reference) -> Verdict or number."
        )
    if hasattr(value, "grades"):
        return value
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some built-in functions have no signature
        return value
    names = [name for name in signature.parameters if name != "self"]
    if names[:2] == ["action", "observation"]:
        return Rubric(value)
    try:
        signature.bind("response", "reference")
    except TypeError as error:  # of each grade it would be the failure of a row, and a reward of 0
        name = getattr(value, "__name__", type(value).__name__)
        told = f"{name}{signature} cannot be called with (response, reference): {error}."
        with contextlib.suppress(TypeError):
            signature.bind("episode")
            told += ' One that is called with the episode is marked @grades("episode").'
        raise TypeError(told) from None
    return value


def grade_here(verifier: Any, episodes: Sequence[Episode]) -> list[Verdict]:
    """Grade in this thread, without a deadline; whatever the verifier raises is raised."""
    if isinstance(verifier, Composition):
        return verifier.combine(episodes, grade_here)
    if level_of(verifier) == "group":
        return [as_verdict(v, e.response) for v, e in zip(verifier(episodes), episodes, strict=True)]
    return [as_verdict(verifier(*arguments(verifier, episode)), episode.response) for episode in episodes]
