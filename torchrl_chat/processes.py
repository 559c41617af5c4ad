"""The fork server: a small process that forks others on order, and ends them.

A process that has imported what is needed, and nothing else, forks in a millisecond what would take seconds to start.
Verifiers grade in such processes (:mod:`torchrl_chat.rewards.worker`), programs run in them (:mod:`torchrl_chat.sandbox`). Both
are made of what stands here: frames, the loop that carries out orders, and the near end, which starts the server, notices
when it has gone, and ends it with all that it made.

Law of this file: the standard library only, and little of it. The server imports this file.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

SIZE = struct.Struct("!I")
"""What stands before each frame: its length in bytes."""
ORDER = struct.Struct("!cq")
"""An order to a server: :data:`FORK` (with the descriptors of the new process) or :data:`KILL`, and a number."""
FORK, KILL = b"F", b"K"


# --- What is sent ------------------------------------------------------------------------------------------------------
def frame(payload: bytes) -> bytes:
    """The payload with its length before it.

    Example:
        >>> frame(b"ab")
        b'\\x00\\x00\\x00\\x02ab'
    """
    return SIZE.pack(len(payload)) + payload


def receive(sock: socket.socket, size: int) -> bytearray | None:
    """Exactly ``size`` bytes, or ``None`` when the other side has gone."""
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        got = sock.recv_into(rest)
        if not got:
            return None
        rest = rest[got:]
    return data


def receive_frame(sock: socket.socket) -> bytearray | None:
    """One frame's payload, or ``None`` when the other side has gone."""
    size = receive(sock, SIZE.size)
    return None if size is None else receive(sock, SIZE.unpack(size)[0])


# --- The server --------------------------------------------------------------------------------------------------------
def serve(
    control: socket.socket,
    fork: Callable[[int, list[int]], None],
    kill: Callable[[int], None],
    goes_on: Callable[[], bool],
) -> None:
    """Carry out orders until the near end has gone.

    Args:
        control: where the orders come from.
        fork: makes a process of a number, which speaks through these descriptors; they are closed behind it.
        kill: ends the process of a number, if there is one.
        goes_on: is asked before each order, and twice a second at least: takes leave of what has ended, and says whether to
            go on.
    """
    gc.collect()
    gc.freeze()  # or every collection in a forked process would copy the pages that it shares
    poll = select.poll()  # unlike select() it takes any number of a file
    poll.register(control, select.POLLIN)
    with contextlib.suppress(ConnectionError, KeyboardInterrupt):
        while True:
            ready = poll.poll(500)
            if not goes_on():
                return
            if not ready:
                continue
            data, descriptors, _, _ = socket.recv_fds(control, ORDER.size, 4)
            while data and len(data) < ORDER.size and (more := control.recv(ORDER.size - len(data))):
                data += more
            if len(data) < ORDER.size:
                return
            order, number = ORDER.unpack(data)
            if order == KILL:
                kill(number)
                continue
            fork(number, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


# --- The near end ------------------------------------------------------------------------------------------------------
class Silent(RuntimeError):
    """A server said nothing when it was greeted; the text says why."""


class ForkServer:
    """A server that was started, seen by the process that started it.

    Args:
        command: makes its command line, given the number of the descriptor through which it speaks.

    Keyword Args:
        options: of ``subprocess.Popen``. The server is the first of a process group or session: the terminal's Ctrl-C is its
            owner's to handle.

    Attributes:
        control: the socket for orders, to be used under ``lock``.
        owner: the process that started it; a forked copy of that lets go of it, and does not end it.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, command: Callable[[int], Sequence[str]], **options: Any):
        import subprocess  # the server itself needs it not

        self.owner = os.getpid()
        self.lock = threading.RLock()  # the collector may call close() while it is held
        self.control, there = socket.socketpair()
        try:
            with there:
                self.process = subprocess.Popen(
                    command(there.fileno()), pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, **options
                )
        except OSError:
            self.control.close()
            raise

    def greet(self, *frames: bytes, within: float) -> bytearray:
        """Say the first words, and wait for the answer.

        Args:
            frames: what is sent.
            within: seconds until there must be an answer.

        Raises:
            Silent: there is none; the server has been ended.
        """
        reason = "it ended without a word"
        try:
            self.control.settimeout(within)
            self.control.sendall(b"".join(frames))
            if (answer := receive_frame(self.control)) is not None:
                return answer
        except TimeoutError:
            reason = f"it took more than {within:g} s to start"
            self.process.kill()
        except OSError:
            pass  # it ended while it was spoken to
        except BaseException:
            self.close()
            raise
        self.close()
        raise Silent(reason)

    def order(self, order: bytes, number: int, descriptors: Sequence[int] = ()) -> None:
        """Send an order; the caller holds ``lock`` where it waits for an answer."""
        message = ORDER.pack(order, number)
        with self.lock:
            if descriptors:
                socket.send_fds(self.control, [message], list(descriptors))
            else:
                self.control.sendall(message)

    def alive(self) -> bool:
        """Whether it is up. It says nothing unasked, so a readable control socket is a closed one."""
        if os.getpid() == self.owner and self.process.poll() is not None:
            return False
        with self.lock, contextlib.suppress(OSError, ValueError):
            poll = select.poll()
            poll.register(self.control, select.POLLIN)
            return not poll.poll(0)
        return False

    def close(self) -> None:
        """End it, with all that it made. In a forked copy of its owner: only let go of it."""
        if os.getpid() != self.owner:
            self.control.close()
            return
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)  # closing is not enough: a forked process may have a copy
        with self.lock:
            self.control.close()
        try:
            self.process.wait(5.0)
        except Exception:  # pragma: no cover  # it does nothing that could hang
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
