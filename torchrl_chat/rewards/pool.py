"""``VerifierPool``: grades in processes that are killed at a deadline, so that no grade can stop a run.

Why not ``multiprocessing`` or ``pebble``: their workers import the caller's main module (torch, in a training script),
cannot be started from a daemonic process, and a grade that hangs keeps its slot until its deadline, so that sixteen
of them on two workers cost eight deadlines in a row. Here a grade that takes longer than usual is left alone, soon at
the lowest priority, and another worker is forked for the rows behind it: as long as no more than ``spare`` grades hang, a
batch costs little more than one deadline (``benchmarks/grading.py`` measures it).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from torchrl_chat.processes import SIZE, frame
from torchrl_chat.rewards.worker import Nursery, PoolError, Worker

_PATIENCE = 0.1  # seconds: what takes longer gets company
_CHUNK = 32  # rows: more would wait behind one another, fewer would cost a system call each
_CHUNK_BYTES = 1 << 16  # what a socket takes without waiting for the worker, about
_CALL_BYTES = 1 << 31  # of one call, whose frame says its length in 32 bits
_CALLS = 2000  # what a worker grades before it is replaced, as SymPy and others gather memory


class Outcome(NamedTuple):
    """What came of one call."""

    value: Any
    """What the verifier returned, or ``None``."""
    failure: str | None
    """Why there is no value: ``"timeout: ..."``, ``"crash: ..."``, ``"memory: ..."`` or ``"error: ..."``."""


class _Run:
    """A worker with the rows that it was sent; it grades the first of them."""

    def __init__(self, worker: Worker, rows: Sequence[int]):
        self.worker = worker
        self.rows = deque(rows)
        self.since = time.monotonic()
        self.slow = False  # others have its other rows
        self.nice = False  # it has lost its priority


class VerifierPool:
    """Calls one verifier in worker processes; a call that hangs, crashes or eats memory costs its own row only.

    Workers are forked from a small process that has imported the verifier and neither torch nor transformers. They
    are warm, reused, and started on first use. A row's deadline runs from when a worker takes it up. The pool may be
    used from several threads at once, in daemonic processes and in Ray actors, and pickled (its copy starts processes
    of its own). All processes end with :meth:`close`, with the pool, and with the process that made it, also when that
    is killed; on Linux with whatever the calls have started.

    Args:
        verifier: any callable that pickles; a function of a script or a notebook too, where ``cloudpickle`` is
            installed (torch users have it through tensordict).
        workers: how many calls run at a time. Defaults to the cores that this process may use.
        deadline: seconds of wall time for one call.
        memory_limit: bytes of memory that a worker may take beyond what it starts with; ``None`` for no limit.
        spare: how many workers more may be there for the rows behind slow calls. Each may take ``memory_limit``.

    Raises:
        PoolError: at first use: the verifier cannot be loaded in another process.
        ValueError: an argument is not positive.

    Example:
        >>> from torchrl_chat.rewards import NumberVerifier
        >>> with VerifierPool(NumberVerifier(), workers=1) as pool:
        ...     pool.map([("it is 7", "7"), ("it is 8", "7")])[0].value.score
        1.0
    """

    def __init__(
        self,
        verifier: Any,
        *,
        workers: int | None = None,
        deadline: float = 10.0,
        memory_limit: int | None = 1 << 29,
        spare: int = 32,
    ):
        for name, value in (("workers", workers), ("deadline", deadline), ("memory_limit", memory_limit)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: expected a positive number.")
        if spare < 0:
            raise ValueError(f"spare is {spare}: expected 0 or more.")
        self.verifier = verifier
        self.workers = workers or _cores()
        self.deadline = deadline
        self.memory_limit = memory_limit
        self.spare = spare
        self.failures: Counter[str] = Counter()
        """How many calls failed so far, by the first word of the reason."""
        self._reset()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._start = threading.RLock()
        self._nursery: Nursery | None = None
        self._finalizer: Any = None
        self._runs: set[_Run] = set()  # what is at work, of all threads
        self._usual = 0.0  # seconds of a grade, a running mean

    def __getstate__(self) -> dict[str, Any]:
        own = ("_owner", "_start", "_nursery", "_finalizer", "_runs", "_usual")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; the pool starts anew if it is used again."""
        self._disown()
        with self._start:
            if self._finalizer is not None:
                self._finalizer()
            self._nursery = self._finalizer = None

    def start(self) -> VerifierPool:
        """Start the processes now rather than at first use.

        Returns:
            the pool itself.
        """
        nursery = self._running()
        try:
            nursery.idle += [nursery.fork() for _ in range(self.workers - len(nursery.idle))]
        except OSError as error:
            raise PoolError(f"no worker process can be forked: {error}") from error
        return self

    def processes(self) -> list[int]:
        """The ids of the processes that are up: the nursery's first, then those of idle workers."""
        nursery = self._nursery
        return [] if nursery is None else [nursery.pid, *(worker.pid for worker in nursery.idle)]

    def _disown(self) -> None:
        """In a forked copy of the pool's process: start without its nursery, and without locks that nobody frees."""
        if self._owner != os.getpid():
            if self._finalizer is not None:
                self._finalizer()
            self._reset()

    def _running(self) -> Nursery:
        self._disown()
        with self._start:
            nursery = self._nursery
            if nursery is not None and nursery.alive():
                return nursery
            if self._finalizer is not None:
                self._finalizer()
            self._nursery = nursery = Nursery(_pickled(self.verifier), self.memory_limit)
            self._finalizer = weakref.finalize(self, nursery.close)
            return nursery

    def map(self, calls: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        """Call the verifier with each tuple of arguments.

        Args:
            calls: the arguments, a tuple a row.

        Returns:
            an :class:`Outcome` a row, in the order of the calls.

        Raises:
            PoolError: the processes cannot be started, or die as soon as they are.
        """
        if not calls:
            return []
        self._running()
        outcomes = _Batch(self, calls).run()
        with self._start:
            self.failures.update(o.failure.partition(":")[0] for o in outcomes if o.failure is not None)
        return outcomes


class _Batch:
    """The calls of one :meth:`VerifierPool.map`, on their way."""

    def __init__(self, pool: VerifierPool, calls: Sequence[tuple[Any, ...]]):
        self.pool = pool
        self.calls: list[bytes] = []
        self.results: list[Outcome | None] = [None] * len(calls)
        for row, call in enumerate(calls):
            try:
                self.calls.append(_pickled(call))
            except (Exception, SystemExit) as error:  # this row cannot be sent; the others can
                self.calls.append(b"")
                self._settle(row, f"error: the call cannot be pickled: {type(error).__name__}: {error}")
                continue
            size = len(self.calls[row])
            if pool.memory_limit is not None and 2 * size > pool.memory_limit:
                self._settle(row, f"memory: the call has {size:,} bytes, half of what a worker may have")
            elif size >= _CALL_BYTES:
                self._settle(row, f"memory: the call has {size:,} bytes, of {_CALL_BYTES:,} that can be sent")
        self.chunks: deque[list[int]] = deque()
        rows, size = 0, 0
        waiting = [row for row, result in enumerate(self.results) if result is None]
        most = max(1, min(_CHUNK, len(waiting) // (pool.workers * 2)))
        for row in waiting:
            length = len(self.calls[row])
            if not self.chunks or rows >= most or size + length > _CHUNK_BYTES:
                self.chunks.append([])
                rows = size = 0
            self.chunks[-1].append(row)
            rows, size = rows + 1, size + length
        self.runs: list[_Run] = []
        self.selector = selectors.DefaultSelector()
        self.deaths = 0

    def _settle(self, row: int, failure: str | None, value: Any = None) -> None:
        self.results[row] = Outcome(value, failure)
        self.calls[row] = b""

    def run(self) -> list[Outcome]:
        try:
            while self.chunks or self.runs:
                self._employ()
                for key, _ in self.selector.select(self._patience()):
                    self._read(key.data)
                self._watch()
        finally:  # Ctrl-C as well: nothing that is at work is left at work
            for run in list(self.runs):
                self._dismiss(run, keep=False)
            self.selector.close()
        return [outcome or Outcome(None, "error: no verdict came") for outcome in self.results]

    def _room(self) -> bool:
        """Whether another worker may be busy. A batch may always have one that gets on, whatever others do."""
        pool, everyone = self.pool, list(self.pool._runs)
        if all(run.slow for run in self.runs) and len(self.runs) < 1 + pool.spare:
            busy = 0
        else:
            busy = sum(not run.slow for run in everyone)
        return busy < pool.workers and (not self.runs or len(everyone) < pool.workers + pool.spare)

    def _employ(self) -> None:
        """Give chunks to workers, as many as may be busy."""
        while self.chunks and self._room():
            try:
                worker = self._worker()
            except ConnectionError as error:
                self._died(str(error))
                continue
            except OSError as error:
                if self.runs:  # when one of them is done there is room
                    return
                raise PoolError(f"no worker process can be forked: {error}") from error
            run = _Run(worker, self.chunks.popleft())
            self.runs.append(run)
            self.pool._runs.add(run)
            self.selector.register(worker.sock, selectors.EVENT_READ, run)
            frames = [frame(self.calls[row]) for row in run.rows]
            try:
                worker.sock.sendall(b"".join([SIZE.pack(sum(map(len, frames))), *frames]))
            except OSError as error:  # nobody took the rows up, so they are tried again
                self._dismiss(run, keep=False)
                self._died(str(error))

    def _worker(self) -> Worker:
        nursery = self.pool._running()
        try:
            return nursery.idle.pop()
        except IndexError:
            return nursery.fork()

    def _died(self, how: str) -> None:
        """Count deaths that are no row's fault: processes that die again and again are an error."""
        self.deaths += 1
        if self.deaths > self.pool.workers + 3:
            raise PoolError(f"workers die as soon as they start: {how}")

    def _patience(self) -> float:
        """Seconds until the next row is slow or late."""
        now, deadline = time.monotonic(), self.pool.deadline
        ends = [
            run.since + (deadline if run.nice else self._grace if run.slow else self._moment(run)) - now
            for run in self.runs
        ]
        return min(max(0.0, min(ends, default=0.0)), 3600.0)  # the deadline may be infinite

    def _moment(self, run: _Run) -> float:
        """Seconds after which the run's row is slow.

        That is measured against what a grade usually takes, or workers would be parted with that do what they can;
        a new worker's first one takes longer. Where many rows are slow the next is found out sooner, or they add up.
        """
        slow = sum(run.slow for run in self.runs)
        usual = self.pool._usual * (4 if run.worker.calls else 12)
        return min(max(_PATIENCE / (1 + slow), _PATIENCE / 5, usual), self.pool.deadline)

    @property
    def _grace(self) -> float:
        """Seconds after which a row loses the rest of its priority."""
        return min(max(3 * _PATIENCE, 12 * self.pool._usual), self.pool.deadline)

    def _read(self, run: _Run) -> None:
        replies = run.worker.replies()
        if replies is None:
            if run.worker.nursery.alive():
                self._settle(run.rows.popleft(), "crash: the worker process died while it graded")
                self._dismiss(run, keep=False)
            else:  # it went with the nursery, which was no row's doing
                self._dismiss(run, keep=False)
                self._died("the nursery has gone")
            return
        for good, value in replies:
            self._settle(run.rows.popleft(), None if good else value, value if good else None)
            now = time.monotonic()
            self.pool._usual += (now - run.since - self.pool._usual) / 8
            run.since = now
            run.worker.calls += 1
            full = not good and value.startswith("memory")
            if run.slow or full or not run.rows:
                # A slow worker has lost its other rows, a full one may not get its memory back.
                self._dismiss(run, keep=not run.slow and not full and run.worker.calls < _CALLS)
                return

    def _watch(self) -> None:
        """Part slow rows from the others, and end late ones."""
        now = time.monotonic()
        for run in list(self.runs):
            spent = now - run.since
            if spent >= self.pool.deadline:
                late = f"timeout: no verdict within {self.pool.deadline:g} s; the worker was killed"
                self._settle(run.rows.popleft(), late)
                self._dismiss(run, keep=False)
            elif spent >= self._moment(run) and not run.slow:
                run.slow = True
                _lower(run.worker.pid, 10)
                first, *others = run.rows
                run.rows = deque([first])
                if others:
                    self.chunks.appendleft(others)
            elif spent >= self._grace and run.slow and not run.nice:
                run.nice = True
                _lower(run.worker.pid, 19)

    def _dismiss(self, run: _Run, *, keep: bool) -> None:
        """Part with a worker; rows that it has not taken up go back to the others."""
        self.selector.unregister(run.worker.sock)
        self.runs.remove(run)
        self.pool._runs.discard(run)
        nursery = run.worker.nursery
        if keep and nursery is self.pool._nursery and len(nursery.idle) < self.pool.workers:
            nursery.idle.append(run.worker)
        else:
            nursery.kill(run.worker)
        if run.rows:
            self.chunks.appendleft(list(run.rows))


def _lower(pid: int, nice: int) -> None:
    """Let a worker, and what it has started, stand back behind others."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PGRP, pid, nice)


def _pickled(value: Any) -> bytes:
    """The value as bytes; what lives in ``__main__`` or in a function goes by value, where cloudpickle is there."""
    try:
        data = pickle.dumps(value)
        if b"__main__" not in data and b"__mp_main__" not in data:
            return data
    except (pickle.PicklingError, AttributeError, TypeError):
        data = None
    try:
        import cloudpickle
    except ImportError:
        if data is not None:
            return data
        raise
    main = sys.modules.get("__mp_main__")  # what multiprocessing calls the main module in its children
    if (
        main is None
        or main.__name__ != "__mp_main__"
        or main.__name__ in cloudpickle.list_registry_pickle_by_value()
    ):
        return cloudpickle.dumps(value)
    cloudpickle.register_pickle_by_value(main)
    try:
        return cloudpickle.dumps(value)
    finally:
        cloudpickle.unregister_pickle_by_value(main)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
