"""``torchrl-chat train``: the GRPO recipe (:mod:`torchrl_chat.recipes.grpo`), which reads its own words of the command line."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add ``train`` to the commands."""
    parser = commands.add_parser("train", help="train a model by GRPO", add_help=False)
    parser.set_defaults(run=run, takes_words=True)


def run(arguments: argparse.Namespace) -> int:
    """Train, report, and say where the files are."""
    from torchrl_chat.recipes.grpo import main
    from torchrl_chat.recipes.interrupts import launch

    launch(lambda: main(arguments.words, prog="torchrl-chat train"))
    return 0
