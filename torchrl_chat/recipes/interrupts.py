"""Ctrl-C in a run: once for an end at the next place where nothing is lost, twice for an end at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torchrl_chat import ranks

EXIT = 130  # what shells take for a program that Ctrl-C ended


class Interrupted(KeyboardInterrupt):
    """Ctrl-C at a place where nothing is lost."""


class Interrupts:
    """Takes the first Ctrl-C as a request, which whoever works looks up in ``asked``; the second interrupts as usual.

    A context manager. Outside the main thread, and where the process ignores Ctrl-C (a shell starts programs in the background
    so), it does nothing.

    Args:
        notice: printed on the standard error when the request comes.
        aloud: whether it is.

    Attributes:
        asked: whether Ctrl-C was pressed.

    Example:
        >>> with Interrupts("stopping behind this step; Ctrl-C again stops at once") as interrupts:
        ...     interrupts.asked
        False
    """

    def __init__(self, notice: str, aloud: bool = True):
        self.notice = notice
        self.aloud = aloud
        self.asked = False
        self._waits = True
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if before not in (signal.SIG_IGN, None):
                self._before = before
                signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(self, *_: object) -> None:
        self._hand_back()

    def stop_if_asked(self, anywhere: Callable[[bool], float] = bool) -> None:
        """Here nothing is lost by an interrupt.

        Args:
            anywhere: given whether it was asked for here, whether it was in any of several processes that stop together.

        Raises:
            Interrupted: Ctrl-C was pressed.
        """
        if anywhere(self.asked):
            raise Interrupted

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Nowhere in here is anything lost: the first Ctrl-C raises :class:`Interrupted`, now if it came before."""
        self._waits = False
        try:
            self.stop_if_asked()
            yield
        finally:
            self._waits = True

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._hand_back()
        if not self._waits:
            raise Interrupted
        if self.aloud:
            print(f"\n{self.notice}", file=sys.stderr, flush=True)

    def _hand_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


def launch(main: Callable[[], None]) -> None:
    """Run a script's main function; Ctrl-C ends it with a line instead of a traceback.

    Raises:
        SystemExit: with the code 130, behind Ctrl-C.

    Example:
        >>> launch(lambda: None)
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(EXIT) from None
    except RuntimeError as error:
        ranks.leave_if_alone(error)
        raise
