"""Answers to ``reasoning-gym`` tasks, scored by the tasks themselves, but for those whose scorers cannot be trusted.

A row is graded as it was asked: the verifier gets the row itself. (Made again from its seed it may be another one: reasoning-gym
0.1.25 draws from Python sets in several tasks, whose order is another in every process.)
"""

from __future__ import annotations

import ast
import builtins
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from torchrl_chat.rewards.marked import tags
from torchrl_chat.rewards.verdict import Verdict


def load_task(task: str, settings: Mapping[str, Any]) -> Any:
    """The generator of a task: a sequence of ``{"question", "answer", "metadata"}``.

    Raises:
        ImportError: the package is not installed.
        ValueError: there is no such task, or a setting is not one of its own.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError("reasoning-gym is not installed: pip install 'torchrl_chat[reasoning-gym]'.") from error
    if task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}: it has {', '.join(sorted(DATASETS))}.")
    try:
        return reasoning_gym.create_dataset(task, **settings)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym's task {task!r} does not take {dict(settings)}: {error}") from error


def task_rows(task: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a task: the question, the answer that it names (``""`` if none), its number, and the entry to score with.

    Raises:
        ImportError: the package is not installed.
        ValueError: there is no such task, or a setting is not one of its own.
    """
    generator = load_task(task, settings)
    return [
        {
            "query": entry["question"],
            "answer": "" if entry["answer"] is None else str(entry["answer"]),
            "index": index,
            "entry": entry,
        }
        for index, entry in enumerate(generator[i] for i in range(len(generator)))
    ]


class ReasoningGymVerifier:
    """Scores with the task's ``score_answer``; the reference is the row as its generator made it.

    The answer is what stands in the last ``<answer></answer>``, or the whole response, without the white space around it. One
    that the scorer cannot read (it raises) is a wrong answer. What differs from the package:

    - ``game_of_life_halting`` and ``coin_flip`` are graded here: their scorers (0.1.25) give full marks to any text, and to
      ``0``. The answer has to be the right one of True and False; the probability, as a decimal, a fraction or in per cent,
      to 1e-4 and one per cent of itself.
    - Nine tasks compute with the answer by Python's ``eval`` or SymPy's. What is no plain value (or formula) is wrong there, and
      not evaluated: an answer is no program.
    - ``floors=False``: an empty answer gets 0. The package gives it 0.05 in ``arc_agi``, ``rearc`` and ``sentence_reordering``,
      0.01 in ``advanced_geometry``, ``color_cube_rotation``, ``countdown``, ``emoji_mystery``, ``fraction_simplification``,
      ``power_function``, ``prime_factorization``, ``puzzle24`` and ``rubiks_cube``.

    Some tasks hand the answer to SymPy, which can take forever on a hostile one: so it is graded in a worker process.

    Args:
        task: the name of the generator.
        settings: its settings, which some scorers read.
        floors: whether an empty answer gets what the task's scorer gives it.

    Example:
        >>> entry = {"question": "Will it halt?", "answer": "True", "metadata": {}}
        >>> ReasoningGymVerifier("game_of_life_halting")("<answer>no</answer>", entry).score
        0.0
    """

    isolate = True

    def __init__(self, task: str, settings: Mapping[str, Any] | None = None, *, floors: bool = True):
        self.task = task
        self.settings = dict(settings or {})
        self.floors = floors
        self._generator: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": None}

    def warm(self) -> None:
        """Make the generator, whose method the scorer is."""
        if self._generator is None:
            self._generator = load_task(self.task, self.settings)

    def __call__(self, response: str, reference: Mapping[str, Any]) -> Verdict:
        """Grade one response.

        Args:
            response: the text.
            reference: the row of the generator, ``{"question", "answer", "metadata"}``.

        Raises:
            TypeError: the reference is no row.
        """
        if not isinstance(reference, Mapping):
            raise TypeError(
                f"the reference of a reasoning-gym answer is {reference!r:.60}: expected the row itself, a dict with 'answer' "
                f"and 'metadata' (the column 'entry' of ReasoningGymEnv)."
            )
        tagged = tags(response, outer=True)  # the package itself reads from the first opening tag on
        answer = (tagged[-1].text if tagged else response).strip()
        score = self._score(answer, reference)
        return Verdict(score, answer or None, score >= 1.0)

    def _score(self, answer: str, entry: Mapping[str, Any]) -> float:
        if not answer and not self.floors:
            return 0.0
        if self.task in _OWN:
            return float(_OWN[self.task](answer, str(entry["answer"])))
        harmless = _EVALUATED.get(self.task)
        if harmless is not None and answer != entry["answer"] and not harmless(answer):
            return 0.0
        self.warm()
        try:
            score = float(self._generator.score_answer(answer, entry))
        except (ImportError, MemoryError):
            raise
        except Exception:
            # The answer is at fault, unless the right one fails as well.
            if isinstance(entry.get("answer"), str):
                self._generator.score_answer(entry["answer"], entry)
            return 0.0
        return score if math.isfinite(score) else 0.0


# ---------------------------------------------------------------------- tasks that are graded here
def _halts(answer: str, right: str) -> bool:
    return answer.strip(" .").lower() == right.lower()


# Bounded: the exact value of a number with a long exponent is no work worth doing.
_DECIMAL = r"[-+]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,2})?"
_CHANCE = re.compile(rf"({_DECIMAL})\s*(%)?|({_DECIMAL})\s*/\s*({_DECIMAL})", re.ASCII)


def _probability(answer: str, right: str) -> bool:
    read = _CHANCE.fullmatch(answer.replace(",", ""))
    if read is None:
        return False
    decimal, percent, above, below = read.groups()
    if decimal:
        given = Fraction(decimal) / (100 if percent else 1)
    elif divisor := Fraction(below):
        given = Fraction(above) / divisor
    else:
        return False
    expected = Fraction(right)
    # The absolute tolerance is the package's own. Alone it would take 0 for every small probability.
    return abs(given - expected) <= min(Fraction(1, 10_000), expected / 100)


_OWN: dict[str, Callable[[str, str], bool]] = {"game_of_life_halting": _halts, "coin_flip": _probability}


# ---------------------------------------------------------------------- answers that the package evaluates
_VALUES = (
    ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Name, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd,
)  # fmt: skip


def _is_value(answer: str) -> bool:
    """Whether ``eval`` would find a literal or a bare name, or fail."""
    try:
        parsed = ast.parse(answer, mode="eval")
    except (SyntaxError, ValueError):
        return True
    except (MemoryError, RecursionError):
        return False
    return all(isinstance(node, _VALUES) for node in ast.walk(parsed))


_NAMES = re.compile(r"[^\W\d]\w*")
_FORMULA_NAMES = {"abs", "min", "max", "pow", "round"}
_NO_FORMULA = re.compile(r"""['"`]|__|\.\s*[^\W\d]|[\[\]{};:=\\@]""")


def _is_formula(answer: str) -> bool:
    """Whether there is nothing in the text but numbers, operators and names that are no functions of Python's."""
    text = unicodedata.normalize("NFKC", answer)  # as Python reads names
    names = set(_NAMES.findall(text)) - _FORMULA_NAMES
    return not _NO_FORMULA.search(text) and not any(hasattr(builtins, name) or name == "lambda" for name in names)


_EVALUATED: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), _is_value),
    **dict.fromkeys(
        ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"),
        _is_formula,
    ),
}
