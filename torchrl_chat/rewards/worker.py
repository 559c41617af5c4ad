"""The far side of :class:`~torchrl_chat.rewards.pool.VerifierPool`: a nursery process and the workers that it forks.

The nursery is a fresh interpreter that imports the verifier's module and nothing else, then forks a worker whenever
the pool asks for one: that takes a few milliseconds and shares the memory of what is imported, so a worker that
hangs is killed and replaced rather than waited for. It kills at the pool's word, and all of them when the pool's
process is gone, however that ended.

Law of this file: the standard library only, no threads, and nothing that a verifier does in a worker reaches the nursery.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
from typing import Any, NoReturn

SIZE = struct.Struct("<Q")
"""What stands before each frame: its length in bytes."""
ORDER = struct.Struct("<cq")
"""What the pool asks of the nursery: ``b"F"`` (fork; a socket comes with it) or ``b"K"`` (kill), and a process id."""
MAX_REPLY = 16 << 20
"""A verdict of more bytes than this is a failure, not a verdict."""


def frame(payload: bytes) -> bytes:
    """The payload with its length before it."""
    return SIZE.pack(len(payload)) + payload


def receive(sock: socket.socket, size: int) -> bytes | None:
    """Exactly ``size`` bytes, or ``None`` when the other side has gone."""
    data = bytearray()
    while len(data) < size:
        part = sock.recv(min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def receive_frame(sock: socket.socket) -> bytes | None:
    """One frame's payload, or ``None`` when the other side has gone."""
    size = receive(sock, SIZE.size)
    return None if size is None else receive(sock, SIZE.unpack(size)[0])


def nursery(fd: int) -> None:
    """Run the nursery on its control socket; returns when the pool has gone."""
    started = time.perf_counter()
    parent = os.getppid()
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
    except BaseException as error:
        control.sendall(frame(pickle.dumps(f"{type(error).__name__}: {error}")))
        return
    gc.collect()
    gc.freeze()  # or every collection in a worker would copy the pages that it shares
    control.sendall(frame(pickle.dumps({"pid": os.getpid(), "seconds": time.perf_counter() - started})))
    children: set[int] = set()
    try:
        while os.getppid() == parent:
            readable, _, _ = select.select([control], [], [], 0.5)
            _reap(children)
            if not readable:
                continue
            data, fds, _, _ = socket.recv_fds(control, ORDER.size, 1)
            while data and len(data) < ORDER.size and (more := control.recv(ORDER.size - len(data))):
                data += more
            if len(data) < ORDER.size:
                return
            order, pid = ORDER.unpack(data)
            if order == b"K":
                if pid in children:
                    _kill(pid)
                continue
            pid = os.fork()
            if pid == 0:
                control.close()
                _worker(socket.socket(fileno=fds[0]), verifier, settings["memory_limit"], resource)
            children.add(pid)
            os.close(fds[0])
            control.sendall(ORDER.pack(b"F", pid))
    finally:
        for pid in children:
            _kill(pid)


def _reap(children: set[int]) -> None:
    for pid in list(children):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0]:
                children.discard(pid)


def _kill(pid: int) -> None:
    """Kill the worker, and what it started in its process group."""
    for kill in (os.killpg, os.kill):  # it may not have come to make its group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _worker(sock: socket.socket, verifier: Any, memory_limit: int | None, resource: Any) -> NoReturn:
    """Grade chunks until the pool closes the socket."""
    try:
        os.setpgid(0, 0)
        _die_with_parent()
        if resource is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if memory_limit is not None:
                limit = _address_space() + memory_limit
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        while (chunk := receive_frame(sock)) is not None:
            for arguments in pickle.loads(chunk):
                sock.sendall(frame(_grade(verifier, arguments)))
    except (ConnectionError, BrokenPipeError):
        pass
    finally:
        os._exit(0)  # no exit handler of the nursery's is the worker's to run


def _grade(verifier: Any, arguments: bytes) -> bytes:
    """One call, pickled: ``(True, its value)`` or ``(False, why there is none)``."""
    try:
        value = verifier(*pickle.loads(arguments))
        if hasattr(value, "__await__"):
            import asyncio  # slow to import, and seldom needed

            value = asyncio.run(_awaited(value))
        reply = pickle.dumps((True, value))
        if len(reply) > MAX_REPLY:
            raise ValueError(f"the verdict has {len(reply):,} bytes, of {MAX_REPLY:,} that are allowed")
        return reply
    except MemoryError:
        reason = "memory: the grade needed more than a worker may have"
    except BaseException as error:  # SystemExit is a failure of the grade as well
        reason = f"error: {type(error).__name__}: {str(error)[:500]}"
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


def _die_with_parent() -> None:
    """Linux: be killed when the nursery dies, even if it was killed itself."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if sys.platform == "linux":
    import ctypes  # noqa: F401  # here, once: a worker that is forked must not import it anew
