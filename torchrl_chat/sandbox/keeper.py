"""The keeper: the first process of a sandbox. It runs no foreign code; it watches over those that do.

As process 1 of the PID namespace it takes what daemons leave behind, and when it ends, the kernel ends everything in
there. It counts the memory and the processor time of all processes together, which limits per process do not, stops
everything between the calls of a session, and says how the interpreter ended, over a socket that only it has.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
from typing import Any, NoReturn

from torchrl_chat.sandbox import jail, wire
from torchrl_chat.sandbox.confine import confine, limit
from torchrl_chat.sandbox.settings import Settings

_TICK = 0.04  # seconds between two looks at the sums
_OWN = 48 << 20  # bytes that interpreters bring along and share
_PAGE = resource.getpagesize()
_HERTZ = os.sysconf("SC_CLK_TCK")


def keep(fds: list[int], settings: Settings, root: bool, program: bytes) -> None:
    """Build a sandbox, start its interpreter, and watch.

    Args:
        fds: the interpreter's socket, the keeper's socket, and the pipes for standard output and standard error.
        settings: the limits.
        root: this process is real root.
        program: the seccomp filter.
    """
    isolated = settings.isolation != "none"
    null = os.open("/dev/null", os.O_RDWR)
    jail.close_all([null, fds[2], fds[3], fds[0], fds[1]])
    status = socket.socket(fileno=4)
    every = -1
    try:
        if settings.isolation == "namespaces":
            every = jail.new_sandbox(settings)
        elif isolated:
            every = jail.own_mounts(settings)  # bwrap's have no limit on files, and show more of the machine
        go, ready = os.pipe()
        pid = os.fork()
    except OSError as error:
        _say(status, failure=str(error))
        return
    if pid == 0:
        status.detach()
        os.close(ready)
        if every >= 0:
            os.close(every)
        _start(settings, root, program, go)
    for fd in (1, 2, 3, go):
        os.close(fd)
    if isolated:
        if os.getpid() != 1:  # what is sent to all processes must not leave the namespace
            _say(status, failure="the keeper is not the first process of a PID namespace")
            return
        _drop(root)
    os.write(ready, b"g")
    os.close(ready)
    _watch(status, pid, settings, _Processes(every) if isolated else None)


def _drop(root: bool) -> None:
    from torchrl_chat.sandbox import kernel

    if root:
        jail.become_nobody()  # which takes the capabilities too
    else:
        kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)


def _start(settings: Settings, root: bool, program: bytes, go: int) -> NoReturn:
    """In the forked process: give everything up, and run the interpreter."""
    try:
        os.setsid()
        if not os.read(go, 1):
            return  # type: ignore[misc]  # the keeper has gone; the finally below ends this process
        os.close(go)
        os.close(4)
        channel = socket.socket(fileno=3)
        from torchrl_chat.sandbox.interpreter import serve

        try:
            if settings.isolation == "none":
                _end_with_parent()
                limit(settings)
            else:
                confine(settings, root, program)
        except OSError as error:
            channel.sendall(wire.frame({"ready": False, "failure": str(error)}))
        else:
            serve(channel, settings)
    finally:
        os._exit(0)


def _end_with_parent() -> None:
    with contextlib.suppress(Exception):  # not Linux
        from torchrl_chat.sandbox import kernel

        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(status: socket.socket, **message: Any) -> None:
    with contextlib.suppress(OSError):
        status.send(json.dumps(message).encode())


def _watch(status: socket.socket, pid: int, settings: Settings, processes: _Processes | None) -> None:
    """Obey the caller until the interpreter ends or has to; without isolation there are no processes to count."""
    bell, ring = os.pipe()
    os.set_blocking(ring, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(status, select.POLLIN)
    poll.register(bell, select.POLLIN)
    running, before, end, isolated = False, 0.0, None, processes is not None
    clock = _Clock(processes) if processes is not None else None
    while end is None:
        ready = dict(poll.poll(_TICK * 1000 if running and isolated else None))
        if bell in ready:
            os.read(bell, 4096)
        if status.fileno() in ready:
            try:
                orders = status.recv(16)
            except OSError:
                orders = b""
            if not orders:
                break
            if orders == wire.RUN:
                running, before = True, clock.seconds() if clock is not None else 0.0
                _signal(signal.SIGCONT, pid, isolated)
            else:
                running = False
                _signal(signal.SIGSTOP, pid, isolated)
        end = _reap(pid)
        if end is None and running and processes is not None and clock is not None:
            if settings.cpu is not None and clock.seconds() - before > settings.cpu:
                end = {"stopped": "cpu"}
            elif _memory(processes, settings.memory + _OWN):
                end = {"stopped": "memory"}
    _signal(signal.SIGKILL, pid, isolated)
    with contextlib.suppress(ChildProcessError):
        while True:  # say so only when all have gone
            os.waitpid(-1, 0)
    if end is not None:
        _say(status, **end)


def _signal(number: int, pid: int, isolated: bool) -> None:
    """Send a signal to all processes but this one; without isolation, to the interpreter's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if not isolated:
            os.killpg(pid, number)
        elif os.getpid() == 1:  # anywhere else, -1 would be the whole machine
            os.kill(-1, number)


def _reap(pid: int) -> dict[str, Any] | None:
    """Take leave of processes that have ended; how the interpreter did, if it is among them."""
    end: dict[str, Any] | None = None
    while True:
        try:
            gone, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return end or {"exit": 0}
        if not gone:
            return end
        if gone == pid:
            code = os.waitstatus_to_exitcode(status)
            end = {"exit": code} if code >= 0 else {"signal": -code}


# What reading about a process raises that has just ended. Anything else ends the keeper, and the sandbox with it: limits
# that cannot be looked after do not hold.
_ENDED = (FileNotFoundError, ProcessLookupError, ValueError, IndexError)


class _Processes:
    """What the kernel tells of the sandbox's processes, the keeper's own left out.

    Args:
        proc: a descriptor of a /proc that hides none of them.
    """

    def __init__(self, proc: int) -> None:
        self._proc = proc

    def names(self) -> list[str]:
        """Their numbers, as names."""
        return [name for name in os.listdir(self._proc) if name.isdigit() and name != "1"]

    def read(self, name: str, file: str) -> str:
        """A file of one of them."""
        with open(f"{name}/{file}", opener=lambda path, flags: os.open(path, flags, dir_fd=self._proc)) as opened:
            return opened.read()


class _Clock:
    """Processor time of all processes of the sandbox, those that have ended among them.

    A parent's own figures have the time of the children that it waited for. Of children that nobody waits for they have
    none: their last figures are kept here. Those that were never seen, because they lived for less than a tick, are missed.
    """

    def __init__(self, processes: _Processes) -> None:
        self._processes = processes
        self._last: dict[str, int] = {}
        self._ended = 0

    def seconds(self) -> float:
        """So far."""
        waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
        own, all_told, last = 0, 0, {}
        for name in self._processes.names():
            with contextlib.suppress(*_ENDED):
                times = list(map(int, self._processes.read(name, "stat").rpartition(")")[2].split()[11:15]))
                last[name] = times[0] + times[1]
                own += last[name]
                all_told += sum(times)
        for name, ticks in self._last.items():
            if last.get(name, -1) < ticks:  # it has ended, or its number belongs to another one now
                self._ended += ticks
        self._last = last
        seen = (own + self._ended) / _HERTZ
        return max(waited_for.ru_utime + waited_for.ru_stime + all_told / _HERTZ, seen)


def _memory(processes: _Processes, limit: int) -> bool:
    """Whether all processes together have more than ``limit`` bytes; pages that they share count once."""
    resident: dict[str, int] = {}
    for name in processes.names():
        with contextlib.suppress(*_ENDED):
            resident[name] = int(processes.read(name, "statm").split()[1]) * _PAGE
    if sum(resident.values()) <= limit:
        return False
    return sum(_share(processes, name, size) for name, size in resident.items()) > limit


def _share(processes: _Processes, name: str, resident: int) -> int:
    """A process's part of the memory that it has, in bytes: all of it, where it does not let that be read."""
    try:
        for line in processes.read(name, "smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except (PermissionError, *_ENDED):
        pass
    return resident
