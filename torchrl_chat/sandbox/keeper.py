"""The keeper: the first process of a sandbox. It runs no foreign code; it watches over those that do.

As process 1 of the PID namespace it takes what daemons leave behind, and when it ends, the kernel ends everything in
there. It counts the memory and the processor time of all processes together, which limits per process do not, answers for
the calls that a filter cannot judge, stops everything between the calls of a session, and says how the interpreter ended,
over a socket that only it has.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from typing import Any, NoReturn

from torchrl_chat.sandbox import door, jail, wire
from torchrl_chat.sandbox.confine import confine, limit
from torchrl_chat.sandbox.gate import Gate
from torchrl_chat.sandbox.meter import Clock, Memory, Processes
from torchrl_chat.sandbox.settings import Settings

_TICK = 0.04  # seconds between two looks at the sums
_CALM = 0.25  # seconds between them while everything stands still
_SETTLE = 1.0  # seconds to wait at most, on a machine however busy, until all have taken the signal that stops them
_AWAKE = 0.1  # seconds of processor time that a session may take between its calls, before it is ended
_OWN = 48 << 20  # bytes that interpreters bring along and share


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
        workspace = "" if settings.workspaces is None else status.recv(wire.NAME).decode().strip(wire.NOWHERE)
        if settings.isolation == "namespaces":
            every = jail.new_sandbox(settings, workspace)
        elif isolated:
            # bwrap's have no limit on files, and show more of the machine
            every = jail.own_mounts(settings, workspace)
        if settings.door:
            with door.listen() as listener:
                told = json.dumps({"door": [door.HOST, door.PORT]})
                socket.send_fds(status, [told.encode()], [listener.fileno()])
        start, there = socket.socketpair()
        pid = os.fork()
    except OSError as error:
        _say(status, failure=str(error))
        return
    if pid == 0:
        status.detach()
        start.close()
        if every >= 0:
            os.close(every)
        _start(settings, root, program, there)
    there.close()
    for fd in (1, 2, 3):
        os.close(fd)
    if isolated:
        if os.getpid() != 1:  # what is sent to all processes must not leave the namespace
            _say(status, failure="the keeper is not the first process of a PID namespace")
            return
        _drop(root)
    with contextlib.suppress(OSError):  # it has ended: the watch will say so
        start.send(b"g")
    _watch(status, pid, settings, start, Processes(every) if isolated else None)


def _drop(root: bool) -> None:
    from torchrl_chat.sandbox import kernel

    if root:
        jail.become_nobody()  # which takes the capabilities too
    else:
        kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)


def _start(settings: Settings, root: bool, program: bytes, there: socket.socket) -> NoReturn:
    """In the forked process: give everything up, and run the interpreter."""
    try:
        os.setsid()
        if not there.recv(1):
            return  # type: ignore[misc]  # the keeper has gone; the finally below ends this process
        os.close(4)
        channel = socket.socket(fileno=3)
        from torchrl_chat.sandbox.interpreter import serve

        try:
            if settings.isolation == "none":
                _end_with_parent()
                limit(settings)
            else:
                listener = confine(settings, root, program)
                if listener >= 0:
                    socket.send_fds(there, [b"l"], [listener])
                    os.close(listener)
            there.close()
        except OSError as error:
            channel.sendall(wire.frame({"ready": False, "failure": str(error)}))
        else:
            serve(channel, settings)
    finally:
        os._exit(1)


def _end_with_parent() -> None:
    with contextlib.suppress(Exception):  # not Linux
        from torchrl_chat.sandbox import kernel

        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(status: socket.socket, **message: Any) -> None:
    with contextlib.suppress(OSError):
        status.send(json.dumps(message).encode())


def _watch(
    status: socket.socket, pid: int, settings: Settings, start: socket.socket, processes: Processes | None
) -> None:
    """Obey the caller until the interpreter ends or has to; without isolation there are no processes to count."""
    bell, ring = os.pipe()
    os.set_blocking(ring, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    for end_of in (status.fileno(), bell, start.fileno()):
        poll.register(end_of, select.POLLIN)
    isolated, held, gate, end = processes is not None, False, None, None
    watch = _Watch(settings, processes, pid) if processes is not None else None
    while end is None:
        ready = dict(poll.poll(None if watch is None else watch.wait()))
        if bell in ready:
            os.read(bell, 4096)
        if start.fileno() in ready:  # the filter is in force; nothing foreign has run yet
            _, fds, _, _ = socket.recv_fds(start, 1, 1)
            poll.unregister(start)
            start.close()
            if fds and processes is not None:
                gate = Gate(fds[0], processes)
                poll.register(gate.listener, select.POLLIN)
        if gate is not None and (asked := ready.get(gate.listener)):
            if asked & select.POLLIN:
                gate.answer()
            else:  # nobody is left who could ask
                poll.unregister(gate.listener)
        if status.fileno() in ready:
            try:
                orders = status.recv(16)
            except OSError:
                orders = b""
            if not orders:
                break
            running = orders == wire.RUN
            if running and held:
                _settle(pid, processes)
            held = not running
            _signal(signal.SIGCONT if running else signal.SIGSTOP, pid, isolated)
            if gate is not None and running:
                gate.locks = 0
            if watch is not None:
                watch.order(running)
        end = _reap(pid)
        if end is None and watch is not None:
            end = watch.look()
    _signal(signal.SIGKILL, pid, isolated)
    with contextlib.suppress(ChildProcessError):
        while True:  # say so only when all have gone
            os.waitpid(-1, 0)
    if end is not None:
        _say(status, **end)


class _Watch:
    """Looks at the sums from the first call on: often while one runs, and now and then while everything stands still.

    What has been stopped may be continued by another process that was on its way out, or was faster. So between calls
    everything is stopped again at every look, and ended where that does not help.
    """

    def __init__(self, settings: Settings, processes: Processes, pid: int):
        self._settings = settings
        self._pid = pid
        self._clock = Clock(processes)
        self._memory = Memory(processes, settings.memory + _OWN)
        self._running: bool | None = None  # None before the first call, when only our own code has run
        self._due = self._pause = 0.0
        self._since: float | None = None  # the clock when a call began, or at the first look after it
        self._last = 0.0

    def wait(self) -> float | None:
        """Milliseconds until the next look."""
        return None if self._running is None else max(0.0, self._due - time.monotonic()) * 1000

    def order(self, running: bool) -> None:
        """A call begins, or has ended."""
        self._running, self._pause, self._since = running, _TICK, None
        if running and self._settings.cpu is not None:
            self._since = self._clock.seconds()
        self._due = time.monotonic() + _TICK

    def look(self) -> dict[str, Any] | None:
        """If it is time, see whether all is as it should be; else how the sandbox has to end."""
        if self._running is None or time.monotonic() < self._due:
            return None
        end: dict[str, Any] | None = None
        if not self._running:
            _signal(signal.SIGSTOP, self._pid, True)
        now = self._clock.seconds()
        if self._memory.exceeded():
            end = {"stopped": "memory"}
        elif self._running:
            if (
                self._since is not None
                and self._settings.cpu is not None
                and now - self._since > self._settings.cpu
            ):
                end = {"stopped": "cpu"}
        elif self._since is None:
            self._since = now
        elif now - self._since > _AWAKE:
            end = {"stopped": "awake"}
        else:
            self._pause = _TICK if now > self._last else min(2 * self._pause, _CALM)
        self._last = now
        self._due = time.monotonic() + self._pause
        return end


def _signal(number: int, pid: int, isolated: bool) -> None:
    """Send a signal to all processes but this one; without isolation, to the interpreter's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if not isolated:
            os.killpg(pid, number)
        elif os.getpid() == 1:  # anywhere else, -1 would be the whole machine
            os.kill(-1, number)


def _settle(pid: int, processes: Processes | None) -> None:
    """Wait until those that were told to stop have done so, before they are told to go on.

    The next call's code may have begun before the end of the last one was heard of here. A process that is forking when
    it is stopped and continued at once goes on, but its child is born stopped and stays so: Linux passes the one signal on
    to it, and forgets the other.
    """
    late = time.monotonic() + _SETTLE
    while not (_stopped(pid) if processes is None else processes.stopped()) and time.monotonic() < late:
        time.sleep(0.0002)


def _stopped(pid: int) -> bool:
    """Whether our child has stopped with all its threads, or ended."""
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    return True


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
