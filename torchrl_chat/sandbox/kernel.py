"""The kernel's calls that Python's standard library lacks, by ctypes; each raises ``OSError`` when it fails.

Loaded in the processes that build a sandbox, so it imports as little as it can.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from torchrl_chat.sandbox.syscalls import NUMBERS

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SECUREBITS = 1, 4, 24, 28
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47
_SECUREBITS = 0x2F  # a user id of 0 means nothing, a change of it neither, and all that for good
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SET_FILTER, _NEW_LISTENER = 1, 8

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, call: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{call}: {os.strerror(error)}")
    return result


def _syscall(name: str, *arguments: object) -> int:
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(NUMBERS[name]), *values), name)


def unshare(flags: int) -> None:
    """Move this process (for ``NEWPID``: its next child) to new namespaces."""
    _checked(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """Move this process (for ``NEWPID``: its next child) to the namespace of a descriptor."""
    _checked(_libc.setns(fd, kind), "setns")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount ``source`` at ``target``."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    result = _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _checked(result, f"mount {kind or 'bind'} {target}")


def unmount(target: str) -> None:
    """Take the mount at ``target`` out of sight, and all below it."""
    _checked(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount {target}")


def set_mount(target: str, attributes: int, recursive: bool = True, clear: int = 0) -> None:
    """Add attributes to the mount at ``target``, and to all below it; ``clear`` others."""
    attr = struct.pack("=QQQQ", attributes, clear, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    _syscall("mount_setattr", _AT_FDCWD, os.fsencode(target), flags, attr, len(attr))


def pivot_root(new: str, old: str) -> None:
    """Make ``new`` the root, with what was it at ``old``."""
    _syscall("pivot_root", os.fsencode(new), os.fsencode(old))


def set_hostname(name: bytes) -> None:
    """Name the machine, in this namespace."""
    _checked(_libc.sethostname(name, ctypes.c_size_t(len(name))), "sethostname")


def prctl(option: int, *values: int) -> int:
    """Set a property of this process."""
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return _checked(_libc.prctl(option, *padded), f"prctl {option}")


def drop_capabilities() -> None:
    """Give up every capability, and the way back to any."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # the kernel knows no more of them
    prctl(PR_SET_SECUREBITS, _SECUREBITS)
    prctl(PR_CAP_AMBIENT, 4)
    clear_capabilities()


def clear_capabilities() -> None:
    """Give up every capability that this process has now."""
    header = struct.pack("=Ii", 0x20080522, 0)
    _syscall("capset", header, bytes(24))


def set_filter(program: bytes, listen: bool = False) -> int:
    """Install a seccomp filter, for this process and all that it starts; needs no-new-privileges.

    Args:
        program: the filter.
        listen: whether some of its calls wait for an answer, see :mod:`~torchrl_chat.sandbox.gate`.

    Returns:
        the descriptor to answer at; -1 without ``listen``.
    """
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    fd = _syscall("seccomp", _SET_FILTER, _NEW_LISTENER if listen else 0, fprog)
    return fd if listen else -1


def landlock_version() -> int:
    """The version of Landlock's interface; 0 where the kernel has none."""
    try:
        return _syscall("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def landlock(version: int, writable: list[str], port: int | None = None) -> None:
    """Allow this process to read and run files anywhere, to write below ``writable`` only, and no network.

    Args:
        version: of the interface, see :func:`landlock_version`.
        writable: files and folders.
        port: the one TCP port that it may connect to; ``None`` for none.

    Raises:
        OSError: the kernel refused.
    """
    read = 0b1101  # run, read a file, list a folder
    files = (1 << 13) - 1  # version 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):  # move between folders, cut files, control devices
        files |= (1 << bit) if version >= since else 0
    network = 0b11 if version >= 4 else 0  # TCP: bind, connect
    scope = 0b11 if version >= 6 else 0  # abstract UNIX sockets, and signals, of others
    attr = struct.pack("=QQQ", files, network, scope)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _syscall("landlock_create_ruleset", attr, len(attr), 0)
    try:
        for path, rights in [("/", read), *((path, files) for path in writable)]:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                if not os.path.isdir(path):
                    rights &= 0b0000_0000_0000_0111 | (1 << 14) | (1 << 15)
                _syscall("landlock_add_rule", ruleset, 1, struct.pack("=Qi", rights, fd), 0)
            finally:
                os.close(fd)
        if port is not None and network:
            _syscall("landlock_add_rule", ruleset, 2, struct.pack("=QQ", 0b10, port), 0)
        _syscall("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
