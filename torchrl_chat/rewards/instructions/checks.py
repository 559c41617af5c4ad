"""The kinds of instruction, each a check of the response's text, and what their arguments must be."""

from __future__ import annotations

import functools
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torchrl_chat.rewards.instructions.language import is_language, language_code
from torchrl_chat.rewards.instructions.sentences import count_sentences, words

Check: TypeAlias = Callable[[str], bool]
"""Whether a response follows one instruction."""
Kind: TypeAlias = Callable[[Any], Any]
"""Takes an argument's value as the dataset has it; returns it ready for use, or raises ValueError with what it must be."""

Compare: TypeAlias = Callable[[int, int], bool]
"""A comparison of a count with its threshold."""

RELATIONS: dict[str, Compare] = {
    "at least": operator.ge,
    "less than": operator.lt,
    "at most": operator.le,
    "more than": operator.gt,
}
"""The comparisons by name. The paper's data uses the first two."""


@dataclass(frozen=True)
class Instruction:
    """One kind of instruction: its check, and what its arguments must be."""

    id: str
    check: Callable[..., bool]
    arguments: Mapping[str, Kind]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def bind(self, kwargs: Mapping[str, Any] | None) -> Check:
        """The check with its arguments; ``None`` values count as absent.

        Raises:
            ValueError: an argument is missing, unknown or of the wrong kind.
        """
        given = {} if kwargs is None else {key: value for key, value in kwargs.items() if value is not None}
        values = {}
        for name, kind in self.arguments.items():
            if name not in given:
                if name not in self.defaults:
                    raise ValueError(
                        f"IFEval instruction {self.id!r} needs the argument {name!r}; got {_keys(given)}."
                    )
                values[name] = self.defaults[name]
                continue
            value = given.pop(name)
            try:
                values[name] = kind(value)
            except ValueError as error:
                raise ValueError(
                    f"IFEval instruction {self.id!r}: argument {name!r} is {value!r:.80}, but must be {error}."
                ) from None
        if given:
            raise ValueError(
                f"IFEval instruction {self.id!r} does not take the argument {next(iter(given))!r}; "
                f"it takes {_keys(self.arguments)}."
            )
        check = self.check
        return lambda response: check(response, **values)


INSTRUCTIONS: dict[str, Instruction] = {}
"""Every kind of instruction by its id, ``"group:name"``."""


def instruction(id: str, defaults: Mapping[str, Any] | None = None, **arguments: Kind) -> Callable[[Any], Any]:
    """Register a function as the check of an instruction."""

    def register(function: Callable[..., bool]) -> Callable[..., bool]:
        INSTRUCTIONS[id] = Instruction(id, function, arguments, defaults or {})
        return function

    return register


def _keys(mapping: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, mapping)) or "none"


def text(value: Any) -> str:
    """A text that is not blank, without the white space around it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not blank")
    return value.strip()


def texts(value: Any) -> tuple[str, ...]:
    """One or more texts."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError("a list of texts")
    found = tuple(value)
    if not found or not all(isinstance(item, str) and item for item in found):
        raise ValueError("a list of one or more texts, none of them empty")
    return found


def count(value: Any) -> int:
    """A whole number from 0 on; a column of a table may hold it as a float."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 0:
        raise ValueError("a whole number, 0 or more")
    return operator.index(value)


def ordinal(value: Any) -> int:
    """A whole number from 1 on."""
    try:
        number = count(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError("a whole number, 1 or more")
    return number


def relation(value: Any) -> Compare:
    """A comparison by its name."""
    if not isinstance(value, str) or value not in RELATIONS:
        raise ValueError("one of " + ", ".join(map(repr, RELATIONS)))
    return RELATIONS[value]


def character(value: Any) -> str:
    """One character, whatever its case."""
    if not isinstance(value, str) or len(value.strip()) != 1:
        raise ValueError("a single character")
    return value.strip().lower()


# --- What a response says: keywords, letters, language, letter case, punctuation, its start and end ---


@functools.lru_cache(maxsize=4096)
def _pattern(literal: str, whole_words: bool = False) -> re.Pattern[str]:
    """The text as it stands, whatever its case. The reference takes it for a regular expression."""
    escaped = re.escape(literal)
    return re.compile(rf"(?<!\w){escaped}(?!\w)" if whole_words else escaped, re.IGNORECASE)


@instruction("keywords:existence", keywords=texts)
def _existence(response: str, keywords: tuple[str, ...]) -> bool:
    """Every keyword occurs, be it inside a longer word."""
    return all(_pattern(keyword).search(response) for keyword in keywords)


@instruction("keywords:frequency", keyword=text, frequency=count, relation=relation)
def _frequency(response: str, keyword: str, frequency: int, relation: Compare) -> bool:
    return relation(len(_pattern(keyword).findall(response)), frequency)


@instruction("keywords:forbidden_words", forbidden_words=texts)
def _forbidden(response: str, forbidden_words: tuple[str, ...]) -> bool:
    """No forbidden word occurs as a word of its own."""
    return not any(_pattern(word, whole_words=True).search(response) for word in forbidden_words)


@instruction("keywords:letter_frequency", letter=character, let_frequency=count, let_relation=relation)
def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: Compare) -> bool:
    return let_relation(response.lower().count(letter), let_frequency)


@instruction("language:response_language", language=language_code)
def _response_language(response: str, language: str) -> bool:
    return is_language(response, language)


@instruction("change_case:english_capital")
def _english_capital(response: str) -> bool:
    return response.isupper() and is_language(response, "en")


@instruction("change_case:english_lowercase")
def _english_lowercase(response: str) -> bool:
    return response.islower() and is_language(response, "en")


# The tokens of NLTK's word_tokenize, as far as they bear on capitals: these signs stand alone ...
_BETWEEN_TOKENS = re.compile(r"[\s;@#$%&?!()\[\]{}<>\"“”«»‘’„`–—]+|[,:](?!\d)|--+|\.{2,}")
# ... and these endings and words are tokens of their own.
_ENDING = re.compile(r"(?:n't|'(?:s|m|d|ll|re|ve))\Z", re.IGNORECASE)
_TWO_TOKENS = words("CANNOT GIMME GONNA GOTTA LEMME WANNA 'TIS 'TWAS MORE'N D'YE")


@instruction("change_case:capital_word_frequency", capital_frequency=count, capital_relation=relation)
def _capital_word_frequency(response: str, capital_frequency: int, capital_relation: Compare) -> bool:
    return capital_relation(capital_words(response), capital_frequency)


def capital_words(response: str) -> int:
    """How many words are all capitals, ``I`` and ``A`` among them; ``DON'T`` counts twice, as with the reference.

    Example:
        >>> capital_words("I saw the WELL-KNOWN F.B.I. and NASA's crew, don't ASK")
        5
    """
    total = 0
    for word in _BETWEEN_TOKENS.split(response):
        if word and not word.islower():
            ending = _ENDING.search(word, max(1, len(word) - 3)) if "'" in word else None
            if ending:
                total += word[: ending.start()].isupper() + ending.group().isupper()
            elif word.isupper():
                total += 2 if word in _TWO_TOKENS else 1
    return total


@instruction("punctuation:no_comma")
def _no_comma(response: str) -> bool:
    return "," not in response


@instruction("startend:end_checker", end_phrase=text)
def _end(response: str, end_phrase: str) -> bool:
    """Quotes around the whole response do not count."""
    return response.strip().strip('"').lower().endswith(end_phrase.lower())


@instruction("startend:quotation")
def _quotation(response: str) -> bool:
    response = response.strip()
    return len(response) > 1 and response[0] == response[-1] == '"'


@instruction("combination:repeat_prompt", prompt_to_repeat=text)
def _repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.lower())


@instruction("combination:two_responses")
def _two_responses(response: str) -> bool:
    """Two different texts between ``******``; one such line may open and one may close the response."""
    pieces = [piece.strip() for piece in response.split("******")]
    inner = pieces[not pieces[0] : len(pieces) - (not pieces[-1])]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


_POSTSCRIPTS = {"P.S.": re.compile(r"p\.\s?s\."), "P.P.S": re.compile(r"p\.\s?p\.\s?s")}


# The one argument with a default: a row that asks for a postscript and names no marker means the usual one.
@instruction("detectable_content:postscript", {"postscript_marker": "P.S."}, postscript_marker=text)
def _postscript(response: str, postscript_marker: str) -> bool:
    """The marker occurs; of the two usual ones also with spaces inside, as in ``P. S.``."""
    usual, response = _POSTSCRIPTS.get(postscript_marker), response.lower()
    return usual.search(response) is not None if usual else postscript_marker.lower() in response


# --- The form of a response: its length, its paragraphs and sections, its mark-up ---

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
