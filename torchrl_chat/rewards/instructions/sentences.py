"""Sentences of English text, counted by rules alone, in one pass and without any model to download.

The paper counts with NLTK's punkt model. These rules follow it on what matters to a count: a mark followed by white space
ends a sentence even before a small letter; the number of a list item (``1. Do this.``) counts by itself; a line break
alone ends nothing. They differ from it on purpose in four points, where punkt errs: a piece without a letter
or digit (``**``, an emoji) is no sentence, curly quotes may close one, ``etc.``, ``e.g.`` and other common abbreviations
are known, and the full stops of other scripts (``。``, ``।``, ``؟``) count.
"""

from __future__ import annotations

import re


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


_OPENERS = "([{\"'*_`“‘«#>-"
_CLOSING = ")]}\"'*_`”’»"
_CLOSERS = r"[)\]}\"'*_`”’»]*+"
# Possessive repeats, and no match may begin inside a run of marks: time stays linear in the text.
_END = re.compile(
    rf"(?<![.?!…؟])[.?!…؟]++{_CLOSERS}(?=\s|\Z)"  # marks that need a space behind them
    rf"|(?<![.?!…؟])[.?!؟]++[\"'*)\]]++(?=[(\[\"'*A-Z])"  # ... or a mark-up sign: Go!**Now**
    rf"|[。！？।॥۔]++{_CLOSERS}"
)
_NEXT = re.compile(r"[\s(\[{\"'*_`“‘«#>-]*+(\w?[\w'’]*+)")
_ALNUM = re.compile(r"[^\W_]")
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")  # U.S, e.g, Ph.D has its own entry
_BACK = 40  # characters before a period that are looked at: an abbreviation and the word before it

_TITLES = words("mr mrs ms mx dr prof rev hon st mt ft gen col maj capt cpt lt sgt adm gov sen rep messrs")
_BEFORE_NUMBERS = words("no nos fig figs eq eqs sec ch vol art p pp para ver v approx ca")
_OTHERS = words(
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thur thurs fri sat sun "
    "inc ltd co corp bros jr sr vs etc cf al viz esp dept est ave blvd rd ed eds ph.d m.sc b.sc ext misc min max"
)
_KNOWN = _TITLES | _BEFORE_NUMBERS | _OTHERS
_STARTERS = words(
    "the a an this that these those there here it its he she they we i you his her their our my your and but or so yet "
    "if when while although though because since as after before once until in on at by for from with without to under "
    "however moreover therefore thus instead meanwhile nevertheless then now also finally first second next what who why "
    "how where which many some most all each every both one no not let please do did is are was were"
)


def count_sentences(text: str) -> int:
    """How many sentences the text holds.

    Example:
        >>> count_sentences('Dr. Lee paid $3.50 in the U.S. yesterday... "Really?" Yes!')
        3
    """
    total, begin, length = 0, 0, len(text)
    for match in _END.finditer(text):
        end = match.end()
        if end < length and not _ends(text, match, begin):
            continue
        total += _ALNUM.search(text, begin, end) is not None
        begin = end
    return total + (_ALNUM.search(text, begin) is not None)


def _ends(text: str, match: re.Match[str], begin: int) -> bool:
    """Whether the marks end a sentence, with more text behind them."""
    marks, start = match.group(), match.start()
    if marks != ".":
        marks = marks.rstrip(_CLOSING)
        if marks.strip(".…"):  # a question or exclamation mark, or that of another script
            return True
    word = previous = ""
    if marks == ".":
        words = text[max(begin, start - _BACK) : start].split()
        if not words or text[start - 1].isspace():
            return True
        word = words[-1].lstrip(_OPENERS)
        if len(word) != 1 and word.lower() not in _KNOWN and "." not in word and not word.isdigit():
            return True
        if len(words) > 1 and word == words[-1] and text[start - len(word) - 1] != "\n":
            previous = words[-2]
    following = _NEXT.match(text, match.end())
    after = following[1] if following else ""
    if marks == ".":
        return _period_ends(word, previous, after)
    return after[:1].isupper() or after[:1].isdigit()  # an ellipsis ends a sentence only where another one begins


def _period_ends(word: str, previous: str, after: str) -> bool:
    """Whether a period behind ``word`` ends a sentence, given the words around it (none before: it begins a line)."""
    lower = word.lower()
    if not after:
        return True
    if word.isdigit():  # the number of a list item, or of the sentence before
        return not after[0].islower() or previous[-1:].isalnum()
    starter = after[0].isupper() and after.lower() in _STARTERS
    if lower in _TITLES:
        return starter and lower in ("st", "ft")  # a street and feet, too
    if lower in ("p.s", "p.p.s"):  # it opens the postscript
        return False
    if lower in ("etc", "a.m", "p.m"):
        return after[0].isupper()
    if len(word) == 1 and word.isupper():  # an initial, unless the text goes like "as much vitamin C. Eat ..."
        return starter or previous[:1].islower()
    if lower in _BEFORE_NUMBERS:
        return not after[0].isdigit()
    return starter or not (lower in _OTHERS or _DOTTED.fullmatch(word))
