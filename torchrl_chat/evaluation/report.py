"""What several runs come to: each run's figures, and each compared with the first, as one object for JSON and as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torchrl_chat.evaluation.pairs import compared
from torchrl_chat.evaluation.runs import Question, Run, paired, shown

VERSION = 1
"""Of the object; it changes when a key changes its meaning."""

_MOST = 50  # values that a column may have to go by


def report(
    runs: Sequence[Run], *, metric: str = "success", by: Sequence[str] = (), examples: int = 10
) -> dict[str, Any]:
    """Compare runs with the first of them, task by task.

    Args:
        runs: what :func:`~torchrl_chat.evaluation.runs.read_runs` found.

    Keyword Args:
        metric: what their values are.
        by: columns of the data; each of their values is compared by itself, too.
        examples: how many questions are shown of those that one run has right and the other has not, each way.

    Returns:
        ``"runs"``: of each its name, its path and the summary of each task; ``"comparisons"``: of each run with the first, in each
        task and in all of them together (``"task": None``), what :class:`~torchrl_chat.evaluation.pairs.Paired` has, and
        ``"slices"``, ``"only_first"``, ``"only_second"``, ``"reworded"``, ``"other_reference"``, ``"repeated"``, on how many questions it
        is ``"ahead"`` and ``"behind"``, with ``"examples"``; ``"steps"``: where the
        models are checkpoints of one training run, their steps; ``"notes"``: what a reader has to know.

    Raises:
        ValueError: no question of a task has a column of ``by``, or too many values of it.
    """
    first, *others = runs
    comparisons = [c for run in others for c in _comparisons(first, run, metric, by, examples)]
    return {
        "version": VERSION,
        "metric": metric,
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "tasks": {name: task.summary for name, task in run.tasks.items()},
            }
            for run in runs
        ],
        "comparisons": comparisons,
        "steps": _steps([run.name for run in runs]),
        "notes": _notes(runs, comparisons),
    }


def _comparisons(
    first: Run, second: Run, metric: str, by: Sequence[str], examples: int
) -> Iterable[dict[str, Any]]:
    names = {"first": first.name, "second": second.name}
    together: list[tuple[Question, Question]] = []
    shared = [task for task in first.tasks if task in second.tasks]
    for task in shared:
        pairs = paired(first.tasks[task], second.tasks[task])
        counts = {
            "only_first": len(pairs.only_first),
            "only_second": len(pairs.only_second),
            "reworded": pairs.reworded,
            "other_reference": pairs.other_reference,
            "repeated": pairs.repeated,
        }
        left_out = {
            side: [shown(question.query) for question in questions[:examples]]
            for side, questions in (("first", pairs.only_first), ("second", pairs.only_second))
        }
        if not pairs.both:
            yield {**names, "task": task, "questions": 0, **counts, "left_out": left_out, "slices": {}}
            continue
        together += pairs.both
        yield {
            **names,
            "task": task,
            **_compared(pairs.both),
            "answers": _answers(pairs.both),
            **counts,
            "left_out": left_out,
            "slices": {column: _slices(pairs.both, column, task) for column in by},
            "ahead": _ahead(pairs.both, 1),
            "behind": _ahead(pairs.both, -1),
            "examples": {
                "gained": _examples(pairs.both, 1, examples),
                "lost": _examples(pairs.both, -1, examples),
            },
        }
    if len(shared) > 1 and together:
        yield {**names, "task": None, **_compared(together), "answers": _answers(together), "slices": {}}


def _compared(pairs: Sequence[tuple[Question, Question]]) -> dict[str, Any]:
    return compared([a.values for a, _ in pairs], [b.values for _, b in pairs]).plain()


def _answers(pairs: Sequence[tuple[Question, Question]]) -> list[int]:
    """The fewest and the most answers that a question has."""
    counts = [len(question.values) for pair in pairs for question in pair]
    return [min(counts), max(counts)]


def _slices(pairs: Sequence[tuple[Question, Question]], column: str, task: str) -> dict[str, dict[str, Any]]:
    parts: dict[str, list[tuple[Question, Question]]] = {}
    for pair in pairs:
        value = next((q.columns[column] for q in pair if q.columns.get(column) is not None), None)
        parts.setdefault("(none)" if value is None else str(value), []).append(pair)
    if set(parts) == {"(none)"}:
        there = sorted({key for pair in pairs for question in pair for key in question.columns})
        raise ValueError(
            f"--by {column}: no question of {task} has that column; there {'are' if there else 'is'} {', '.join(there) or 'none'}."
        )
    if len(parts) > _MOST:
        raise ValueError(f"--by {column}: {task} has {len(parts)} values of it: expected {_MOST} at most.")
    return {value: _compared(parts[value]) for value in sorted(parts, key=_natural)}


def _natural(text: str) -> list[Any]:
    """So that 2 stands before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def _gap(pair: tuple[Question, Question]) -> float:
    first, second = (math.fsum(question.values) / len(question.values) for question in pair)
    return second - first


def _ahead(pairs: Sequence[tuple[Question, Question]], sign: int) -> int:
    return sum(sign * _gap(pair) > 0 for pair in pairs)


def _examples(pairs: Sequence[tuple[Question, Question]], sign: int, count: int) -> list[dict[str, Any]]:
    """The questions on which the second is ahead (1) or behind (-1), the clearest first."""
    chosen = [pair for pair in pairs if sign * _gap(pair) > 0]
    chosen = sorted(chosen, key=lambda pair: sign * _gap(pair), reverse=True)[:count]
    return [
        {
            "question": shown(a.query),
            "reference": shown(a.reference),
            "first": _at(a, best=sign < 0),
            "second": _at(b, best=sign > 0),
        }
        for a, b in chosen
    ]


def _at(question: Question, best: bool) -> dict[str, Any]:
    """An answer of a question, and what the answers are worth."""
    value = (max if best else min)(question.values)
    return {"answer": question.answers[question.values.index(value)], "values": question.values}


def _steps(names: Sequence[str]) -> list[int] | None:
    found = [re.fullmatch(r"(?:.*[/-])?step-0*(\d+)", name) for name in names]
    return [int(match[1]) for match in found if match] if len(names) > 1 and all(found) else None


def _notes(runs: Sequence[Run], comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    for run in runs:
        for name, task in run.tasks.items():
            summary = task.summary
            if summary["missing"]:
                notes.append(
                    f"{run.name} lacks {summary['missing']} answers of {name}: it has not been played to its end."
                )
            failed = sum(summary["errors"].values())
            if failed:
                notes.append(f"{failed} requests of {run.name} failed in {name}, and count as wrong.")
            ungraded = sum(summary["grade_failures"].values())
            if ungraded:
                notes.append(f"{ungraded} answers of {run.name} in {name} could not be graded, and count as wrong.")
    first = runs[0]
    for run in runs[1:]:
        for here, there in ((first, run), (run, first)):
            lacking = [task for task in here.tasks if task not in there.tasks]
            if lacking:
                notes.append(
                    f"only {here.name} has the task {', '.join(lacking)}: {there.name} is not compared in it."
                )
        for name in first.tasks:
            if name in run.tasks:
                notes += _other_settings(first, run, name)
    for c in comparisons:
        of = f"{c['second']} and {c['first']}, {c['task']}"
        if c.get("reworded"):
            notes.append(f"{of}: {c['reworded']} questions were paired by their id, their texts are not the same.")
        if c.get("repeated"):
            notes.append(
                f"{of}: {c['repeated']} rows ask what an earlier row asks, and are left out: they say nothing new."
            )
        if c.get("other_reference"):
            notes.append(
                f"{of}: {c['other_reference']} questions have another reference in the one than in the other."
            )
    tests = sum(c["questions"] > 0 for c in comparisons) + sum(
        len(s) for c in comparisons for s in c["slices"].values()
    )
    if tests > 5:
        notes.append(
            f"{tests} comparisons at 5 %: where nothing differs, one in twenty of them says so all the same."
        )
    return notes


_SAMPLING = ("temperature", "max_new_tokens", "input_mode", "chat_template")


def _other_settings(first: Run, second: Run, task: str) -> list[str]:
    settings = first.tasks[task].settings, second.tasks[task].settings
    differs = [
        key
        for key in _SAMPLING
        if key in settings[0] and key in settings[1] and settings[0][key] != settings[1][key]
    ]
    return [
        f"{second.name} was asked with {key.replace('_', '-')} {settings[1][key]}, {first.name} with {settings[0][key]}, in {task}."
        for key in differs
    ]


# ---------------------------------------------------------------------- text
def as_text(report: Mapping[str, Any], *, details: bool = True) -> str:
    """The report for people: a table of all runs, and in detail what each comparison comes to."""
    parts = [_runs_text(report)]
    parts += [_comparison_text(c) for c in report["comparisons"]] if details else []
    parts += [f"note: {note}" for note in report["notes"]]
    return "\n\n".join(part for part in parts if part)


def _runs_text(report: Mapping[str, Any]) -> str:
    """One table of all runs and tasks."""
    against = {(c["second"], c["task"]): c for c in report["comparisons"]}
    ks = sorted(
        {int(k) for run in report["runs"] for s in run["tasks"].values() for k in s["pass_at_k"] if int(k) > 1}
    )
    head = ["task", "model", "questions", "accuracy", "95 % interval"]
    head += [f"pass@{ks[-1]}", f"maj@{ks[-1]}"] if ks else []
    head += ["difference"] if report["comparisons"] else []
    head += ["p", "tokens", "seconds"] if report["comparisons"] else ["tokens", "seconds"]
    rows = []
    for task in dict.fromkeys(task for run in report["runs"] for task in run["tasks"]):
        for run in report["runs"]:
            summary = run["tasks"].get(task)
            if summary is None:
                continue
            low, high = summary["interval"]
            row = [
                task,
                run["name"],
                str(summary["questions"]),
                f"{summary['accuracy']:.4f}",
                f"{low:.4f} to {high:.4f}",
            ]
            for name in ("pass_at_k", "maj_at_k") if ks else ():
                entry = summary[name].get(str(ks[-1]))
                row.append("" if entry is None else f"{entry['value']:.4f}")
            if report["comparisons"]:
                c = against.get((run["name"], task))
                told = c is not None and c["questions"] > 0
                row += [f"{c['difference']:+.4f}", p_of(c["p"])] if c is not None and told else ["", ""]
            cost = summary["cost"]
            rows.append([*row, f"{cost['sampled_tokens']:,}", f"{cost['seconds']:,.1f}"])
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other, numbers to the right.

    Example:
        >>> print(table(["a", "n"], [["x", "10"], ["yy", "9"]]))
        a    n
        x   10
        yy   9
    """
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    right = [all(re.match(r"[+\-−]?[\d<]", row[i]) or not row[i] for row in rows) for i in range(len(head))]
    lines = (
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        for row in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def p_of(value: float | None) -> str:
    """A p for people.

    Example:
        >>> p_of(0.0312), p_of(1e-7)
        ('0.031', '<0.001')
    """
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def verdict(c: Mapping[str, Any]) -> str:
    """What a comparison comes to, in a sentence."""
    if not c["questions"]:
        return "There is no question that both have."
    better, worse = (c["second"], c["first"]) if c["difference"] > 0 else (c["first"], c["second"])
    if c["decided"]:
        return f"{better} is better than {worse}."
    return "Undecided: a difference like this comes by luck, too."


def power(c: Mapping[str, Any]) -> list[str]:
    """What would decide, in sentences."""
    told = []
    if c["detectable"] is not None:
        told.append(
            f"{c['questions']:,} questions that differ as these do find a difference of {c['detectable']:.3f} in 80 % of all cases."
        )
    if not c["decided"] and c["questions_needed"] is not None:
        told.append(f"A difference of {abs(c['difference']):.4f} takes {c['questions_needed']:,} questions.")
        if c["answers_needed"] is not None:
            told.append(f"Or {c['answers_needed']:,} answers to each of these.")
        elif c["answers"][0] > 1:
            told.append("More answers to each of these would not do.")
    return told


def _comparison_text(c: Mapping[str, Any]) -> str:
    head = f"{c['second']} against {c['first']}, {c['task'] or 'all tasks'}: {c['questions']:,} questions"
    if c["questions"]:
        few, many = c["answers"]
        head += (
            f" in both, {few} answers each"
            if few == many > 1
            else f", {few} to {many} answers each"
            if few != many
            else " in both"
        )
    lines = [head]
    if c["questions"]:
        lines.append(
            f"  {c['first']} {c['first_mean']:.4f}, {c['second']} {c['second_mean']:.4f}, difference {interval_text(c)}"
        )
        if c["p"] is not None:
            lines.append(
                f"  {c['gained']} gained, {c['lost']} lost: McNemar's exact p {p_of(c['p'])}, mid-p {p_of(c['mid_p'])}"
            )
    lines.append(f"  {verdict(c)}")
    if c["questions"]:
        lines += [f"  {sentence}" for sentence in power(c)]
    for name in ("first", "second"):
        if c.get(f"only_{name}"):
            lines.append(f"  left out: {c[f'only_{name}']} questions that only {c[name]} has")
    for column, values in c["slices"].items():
        rows = [
            [
                value,
                str(s["questions"]),
                f"{s['first_mean']:.4f}",
                f"{s['second_mean']:.4f}",
                interval_text(s),
                p_of(s["p"]),
            ]
            for value, s in values.items()
        ]
        columns = [column, "questions", c["first"], c["second"], "difference", "p"]
        lines += ["", *(f"  {line}" for line in table(columns, rows).splitlines())]
    return "\n".join(lines)


def interval_text(c: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    if c["interval"] is None:
        return f"{c['difference']:+.4f} (no interval: all questions differ alike)"
    low, high = c["interval"]
    return f"{c['difference']:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
