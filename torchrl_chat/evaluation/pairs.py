"""Two models on the same questions: how far apart they are, whether that can be luck, and how much more would decide it.

Paired: a question that is hard for one model is mostly hard for the other, so what counts is where they differ, question by
question; two intervals of two accuracies know nothing of that, and decide later. Answers to one question are a cluster
(as in :mod:`torchrl_chat.evaluation.figures`). Numbers in, numbers out: no files here, and no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchrl_chat.evaluation.figures import bootstrap_interval

ALPHA = 0.05
"""How often a difference may be found where there is none."""
POWER = 0.8
"""How often a difference that is there has to be found by a size that is said to decide."""


def mcnemar(gained: int, lost: int) -> tuple[float, float]:
    """The exact test of McNemar (1947), and its mid-p variant, two-sided.

    Of the questions that one model alone has right, each is as likely to be the one's as the other's if they are equally
    good: a binomial with chance 1/2. The exact p is never too small; as it can take few values it is mostly too large, and
    mid-p, which counts half of what was observed, is close to what it says (Fagerland, Lydersen and Laake 2013, BMC Medical
    Research Methodology 13:91).

    Args:
        gained: questions that only the second model has right.
        lost: questions that only the first has right.

    Returns:
        the exact p and mid-p, both 1 where there is no such question.

    Raises:
        ValueError: a count is negative.

    Example:
        >>> exact, mid = mcnemar(12, 3)
        >>> f"{exact:.4f} {mid:.4f}"
        '0.0352 0.0213'
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"{gained} gained and {lost} lost: expected counts.")
    count, least = gained + lost, min(gained, lost)
    ways = tail = 1
    for i in range(least):
        ways = ways * (count - i) // (i + 1)
        tail += ways
    whole = 1 << count
    return min(1.0, 2 * tail / whole), min(1.0, (2 * tail - ways) / whole)


@dataclass(frozen=True)
class Paired:
    """What two models did on the same questions; the difference is the second's mean less the first's."""

    questions: int
    """How many questions both answered."""
    first_mean: float
    """The mean of the first, each question weighing alike however many answers it has."""
    second_mean: float
    """The mean of the second."""
    difference: float
    """``second_mean - first_mean``."""
    interval: tuple[float, float] | None
    """Of the difference, 95 %: from resampled questions. ``None`` where all questions differ alike, so that nothing can be resampled."""
    gained: int | None
    """Questions that only the second has right; ``None`` where a question has several answers, or values are not 0 or 1."""
    lost: int | None
    """Questions that only the first has right."""
    p: float | None
    """McNemar's exact p, where there are ``gained`` and ``lost``."""
    mid_p: float | None
    """Its mid-p variant."""
    questions_needed: int | None
    """With so many questions of this kind the observed difference would be found in 80 % of all cases; ``None``: there is none."""
    answers_needed: int | None
    """With so many answers to each of *these* questions likewise; ``None`` where no number does, or one answer each does not tell."""
    detectable: float | None
    """The smallest difference that as many questions find in 80 % of all cases."""

    @property
    def decided(self) -> bool:
        """Whether they differ: by the exact test where there is one, else because 0 is outside the interval."""
        if self.p is not None:
            return self.p < ALPHA
        return self.interval is not None and not self.interval[0] <= 0.0 <= self.interval[1]

    def plain(self) -> dict[str, Any]:
        """As one object for JSON."""
        return {**asdict(self), "decided": self.decided}


def compared(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], *, seed: int = 0) -> Paired:
    """Compare two models.

    Args:
        first, second: for each question the values of its answers (1 for right and 0 for wrong, or rewards), one list a
            question, in the same order. A question may have other numbers of answers in the two.

    Keyword Args:
        seed: of the resampling: the same values have the same interval.

    Raises:
        ValueError: there is no question, not as many in both, or one without an answer.

    Example:
        >>> pair = compared([[1.0], [0.0], [0.0], [1.0]], [[1.0], [1.0], [1.0], [1.0]])
        >>> pair.difference, pair.gained, pair.lost, pair.p
        (0.5, 2, 0, 0.5)
    """
    if not first or len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} questions: expected the same ones, at least one.")
    if not (all(first) and all(second)):
        raise ValueError("a question has no answer.")
    differences = [statistics.fmean(b) - statistics.fmean(a) for a, b in zip(first, second, strict=True)]
    gained = lost = p = mid_p = None
    if all(len(values) == 1 and values[0] in (0, 1) for values in (*first, *second)):
        gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        p, mid_p = mcnemar(gained, lost)
    alike = max(differences) - min(differences) < 1e-12
    return Paired(
        questions=len(differences),
        first_mean=statistics.fmean(map(statistics.fmean, first)),
        second_mean=statistics.fmean(map(statistics.fmean, second)),
        difference=statistics.fmean(differences),
        interval=None if alike else bootstrap_interval(differences, seed=seed),
        gained=gained,
        lost=lost,
        p=p,
        mid_p=mid_p,
        questions_needed=questions_needed(differences, exact=p is not None),
        answers_needed=answers_needed(first, second),
        detectable=detectable(differences),
    )


# ---------------------------------------------------------------------- how much would decide
_Z_ALPHA = statistics.NormalDist().inv_cdf(1 - ALPHA / 2)
_Z_POWER = statistics.NormalDist().inv_cdf(POWER)


def questions_needed(differences: Sequence[float], *, exact: bool = False) -> int | None:
    """How many questions would show the observed difference in 80 % of all cases, at 5 %.

    Connor's size for paired shares (1987, Biometrics 43:207), written with the spread of the differences, so that it holds for
    any values: of 0 and 1, the mean of the squares is the share of questions on which the models differ. An observed
    difference is itself uncertain, and so is this: a guide for the next evaluation, not a verdict on this one.

    Args:
        differences: one for each question.

    Keyword Args:
        exact: for the exact test, which needs some more, since it takes whole questions: the continuity correction of Fleiss,
            Tytun and Ury (1980, Biometrics 36:343) for the difference of ``gained`` and ``lost``.

    Returns:
        the number; ``None`` where there is no difference.

    Example:
        >>> questions_needed([1.0] * 12 + [-1.0] * 8 + [0.0] * 80)
        979
    """
    gap, square = _gap_and_square(differences)
    if gap <= 1e-12:
        return None
    size = ((_Z_ALPHA * math.sqrt(square) + _Z_POWER * math.sqrt(max(0.0, square - gap * gap))) / gap) ** 2
    if exact:
        size = size / 4 * (1 + math.sqrt(1 + 4 / (size * gap))) ** 2
    return math.ceil(size)


def detectable(differences: Sequence[float]) -> float | None:
    """The smallest difference that as many questions find in 80 % of all cases, if they differ as often and as far as these do.

    Where so few questions differ that it would take more of them, it is the difference of just as many as it takes, all in favour of
    one model.

    Args:
        differences: one for each question.

    Returns:
        the difference, above 0; ``None`` where nothing differs, or there are too few questions for any.

    Example:
        >>> f"{detectable([1.0] * 12 + [-1.0] * 8 + [0.0] * 80):.3f} {detectable([1.0] + [0.0] * 99):.3f}"
        '0.124 0.077'
    """
    _, square = _gap_and_square(differences)
    if square <= 0:
        return None
    count, reach = len(differences), statistics.fmean(map(abs, differences))
    gap = _solved(
        lambda gap: (
            (_Z_ALPHA * math.sqrt(square) + _Z_POWER * math.sqrt(max(0.0, square - gap**2))) / math.sqrt(count)
        )
    )
    if gap <= reach:
        return gap
    size = square / reach  # of the difference of a question that differs
    gap = _solved(lambda gap: size * (_Z_ALPHA + _Z_POWER * math.sqrt(max(0.0, 1 - gap / size))) ** 2 / count)
    return gap if gap <= size else None


def _solved(step: Callable[[float], float]) -> float:
    """Where a step leads to itself, by bisection: what it gives falls as what it is given grows."""
    low, high = 0.0, step(0.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if step(middle) > middle else (low, middle)
    return (low + high) / 2


def answers_needed(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> int | None:
    """How many answers to each of these questions would show the observed difference in 80 % of all cases, at 5 %.

    The spread of the differences is that between questions, which only more questions make smaller, and that of the answers to
    a question, which more answers do (Miller 2024, arXiv:2411.00640, section 3). Both are estimated from the answers.

    Args:
        first, second: for each question the values of its answers.

    Returns:
        the number, of both models; ``None`` where there is no difference, no number of answers would do, or a question has one
        answer only, which says nothing of how another one would be.

    Example:
        >>> answers_needed([[0.0], [1.0]], [[1.0], [1.0]]) is None
        True
    """
    if len(first) < 2 or min(map(len, (*first, *second))) < 2:
        return None
    differences = [statistics.fmean(b) - statistics.fmean(a) for a, b in zip(first, second, strict=True)]
    gap = abs(statistics.fmean(differences))
    inside = statistics.fmean(
        statistics.variance(a) / len(a) + statistics.variance(b) / len(b)
        for a, b in zip(first, second, strict=True)
    )
    between = max(0.0, statistics.variance(differences) - inside)
    room = len(differences) * (gap / (_Z_ALPHA + _Z_POWER)) ** 2 - between
    if gap <= 1e-12 or room <= 0:
        return None
    answers = statistics.harmonic_mean([*map(len, first), *map(len, second)])
    return max(1, math.ceil(answers * inside / room))


def _gap_and_square(differences: Sequence[float]) -> tuple[float, float]:
    return abs(statistics.fmean(differences)), statistics.fmean(value * value for value in differences)
