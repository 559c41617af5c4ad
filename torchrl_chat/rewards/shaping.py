"""What is added to a score, or made of it, for how long an answer is and how much it repeats itself.

Lengths are those of :class:`~torchrl_chat.rewards.verdict.Episode`: the tokens that the policy sampled.
The penalties say nothing of the answer: their verdicts have no answer and are never ``correct``.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torchrl_chat.rewards.compose import as_verifier
from torchrl_chat.rewards.verdict import Episode, Level, Verdict, arguments, as_verdict, level_of


def _length(episode: Episode, who: object) -> int:
    if episode.length is None:
        raise ValueError(
            f"{type(who).__name__} needs the number of sampled tokens, but the episode's length is None: grade where "
            "the tokens are known (in an environment), or pass it, Episode.of(response, reference, length=...)."
        )
    return episode.length


@dataclass(frozen=True)
class LengthPenalty:
    """A penalty that grows linearly with the number of sampled tokens: 0 up to ``free``, ``penalty`` from ``full`` on.

    Args:
        full: the length, in tokens, from which on the whole penalty is given.
        free: the length up to which there is none.
        penalty: the lowest score, 0 or less.

    Raises:
        ValueError: not ``0 <= free < full``, or a positive penalty.

    Example:
        >>> from torchrl_chat import Episode
        >>> LengthPenalty(full=100)(Episode.of("...", length=25)).score
        -0.25
    """

    grades: ClassVar[Level] = "episode"

    full: int
    free: int = 0
    penalty: float = -1.0

    def __post_init__(self) -> None:
        if not 0 <= self.free < self.full:
            raise ValueError(f"full={self.full}, free={self.free}: expected 0 <= free < full.")
        if not self.penalty <= 0:
            raise ValueError(f"penalty={self.penalty}: expected 0 or a negative number, it is added to a score.")

    def __call__(self, episode: Episode) -> Verdict:
        """Grade one episode.

        Raises:
            ValueError: the episode's length is not known.
        """
        over = (_length(episode, self) - self.free) / (self.full - self.free)
        return Verdict(self.penalty * min(max(over, 0.0), 1.0), None, False)


@dataclass(frozen=True)
class OverlongPenalty:
    """The soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 13).

    0 up to ``max_length - cache`` tokens, then linearly down to -1 at ``max_length``, and -1 beyond; the paper adds it to
    the reward for correctness. The equation knows nothing but the length: an answer that another limit cut off
    before is not punished. The paper generates up to 20,480 tokens, of which 4,096 are the cache. ``weight`` is an
    option of implementations; the equation has none (1).

    Args:
        max_length: the length, in sampled tokens, from which on the whole penalty is given.
        cache: over how many tokens before that the penalty grows.
        weight: what the penalty is multiplied with.

    Raises:
        ValueError: not ``0 < cache <= max_length``, or a negative weight.

    Example:
        >>> from torchrl_chat import Episode
        >>> penalty = OverlongPenalty(max_length=20480, cache=4096)
        >>> [penalty(Episode.of("...", length=n)).score for n in (16384, 18432, 20480, 30000)]
        [0.0, -0.5, -1.0, -1.0]
    """

    grades: ClassVar[Level] = "episode"

    max_length: int
    cache: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.cache <= self.max_length:
            raise ValueError(f"max_length={self.max_length}, cache={self.cache}: expected 0 < cache <= max_length.")
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight}: expected 0 or more.")

    def __call__(self, episode: Episode) -> Verdict:
        """Grade one episode.

        Raises:
            ValueError: the episode's length is not known.
        """
        over = (_length(episode, self) - (self.max_length - self.cache)) / self.cache
        return Verdict(-self.weight * min(max(over, 0.0), 1.0) + 0.0, None, False)  # + 0.0: no negative zero


@dataclass(frozen=True)
class CosineLength:
    """The cosine reward (Yeo et al. 2025, arXiv:2502.03373): what an answer is worth by its length, right or wrong.

    Between ``at_0`` for an answer of no tokens and ``at_max`` for one of ``max_length`` the score follows half a
    cosine; an answer that reaches ``max_length`` gets ``exceeded``, whether right or wrong. The defaults are the values of
    the training script that the authors published with the paper; the paper itself compares several. With them, short right
    answers are worth more than long ones, and short wrong ones less: the intent is that a model spends its tokens where
    it would be wrong otherwise.

    Other than in the paper, an answer that some other limit cut off (``episode.truncated``) gets ``exceeded`` too. The
    authors' code differs in two ways: it counts lengths shortly before the maximum as exceeded, and can add a penalty
    for repetition to wrong answers (here: a :class:`RepetitionPenalty` of its own).

    Args:
        verifier: says whether the answer is right; any but of ``grades = "group"``, also a rubric or a composition. Its
            score is reported as ``"verifier"``.
        max_length: the length, in sampled tokens, that counts as exceeded.
        correct: ``(at_0, at_max)`` of right answers.
        wrong: ``(at_0, at_max)`` of wrong ones.
        exceeded: the score of an answer that was too long.

    Raises:
        ValueError: ``max_length`` is not positive, or the verifier grades groups.

    Example:
        >>> from torchrl_chat import Episode
        >>> from torchrl_chat.rewards.numbers import NumberVerifier
        >>> verify = CosineLength(NumberVerifier(), max_length=100)
        >>> [verify(Episode.of("it is 7", "7", length=n)).score for n in (0, 50, 100)]
        [2.0, 1.5, -10.0]
        >>> verify(Episode.of("it is 8", "7", length=50)).score
        -5.0
    """

    grades: ClassVar[Level] = "episode"

    verifier: Any
    max_length: int
    correct: tuple[float, float] = (2.0, 1.0)
    wrong: tuple[float, float] = (-10.0, 0.0)
    exceeded: float = -10.0

    def __post_init__(self) -> None:
        if not self.max_length > 0:
            raise ValueError(f"max_length={self.max_length}: expected a positive number of tokens.")
        object.__setattr__(self, "verifier", as_verifier(self.verifier))
        if level_of(self.verifier) == "group":
            raise ValueError(
                f"{self.verifier!r:.80} grades groups; CosineLength needs one that grades single answers."
            )

    @property
    def isolate(self) -> bool:
        """Whether the verifier inside belongs in a worker process."""
        return getattr(self.verifier, "isolate", False)

    @property
    def deadline(self) -> float | None:
        """The seconds that the verifier inside asks for, if it does; those of a composition's components together."""
        return getattr(self.verifier, "deadline", None)

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the parts: the score of the verifier inside, and its own parts."""
        return ("verifier", *getattr(self.verifier, "components", ()))

    def __call__(self, episode: Episode) -> Verdict | Awaitable[Verdict]:
        """Grade one episode; awaitable if the verifier inside is.

        Raises:
            ValueError: the episode's length is not known.
        """
        _length(episode, self)
        graded = self.verifier(*arguments(self.verifier, episode))
        return self._later(graded, episode) if inspect.isawaitable(graded) else self._shaped(graded, episode)

    async def _later(self, graded: Awaitable[Any], episode: Episode) -> Verdict:
        return self._shaped(await graded, episode)

    def _shaped(self, graded: Any, episode: Episode) -> Verdict:
        verdict, length = as_verdict(graded, episode.response), _length(episode, self)
        if verdict.failure is not None:  # not known to be right or wrong
            return verdict
        if episode.truncated or length >= self.max_length:
            score = self.exceeded
        else:
            first, last = self.correct if verdict.correct else self.wrong
            score = last + 0.5 * (first - last) * (1.0 + math.cos(math.pi * length / self.max_length))
        return verdict._replace(score=score, parts={**verdict.parts, "verifier": verdict.score})


# Words; a character each of scripts that do not space them; other characters. Long runs are cut, so that an answer
# without a space repeats itself too, while a rule of dashes is one unit.
_UNITS = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0eff]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0eff]{1,24}"
    r"|([^\w\s])\1{0,23}"
)


@dataclass(frozen=True)
class RepetitionPenalty:
    """A penalty for repeating oneself, in the manner of Yeo et al. 2025 (arXiv:2502.03373).

    The share of n-grams that the answer has had before, times ``penalty``; reasoning and answer both count. This is not
    the paper's own form, which puts a small penalty (-0.05 in the authors' script, with n-grams of 40 tokens) on each token
    of a repeated n-gram: a verdict has one score for all tokens. A share of n-grams of words, 20 long unless told
    otherwise, is in the authors' code as well, for wrong answers only. Here the units are words and signs of the text (single characters
    in scripts without spaces), in lower case, and right answers are penalised like wrong ones.

    Args:
        size: the number of units of an n-gram.
        penalty: the score of an answer that is all repetition, 0 or less.

    Raises:
        ValueError: ``size`` is below 1, or the penalty positive.

    Example:
        >>> from torchrl_chat import Episode
        >>> penalty = RepetitionPenalty(size=2)
        >>> penalty(Episode.of("so it is so it is")).score  # 2 of 5 pairs were there before
        -0.4
    """

    grades: ClassVar[Level] = "episode"
    components: ClassVar[tuple[str, ...]] = ("repeated",)

    size: int = 20
    penalty: float = -1.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: expected 1 or more.")
        if not self.penalty <= 0:
            raise ValueError(f"penalty={self.penalty}: expected 0 or a negative number, it is added to a score.")

    def __call__(self, episode: Episode) -> Verdict:
        """Grade one episode."""
        thoughts = episode.message.get("reasoning_content")
        text = f"{thoughts}\n{episode.response}" if isinstance(thoughts, str) else episode.response
        share = repeated_share([unit[0] for unit in _UNITS.finditer(text.lower())], self.size)
        return Verdict(self.penalty * share + 0.0, None, False, {"repeated": share})


def repeated_share(units: Sequence[str], size: int) -> float:
    """The share of n-grams that stood in the sequence before; 0 if it is shorter than one.

    In time proportional to ``len(units) * log(size)``: the names of long n-grams are made of those of two shorter ones.

    Example:
        >>> repeated_share("a b a b a".split(), 2)
        0.5
    """
    names = _named(units)
    covered = 1
    while covered < size and names:
        step = min(covered, size - covered)
        names = _named(list(zip(names, names[step:], strict=False)))
        covered += step
    return (len(names) - len(set(names))) / len(names) if names else 0.0


def _named(items: Sequence[Any]) -> list[int]:
    """A number for each item, equal for equal items, counted from 0."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(item, len(numbers)) for item in items]
