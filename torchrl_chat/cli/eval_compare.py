"""``torchrl-chat eval compare``: finished runs against the first of them, question by question."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrl_chat.evaluation.report import as_text, report
from torchrl_chat.evaluation.runs import Run, read_runs
from torchrl_chat.files import replacing
from torchrl_chat.options import whole

DESCRIPTION = """\
Compare finished runs of eval, each with the first, paired by question: whether they differ, by how much, and how many
questions would tell.

  torchrl-chat eval compare runs/eval-before runs/eval-after
  torchrl-chat eval compare runs/small runs/large --by subject level --html report.html
  torchrl-chat eval compare runs/eval-20260101-120000         # a folder of several models: each with the first

Questions are paired by what they ask, else by their id (a column such as id, task_id or question_id); what only one run has
is told, and left out. One answer to each question: the exact test of McNemar decides, its mid-p stands beside. Several: a
bootstrap that resamples whole questions. The interval of the difference is the bootstrap's in both cases.

--html writes one file that needs no network, to be sent to somebody. --json has everything that is in it.

The exit code is 0 whatever the verdict is, and 2 if there was nothing to compare."""


def add_parser(commands: Any) -> None:
    """Add ``compare`` to the commands of ``eval``."""
    parser = commands.add_parser(
        "compare",
        help="compare finished runs, question by question",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="the folder of a run, one of several runs, or a rollout file"
    )
    parser.add_argument(
        "--by", nargs="+", default=[], metavar="COLUMN", help="columns of the data: each value by itself, too"
    )
    parser.add_argument(
        "--metric",
        default="success",
        metavar="NAME",
        help="success (default), reward, or a component of the reward",
    )
    add_report_arguments(parser)
    parser.set_defaults(run=run)


def add_report_arguments(parser: Any) -> None:
    """What all commands take that end in a report."""
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as one HTML file")
    parser.add_argument(
        "--examples", type=whole(0), default=10, metavar="N", help="questions to show each way (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Read, compare, and show; the result is the exit code."""
    runs = read_runs(arguments.runs, arguments.metric)
    if len(runs) < 2:
        raise ValueError(f"{arguments.runs[0]} is one run: give at least two to compare.")
    _show(runs, arguments, metric=arguments.metric, by=arguments.by)
    return 0


def show_runs(
    paths: Sequence[Path], arguments: argparse.Namespace, *, details: bool = True, printed: bool = True
) -> None:
    """Print what some runs come to, and write the page where one is asked for.

    Args:
        paths: as for :func:`~torchrl_chat.evaluation.runs.read_runs`.
        arguments: with ``html``, ``examples`` and ``json``.

    Keyword Args:
        details: whether each comparison is told in sentences, or the table alone.
        printed: whether anything is printed.
    """
    _show(read_runs(paths), arguments, details=details, printed=printed)


def _show(
    runs: Sequence[Run],
    arguments: argparse.Namespace,
    *,
    details: bool = True,
    printed: bool = True,
    **options: Any,
) -> None:
    made = report(runs, examples=arguments.examples, **options)
    if arguments.html is not None:
        from torchrl_chat.evaluation.page import as_page

        arguments.html.parent.mkdir(parents=True, exist_ok=True)
        with replacing(arguments.html) as file:
            file.write(as_page(made).encode("utf-8", "replace"))
    if printed:
        print(json.dumps(made, indent=2) if arguments.json else as_text(made, details=details))
    if arguments.html is not None:
        print(f"page in {arguments.html}", file=sys.stderr)
