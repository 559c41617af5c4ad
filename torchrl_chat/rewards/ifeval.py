"""IFEval (Zhou et al. 2023, arXiv:2311.07911): instructions whose following a program can check.

The reference is a row of the dataset: ``instruction_id_list``, and as many ``kwargs``. The dataset is
``google/IFEval``; its kwargs hold every argument of every instruction, most of them ``None``.

The checks follow the reference implementation, oddities included (``---`` is a bullet, ``1.`` a sentence), so that
figures compare with published ones. They leave it where it contradicts itself, guesses or fails; torchrl 0.14.1
has it nearly unchanged. There, as measured:

* A letter other than a to z is replaced by a random one: rows 1122 (``#``) and 1129 (``!``) get random grades. So
  does a row with a missing argument or one that is 0. Here the sign is counted, and a missing argument is an error
  (except a postscript's marker, which is then ``P.S.``).
* A text without letters counts as written in any language, and in loose grading so does every response with such a
  line at its start or end: ``"Hello.\\n***"`` is Hindi. Here it is in none. Short English in capitals is often
  taken for another language (``MY ANSWER IS YES.`` for Somali), and with luck not.
* Sentences and capitals (in 64 of the 541 rows) raise ``LookupError`` until NLTK's punkt data is downloaded. Here
  nothing is: :func:`~torchrl_chat.rewards.instructions.count_sentences` counts 93% of the 541 prompts, and 99% of
  GSM8K's and MATH-500's texts, just like punkt (with its own English abbreviations).
* Keywords are regular expressions: ``C++`` is found in any text with a ``c``. Deeply nested JSON raises
  ``RecursionError``. The relation ``"at most"`` raises ``ValueError``.
* Where a paragraph is blank, another one than the n-th is looked at for its first word.
* torchrl's ``IfEvalScorer`` grades what stands inside ``<answer>...</answer>``: without the tags all is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

from torchrl_chat.rewards.instructions import INSTRUCTIONS, Check
from torchrl_chat.rewards.verdict import Level, Verdict

Figure: TypeAlias = Literal["prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose"]
"""One of the four figures of the paper."""

FIGURES: tuple[Figure, ...] = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")

MIXTURES: dict[str, dict[Figure, float]] = {
    "torchrl": {"prompt_strict": 0.4, "instruction_strict": 0.3, "prompt_loose": 0.2, "instruction_loose": 0.1}
}
"""Weighted sums of the figures, by name. ``"torchrl"`` is torchrl's default reward, without its bonus for tags."""


class Followed(NamedTuple):
    """Whether a response follows one instruction."""

    id: str
    """The kind of instruction, such as ``"punctuation:no_comma"``."""
    strict: bool
    """Whether the response follows it as it stands."""
    loose: bool
    """Whether the response or one of its variants follows it (see :func:`variants`)."""


@dataclass(frozen=True)
class IFEvalVerifier:
    """Whether a response follows each of the instructions of its row.

    ``correct`` is the strict figure of the prompt: all instructions, and the response as it stands. ``parts`` holds the
    four figures, and under ``"instructions"`` how many instructions the row has.

    Args:
        score: which figure is the score: ``"prompt_strict"`` (all or nothing), ``"instruction_strict"`` (the share of
            instructions that are followed, a denser reward), ``"prompt_loose"``, ``"instruction_loose"``; or a mixture,
            ``"torchrl"``.

    Raises:
        ValueError: no such score; on grading, a row whose instructions or arguments are not those of IFEval.
        ImportError: on grading, an instruction about a language or letter case, and py3langid is not installed.

    Example:
        >>> row = {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        ...        "kwargs": [{}, {"num_words": 4, "relation": "less than"}]}
        >>> verdict = IFEvalVerifier(score="instruction_strict")("Well, no.", row)
        >>> verdict.score, verdict.correct
        (0.5, False)
    """

    score: str = "prompt_strict"

    grades: ClassVar[Level] = "text"
    components: ClassVar[tuple[str, ...]] = (*FIGURES, "instructions")

    def __post_init__(self) -> None:
        if self.score not in (*FIGURES, *MIXTURES):
            known = ", ".join(map(repr, (*FIGURES, *MIXTURES)))
            raise ValueError(f"IFEvalVerifier(score={self.score!r}): expected one of {known}.")

    def __call__(self, response: str, reference: Mapping[str, Any]) -> Verdict:
        """Grade one response."""
        results = followed(response, reference)
        count = len(results)
        strict, loose = sum(result.strict for result in results), sum(result.loose for result in results)
        parts: dict[str, float] = {
            "prompt_strict": float(strict == count),
            "instruction_strict": strict / count,
            "prompt_loose": float(loose == count),
            "instruction_loose": loose / count,
            "instructions": float(count),
        }
        weights = MIXTURES.get(self.score)
        score = sum(weight * parts[name] for name, weight in weights.items()) if weights else parts[self.score]
        return Verdict(score, response if response.strip() else None, strict == count, parts)


def followed(response: str, reference: Mapping[str, Any]) -> list[Followed]:
    """For each instruction of the row, whether the response follows it.

    Raises:
        ValueError: an instruction or an argument that IFEval does not have; the message names both.

    Example:
        >>> row = {"instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
        >>> followed('Here you are: \\n"Hello."', row)
        [Followed(id='startend:quotation', strict=False, loose=True)]
    """
    checks = _checks(reference)  # all of them first: a bad row is an error whatever the response
    others: list[str] | None = None
    results = []
    for name, check in checks:
        strict = bool(response.strip()) and check(response)
        loose = strict
        if not strict:
            others = list(variants(response))[1:] if others is None else others
            loose = any(check(variant) for variant in others)
        results.append(Followed(name, strict, loose))
    return results


def variants(response: str) -> Iterator[str]:
    """The texts that loose grading looks at: the response itself, then its variants.

    These are without the asterisks of Markdown, without the first line, the last or both (an introduction, a closing
    remark), and without both kinds: eight in all. Blank ones and repeated ones are left out.

    Example:
        >>> list(variants("Sure:\\n*Hi*"))
        ['Sure:\\n*Hi*', 'Sure:\\nHi', '*Hi*', 'Hi', 'Sure:']
    """
    lines = response.split("\n")
    seen = set()
    for cut in (response, lines[1:], lines[:-1], lines[1:-1]):
        text = cut if isinstance(cut, str) else "\n".join(cut).strip()
        for variant in (text, text.replace("*", "")):
            if variant.strip() and variant not in seen:
                seen.add(variant)
                yield variant


def figures(verdicts: Iterable[Verdict]) -> dict[Figure, float]:
    """The four figures of a data set, as the paper reports them, from the verdicts on its rows.

    A figure of the instructions is a share of all instructions, so that a row with three of them counts three times.

    Raises:
        ValueError: there are no verdicts.

    Example:
        >>> verify = IFEvalVerifier()
        >>> one = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        >>> two = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
        >>> round(figures([verify("Yes", one), verify("a, b", two)])["instruction_strict"], 3)
        0.333
    """
    rows = [verdict.parts for verdict in verdicts]
    if not rows:
        raise ValueError("figures() needs the verdicts of one or more rows; got none.")
    result: dict[Figure, float] = {}
    for name in FIGURES:
        weights = [row["instructions"] if name.startswith("instruction") else 1.0 for row in rows]
        result[name] = sum(row[name] * weight for row, weight in zip(rows, weights, strict=True)) / sum(weights)
    return result


def _checks(reference: Mapping[str, Any]) -> list[tuple[str, Check]]:
    """The checks of a row's instructions, with their arguments."""
    if not isinstance(reference, Mapping):
        raise ValueError(f"an IFEval reference is a row of the dataset, a mapping; got {reference!r:.80}.")
    ids, kwargs = _column(reference, "instruction_id_list"), _column(reference, "kwargs")
    if not ids or len(ids) != len(kwargs):
        raise ValueError(
            f"an IFEval row needs as many 'kwargs' as it has instructions, and at least one; "
            f"got {len(kwargs)} for the {len(ids)} of {ids!r:.200}."
        )
    checks = []
    for name, arguments in zip(ids, kwargs, strict=True):
        if name not in INSTRUCTIONS:
            raise ValueError(
                f"{name!r} is no IFEval instruction; the known ones: {', '.join(sorted(INSTRUCTIONS))}."
            )
        if arguments is not None and not isinstance(arguments, Mapping):
            raise ValueError(f"the kwargs of IFEval instruction {name!r} must be a mapping; got {arguments!r:.80}.")
        checks.append((name, INSTRUCTIONS[name].bind(arguments)))
    return checks


def _column(reference: Mapping[str, Any], key: str) -> list[Any]:
    value = reference.get(key)
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"an IFEval row needs the list {key!r}; got {value!r:.80}.")
    return list(value)
