"""The warden: a small process that forks a sandbox for every order, and kills sandboxes.

It is started afresh, with an empty environment, imports the standard modules that programs use, and then lives in
namespaces of its own with nothing of the machine in sight. It reads orders of nine bytes from its socket. Programs
never pass through it: nothing that one left behind could be found in the memory of the next.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from torchrl_chat.processes import serve
from torchrl_chat.sandbox import wire
from torchrl_chat.sandbox.settings import Settings

# What short programs import; the rest is found on the file system when it is asked for.
_PRELOAD = """
abc array ast base64 bisect calendar cmath collections contextlib copy ctypes csv dataclasses datetime
decimal enum fractions functools hashlib heapq inspect io itertools json linecache math numbers operator
pickle queue random re secrets select shutil signal statistics string struct subprocess tempfile textwrap
threading time traceback types typing uuid
"""


def main(fd: int) -> None:
    """Run the warden on its control socket, until that is closed."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN if name == signal.SIGINT else signal.SIG_DFL)
    control = socket.socket(fileno=fd)
    control.set_inheritable(False)  # bwrap has no business with it
    message = wire.receive(control)
    if message is None:
        return
    settings = Settings.from_json(message["settings"])
    sys.path[:] = [*settings.packages, *(p for p in sys.path if p != message["home"])]
    try:
        _preload(settings)
    except Exception as error:
        _refuse(control, f"preload={list(settings.preload)}: {type(error).__name__}: {error}")
    if settings.isolation == "none":
        control.sendall(wire.frame({"ready": True, "landlock": 0, "root": os.geteuid() == 0}))
        _serve(control, _forker(settings, False, b"", -1), message["caller"])
        return
    if settings.isolation == "bubblewrap":
        _serve_bubblewrap(control, settings, message["caller"])
        return
    try:
        from torchrl_chat.sandbox import jail, kernel
        from torchrl_chat.sandbox.filters import sandbox_filter
        from torchrl_chat.sandbox.settings import step

        with step("seccomp", "This package knows the system calls of x86-64 and of 64-bit ARM only."):
            program = sandbox_filter(door=settings.door)
        root = jail.enter(settings.door)
    except OSError as error:
        _refuse(control, str(error))
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    pid = os.fork()
    if pid:
        control.close()
        _wait(pid, message["caller"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        jail.make_root(settings)
    except OSError as error:
        _refuse(control, str(error))
    control.sendall(wire.frame({"ready": True, "landlock": kernel.landlock_version(), "root": root}))
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    _serve(control, _forker(settings, root, program, own))


def _serve_bubblewrap(control: socket.socket, settings: Settings, caller: int) -> None:
    from torchrl_chat.sandbox import bubblewrap, kernel
    from torchrl_chat.sandbox.filters import sandbox_filter
    from torchrl_chat.sandbox.settings import step

    try:
        with step("seccomp", "This package knows the system calls of x86-64 and of 64-bit ARM only."):
            sandbox_filter()
        builder = bubblewrap.Builder(settings)
    except OSError as error:
        _refuse(control, str(error))
    control.sendall(wire.frame({"ready": True, "landlock": kernel.landlock_version(), "root": builder.root}))
    _serve(control, builder.build, caller, bubblewrap.end)


def _refuse(control: socket.socket, reason: str) -> NoReturn:
    control.sendall(wire.frame({"ready": False, "reason": reason}))
    os._exit(1)


def _wait(pid: int, caller: int) -> NoReturn:
    """Outside the new PID namespace: end with the process that is the warden from now on, and end it with the caller.

    The socket alone does not tell that the caller was killed: a process forked from it may have a copy.
    """
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if os.getppid() != caller:
            os.kill(pid, signal.SIGKILL)  # with its namespace, and all sandboxes in that
        signal.sigtimedwait({signal.SIGCHLD}, 0.5)
    os._exit(0)


def _preload(settings: Settings) -> None:
    import encodings.idna
    import encodings.unicode_escape  # noqa: F401

    from torchrl_chat.sandbox import confine, interpreter, keeper  # noqa: F401

    for name in _PRELOAD.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in settings.preload:
        importlib.import_module(name)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _serve(
    control: socket.socket,
    build: Callable[[list[int]], int],
    caller: int = 0,
    end: Callable[[int], None] = _kill,
) -> None:
    """Carry out orders until the caller has gone.

    Args:
        control: where they come from.
        build: starts a sandbox that speaks through these descriptors; returns the process that ends with it.
        caller: the process to end with, where this one can see it.
        end: kills a sandbox, given that process.
    """
    sandboxes: dict[int, int] = {}  # number -> the id of its first process

    def fork(number: int, descriptors: list[int]) -> None:
        try:
            sandboxes[number] = build(descriptors)
        except OSError as error:
            with contextlib.suppress(OSError):
                socket.socket(fileno=os.dup(descriptors[1])).send(
                    b'{"failure": "no process: %s"}' % str(error).encode()
                )

    def kill(number: int) -> None:
        if number in sandboxes:
            end(sandboxes[number])

    def goes_on() -> bool:
        _reap(sandboxes)
        return not caller or os.getppid() == caller

    try:
        serve(control, fork, kill, goes_on)
    finally:
        for pid in sandboxes.values():
            end(pid)


def _forker(settings: Settings, root: bool, program: bytes, own: int) -> Callable[[list[int]], int]:
    """Builds a sandbox by forking this process.

    Args:
        settings: what a sandbox allows.
        root: this process is real root.
        program: the seccomp filter.
        own: a descriptor of this process's PID namespace, or -1 to make none.
    """

    def build(fds: list[int]) -> int:
        pid = _fork(own)
        if pid == 0:
            _keep(fds, settings, root, program)
        return pid

    return build


def _fork(own: int) -> int:
    """Fork a process that is the first one of a PID namespace of its own."""
    if own < 0:
        return os.fork()
    from torchrl_chat.sandbox import kernel

    kernel.unshare(kernel.NEWPID)
    try:
        pid = os.fork()
    except OSError:
        kernel.setns(own, kernel.NEWPID)
        raise
    if pid:
        kernel.setns(own, kernel.NEWPID)  # or there could be no next one
    return pid


def _keep(fds: list[int], settings: Settings, root: bool, program: bytes) -> NoReturn:
    from torchrl_chat.sandbox.keeper import keep

    try:
        keep(fds, settings, root, program)
    finally:
        os._exit(0)


def _reap(sandboxes: dict[int, int]) -> None:
    """Take leave of sandboxes that have ended; until then their ids are nobody else's."""
    while sandboxes:
        try:
            pid: int | Any = os.waitpid(-1, os.WNOHANG)[0]
        except ChildProcessError:
            return
        if not pid:
            return
        for number in [n for n, p in sandboxes.items() if p == pid]:
            del sandboxes[number]
