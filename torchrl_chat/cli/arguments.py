"""How the command line reads its arguments: each value is checked where it is parsed, before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

Number = Callable[[str], Any]


class Parser(argparse.ArgumentParser):
    """A parser that takes ``--max-new-tokens`` and ``--max_new_tokens`` alike, and keeps the lines of a description."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As argparse's, each option in the spelling that this parser knows."""
        if args is not None:
            args = [self._spelled(word) for word in args]
        return super().parse_known_args(args, namespace)

    def _spelled(self, word: str) -> str:
        if not word.startswith("--") or word in self._option_string_actions:
            return word
        name, equals, value = word.partition("=")
        for other in (name.replace("_", "-"), "--" + name[2:].replace("-", "_")):
            if other in self._option_string_actions:
                return other + equals + value
        return word


def whole(least: int = 1, most: int | None = None) -> Number:
    """The type of whole numbers in a range, both ends in it."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(
                f"{value}: expected at least {least}" if most is None else f"{value}: expected {least} to {most}"
            )
        return value

    return number


def real(*, above: float | None = None, least: float | None = None) -> Number:
    """The type of finite numbers above a bound, or from a bound on."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not abs(value) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text}: expected more than {above:g}")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{text}: expected at least {least:g}")
        return value

    return number


port = whole(0, 65535)
"""The type of ``--port``; 0 is a free one."""


def device(text: str) -> str:
    """The type of ``--device``: one that torch knows and this machine has."""
    import torch

    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: expected cpu, cuda, cuda:1 ...") from None
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if (found.index or 0) >= count:
            raise argparse.ArgumentTypeError(f"{text!r} is not here: this machine has {count} CUDA device(s)")
    return text
