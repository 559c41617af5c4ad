"""Numbers in text: found, read exactly, and compared as numbers rather than as strings.

Read: ``42``, ``-3``, ``−3``, ``1,234.50``, ``.5``, ``$5``, ``-$5``, ``€5``, ``42%``, ``42.`` (a period that ends a
sentence). Not read: fractions, words, scientific notation. Values are exact decimals, so 0.1 is 0.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from torchrl_chat.rewards.verdict import Verdict

_CURRENCY = r"[$€£¥₹]"
# A minus is a sign only where no operand stands in front of it: "5-3" holds 5 and 3.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}%])[-−+]\s?)?(?:{_CURRENCY}\s?(?P<inner>[-−])?)?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?![\d,]\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\d.])\.\d+)"
)
_MAX_DIGITS = 400  # longer runs of digits are no answer, and exact arithmetic on them is no work worth doing


def parse_number(text: str) -> Decimal | None:
    """The number that the text as a whole spells, or ``None``.

    Example:
        >>> parse_number("$1,234.50")
        Decimal('1234.50')
    """
    text = text.strip().strip("*").strip().rstrip(".").removesuffix("\\%").removesuffix("%").strip()
    match = _NUMBER.fullmatch(text.replace("\\$", "$"))
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
    match = _NUMBER.match(text)
    value = _value(match) if match else None
    return None if match is None or value is None else (value, text[match.end() :])


def only_number(text: str) -> Decimal | None:
    """The number of a text that holds exactly one, not part of a fraction, a power or a word."""
    matches = list(_NUMBER.finditer(text))
    if len(matches) != 1:
        return None
    [match] = matches
    before, after = text[: match.start()], text[match.end() :]
    if re.search(r"[/^*\w]$", before) or re.match(r"[/^*\w]", after):
        return None
    return _value(match)


def _value(match: re.Match[str]) -> Decimal | None:
    digits = match["digits"].replace(",", "")
    if len(digits) > _MAX_DIGITS:
        return None
    value = Decimal(digits)
    negative = (match["sign"] or "").strip() in ("-", "−") or match["inner"] is not None
    return -value if negative else value


@dataclass(frozen=True)
class NumberVerifier:
    """Right if the last number of the response is the reference.

    Args:
        surrounded: the score of the right number with other text around it. Below 1, such an answer does
            not count as right: the response has to be the reference and nothing else.

    Example:
        >>> NumberVerifier()("so it is 7", "7").score
        1.0
        >>> NumberVerifier(surrounded=0.5)("so it is 7", "7")
        Verdict(score=0.5, answer='7', correct=False, parts={}, failure=None)
    """

    surrounded: float = 1.0

    def __call__(self, response: str, reference: str) -> Verdict:
        """Grade one response."""
        found, expected = extract_number(response), parse_number(str(reference))
        if found is None or found != expected:
            return Verdict(0.0, None if found is None else str(found), False)
        if self.surrounded == 1.0 or response.strip() == str(reference).strip():
            return Verdict(1.0, str(found), True)
        return Verdict(self.surrounded, str(found), False)
