"""The processes of :class:`~torchrl_chat.rewards.pool.VerifierPool`: a nursery, and the workers that it forks.

The nursery is a fresh interpreter that imports the verifier's module and nothing else, then forks a worker whenever
the pool asks for one: that takes a few milliseconds and shares the memory of what is imported, so a worker that
hangs is killed and replaced rather than waited for. It kills at the pool's word, and all of them when the pool's
process is gone, however that ended.

Law of this file: the standard library only, little of it, and nothing that a verifier does in a worker reaches the
nursery. The pool's side of the sockets stands at its end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from torchrl_chat.processes import FORK, KILL, ORDER, SIZE, ForkServer, Silent, frame, receive, receive_frame, serve

MAX_REPLY = 16 << 20
"""A verdict of more bytes than this is a failure, not a verdict."""
START = 120.0
"""Seconds for the import of the verifier."""


class Reason(str):
    """Why a grade failed, and the traceback of what was raised; a string like any other to whoever does not ask for it."""

    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, *, most: int | None = None) -> Reason:
        """Of an error: its class and its text, of which ``most`` characters are kept."""
        import traceback  # needed where something went wrong, not in each worker

        reason = cls(f"error: {type(error).__name__}: {str(error)[:most]}")
        with contextlib.suppress(Exception):  # an error that cannot be spelled, or no memory for it
            reason.traceback = "".join(traceback.format_exception(error, limit=-20))[-8000:]
        return reason


def nursery(fd: int, parent: int) -> None:
    """Run the nursery on its control socket; returns when the pool, in the process ``parent``, has gone."""
    started = time.perf_counter()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pool's to handle
    control = socket.socket(fileno=fd)
    hello = receive_frame(control)
    if hello is None:
        return
    settings: dict[str, Any] = pickle.loads(hello)
    try:
        import resource  # imported once, here: the workers share it
    except ImportError:  # pragma: no cover  # not a POSIX system
        resource = None  # type: ignore[assignment]
    try:
        verifier = pickle.loads(settings["verifier"])
        if hasattr(verifier, "warm"):
            verifier.warm()
        if _is_async(verifier):
            import asyncio  # noqa: F401  # slow to import, so not in each worker
    except BaseException as error:
        control.sendall(frame(pickle.dumps(f"{type(error).__name__}: {error}")))
        return
    _flush()  # or every worker would print it again
    control.sendall(frame(pickle.dumps({"pid": os.getpid(), "seconds": time.perf_counter() - started})))
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a dead worker leaves behind becomes a child of the nursery
    workers: set[int] = set()
    dying: set[int] = set()

    def fork(_: int, descriptors: list[int]) -> None:
        """Answers with the new worker's id, or the negative error number where there can be no more processes."""
        try:
            pid = os.fork()
        except OSError as error:
            pid = -(error.errno or errno.EAGAIN)
        if pid == 0:
            control.close()
            _worker(socket.socket(fileno=descriptors[0]), verifier, settings["memory_limit"], resource)
        if pid > 0:
            workers.add(pid)
        control.sendall(ORDER.pack(FORK, pid))

    def kill(pid: int) -> None:
        # Workers are waited for behind this only: until then their ids, and their groups', are nobody else's.
        if pid in workers:
            _kill(pid)
            workers.discard(pid)
            dying.add(pid)

    def goes_on() -> bool:
        _reap(workers, dying)
        return os.getppid() == parent

    try:
        serve(control, fork, kill, goes_on)
    finally:
        for pid in workers:
            _kill(pid)
        for pid in _descendants(os.getpid()):
            _end(os.kill, pid)


def _reap(workers: set[int], dying: set[int]) -> None:
    """Take leave of killed workers, and of what they left behind."""
    for pid in dying | (set(_children(os.getpid())) - workers):
        try:
            gone = os.waitpid(pid, os.WNOHANG)[0]
        except ChildProcessError:
            gone = pid
        if gone:
            dying.discard(pid)


def _kill(pid: int) -> None:
    """Kill the worker, its process group, and what it started in sessions of their own."""
    below = _descendants(pid)
    _end(os.killpg, pid)
    _end(os.kill, pid)  # it may not have come to make its group yet
    for child in below:
        _end(os.kill, child)


def _end(kill: Callable[[int, int], None], pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """The ids of a process's children; none where the system does not say."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    return found


def _descendants(pid: int) -> list[int]:
    found = _children(pid)
    for child in found:  # grows as it goes
        found += _children(child)
    return found


def _worker(sock: socket.socket, verifier: Any, memory_limit: int | None, resource: Any) -> NoReturn:
    """Grade chunks until the pool closes the socket."""
    try:
        me, nursery = os.getpid(), os.getppid()
        os.setpgid(0, 0)
        _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: be killed when the nursery dies, even if it was killed itself
        if os.getppid() != nursery:
            return  # type: ignore[misc]  # the finally below ends the process
        sock.set_inheritable(False)
        if resource is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if memory_limit is not None:
                limit = _address_space() + memory_limit
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        while (chunk := receive_frame(sock)) is not None:
            rest = memoryview(chunk)
            del chunk
            while rest:
                end = SIZE.size + SIZE.unpack_from(rest)[0]
                reply = _grade(verifier, rest[SIZE.size : end])
                if os.getpid() != me:
                    return  # type: ignore[misc]  # a grade forked, and this is the copy: it must not answer too
                sock.sendall(frame(reply))
                rest = rest[end:]
            _flush()
    except OSError:
        pass  # the pool has gone
    finally:
        os._exit(0)  # no exit handler of the nursery's is the worker's to run


def _grade(verifier: Any, arguments: memoryview) -> bytes:
    """One call, pickled: ``(True, its value)`` or ``(False, why there is none)``."""
    try:
        value = verifier(*pickle.loads(arguments))
        if hasattr(value, "__await__"):
            import asyncio

            value = asyncio.run(_awaited(value))
        reply = pickle.dumps((True, value))
        if len(reply) > MAX_REPLY:
            raise ValueError(f"the verdict has {len(reply):,} bytes, of {MAX_REPLY:,} that are allowed")
        return reply
    except MemoryError:
        reason: str = "memory: the grade needed more than a worker may have"
    except BaseException as error:  # SystemExit is a failure of the grade as well
        reason = Reason.of(error, most=500)
    return pickle.dumps((False, reason))


async def _awaited(value: Any) -> Any:
    return await value


def _address_space() -> int:
    """The virtual memory of this process, in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _is_async(verifier: Any) -> bool:
    code = getattr(verifier, "__code__", None) or getattr(type(verifier).__call__, "__code__", None)
    return bool(getattr(code, "co_flags", 0) & 0x80)  # CO_COROUTINE; the module inspect is slow to import


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if sys.platform == "linux":
    import ctypes


# --- The near side: what the pool holds of these processes ----------------------------------------------------------


class PoolError(RuntimeError):
    """The pool's processes cannot be started; the text says why."""


class Worker:
    """A forked worker and the near end of its socket."""

    def __init__(self, nursery: Nursery, sock: socket.socket, pid: int):
        self.nursery = nursery
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
        while len(self.buffer) >= SIZE.size:
            end = SIZE.size + SIZE.unpack_from(self.buffer)[0]
            if len(self.buffer) < end:
                break
            try:
                replies.append(pickle.loads(self.buffer[SIZE.size : end]))
            except (Exception, SystemExit) as error:  # what it is made of is called in this process
                replies.append((False, f"error: the verdict cannot be read: {type(error).__name__}: {error}"))
            del self.buffer[:end]
        return replies


class Nursery(ForkServer):
    """The process that forks workers, and the idle ones among them.

    Raises:
        PoolError: it cannot be started, or cannot load the verifier.
    """

    def __init__(self, verifier: bytes, memory_limit: int | None):
        self.idle: list[Worker] = []
        parent = os.getpid()
        home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = [*sys.path, *([] if home in sys.path else [home])]
        program = f"import sys; sys.path[:] = {path!r}; from torchrl_chat.rewards.worker import nursery; nursery"
        try:
            super().__init__(lambda fd: [sys.executable, "-c", f"{program}({fd}, {parent})"], process_group=0)
        except OSError as error:
            raise PoolError(f"no worker process can be started: {error}") from error
        hello = frame(pickle.dumps({"verifier": verifier, "memory_limit": memory_limit}))
        try:
            greeting: Any = pickle.loads(self.greet(hello, within=START))
        except Silent as error:
            greeting = str(error)
        if isinstance(greeting, str):
            self.close()
            raise PoolError(f"the verifier cannot be loaded in a worker process: {greeting}")
        self.pid, self.seconds = greeting["pid"], greeting["seconds"]

    def fork(self) -> Worker:
        """A new worker.

        Raises:
            ConnectionError: the nursery has gone.
            OSError: there can be no more processes, or no more files.
        """
        near, there = socket.socketpair()
        try:
            with there, self.lock:
                self.order(FORK, 0, [there.fileno()])
                reply = receive(self.control, ORDER.size)
        except BaseException as error:  # Ctrl-C: a reply still on its way would be taken for the next one
            near.close()
            self.process.kill()
            if isinstance(error, OSError):
                raise ConnectionError("the nursery has gone") from error
            raise
        pid = 0 if reply is None else ORDER.unpack(reply)[1]
        if pid <= 0:
            near.close()
            raise OSError(-pid, os.strerror(-pid)) if pid else ConnectionError("the nursery has gone")
        near.settimeout(60.0)  # for sending: a worker that takes no data has crashed
        return Worker(self, near, pid)

    def kill(self, worker: Worker) -> None:
        """End a worker, whatever it does."""
        worker.sock.close()
        with contextlib.suppress(OSError):
            self.order(KILL, worker.pid)

    def close(self) -> None:
        """End all processes. In a forked copy of the pool's process: only let go of them."""
        super().close()
        while self.idle:
            self.idle.pop().sock.close()
