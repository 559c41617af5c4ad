"""One notation for answers: what people write in many ways (``\\varnothing``, ``½``, ``1011_{\\text{two}}``), in the one that is compared.

Math-Verify reads some of these ways as something else, in silence: it drops the sign of degrees, a base, the text behind a
number. All of it is a few passes over the text, each linear in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from unicodedata import normalize

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–‐‑‒﹣－", "-"),
        **dict.fromkeys("\u00a0\u202f\u2009\u2007", " "),
        **dict.fromkeys("€£¥₹＄￡￥", "\\$"),
        **dict.fromkeys("·⋅∙", "\\cdot "),
        **dict.fromkeys("′’", "'"),
        **dict.fromkeys("⁄∕", "/"),
        "°": "^\\circ ",
        "∞": "\\infty ",
        "×": "\\times ",
        "÷": "\\div ",
        "％": "%",
        "¢": "\\text{ cents}",
        "∅": "\\emptyset ",
        **{char: "\\frac{{{}}}{{{}}}".format(*normalize("NFKC", char).split("⁄")) for char in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"},
    }
)
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ⁽⁾", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ₍₎"
_LEVEL = {
    **dict(zip(_RAISED, "0123456789+-n()", strict=True)),
    **dict(zip(_LOWERED, "0123456789+-n()", strict=True)),
}
_RUN = re.compile(f"(?P<raised>[{_RAISED}]++)|[{_LOWERED}]++")
_ROOT_SIGN = re.compile(r"([√∛∜])\s*+(?:(\d++|[a-zA-Z])|\(([^()]*+)\)|(?=\{))")
_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}

_BASES = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
)
_NUMBER_OF = {
    **{word: str(base) for base, word in enumerate(_BASES.split(), 2)},
    "binary": "2", "octal": "8", "decimal": "10", "hexadecimal": "16", "hex": "16",
}  # fmt: skip
_BASE = r"(?P<base>\d{1,2}|" + "|".join(sorted(_NUMBER_OF, key=len, reverse=True)) + ")"
_WORDS = r"\\(?:text(?:rm|bf|it|sf|tt|normal)?|mathrm|mathbf|mathit|mathsf|operatorname\*?|mbox|hbox)\s*+"
_FUNCTIONS = r"arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp"
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREES = r"\s*+\^\s*+(?:\{\s*+\\circ\s*+\}|\\circ(?![a-zA-Z]))"
_OF_DEGREES = re.compile(
    rf"(?P<number>(?<![\d.])\d++(?:\.\d++)?|(?<![a-zA-Z\\])[a-zA-Z]|\\(?:alpha|beta|gamma|theta|phi|varphi)){_DEGREES}"
    rf"|(?P<sum>\((?:[^()]*+)\)){_DEGREES}|(?<!\s){_DEGREES}"
)


def _base(match: re.Match[str]) -> str:
    return f"_{{{_NUMBER_OF.get(match['base'].lower(), match['base'])}}}"


def _apart(match: re.Match[str], word: str) -> str:
    """The word, with a space before it where it would lengthen a command."""
    return f" {word}" if match.start() and match.string[match.start() - 1].isalpha() else word


# In this order: later ones see what earlier ones have written.
_LATEX: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"\\not\s*+="), r"\\neq"),
    (re.compile(r"\\lbrace(?![a-zA-Z])\s*+"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])\s*+"), r"\\}"),
    (re.compile(r"\\(?:degree|textdegree)(?![a-zA-Z])\s*+"), r"^\\circ "),
    (re.compile(r"\\(?:textdollar|dollar|pounds|textsterling|euro|texteuro|yen|rupee)(?![a-zA-Z])\s*+(?:\{\})?"), r"\\$"),
    (re.compile(_WORDS + r"\{\s*+(?:\\?\$|US\\?\$|USD|EUR|GBP|INR)\s*+\}"), r"\\$"),
    # What only changes the look.
    (re.compile(r"\\checkmark(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:text)?color\s*+\{[^{}]*+\}"), ""),
    (re.compile(r"\\(?:underline|boldsymbol|bm|hbox\s*+(?=\{\s*+[\d.-]))(?![a-zA-Z])\s*+(?=\{)"), ""),
    (re.compile(r"\{\s*+([+-])\s*+\}(?=\s*+[\d\\(.])"), r"\1"),
    (re.compile(r"(?<![\w}^_])" + _WORDS + r"\{\s*+([+-]?\d[\d,.]*+)\s*+\}(?!\s*+_)"), r"\1"),
    (re.compile(_WORDS + r"\{\s*+([ei])\s*+\}"), lambda match: _apart(match, match[1])),
    (re.compile(_WORDS + rf"\{{\s*+({_FUNCTIONS})\s*+\}}"), r"\\\1 "),
    (re.compile(r"\\log\s*+_\s*+(?:e(?![a-zA-Z])|\{\s*+e\s*+\})"), r"\\ln "),
    (re.compile(r"\\lg(?![a-zA-Z])"), r"\\log_{10}"),
    # Units over units, which are no fraction of the answer.
    (re.compile(r"\\[dtc]?frac\s*+\{\s*+" + _WORDS + r"\{([a-zA-Z. ]++)\}\s*+\}\s*+\{\s*+" + _WORDS + r"\{([a-zA-Z. ]++)\}\s*+\}"), r"\\text{ \1 per \2}"),
    # Bases.
    (re.compile(_WORDS + r"\{\s*+([0-9A-Za-z]++)\s*+\}(?=\s*+_)"), r"\1"),
    (re.compile(r"\(\s*+(?=[A-Fa-f.]*\d)([0-9A-Fa-f.]++)\s*+\)(?=\s*+_)"), r"\1"),
    (re.compile(r"\(\s*+([A-F]++)\s*+\)(?=\s*+_\s*+\{?\s*+(?:" + _WORDS + r"\{)?\s*+" + _BASE.replace("P<base>", ":") + ")"), r"\1"),
    (re.compile(r"_\s*+\{\s*+(?:" + _WORDS + r"\{)?\s*+\(?\s*+(?:base[\s-]*+)?" + _BASE + r"\s*+\)?\s*+\}?\s*+\}(?!\})", re.IGNORECASE), _base),
    (re.compile(r"_\s*+" + _WORDS + r"\{\s*+\(?\s*+(?:base[\s-]*+)?" + _BASE + r"\s*+\)?\s*+\}", re.IGNORECASE), _base),
    # Times of day and ratios.
    (re.compile(r"(?<=\d)\s*+(?:\\!)?\s*+(?:\{:\}|\\colon(?![a-zA-Z])|:)\s*+(?:\\!)?\s*+(?=\d)"), ":"),
)  # fmt: skip

_UNTOUCHED = re.compile(
    r"(?:[^\\_:{]|\{(?!\s*+[+-]\s*+\})|\\(?:[dtc]?frac|sqrt|pi|left|right|cdot|times|infty|cup)(?![a-zA-Z])|\\[^a-zA-Z])*+"
)  # what none of the above could find anything in, as most answers are
_SIGN = re.compile(
    rf"(?:{_WORDS}\{{)?\s*+(?:minus|negative)\s*+(?P<close>\}}\s*+)?(?P<number>(?:\\?\$)?[\d.\\][^{{}}]*+)(?P<rest>.*)",
    re.I | re.S,
)
_CURRENCY = re.compile(r"(?:USD|EUR|GBP|INR|US\\?\$)\s*+(?=[\d.-])")
_SCIENTIFIC = re.compile(r"([+-]?\d++(?:\.\d++)?)[eE]([+-]?)0*+(\d{1,5})")
_MIXED = re.compile(r"([+-]?\d++)(?:\s|\\[ ,;])++(\d++)\s*+/\s*+(\d++)(?![\d/.])")
_BASE_BEHIND = re.compile(
    rf"(?P<digits>[0-9A-Fa-f.]*+)\s*+(?:{_WORDS}\{{)?\s*+\(?\s*+(?:in[\s-]*+)?base[\s-]*+(?:\}}\s*+)?\{{?{_BASE}\s*+\)?\s*+\}}?",
    re.IGNORECASE,
)
_CLOCK_BEHIND = re.compile(
    rf"(\d{{1,2}}:\d\d)\s*+(?:\\[,;: ])?\s*+(?:{_WORDS}\{{)?\s*+([ap])\.?\s*+m\b\.?\s*+\}}?", re.IGNORECASE
)


def plain(text: str) -> str:
    """The LaTeX of an answer, or of a text that holds answers, in the notation that is compared.

    Example:
        >>> plain("\\\\varnothing"), plain("x²⁰"), plain("1011_{\\\\text{two}}"), plain("5{:}30")
        ('\\\\emptyset', 'x^{20}', '1011_{2}', '5:30')
    """
    if not text.isascii():
        text = text.translate(_CHARACTERS)
        text = _RUN.sub(_level, text)
        text = _ROOT_SIGN.sub(_root, text)
    if _UNTOUCHED.fullmatch(text):
        return text
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    if "\\circ" in text and _TRIGONOMETRY.search(text):
        text = _OF_DEGREES.sub(_radians, text)
    return text


def alone(text: str) -> str:
    """The same for a text that is the answer and no more: signs and bases that are words, mixed numbers, powers of ten.

    Example:
        >>> alone("minus 5"), alone("3 1/2"), alone("1.5e3"), alone("1011 base 2")
        ('-5', '3\\\\frac{1}{2}', '1.5\\\\times10^{3}', '1011_{2}')
    """
    if sign := _SIGN.fullmatch(text):
        inside = text.lstrip().startswith("\\") and not sign["close"]
        rest = sign["rest"].lstrip()
        if not inside or rest.startswith("}"):
            return alone("-" + sign["number"].strip() + (rest[1:] if inside else rest))
    if match := _CURRENCY.match(text):
        return alone("\\$" + text[match.end() :])
    if match := _SCIENTIFIC.fullmatch(text):
        return f"{match[1]}\\times10^{{{match[2].strip('+')}{match[3]}}}"
    if match := _MIXED.match(text):
        return f"{match[1]}\\frac{{{match[2]}}}{{{match[3]}}}{text[match.end() :]}"
    if (match := _BASE_BEHIND.fullmatch(text)) and re.search("[0-9]|^[A-F]+$", match["digits"]):
        return match["digits"] + _base(match)
    if match := _CLOCK_BEHIND.fullmatch(text):
        return f"{match[1]}\\text{{ {match[2].lower()}m}}"
    return text


def radians(text: str) -> str:
    """The text with each number of degrees as what it is in radians.

    Example:
        >>> radians("90^\\\\circ")
        '{\\\\frac{90\\\\pi}{180}}'
    """
    return _OF_DEGREES.sub(_radians, text)


def _radians(match: re.Match[str]) -> str:
    if match["number"]:
        return f"{{\\frac{{{match['number']}\\pi}}{{180}}}}"
    if match["sum"]:
        return f"({match['sum']}\\cdot\\frac{{\\pi}}{{180}})"
    return "\\cdot\\frac{\\pi}{180}"  # of something longer: not what it was without degrees, at least


def _level(match: re.Match[str]) -> str:
    digits = "".join(map(_LEVEL.__getitem__, match.group()))
    mark = "^" if match["raised"] else "_"
    return f"{mark}{digits}" if len(digits) == 1 else f"{mark}{{{digits}}}"


def _root(match: re.Match[str]) -> str:
    inside = match[2] or match[3]
    return f"\\sqrt{_INDEX[match[1]]}" + ("" if inside is None else f"{{{inside}}}")


# --- An answer by itself, and what it is compared as ---

_ENVELOPE = re.compile(
    r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\(((?:[^\\]|\\(?![()]))+)\\\)|\\\[((?:[^\\]|\\(?![\[\]]))+)\\\]"
)
_SPACES = ("\\ ", "\\,", "\\;", "\\:", "\\!", " ", "\n")
# 12\,345 is one number; Math-Verify reads it as the mixed number 12 + 345.
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,;:! ]|\{,\}\s?|,\\!\s?)\s?\d{3})+(?![\d,])")
_SPACED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")

TEXT = r"\\(?:text|textrm|textnormal|mathrm|mbox)\s*"
UNITS = (
    r"(?:square |cubic )?(?:cm|mm|km|m|kg|inch(?:es)?|feet|foot|ft|(?:centi|kilo|milli)?met(?:er|re)s?|miles?|units?"
    r"|degrees?|dollars?|cents|hours?|minutes?|seconds?|days?|weeks?|months?|years?|people|students|ways|apples)"
)
_PLAIN_UNIT = re.compile(
    rf"(?P<number>[-+]?[\d.,/]+)(?: |\\[,;: ]\s*)(?P<unit>(?:{UNITS}|(?!(?:pi|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|mod|theta|alpha|beta)\b)"
    r"[a-zA-Z]{2,20}(?: [a-zA-Z]{2,20}){0,3}|L|(?:km|m|cm|mi|miles)/(?:h|hr|hour|s|min)))(?P<power>\^(?:[23]|\{[23]\}))?"
)
# Math-Verify drops the words behind a number, these too.
_SCALED = re.compile(
    rf"(?P<number>(?:\\?\$\s*)?[-+]?(?:\d[\d,]{{0,30}})?(?:\.\d{{1,20}})?(?<=\d))(?:\\[,;: ]|\s)*(?:{TEXT}\{{)?\s*(?P<scale>hundred|thousand|million|billion|trillion)"
    r"(?P<more>\b[^{}]*)\}?"
)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}


_BEFORE_UNIT = re.compile(r"\\[,;:! ](?=\\(?:text|mbox|mathrm)\b)")


def _unspaced(text: str) -> str:
    """The text without the blanks and LaTeX spaces at its end."""
    end = len(text)
    while text.endswith(_SPACES, 0, end):
        end -= 2 if text.endswith(_SPACES[:5], 0, end) else 1
    return text[:end]


def _unstopped(text: str) -> str:
    """The text without the period of the sentence that it ends."""
    if text.endswith(".") and not text.endswith(("..", "\\.", "left.", "right.")):
        return text[:-1].rstrip()
    return text


def tidy(text: str) -> str:
    """The answer without what surrounds it, and with numbers spelled so that Math-Verify reads them right."""
    text = text.strip().strip("*`").strip()
    if text.isdecimal() and text.isascii():
        return text
    text = _unstopped(plain(text.replace("~", " ")).strip())
    if envelope := _ENVELOPE.fullmatch(text):
        text = _unstopped(envelope[envelope.lastindex or 0].strip())
    text = alone(_unspaced(text))
    if text.endswith("%"):  # Math-Verify does not read 5\,\%
        text = _unspaced(text.removesuffix("%").removesuffix("\\")) + "\\%"
    text = _BEFORE_UNIT.sub(" ", text)  # nor 1,000\,\text{m}
    text = _THOUSANDS.sub(lambda m: re.sub(r"\D", "", m.group()), text)
    scaled = _SCALED.fullmatch(text) if "illion" in text or "thousand" in text or "hundred" in text else None
    if scaled:
        number = Decimal(re.sub(r"[^-\d.]", "", scaled["number"])) * _SCALES[scaled["scale"]]
        return f"{number.normalize():f}" + (f"\\text{{{scaled['more']}}}" if scaled["more"].strip() else "")
    unit = _PLAIN_UNIT.fullmatch(text)
    if unit:
        return f"{unit['number']}\\text{{ {unit['unit']}}}{unit['power'] or ''}"
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
