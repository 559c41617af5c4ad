"""The command line: ``torchrl-chat COMMAND``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from torchrl_chat.cli import audit, completion, eval, gateway, grade, play, serve, train, view
from torchrl_chat.options import both_spellings, quiet_others

_INTERRUPTED = 130  # 128 + SIGINT, as shells say it

_EXTRAS = {
    "datasets": "",
    "torchrl": "",
    "tqdm": "train",
    "matplotlib": "train",
    "reasoning_gym": "reasoning-gym",
    "math_verify": "math",
    "latex2sympy2_extended": "math",
    "sympy": "math",
    "py3langid": "ifeval",
    "openai": "openai",
    "vllm": "vllm",
    "peft": "peft",
    "ray": "ray",
    "mcp": "mcp",
    "orjson": "serve",
    "pydantic": "serve",
    "pydantic_core": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "websockets": "serve",
    "h11": "serve",
}
"""The extra that brings a package which a command may miss."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and run the command; the result is the exit code."""
    command = ""
    quiet_others()
    try:
        parser = make_parser()
        arguments, words = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
        if hasattr(arguments, "takes_words"):
            arguments.words = words
        elif words:
            parser.error(f"unrecognized arguments: {' '.join(words)}")
        command = f" {arguments.command}"
        return arguments.run(arguments)
    except KeyboardInterrupt:  # also while libraries are imported: what a command has to save, it has saved
        return _INTERRUPTED
    except BrokenPipeError:  # whoever reads has seen enough (| head); nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        print(f"torchrl-chat{command}: {missing(error)}", file=sys.stderr)
        return 2
    except (ValueError, KeyError, ImportError, OSError) as error:
        # What the package raises at a user names the key or value and what to do; a traceback would hide it.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"torchrl-chat{command}: {message}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="torchrl-chat",
        description="Token-exact chat environments for reinforcement learning of language models with TorchRL.",
    )
    parser.add_argument("--version", action="version", version=f"torchrl-chat {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (train, eval, gateway, serve, play, view, audit, grade, completion):
        module.add_parser(commands)
    commands.choices["completion"].set_defaults(whole=parser)
    for command in commands.choices.values():
        both_spellings(command)
    return parser


def missing(error: ModuleNotFoundError) -> str:
    """Which package is missing, and what installs it."""
    extra = _EXTRAS.get((error.name or "").partition(".")[0])
    if extra is None or "torchrl_chat[" in str(error):
        return str(error)
    package = f"'torchrl_chat[{extra}]'" if extra else "torchrl_chat"
    return f"the package {error.name} is missing: pip install {package}"


def _version() -> str:
    try:
        return metadata.version("torchrl_chat")
    except metadata.PackageNotFoundError:
        return "of a checkout that is not installed"


if __name__ == "__main__":
    sys.exit(main())
