"""``torchrl-chat completion``: the script by which a shell completes commands, options, their choices, files and folders.

The script is made once, from the parsers themselves, by shtab: a completion costs no start of Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")
DESCRIPTION = """\
Print the script by which a shell completes this command line. To have it in every shell from the next on:

  torchrl-chat completion bash > ~/.local/share/bash-completion/completions/torchrl-chat
  torchrl-chat completion zsh > ~/.zfunc/_torchrl-chat    # with, in ~/.zshrc: fpath+=~/.zfunc; autoload -Uz compinit && compinit
  torchrl-chat completion fish > ~/.config/fish/completions/torchrl-chat.fish

In a shell of bash that runs already: eval "$(torchrl-chat completion bash)". Make it anew after an update."""


def add_parser(commands: Any) -> None:
    """Add ``completion`` to the commands."""
    parser = commands.add_parser(
        "completion",
        help="print the script by which a shell completes this command line",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    print(script(arguments.whole, arguments.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that completes the words of a parser.

    Args:
        parser: of the whole command line.
        shell: one of :data:`SHELLS`.

    Raises:
        ModuleNotFoundError: there is no shtab, which every installation brings.

    Example:
        >>> import argparse
        >>> parser = argparse.ArgumentParser("greet")
        >>> _ = parser.add_argument("--how", choices=["warmly", "briefly"])
        >>> "warmly briefly" in script(parser, "bash")
        True
    """
    import shtab

    for action in _subcommands(parser):
        if "train" in action.choices:  # it reads its words itself, since its options come from a config
            from torchrl_chat.recipes.grpo import GRPOConfig
            from torchrl_chat.recipes.settings import make_parser

            action.choices["train"] = make_parser(GRPOConfig, prog=f"{parser.prog} train")
    for each in _all(parser):
        for action in each._actions:
            if (kind := _kind(action)) is not None:
                action.complete = shtab.DIRECTORY if kind == "folder" else shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def _subcommands(parser: argparse.ArgumentParser) -> list[Any]:
    return [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]


def _all(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands, and of theirs."""
    yield parser
    for action in _subcommands(parser):
        for command in action.choices.values():
            yield from _all(command)


def _kind(action: argparse.Action) -> str | None:
    """Whether an argument is a file or a folder, as its help calls it; ``None`` for any other."""
    if action.choices is not None or action.nargs == 0:
        return None
    words = str(action.metavar or "").upper()
    if words == "FOLDER":
        return "folder"
    named = any(word in words for word in ("FILE", "FOLDER", "PATH"))
    return "file" if named or action.type is Path else None
