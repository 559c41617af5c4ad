"""Where a response marks its final answer (``\\boxed{}``, ``<answer>``, ``####``, "the answer is"), and the answer's text.

All of it is a few passes over the text, whatever the text is: hostile input costs no more than any other.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections import deque
from decimal import Decimal
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["box", "tag", "hashes", "phrase"]


class Mark(NamedTuple):
    """A marked answer."""

    text: str
    """What is inside the mark."""
    kind: Kind
    """How it is marked."""
    start: int
    """Where the mark begins in the text."""
    end: int
    """Where it ends."""


class Box(NamedTuple):
    """One ``\\boxed{...}`` or ``\\fbox{...}``."""

    start: int
    """Where the command begins."""
    content: str
    """What is between its braces."""
    end: int
    """Where its closing brace ends."""


# A text that was escaped twice has "\\boxed"; a backslash before a brace makes it a printed brace, not a group.
_BRACES = re.compile(r"\\+(?P<box>(?:boxed|fbox)\s*\{)|\\[\\{}]|(?P<open>\{)|(?P<close>\})")
_TAG = re.compile(r"<answer>(?P<text>(?:(?!<answer>).)*?)</answer>", re.DOTALL)
_LAST_LINE = re.compile(r"####(?!#)[ \t]*(?P<text>[^\n#]*)")
_PHRASE = re.compile(r"\banswer(?:[ \t]+is\b|[ \t]*\**:)(?:[ \t]|[:*])*\n?", re.IGNORECASE)
_FINAL = re.compile(r"\bfinal\s$", re.IGNORECASE)
_STATED = re.compile(
    r"(?P<math>\$\$[^$]+\$\$|\$[^$\n]+\$|\\\((?:[^\\\n]|\\(?!\)))+\\\)|\\\[(?:[^\\]|\\(?!\]))+\\\])\**[ \t]*(?:\.?[ \t]*$|\.(?=\s)|(?=\n))"
    r"|(?P<word>\S*[^\s.*])\**(?:\.?\**\s*\Z|[ \t]*(?=\n)|\.(?=\s))"
)
_PHRASE_REACH = 500  # characters behind "the answer is" that are looked at

# Between two boxes that are one answer stands a separator, at most with a name: ", ", " and $y = ", " papers and ".
_JOINT = re.compile(
    r"(?:[,;]|\b(?:and|or)\b)[\s$\\}({]*(?:\\?(?:quad|text)[\s{}]*)*(?:\w{1,8}[\s$]*=)?[\s$\\({\[]*$"
)
_REVISION = re.compile(
    r"\b(?:no|not|wait|hmm|sorry|actually|instead|rather|but|should|final|finally|first|correct\w*|mistake\w*)\b",
    re.I,
)
_JOINT_REACH = 70


def boxes(text: str) -> list[Box]:
    """Every ``\\boxed{...}`` and ``\\fbox{...}`` whose braces close, in the order of the text.

    Of a box inside a box only the inner one is there.

    Example:
        >>> boxes("so \\\\boxed{\\\\frac{1}{2}}, not \\\\boxed{2")
        [Box(start=3, content='\\\\frac{1}{2}', end=22)]
    """
    if "boxed" not in text and "fbox" not in text:
        return []
    found: list[Box] = []
    opened: list[tuple[int, int] | None] = []
    for match in _BRACES.finditer(text):
        if match["box"]:
            opened.append((match.start(), match.end()))
        elif match["open"]:
            opened.append(None)
        elif match["close"] and opened:
            begin = opened.pop()
            if begin is not None and not (found and found[-1].start > begin[0]):
                found.append(Box(begin[0], text[begin[1] : match.start()], match.end()))
    return found


def after_reasoning(text: str) -> str:
    """The text behind its last ``</think>``; nothing, if it begins with a ``<think>`` that never closes.

    Example:
        >>> after_reasoning("<think>5?</think> 6")
        ' 6'
    """
    _, closed, answer = text.rpartition("</think>")
    if closed:
        return answer
    return "" if text.lstrip().startswith("<think>") else text


def find_marked(text: str, which: Literal["first", "last"] = "last") -> Mark | None:
    """The answer that the text marks, or ``None``.

    Boxes, ``<answer>`` tags and a last line with ``####`` are equals: the last (or first) in the text is taken. A box
    inside a tag is the answer of the tag. Boxes that are listed together (``\\boxed{1}, \\boxed{2} and \\boxed{3}``)
    are one answer. "The answer is ..." and "Answer: ..." count only where none of these is there, and only with one
    formula or one word behind them that ends the line or the sentence; "the final answer is ..." also where it
    comes last.

    Example:
        >>> find_marked("\\\\boxed{1}? No. <answer>x = 2</answer>").text
        'x = 2'
        >>> find_marked("Hence the answer is $\\\\frac{1}{2}$.").text
        '$\\\\frac{1}{2}$'
    """
    found = _box_marks(text)
    if "</answer>" in text:
        boxed = list(found)
        for match in _TAG.finditer(text):
            at = bisect(boxed, match.start(), key=lambda mark: mark.start)
            if at == len(boxed) or boxed[at].end > match.end():
                found.append(Mark(match["text"].strip(), "tag", match.start(), match.end()))
    if "####" in text:
        line_start = text.rstrip().rfind("\n") + 1
        line = _LAST_LINE.match(text, line_start + len(text[line_start:]) - len(text[line_start:].lstrip()))
        if line and line["text"].strip() and not any(mark.start > line.start() for mark in found):
            found.append(Mark(line["text"].strip(), "hashes", line.start(), line.end()))
    if not found:
        return _phrase(text, which)
    if which == "first":
        return min(found, key=lambda mark: mark.start)
    last = max(found, key=lambda mark: mark.start)
    final = _phrase(text, which)
    later = final is not None and final.start > last.end and _FINAL.search(text, final.start - 8, final.start)
    return final if later else last


def _box_marks(text: str) -> list[Mark]:
    marks: list[Mark] = []
    for box in boxes(text):
        between = text[marks[-1].end : box.start] if marks else ""
        content = box.content.strip()
        if between and len(between) <= _JOINT_REACH and _JOINT.search(between) and not _REVISION.search(between):
            before = marks.pop()
            joined = before.text if before.text == content else f"{before.text}, {content}"
            marks.append(Mark(joined, "box", before.start, box.end))
        else:
            marks.append(Mark(content, "box", box.start, box.end))
    return marks


def _phrase(text: str, which: Literal["first", "last"]) -> Mark | None:
    phrases = _PHRASE.finditer(text)
    phrase = next(phrases, None)
    if which == "last":
        phrase = next(iter(deque(phrases, maxlen=1)), phrase)
    if phrase is None:
        return None
    reach = text[phrase.end() : phrase.end() + _PHRASE_REACH]
    match = _STATED.match(reach)
    if match is None:
        return None
    stated = match["math"] or match["word"]
    if match["math"] is None and not any(c.isdigit() for c in stated) and reach[match.end() :].strip():
        return None  # "the answer is approximately\n...": a bare word is an answer only where the text ends
    return Mark(stated, "phrase", phrase.start(), phrase.end() + match.end())


# --- The text of an answer: cleaned, compared, bounded ---

_CHARACTERS = str.maketrans(
    {
        "−": "-",
        "\u00a0": " ",
        "\u202f": " ",
        "\u2009": " ",
        "~": " ",
        "°": "^\\circ ",
        "∞": "\\infty ",
        "²": "^2",
        "³": "^3",
    }
)
_ENVELOPE = re.compile(
    r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\(((?:[^\\]|\\(?![()]))+)\\\)|\\\[((?:[^\\]|\\(?![\[\]]))+)\\\]"
)
_ROOT_SIGN = re.compile(r"√\s*(\d+|[a-zA-Z])")
_SPACES = ("\\ ", "\\,", "\\;", "\\:", "\\!", " ", "\n")
# 12\,345 is one number; Math-Verify reads it as the mixed number 12 + 345.
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,;:! ]|\{,\}\s?|,\\!\s?)\s?\d{3})+(?![\d,])")
_SPACED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")

TEXT = r"\\(?:text|textrm|textnormal|mathrm|mbox)\s*"
UNITS = (
    r"(?:square |cubic )?(?:cm|mm|km|m|kg|inch(?:es)?|feet|foot|ft|(?:centi|kilo|milli)?met(?:er|re)s?|miles?|units?"
    r"|degrees?|dollars?|cents|hours?|minutes?|seconds?|days?|weeks?|months?|years?|people|students|ways|apples)"
)
_PLAIN_UNIT = re.compile(rf"(?P<number>[-+]?[\d.,/]+) (?P<unit>{UNITS})")
# Math-Verify drops the words behind a number, these too.
_SCALED = re.compile(
    rf"(?P<number>(?:\\?\$\s*)?[-+]?(?:\d[\d,]{{0,30}})?(?:\.\d{{1,20}})?(?<=\d))(?:\\[,;: ]|\s)*(?:{TEXT}\{{)?\s*(?P<scale>hundred|thousand|million|billion|trillion)"
    r"(?P<more>\b[^{}]*)\}?"
)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def tidy(text: str) -> str:
    """The answer without what surrounds it, and with numbers spelled so that Math-Verify reads them right."""
    text = text.strip().translate(_CHARACTERS).strip().strip("*").strip()
    if text.isdecimal() and text.isascii():
        return text
    if text.endswith(".") and not text.endswith(("..", "\\.", "left.", "right.")):
        text = text[:-1].rstrip()
    envelope = _ENVELOPE.fullmatch(text)
    if envelope:
        text = envelope[envelope.lastindex or 0].strip()
        if text.endswith(".") and not text.endswith(("..", "\\.", "left.", "right.")):
            text = text[:-1].rstrip()
    text = _ROOT_SIGN.sub(r"\\sqrt{\1}", text)
    if text.endswith("%"):  # Math-Verify does not read 5\,\%
        head = text.removesuffix("%").removesuffix("\\")
        while head.endswith(_SPACES):
            head = head[: -2 if head.endswith(_SPACES[:5]) else -1]
        text = head + "\\%"
    text = _THOUSANDS.sub(lambda m: re.sub(r"\D", "", m.group()), text)
    unit = _PLAIN_UNIT.fullmatch(text)
    if unit:
        return f"{unit['number']}\\text{{ {unit['unit']}}}"
    scaled = _SCALED.fullmatch(text) if "illion" in text or "thousand" in text or "hundred" in text else None
    if scaled:
        number = Decimal(re.sub(r"[^-\d.]", "", scaled["number"])) * _SCALES[scaled["scale"]]
        return f"{number.normalize():f}" + (f"\\text{{{scaled['more']}}}" if scaled["more"].strip() else "")
    return text.replace(" ", "") if _SPACED.fullmatch(text) else text


_SAME = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(?:left|right)(?=\s*(?:[()\[\]|]|\\[{}|]))"), ""),
    (re.compile(r"(?<!\\)\\(?:displaystyle(?![a-zA-Z])|[!,;:])"), " "),
    (re.compile(r"\\(?:text|textbf|textrm|mbox|mathrm|mathbf)\s*(?=\{)"), r"\\text"),
    (re.compile(r"([\^_])\{([0-9a-zA-Z])\}(?![0-9])"), r"\1\2"),
    (re.compile(r"\s+"), " "),
)
_NEEDED_SPACE = re.compile(r"(\\[a-zA-Z]+) (?=[a-zA-Z])|([0-9]) (?=[0-9])|([0-9],) (?=[0-9]{3}(?![0-9]))| ")


@lru_cache(maxsize=1024)
def spelling(text: str) -> str:
    """The text without differences that mean nothing: spacing, ``\\left``, ``\\dfrac``, ``x^{2}`` for ``x^2``."""
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if "\\text" in text:
        return text
    return _NEEDED_SPACE.sub(lambda m: m.group() if m.lastindex else "", text)


MAX_LENGTH = 10_000
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
