"""``VerifierPool``: grades in processes that are killed at a deadline, so that no grade can stop a run.

Why not ``multiprocessing`` or ``pebble``: their workers import the caller's main module (torch, in a training script),
cannot be started from a daemonic process, and a grade that hangs keeps its slot until its deadline, so that sixteen
of them on two workers cost eight deadlines in a row. Here a grade that takes longer than a moment is left alone, at the
lowest priority, and another worker is forked for the rows behind it: a batch costs one deadline at most
(``benchmarks/grading.py`` measures it).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torchrl_chat.rewards import worker as far

_PATIENCE = 0.1  # seconds: what takes longer gets company
_CHUNK = 32  # rows: more would wait behind one another, fewer would cost a system call each


class PoolError(RuntimeError):
    """The pool's processes cannot be started; the text says why."""


class Outcome(NamedTuple):
    """What came of one call."""

    value: Any
    """What the verifier returned, or ``None``."""
    failure: str | None
    """Why there is no value: ``"timeout: ..."``, ``"crash: ..."``, ``"memory: ..."`` or ``"error: ..."``."""


class _Worker:
    """A forked worker and the near end of its socket."""

    def __init__(self, sock: socket.socket, pid: int):
        self.sock = sock
        self.pid = pid
        self.buffer = bytearray()
        self.calls = 0

    def replies(self) -> list[tuple[bool, Any]] | None:
        """The replies that have come, or ``None`` if the worker has gone."""
        try:
            data = self.sock.recv(1 << 18, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.buffer += data
        replies = []
        while len(self.buffer) >= far.SIZE.size:
            end = far.SIZE.size + far.SIZE.unpack_from(self.buffer)[0]
            if len(self.buffer) < end:
                break
            try:
                replies.append(pickle.loads(self.buffer[far.SIZE.size : end]))
            except Exception as error:
                replies.append((False, f"error: the verdict cannot be read: {type(error).__name__}: {error}"))
            del self.buffer[:end]
        return replies


class _Run:
    """A worker with the rows that it was sent; it grades the first of them."""

    def __init__(self, worker: _Worker, rows: Sequence[int]):
        self.worker = worker
        self.rows = deque(rows)
        self.since = time.monotonic()
        self.slow = False


class _Nursery:
    """The process that forks workers, the idle ones among them, and the lock over both."""

    def __init__(self, verifier: bytes, memory_limit: int | None):
        self.lock = threading.Lock()
        self.idle: list[_Worker] = []
        self.owner = os.getpid()
        near, there = socket.socketpair()
        home = str(Path(far.__file__).parents[2])
        path = [*sys.path, *([] if home in sys.path else [home])]
        program = f"import sys; sys.path[:] = {path!r}; from torchrl_chat.rewards.worker import nursery; nursery({there.fileno()})"
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program], pass_fds=[there.fileno()], stdin=subprocess.DEVNULL
            )
        except OSError as error:
            raise PoolError(f"no worker process can be started: {error}") from error
        finally:
            there.close()
        self.control = near
        near.sendall(far.frame(pickle.dumps({"verifier": verifier, "memory_limit": memory_limit})))
        hello = far.receive_frame(near)
        greeting = "it ended without a word" if hello is None else pickle.loads(hello)
        if isinstance(greeting, str):
            self.close()
            raise PoolError(f"the verifier cannot be loaded in a worker process: {greeting}")
        self.pid, self.seconds = greeting["pid"], greeting["seconds"]

    def fork(self) -> _Worker:
        near, there = socket.socketpair()
        with self.lock:
            try:
                socket.send_fds(self.control, [far.ORDER.pack(b"F", 0)], [there.fileno()])
                reply = far.receive(self.control, far.ORDER.size)
            except OSError:
                reply = None
            finally:
                there.close()
        if reply is None:
            near.close()
            raise ConnectionError("the nursery has gone")
        near.settimeout(60.0)  # for sending: a worker that takes no data has crashed
        return _Worker(near, far.ORDER.unpack(reply)[1])

    def kill(self, worker: _Worker) -> None:
        worker.sock.close()
        with self.lock, contextlib.suppress(OSError):
            self.control.sendall(far.ORDER.pack(b"K", worker.pid))

    def close(self) -> None:
        """End all processes. In a forked copy of the pool's process: only let go of them."""
        self.control.close()
        for worker in self.idle:
            worker.sock.close()
        self.idle.clear()
        if os.getpid() != self.owner:
            return
        try:
            self.process.wait(2.0)
        except subprocess.TimeoutExpired:  # pragma: no cover  # it does nothing that could hang
            self.process.kill()
            self.process.wait()


class VerifierPool:
    """Calls one verifier in worker processes; a call that hangs, crashes or eats memory costs its own row only.

    Workers are forked from a small process that has imported the verifier and neither torch nor transformers. They
    are warm, reused, and started on first use. A row's deadline runs from when a worker takes it up. The pool may be
    used from several threads at once, in daemonic processes and in Ray actors, and pickled (its copy starts processes
    of its own). All processes end with :meth:`close`, with the pool, and with the process that made it, also when that
    is killed.

    Args:
        verifier: any callable that pickles; a function of a script or a notebook too, where ``cloudpickle`` is
            installed (torch users have it through tensordict).
        workers: how many calls run at a time. Defaults to the cores that this process may use.
        deadline: seconds of wall time for one call.
        memory_limit: bytes of memory that a worker may take beyond what it starts with; ``None`` for no limit.
        spare: how many workers more may be there for the rows behind slow calls.

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
        memory_limit: int | None = 1 << 30,
        spare: int = 32,
    ):
        for name, value in (("workers", workers), ("deadline", deadline), ("memory_limit", memory_limit)):
            if value is not None and value <= 0:
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
        self._start = threading.Lock()
        self._nursery: _Nursery | None = None
        self._finalizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_start", "_nursery", "_finalizer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; the pool starts anew if it is used again."""
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
        nursery.idle += [nursery.fork() for _ in range(self.workers - len(nursery.idle))]
        return self

    def processes(self) -> list[int]:
        """The ids of the processes that are up: the nursery's first, then those of idle workers."""
        nursery = self._nursery
        return [] if nursery is None else [nursery.pid, *(worker.pid for worker in nursery.idle)]

    def _running(self) -> _Nursery:
        with self._start:
            nursery = self._nursery
            if nursery is not None and nursery.owner == os.getpid() and nursery.process.poll() is None:
                return nursery
            if self._finalizer is not None:
                self._finalizer()
            self._nursery = nursery = _Nursery(_pickled(self.verifier), self.memory_limit)
            self._finalizer = weakref.finalize(self, nursery.close)
            return nursery

    def map(self, calls: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        """Call the verifier with each tuple of arguments.

        Args:
            calls: the arguments, a tuple a row.

        Returns:
            an :class:`Outcome` a row, in the order of the calls.
        """
        if not calls:
            return []
        batch = _Batch(self, self._running(), calls)
        batch.run()
        for outcome in batch.outcomes:
            if outcome.failure is not None:
                self.failures[outcome.failure.partition(":")[0]] += 1
        return batch.outcomes


class _Batch:
    """The calls of one :meth:`VerifierPool.map`, on their way."""

    def __init__(self, pool: VerifierPool, nursery: _Nursery, calls: Sequence[tuple[Any, ...]]):
        self.pool = pool
        self.nursery = nursery
        self.calls: list[bytes] = []
        self.results: list[Outcome | None] = [None] * len(calls)
        for row, call in enumerate(calls):
            try:
                self.calls.append(_pickled(call))
            except Exception as error:  # this row cannot be sent; the others can
                self.calls.append(b"")
                self.results[row] = Outcome(
                    None, f"error: the call cannot be pickled: {type(error).__name__}: {error}"
                )
        waiting = [row for row, result in enumerate(self.results) if result is None]
        size = max(1, min(_CHUNK, len(waiting) // (pool.workers * 2)))
        self.chunks = deque(waiting[i : i + size] for i in range(0, len(waiting), size))
        self.runs: list[_Run] = []
        self.selector = selectors.DefaultSelector()
        self.deaths = 0

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome or Outcome(None, "error: no verdict came") for outcome in self.results]

    def run(self) -> None:
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

    def _employ(self) -> None:
        """Give chunks to workers, as many as may be busy."""
        pool = self.pool
        while self.chunks:
            slow = sum(run.slow for run in self.runs)
            if len(self.runs) - slow >= pool.workers or len(self.runs) >= pool.workers + pool.spare:
                return
            rows = self.chunks.popleft()
            try:
                worker = self._worker()
                worker.sock.sendall(far.frame(pickle.dumps([self.calls[row] for row in rows])))
            except OSError as error:
                # Nobody took the rows up, so they are tried again; a nursery that dies again and again is an error.
                self.deaths += 1
                if self.deaths > 3:
                    raise PoolError(f"workers die as soon as they start: {error}") from error
                self.chunks.appendleft(rows)
                self.nursery = pool._running()
                continue
            run = _Run(worker, rows)
            self.runs.append(run)
            self.selector.register(worker.sock, selectors.EVENT_READ, run)

    def _worker(self) -> _Worker:
        try:
            return self.nursery.idle.pop()
        except IndexError:
            return self.nursery.fork()

    def _patience(self) -> float:
        """Seconds until the next row is slow or late."""
        now = time.monotonic()
        ends = [run.since + (self.pool.deadline if run.slow else self._moment) - now for run in self.runs]
        return max(0.0, min(ends, default=0.0))

    @property
    def _moment(self) -> float:
        return min(_PATIENCE, self.pool.deadline)

    def _read(self, run: _Run) -> None:
        replies = run.worker.replies()
        if replies is None:
            row = run.rows.popleft()
            self.results[row] = Outcome(None, "crash: the worker process died while it graded")
            self._dismiss(run, keep=False)
            return
        for good, value in replies:
            row = run.rows.popleft()
            self.results[row] = Outcome(value, None) if good else Outcome(None, value)
            run.since = time.monotonic()
            run.worker.calls += 1
            if run.slow or not run.rows:
                # A slow worker has lost its priority and its other rows: it is no use any more.
                self._dismiss(run, keep=not run.slow)
                return

    def _watch(self) -> None:
        """Part slow rows from the others, and end late ones."""
        now = time.monotonic()
        for run in list(self.runs):
            spent = now - run.since
            if spent >= self.pool.deadline:
                row = run.rows.popleft()
                self.results[row] = Outcome(
                    None, f"timeout: no verdict within {self.pool.deadline:g} s; the worker was killed"
                )
                self._dismiss(run, keep=False)
            elif spent >= self._moment and not run.slow:
                run.slow = True
                first, *others = run.rows
                run.rows = deque([first])
                if others:
                    self.chunks.appendleft(others)
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, run.worker.pid, 19)

    def _dismiss(self, run: _Run, *, keep: bool) -> None:
        """Part with a worker; rows that it has not taken up go back to the others."""
        self.selector.unregister(run.worker.sock)
        self.runs.remove(run)
        if keep and len(self.nursery.idle) < self.pool.workers:
            self.nursery.idle.append(run.worker)
        else:
            self.nursery.kill(run.worker)
        if run.rows:
            self.chunks.appendleft(list(run.rows))


def _pickled(value: Any) -> bytes:
    """The value as bytes; what lives in ``__main__`` or in a function goes by value, where cloudpickle is there."""
    try:
        data = pickle.dumps(value)
        if b"__main__" not in data:
            return data
    except (pickle.PicklingError, AttributeError, TypeError):
        data = None
    try:
        import cloudpickle
    except ImportError:
        if data is not None:
            return data
        raise
    return cloudpickle.dumps(value)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
