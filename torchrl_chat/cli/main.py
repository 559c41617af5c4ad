"""The command line: ``torchrl-chat COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchrl_chat.cli import audit, eval, grade, play, serve, train, view
from torchrl_chat.cli.options import both_spellings


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and run the command; the result is the exit code."""
    parser = argparse.ArgumentParser(
        prog="torchrl-chat",
        description="Token-exact chat environments for reinforcement learning of language models with TorchRL.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train.add_parser(commands)
    eval.add_parser(commands)
    serve.add_parser(commands)
    play.add_parser(commands)
    view.add_parser(commands)
    audit.add_parser(commands)
    grade.add_parser(commands)
    for command in commands.choices.values():
        both_spellings(command)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, KeyError, ImportError, OSError) as error:
        # What the package raises at a user names the key or value and what to do; a traceback would hide it.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"torchrl-chat {arguments.command}: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
