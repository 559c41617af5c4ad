"""``torchrl-chat grade``: responses in a file, graded as the environments grade them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from torchrl_chat.evaluation.figures import wilson
from torchrl_chat.options import named_values, number, whole
from torchrl_chat.rewards.tasks import TASKS, Task

DESCRIPTION = """\
Grade the responses of a JSONL file, each against the reference of its row, and print the accuracy.

  torchrl-chat grade answers.jsonl                              # mathematics: LaTeX, numbers, "#### 42"
  torchrl-chat grade answers.jsonl --task gsm8k --option last_number=true
  torchrl-chat grade answers.jsonl --task ifeval --output graded.jsonl
  torchrl-chat grade answers.jsonl --json | jq .accuracy
  torchrl-chat grade runs/eval-gsm8k-20260101-120000/rollouts.jsonl

A row has a response (a text, or an assistant message with "content"), a reference ("reference", "answer" or
"solution"; for IFEval "instruction_id_list" and "kwargs", for Countdown "target" and "nums"), and perhaps a question.
The rollouts of eval and of training are read as they are: the last answer of each conversation, as the task that they
say they are of.

Only what a response marks as its answer is read: \\boxed{42}, <answer>42</answer>, "#### 42", for mathematics also
"the answer is 42". With --option unmarked=true (mathematics) or --option last_number=true (gsm8k) a response
that marks nothing, a bare 42 for example, is read as well.

A grade that takes longer than --deadline is ended and counted as failed; so is a row that cannot be read. The rest
of the file is graded all the same.

The exit code is 0 if every row was graded, 1 if some failed, 2 if there was nothing to grade."""

_BATCH = 256


def add_parser(commands: Any) -> None:
    """Add ``grade`` to the commands."""
    parser = commands.add_parser(
        "grade",
        help="grade the responses of a JSONL file",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="the JSONL file; - for standard input")
    parser.add_argument(
        "--task", choices=sorted(TASKS), help="what is graded (default: math; for rollouts, what they were made of)"
    )
    parser.add_argument(
        "--response-key", default="response", metavar="KEY", help='the responses (default: "response")'
    )
    parser.add_argument("--reference-key", metavar="KEY", help="the references (default: those of the task)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the verifier, as JSON or text",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write every row with its verdict to this JSONL file"
    )
    parser.add_argument(
        "--show",
        choices=("none", "wrong", "all"),
        default="wrong",
        help="print rows as well (default: the first 10 wrong)",
    )
    parser.add_argument(
        "--deadline", type=number(above=0), default=10.0, metavar="SECONDS", help="for one grade (default: 10)"
    )
    parser.add_argument("--workers", type=whole(1), metavar="N", help="worker processes (default: one a core)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the summary")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Grade the file; the result is the exit code."""
    import warnings

    from tqdm import tqdm

    from torchrl_chat.rewards import Grader, Verdict

    if arguments.output is not None and _same_file(arguments.output, arguments.file):
        raise ValueError(f"--output {arguments.output} is the file that is graded: give another one.")
    rows = _rows(arguments.file)
    if not rows:
        raise ValueError(f"{arguments.file} has no rows.")
    task = TASKS[arguments.task or _task_of(rows)]
    try:
        verifier = verifier_of(task, arguments.option)
    except TypeError as error:
        raise ValueError(str(error)) from error
    verdicts, shown = list[Verdict](), 0
    with ExitStack() as stack:
        grader = stack.enter_context(Grader(verifier, deadline=arguments.deadline, workers=arguments.workers))
        output = None
        if arguments.output is not None:
            # A response may hold half a surrogate pair, which UTF-8 cannot encode: JSON and Python spell it alike, \\ud83d.
            output = stack.enter_context(arguments.output.open("w", encoding="utf-8", errors="backslashreplace"))
        bar = stack.enter_context(tqdm(total=len(rows), unit="row", disable=None))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)  # failures are in the summary
        for start in range(0, len(rows), _BATCH):
            batch = [(row, _episode(row, task, arguments)) for row in rows[start : start + _BATCH]]
            graded = iter(grader.grade([episode for _, episode in batch if not isinstance(episode, str)]))
            for place, (row, episode) in enumerate(batch, start + 1):
                verdict = Verdict(0.0, None, False, {}, episode) if isinstance(episode, str) else next(graded)
                verdicts.append(verdict)
                if output is not None:
                    there = row if isinstance(row, dict) else {}
                    print(json.dumps({**there, **_plain(verdict)}, ensure_ascii=False), file=output)
                wrong = arguments.show == "wrong" and not verdict.correct and shown < 10
                if (wrong or arguments.show == "all") and not arguments.json:
                    shown += 1
                    encoding = sys.stdout.encoding or "utf-8"
                    bar.write(_line(place, verdict, episode).encode(encoding, "backslashreplace").decode(encoding))
            bar.update(len(batch))
    summary = {"task": task.name, **_summary(verdicts)}
    print(json.dumps(summary, indent=2) if arguments.json else _text(summary))
    if summary["unanswered"] and task.unmarked and not getattr(verifier, task.unmarked):
        print(
            f"An answer has to be marked, as in \\boxed{{42}}. --option {task.unmarked}=true reads unmarked ones too.",
            file=sys.stderr if arguments.json else sys.stdout,
        )
    return 1 if summary["failures"] else 0


def verifier_of(task: Task, options: Sequence[str]) -> Any:
    """The verifier of a task, with options as the command line has them.

    Raises:
        TypeError: an option that it does not have.
        ValueError: one that is not ``NAME=VALUE``.
    """
    given = named_values(options)
    if task.verifier == "CodeVerifier":
        from torchrl_chat.sandbox import Sandbox

        given["runner"] = Sandbox().run
    return task.make_verifier(**given)


def _summary(verdicts: Sequence[Any]) -> dict[str, Any]:
    """The figures; accuracy with Wilson's 95 % interval (Wilson 1927)."""
    count, correct = len(verdicts), sum(verdict.correct for verdict in verdicts)
    parts: dict[str, float] = {}
    for name, value in (part for verdict in verdicts for part in verdict.parts.items()):
        parts[name] = parts.get(name, 0.0) + value
    return {
        "rows": count,
        "correct": correct,
        "accuracy": correct / count,
        "interval": list(wilson(correct, count)),
        "mean_score": sum(verdict.score for verdict in verdicts) / count,
        "unanswered": sum(verdict.answer is None and verdict.failure is None for verdict in verdicts),
        "failures": Counter(
            verdict.failure.partition(":")[0] for verdict in verdicts if verdict.failure is not None
        ),
        "parts": {name: value / count for name, value in parts.items()},
    }


def _same_file(output: Path, file: str) -> bool:
    """Whether a file that is about to be written is the one that is read, by whatever name or link."""
    try:
        return os.path.samestat(output.stat(), os.fstat(sys.stdin.fileno()) if file == "-" else os.stat(file))
    except (OSError, ValueError):  # one of them is not there, or is no file
        return False


def _task_of(rows: list[Any]) -> str:
    """The task of rollouts that say what they are of; mathematics for anything else.

    Raises:
        ValueError: they are of a dataset that no task here grades.
    """
    row = next((row for row in rows if _is_rollout(row)), None)
    dataset = None if row is None or not isinstance(row.get("metadata"), dict) else row["metadata"].get("dataset")
    if dataset is None:
        return "math"
    task = {"digits": "number"}.get(dataset, dataset)
    if task not in TASKS:
        raise ValueError(
            f"the rollouts are of {dataset!r}, which no task here grades: give --task, one of {', '.join(sorted(TASKS))}."
        )
    return task


def _is_rollout(row: Any) -> bool:
    """Whether a row is an episode of a rollout file (see ``docs/reference/rollouts.md``)."""
    return isinstance(row, dict) and isinstance(row.get("messages"), list) and {"version", "stop"} <= row.keys()


def _rows(file: str) -> list[Any]:
    """The rows of the file; a line that is no JSON object stands as the reason."""
    with ExitStack() as stack:
        lines: TextIO = sys.stdin if file == "-" else stack.enter_context(open(file, encoding="utf-8"))
        return [_read(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def _read(line: str, number: int) -> Any:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"error: line {number} is not JSON: {error}"
    return row if isinstance(row, dict) else f"error: line {number} is a {type(row).__name__}, not an object"


def _episode(row: Any, task: Any, arguments: argparse.Namespace) -> Any:
    """What is graded; or the reason why it cannot be, as a text."""
    from torchrl_chat.rewards import Episode

    if isinstance(row, str):
        return row
    more: dict[str, Any] = {"row": row}
    response = row.get(arguments.response_key)
    if response is None and _is_rollout(row):
        response, told = answer_of(row)
        if isinstance(response, str):
            return response
        more |= told
    if isinstance(response, list):  # a conversation
        if not response or not all(isinstance(message, dict) for message in response):
            return (
                f"error: the list under {arguments.response_key!r} is no conversation: expected messages (objects)"
            )
        if response[-1].get("role") != "assistant":
            return f"error: the last message under {arguments.response_key!r} is not the assistant's: {_short(response[-1])}"
        response = response[-1]
    if not isinstance(response, str) and not (isinstance(response, dict) and "content" in response):
        return f"error: the row has no response under {arguments.response_key!r}: it has {', '.join(row)}"
    try:
        reference = row[arguments.reference_key] if arguments.reference_key else task.reference_of(row)
    except KeyError as error:
        return f"error: {error.args[0] if not arguments.reference_key else f'the row has no {error}'}"
    return Episode.of(response, reference, **more)


def answer_of(rollout: dict[str, Any]) -> tuple[list[Any] | str, dict[str, Any]]:
    """The conversation of a rollout up to its last answer, and what an ``Episode`` has besides; or the reason why there is none."""
    if rollout.get("error"):
        return f"error: the policy had no answer: {rollout['error']}", {}
    said = [isinstance(message, dict) and message.get("role") == "assistant" for message in rollout["messages"]]
    if not any(said):
        return "error: the episode has no answer: there is no message of the assistant", {}
    messages = rollout["messages"][: len(said) - said[::-1].index(True)]
    told = {
        "messages": messages,
        "length": rollout.get("sampled_tokens"),
        "truncated": bool(rollout.get("cut")),
    }
    return messages, told


def _plain(verdict: Any) -> dict[str, Any]:
    return {
        "score": verdict.score,
        "correct": verdict.correct,
        "extracted": verdict.answer,
        "parts": dict(verdict.parts),
        "failure": verdict.failure,
    }


def _line(place: int, verdict: Any, episode: Any) -> str:
    if verdict.failure is not None:
        return f"  row {place}: {verdict.failure}"
    found = "no answer" if verdict.answer is None else f"{_short(verdict.answer)}"
    return f"  row {place}: {'right' if verdict.correct else 'wrong'}, {verdict.score:g}: {found} for {_short(episode.reference)}"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}"


def _text(summary: dict[str, Any]) -> str:
    low, high = summary["interval"]
    lines = [
        f"{summary['correct']} of {summary['rows']} right: accuracy {summary['accuracy']:.4f} "
        f"(95 % interval {low:.4f} to {high:.4f}), mean score {summary['mean_score']:.4f}",
    ]
    if summary["unanswered"]:
        lines.append(f"{summary['unanswered']} without an answer")
    if summary["failures"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary["failures"].items())
        lines.append(f"{sum(summary['failures'].values())} not graded: {kinds}")
    lines += [f"{name}: {value:.4f}" for name, value in summary["parts"].items()]
    return "\n".join(lines)
