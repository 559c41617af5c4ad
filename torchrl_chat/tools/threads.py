"""Threads that run functions which may never return.

An executor of the standard library is no help with those: a function that hangs keeps its place for good, and the
interpreter waits for it at exit. Here a thread is hired where none is idle, and none is waited for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_PATIENCE = 10.0  # seconds that an idle thread waits for work


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
        self._idle: list[queue.SimpleQueue[Any]] = []
        self._lock = threading.Lock()

    def start(self, work: Callable[[], Any]) -> Future[Any]:
        """Run a function in an idle thread, or in a new one."""
        job: Future[Any] = Future()
        job.set_running_or_notify_cancel()
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = queue.SimpleQueue()
            # The thread knows nothing else of its crew, which it does not keep alive.
            known = (inbox, self._idle, self._lock)
            threading.Thread(target=_serve, args=known, name=self._name, daemon=True).start()
        inbox.put((job, work))
        return job

    def close(self) -> None:
        """Let idle threads go; those at work go when they have been idle for a while."""
        with self._lock:
            while self._idle:
                self._idle.pop().put(None)


def _serve(inbox: queue.SimpleQueue[Any], idle: list[queue.SimpleQueue[Any]], lock: threading.Lock) -> None:
    while True:
        try:
            task = inbox.get(timeout=_PATIENCE)
        except queue.Empty:
            with lock:
                if inbox not in idle:
                    continue  # hired just now
                idle.remove(inbox)
                return
        if task is None:
            return
        job, work = task
        try:
            value, error = work(), None
        except BaseException as raised:  # sys.exit() in a tool is no reason to end the thread
            value, error = None, raised
        with lock:
            idle.append(inbox)
        if error is None:
            job.set_result(value)
        else:
            job.set_exception(error)
        del task, job, work, value, error  # an idle thread keeps nobody's data
