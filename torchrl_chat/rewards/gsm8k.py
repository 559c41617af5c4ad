"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school word problems with one number as the answer.

The reference is the dataset's own ``answer`` column: a worked solution that ends with ``#### 42``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from torchrl_chat.rewards.marked import boxes, tags
from torchrl_chat.rewards.numbers import (
    extract_number,
    goes_on,
    leading_number,
    only_number,
    parse_number,
    reference_number,
)
from torchrl_chat.rewards.verdict import Verdict

# The answer stands on the line of the hashes; where that is empty, on the next one with text.
_HASHES = re.compile(r"####(?:[ \t\r]*+\n\s*+|[ \t]*+)([^\n#]*+)")


@dataclass(frozen=True)
class GSM8KVerifier:
    """Right if the response's final answer equals the reference's, as a number.

    The final answer is the last one that is marked in any of the usual ways: ``#### 42``,
    ``\\boxed{42}``, ``<answer>42</answer>``. Inside a mark, a currency sign, thousands separators, a percent
    sign, a unit and a trailing period are read over.

    Args:
        last_number: without a mark, take the last number of the response.
        format_reward: the score of a wrong answer that is at least marked (torchrl gives 0.1).

    Example:
        >>> verify = GSM8KVerifier()
        >>> verify("So she has \\\\boxed{1,234}.", "... #### 1234").score
        1.0
        >>> verify("So she has 1,234.", "... #### 1234").answer is None
        True
    """

    last_number: bool = False
    format_reward: float = 0.0

    def __call__(self, response: str, reference: str) -> Verdict:
        """Grade one response."""
        found, marked = self.extract(response)
        expected = reference_number(reference)
        correct = found is not None and found == expected
        score = 1.0 if correct else self.format_reward if marked and found is not None else 0.0
        return Verdict(score, None if found is None else f"{found:f}", correct)

    def extract(self, response: str) -> tuple[Decimal | None, bool]:
        """The final answer, and whether it was marked as such."""
        spans = [(m.start(), m.end(), m[1]) for m in _HASHES.finditer(response)]
        spans += [(tag.start, tag.end, tag.text) for tag in tags(response)]
        candidates, end = [], 0
        for start, stop, text in sorted(spans):
            if start >= end:  # of a tag behind hashes, or hashes in a tag, the outer one
                candidates.append((start, text))
                end = stop
        candidates += [(box.start, box.content) for box in boxes(response)]
        if candidates:
            _, text = max(candidates)
            return marked_number(text), True
        return (extract_number(response) if self.last_number else None), False


_LONGEST = 1000  # characters of a marked answer
_SPACES = re.compile(
    r"\\[,;:! ]|\{,\}|\\(?:text(?:rm|bf|it|normal)?|mathrm|mathbf|mbox)\s*+\{(?P<words>[^{}]*+)\}|~"
)
# A word or a remark may follow, an operator or a number not.
_UNIT = re.compile(r"\s*(?![eE]\d)[^\W\d_(\[]|\s*[(°]")
_JOINS = re.compile(
    r"\b(?:or|and|plus|minus|times|x|divided|multiplied|over)\b|[+*×÷=]|\\(?:times|cdot|div)\b|[/^]\s?\d|\s[-−–]\s?\d",
    re.IGNORECASE,
)


def marked_number(text: str) -> Decimal | None:
    """The number of a marked answer: alone, with a unit behind it, or the only one in a sentence.

    LaTeX spaces and thousands separators are read over, and of an equation the last side counts. Fractions,
    products and lists of numbers are not guessed at, nor are "5 or 6", "5 million" and "5 and 1/2"; and what has more
    than 1,000 characters is no answer.
    """
    if len(text) > _LONGEST:
        return None
    text = _SPACES.sub(_plain, text).strip()
    text = text.rpartition("=")[2].strip().strip("{}$").strip()
    number = parse_number(text)
    if number is not None:
        return number
    found = leading_number(text)
    if found is not None and _UNIT.match(found[1]):
        joined = _JOINS.search(found[1]) and re.search(r"(?<!\w)[\d.]*\d", found[1])
        return None if joined or goes_on(found[1]) else found[0]
    return only_number(text)


def _plain(match: re.Match[str]) -> str:
    if match["words"] is not None:
        return f" {match['words']} "
    return "," if match.group() in ("\\,", "{,}", "\\!") else " "
