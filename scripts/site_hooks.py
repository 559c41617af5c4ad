"""What mkdocs builds into the site beside its pages: the command line, from the parsers that read it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACE = "<!-- commands -->"
"""Where a page has the commands."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page."""
    return markdown.replace(PLACE, "\n".join(reference())) if PLACE in markdown else markdown


def reference() -> Iterator[str]:
    """The commands as Markdown, line by line."""
    for name, parser in commands():
        yield from section(name, parser)


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command with its parser: those of ``torchrl-chat``, then the training scripts in examples/."""
    from torchrl_chat.cli.main import make_parser

    for name, parser in subcommands(make_parser()):
        yield f"torchrl-chat {name}", training_parser("torchrl_chat.recipes.grpo") if name == "train" else parser
        for further, inner in subcommands(parser):
            yield f"torchrl-chat {name} {further}", inner
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        for script in ("ppo", "expert_iteration"):
            yield f"python examples/{script}.py", training_parser(script)
    finally:
        sys.path.remove(str(ROOT / "examples"))


def subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def training_parser(module: str) -> argparse.ArgumentParser:
    """The parser of a recipe, which it makes of its config."""
    from torchrl_chat.recipes.settings import RunConfig, make_parser

    recipe = importlib.import_module(module)
    [config] = (
        value for value in vars(recipe).values()
        if isinstance(value, type) and issubclass(value, RunConfig) and value.__module__ == recipe.__name__
    )  # fmt: skip
    return make_parser(config, recipe.__doc__)


def section(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """One command: what it says of itself, and a table of its options for each of their groups."""
    yield f"## {name}\n"
    if parser.description:
        yield f"```text\n{parser.description.strip()}\n```\n"
    for group in parser._action_groups:
        rows = [row for action in group._group_actions if (row := of_action(action))]
        if rows:
            title = {"positional arguments": "arguments", "options": "options"}.get(str(group.title), group.title)
            yield f"| {title} | |\n|---|---|"
            yield from (f"| {option} | {text} |" for option, text in rows)
            yield ""
    if parser.epilog:
        yield f"```text\n{parser.epilog.strip()}\n```\n"


def of_action(action: argparse.Action) -> tuple[str, str] | None:
    """An option as it is written, and its help; ``None`` where the help does not show it."""
    if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
        return None
    written = ", ".join(
        f"`{option} {value}`" if (value := value_of(action)) else f"`{option}`" for option in action.option_strings
    )
    text = " ".join((action.help or "").split()).replace("%%", "%")
    default = action.default
    if "default" not in text and default not in (None, argparse.SUPPRESS, [], "") and not isinstance(default, bool):
        text += f" (default: {default})"
    return (written or f"`{value_of(action)}`").replace("|", "\\|"), text.replace("|", "\\|").replace("<", "&lt;")


def value_of(action: argparse.Action) -> str:
    """What stands behind an option; empty for a switch."""
    if action.nargs == 0 or (action.nargs == "?" and action.const is True):
        return ""
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    named = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    return named if isinstance(named, str) else " ".join(named)


if __name__ == "__main__":
    print("\n".join(reference()))
