"""Values of the command line, refused where they are read if they can mean nothing; and one spelling of options as good as another."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

TEMPLATE_HELP = (
    "a file with a Jinja chat template instead of the model's own, or one for base models: plain, r1-zero"
)
"""What a command says of its ``--chat-template``."""


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number from ``least`` to ``most``, both of them included, as a ``type`` of argparse.

    Example:
        >>> whole(1)("8")
        8
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small: expected at least {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{value} is too large: expected at most {most}")
        return value

    return read


port = whole(0, 65535)
"""The type of ``--port``; 0 is a free one."""


def number(
    least: float = -math.inf, most: float = math.inf, *, above: float | None = None
) -> Callable[[str], float]:
    """A finite number from ``least`` to ``most``, or one that is more than ``above``, as a ``type`` of argparse.

    Example:
        >>> number(above=0)("1e-3")
        0.001
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text}: expected more than {above:g}")
        if not least <= value <= most:
            wanted = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text}: expected {wanted}")
        return value

    return read


def device(text: str) -> str:
    """The name of a device that torch knows and this machine has, as a ``type`` of argparse.

    Example:
        >>> device("cpu")
        'cpu'
    """
    import torch

    try:
        torch.empty(0, device=torch.device(text))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine: {reason[:200]}") from None
    return text


def named_values(words: Iterable[str]) -> dict[str, Any]:
    """What ``--option NAME=VALUE ...`` says: values as JSON, or as text where they are none.

    Raises:
        ValueError: a word has no ``=``.

    Example:
        >>> named_values(["last_number=true", "system_prompt=Be brief."])
        {'last_number': True, 'system_prompt': 'Be brief.'}
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (equals and name):
            raise ValueError(f"--option {word}: expected NAME=VALUE.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def both_spellings(parser: argparse.ArgumentParser) -> None:
    """Take every option with underscores in the place of its hyphens, too; the help shows one spelling.

    Example:
        >>> import argparse
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--max-new-tokens", type=int)
        >>> both_spellings(parser)
        >>> parser.parse_args(["--max_new_tokens", "3"]).max_new_tokens
        3
    """
    known = parser._option_string_actions  # there is no public way to add one that the help does not show
    for name, action in list(known.items()):
        if name.startswith("--"):
            known.setdefault("--" + name[2:].replace("-", "_"), action)


def show_one_spelling(parser: argparse.ArgumentParser) -> None:
    """Of options that are taken in two spellings, show the one with hyphens in the help.

    Example:
        >>> import argparse
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int)
        >>> show_one_spelling(parser)
        >>> "--max_new_tokens" in parser.format_help()
        False
    """
    for action in parser._actions:
        if len(action.option_strings) > 1 and "_" in action.option_strings[0]:
            action.option_strings = [name for name in action.option_strings if "_" not in name]


def quiet_others() -> None:
    """Leave out what other libraries log while they are imported, for commands.

    transformers imports torchao wherever it is installed, which tells of each of its kernels that this machine has not.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
