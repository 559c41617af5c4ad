"""Numbers in text: found, read exactly, and compared as numbers rather than as strings.

Read: ``42``, ``-3``, ``−3``, ``1,234.50``, ``.5``, ``$5``, ``-$5``, ``€5``, ``42%``, ``42.`` (a period that ends a
sentence). Not read: fractions, words, scientific notation. Values are exact decimals, so 0.1 is 0.1.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from torchrl_chat.rewards.verdict import Verdict

_CURRENCY = r"[$€£¥₹]"
# A minus is a sign only where no operand stands in front of it: "5-3" holds 5 and 3. With a space behind it, it is a
# sign behind "=" and an opening bracket; elsewhere it is a dash, or the bullet of a list.
# No thousands begin inside a run of digits and commas: a long run would be read again from each of its groups.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}%])(?:[-−+](?!\s)|(?:(?<=[=(\[{])|(?<==\s))[-−+]\s))?"
    rf"(?:{_CURRENCY}\s?(?P<inner>[-−])?)?"
    r"(?P<digits>(?<!\d)(?<!\d,)\d{1,3}(?:,\d{3})++(?![\d,]\d)(?:\.\d+)?|\d++(?:\.\d++)?|(?<![\d.])\.\d++)"
)
_MAX_DIGITS = 400  # longer runs of digits are no answer, and exact arithmetic on them is no work worth doing
_NO_UNIT = re.compile(
    r"[\s-]*(?:k|K|M|B|bn|mn|x|X|(?i:hundreds?|thousands?|millions?|billions?|trillions?|dozens?|half|halves|thirds"
    r"|fifths|sixths|sevenths|eighths|ninths|tenths|hundredths|thousandths|point|squared|cubed|factorial|choose|mod"
    r"|or|and|plus|minus|times|by|over|to|through|vs|versus|divided|multiplied|if|unless|any"
    r"|(?:more|less|fewer)\s{1,4}than))(?![^\W\d_])"
)
_TAKEN = re.compile(
    r"(?:[/^*\w]|\b(?:minus|negative|not|than|or|and|plus|times|by|over|half(?:\sof)?)\s)\Z", re.IGNORECASE
)


def parse_number(text: str) -> Decimal | None:
    """The number that the text as a whole spells, or ``None``.

    Example:
        >>> parse_number("$1,234.50")
        Decimal('1234.50')
    """
    text = text.strip().strip("*").strip().rstrip(".").removesuffix("\\%").removesuffix("%").strip()
    match = _NUMBER.fullmatch(_signed(text.replace("\\$", "$")))
    return _value(match) if match else None


def extract_number(text: str) -> Decimal | None:
    """The last number in the text, or ``None``.

    Example:
        >>> extract_number("64 + 60 = 124, then 124 + 7 = 131. The answer is 131.")
        Decimal('131')
    """
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007  # the last match is wanted
        pass
    return _value(last) if last else None


def leading_number(text: str) -> tuple[Decimal, str] | None:
    """The number that the text begins with, and what follows it."""
    text = _signed(text)
    match = _NUMBER.match(text)
    value = _value(match) if match else None
    return None if match is None or value is None else (value, text[match.end() :])


def only_number(text: str) -> Decimal | None:
    """The number of a text that holds exactly one, not part of a fraction, a power or a word, nor of "5 million"."""
    matches = list(_NUMBER.finditer(text))
    if len(matches) != 1:
        return None
    [match] = matches
    before, after = text[max(0, match.start() - 20) : match.start()], text[match.end() :]
    if _TAKEN.search(before) or re.match(r"[/^*\w]", after) or goes_on(after):
        return None
    return _value(match)


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


def _signed(text: str) -> str:
    """The text without the space behind a sign that it begins with: as a formula, "- 5" is a number."""
    return text[0] + text[1:].lstrip() if text[:1] in ("-", "−", "+") else text


def _value(match: re.Match[str]) -> Decimal | None:
    digits = match["digits"].replace(",", "")
    if len(digits) > _MAX_DIGITS:
        return None
    value = Decimal(digits)
    negative = (match["sign"] or "").strip() in ("-", "−") or match["inner"] is not None
    return value.copy_negate() if negative and value else value  # -value would be rounded to 28 digits


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
