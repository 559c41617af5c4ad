"""Threads for what would hold up a server's event loop; one that never comes back loses its place to another."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

from torchrl_chat.tools.threads import Crew


class Late(TimeoutError):
    """A call that takes too long; it goes on.

    Attributes:
        rest: done once the call has come to its end all the same.
    """

    def __init__(self, message: str, rest: asyncio.Future[Any]):
        super().__init__(message)
        self.rest = rest


class Workers:
    """Threads that run calls for one event loop.

    Args:
        count: how many calls run at a time; a call that was late no longer counts.
        max_stuck: how many late calls may still be running. With more, further calls are refused: each of them holds a
            thread, and what it has in memory.
    """

    def __init__(self, count: int, max_stuck: int = 256):
        self._crew = Crew("torchrl_chat.openenv")
        self._places = asyncio.Semaphore(count)
        self._max_stuck = max_stuck
        self._stuck: set[asyncio.Future[Any]] = set()

    @property
    def stuck(self) -> int:
        """How many late calls are still running."""
        return len(self._stuck)

    async def run(self, function: Callable[[], Any], seconds: float | None = None) -> Any:
        """What a function returns, run beside the event loop.

        Args:
            function: the function.
            seconds: how long it may take, and how long it may wait for a place; ``None`` for no limit.

        Raises:
            Late: it takes longer.
            TimeoutError: all places were taken for so long.
            RuntimeError: too many late calls are still running.
        """
        if self.stuck >= self._max_stuck:
            raise RuntimeError(f"out of order: {self.stuck} earlier calls have not come to an end.")
        try:
            async with asyncio.timeout(seconds):
                await self._places.acquire()
        except TimeoutError:
            raise TimeoutError(f"all workers were busy for {seconds:g} s; try again later.") from None
        try:
            call = asyncio.wrap_future(self._crew.start(functools.partial(_result, function)))
            done, _ = await asyncio.wait([call], timeout=seconds)
            if not done:
                self._stuck.add(call)
                call.add_done_callback(self._over)
                raise Late(f"it takes longer than {seconds:g} s.", call)
            return call.result()
        finally:
            self._places.release()

    def close(self) -> None:
        """Let idle threads go. Those at work end when their calls do; nobody waits for them."""
        self._crew.close()

    def _over(self, call: asyncio.Future[Any]) -> None:
        self._stuck.discard(call)
        if not call.cancelled():
            call.exception()  # looked at: nobody else is there to be told


def _result(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except BaseException as error:
        # No future takes a StopIteration, and sys.exit() in a rubric is no reason to end the server.
        if isinstance(error, StopIteration) or not isinstance(error, Exception):
            raise RuntimeError(repr(error)) from None
        raise
