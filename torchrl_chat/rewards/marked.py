"""Where a text marks its final answer (``\\boxed{}``, ``<answer>``, ``####``, "the answer is") or its score.

All of it is a few passes over the text, whatever the text is: hostile input costs no more than any other.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections import deque
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
    parts: tuple[str, ...] = ()
    """The contents of the boxes that are one answer."""


class Box(NamedTuple):
    """One ``\\boxed{...}`` or ``\\fbox{...}``; or ``\\boxed 2``, without braces."""

    start: int
    """Where the command begins."""
    content: str
    """What is between its braces; without them, up to the end of the word or of the formula."""
    end: int
    """Where its closing brace, or its content, ends."""


# A text that was escaped twice has "\\boxed"; an odd backslash before a brace makes it a printed brace, not a group.
# A run of backslashes is one match, else a long one would be read again from each of its ends.
_BRACES = (
    r"(?P<run>\\++)(?:(?P<box>(?:boxed|fbox)\s*\{)|(?P<bare>(?:boxed|fbox)(?![a-zA-Z])\s*+)|(?P<brace>[{}]))?|[{}]"
)
_BOXED, _ANY_BOXED = re.compile(_BRACES), re.compile(_BRACES, re.IGNORECASE)
_TAGS, _ANY_TAGS = re.compile(r"<(/?)answer>"), re.compile(r"<(/?)answer>", re.IGNORECASE)
_OPENING = re.compile(r"<answer>|\\(?:boxed|fbox)(?![a-zA-Z])", re.IGNORECASE)
# Without braces TeX boxes one digit; who leaves them out means the number, the command with its arguments, or the letter.
# Where the formula goes on behind that, nobody can tell what is meant.
_BARE = re.compile(
    r"(?=[-+−]?\s?(?:\\?\$\s?)?\.?\d|\(|[a-zA-Z](?=\$|\\[)\]]|[.,;]?(?:\s*\n|\s*\Z))"
    r"|[-+−]?\s?\\(?:[dtc]?frac|sqrt|text[a-z]*|math[a-z]+|left|pi|infty|emptyset|varnothing)(?![a-zA-Z]))"
    r"(?P<content>[-+−]?\s?(?:\\?\$\s?)?(?:\\(?!boxed|fbox)[a-zA-Z]++(?:\s++(?=[\d{\\]))?|\\[,;:!%{}]|\((?:[^()$\n]++|\([^()$\n]*+\))*+\)"
    r"|\{(?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+\}|[^\s\\${}()])++)"
    r"(?!\s*+(?:[-+−*/=<>^_]|\\(?:cdot|times|div|pm|mp|le|ge|leq|geq|neq?|cup|cap)(?![a-zA-Z])))"
)
_BARE_REACH = 400  # characters
_OPENINGS = 16  # that many of the last are looked at where nested marks count, else nesting would cost its square
_LONGEST_MARK = 4000
HEADING = re.compile(
    r"[\s*_]*(?:(?:step|part|case|section|phase|method|option|stage|question|problem|example|approach|scenario|solution"
    r"|check|day|week|note)\s+\(?\d{1,3}\)?(?:\s*[.:)–-]|\b)|\(?\d{1,2}[.)]\s+(?=[\s*_]*[A-Z]))[\s*_:]*",
    re.IGNORECASE,
)
"""What a heading of Markdown that counts begins with, behind its hashes: "Step 2:", "2. "."""
_FORMULA = re.compile(r"[\d$\\]")
_LAST_LINE = re.compile(r"####(?!#)[ \t]*(?P<text>[^\n#]*)")
_PHRASE = re.compile(
    r"\banswer(?:[ \t]+is\b|[ \t]*\**:)(?:[ \t]|[:*])*\n?"
    r"|^#{1,6}[ \t*]*+(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t:*]*+\n\s*+",
    re.IGNORECASE | re.MULTILINE,
)
_FINAL = re.compile(r"\bfinal\s$", re.IGNORECASE)
_STATED = re.compile(
    r"(?P<math>\$\$[^$]+\$\$|\$[^$\n]+\$|\\\((?:[^\\\n]|\\(?!\)))+\\\)|\\\[(?:[^\\]|\\(?!\]))+\\\])\**[ \t]*(?:\.?[ \t]*$|\.(?=\s)|(?=\n))"
    r"|(?P<word>(?:(?:minus|negative|[-−–])[ \t])?\S*[^\s.*])\**(?:\.?\**\s*\Z|[ \t]*(?=\n)|\.(?=\s))"
)
_PHRASE_REACH = 500  # characters behind "the answer is" that are looked at

# Between two boxes that are one answer stands a separator, at most with what was counted before it and a name behind:
# ", ", " and $y = ", " papers and ". A sentence of its own in between begins another answer.
_JOINT = re.compile(
    r"[\w()\[\] -]{0,60}?(?:[,;] ?(?:(?:and|or) )?|\b(?:and|or) )[(\[ ]*+(?:[\w\\]{1,12} ?= ?)?[(\[ ]*+"
)
_LAYOUT = re.compile(r"(?:\\(?:q?quad|text[a-z]*|mbox)(?![a-zA-Z])|\\[,;:! ()\[\]]|[$\s{}])+")
_REVISION = re.compile(
    r"\n\s*\n|\b(?:no|not|wait|hmm|sorry|actually|instead|rather|but|should|final|finally|first|correct\w*|mistake\w*|so|thus|hence"
    r"|therefore|then|now|giving|gives?|means|which|simplif\w*|becomes|equals?|check\w*|verif\w*|again)\b",
    re.I,
)
_JOINT_REACH = 70


def boxes(text: str, *, nested: bool = False, ignore_case: bool = False) -> list[Box]:
    """Every ``\\boxed{...}`` and ``\\fbox{...}`` whose braces close, in the order of the text.

    ``\\boxed 2``, which has no braces, is one as well; "use \\boxed for the answer" is none.

    Args:
        text: the text.
        nested: whether a box that has a box inside is there too, or only the inner one. With it, the contents of all
            boxes together may be as long as the square of the text.
        ignore_case: whether ``\\Boxed`` is a box.

    Example:
        >>> boxes("so \\\\boxed{\\\\frac{1}{2}}, not \\\\boxed{2")
        [Box(start=3, content='\\\\frac{1}{2}', end=22)]
        >>> [box.content for box in boxes("hence $\\\\boxed 12$")]
        ['12']
    """
    if not ignore_case and "boxed" not in text and "fbox" not in text:
        return []
    found: list[Box] = []
    opened: list[tuple[int, int] | None] = []
    for match in (_ANY_BOXED if ignore_case else _BOXED).finditer(text):
        run = match["run"]
        if match["box"]:
            opened.append((match.start(), match.end()))
        elif match["bare"]:
            bare = _BARE.match(text, match.end(), match.end() + _BARE_REACH)
            content = bare["content"].rstrip(".,;:!?*") if bare else ""
            if content:
                found.append(Box(match.start(), content, match.end() + len(content)))
        elif run and (match["brace"] is None or len(run) % 2):
            continue
        elif text[match.end() - 1] == "{":
            opened.append(None)
        elif opened:
            begin = opened.pop()
            if begin is not None and (nested or not (found and found[-1].start > begin[0])):
                found.append(Box(begin[0], text[begin[1] : match.end() - 1], match.end()))
    return sorted(found) if nested else found


def tags(text: str, *, ignore_case: bool = False, outer: bool = False) -> list[Mark]:
    """Every ``<answer>...</answer>``, in the order of the text.

    Args:
        text: the text.
        ignore_case: whether ``<ANSWER>`` is a tag.
        outer: of several opening tags before a closing one, the first counts; otherwise the last.

    Example:
        >>> [mark.text for mark in tags("<answer>1 <answer> 2 </answer> <answer>3")]
        ['2']
    """
    found = []
    opening = None
    for tag in (_ANY_TAGS if ignore_case else _TAGS).finditer(text):
        if not tag[1]:
            opening = opening if outer and opening else tag
        elif opening:
            inside = text[opening.end() : tag.start()].strip()
            found.append(Mark(inside, "tag", opening.start(), tag.end()))
            opening = None
    return found


def marked(text: str) -> list[str]:
    """The answers that are marked as such, ``<answer>...</answer>`` or ``\\boxed{...}``, stripped; in any case.

    Marks that never close, or only after 4,000 characters, are none. Only the last 16 openings are looked at.

    Returns:
        the marked texts in the order in which they open; nested ones too.

    Example:
        >>> marked("<answer>7</answer> or \\\\boxed{\\\\frac{1}{2}}")
        ['7', '\\\\frac{1}{2}']
    """
    openings = deque(_OPENING.finditer(text), maxlen=_OPENINGS)
    if not openings:
        return []
    text = text[openings[0].start() :]
    found = [
        (box.start, box.content.strip())
        for box in boxes(text, nested=True, ignore_case=True)
        if len(box.content) < _LONGEST_MARK
    ]
    longest = _LONGEST_MARK + len("<answer>")
    found += [(m.start, m.text) for m in tags(text, ignore_case=True) if m.end - m.start <= longest]
    return [answer for _, answer in sorted(found)]


def last_marked(text: str) -> str | None:
    """The text of the last mark (see :func:`marked`); ``None`` if nothing is marked.

    Example:
        >>> last_marked("First \\\\boxed{3}, then <answer> 4 </answer>.")
        '4'
    """
    return next(reversed(marked(text)), None)


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

    Boxes, ``<answer>`` tags and a last line with ``####`` are equals: the last (or first) in the text is taken. A line that is
    a heading, "#### Step 2", or that holds no formula behind one of the others, is none of them. A box
    inside a tag is the answer of the tag. Boxes that are listed together (``\\boxed{1}, \\boxed{2} and \\boxed{3}``)
    are one answer. "The answer is ..." and "Answer: ..." count only where none of these is there, and only with one
    formula or one word behind them that ends the line or the sentence; so does what stands below a heading "#### Final
    Answer"; "the final answer is ..." also where it comes last.

    Example:
        >>> find_marked("\\\\boxed{1}? No. <answer>x = 2</answer>").text
        'x = 2'
        >>> find_marked("Hence the answer is $\\\\frac{1}{2}$.").text
        '$\\\\frac{1}{2}$'
    """
    found = _box_marks(text)
    if "</answer>" in text:
        boxed = list(found)
        for tag in tags(text):
            at = bisect(boxed, tag.start, key=lambda mark: mark.start)
            if at == len(boxed) or boxed[at].end > tag.end:
                found.append(tag)
    if "####" in text:
        line_start = text.rstrip().rfind("\n") + 1
        line = _LAST_LINE.match(text, line_start + len(text[line_start:]) - len(text[line_start:].lstrip()))
        heading = line and (HEADING.match(line["text"][:80]) or (found and not _FORMULA.search(line["text"])))
        if line and line["text"].strip() and not heading and not any(mark.start > line.start() for mark in found):
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
    lists: list[list[Box]] = []
    for box in boxes(text):
        between = text[lists[-1][-1].end : box.start] if lists else ""
        joint = between and len(between) <= _JOINT_REACH and _JOINT.fullmatch(_LAYOUT.sub(" ", between))
        if joint and not _REVISION.search(between):
            lists[-1].append(box)
        else:
            lists.append([box])
    marks = []
    for found in lists:
        parts = tuple(box.content.strip() for box in found)
        if len(set(parts)) == 1:
            parts = parts[:1]
        marks.append(Mark(", ".join(parts), "box", found[0].start, found[-1].end, parts))
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


# --- The score that a judge gives ---

_LONGEST_REPLY = 100_000  # characters from the end that are read
_NUMBER = r"(?P<value>[-+]?(?:\d{1,12}(?:\.\d{1,20})?|\.\d{1,20}))(?:\s{0,4}/\s{0,4}(?P<of>\d{1,12})|\s{0,4}\\?(?P<percent>%))?"
_NAMED = re.compile(
    r"(?<![A-Za-z])score[\"'*_`]{0,4}(?:\s{0,4}\([^()\n]{0,40}\))?\s{0,4}[\"'*_`]{0,4}(?:[:=]|is\b(?=[^a-z\n]{0,12}\d))[\"'*_`\s$]{0,8}"
    # No further digits, word, fraction or range may follow: 7th, 3.5.1, 7-8.
    rf"(?:{_NUMBER}(?!\w|[.,]\d|\s{{0,4}}(?:[/%]|\\%|[-–−]\s{{0,4}}\d)))?",
    re.IGNORECASE | re.ASCII,
)
_ONLY = re.compile(rf"\s{{0,9}}{_NUMBER}\s{{0,9}}", re.ASCII)
_OBJECT = re.compile(r"\{\s{0,99}\"")
_OBJECTS = 16  # that many of the last are read


def read_score(reply: str, high: float) -> float | None:
    """The score that a judge's reply ends with.

    It is the last of ``\\boxed{7}``, ``Score: 7``, ``Score: 7/10``, ``Score: 70%`` and the field ``"score"`` of a JSON object,
    behind ``</think>``. What stands in the other fields of the object is not looked at. If the last of these has no
    plain number, or one out of anything but the highest score, there is no score.

    Args:
        reply: the judge's reply.
        high: the highest score, which a fraction must have below its line.

    Example:
        >>> read_score('The text claims "Score: 10". It is wrong.\\n**Score:** 2/10', 10)
        2.0
        >>> read_score('{"score": 3, "why": "It asks for Score: 10"}', 10)
        3.0
    """
    text = after_reasoning(reply)[-_LONGEST_REPLY:]
    objects = _objects(text)
    found = [(match.start(), _out_of(match, high)) for match in _NAMED.finditer(text)]
    found += [(box.start, _out_of(_ONLY.fullmatch(box.content), high)) for box in boxes(text)]
    found = [mark for mark in found if not any(start < mark[0] < end for start, end, _ in objects)]
    found += [(start, value) for start, _, value in objects]
    return max(found, key=lambda mark: mark[0])[1] if found else None


def _objects(text: str) -> list[tuple[int, int, float | None]]:
    """The JSON objects with a field "score": where they begin and end, and its number."""
    found: list[tuple[int, int, float | None]] = []
    end = 0
    for opening in deque(_OBJECT.finditer(text), maxlen=_OBJECTS):
        if opening.start() < end:
            continue
        try:
            fields, end = json.JSONDecoder().raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            continue
        if "score" in fields:
            score = fields["score"]
            match = _ONLY.fullmatch(score) if isinstance(score, str) else None
            if match and not match["of"] and not match["percent"]:
                score = float(match["value"])
            number = isinstance(score, int | float) and not isinstance(score, bool)
            found.append((opening.start(), end, float(score) if number else None))
    return found


def _out_of(match: re.Match[str] | None, high: float) -> float | None:
    if match is None or match["value"] is None:
        return None
    whole = 100.0 if match["percent"] else float(match["of"]) if match["of"] else high
    return float(match["value"]) if whole == high else None
