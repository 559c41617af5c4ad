"""The Countdown game: reach a target from given numbers with + - * / and parentheses.

Known as a task for reasoning from TinyZero (Pan et al. 2025). Expressions are read by a parser of their own and computed
exactly, as fractions; nothing that a model writes is run. Length, depth and digits are bounded, and there is no power,
so that the work is bounded too.
"""

from __future__ import annotations

import operator
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torchrl_chat.rewards.marked import last_marked
from torchrl_chat.rewards.verdict import Verdict

_LONGEST, _DEEPEST, _MOST_DIGITS = 1000, 50, 12
_TOKEN = re.compile(
    r"(?P<number>[0-9]+)|(?P<space>\s+|\\[ ,;:!]|\\left\b|\\right\b|\\(?:quad|,)|~)"
    r"|(?P<times>[*×⋅·∗✕]|\\times(?![A-Za-z])|\\cdot(?![A-Za-z]))|(?P<divided>[/÷∕]|\\div(?![A-Za-z]))"
    r"|(?P<plus>\+)|(?P<minus>[-−–])|(?P<frac>\\[dt]?frac(?![A-Za-z]))|(?P<bracket>[()\[\]{}])"
)
_CLOSES = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Expression:
    """An arithmetic expression that was read."""

    value: Fraction | None
    """What it comes to; ``None`` where it divides by zero."""
    numbers: tuple[int, ...]
    """The numbers written in it, in order."""


def read_expression(text: str) -> Expression | None:
    """Read an expression over whole numbers, ``+ - * /``, ``× ÷ −``, ``\\times \\cdot \\div \\frac{}{}`` and brackets.

    Returns:
        the expression; ``None`` for anything else: a power, a decimal, a product without a sign, text, more than
        1,000 characters, 50 levels of brackets or 12 digits.

    Example:
        >>> read_expression("(3 + 4) × \\\\frac{5}{2}")
        Expression(value=Fraction(35, 2), numbers=(3, 4, 5, 2))
        >>> read_expression("2 ** 9") is None
        True
    """
    if len(text) > _LONGEST:
        return None
    try:
        reader = _Reader(text)
        value = reader.sum(0)
        reader.expect(None)
    except _Malformed:
        return None
    return Expression(value, tuple(reader.numbers))


class _Malformed(Exception):
    """The text is no expression."""


class _Reader:
    """A recursive-descent parser that computes while it reads."""

    def __init__(self, text: str):
        self.tokens: list[tuple[str | None, str]] = []
        self.at, self.numbers = 0, list[int]()
        pos = 0
        while pos < len(text):
            token = _TOKEN.match(text, pos)
            if token is None or (token.lastgroup == "number" and len(token[0]) > _MOST_DIGITS):
                raise _Malformed
            pos = token.end()
            if token.lastgroup != "space":
                self.tokens.append((token.lastgroup, token[0]))

    def next(self, *kinds: str) -> tuple[str | None, str] | None:
        """The next token, if it is of one of these kinds."""
        if self.at == len(self.tokens) or self.tokens[self.at][0] not in kinds:
            return None
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, text: str | None) -> None:
        """Go over this token, or (``None``) be at the end."""
        if (self.tokens[self.at][1] if self.at < len(self.tokens) else None) != text:
            raise _Malformed
        self.at += 1

    def sum(self, depth: int) -> Fraction | None:
        if depth > _DEEPEST:
            raise _Malformed
        value = self.product(depth)
        while sign := self.next("plus", "minus"):
            value = _computed(operator.add if sign[0] == "plus" else operator.sub, value, self.product(depth))
        return value

    def product(self, depth: int) -> Fraction | None:
        value = self.factor(depth)
        while sign := self.next("times", "divided"):
            value = _computed(operator.mul if sign[0] == "times" else operator.truediv, value, self.factor(depth))
        return value

    def factor(self, depth: int) -> Fraction | None:
        negative = False
        while sign := self.next("plus", "minus"):
            negative ^= sign[0] == "minus"
        value = self.atom(depth)
        return -value if negative and value is not None else value

    def atom(self, depth: int) -> Fraction | None:
        token = self.next("number", "frac", "bracket")
        if token is None:
            raise _Malformed
        kind, text = token
        if kind == "number":
            self.numbers.append(int(text))
            return Fraction(int(text))
        if kind == "frac":
            self.expect("{")
            above = self.closed("{", depth)
            self.expect("{")
            return _computed(operator.truediv, above, self.closed("{", depth))
        return self.closed(text, depth)

    def closed(self, opening: str, depth: int) -> Fraction | None:
        """What stands between a bracket that was read and its closing one."""
        if opening not in _CLOSES:
            raise _Malformed
        value = self.sum(depth + 1)
        self.expect(_CLOSES[opening])
        return value


def _computed(operate: Any, left: Fraction | None, right: Fraction | None) -> Fraction | None:
    if left is None or right is None or (operate is operator.truediv and right == 0):
        return None
    return operate(left, right)


def _bare(text: str) -> str:
    """The text without what may be around a formula: blanks, a period, signs of Markdown and LaTeX."""
    text = text.strip().rstrip(".").strip("$`* \t\r\n")
    return re.sub(r"^\\[(\[]|\\[)\]]$", "", text).strip()


@dataclass(frozen=True)
class CountdownVerifier:
    """Right if the answer is an expression over the given numbers that comes to the target.

    The answer is the last ``<answer>...</answer>`` or ``\\boxed{...}``, or else the whole response. It may be a chain,
    ``(1 + 3) * (2 + 4) = 4 * 6 = 24`` or ``24 = (1 + 3) * (2 + 4)``: each side has to come to the target, and the
    numbers count of the first side that uses the given ones, or else of the first that is not just the target. A minus sign in front of a number or a bracket is allowed.

    The reference is ``{"target": 24, "nums": [1, 2, 3, 4]}``, or ``"numbers"`` for ``"nums"``.

    Args:
        use_all: every number exactly once, as in TinyZero; otherwise at most once, as in the television game.
        format_reward: the score of an expression that can be read but is wrong: it comes to something else, divides by
            zero, or uses other numbers.

    Example:
        >>> verify = CountdownVerifier()
        >>> verify("<answer>(1 + 3) * (2 + 4) = 24</answer>", {"target": 24, "nums": [1, 2, 3, 4]}).score
        1.0
        >>> verify("<answer>4 * 3 * 2</answer>", {"target": 24, "nums": [1, 2, 3, 4]}).score
        0.0
        >>> CountdownVerifier(use_all=False)("4 * 3 * 2", {"target": 24, "nums": [1, 2, 3, 4]}).score
        1.0
    """

    use_all: bool = True
    format_reward: float = 0.0

    def __call__(self, response: str, reference: Mapping[str, Any]) -> Verdict:
        """Grade one response.

        Raises:
            ValueError: the reference lacks the target or the numbers, or they are no whole numbers.
        """
        target, given = _task(reference)
        marked = last_marked(response)
        text = response if marked is None else marked
        if len(text) > _LONGEST:
            return Verdict(0.0, None, False)
        sides = [_bare(side) for side in _bare(text).split("=")]
        read = [read_expression(side) for side in sides]
        chain = [(side, expression) for side, expression in zip(sides, read, strict=True) if expression is not None]
        if len(chain) < len(sides):
            return Verdict(0.0, None, False)
        supply = Counter(given)
        # Of "24 = 4 * 6" the first side is the claim, unless it is an answer by itself (nums = [24]).
        own = [one for one in chain if one[1].numbers != (target,)] or chain
        fits = operator.eq if self.use_all else operator.le
        allowed = [one for one in chain if fits(Counter(one[1].numbers), supply)]
        shown, _ = (allowed or own)[0]
        correct = bool(allowed) and all(expression.value == target for _, expression in chain)
        return Verdict(1.0 if correct else self.format_reward, shown, correct)


def _task(reference: Any) -> tuple[int, list[int]]:
    if not isinstance(reference, Mapping):
        raise ValueError(
            f"the reference {reference!r:.80} is no mapping: expected {{'target': 24, 'nums': [1, 2, 3, 4]}}."
        )
    numbers = reference.get("nums", reference.get("numbers"))
    if reference.get("target") is None or not isinstance(numbers, Iterable) or isinstance(numbers, str):
        raise ValueError(f"the reference {reference!r:.80} needs 'target' and 'nums' (or 'numbers'), a list.")
    try:
        given = [operator.index(number) for number in numbers]
        target = operator.index(reference["target"])
    except TypeError:
        raise ValueError(f"'target' and 'nums' of the reference {reference!r:.80} must be whole numbers.") from None
    if not given or min(given) < 0:
        raise ValueError(f"'nums' of the reference is {given!r:.80}: expected numbers of 0 and more.")
    return target, given


_QUERY = (
    "Reach {target} with the numbers {nums}. Use every number exactly once; you may add (+), subtract (-), multiply (*) "
    "and divide (/), and set parentheses. Give the expression inside <answer></answer>."
)
_TRIES = 20_000


def countdown_rows(
    size: int,
    seed: int,
    numbers: Sequence[int] = (3, 4),
    low: int = 1,
    high: int = 99,
    target: tuple[int, int] = (10, 99),
) -> Iterator[dict[str, Any]]:
    """Countdown problems that have a solution: each comes from an expression that was drawn first.

    A row depends on its index and the arguments but ``size``: a longer run begins with the rows of a shorter one.

    Args:
        size: how many rows.
        seed: the seed of all rows.
        numbers: how many numbers a problem may have; each count is as likely.
        low: the smallest number.
        high: the largest.
        target: the smallest and the largest target.

    Yields:
        ``{"query": str, "target": int, "nums": list[int], "solution": str}``. The solution uses every number once, and
        all that it computes on the way is a positive whole number.

    Raises:
        ValueError: the ranges are empty, or no problem was found in them.

    Example:
        >>> row = next(countdown_rows(1, seed=0))
        >>> CountdownVerifier()(row["solution"], row).score
        1.0
    """
    if not numbers or min(numbers) < 2 or max(numbers) > 16:
        raise ValueError(f"numbers={numbers!r}: expected how many numbers a problem has, each count from 2 to 16.")
    if not 1 <= low <= high:
        raise ValueError(f"low={low}, high={high}: expected 1 <= low <= high.")
    if not 1 <= target[0] <= target[1]:
        raise ValueError(f"target={target}: expected (smallest, largest), from 1 on.")
    return (_row(random.Random(f"countdown {seed} {i}"), numbers, low, high, target) for i in range(size))


def _row(rng: random.Random, counts: Sequence[int], low: int, high: int, target: tuple[int, int]) -> dict[str, Any]:
    for _ in range(_TRIES):
        nums = [rng.randint(low, high) for _ in range(rng.choice(counts))]
        value, solution = _combined(rng, nums)
        if target[0] <= value <= target[1]:
            query = _QUERY.format(target=value, nums=", ".join(map(str, nums)))
            return {"query": query, "target": value, "nums": nums, "solution": solution}
    raise ValueError(
        f"no expression over {counts} numbers from {low} to {high} was found that comes to a target from {target[0]} to "
        f"{target[1]}, in {_TRIES} tries: widen target=(smallest, largest)."
    )


def _combined(rng: random.Random, nums: Sequence[int]) -> tuple[int, str]:
    """A random expression over all the numbers: its value and its text."""
    parts = [(num, str(num), 3) for num in nums]  # value, text, how tightly it binds
    while len(parts) > 1:
        rng.shuffle(parts)
        one, two = parts.pop(), parts.pop()
        if one[0] < two[0]:
            one, two = two, one
        signs = ["+", "*"] + ["-"] * (one[0] > two[0]) + ["/"] * (one[0] % two[0] == 0)
        parts.append(_joined(rng.choice(signs), one, two))
    return parts[0][0], parts[0][1]


def _joined(sign: str, one: tuple[int, str, int], two: tuple[int, str, int]) -> tuple[int, str, int]:
    binds = 1 if sign in "+-" else 2
    left = one[1] if one[2] >= binds else f"({one[1]})"
    # a - (b - c), a / (b * c): what stands on the right of these keeps its brackets
    right = two[1] if two[2] > binds or (two[2] == binds and sign in "+*") else f"({two[1]})"
    operate = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}[sign]
    return operate(one[0], two[0]), f"{left} {sign} {right}", binds
