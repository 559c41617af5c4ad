"""Numbers in text: found, read exactly, and compared as numbers rather than as strings.

Read: ``42``, ``-3``, ``−3``, ``minus 3``, ``- 3`` where a value is expected, ``1,234.50``, ``1 234`` with a narrow or a
no-break space, ``1'234``, ``12,34,567``, ``.5``, ``$5``, ``-$5``, ``US$5``, ``Rs. 5``, ``42%``, ``42.`` (a period that
ends a sentence). Not read: fractions, words, scientific notation. Values are exact decimals, so 0.1 is 0.1.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any

from torchrl_chat.rewards.verdict import Verdict

_CURRENCY = (
    r"(?:(?<![A-Za-z])(?:US|CA?|AU?|NZ|HK|NT|[SR])\s?)?\\?[$€£¥₹₽₩₦₱฿₫₴₪₺＄￡￥]"
    r"|(?<![A-Za-z])(?:Rs\.?|USD|EUR|GBP|INR|CAD|AUD)(?=[\s\d-])"
)
_DASH = "-−–‐‑"
_GAP = "'’\u00a0\u202f\u2009"
_NO_GAPS = str.maketrans("", "", _GAP + ",")
# No thousands begin inside a run of digits and separators: a long run would be read again from each of its groups.
_DIGITS = re.compile(
    r"(?=\.?\d)(?:(?<!\d)(?<!\d,)\d{1,3}(?:,\d{3})++(?![\d,]\d)(?:\.\d+)?"
    r"|(?<!\d)(?<!\d,)\d{1,2}(?:,\d{2}(?!\d))++,\d{3}(?![\d,]\d)(?:\.\d+)?"
    rf"|(?<!\d)(?<!\d[{_GAP}])\d{{1,3}}(?:[{_GAP}]\d{{3}})++(?!\d)(?:\.\d+)?"
    r"|\d++(?:\.\d++)?|(?<![\w.])\.\d++)"
)
_LEAD_REACH = 40  # characters before the digits that are looked at
_LEAD = re.compile(
    rf"(?P<sign>[{_DASH}+][^\S\n]?|\b(?i:minus|negative)\s)?(?:(?:{_CURRENCY})\s?(?P<inner>[{_DASH}]\s?)?)?\Z"
)
_OPERAND = re.compile(r"[\w.)\]}%]\Z")
# Behind these a value is expected, so that a sign with a space behind it, or a word, is the value's sign.
_EXPECTS = re.compile(
    r"(?:[=≈(\[{*$:\"'`]|[=≈:][^\S\n]|\b(?:is|are|be|was|were|of|to|at|by|gets?|got|equals?|gives|yields|becomes|makes"
    r"|reaches|exactly|about|approximately)[^\S\n](?:[*$(]|\*\*)?)\Z",
    re.IGNORECASE,
)
_BEGINS = re.compile(r"(?:\n|[.;]\s)[\s*$]?\Z")
_MAX_DIGITS = 400  # longer runs of digits are no answer, and exact arithmetic on them is no work worth doing
_RAISED = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u218f"  # powers, indices, fractions of one character
_SCALE = (
    r"(?:k|K|M|B|bn|mn|mil|(?i:hundreds?|thousands?|millions?|billions?|trillions?|quadrillions?|lakhs?|crores?|dozens?|scores?"
    r"|half|halves|thirds|fifths|sixths|sevenths|eighths|ninths|tenths|hundredths|thousandths))(?![^\W\d_])"
)
_NO_UNIT = re.compile(
    rf"[\s-]*(?:{_SCALE}|(?:x|X|(?i:point|squared|cubed|factorial|choose|mod"
    r"|or|and|plus|minus|times|by|over|to|through|vs|versus|divided|multiplied|if|unless|any|below"
    r"|(?:more|less|fewer)\s{1,4}than))(?![^\W\d_]))"
)
_TAKEN = re.compile(
    r"(?:\w|[/^*+×÷·±≠<>√][ $]?|[\^_]\{|\\[a-zA-Z]+\s*\{?"
    r"|\b(?:minus|negative|not|than|or|and|plus|times|by|over|half(?:\sof)?)\s)\Z",
    re.IGNORECASE,
)
_CHANGES = re.compile(rf"[/^*+!\w{_RAISED}]|\s*(?:[/^*+×÷·{_RAISED}]|\\[a-zA-Z])")
# In running text: what makes another number of it. The words that only go on, "5 and", "5 or so", are none.
_PART = re.compile(rf"\s?[{_RAISED}]|[/⁄]\d|[eE][-+]?\d|\^|[\s-]{{0,2}}{_SCALE}")
_PART_OF = re.compile(rf"(?:\d\s{{0,2}}[/⁄]\s{{0,2}}|\d[eE][-+]?|\^\{{?|[√{_RAISED}])\Z")


def parse_number(text: str) -> Decimal | None:
    """The number that the text as a whole spells, or ``None``.

    Example:
        >>> parse_number("$1,234.50")
        Decimal('1234.50')
    """
    text = text.strip().strip('*_`"“”').strip().rstrip(".").removesuffix("%").removesuffix("\\").strip()
    found = leading_number(text)
    return found[0] if found is not None and not found[1] else None


def extract_number(text: str) -> Decimal | None:
    """The last number in the text; ``None`` if it has none, or if the last is part of a fraction, a power or "5 million".

    Example:
        >>> extract_number("64 + 60 = 124, then 124 + 7 = 131. The answer is 131.")
        Decimal('131')
    """
    last = None
    for last in _DIGITS.finditer(text):  # noqa: B007  # the last match is wanted
        pass
    if last is None or _PART.match(text, last.end()):
        return None
    start, value = _read(text, last)
    return None if _PART_OF.search(text[max(0, start - 8) : start]) else value


def leading_number(text: str) -> tuple[Decimal, str] | None:
    """The number that the text begins with, and what follows it."""
    if text[:1] in (*_DASH, "+"):  # as a formula, "- 5" is a number
        text = text[0] + text[1:].lstrip()
    match = _DIGITS.search(text, 0, _LEAD_REACH + _MAX_DIGITS)
    if match is None:
        return None
    match = _DIGITS.match(text, match.start()) or match  # to its end, wherever that is
    start, value = _read(text, match)
    return None if start or value is None else (value, text[match.end() :])


def only_number(text: str) -> Decimal | None:
    """The number of a text that holds exactly one, not part of a fraction, a power or a word, nor of "5 million"."""
    matches = list(islice(_DIGITS.finditer(text), 2))
    if len(matches) != 1:
        return None
    [match] = matches
    start, value = _read(text, match)
    before, after = text[max(0, start - 20) : start], text[match.end() :]
    return None if _TAKEN.search(before) or _CHANGES.match(after) or goes_on(after) else value


def goes_on(text: str) -> bool:
    """Whether what stands behind a number changes it, "million", "or 6", instead of naming what was counted.

    Example:
        >>> goes_on(" million people"), goes_on(" people")
        (True, False)
    """
    return _NO_UNIT.match(text) is not None


def reference_number(reference: Any) -> Decimal:
    """The number of a reference: a number, its text, a list of just one of these, or GSM8K's ``... #### 42``.

    Raises:
        ValueError: it is none of these.

    Example:
        >>> reference_number("6 * 7 = 42\\n#### 42"), reference_number([1e16])
        (Decimal('42'), Decimal('10000000000000000'))
    """
    value = reference
    if isinstance(value, list | tuple) and len(value) == 1:
        [value] = value
    number = None
    if isinstance(value, float):
        number = Decimal(repr(float(value))) if math.isfinite(value) else None
    elif isinstance(value, Decimal):
        number = value if value.is_finite() else None
    elif not isinstance(value, bool):
        number = parse_number(str(value).rpartition("####")[2])
    if number is None:
        raise ValueError(
            f"the reference {reference!r:.80} does not end with a number: expected 42, '42' or '... #### 42'."
        )
    return Decimal(f"{number:f}")


def _read(text: str, digits: re.Match[str]) -> tuple[int, Decimal | None]:
    """Where the number begins whose digits these are, its sign and currency included, and its value.

    A sign stands where no operand is in front of it: "5-3" holds 5 and 3. With a space behind it, it is a sign where a value
    is expected; elsewhere it is a dash, or the bullet of a list. U+2212 is no bullet.
    """
    offset = max(0, digits.start() - _LEAD_REACH)
    window = text[offset : digits.start()]
    lead = _LEAD.search(window)
    start, negative = digits.start(), False
    if lead is not None:
        start, negative = offset + lead.start(), lead["inner"] is not None
        sign = lead["sign"]
        if sign is not None:
            before = window[: lead.start()] if offset else "\n" + window[: lead.start()]
            if sign.lower().rstrip() == "minus":
                holds = bool(_EXPECTS.search(before) or _BEGINS.search(before))
            elif sign[0] not in _DASH + "+":
                holds = True
            elif sign[-1].isspace():
                unicode = sign[0] == "−" and not _OPERAND.search(before.rstrip())
                holds = unicode or _EXPECTS.search(before) is not None
            else:
                holds = not _OPERAND.search(before)
            if holds:
                negative = negative or sign[0] != "+"
            else:
                start = offset + lead.end("sign")
    spelled = digits.group().translate(_NO_GAPS)
    if len(spelled) > _MAX_DIGITS:
        return start, None
    value = Decimal(spelled)
    return start, value.copy_negate() if negative and value else value  # -value would be rounded to 28 digits


@dataclass(frozen=True)
class NumberVerifier:
    """Right if the last number of the response is the reference.

    Args:
        surrounded: the score of the right number with other text around it. Below 1, such an answer does
            not count as right: the response has to be the reference and nothing else.

    Raises:
        ValueError: on grading, a reference that is no number (see :func:`reference_number`).

    Example:
        >>> NumberVerifier()("so it is 7", "7").score
        1.0
        >>> NumberVerifier(surrounded=0.5)("so it is 7", "7")
        Verdict(score=0.5, answer='7', correct=False, parts={}, failure=None)
    """

    surrounded: float = 1.0

    def __call__(self, response: str, reference: Any) -> Verdict:
        """Grade one response.

        Raises:
            ValueError: the reference is no number.
        """
        found, expected = extract_number(response), reference_number(reference)
        if found is None or found != expected:
            return Verdict(0.0, None if found is None else f"{found:f}", False)
        if self.surrounded == 1.0 or parse_number(response) == expected:
            return Verdict(1.0, f"{found:f}", True)
        return Verdict(self.surrounded, f"{found:f}", False)
