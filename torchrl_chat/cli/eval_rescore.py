"""``torchrl-chat eval rescore``: the answers of a finished run, graded by something else."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchrl_chat import rewards
from torchrl_chat.cli.grade import answer_of, verifier_of
from torchrl_chat.evaluation.figures import Figures
from torchrl_chat.evaluation.runs import settings_beside, shown
from torchrl_chat.evaluation.summary import as_table
from torchrl_chat.files import replacing
from torchrl_chat.named import is_name, named
from torchrl_chat.options import named_values, number, whole
from torchrl_chat.rewards.tasks import TASKS

DESCRIPTION = """\
Grade the answers of a run again, by another grader, into a folder beside it; nothing is sampled.

  torchrl-chat eval rescore runs/eval-gsm8k --reward math
  torchrl-chat eval rescore runs/eval-gsm8k --reward gsm8k --option last_number=true
  torchrl-chat eval rescore runs/eval-gsm8k --reward graders.py:strict --out runs/strict

The grader is that of a task ({tasks}), the name of a
verifier of torchrl_chat.rewards (MathVerifier, RegexMatch ...), or module:name or file.py:name: a function
(response, reference) -> score, a verifier, or a class of one. What is graded is the last answer of each conversation.

The new folder is a run as any other: eval compare takes it. The exit code is 0 if every answer was graded, 1 if some were not."""

_BATCH = 256


def add_parser(commands: Any) -> None:
    """Add ``rescore`` to the commands of ``eval``."""
    parser = commands.add_parser(
        "rescore",
        help="grade the answers of a run by another grader",
        description=DESCRIPTION.format(tasks=", ".join(TASKS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rescored", type=Path, metavar="RUN", help="the folder of a run, or its rollout file")
    parser.add_argument(
        "--reward", required=True, metavar="NAME", help="what grades: a task, a verifier, or module:name"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the grader, as JSON or text",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN-REWARD")
    parser.add_argument(
        "--deadline", type=number(above=0), default=10.0, metavar="SECONDS", help="for one grade (default: 10)"
    )
    parser.add_argument("--workers", type=whole(1), metavar="N", help="worker processes (default: one a core)")
    parser.add_argument(
        "--examples", type=whole(0), default=5, metavar="N", help="changed grades to show, each way (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def grader_of(name: str, options: list[str]) -> Any:
    """The verifier of a name.

    Args:
        name: a task, a verifier of :mod:`torchrl_chat.rewards`, or ``module:name``.
        options: ``NAME=VALUE`` each.

    Raises:
        ValueError: there is no such grader, or it has no such option.

    Example:
        >>> grader_of("NumberVerifier", ["surrounded=0.5"])
        NumberVerifier(surrounded=0.5)
    """
    try:
        if name in TASKS:
            return verifier_of(TASKS[name], options)
        if is_name(name):
            found = named(name)
        elif name in rewards.__all__ and isinstance(getattr(rewards, name), type):
            found = getattr(rewards, name)
        else:
            raise ValueError(
                f"--reward {name}: expected one of {', '.join(TASKS)}, a verifier of torchrl_chat.rewards, or module:name."
            )
        if isinstance(found, type):
            found = found(**named_values(options))
        elif options:
            raise ValueError(f"--reward {name} is no class, and takes no --option.")
    except TypeError as error:
        raise ValueError(f"--reward {name}: {error}") from error
    if not callable(found):
        raise ValueError(f"--reward {name} is a {type(found).__name__}: expected something that can be called.")
    return found


def run(arguments: argparse.Namespace) -> int:
    """Grade, write, and say what has changed; the result is the exit code."""
    given: Path = arguments.rescored
    source = given if given.is_file() else given / "rollouts.jsonl"
    if not source.is_file():
        raise ValueError(f"{given}: there is no run of eval here ({source} is missing).")
    folder = arguments.out or source.parent.with_name(f"{source.parent.resolve().name}-{_plain(arguments.reward)}")
    if (folder / "rollouts.jsonl").exists():
        raise ValueError(f"{folder} holds a run already: give another --out.")
    verifier = grader_of(arguments.reward, arguments.option)
    from torchrl_chat.rollouts import as_line, plain

    folder.mkdir(parents=True, exist_ok=True)
    figures, changes = Figures(), _Changes(arguments.examples)
    with replacing(folder / "rollouts.jsonl") as file:
        for before, after in _rescored(source, verifier, arguments):
            figures.add(after)
            changes.add(before, after)
            file.write(as_line(plain(after)))
    settings = settings_beside(source)
    how = {"run": str(source.parent), "reward": arguments.reward, "option": arguments.option}
    summary = {name: settings.get(name) for name in ("dataset", "model", "samples")}
    summary |= {"rescored": how, **figures.summary(), "changes": changes.plain()}
    for name, value in (("config", {**settings, "rescored": how}), ("summary", summary)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    print(
        json.dumps(summary, indent=2)
        if arguments.json
        else f"{as_table(summary)}\n\n{changes.text()}\nfiles in {folder}/"
    )
    return 1 if summary["grade_failures"] else 0


def _rescored(
    source: Path, verifier: Any, arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each episode before and after."""
    from torchrl_chat.rewards import Episode, Grader, Verdict

    with (
        Grader(verifier, deadline=arguments.deadline, workers=arguments.workers) as grader,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # failures are in the summary
        for batch in _batches(source):
            graded, groups, verdicts = list[Any](), list[Any](), dict[int, Any]()
            for place, row in enumerate(batch):
                messages, more = answer_of(row)
                if isinstance(messages, str):
                    verdicts[place] = Verdict(0.0, None, False, {}, messages)
                else:
                    graded.append(
                        (
                            place,
                            Episode.of(messages[-1], row.get("reference"), row=row.get("columns") or {}, **more),
                        )
                    )
                    groups.append(row.get("row"))
            told = grader.grade([episode for _, episode in graded], groups)
            verdicts |= dict(zip((place for place, _ in graded), told, strict=True))
            for place, row in enumerate(batch):
                yield row, _graded_again(row, verdicts[place])


def _batches(source: Path) -> Iterator[list[dict[str, Any]]]:
    """The episodes, all answers to a question in one batch where they stand together."""
    from torchrl_chat.rollouts import read_rollouts

    batch: list[dict[str, Any]] = []
    for episode in read_rollouts(source):
        if len(batch) >= _BATCH and episode.get("row") != batch[-1].get("row"):
            yield batch
            batch = []
        batch.append(episode)
    if batch:
        yield batch


def _graded_again(row: Mapping[str, Any], verdict: Any) -> dict[str, Any]:
    from torchrl_chat.rollouts import extracted

    failed = (
        None if row.get("error") else verdict.failure
    )  # a request that failed has no answer, and no grade that failed
    return {
        **row,
        "reward": verdict.score,
        "success": verdict.correct,
        "reward_parts": dict(verdict.parts),
        "grade_failure": failed,
        "extracted": extracted(verdict.answer),
    }


class _Changes:
    """Which grades have become others."""

    def __init__(self, examples: int):
        self.examples = examples
        self.counts = {"gained": 0, "lost": 0, "same": 0}
        self.shown: dict[str, list[dict[str, Any]]] = {"gained": [], "lost": []}

    def add(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        was, now = bool(before["success"]), bool(after["success"])
        kind = "same" if was == now else "gained" if now else "lost"
        self.counts[kind] += 1
        if kind != "same" and len(self.shown[kind]) < self.examples:
            said = [m for m in after["messages"] if isinstance(m, dict) and m.get("role") == "assistant"]
            self.shown[kind].append(
                {
                    "id": after["id"],
                    "question": shown(after["query"]),
                    "reference": shown(after["reference"]),
                    "answer": shown(said[-1].get("content")) if said else "",
                    "before": before.get("extracted"),
                    "after": after["extracted"],
                }
            )

    def plain(self) -> dict[str, Any]:
        return {**self.counts, "examples": self.shown}

    def text(self) -> str:
        total = sum(self.counts.values())
        changed = total - self.counts["same"]
        lines = [
            f"{changed} of {total} grades changed: {self.counts['gained']} are right now, {self.counts['lost']} wrong"
        ]
        for kind, word in (("gained", "right now"), ("lost", "wrong now")):
            for example in self.shown[kind]:
                lines.append(
                    f"  {example['id']}, {word}: {_line(example['answer'])}  (reference: {_line(example['reference'])})"
                )
        return "\n".join(lines)


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 70 else f"... {text[-66:]}"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(name).name if "/" in name else name).strip("-.")
