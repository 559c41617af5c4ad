"""How far a run is: a bar in a terminal, a line now and then where there is none (a log file, a job's output)."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any


class Progress:
    """Shows how many steps are done, and figures of the last one, on the standard error. A context manager.

    Args:
        name: what is running.
        total: how many steps there are.

    Keyword Args:
        done: how many were done before.
        unit: what a step is called.
        every: seconds between two lines, where there is no terminal; the first step and the last one have a line each.

    Example:
        >>> with Progress("grpo", 3) as progress:
        ...     progress.add({"reward": 0.5})
    """

    room = 5
    """Figures that a bar has room for, the first ones."""

    def __init__(self, name: str, total: int, *, done: int = 0, unit: str = "step", every: float = 30.0):
        self.name, self.total, self.done, self.unit, self.every = name, total, done, unit, every
        self._begun, self._start = done, time.monotonic()
        self._shown: float | None = None
        self._bar: Any = None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):  # lines will do
                from tqdm import tqdm

                self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, mininterval=0.5)

    def add(self, figures: Mapping[str, float] | None = None, count: int = 1) -> None:
        """So many more steps are done."""
        self.done += count
        shown = {key: f"{value:.4g}" for key, value in (figures or {}).items()}
        if self._bar is not None:
            self._bar.set_postfix(dict(list(shown.items())[: self.room]), refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if self._shown is None or now - self._shown >= self.every or self.done >= self.total:
            self._shown = now
            spent = now - self._start
            left = spent / (self.done - self._begun) * (self.total - self.done)
            told = "".join(f", {key} {value}" for key, value in shown.items())
            line = f"{self.name}: {self.unit} {self.done} of {self.total}{told}; {_clock(spent)} so far, {_clock(left)} to go"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
