"""The gate: system calls that wait until the keeper has looked at what a filter cannot see.

A seccomp filter sees numbers only: not which file a descriptor belongs to, nor how many sockets there are already. The
kernel holds these calls (``SECCOMP_RET_USER_NOTIF``) until the keeper has answered:

- Locks (``flock``, ``fcntl``) on files of the scratch folder may be had. On the files of the machine, which are shown
  read-only, they are refused with ``ENOLCK``: they would hold up the host's own programs.
- Pairs of sockets may be made while there are fewer than :data:`SOCKETS`, since the kernel keeps up to 208 KiB of memory for
  each, which belongs to no process; then ``EMFILE``.
- TCP sockets, where there is a door (:mod:`~torchrl_chat.sandbox.door`), are made by the keeper and handed in, as many as pairs.

While a thread waits here, other threads could put another file behind the descriptor. So where a process has several, only
the lock that conflicts with nothing in any case is given, that of a process that is alone in its sandbox with its
``fcntl`` locks, and that one without asking the kernel; other locks are refused there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct

from torchrl_chat.sandbox.door import connection
from torchrl_chat.sandbox.meter import ENDED, Processes
from torchrl_chat.sandbox.syscalls import NUMBERS

ASKED = ("flock", "fcntl", "socketpair", "socket")
"""The calls that are held."""
FCNTL_LOCKS = (6, 7, 37, 38)
"""The commands of ``fcntl`` that take locks: a process's, at once or waiting for it, and an open file's."""
SOCKETS = 256
"""How many sockets there may be in a sandbox: 52 MiB of the kernel's memory at the most; 64 if they are connected to a door."""
LOCKS = 100_000
"""How many locks may be asked for in one call: 24 MiB of the kernel's memory at the most."""

_RECEIVE, _SEND, _HAND_IN = 0xC0502100, 0xC0182101, 0x40182103
_NOTICE = struct.Struct("=QII iIQ 6Q")  # id, process, flags; number, architecture, address, arguments
_ANSWER = struct.Struct("=Qqii")  # id, value, error, flags
_DESCRIPTOR = struct.Struct("=QIIII")  # id, flags, the keeper's number, the new number, its flags
_GO_ON, _AND_ANSWER = 1, 2
_POSIX = FCNTL_LOCKS[:2]


class Gate:
    """Answers for a sandbox.

    Args:
        listener: the descriptor of the filter.
        processes: those of the sandbox.
        scratch: a path in the folder whose files may be locked.
    """

    def __init__(self, listener: int, processes: Processes, scratch: str = "/tmp"):
        self.listener = listener
        self.locks = 0  # asked for since a call began
        self._processes = processes
        self._scratch = os.stat(scratch).st_dev

    def answer(self) -> None:
        """Answer the next call that waits; one whose thread has been killed meanwhile needs none."""
        notice = bytearray(_NOTICE.size)
        with contextlib.suppress(FileNotFoundError, InterruptedError):
            fcntl.ioctl(self.listener, _RECEIVE, notice)
            number, pid, _, call, _, _, first, second, *_ = _NOTICE.unpack(notice)
            error: int | None
            if call in (NUMBERS["socketpair"], NUMBERS["socket"]):
                error = None if self._sockets() < SOCKETS else errno.EMFILE
                if error is None and call == NUMBERS["socket"]:
                    error = self._hand_in(number, second & 0xFFFFFFFF)
                    if error is None:
                        return
            else:
                command = second & 0xFFFFFFFF if call == NUMBERS["fcntl"] else None
                error = self._lock(pid, first & 0xFFFFFFFF, command)
            reply = (number, 0, -(error or 0), _GO_ON if error is None else 0)
            fcntl.ioctl(self.listener, _SEND, _ANSWER.pack(*reply))

    def _hand_in(self, number: int, kind: int) -> int | None:
        """Answer a call with a new TCP socket; an error where that cannot be.

        Raises:
            FileNotFoundError: nobody waits for it any more.
        """
        try:
            with connection(kind) as made:
                flags = os.O_CLOEXEC if kind & socket.SOCK_CLOEXEC else 0
                fcntl.ioctl(self.listener, _HAND_IN, _DESCRIPTOR.pack(number, _AND_ANSWER, made.fileno(), 0, flags))
        except FileNotFoundError:
            raise
        except OSError as error:  # it has as many open files as it may, say
            return error.errno or errno.EMFILE
        return None

    def _sockets(self) -> int:
        """How many sockets there are in the sandbox's network, which no descriptor, however hidden, changes."""
        line = self._processes.read(str(os.getpid()), "net/sockstat").partition("\n")[0]
        return int(line.rpartition(" ")[2])

    def _lock(self, pid: int, fd: int, command: int | None) -> int | None:
        """What to say to a lock: ``None`` to let the kernel decide, 0 for yes, or an error.

        Args:
            pid: the thread that asks.
            fd: its descriptor.
            command: that of ``fcntl``; ``None`` for ``flock``.
        """
        self.locks += 1
        with contextlib.suppress(PermissionError, *ENDED):
            if self.locks <= LOCKS and self._processes.device(str(pid), fd) == self._scratch:
                if self._processes.threads(str(pid)) == 1:
                    return None
                if command in _POSIX and self._processes.alone(str(pid)):
                    return 0
        return errno.ENOLCK
