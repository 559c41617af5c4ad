"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school word problems with one number as the answer.

The reference is the dataset's own ``answer`` column: a worked solution that ends with ``#### 42``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from torchrl_chat.rewards.marked import HEADING, boxes, tags
from torchrl_chat.rewards.numbers import (
    extract_number,
    goes_on,
    leading_number,
    only_number,
    parse_number,
    reference_number,
)
from torchrl_chat.rewards.verdict import Verdict

_HASHES = re.compile(r"(?<!#)####(?!#)[ \t\r]*+(?P<line>[^\n#]*+)")
_NAMES_ANSWER = re.compile(r"\banswers?\b|\bfinal\s+(?:result|total|number|amount|value|count)\b", re.IGNORECASE)
_CHECKS = re.compile(r"\b(?:check|verif|confirm|validat)", re.IGNORECASE)
_STARTS_WITH_NUMBER = re.compile(
    r"[\s*_`\"'“($\[{\\≈~=:]*(?:(?i:minus|negative)\s+)?[-−–+]?[\s(]*(?:(?:US|Rs\.?|USD|EUR|GBP|INR|C|A)?\s?\\?[$€£¥₹]\s?)?"
    r"[-−–]?\s?(?:\\[a-zA-Z]+\s*\{[\\$\s]*)?[-−–]?\.?\d"
)
_STATES = re.compile(r"[=≈:]|\\approx")
_MARK_INSIDE = re.compile(r"<answer>|\\(?:boxed|fbox)(?![a-zA-Z])")
_HEAD = 80  # characters of a line that tell whether it is a heading
_NEXT_HEADING = re.compile(r"\n[ \t]*+#")
_BELOW_HEADING = 1000  # characters that are looked at for the answer of a heading
# Without a digit, and yet an answer: it takes back the one before it.
_SPELLED = re.compile(
    r"(?:\\[a-z]+\{|[\s*_$])*+(?:(?:(?:minus|negative|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|million|and|half)[\s-]*+)++"
    r"|none|unknown|n/?a|undefined|impossible|infinit[ey]|no\s(?:answer|solution)|(?:cannot|can't|can not)\s.{0,60}|not\s.{0,60}|\\(?:pi|infty)|[π∞])"
    r"[a-z ]{0,20}[.\s*_$}]*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class GSM8KVerifier:
    """Right if the response's final answer equals the reference's, as a number.

    The final answer is the last one that is marked in any of the usual ways: ``#### 42``,
    ``\\boxed{42}``, ``<answer>42</answer>``. Inside a mark, a currency sign, thousands separators, a percent
    sign, a unit, bold type and a trailing period are read over. A mark that holds no number marks nothing, and neither does
    a heading of Markdown (``#### Check``, ``#### 2. Verify``): then the mark before it counts. A heading that names
    the answer (``#### Final Answer``) marks the first line with a number below it, empty hashes the line below them.

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
        marks = _marks(response)
        if marks:
            return marked_number(max(marks)[-1]), True
        return (extract_number(response) if self.last_number else None), False


def _marks(response: str) -> list[tuple[bool, int, str]]:
    """What is marked: whether it counts before others that do not, where it begins, and its text."""
    spans = [(tag.start, tag.end, True, tag.text) for tag in tags(response)]
    for match in _HASHES.finditer(response):
        if found := _behind_hashes(response, match):
            spans.append((match.start(), match.end(), *found))
    marks, end = list[tuple[bool, int, str]](), 0
    for start, stop, certain, text in sorted(spans):
        if start >= end:  # of a tag behind hashes, or hashes in a tag, the outer one
            marks.append((certain, start, text))
            end = stop
    marks += [(True, box.start, box.content) for box in boxes(response)]
    return [mark for mark in marks if _DIGIT.search(mark[-1]) or _SPELLED.fullmatch(mark[-1][:_LONGEST])]


def _behind_hashes(response: str, match: re.Match[str]) -> tuple[bool, str] | None:
    """The text that the hashes mark, and whether that is certain; ``None`` if they are a heading."""
    line = match["line"].strip()
    if not line.strip("*_: "):
        return True, _next_line(response, match.end(), with_digit=False)
    heading = HEADING.match(line[:_HEAD])
    text = line[heading.end() :] if heading else line
    names = _NAMES_ANSWER.search(text) is not None and not _CHECKS.search(text)
    if _MARK_INSIDE.search(line) or (heading and not names):
        return None
    if not _DIGIT.search(text):
        return (True, _next_line(response, match.end(), with_digit=True)) if names else (True, text)
    if names or _STARTS_WITH_NUMBER.match(text[:_HEAD]) or not response[match.end() : match.end() + 200].strip():
        return True, text
    return (False, text) if _STATES.search(text) else None


def _next_line(response: str, start: int, *, with_digit: bool) -> str:
    """The first line with text, or with a digit, up to the next heading."""
    below = _NEXT_HEADING.split(response[start : start + _BELOW_HEADING], maxsplit=1)[0]
    for line in below.splitlines():
        if line.strip() and (not with_digit or _DIGIT.search(line)):
            return "" if _MARK_INSIDE.search(line) else line
    return ""


_DIGIT = re.compile(r"\d")
_LONGEST = 1000  # characters of a marked answer
_WRAPPED = re.compile(
    r"\\(?:text(?:rm|bf|it|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|boxed|fbox|underline|boldsymbol|bm|emph|operatorname)\s*+\{(?P<words>[^{}]*+)\}"
)
_LOOKS = re.compile(
    r"\\(?:text)?color\s*+\{[^{}]*+\}|\\(?:displaystyle|textstyle|large|Large|LARGE|huge|bf|rm|it|left|right|big[a-z]*|Big[a-z]*|q?quad|therefore)(?![a-zA-Z])|\\[()\[\]]"
)
_PER = re.compile(r"\\[dtc]?frac\s*+\{\s*+([a-zA-Z. ]{2,}+)\}\s*+\{\s*+([a-zA-Z. ]++)\}")
_SYMBOLS = (
    (re.compile(r"\^\s*+(?:\{\s*+\\circ\s*+\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])"), "°"),
    (re.compile(r"\\(?:textdollar|pounds|euro|texteuro|dollar)(?![a-zA-Z])(?:\{\})?"), "$"),
    (re.compile(r"≈|\\(?:approx|implies|Rightarrow|rightarrow|to)(?![a-zA-Z])|→|⇒"), "="),
    (re.compile(r"\{\s*+([-−+])\s*+\}"), r"\1"),
    (re.compile(r"\b([ckm]?m|ft|in|yd|feet|units?|miles|inches)\^(?:\{[23]\}|[23])"), r"\1"),
    (re.compile(r"</?(?:b|strong|i|em|u)>"), ""),
    (re.compile(r"(?<!\w)(?:\*{1,3}|_{1,2})(?=[^\s*_{])|(?<=[^\s*_])(?:\*{1,3}|_{1,2})(?![\w{])"), ""),
    (re.compile(r"\s+"), " "),
)
_THOUSANDS = re.compile(r"(?<=\d)(?:\\,|\{,\}|,\\!)\s*+(?=\d{3})")
_SPACES = re.compile(r"\\[,;:! ]|\{,\}|~")
_GROUPED = re.compile(r"(?<![\w.,])\d{1,3}(?:[ _]\d{3})++(?![\d_]|[.,]\d{4})")
# A word or a remark may follow, an operator or a number not.
_UNIT = re.compile(
    r"\s*(?![eE]\d|[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u218f])[^\W\d_(\[]|\s*[(°]|\s?/\s?(?:[a-zA-Z]{2}|[hs]\b)"
)
_JOINS = re.compile(
    r"\b(?:or|and|plus|minus|times|x|divided|multiplied|over)\b|[+*×÷=]|\\(?:times|cdot|div)\b|[/^]\s?\d|\s[-−–]\s?\d",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"≠|!=|\\neq?(?![a-zA-Z])|\\pm(?![a-zA-Z])|±|\+/?-\s?\d|\bbelow\s(?:zero|0|freezing)\b", re.IGNORECASE
)


def marked_number(text: str) -> Decimal | None:
    """The number of a marked answer: alone, with a unit behind it, or the only one in a sentence.

    LaTeX spaces, bold type and thousands separators are read over, and of an equation the last side counts. Fractions,
    products and lists of numbers are not guessed at, nor are "5 or 6", "5 million" and "5 and 1/2"; and what has more
    than 1,000 characters is no answer.

    Example:
        >>> marked_number("**$1,234.50** per month"), marked_number(r"x = -\\text{5}"), marked_number("5 or 6")
        (Decimal('1234.50'), Decimal('-5'), None)
    """
    number = parse_number(text) if len(text) <= _LONGEST else None
    if number is not None or len(text) > _LONGEST or _TAKEN_BACK.search(text):
        return number
    text = _without_looks(text).rpartition("=")[2].strip().strip("{}$*_`\"'“”").strip()
    grouped = _GROUPED.search(text)
    if (
        grouped
        and not _DIGIT.search(text[: grouped.start()])
        and not _DIGIT.search(re.sub(r"^\.\d+", "", text[grouped.end() :]))
    ):
        text = text[: grouped.start()] + re.sub(r"[ _]", "", grouped.group()) + text[grouped.end() :]
    number = parse_number(text)
    if number is not None:
        return number
    found = leading_number(text)
    if found is not None and _UNIT.match(found[1]):
        joined = _JOINS.search(found[1]) and re.search(r"(?<!\w)[\d.]*\d", found[1])
        return None if joined or goes_on(found[1]) else found[0]
    return only_number(text)


def _without_looks(text: str) -> str:
    """The text without what LaTeX and Markdown add for its looks only."""
    for _ in range(3):  # \textbf{\$\text{5}}
        text, count = _WRAPPED.subn(_inside, text)
        if not count:
            break
    text = _SPACES.sub(" ", _THOUSANDS.sub(",", _LOOKS.sub(" ", text)))
    text = _PER.sub(r" \1 per \2", text)
    for pattern, replacement in _SYMBOLS:
        text = pattern.sub(replacement, text)
    return text


def _inside(match: re.Match[str]) -> str:
    words = match["words"]
    return words if not any(c.isalpha() for c in words) and words.strip() == words else f" {words} "
