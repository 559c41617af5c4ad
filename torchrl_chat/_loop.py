"""Event loops in threads of their own, so that coroutines may be awaited from code that runs in any other thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any


class Mailbox:
    """Calls for an event loop, from other threads.

    As ``call_soon_threadsafe``, but the loop is woken up once for all that came since it last looked. With many callers
    the wake-ups, system calls all of them, would cost more than the calls.

    Args:
        loop: the event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = weakref.ref(loop)  # whose mailbox is found by it, and would keep it
        self._calls: deque[tuple[Callable[..., Any], tuple[Any, ...], Callable[[], None] | None]] = deque()
        self._told = False
        self._others: set[Mailbox] = set()  # that were written to and not told

    def post(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a function called by the loop, soon. From any thread.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._calls.append((function, arguments, None))
        self._tell()

    def send(
        self,
        other: Mailbox,
        function: Callable[..., Any],
        *arguments: Any,
        lost: Callable[[], None] | None = None,
    ) -> None:
        """Have a function called by another loop, from this mailbox's own; if that loop is closed, ``lost`` is called.

        The other loop is told once this one has done all that is ready now. Told at once, its thread would take the
        interpreter away from this one, in the middle of many replies, and get it back a hundred times.
        """
        other._calls.append((function, arguments, lost))
        if not self._others:
            asyncio.get_running_loop().call_soon(self._tell_others)
        self._others.add(other)

    def drop(self) -> None:
        """Throw away what the loop will never do, for it is closed."""
        while self._calls:
            _, _, lost = self._calls.popleft()
            if lost is not None:
                lost()

    def _tell(self) -> None:
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise RuntimeError("Event loop is closed")
        if self._told:  # it has yet to look, and will see the new call, too
            return
        self._told = True
        try:
            loop.call_soon_threadsafe(self._work)
        except RuntimeError:
            self._told = False
            raise

    def _tell_others(self) -> None:
        others, self._others = self._others, set()
        for other in others:
            try:
                other._tell()
            except RuntimeError:  # nobody is there any more
                other.drop()

    def _work(self) -> None:
        self._told = False
        try:
            for _ in range(len(self._calls)):
                function, arguments, _ = self._calls.popleft()
                function(*arguments)
        finally:
            if self._calls:  # new ones; or one has raised, and those behind it wait
                self._tell()


class LoopThread:
    """An event loop in a daemon thread.

    The thread ends with :meth:`close`, when this object is collected, or with the interpreter; what is under way is
    cancelled then.

    Args:
        name: the thread's name.
        quick: whether ``uvloop`` runs it, where that is installed: for loops with many sockets.

    Example:
        >>> import asyncio
        >>> loop = LoopThread()
        >>> loop.run(asyncio.sleep(0, "done"))
        'done'
        >>> loop.close()
    """

    def __init__(self, name: str = "torchrl_chat.loop", quick: bool = False) -> None:
        self._loop = _quick_loop() if quick else asyncio.new_event_loop()
        self._mailbox = _mailbox_of(self._loop)
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
        self._check_alive(coroutine)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
        """Start a coroutine; the future is awaited on the event loop that runs in the calling thread.

        Raises:
            RuntimeError: the loop has been closed, or no event loop runs in the calling thread.
        """
        self._check_alive(coroutine)
        return _Errand(coroutine, self._mailbox).result

    def _check_alive(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        if not self.alive:
            coroutine.close()  # or Python warns that nobody awaited it
            raise RuntimeError("this event loop has been closed (or belongs to the process that forked this one).")

    def post(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a function called on the loop, soon.

        Raises:
            RuntimeError: the loop has been closed.
        """
        self._mailbox.post(function, *arguments)

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


class _Errand:
    """A coroutine that one event loop runs and another one awaits.

    Args:
        coroutine: the coroutine.
        there: the mailbox of the loop that runs it.

    Attributes:
        result: what it returns or raises; a future of the loop that runs in the calling thread.
    """

    __slots__ = ("_coroutine", "_here", "_task", "_there", "result")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], there: Mailbox):
        here = asyncio.get_running_loop()
        self.result: asyncio.Future[Any] = here.create_future()
        self.result.add_done_callback(self._no_longer_wanted)
        self._coroutine = coroutine
        self._task: asyncio.Task[Any] | None = None
        self._there = there
        self._here = _mailbox_of(here)
        self._here.send(there, self._begin, lost=self._lost)

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._coroutine)
        self._task.add_done_callback(self._return)

    def _lost(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._here.post(self._refuse)

    def _refuse(self) -> None:
        self._coroutine.close()
        if not self.result.done():
            self.result.set_exception(RuntimeError("the event loop was closed before it began."))

    def _return(self, task: asyncio.Task[Any]) -> None:
        self._there.send(self._here, self._deliver, task)

    def _deliver(self, task: asyncio.Task[Any]) -> None:
        if self.result.done():
            if not task.cancelled():
                task.exception()  # looked at: nobody else is there to be told
        elif task.cancelled():
            self.result.cancel()
        elif (error := task.exception()) is not None:
            self.result.set_exception(error)
        else:
            self.result.set_result(task.result())

    def _no_longer_wanted(self, result: asyncio.Future[Any]) -> None:
        if result.cancelled():
            with contextlib.suppress(RuntimeError):
                self._there.post(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = weakref.WeakKeyDictionary()
_shared: weakref.WeakValueDictionary[str, LoopThread] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def shared_loop(name: str) -> LoopThread:
    """The quick :class:`LoopThread` of a name, the same for all who hold it; it ends with the last of them."""
    with _lock:
        found = _shared.get(name)
        if found is None or not found.alive:
            found = _shared[name] = LoopThread(name, quick=True)
        return found


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _mailbox_of(loop: asyncio.AbstractEventLoop) -> Mailbox:
    found = _mailboxes.get(loop)
    if found is None:
        found = _mailboxes[loop] = Mailbox(loop)
    return found


def _quick_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        while True:
            try:
                loop.run_forever()
                break
            except (SystemExit, KeyboardInterrupt):  # a task's own, which has it; the others go on
                continue
        late = asyncio.all_tasks(loop)  # begun while it was winding down
        for task in late:
            task.cancel()
        if late:
            loop.run_until_complete(asyncio.wait(late, timeout=1.0))
    finally:
        loop.close()
        _mailbox_of(loop).drop()


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
