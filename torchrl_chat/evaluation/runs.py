"""Runs of an evaluation read back, and their questions paired: by what is asked, else by an id; what has no counterpart is told.

A run is a folder that ``torchrl-chat eval`` wrote, a folder of such folders (a task each), or a rollout file.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torchrl_chat.evaluation.figures import Figures

IDS = ("id", "ID", "task_id", "unique_id", "question_id", "problem_id", "Record ID")
"""Columns that name a question, where each question has another value there."""

_SHOWN = 4000  # characters of an answer or a question that a report may show


@dataclass
class Question:
    """A question of a run, with what was answered."""

    row: int
    query: Any
    reference: Any
    columns: Mapping[str, Any]
    values: list[float] = field(default_factory=list)
    """Of each answer: 1 for right and 0 for wrong, or the reward that is compared."""
    answers: list[str] = field(default_factory=list)
    """The texts of the answers, shortened."""


@dataclass
class TaskRun:
    """One task of a run."""

    task: str
    path: Path
    questions: list[Question]
    summary: dict[str, Any]
    settings: Mapping[str, Any]

    @property
    def id_column(self) -> str | None:
        """The column that names the questions."""
        for name in IDS:
            found = [question.columns.get(name) for question in self.questions]
            if None not in found and len(set(map(str, found))) == len(found):
                return name
        return None


@dataclass
class Run:
    """What one model did: a task or several."""

    name: str
    path: Path
    tasks: dict[str, TaskRun]


def read_runs(paths: Sequence[str | os.PathLike[str]], metric: str = "success") -> list[Run]:
    """The runs of some folders or rollout files.

    Args:
        paths: each a run; or a folder of runs, all of which are read.
        metric: what is compared: ``"success"``, ``"reward"``, or a component of the reward.

    Raises:
        ValueError: there is no run at a path, it has no answers, or no such metric.

    Example:
        >>> read_runs(["runs/none"])
        Traceback (most recent call last):
        ValueError: runs/none: there is no run of eval here, neither a folder with rollouts.jsonl nor a rollout file.
    """
    found: list[tuple[Path, list[Path]]] = []
    for path in map(Path, paths):
        found += _runs_at(path)
    runs = []
    for path, files in found:
        tasks: dict[str, TaskRun] = {}
        for file in files:
            task = _read(file, metric)
            if task.task in tasks:
                raise ValueError(
                    f"{path} holds the task {task.task} twice, in {tasks[task.task].path} and {task.path}: give one of them."
                )
            tasks[task.task] = task
        runs.append(Run(_model_of(tasks), path, tasks))
    _tell_apart(runs)
    return runs


def _runs_at(path: Path) -> list[tuple[Path, list[Path]]]:
    """The runs at a path, each with its rollout files."""
    if path.is_file():
        return [(path, [path])]
    if (path / "rollouts.jsonl").is_file():
        return [(path, [path / "rollouts.jsonl"])]
    if files := _played(path, "*/rollouts.jsonl"):
        return [(path, files)]
    if files := _played(path, "*/*/rollouts.jsonl"):
        told = settings_beside(path / "rollouts.jsonl").get("runs") or []  # the order in which they were asked for
        order = {path / name: place for place, name in enumerate(told)}
        folders = sorted(
            {file.parent.parent for file in files}, key=lambda folder: (order.get(folder, len(order)), folder)
        )
        return [(folder, [file for file in files if file.parent.parent == folder]) for folder in folders]
    raise ValueError(
        f"{path}: there is no run of eval here, neither a folder with rollouts.jsonl nor a rollout file."
    )


def _played(path: Path, pattern: str) -> list[Path]:
    """The rollout files in a folder of runs; rescored ones stand beside those that they were made of, and are named by themselves."""
    return [file for file in sorted(path.glob(pattern)) if "rescored" not in settings_beside(file)]


def _read(file: Path, metric: str) -> TaskRun:
    from torchrl_chat.rollouts import read_rollouts

    settings = settings_beside(file)
    limit, samples = settings.get("limit"), settings.get("samples")
    questions: dict[int, Question] = {}
    seen: set[tuple[int, int]] = set()
    figures, known, metadata = Figures(), Counter[str](), dict[str, Any]()
    for number, episode in enumerate(read_rollouts(file)):
        row, place = episode.get("row"), episode.get("place")
        row, place = number if row is None else row, 0 if place is None else place
        outside = (limit is not None and row >= limit) or (samples is not None and place >= samples)
        if (row, place) in seen or outside:
            continue
        seen.add((row, place))
        figures.add({**episode, "row": row})
        metadata = metadata or episode.get("metadata") or {}
        known.update(episode["reward_parts"])
        columns = episode.get("columns") or {}
        question = questions.setdefault(row, Question(row, episode["query"], episode["reference"], columns))
        question.values.append(_value(episode, metric))
        question.answers.append(_answer(episode))
    if not questions:
        raise ValueError(f"{file} has no episodes: there is nothing to compare.")
    if metric not in ("success", "reward", *known):
        raise ValueError(
            f"{file} has no {metric!r} to compare by: expected {', '.join(('success', 'reward', *known))}."
        )
    task = settings.get("dataset") or metadata.get("dataset") or file.parent.name
    summary = {"dataset": task, "model": settings.get("model") or metadata.get("policy") or file.stem}
    summary |= figures.summary() | {"missing": _missing(file)}
    ordered = [questions[row] for row in sorted(questions)]
    return TaskRun(str(task), file.parent, ordered, summary, settings)


def settings_beside(file: Path) -> dict[str, Any]:
    """What ``config.json`` beside a rollout file says; nothing where it is not there."""
    try:
        settings = json.loads((file.parent / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _missing(file: Path) -> int:
    """How many answers a run still lacks, as it said when it ended last."""
    try:
        return int(json.loads((file.parent / "summary.json").read_text()).get("missing") or 0)
    except (OSError, ValueError, AttributeError, TypeError):
        return 0


def _value(episode: Mapping[str, Any], metric: str) -> float:
    if episode.get("error"):  # no answer: as the summary counts it
        return 0.0
    if metric == "success":
        return float(bool(episode["success"]))
    return float((episode["reward"] if metric == "reward" else episode["reward_parts"].get(metric)) or 0.0)


def _answer(episode: Mapping[str, Any]) -> str:
    if episode.get("error"):
        return f"(no answer: {episode['error']})"[:_SHOWN]
    said = [message for message in episode["messages"] if message.get("role") == "assistant"]
    return shown(said[-1].get("content")) if said else ""


def shown(value: Any) -> str:
    """A question or an answer as a text of bounded length."""
    if isinstance(value, list):
        parts = [part.get("content", part.get("text", "")) if isinstance(part, Mapping) else part for part in value]
        value = "\n\n".join(str(part) for part in parts)
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}\n[...]\n{text[-_SHOWN // 2 :]}"


def _model_of(tasks: Mapping[str, TaskRun]) -> str:
    models = dict.fromkeys(str(task.summary["model"]) for task in tasks.values())
    return ", ".join(models)


def _tell_apart(runs: Sequence[Run]) -> None:
    """Name runs by their models, shortened where those are folders; by their own folders where that does not tell them apart."""
    for name in ("model", "folder"):
        labels = [tails([run.name for run in runs]), tails([str(run.path) for run in runs])][name == "folder"]
        if len(set(labels)) == len(runs) or name == "folder":
            for run, label in zip(runs, labels, strict=True):
                run.name = label
            return


def tails(names: Sequence[str]) -> list[str]:
    """The shortest ends of some paths that tell them apart, one part at least."""
    parts = [name.rstrip("/").split("/") for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(path[-count:]) for path in parts]
        if len(set(ends)) == len(set(names)):
            return ends
    return list(names)


# ---------------------------------------------------------------------- pairs
class Pairs(NamedTuple):
    """The questions of two runs of one task."""

    both: list[tuple[Question, Question]]
    only_first: list[Question]
    only_second: list[Question]
    reworded: int
    """How many of ``both`` were found by their id, since they are asked in other words, or with choices in another order."""
    other_reference: int
    """How many of ``both`` have another reference in the second."""
    repeated: int
    """Rows of the first that ask what an earlier row asks: they say nothing new, and are in none of the lists."""


def paired(first: TaskRun, second: TaskRun) -> Pairs:
    """Pair the questions of two runs of a task.

    A question is the same if the same is asked, with the same right answer or, failing that, another. What is left is paired by
    its id, where both runs have an id and the right answer is the same: so are questions whose choices were shuffled
    differently.
    """
    mine, theirs = _distinct(first), _distinct(second)
    left, free = dict(mine), dict(theirs)
    found: list[tuple[Key, Key]] = []

    def match(name_of: Callable[[TaskRun, Key, Question], Any]) -> int:
        names = {name_of(second, key, question): key for key, question in reversed(free.items())}
        pairs = [(key, names.get(name_of(first, key, question))) for key, question in left.items()]
        count = 0
        for key, other in pairs:
            if other in free:
                found.append((key, other))
                del left[key], free[other]
                count += 1
        return count

    match(lambda run, key, question: key)
    other_reference = match(lambda run, key, question: key[0])
    column = first.id_column
    reworded = 0
    if column is not None and column == second.id_column:
        reworded = match(lambda run, key, question: (str(question.columns[column]), key[1]))
    both = sorted(((mine[a], theirs[b]) for a, b in found), key=lambda pair: pair[0].row)
    repeated = len(first.questions) - len(mine)
    return Pairs(both, list(left.values()), list(free.values()), reworded, other_reference, repeated)


Key = tuple[str, str]


def _distinct(run: TaskRun) -> dict[Key, Question]:
    """The questions by what they ask and what is right, each once."""
    found: dict[Key, Question] = {}
    for question in run.questions:
        found.setdefault(
            (json.dumps(question.query, sort_keys=True, ensure_ascii=False), _right(question)), question
        )
    return found


def _right(question: Question) -> str:
    """What tells the right answer of a question; of lettered choices, the text of the right one."""
    reference = question.reference
    if isinstance(reference, Mapping) and isinstance(reference.get("choices"), list):
        place = ord(str(reference.get("answer"))[:1] or "?") - ord("A")
        if 0 <= place < len(reference["choices"]):
            return str(reference["choices"][place])
    return json.dumps(reference, sort_keys=True, ensure_ascii=False)
