"""Mathematical answers: right if equal in value to the reference, however either is written.

The comparison is Hugging Face's Math-Verify (``pip install 'torchrl_chat[math]'``), which parses both sides into
SymPy expressions. Most answers need none of it: integers, decimals, simple fractions and answers that are spelled as
the reference are decided in plain Python first.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from torchrl_chat.rewards.marked import Mark, after_reasoning, boxes, find_marked, tidy
from torchrl_chat.rewards.notation import plain, radians
from torchrl_chat.rewards.quick import MAX_DIGITS, MAX_LENGTH, equal_numbers, read_number, same_text, too_much
from torchrl_chat.rewards.verdict import Verdict

Target = Literal["latex", "expr", "string"]


@dataclass(frozen=True)
class MathVerifier:
    """Right if the response's final answer equals the reference's, as mathematics.

    The final answer is what the response marks (see :func:`torchrl_chat.rewards.marked.find_marked`):
    ``\\boxed{}`` and ``\\fbox{}``, ``<answer>`` tags, a last line ``#### 42``, "the answer is 42". Text up to
    ``</think>`` is read over. So are units, though not "million", and where the reference is one value, text behind
    an answer that is no unit makes it wrong (``5\\text{ or }6``, ``5\\text{ dozen}``). A percentage is right for both of its
    readings: ``50\\%`` for 50 and for 0.5. Degrees in the argument of ``\\sin`` and the like are degrees, and an angle in
    degrees is compared with one in terms of ``\\pi`` as what it is. A number in a base is right for the same digits in the same base
    (``1011_2``, ``1011_{\\text{two}}``), a time of day for the same time.

    The reference is a bare answer (``\\frac{1}{2}``), a formula (``$...$``), a worked solution that marks its answer, or a
    number. One whose mark cannot be read is an error, never a match.

    Simple answers are decided by :meth:`quick`. All others go to SymPy, which can take forever on a hostile answer;
    so ``isolate`` is set, and math-verify's own time limit (a signal, which works in a main thread only) is off.
    What simple checks can see is refused before, as ``failure = "error: ..."``: answers of more than 10,000
    characters, of more than 60 nested brackets, with numbers of more than 1,000 digits, with powers of numbers or
    factorials that have more than 10,000 digits.

    Args:
        unmarked: whether an answer counts that the response does not mark. As Math-Verify does it, the last formula
            or number of the text is then taken. For training, ``False`` is the safer choice: otherwise a response
            that merely ends with the right number is rewarded, and a policy may learn to ramble until it does.
        which: whether the last marked answer counts, or the first.
        extract: what is read: LaTeX, plain expressions like ``10/9``, and letters A to D.
        strict: whether the names of variables matter, and intervals differ from tuples. A tuple still equals the set of its
            numbers, and so does a list without brackets: ``(2, 1)`` is right for ``\\{1, 2\\}`` and for ``1, 2``.
        float_rounding: where either side has a decimal point, both are rounded to so many decimals. If the reference
            is a number below 0.1, its leading zeros do not count: .0000672 is not .0000673.
        numeric_precision: significant digits to which values without a decimal point are compared.
        allow_set_relation_comp: whether the inequality ``1 < x < 2`` may answer a reference ``(1, 2)``.
        format_reward: the score of a wrong answer that is at least marked.

    Raises:
        ImportError: math-verify is not installed, and the answer is not a simple one.
        ValueError: an option has no such value; a reference is blank, or the mark of its answer cannot be read.

    Example:
        >>> verify = MathVerifier()
        >>> verify("Hence $x = \\\\boxed{\\\\frac{2}{4}}$.", "0.5")
        Verdict(score=1.0, answer='\\\\frac{2}{4}', correct=True, parts={}, failure=None)
        >>> verify("The answer is $1,235$.", "1234").correct
        False
    """

    unmarked: bool = True
    which: Literal["first", "last"] = "last"
    extract: Sequence[Target] = ("latex", "expr")
    strict: bool = True
    float_rounding: int = 6
    numeric_precision: int = 15
    allow_set_relation_comp: bool = False
    format_reward: float = 0.0

    isolate = True

    def __post_init__(self) -> None:
        if self.which not in ("first", "last"):
            raise ValueError(f"MathVerifier(which={self.which!r}): expected 'first' or 'last'.")
        targets = (self.extract,) if isinstance(self.extract, str) else tuple(self.extract)
        if not targets or not set(targets) <= {"latex", "expr", "string"}:
            raise ValueError(f"MathVerifier(extract={self.extract!r}): expected some of 'latex', 'expr', 'string'.")
        object.__setattr__(self, "extract", targets)

    def __call__(self, response: str, reference: Any) -> Verdict:
        """Grade one response. May run for long: see the class."""
        expected, found = _reference(reference), self._find(response)
        return self._quick(found, expected) or self._compare(found, expected)

    def warm(self) -> None:
        """Import SymPy and Math-Verify, and parse once, so that processes forked from this one need not."""
        self.compare("\\boxed{\\frac{\\sqrt{3}}{2}}", "\\frac{1}{2}\\sqrt{3}")

    def quick(self, response: str, reference: Any) -> Verdict | None:
        """The verdict of a simple case, in time linear in the response; ``None`` if it is not a simple one.

        Decided here are responses without an answer, answers that are refused, answers spelled as the reference
        is (but for spacing and the like), and integers, decimals and fractions against each other. Whatever is
        decided here, :meth:`compare` decides in the same way.

        Raises:
            ValueError: the reference is blank.
        """
        expected = _reference(reference)
        return self._quick(self._find(response), expected)

    def _quick(self, found: _Answer | None, expected: _Answer) -> Verdict | None:
        if found is None:
            return Verdict(0.0, None, False)
        if not found.direct:
            return None
        if "latex" in self.extract and expected.direct:
            same = equal_numbers(found.text, expected.text, self._rounding(expected))
            if same is None:
                same = same_text(found.text, expected.text)
            if same is not None:
                return self._verdict(found, same)
        return self._refused(found)

    def compare(self, response: str, reference: Any) -> Verdict:
        """The verdict by Math-Verify, without the arithmetic of :meth:`quick`. May run for long.

        Raises:
            ImportError: math-verify is not installed.
            ValueError: the reference is blank.
        """
        expected = _reference(reference)
        return self._compare(self._find(response), expected)

    def _compare(self, found: _Answer | None, expected: _Answer) -> Verdict:
        if found is None:
            return Verdict(0.0, None, False)
        if found.direct:
            alike = same_text(found.text, expected.text)
            certain = self._refused(found) if alike is None else self._verdict(found, alike)
            if certain is not None:
                return certain
        library, targets = _math_verify(), tuple(self.extract)
        answer = _read(found.text, found.direct, targets)
        if not found.direct:
            spelled = next((part for part in answer if isinstance(part, str)), None)
            if spelled is None:
                return Verdict(0.0, None, False)
            found = found._replace(shown=spelled, text=spelled)
            refused = self._refused(found)
            if refused is not None:
                return refused
        if found.direct and expected.direct and _turns(found.text, expected.text):
            answer = _read(radians(found.text), True, targets)
            expected = expected._replace(text=radians(expected.text))
        correct = library.verify(
            _read(expected.text, expected.direct, targets),
            answer,
            float_rounding=self._rounding(expected),
            numeric_precision=self.numeric_precision,
            strict=self.strict,
            allow_set_relation_comp=self.allow_set_relation_comp,
            timeout_seconds=None,
        )
        return self._verdict(found, correct)

    def _find(self, response: str) -> _Answer | None:
        text = after_reasoning(response)
        mark = find_marked(text, self.which)
        if mark is not None:
            return _marked(mark, text)
        if not self.unmarked:
            return None
        text = text.strip()[-MAX_LENGTH:]
        if _ALONE.fullmatch(text):
            return _Answer(tidy(text), text, True, False)
        if "string" not in self.extract and not _ANYTHING.search(text):
            return None
        return _Answer(plain(text), text, False, False)

    def _rounding(self, expected: _Answer) -> int:
        if expected.text.isdecimal():
            return self.float_rounding
        number = read_number(expected.text) if expected.direct and len(expected.text) <= MAX_DIGITS else None
        zeros = 0
        if number is not None and number.value:
            zeros = max(0, -1 - math.floor(math.log10(abs(number.value))))
        return self.float_rounding + zeros

    def _verdict(self, found: _Answer, correct: bool) -> Verdict:
        score = 1.0 if correct else self.format_reward if found.marked else 0.0
        return Verdict(score, found.shown, correct)

    def _refused(self, found: _Answer) -> Verdict | None:
        reason = too_much(found.text)
        if reason is None:
            return None
        shown = found.shown if len(found.shown) <= 200 else found.shown[:200] + "..."
        return Verdict(0.0, shown, False, failure=f"error: the answer is not evaluated: {reason}.")


# --- What is compared: an answer as a text -------------------------------------------------------------------------


class _Answer(NamedTuple):
    text: str
    shown: str
    direct: bool  # the text is the answer itself, not a text that has an answer somewhere
    marked: bool


_DELIMITER = re.compile(r"(?<!\\)\$|\\[(\[]")
_ANYTHING = re.compile(r"\d|\$|\\[(\[]|\s\[")  # without any of these Math-Verify finds no answer
_ALONE = re.compile(r"\s*[-+−]?\s*[$€£]?[\d.,/]+\s*%?\s*")
_PERCENT_BEHIND = re.compile(r"\s*(?:\$|\\\)|\\\])?\s*(?:\\?%|(?:percent|pct)\b)", re.IGNORECASE)


def _marked(mark: Mark, text: str) -> _Answer:
    parts = [part if len(part) > MAX_LENGTH else tidy(part) for part in mark.parts or (mark.text,)]
    if mark.kind == "box" and _PERCENT_BEHIND.match(text, mark.end) and not parts[-1].endswith("%"):
        parts[-1] = tidy(parts[-1] + "\\%")
    if 1 < len(parts) <= _MANY:  # \boxed{\frac12}, or \boxed{0.5}: one answer, said twice
        kept: list[str] = []
        for part in parts:
            if not any(equal_numbers(part, other, 0) or same_text(part, other) for other in kept):
                kept.append(part)
        parts = kept
    answer = ", ".join(parts)
    return _Answer(answer, mark.text, not _DELIMITER.search(answer), True)


def _reference(reference: Any) -> _Answer:
    if isinstance(reference, float):
        reference = format(Decimal(repr(reference)), "f")
    return _reference_text(str(reference))


_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}\s+[a-zA-Z]{2,}\s+[a-zA-Z]{2,}(?![^{]*\})")
_MANY = 20  # boxes of a list whose contents are compared with one another
_BOX = re.compile(r"\\++(?:boxed|fbox)(?![a-zA-Z])")


@lru_cache(maxsize=8192)
def _reference_text(reference: str) -> _Answer:
    mark = find_marked(reference)
    if "boxed" in reference or "fbox" in reference:
        # Or something before it would be taken for the answer: "As x = 3, it is \\boxed{5".
        last = max((match.start() for match in _BOX.finditer(reference)), default=0)
        unread = reference[:last].strip(" \n$") and all(box.start != last for box in boxes(reference, nested=True))
        if unread or (mark is not None and _BOX.search(mark.text)):
            raise ValueError(
                f"the reference {reference[-200:]!r} marks its answer with a box that cannot be read: expected "
                f"\\boxed{{...}} with braces that close."
            )
    if reference.rfind("<answer>") > max(0, reference.rfind("</answer>")):
        raise ValueError(f"the reference {reference[-200:]!r} opens <answer> and never closes it.")
    if mark is not None:
        found = _marked(mark, reference)
    else:
        answer = tidy(reference)
        direct = not _DELIMITER.search(answer) and not _WORDS.search(answer)
        found = _Answer(answer if direct else plain(reference), reference, direct, False)
    if not found.text.strip():
        raise ValueError(
            f"the reference {reference!r} is blank: expected an answer like '42' or '\\\\frac{{1}}{{2}}'."
        )
    return found


def _turns(a: str, b: str) -> bool:
    """Whether one of two angles is in degrees and the other in radians."""
    return any("\\circ" in x and "\\pi" not in x and "\\pi" in y and "\\circ" not in y for x, y in ((a, b), (b, a)))


# --- The slow way --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise ImportError("MathVerifier needs math-verify: pip install 'torchrl_chat[math]'.") from error
    # It warns that its time limit is off. Here that is on purpose.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(lambda record: "Timeout is disabled" not in str(record.msg))
    return math_verify


@lru_cache(maxsize=8)
def _targets(extract: tuple[Target, ...]) -> tuple[Any, ...]:
    library = _math_verify()
    configs = {
        "latex": library.LatexExtractionConfig,
        "expr": library.ExprExtractionConfig,
        "string": library.StringExtractionConfig,
    }
    return tuple(configs[name]() for name in extract)


@lru_cache(maxsize=4096)
def _read(text: str, direct: bool, extract: tuple[Target, ...]) -> list[Any]:
    """The SymPy expressions that the text spells, and the part of it that they were read from."""
    library = _math_verify()
    if direct and "latex" in extract:
        # Math-Verify's search for formulas in a text is not needed here: the text is the formula.
        from latex2sympy2_extended import NormalizationConfig, normalize_latex
        from math_verify.grader import should_treat_as_complex

        config = NormalizationConfig(units=True, malformed_operators=True, nits=True, boxed="none")
        normal = normalize_latex(text, config)
        try:
            return [_converter()(is_real=not should_treat_as_complex(normal)).parse(normal), normal]
        except Exception:
            pass  # the parser raises whatever it likes; the search below has further ways to read it
        text = f"\\boxed{{{text}}}"
    return library.parse(text, extraction_config=_targets(extract), parsing_timeout=None)


@lru_cache(maxsize=1)
def _converter() -> Any:
    """The parser of latex2sympy2_extended, with faster numbers.

    It reads each number by ``sympy.Number(text)``, which runs ``from sympy import *`` and the tokenizer of Python:
    0.3 ms a number, a third of all grading.
    """
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from sympy import Float, Integer

    class Converter(_Latex2Sympy):
        def parse_number(self, text: str) -> Any:
            text = text.replace(",", "")
            whole, point, decimals = text.partition(".")
            if not (whole + decimals).isdecimal() or not text.isascii():
                return super().parse_number(text)
            return Float(text) if point else Integer(text)

    return Converter
