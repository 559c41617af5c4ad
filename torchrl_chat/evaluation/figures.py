"""The figures of an evaluation: accuracy, pass@k, and how far they can be trusted. Questions are the sample, answers are not.

Answers to one question resemble each other, so that ``samples`` answers to each of ``Q`` questions say less than that many
answers to as many questions would. Standard errors are clustered by question (Miller 2024, arXiv:2411.00640, section
2.2), and resampling draws whole questions.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_Z = 1.96  # 95 %
_RESAMPLES = 2000


def wilson(hits: float, total: float, z: float = _Z) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927).

    Args:
        hits, total: the share; as counts, or scaled to an effective number of observations.
        z: the quantile of the normal distribution; 1.96 for 95 %.

    Example:
        >>> low, high = wilson(50, 100)
        >>> f"{low:.3f} {high:.3f}"
        '0.404 0.596'
    """
    share = hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def clustered_error(clusters: Sequence[Sequence[float]]) -> float:
    """The standard error of the mean of all values, whose clusters are drawn as a whole.

    With one value a cluster it is the usual one, s / sqrt(n).

    Args:
        clusters: the values, one list a question; NaN for fewer than two of them.
    """
    count, groups = sum(map(len, clusters)), len(clusters)
    if groups < 2:
        return math.nan
    mean = sum(map(sum, clusters)) / count
    spread = sum(sum(value - mean for value in cluster) ** 2 for cluster in clusters)
    return math.sqrt(spread * groups / (groups - 1)) / count


def share_interval(clusters: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 95 % interval of the share of ones among all values: Wilson's, at the effective number of answers.

    That number is how many independent answers would have the same (clustered) standard error: all of them with one answer
    a question, between the number of questions and that of the answers otherwise. Unlike mean +- 1.96 errors the
    interval stays within 0 and 1, and does not shrink to a point where all is right or all is wrong.
    """
    count, groups = sum(map(len, clusters)), len(clusters)
    share = sum(map(sum, clusters)) / count
    if count == groups:
        return wilson(share * count, count)
    error = clustered_error(clusters)
    if not error > 0:  # nothing differs between questions, or there is one only
        size: float = groups
    else:
        size = min(count, max(1.0, share * (1 - share) / error**2))
    return wilson(share * size, size)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of ``k`` answers is right, estimated without bias (Chen et al. 2021, arXiv:2107.03374).

    1 - C(n - c, k) / C(n, k): the share of the subsets of size k of the n answers that have a right one.

    Args:
        samples: n, how many answers there are.
        correct: c, how many of them are right.
        k: at most ``samples``.

    Raises:
        ValueError: ``k`` or ``correct`` do not fit ``samples``.

    Example:
        >>> pass_at_k(4, 1, 2)
        0.5
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} right among {samples}: expected 1 <= k and right <= samples.")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(right: int, wrong: Sequence[int], abstained: int, k: int) -> float:
    """The probability that most of ``k`` answers agree on the right one, estimated without bias.

    What most answers say is taken as the answer (self-consistency, Wang et al. 2022, arXiv:2203.11171); of several that
    are said equally often, one is drawn. As for pass@k the estimate is the mean over all subsets of size k of the n answers
    (a U-statistic, Hoeffding 1948), which has no bias where the answers are exchangeable: sampled alike, independently.
    The subsets are not gone through: for each number of votes that the right answer may win with, the ways of drawing the
    others are coefficients of a polynomial in how many are drawn and how many tie.

    Args:
        right: how many answers are right; all of them are one answer.
        wrong: how often each wrong answer was given.
        abstained: answers that say nothing: drawn like others, they vote for nothing.
        k: at most as many as there are answers.

    Raises:
        ValueError: a count is negative, or ``k`` does not fit them.

    Example:
        >>> majority_at_k(2, [1], 0, 3), majority_at_k(2, [1], 0, 1)
        (1.0, 0.6666666666666666)
    """
    count = right + sum(wrong) + abstained
    if min(right, abstained, *wrong, 0) < 0 or not 1 <= k <= count:
        raise ValueError(
            f"maj@{k} of {right} right, {list(wrong)} wrong and {abstained} silent ones: expected 1 <= k <= all."
        )
    won = 0.0
    for votes in range(1, min(right, k) + 1):
        rest = k - votes
        harmless = abstained + sum(times for times in wrong if times < votes)
        # ways[drawn][ties]: of drawing so many among the others, so many of which have as many votes.
        ways = [[math.comb(harmless, drawn)] for drawn in range(rest + 1)]
        for times in (times for times in wrong if times >= votes):
            most = max(map(len, ways)) + 1
            grown = [[0] * most for _ in range(rest + 1)]
            for drawn, by_ties in enumerate(ways):
                for more in range(min(times, votes, rest - drawn) + 1):
                    tie, factor = int(more == votes), math.comb(times, more)
                    for ties, number in enumerate(by_ties):
                        grown[drawn + more][ties + tie] += number * factor
            ways = [_without_zeros(by_ties) for by_ties in grown]
        share = sum(number / (ties + 1) for ties, number in enumerate(ways[rest]))
        won += math.comb(right, votes) * share
    return won / math.comb(count, k)


def _without_zeros(numbers: list[int]) -> list[int]:
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return numbers


def bootstrap_interval(values: Sequence[float], resamples: int = _RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a mean, by drawing the values anew with replacement (Efron 1979).

    The percentiles are those of Student's distribution, a little further out than 2.5 and 97.5, since resampled means of few
    values spread too little (Hesterberg 2015, arXiv:1411.5279).

    Args:
        values: one for each question.
        resamples: how often they are drawn.
        seed: of the draws: the same values have the same interval.
    """
    import numpy as np

    drawn, given = np.random.default_rng(seed), np.asarray(values, dtype=np.float64)
    count = len(given)
    block = max(1, 200_000 // count)  # a large dataset times all resamples would take gigabytes
    means = np.concatenate(
        [
            given[drawn.integers(count, size=(min(block, resamples - start), count), dtype=np.int32)].mean(axis=1)
            for start in range(0, resamples, block)
        ]
    )
    outside = _outside(count)
    # Means of zeros and ones are few numbers, each drawn many times: the half of a number's draws lies on either side of it
    # (Parzen 2004, Statistical Science 19:652). Whole ones would make the interval too wide by up to one question.
    numbers, draws = np.unique(means.round(12), return_counts=True)
    below = (np.cumsum(draws) - draws / 2) / resamples
    low, high = np.interp((outside, 1 - outside), below, numbers)
    return float(low), float(high)


def _outside(count: int) -> float:
    """What is left out on each side of the resampled means of so many values."""
    if count < 2:
        return 0.025
    # Student's quantile by the expansion of Cornish and Fisher (Abramowitz and Stegun 1964, 26.7.5), for 95 %.
    z, free = statistics.NormalDist().inv_cdf(0.975), count - 1
    student = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return statistics.NormalDist().cdf(-student * math.sqrt(count / free))


@dataclass
class Figures:
    """What is counted of the episodes, a few numbers each: the episodes themselves stay in their file."""

    successes: dict[int, list[float]] = field(default_factory=dict)
    rewards: dict[int, list[float]] = field(default_factory=dict)
    votes: dict[int, Counter[str | None]] = field(default_factory=dict)
    """For each question how often each wrong answer was given, ``None`` for no answer; not of files without ``"extracted"``."""
    parts: dict[str, float] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    seconds: float = 0.0
    turns: int = 0
    cut: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)
    prompt_differs: int = 0
    stops: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, episodes: Iterable[Mapping[str, Any]]) -> Figures:
        """The figures of the episodes of a rollout file."""
        figures = cls()
        for episode in episodes:
            figures.add(episode)
        return figures

    def add(self, episode: Mapping[str, Any]) -> None:
        """Count one episode. One without an answer (its request failed) counts as wrong."""
        row = episode["row"]
        right = bool(episode["success"]) and not episode["error"]
        self.successes.setdefault(row, []).append(float(right))
        if "extracted" in episode:
            self.votes.setdefault(row, Counter()).update([] if right else [episode["extracted"]])
        self.rewards.setdefault(row, []).append(episode["reward"] or 0.0)
        for name, value in episode["reward_parts"].items():
            self.parts[name] = self.parts.get(name, 0.0) + (value or 0.0)
        self.lengths.append(episode["sampled_tokens"])
        self.prompt_tokens += max(0, (episode.get("total_tokens") or 0) - episode["sampled_tokens"])
        self.seconds += (episode.get("metadata") or {}).get("seconds") or 0.0
        self.turns += episode["turns"]
        self.cut += episode["cut"]
        if episode["stop"] != "answered" and not episode["success"] and not episode["error"]:
            self.unanswered["cut" if episode["cut"] else "unmarked"] += 1
        self.prompt_differs += bool(episode.get("prompt_differs"))
        self.stops[episode["stop"]] += 1
        for counter, reason in ((self.failures, episode["grade_failure"]), (self.errors, episode["error"])):
            if reason:
                counter[reason.partition(":")[0]] += 1

    @property
    def episodes(self) -> int:
        """How many were counted."""
        return len(self.lengths)

    def summary(self) -> dict[str, Any]:
        """The figures as one object for JSON.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.episodes:
            raise ValueError("no episode was played: there is nothing to sum up.")
        successes, rewards = list(self.successes.values()), list(self.rewards.values())
        lengths = sorted(self.lengths)
        error, reward_error = clustered_error(successes), clustered_error(rewards)
        return {
            "questions": len(successes),
            "episodes": self.episodes,
            "accuracy": sum(map(sum, successes)) / self.episodes,
            "interval": list(share_interval(successes)),
            "standard_error": None if math.isnan(error) else error,
            "pass_at_k": self._at_k(lambda row, k: _passed(self.successes[row], k)),
            "maj_at_k": self._at_k(self._majority) if self._all_voted() else {},
            "mean_reward": sum(map(sum, rewards)) / self.episodes,
            "reward_standard_error": None if math.isnan(reward_error) else reward_error,
            "reward_parts": {name: value / self.episodes for name, value in sorted(self.parts.items())},
            "sampled_tokens": {
                "mean": statistics.fmean(lengths),
                "median": statistics.median(lengths),
                "p95": lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
                "max": lengths[-1],
            },
            "cost": {
                "sampled_tokens": sum(lengths),
                "prompt_tokens": self.prompt_tokens,
                "seconds": round(self.seconds, 3),
            },
            "mean_turns": self.turns / self.episodes,
            "cut_share": self.cut / self.episodes,
            "unanswered": {kind: self.unanswered[kind] for kind in ("cut", "unmarked")},
            "prompt_differs": self.prompt_differs,
            "stops": dict(self.stops.most_common()),
            "grade_failures": dict(self.failures.most_common()),
            "errors": dict(self.errors.most_common()),
        }

    def _all_voted(self) -> bool:
        """Whether every answer was told; those of an older file, which others were added to, were not."""
        return all(
            sum(of) + self.votes.get(row, Counter()).total() == len(of) for row, of in self.successes.items()
        )

    def _majority(self, row: int, k: int) -> float:
        right, votes = int(sum(self.successes[row])), self.votes[row]
        wrong = [times for answer, times in votes.items() if answer is not None]
        return majority_at_k(right, wrong, votes[None], k)

    def _at_k(self, estimate: Callable[[int, int], float]) -> dict[str, dict[str, Any]]:
        """For k = 1, 2, 4 ... and all answers, over the questions that have as many."""
        counts = {row: len(of) for row, of in self.successes.items()}
        most = max(counts.values())
        chosen = sorted({*(2**i for i in range(most.bit_length())), most})
        result: dict[str, dict[str, Any]] = {}
        for k in chosen if most > 1 else ():
            values = [estimate(row, k) for row, count in counts.items() if count >= k]
            low, high = bootstrap_interval(values)
            result[str(k)] = {"value": statistics.fmean(values), "interval": [low, high]}
        return result


def _passed(successes: Sequence[float], k: int) -> float:
    return pass_at_k(len(successes), int(sum(successes)), k)
