"""seccomp filters: programs of the classic BPF machine that the kernel runs at every system call.

The list says what is allowed. What it does not name fails with ``EPERM``; what is newer than the list with ``ENOSYS``,
as it would on an older kernel, so that a C library takes the older way.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence

from torchrl_chat.sandbox import kernel
from torchrl_chat.sandbox.gate import FCNTL_LOCKS
from torchrl_chat.sandbox.syscalls import ALLOWED, AUDIT_ARCH, LAST, NUMBERS

_LOAD, _EQUAL, _GREATER, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_ALLOW, _ASK, _ERRNO, _KILL = 0x7FFF0000, 0x7FC00000, 0x00050000, 0x80000000
_NUMBER, _ARCH = 0, 4  # offsets in what the kernel shows to a filter
_X32 = 0x40000000  # x86's third set of numbers

_NAMESPACES = (
    kernel.NEWNS | kernel.NEWCGROUP | kernel.NEWUTS | kernel.NEWIPC | kernel.NEWUSER | kernel.NEWPID | kernel.NEWNET
)
# isatty and the size of a terminal, bytes to read, close-on-exec, blocking; none that a device driver would answer.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451, 0x5421)
# Descriptors, their flags, who holds a lock, the size of a pipe, seals. Not: a signal when something can be read (it may be one
# that continues a session that stands still), leases (they hold up the host's writers), news of a folder.
_FCNTLS = (0, 1, 2, 3, 4, 5, 36, 1030, 1031, 1032, 1034)
# Death signal, thread names; to read: dumpable, capabilities, no-new-privileges; names of memory areas.
_PRCTLS = (1, 2, 3, 15, 16, 21, 23, 39, 0x53564D41)
_CLONE_FILES, _CLONE_THREAD = 0x400, 0x10000
_AF_UNIX, _AF_INET = 1, 2
_STREAM, _SEQPACKET, _SOCKET_FLAGS = 1, 5, (0, 0x800, 0x80000, 0x80800)  # the flags: non-blocking, close-on-exec
_SOL_SOCKET, _TCP = 1, 6
# What clients set: reuse, broadcast (Go, of every socket), keep-alive, linger, timeouts. Not: sizes of buffers.
_SOCKET_OPTIONS = (2, 6, 9, 13, 20, 21, 66, 67)
_TCP_OPTIONS = (1, 4, 5, 6, 12, 18)  # without delay, keep-alive, quick acknowledgements, a timeout
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
_PRIO_PROCESS = 0


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _argument(index: int) -> bytes:
    return _op(_LOAD, 16 + 8 * index)  # the lower half; both architectures are little-endian


def _fail(error: int) -> bytes:
    return _op(_RETURN, _ERRNO | error)


_PASS = _op(_RETURN, _ALLOW)


def _one_of(index: int, values: Iterable[int], otherwise: bytes, then: bytes = _PASS) -> bytes:
    """The rule that an argument is one of ``values``."""
    return _argument(index) + b"".join(_op(_EQUAL, v, 0, 1) + then for v in values) + otherwise


def _need(index: int, values: Sequence[int], otherwise: bytes) -> bytes:
    """As :func:`_one_of`, but what is allowed goes on behind the rule, to the next."""
    left = range(len(values), 0, -1)
    tests = b"".join(_op(_EQUAL, value, jump, 0) for value, jump in zip(values, left, strict=True))
    return _argument(index) + tests + otherwise


def _where(index: int, value: int, rule: bytes) -> bytes:
    """A rule for calls in which an argument has a value; others go on behind it."""
    return _argument(index) + _op(_EQUAL, value, 0, len(rule) // 8) + rule


def _head() -> bytes:
    """Refuse other sets of numbers, and load the number."""
    return (
        _op(_LOAD, _ARCH)
        + _op(_EQUAL, AUDIT_ARCH, 1, 0)
        + _op(_RETURN, _KILL)
        + _op(_LOAD, _NUMBER)
        + _op(_AT_LEAST, _X32, 0, 1)
        + _fail(errno.EPERM)
    )


def _rule(name: str, rule: bytes) -> bytes:
    return _op(_EQUAL, NUMBERS[name], 0, len(rule) // 8) + rule


def sandbox_filter(gate: bool = True, door: bool = False) -> bytes:
    """The filter for code in a sandbox.

    It may use files, memory, threads, processes, signals and pipes. Refused are, among others, sockets (but for a pair
    of connected ones), namespaces, mounts, changes of user, ptrace and the memory of other processes, System V and
    POSIX shared objects, keys, BPF, io_uring, userfaultfd, performance counters, limits and priorities of other processes,
    timers and descriptors that send a signal of one's choice, leases, and memory that no limit counts: memory files, and
    anonymous memory that is mapped to be shared.

    Args:
        gate: whether somebody answers for the calls of :data:`~torchrl_chat.sandbox.gate.ASKED`, which are refused otherwise:
            locks on files, and pairs of sockets.
        door: whether TCP over IPv4 can be had as well, to connect only; each socket is made by whoever answers at the gate. Pairs
            of datagram sockets cannot then: they could be connected to somebody else.
    """
    ask, no_locks, no_sockets = _op(_RETURN, _ASK), _fail(errno.ENOLCK), _fail(errno.EMFILE)
    rules = {
        "clone": _argument(0)
        + _op(_ANY_BIT, _NAMESPACES, 0, 1)
        + _fail(errno.EPERM)
        # Two processes with one table of descriptors: the gate could not tell what is behind one of them.
        + _op(_ANY_BIT, _CLONE_FILES, 0, 2)
        + _op(_ANY_BIT, _CLONE_THREAD, 1, 0)
        + _fail(errno.EPERM)
        + _PASS,
        "clone3": _fail(
            errno.ENOSYS
        ),  # its flags lie in memory, out of a filter's sight; C libraries fall back to clone
        "memfd_create": _fail(errno.ENOSYS),
        "ioctl": _one_of(1, _IOCTLS, _fail(errno.ENOTTY)),
        "prctl": _one_of(0, _PRCTLS, _fail(errno.EPERM)),
        # Of another process, and the one that watches over the limits is of the same user.
        "prlimit64": _one_of(0, (0,), _fail(errno.EPERM)),
        "sched_setaffinity": _one_of(0, (0,), _fail(errno.EPERM)),
        "setpriority": _argument(0)
        + _op(_EQUAL, _PRIO_PROCESS, 1, 0)
        + _fail(errno.EPERM)
        + _one_of(1, (0,), _fail(errno.EPERM)),
        # Such memory stays when nobody maps it any more, where no count of a process's memory shows it.
        "mmap": _argument(3)
        + _op(_ANY_BIT, _MAP_ANONYMOUS, 0, 2)
        + _op(_ANY_BIT, _MAP_SHARED, 0, 1)
        + _fail(errno.EPERM)
        + _PASS,
        "flock": ask if gate else no_locks,
        "fcntl": _one_of(1, _FCNTLS, b"") + _one_of(1, FCNTL_LOCKS, _fail(errno.EPERM), ask if gate else no_locks),
        "socketpair": _one_of(0, (_AF_UNIX,), _fail(errno.EAFNOSUPPORT), ask if gate else no_sockets),
    }
    for name in ("setxattr", "lsetxattr", "fsetxattr"):
        rules[name] = _fail(
            errno.ENOTSUP
        )  # as the scratch file system would say, mostly; copying files goes on then
    if door:
        fail, made = _fail(errno.EAFNOSUPPORT), ask if gate else no_sockets
        streams = [_STREAM | flags for flags in _SOCKET_FLAGS]
        packets = [_SEQPACKET | flags for flags in _SOCKET_FLAGS]
        rules["socket"] = _need(0, (_AF_INET,), fail) + _need(1, streams, fail) + _need(2, (0, _TCP), fail) + made
        rules["socketpair"] = _need(0, (_AF_UNIX,), fail) + _need(1, streams + packets, fail) + made
        rules["connect"] = _PASS
        unknown = _fail(errno.ENOPROTOOPT)
        rules["setsockopt"] = (
            _where(1, _SOL_SOCKET, _one_of(2, _SOCKET_OPTIONS, unknown))
            + _where(1, _TCP, _one_of(2, _TCP_OPTIONS, unknown))
            + unknown
        )
    program = _head() + b"".join(_rule(name, rule) for name, rule in rules.items())
    for first, last in _ranges(ALLOWED.values()):
        program += _op(_AT_LEAST, first, 0, 2) + _op(_GREATER, last, 1, 0) + _PASS
    return program + _op(_GREATER, LAST, 0, 1) + _fail(errno.ENOSYS) + _fail(errno.EPERM)


def refusing(names: Iterable[str], error: int = errno.EPERM) -> bytes:
    """A filter that refuses some calls and allows all others: a kernel that lacks something, for tests."""
    return _head() + b"".join(_rule(name, _fail(error)) for name in names) + _PASS


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as ranges without gaps, lowest first."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
