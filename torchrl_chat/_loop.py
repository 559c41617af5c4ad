"""An event loop in a thread of its own, so that coroutines may be awaited from code that runs in any other thread."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any


class LoopThread:
    """An event loop in a daemon thread.

    The thread ends with :meth:`close`, when this object is collected, or with the interpreter; what is under way is
    cancelled then.

    Args:
        name: the thread's name.

    Example:
        >>> loop = LoopThread()
        >>> loop.run(asyncio.sleep(0, "done"))
        'done'
        >>> loop.close()
    """

    def __init__(self, name: str = "torchrl_chat.loop") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name=name, daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._loop, self._thread)

    @property
    def alive(self) -> bool:
        """Whether the thread runs: not after :meth:`close`, and not in a forked child."""
        return self._thread.is_alive() and self._finalizer.alive

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start a coroutine; the future may be waited for in any other thread.

        Raises:
            RuntimeError: the loop has been closed.
        """
        if not self.alive:
            coroutine.close()
            raise RuntimeError("this event loop has been closed (or belongs to the process that forked this one).")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine.

        Raises:
            RuntimeError: the loop has been closed, or this is the loop's own thread, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("run() was called from a coroutine of the same event loop: await instead.")
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: what is under way is cancelled
            future.cancel()
            raise

    def close(self, patience: float = 10.0) -> None:
        """Cancel what is under way and end the thread.

        Args:
            patience: seconds to wait for that. A coroutine that blocks the loop keeps the thread, which then ends as
                soon as it can.
        """
        if self._finalizer.detach() is not None:
            _stop(self._loop, self._thread, patience)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, patience: float = 10.0) -> None:
    if not thread.is_alive():  # a forked child has the object, but not the thread
        return
    try:
        loop.call_soon_threadsafe(lambda: loop.create_task(_wind_down(loop)))
    except RuntimeError:  # it has just ended by itself
        return
    if threading.current_thread() is not thread:  # collected by the loop's own thread, it cannot wait for itself
        thread.join(patience)


async def _wind_down(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        done, _ = await asyncio.wait(tasks, timeout=8.0)  # servers are given time to end
        for task in done:
            if not task.cancelled():
                task.exception()  # looked at: nobody else is there to be told
    await loop.shutdown_asyncgens()
    loop.stop()
