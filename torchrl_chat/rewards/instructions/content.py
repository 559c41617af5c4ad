"""Instructions about what a response says: keywords, letters, language, letter case, punctuation, its start and end."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from torchrl_chat.rewards.instructions.arguments import character, count, instruction, relation, text, texts, words
from torchrl_chat.rewards.instructions.language import is_language, language_code

Compare = Callable[[int, int], bool]


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
