"""``torchrl-chat eval curve``: every checkpoint of a training run on the same questions."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from torchrl_chat.options import whole

DESCRIPTION = """\
Evaluate all checkpoints of a training run on the same questions, and compare each with the first.

  torchrl-chat eval curve runs/grpo-20260101-120000
  torchrl-chat eval curve runs/grpo-20260101-120000 --dataset gsm8k --limit 200 --every 5 --html curve.html

The dataset, and where an answer is cut, are the training run's, unless they are given; rows are those of the test split, where there
is one. A file that the training read (its --data) is not taken: give --data. The same command goes on with checkpoints that
have come since."""


def add_parser(commands: Any) -> Any:
    """Add ``curve`` to the commands of ``eval``; the parser, for what it shares with ``eval``."""
    parser = commands.add_parser(
        "curve",
        help="evaluate all checkpoints of a training run",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("training", type=Path, metavar="RUN", help="the folder of a training run")
    parser.add_argument(
        "--every",
        type=whole(1),
        default=1,
        metavar="N",
        help="every N-th checkpoint, counted from the last (default: 1)",
    )
    return parser


def of_training(arguments: argparse.Namespace) -> None:
    """Fill in the models, and what else is the training run's.

    Raises:
        ValueError: there is no training run, or it has no checkpoint.
    """
    folder: Path = arguments.training
    if arguments.model is not None:
        raise ValueError("eval curve takes the checkpoints of the run: leave --model out.")
    found = sorted(path for path in folder.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name))
    if not found:
        raise ValueError(
            f"{folder} has no checkpoints: expected the folder of a training run, with checkpoints/step-N in it."
        )
    chosen = found[::-1][:: arguments.every][::-1]
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        settings = {}
    arguments.model = list(map(str, chosen))
    if arguments.dataset is None:
        if not settings.get("dataset"):
            raise ValueError(f"{folder / 'config.json'} does not say what the run was trained on: give --dataset.")
        arguments.dataset = [settings["dataset"]]
    if arguments.max_new_tokens is None:
        arguments.max_new_tokens = settings.get("max_new_tokens")
    if arguments.out is None:
        arguments.out = folder / f"eval-{arguments.dataset[0].replace(':', '-').replace('/', '-')}"
