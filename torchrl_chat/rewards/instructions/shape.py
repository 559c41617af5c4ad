"""Instructions about the form of a response: its length, its paragraphs and sections, its mark-up."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable

from torchrl_chat.rewards.instructions.arguments import count, instruction, ordinal, relation, text
from torchrl_chat.rewards.instructions.sentences import count_sentences

Compare = Callable[[int, int], bool]

_WORD = re.compile(r"\w+")
_WORD_END = re.compile(r"[.,?!'\"]")
_HIGHLIGHT = re.compile(r"\*([^\n*]*)\*")
_STRONG = re.compile(r"\*\*([^\n*]*)\*\*")
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCE = re.compile(r"```(?:json)?", re.IGNORECASE)


@instruction("length_constraints:number_words", num_words=count, relation=relation)
def _number_words(response: str, num_words: int, relation: Compare) -> bool:
    r"""Words are runs of ``\w``: ``it's`` is two, ``3.5`` is two, ``a_b`` is one."""
    return relation(len(_WORD.findall(response)), num_words)


@instruction("length_constraints:number_sentences", num_sentences=count, relation=relation)
def _number_sentences(response: str, num_sentences: int, relation: Compare) -> bool:
    return relation(count_sentences(response), num_sentences)


@instruction("length_constraints:number_paragraphs", num_paragraphs=count)
def _number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Exactly so many between ``***``; one divider may open and one may close the response."""
    pieces = [piece.strip() for piece in response.split("***")]
    inner = pieces[not pieces[0] : len(pieces) - (len(pieces) > 1 and not pieces[-1])]
    return len(inner) == num_paragraphs and all(inner)


@instruction(
    "length_constraints:nth_paragraph_first_word", num_paragraphs=count, nth_paragraph=ordinal, first_word=text
)
def _nth_paragraph(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs between blank lines, and the n-th begins with the word, whatever its case."""
    paragraphs = [piece for piece in response.split("\n\n") if piece.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    word = paragraphs[nth_paragraph - 1].split(maxsplit=1)[0].lstrip("'").lstrip('"')
    return _WORD_END.split(word, maxsplit=1)[0].lower() == first_word.lower()


@instruction("detectable_content:number_placeholders", num_placeholders=count)
def _number_placeholders(response: str, num_placeholders: int) -> bool:
    """At least so many ``[...]``, each on one line."""
    found = 0
    for line in response.split("\n"):
        close = -1
        while (start := line.find("[", close + 1)) >= 0 and (close := line.find("]", start)) >= 0:
            found += 1
    return found >= num_placeholders


@instruction("detectable_format:number_bullet_lists", num_bullets=count)
def _number_bullets(response: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with ``-``, or with one ``*`` and something behind it."""
    found = 0
    for line in response.split("\n"):
        line = line.lstrip()
        found += line.startswith("-") or (line[:1] == "*" and line[1:2] not in ("", "*"))
    return found == num_bullets


@instruction("detectable_format:constrained_response")
def _constrained_response(response: str) -> bool:
    return any(option in response for option in _OPTIONS)


@instruction("detectable_format:number_highlighted_sections", num_highlights=count)
def _highlighted(response: str, num_highlights: int) -> bool:
    """At least so many ``*...*`` or ``**...**`` that are not blank, each on one line."""
    if response.count("*") < 2:
        return num_highlights == 0
    found = sum(1 for inner in _HIGHLIGHT.findall(response) if inner.strip())
    return found + sum(1 for inner in _STRONG.findall(response) if inner.strip()) >= num_highlights


@functools.lru_cache(maxsize=1024)
def _section(name: str) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(name)}\s?\d+")


# The argument is spelled like this in the dataset.
@instruction("detectable_format:multiple_sections", section_spliter=text, num_sections=count)
def _multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many ``Section 1``, wherever they stand."""
    return len(_section(section_spliter).findall(response)) >= num_sections


@instruction("detectable_format:json_format")
def _json_format(response: str) -> bool:
    """The whole response is one JSON value, in a Markdown fence or not."""
    response = response.strip()
    fence = _FENCE.match(response)
    if fence:
        response = response[fence.end() :].removesuffix("```")
    try:
        json.loads(response)
    except (ValueError, RecursionError):
        return False
    return True


@instruction("detectable_format:title")
def _title(response: str) -> bool:
    """``<<...>>`` on one line, with something inside."""
    for line in response.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False
