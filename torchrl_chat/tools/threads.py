"""Threads that run functions which may never return.

An executor of the standard library is no help with those: a function that hangs keeps its place for good, and the
interpreter waits for it at exit. Here a thread is hired where none is idle, and none is waited for.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Shared:
    """What the threads know of their crew, so that they do not keep it alive."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    idle: list[queue.SimpleQueue[Any]] = field(default_factory=list)
    closed: bool = False


class Crew:
    """Daemon threads that are hired as needed. How many work at once is the caller's to limit.

    Example:
        >>> crew = Crew()
        >>> crew.start(lambda: 6 * 7).result()
        42
        >>> crew.close()
    """

    def __init__(self, name: str = "torchrl_chat.tools"):
        self._name = name
        self._shared = _Shared()
        self._finalizer = weakref.finalize(self, _dismiss, self._shared)

    def start(self, work: Callable[[], Any]) -> Future[Any]:
        """Run a function in an idle thread, or in a new one."""
        job: Future[Any] = Future()
        job.set_running_or_notify_cancel()
        shared = self._shared
        with shared.lock:
            inbox = shared.idle.pop() if shared.idle else None
        if inbox is None:
            inbox = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(inbox, shared), name=self._name, daemon=True).start()
        inbox.put((job, work))
        return job

    def close(self) -> None:
        """Let idle threads go; those at work end when their function does."""
        self._finalizer()


def _serve(inbox: queue.SimpleQueue[Any], shared: _Shared) -> None:
    while (task := inbox.get()) is not None:
        job, work = task
        try:
            value, error = work(), None
        except BaseException as raised:  # sys.exit() in a tool is no reason to end the thread
            value, error = None, raised
        with shared.lock:
            closed = shared.closed
            if not closed:
                shared.idle.append(inbox)
        if error is None:
            job.set_result(value)
        else:
            job.set_exception(error)
        del task, job, work, value, error  # an idle thread keeps nobody's data
        if closed:
            return


def _dismiss(shared: _Shared) -> None:
    with shared.lock:
        shared.closed = True
        idle, shared.idle = shared.idle, []
    for inbox in idle:
        inbox.put(None)
