"""Answers compared as text: equal to a reference, matched by a pattern, or a letter among choices."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torchrl_chat.rewards.marked import last_marked, marked
from torchrl_chat.rewards.verdict import Verdict

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class ExactMatch:
    """Right if the response is the reference, or one of several.

    Both sides are brought to the same form first: Unicode's composed form (NFC), and what the options say.

    Args:
        ignore_case: fold the case.
        ignore_space: runs of whitespace count as one space, and none at either end.
        ignore_punctuation: drop what Unicode calls punctuation.
        marked: compare the last ``<answer>...</answer>`` or ``\\boxed{...}`` of the response instead of all of it;
            a response without either is wrong.

    Example:
        >>> ExactMatch()(" the  Hague ", ["Den Haag", "The Hague"]).score
        1.0
        >>> ExactMatch(ignore_punctuation=True)("Yes.", "yes").correct
        True
    """

    ignore_case: bool = True
    ignore_space: bool = True
    ignore_punctuation: bool = False
    marked: bool = False

    def __call__(self, response: str, reference: str | int | Sequence[str | int]) -> Verdict:
        """Grade one response.

        Raises:
            ValueError: the reference is neither a text, a number, nor a list of these with an entry; or it is blank, in
                the form in which it is compared.
        """
        texts: list[Any] = [reference]
        if isinstance(reference, Sequence) and not isinstance(reference, str):
            texts = list(reference)
        if not texts or not all(isinstance(text, str | int | float) for text in texts):
            raise ValueError(
                f"the reference {reference!r:.80} is no text: expected a str, a number, or a list of these."
            )
        accepted = {self.normalise(str(text)) for text in texts}
        if any(not text.strip() for text in accepted):
            raise ValueError(f"the reference {reference!r:.80} is blank: every blank response would equal it.")
        found = last_marked(response) if self.marked else response
        correct = found is not None and self.normalise(found) in accepted
        return Verdict(float(correct), found, correct)

    def normalise(self, text: str) -> str:
        """The form in which texts are compared."""
        text = unicodedata.normalize("NFC", text)
        if self.ignore_case:
            text = unicodedata.normalize("NFC", text.casefold())
        if self.ignore_punctuation:
            text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
        return _SPACE.sub(" ", text).strip() if self.ignore_space else text


@dataclass(frozen=True)
class RegexMatch:
    """Right if a pattern matches the response, or if what the pattern finds is the reference.

    A pattern can take exponential time on some text, so that grades belong in a worker process (``isolate``).

    Args:
        pattern: a regular expression of Python's ``re``.
        full: the pattern has to match all of the response instead of a part.
        group: the number or name of a group. Its text in the last match is the answer, and is compared with the
            reference. Without it the reference is not read, and the matched text is the answer.
        compare: how the group's text is compared.

    Raises:
        ValueError: the pattern is no regular expression, or has no such group.

    Example:
        >>> RegexMatch(r"(?i)\\bplease\\b")("Please wait.", None).score
        1.0
        >>> RegexMatch(r"Total: (?P<total>\\d+)", group="total")("Total: 7. Total: 12", "12").answer
        '12'
    """

    isolate: ClassVar[bool] = True

    pattern: str
    full: bool = False
    group: int | str | None = None
    compare: ExactMatch = ExactMatch()

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"pattern={self.pattern!r:.80} is no regular expression: {error}.") from None
        if self.group is None:
            return
        if not (self.group in compiled.groupindex or self.group in range(compiled.groups + 1)):
            raise ValueError(
                f"group={self.group!r}: the pattern {self.pattern!r:.80} has {compiled.groups} group(s), "
                f"named {sorted(compiled.groupindex)}."
            )

    def __call__(self, response: str, reference: Any) -> Verdict:
        """Grade one response."""
        compiled, key = re.compile(self.pattern), 0 if self.group is None else self.group
        matches = [compiled.fullmatch(response)] if self.full else compiled.finditer(response)
        found = None
        for match in matches:
            if match is not None and match[key] is not None:
                found = match[key]
        if found is None:
            return Verdict(0.0, None, False)
        return Verdict(1.0, found, True) if self.group is None else self.compare(found, reference)


_WRAPPERS = re.compile(r"\\(?:text|mathrm|mathbf|mathit)\w{0,4}\s?\{|\\[()\[\]]|[*_`$]")
_HEAD = re.compile(
    r"\b(?:(?P<final>final\s{1,4})?answer|(?:correct|right|best|final|my)\s{1,4}(?:option|choice))\s{0,4}"
    r"(?:(?:is|are|(?:would|should|must)\s{1,4}be)\b\s{0,4}(?P<colon>:)?|(?P<colon2>[:=]))\s{0,8}",
    re.IGNORECASE,
)
_LEAD = re.compile(r"\s{0,8}(?:(?:either|both|the|letter|option|choice)\s{1,4}){0,3}[{'\"]{0,2}", re.IGNORECASE)
_LETTER = re.compile(r"[(\[{]\s{0,4}(?P<inner>\w)\s{0,4}[)\]}]|(?P<bare>\w)(?!\w|['’]\w)")
_JOINT = re.compile(
    r"\s{0,4}(?:[,/&+]|\b(?:and|or)\b)\s{0,4}(?:(?:and|or|maybe|option|choice)\s{1,4}){0,3}", re.IGNORECASE
)
# What may follow a letter without brackets: "A man" is no choice, "A, because" is one.
_STOP = re.compile(
    r"\s{0,8}(?:$|[.,;:!?)\]}/&+'\"\n—–]|-\s|\(|\\|(?:because|since|as|for|which|and|or|with)\b)", re.IGNORECASE
)
_ITEM = re.compile(r"\s*[(\[]?(?P<letter>\w)(?:[)\].:](?:\s|$)|[)\]]?[.:]?\s*$)")
_LONGEST = 400  # of a claim: a letter and the text of a choice


@dataclass(frozen=True)
class MultipleChoice:
    """Right if the letter that the response chooses is the reference's.

    The choice is looked for, in this order, in ``\\boxed{B}`` and ``<answer>(B)</answer>``; behind "final answer"
    (``Final answer: B``); behind "answer" and the like (``The answer is (B)``, ``Correct option: B``); as the first
    or last line (``B``, ``(B)``, ``B. Paris``). The first of these that claims a letter decides. Where it claims
    several, ``A or B``, there is no answer: a guess is not graded as one. The article in "The answer is A car" is
    not read as choice A.

    The reference is a letter, or the index of the choice counted from 0, or a mapping ``{"answer": ...}`` of either;
    if the mapping has ``"choices"``, a list of texts, the answer may be one of these, in the reference as in the
    response. What is a letter of the choices is read as the letter, also where a choice has it as its text (blood
    types): the reference ``"B"`` is the second choice, whatever the choices say.

    Args:
        letters: the letters that name the choices, in order.
        several: ``"last"`` takes the last of several claims of one kind, for models that correct themselves in
            the text that is graded. ``A or B`` in one claim stays without an answer.

    Raises:
        ValueError: ``letters`` or ``several`` is not as described.

    Example:
        >>> verify = MultipleChoice()
        >>> verify("A car has wheels, so the answer is (C).", "C")
        Verdict(score=1.0, answer='C', correct=True, parts={}, failure=None)
        >>> verify("The answer is A or C.", 2).answer is None
        True
        >>> verify("Paris", {"answer": 1, "choices": ["Rome", "Paris"]}).answer
        'B'
    """

    letters: str = string.ascii_uppercase
    several: Literal["refuse", "last"] = "refuse"

    def __post_init__(self) -> None:
        folded = {letter.upper() for letter in self.letters}
        if not self.letters or not self.letters.isalnum() or len(folded) < len(self.letters):
            raise ValueError(f"letters={self.letters!r}: expected distinct letters or digits, such as 'ABCD'.")
        if self.several not in ("refuse", "last"):
            raise ValueError(f"several={self.several!r}: expected 'refuse' or 'last'.")

    def __call__(self, response: str, reference: str | int | Mapping[str, Any]) -> Verdict:
        """Grade one response.

        Raises:
            ValueError: the reference names no choice.
        """
        choices = reference.get("choices", ()) if isinstance(reference, Mapping) else ()
        if isinstance(choices, str) or not (
            isinstance(choices, Sequence) and all(isinstance(choice, str) for choice in choices)
        ):
            raise ValueError(f"'choices' of the reference is {choices!r:.80}: expected a list of texts.")
        found = self.extract(response, choices)
        correct = found == self.expected(reference, choices)
        return Verdict(float(correct), found, correct)

    def expected(self, reference: Any, choices: Sequence[str] = ()) -> str:
        """The letter of a reference."""
        answer = reference.get("answer") if isinstance(reference, Mapping) else reference
        count = len(choices) or len(self.letters)
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count:
            return self.letters[answer]
        if isinstance(answer, str):
            letter = self._letter(answer.strip().strip("().").strip())
            if letter is not None and self.letters.index(letter) < count:
                return letter
            if (letter := self._text(answer, choices)) is not None:
                return letter
        raise ValueError(
            f"the reference {reference!r:.120} names no choice: expected one of the letters {self.letters[:count]!r}, "
            f"an index from 0 to {count - 1}, or {{'answer': ..., 'choices': [texts]}} with one of the texts."
        )

    def extract(self, response: str, choices: Sequence[str] = ()) -> str | None:
        """The letter that the response chooses; ``None`` if it chooses none, or several."""
        if len(choices) > len(self.letters):
            raise ValueError(f"{len(choices)} choices for the {len(self.letters)} letters {self.letters!r}.")
        found = self._chosen(response, choices)
        if found is not None and choices and self.letters.index(found) >= len(choices):  # "(O)" of four blood types
            return self._text(found, choices) or found
        return found

    def _chosen(self, response: str, choices: Sequence[str]) -> str | None:
        claims = [self._claim(mark, choices, True) for mark in marked(response) if len(mark) <= _LONGEST]
        if any(claims):
            return self._decide(claims)
        text = _WRAPPERS.sub("", response)
        final, plain = list[str](), list[str]()
        for head in _HEAD.finditer(text):
            claim = self._claim(
                text[head.end() : head.end() + _LONGEST], choices, bool(head["colon"] or head["colon2"])
            )
            (final if head["final"] else plain).append(claim)
        for claims in (final, plain):
            if any(claims):
                return self._decide(claims)
        return self._alone(text, choices)

    def _decide(self, claims: list[str]) -> str | None:
        claims = [claim for claim in claims if claim]
        if self.several == "refuse" and len({letter for claim in claims for letter in claim}) > 1:
            return None
        return claims[-1] if len(claims[-1]) == 1 else None

    def _claim(self, text: str, choices: Sequence[str], lower: bool) -> str:
        """The distinct letters that a short text claims: "" if it claims none."""
        text = _WRAPPERS.sub("", text)
        if (by_text := self._text(text.strip().partition("\n")[0], choices)) is not None:
            return by_text
        lead = _LEAD.match(text)
        at, claimed = lead.end() if lead else 0, ""
        while match := _LETTER.match(text, at):
            bare = match["bare"]
            letter = self._letter(bare or match["inner"])
            if letter is None or (bare and not (_STOP.match(text, match.end()) and (lower or bare == letter))):
                break
            claimed += "" if letter in claimed else letter
            joint = _JOINT.match(text, match.end())
            if joint is None:
                break
            at = joint.end()
        return claimed

    def _alone(self, text: str, choices: Sequence[str]) -> str | None:
        """The choice of a response that is little more than the choice."""
        if len(text) <= _LONGEST:
            if (by_text := self._text(text, choices)) is not None:
                return by_text
            if (whole := self._claim(text, (), True)) and "\n" not in text.strip():
                rest = text.strip()[1:]
                if len(whole) > 1 or not _ITEM.match(text):
                    return None
                others = {self._letter(m[1]) for m in re.finditer(r"\b(\w)[).](?:\s|$)", rest)} - {None, whole}
                return None if others else whole
        lines = [line for line in text.splitlines() if line.strip()]
        items = [_ITEM.match(line[:_LONGEST]) for line in lines]
        letters = {self._letter(item["letter"]) for item in items if item} - {None}
        if len(letters) == 1 and (items[0] or items[-1]):
            return letters.pop()
        return None

    def _letter(self, text: str) -> str | None:
        if len(text) != 1:
            return None
        return next((letter for letter in self.letters if text in (letter, letter.lower(), letter.upper())), None)

    def _text(self, text: str, choices: Sequence[str]) -> str | None:
        """The letter of the one choice that has this text."""
        if not choices or len(text) > _LONGEST:
            return None
        same = ExactMatch().normalise
        wanted = same(text).rstrip(".")
        letter = self._letter(wanted)
        if letter is not None and self.letters.index(letter) < len(choices):
            return None
        found = [
            letter
            for letter, choice in zip(self.letters, choices, strict=False)
            if same(choice).rstrip(".") == wanted
        ]
        return found[0] if len(found) == 1 else None
