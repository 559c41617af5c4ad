"""The ready-made tasks: which verifier grades them, and where their rows keep the question and the reference.

Environments and ``torchrl-chat grade`` share this table, so that a response gets the same verdict in training and offline.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torchrl_chat.rewards as rewards


@dataclass(frozen=True)
class Task:
    """A kind of dataset rows with their verifier.

    Args:
        name: how the command line calls it.
        verifier: the name of the verifier's class in :mod:`torchrl_chat.rewards`.
        questions: columns that may hold the question, in the order in which they are looked for.
        references: columns that may hold the reference, likewise.
        fields: columns that make the reference together, as a dict, where it has no column of its own; those with
            ``?`` behind them may be missing.
        defaults: arguments of the verifier.
        unmarked: the option that has the verifier read answers that the response does not mark; ``None`` where there
            is none, since it reads them anyway or never does.
        needs: the package that grading needs, and the extra that brings it.
        rows: of a task whose rows only a file of the user's has: what is to be given.

    Example:
        >>> TASKS["gsm8k"].reference_of({"question": "2 + 2?", "answer": "#### 4"})
        '#### 4'
    """

    name: str
    verifier: str
    questions: tuple[str, ...] = ("query", "question", "problem", "prompt")
    references: tuple[str, ...] = ("reference", "answer", "solution")
    fields: tuple[str, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    unmarked: str | None = None
    needs: tuple[str, str] | None = None
    rows: str = ""

    def make_verifier(self, **options: Any) -> Any:
        """The task's verifier.

        Raises:
            TypeError: an option that it does not have, with those that it has.
            ImportError: the package that it needs is not installed; the text names the extra.
        """
        if self.needs is not None:  # asked for without importing it, before the first answer is graded
            package, extra = self.needs
            try:
                found = find_spec(package) is not None
            except ModuleNotFoundError:
                found = False
            if not found:
                raise ImportError(
                    f"grading the task {self.name!r} needs the package {package}: pip install 'torchrl_chat[{extra}]'."
                )
        kind: Callable[..., Any] = getattr(rewards, self.verifier)
        known = inspect.signature(kind).parameters
        if unknown := sorted(options.keys() - known.keys()):
            raise TypeError(
                f"{self.verifier} has no option {', '.join(map(repr, unknown))}: it has {', '.join(sorted(known)) or 'none'}."
            )
        return kind(**dict(self.defaults) | options)

    def question_of(self, row: Mapping[str, Any]) -> Any:
        """The question of a row; ``None`` where the column is there and empty, which is this row's affair.

        Raises:
            KeyError: no column that may hold it is there.
        """
        for key in self.questions:
            if row.get(key) is not None:
                return row[key]
        if any(key in row for key in self.questions):
            return None
        raise KeyError(self._missing(row, "question", self.questions))

    def reference_of(self, row: Mapping[str, Any]) -> Any:
        """The reference of a row.

        Raises:
            KeyError: no column that may hold it is there.
        """
        for key in self.references:
            if row.get(key) is not None:
                return row[key]
        needed = [field for field in self.fields if not field.endswith("?")]
        if needed and all(row.get(field) is not None for field in needed):
            names = [field.rstrip("?") for field in self.fields]
            return {name: row[name] for name in names if row.get(name) is not None}
        raise KeyError(self._missing(row, "reference", (*self.references, *needed)))

    def _missing(self, row: Mapping[str, Any], what: str, keys: tuple[str, ...]) -> str:
        there = ", ".join(key for key, value in row.items() if value is not None)
        told = f"a row of task {self.name!r} has no {what}: looked for {', '.join(keys)}; it has {there}."
        key = "data_key" if what == "question" else "reference_key"
        return f"{told} {key} names its column (--option {key}=NAME of train and eval)."


TASKS = {
    task.name: task
    for task in (
        Task("gsm8k", "GSM8KVerifier", references=("reference", "answer"), unmarked="last_number"),
        Task(
            "math",
            "MathVerifier",
            defaults=(("unmarked", False),),
            unmarked="unmarked",
            needs=("math_verify", "math"),
        ),
        Task(
            "ifeval",
            "IFEvalVerifier",
            references=("reference",),
            fields=("instruction_id_list", "kwargs", "prompt?"),
            needs=("py3langid", "ifeval"),
        ),
        Task("countdown", "CountdownVerifier", references=("reference",), fields=("target", "nums")),
        Task("choice", "MultipleChoice"),
        Task("exact", "ExactMatch"),
        Task("number", "NumberVerifier"),
        Task(
            "aime",
            "GSM8KVerifier",
            questions=("query", "problem", "question", "Problem", "Question", "prompt"),
            references=("reference", "answer", "Answer"),
            unmarked="last_number",
            rows="a JSONL file whose rows have problem (or question) and answer (a whole number), and perhaps id and year",
        ),
        Task(
            "math-500",
            "MathVerifier",
            defaults=(("unmarked", False),),
            unmarked="unmarked",
            needs=("math_verify", "math"),
            rows="a JSONL file whose rows have problem and answer (LaTeX), and perhaps subject, level and unique_id",
        ),
        Task(
            "gpqa",
            "MultipleChoice",
            questions=("query", "question", "Question", "problem", "prompt"),
            references=("reference", "answer"),
            rows="a JSONL file whose rows have Question, Correct Answer and Incorrect Answer 1, 2 ..., or question, choices and answer",
        ),
        Task(
            "mmlu-pro",
            "MultipleChoice",
            references=("reference", "answer"),
            rows="a JSONL file whose rows have question, options (or choices), answer (a letter, an index or a text), and perhaps "
            "category and question_id",
        ),
        Task(
            "humaneval",
            "CodeVerifier",
            questions=("query", "prompt"),
            references=("reference",),
            fields=("test", "entry_point", "prompt?"),
            rows="a JSONL file whose rows have prompt, test and entry_point, and perhaps task_id",
        ),
    )
}
LOCAL = tuple(name for name, task in TASKS.items() if task.rows)
"""The tasks whose rows are in a file of the user's."""
