"""Mathematical answers compared without a library, where that is plain to see, and those that are not worth comparing.

Integers, decimals, fractions, square roots and pi are compared exactly, and texts by their spelling. All of it takes time
linear in the answer; :mod:`torchrl_chat.rewards.math` asks here first.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from torchrl_chat.rewards.marked import TEXT, UNITS, spelling

MAX_LENGTH = 10_000
"""The longest answer that is looked at, in characters."""

_BASED = re.compile(
    r"(?P<sign>-?)0*(?P<digits>[0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)_(?:\{(?P<base>\d{1,2})\}|(?P<short>\d))", re.ASCII
)
_CLOCK = re.compile(
    r"0?(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?::[0-5]\d)?(?:\\text\{ ?(?P<half>[ap]m)\})?", re.ASCII
)


def same_text(a: str, b: str) -> bool | None:
    """``True`` if two answers are spelled alike; ``None`` if that does not say whether they are equal.

    Numbers in a base and times of day are compared here as well: Math-Verify drops the base, and reads a time as a
    ratio. A number without a base is no answer for one that has some; a time without "am" or "pm" is one for either.
    """
    if max(len(a), len(b)) > MAX_LENGTH:
        return True if a == b else None
    a, b = spelling(a), spelling(b)
    if a == b:
        return True
    one, two = _based(a), _based(b)
    if one and two and (one == two or any(c.isdigit() for _, digits, _ in (one, two) for c in digits)):
        return (
            one == two
        )  # letters alone may be no digits: then equal ones are equal, and others are looked at further
    if (one and _DIGITS_ALONE.fullmatch(b)) or (two and _DIGITS_ALONE.fullmatch(a)):
        return False
    early, late = _CLOCK.fullmatch(a), _CLOCK.fullmatch(b)
    if early and late:
        return _same_time(early, late)
    return False if one_value(b) and changed(a) else None


def _based(text: str) -> tuple[str, str, int] | None:
    """The sign, digits and base of ``1011_2`` and ``BAD_{16}``; ``None`` for anything else, ``a_5`` among it."""
    match = _BASED.fullmatch(text) if "_" in text else None
    if match is None:
        return None
    base, digits = int(match["base"] or match["short"]), match["digits"].upper()
    if not 2 <= base <= 36 or not (any(c.isdigit() for c in digits) or digits == match["digits"]):
        return None
    return (match["sign"], digits, base) if all(c == "." or int(c, 36) < base for c in digits) else None


def _same_time(one: re.Match[str], two: re.Match[str]) -> bool:
    """Whether two times of day are the same: 5:30 pm is 5:30 pm, 5:30 and 17:30."""
    if one.group().partition("\\")[0].split(":")[1:] != two.group().partition("\\")[0].split(":")[1:]:
        return False
    halves, hours = (one["half"], two["half"]), (int(one["hour"]), int(two["hour"]))
    if all(halves) or not any(halves):
        return halves[0] == halves[1] and hours[0] == hours[1]
    with_half = 0 if halves[0] else 1
    hour, other = hours[with_half], hours[1 - with_half]
    return other in (hour, hour % 12 + (12 if halves[with_half] == "pm" else 0))


_DIGITS_ALONE = re.compile(
    r"[-+]?[0-9A-Za-z.]+(?:_(?:\w|\{.*\}))?", re.ASCII
)  # without a base, or with none that there is
_SEVERAL = re.compile(
    rf",(?!\d{{3}}(?!\d))|(?<!\\)\$|[;=<>\[]|{TEXT}|\\(?:[{{&]|(?:pm|mp|cup|in|l?or|vee|l?eq|geq?|text\w*|not|neg|lnot|[hv]?phantom|begin)(?![a-zA-Z]))"
    r"|'|\\prime|\s[a-zA-Z]{2,}\s"
)
_TEXT = re.compile(r"(?:\\(?:text[a-z]*|mathrm|mathbf|mathit|mbox|hbox))\s*+\{(?P<words>[^{}]*+)\}")
_NO_UNIT = re.compile(
    r"(?<![\w^])\d|\b(?:or|and|any|if|otherwise|unless|either|else|not|plus|minus|times|over|half|halves|hundreds?|thousands?"
    r"|millions?|billions?|trillions?|dozens?|more|less|fewer|to|squared|cubed|factorial|below|(?-i:[kx]))\b",
    re.IGNORECASE,
)
_CHANGED = re.compile(
    r"\A\s*+\\(?:neq?|geq?|leq?|gt|lt)(?![a-zA-Z])|\\(?:neg|lnot|not|[hv]?phantom)(?![a-zA-Z])|\d\s*+(?:'|\^\s*+\{?\s*+\\prime)"
)


def one_value(reference: str) -> bool:
    """Whether a reference is one value and no more: no list, set, equation or text."""
    return _SEVERAL.search(reference) is None


def changed(answer: str) -> bool:
    """Whether something in an answer changes its value, or takes it back, that Math-Verify reads over as if a unit.

    Example:
        >>> changed("5 \\\\text{ or } 6"), changed("5 \\\\text{ dozen}"), changed("5 \\\\text{ cm}^2")
        (True, True, False)
    """
    if _CHANGED.search(answer):
        return True
    return any(match.start() > 0 and _NO_UNIT.search(match["words"]) for match in _TEXT.finditer(answer))


_DIGITS = r"(?:(?!0)\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?:\\?\$\s*)?(?P<whole>{_DIGITS})(?P<decimals>\.\d+)?|(?P<only>\.\d+)"
    r"|\\[dtc]?frac\s*\{\s*(?P<above>-?\d+)\s*\}\s*\{\s*(?P<below>\d+)\s*\}|\\[dtc]?frac(?P<a>\d)(?P<b>\d)"
    r"|(?P<top>\d+)\s*/\s*(?P<bottom>\d+))"
    rf"(?P<unit>(?:\\[,;: ]|\s)*{TEXT}\{{\s*{UNITS}\s*\}}(?:\^(?:\{{[23]\}}|[23]))?)?",
    re.ASCII,
)
MAX_DIGITS = 300


def equal_numbers(a: str, b: str, rounding: int) -> bool | None:
    """Whether two texts spell the same number; ``None`` where that is not plain to see."""
    if len(a) > MAX_DIGITS or len(b) > MAX_DIGITS:
        return None
    if a.isdecimal() and b.isdecimal() and a.isascii() and b.isascii():
        return a.lstrip("0") == b.lstrip("0")
    one, two = read_number(a), read_number(b)
    if one is None or two is None:
        return _equal_surds(a, b)
    if one.unit and two.unit:  # 1 m is 100 cm
        return None
    if one.exact and two.exact:
        return one.value == two.value
    # With a decimal point both sides are rounded. What is about to be rounded is left to those who round.
    if one.digits > 12 or two.digits > 12 or not 0 <= rounding <= 10:
        return None
    apart = abs(one.value - two.value)
    return True if apart == 0 else False if apart > Fraction(2, 10**rounding) else None


class _Number(NamedTuple):
    value: Fraction
    exact: bool
    digits: int
    unit: bool


@lru_cache(maxsize=1024)
def read_number(text: str) -> _Number | None:
    """The number that a text spells; ``None`` where it spells none, or not plainly."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    above = match["above"] or match["a"] or match["top"]
    if above is not None:
        below = int(match["below"] or match["b"] or match["bottom"])
        if below == 0:
            return None
        digits = 0 if len(text) < 12 else 99  # a fraction of long numbers is no neighbour of a decimal
        return _Number(Fraction(sign * int(above), below), True, digits, match["unit"] is not None)
    spelled = (match["whole"] or "").replace(",", "") + (match["decimals"] or match["only"] or "")
    point = "." in spelled
    digits = len(spelled.replace(".", "").lstrip("0"))
    return _Number(sign * Fraction(spelled), not point, digits, match["unit"] is not None)


# c, \sqrt{r}, \pi and a fraction of such: \frac{3\sqrt{2}}{4}, \frac{1}{2}\sqrt{3}, 2\pi/3.
_PRODUCT = r"(?P<{0}c>\d{{0,6}})(?:\\sqrt(?:\{{(?P<{0}r>\d{{1,6}})\}}|(?P<{0}s>\d)(?!\d)))?(?P<{0}p>\\pi)?"
_SURD = re.compile(
    rf"(?P<sign>[-+]?)(?:\\frac\{{(?P<minus>-?){_PRODUCT.format('n')}\}}\{{{_PRODUCT.format('d')}\}})?"
    rf"(?:\\(?:cdot|times)(?=[\\\d]))?{_PRODUCT.format('f')}(?:/(?P<over>\d{{1,6}}))?",
    re.ASCII,
)


@lru_cache(maxsize=1024)
def _surd(text: str) -> tuple[Fraction, int] | None:
    """A product of rationals, square roots and pi: its square with its sign, without pi, and the power of pi."""
    match = _SURD.fullmatch(spelling(text)) if "\\sqrt" in text or "\\pi" in text or "frac" in text else None
    # A number behind a fraction, or before it, may be meant as a mixed number.
    if match is None or (match["nc"] is not None and (match["fc"] or match["over"])):
        return None
    square, pi = Fraction(1), 0
    fraction = match["nc"] is not None
    for name, power in (("n", 1), ("d", -1), ("f", 1)) if fraction else (("f", 1),):
        root, times = match[name + "r"] or match[name + "s"], match[name + "c"]
        if match[name + "p"]:
            pi += power
        elif not root and not times and not (name == "f" and fraction):
            return None
        factor = int(root or 1) * int(times or 1) ** 2
        if power < 0 and factor == 0:
            return None
        square *= Fraction(factor) ** power
    if match["over"]:
        if int(match["over"]) == 0:
            return None
        square /= int(match["over"]) ** 2
    sign = (-1 if match["sign"] == "-" else 1) * (-1 if match["minus"] else 1)
    return sign * square, pi if square else 0


def _equal_surds(a: str, b: str) -> bool | None:
    one, two = _surd(a), _surd(b)
    if one is None or two is None:
        return None
    if one == two:
        return True
    x, y = (math.copysign(math.sqrt(abs(square)) * math.pi**pi, square) for square, pi in (one, two))
    # SymPy compares 15 digits: what is that close is left to it.
    return False if abs(x - y) > 1e-6 * max(1.0, abs(x), abs(y)) else None


# --- What is not worth evaluating -----------------------------------------------------------------------------------

_MAX_DEPTH = 60
_MAX_POWER = 10_000  # digits of a number that is still multiplied out
_LONG_NUMBER = re.compile(r"\d{1001}")
_POWER = re.compile(r"(?:(?<![\d.])(?P<base>\d+)|[)}])(?P<tower>(?:\^[{(]*-?\d+)+)")
_FACTORIAL = re.compile(r"(?P<n>\d+)[)}]*(?=!)|![)}]*!")


def too_much(text: str) -> str | None:
    """Why the answer is not worth evaluating, or ``None``. Linear time."""
    if len(text) > MAX_LENGTH:
        return f"it has more than {MAX_LENGTH:,} characters"
    depth = 0
    for bracket in re.findall(r"[{(\[]|[})\]]", text):
        depth += 1 if bracket in "{([" else -1
        if depth > _MAX_DEPTH:
            return f"it nests more than {_MAX_DEPTH} brackets"
    if _LONG_NUMBER.search(text):
        return "it has a number of more than 1,000 digits"
    if "^" not in text and "**" not in text and "!" not in text:
        return None
    text = re.sub(r"\s|\\(?:left|right|[,;:! ])", "", text).replace("**", "^")
    for match in _POWER.finditer(text):
        exponent = 1.0
        for part in reversed(re.findall(r"\d+", match["tower"])):
            exponent = _power(float(part), exponent)
        base = match["base"]
        if exponent * (math.log10(int(base) or 1) if base else 1.0) > _MAX_POWER:
            return f"it has a power of more than {_MAX_POWER:,} digits"
    for match in _FACTORIAL.finditer(text):
        if match["n"] is None or int(match["n"]) > 3_000:
            return "it has a large or repeated factorial"
    return None


def _power(base: float, exponent: float) -> float:
    try:
        return base**exponent
    except OverflowError:
        return math.inf
