"""Mathematical answers: right if equal in value to the reference, however either is written.

The comparison is Hugging Face's Math-Verify (``pip install 'torchrl_chat[math]'``), which parses both sides into
SymPy expressions. Most answers need none of it: integers, decimals, simple fractions and answers that are spelled as
the reference are decided in plain Python first.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from torchrl_chat.rewards.marked import Mark, after_reasoning, boxes, find_marked
from torchrl_chat.rewards.notation import TEXT, UNITS, plain, radians, spelling, tidy
from torchrl_chat.rewards.verdict import Verdict

Target = Literal["latex", "expr", "string"]


@dataclass(frozen=True)
class MathVerifier:
    """Right if the response's final answer equals the reference's, as mathematics.

    The final answer is what the response marks (see :func:`torchrl_chat.rewards.marked.find_marked`):
    ``\\boxed{}`` and ``\\fbox{}``, ``<answer>`` tags, a last line ``#### 42``, "the answer is 42". Text up to
    ``</think>`` is read over. So are units, though not "million", and where the reference is one value, text behind
    an answer that is no unit makes it wrong (``5\\text{ or }6``, ``5\\text{ dozen}``). A percentage is right for both of its
    readings: ``50\\%`` for 50 and for 0.5. Degrees in the argument of ``\\sin`` and the like are degrees, and an angle in
    degrees is compared with one in terms of ``\\pi`` as what it is. A number in a base is right for the same digits in the same base
    (``1011_2``, ``1011_{\\text{two}}``), a time of day for the same time.

    The reference is a bare answer (``\\frac{1}{2}``), a formula (``$...$``), a worked solution that marks its answer, or a
    number. One whose mark cannot be read is an error, never a match.

    Simple answers are decided by :meth:`quick`. All others go to SymPy, which can take forever on a hostile answer;
    so ``isolate`` is set, and math-verify's own time limit (a signal, which works in a main thread only) is off.
    What simple checks can see is refused before, as ``failure = "error: ..."``: answers of more than 10,000
    characters, of more than 60 nested brackets, with numbers of more than 1,000 digits, with powers of numbers or
    factorials that have more than 10,000 digits.

    Args:
        unmarked: whether an answer counts that the response does not mark. As Math-Verify does it, the last formula
            or number of the text is then taken. For training, ``False`` is the safer choice: otherwise a response
            that merely ends with the right number is rewarded, and a policy may learn to ramble until it does.
        which: whether the last marked answer counts, or the first.
        extract: what is read: LaTeX, plain expressions like ``10/9``, and letters A to D.
        strict: whether the names of variables matter, and intervals differ from tuples. A tuple still equals the set of its
            numbers, and so does a list without brackets: ``(2, 1)`` is right for ``\\{1, 2\\}`` and for ``1, 2``.
        float_rounding: where either side has a decimal point, both are rounded to so many decimals. If the reference
            is a number below 0.1, its leading zeros do not count: .0000672 is not .0000673.
        numeric_precision: significant digits to which values without a decimal point are compared.
        allow_set_relation_comp: whether the inequality ``1 < x < 2`` may answer a reference ``(1, 2)``.
        format_reward: the score of a wrong answer that is at least marked.

    Raises:
        ImportError: math-verify is not installed, and the answer is not a simple one.
        ValueError: an option has no such value; a reference is blank, or the mark of its answer cannot be read.

    Example:
        >>> verify = MathVerifier()
        >>> verify("Hence $x = \\\\boxed{\\\\frac{2}{4}}$.", "0.5")
        Verdict(score=1.0, answer='\\\\frac{2}{4}', correct=True, parts={}, failure=None)
        >>> verify("The answer is $1,235$.", "1234").correct
        False
    """

    unmarked: bool = True
    which: Literal["first", "last"] = "last"
    extract: Sequence[Target] = ("latex", "expr")
    strict: bool = True
    float_rounding: int = 6
    numeric_precision: int = 15
    allow_set_relation_comp: bool = False
    format_reward: float = 0.0

    isolate = True

    def __post_init__(self) -> None:
        if self.which not in ("first", "last"):
            raise ValueError(f"MathVerifier(which={self.which!r}): expected 'first' or 'last'.")
        targets = (self.extract,) if isinstance(self.extract, str) else tuple(self.extract)
        if not targets or not set(targets) <= {"latex", "expr", "string"}:
            raise ValueError(f"MathVerifier(extract={self.extract!r}): expected some of 'latex', 'expr', 'string'.")
        object.__setattr__(self, "extract", targets)

    def __call__(self, response: str, reference: Any) -> Verdict:
        """Grade one response. May run for long: see the class."""
        expected, found = _reference(reference), self._find(response)
        return self._quick(found, expected) or self._compare(found, expected)

    def warm(self) -> None:
        """Import SymPy and Math-Verify, and parse once, so that processes forked from this one need not."""
        self.compare("\\boxed{\\frac{\\sqrt{3}}{2}}", "\\frac{1}{2}\\sqrt{3}")

    def quick(self, response: str, reference: Any) -> Verdict | None:
        """The verdict of a simple case, in time linear in the response; ``None`` if it is not a simple one.

        Decided here are responses without an answer, answers that are refused, answers spelled as the reference
        is (but for spacing and the like), and integers, decimals and fractions against each other. Whatever is
        decided here, :meth:`compare` decides in the same way.

        Raises:
            ValueError: the reference is blank.
        """
        expected = _reference(reference)
        return self._quick(self._find(response), expected)

    def _quick(self, found: _Answer | None, expected: _Answer) -> Verdict | None:
        if found is None:
            return Verdict(0.0, None, False)
        if not found.direct:
            return None
        if "latex" in self.extract and expected.direct:
            same = equal_numbers(found.text, expected.text, self._rounding(expected))
            if same is None:
                same = same_text(found.text, expected.text)
            if same is not None:
                return self._verdict(found, same)
        return self._refused(found)

    def compare(self, response: str, reference: Any) -> Verdict:
        """The verdict by Math-Verify, without the arithmetic of :meth:`quick`. May run for long.

        Raises:
            ImportError: math-verify is not installed.
            ValueError: the reference is blank.
        """
        expected = _reference(reference)
        return self._compare(self._find(response), expected)

    def _compare(self, found: _Answer | None, expected: _Answer) -> Verdict:
        if found is None:
            return Verdict(0.0, None, False)
        if found.direct:
            alike = same_text(found.text, expected.text)
            certain = self._refused(found) if alike is None else self._verdict(found, alike)
            if certain is not None:
                return certain
        library, targets = _math_verify(), tuple(self.extract)
        answer = _read(found.text, found.direct, targets)
        if not found.direct:
            spelled = next((part for part in answer if isinstance(part, str)), None)
            if spelled is None:
                return Verdict(0.0, None, False)
            found = found._replace(shown=spelled, text=spelled)
            refused = self._refused(found)
            if refused is not None:
                return refused
        if found.direct and expected.direct and _turns(found.text, expected.text):
            answer = _read(radians(found.text), True, targets)
            expected = expected._replace(text=radians(expected.text))
        correct = library.verify(
            _read(expected.text, expected.direct, targets),
            answer,
            float_rounding=self._rounding(expected),
            numeric_precision=self.numeric_precision,
            strict=self.strict,
            allow_set_relation_comp=self.allow_set_relation_comp,
            timeout_seconds=None,
        )
        return self._verdict(found, correct)

    def _find(self, response: str) -> _Answer | None:
        text = after_reasoning(response)
        mark = find_marked(text, self.which)
        if mark is not None:
            return _marked(mark, text)
        if not self.unmarked:
            return None
        text = text.strip()[-MAX_LENGTH:]
        if _ALONE.fullmatch(text):
            return _Answer(tidy(text), text, True, False)
        if "string" not in self.extract and not _ANYTHING.search(text):
            return None
        return _Answer(plain(text), text, False, False)

    def _rounding(self, expected: _Answer) -> int:
        if expected.text.isdecimal():
            return self.float_rounding
        number = read_number(expected.text) if expected.direct and len(expected.text) <= MAX_DIGITS else None
        zeros = 0
        if number is not None and number.value:
            zeros = max(0, -1 - math.floor(math.log10(abs(number.value))))
        return self.float_rounding + zeros

    def _verdict(self, found: _Answer, correct: bool) -> Verdict:
        score = 1.0 if correct else self.format_reward if found.marked else 0.0
        return Verdict(score, found.shown, correct)

    def _refused(self, found: _Answer) -> Verdict | None:
        reason = too_much(found.text)
        if reason is None:
            return None
        shown = found.shown if len(found.shown) <= 200 else found.shown[:200] + "..."
        return Verdict(0.0, shown, False, failure=f"error: the answer is not evaluated: {reason}.")


# --- What is compared: an answer as a text -------------------------------------------------------------------------


class _Answer(NamedTuple):
    text: str
    shown: str
    direct: bool  # the text is the answer itself, not a text that has an answer somewhere
    marked: bool


_DELIMITER = re.compile(r"(?<!\\)\$|\\[(\[]")
_ANYTHING = re.compile(r"\d|\$|\\[(\[]|\s\[")  # without any of these Math-Verify finds no answer
_ALONE = re.compile(r"\s*[-+−]?\s*[$€£]?[\d.,/]+\s*%?\s*")
_PERCENT_BEHIND = re.compile(r"\s*(?:\$|\\\)|\\\])?\s*(?:\\?%|(?:percent|pct)\b)", re.IGNORECASE)


def _marked(mark: Mark, text: str) -> _Answer:
    parts = [part if len(part) > MAX_LENGTH else tidy(part) for part in mark.parts or (mark.text,)]
    if mark.kind == "box" and _PERCENT_BEHIND.match(text, mark.end) and not parts[-1].endswith("%"):
        parts[-1] = tidy(parts[-1] + "\\%")
    if 1 < len(parts) <= _MANY:  # \boxed{\frac12}, or \boxed{0.5}: one answer, said twice
        kept: list[str] = []
        for part in parts:
            if not any(equal_numbers(part, other, 0) or same_text(part, other) for other in kept):
                kept.append(part)
        parts = kept
    answer = ", ".join(parts)
    return _Answer(answer, mark.text, not _DELIMITER.search(answer), True)


def _reference(reference: Any) -> _Answer:
    if isinstance(reference, float):
        reference = format(Decimal(repr(reference)), "f")
    return _reference_text(str(reference))


_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}\s+[a-zA-Z]{2,}\s+[a-zA-Z]{2,}(?![^{]*\})")
_MANY = 20  # boxes of a list whose contents are compared with one another
_BOX = re.compile(r"\\++(?:boxed|fbox)(?![a-zA-Z])")


@lru_cache(maxsize=8192)
def _reference_text(reference: str) -> _Answer:
    mark = find_marked(reference)
    if "boxed" in reference or "fbox" in reference:
        # Or something before it would be taken for the answer: "As x = 3, it is \\boxed{5".
        last = max((match.start() for match in _BOX.finditer(reference)), default=0)
        unread = reference[:last].strip(" \n$") and all(box.start != last for box in boxes(reference, nested=True))
        if unread or (mark is not None and _BOX.search(mark.text)):
            raise ValueError(
                f"the reference {reference[-200:]!r} marks its answer with a box that cannot be read: expected "
                f"\\boxed{{...}} with braces that close."
            )
    if reference.rfind("<answer>") > max(0, reference.rfind("</answer>")):
        raise ValueError(f"the reference {reference[-200:]!r} opens <answer> and never closes it.")
    if mark is not None:
        found = _marked(mark, reference)
    else:
        answer = tidy(reference)
        direct = not _DELIMITER.search(answer) and not _WORDS.search(answer)
        found = _Answer(answer if direct else plain(reference), reference, direct, False)
    if not found.text.strip():
        raise ValueError(
            f"the reference {reference!r} is blank: expected an answer like '42' or '\\\\frac{{1}}{{2}}'."
        )
    return found


def _turns(a: str, b: str) -> bool:
    """Whether one of two angles is in degrees and the other in radians."""
    return any("\\circ" in x and "\\pi" not in x and "\\pi" in y and "\\circ" not in y for x, y in ((a, b), (b, a)))


# --- The quick way: exact, and in time linear in the answer -----------------------------------------------------------

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
            try:
                exponent = float(part) ** exponent
            except OverflowError:
                exponent = math.inf
        base = match["base"]
        if exponent * (math.log10(int(base) or 1) if base else 1.0) > _MAX_POWER:
            return f"it has a power of more than {_MAX_POWER:,} digits"
    for match in _FACTORIAL.finditer(text):
        if match["n"] is None or int(match["n"]) > 3_000:
            return "it has a large or repeated factorial"
    return None


# --- The slow way --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise ImportError("MathVerifier needs math-verify: pip install 'torchrl_chat[math]'.") from error
    # It warns that its time limit is off. Here that is on purpose.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(lambda record: "Timeout is disabled" not in str(record.msg))
    return math_verify


@lru_cache(maxsize=4096)
def _read(text: str, direct: bool, extract: tuple[Target, ...]) -> list[Any]:
    """The SymPy expressions that the text spells, and the part of it that they were read from."""
    library = _math_verify()
    if direct and "latex" in extract:
        # Math-Verify's search for formulas in a text is not needed here: the text is the formula.
        from latex2sympy2_extended import NormalizationConfig, normalize_latex
        from math_verify.grader import should_treat_as_complex

        config = NormalizationConfig(units=True, malformed_operators=True, nits=True, boxed="none")
        normal = normalize_latex(text, config)
        try:
            return [_converter()(is_real=not should_treat_as_complex(normal)).parse(normal), normal]
        except Exception:
            pass  # the parser raises whatever it likes; the search below has further ways to read it
        text = f"\\boxed{{{text}}}"
    targets = [getattr(library, f"{name.capitalize()}ExtractionConfig")() for name in extract]
    return library.parse(text, extraction_config=targets, parsing_timeout=None)


@lru_cache(maxsize=1)
def _converter() -> Any:
    """The parser of latex2sympy2_extended, with faster numbers.

    It reads each number by ``sympy.Number(text)``, which runs ``from sympy import *`` and the tokenizer of Python:
    0.3 ms a number, a third of all grading.
    """
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from sympy import Float, Integer

    class Converter(_Latex2Sympy):
        def parse_number(self, text: str) -> Any:
            text = text.replace(",", "")
            whole, point, decimals = text.partition(".")
            if not (whole + decimals).isdecimal() or not text.isascii():
                return super().parse_number(text)
            return Float(text) if point else Integer(text)

    return Converter
