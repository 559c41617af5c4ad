"""Calls at work: one loop that feeds sandboxes, reads what they say, and ends them at their deadlines."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torchrl_chat.processes import SIZE
from torchrl_chat.sandbox import wire
from torchrl_chat.sandbox.launch import Process, Warden, decode, encode
from torchrl_chat.sandbox.result import Result, Status
from torchrl_chat.sandbox.settings import SandboxError

_START = 60.0  # seconds that a sandbox may take to be ready, on a busy machine
_DYING = 10.0  # seconds that the kernel may take to end one
_PATIENCE = 0.1  # seconds: a call that takes longer gets company
_DRAIN = 16 << 20  # bytes beyond the limit that are read and thrown away, before the writer is stopped
_IN, _OUT = select.POLLIN | select.POLLHUP | select.POLLERR, select.POLLOUT


class Call:
    """One request to one sandbox."""

    def __init__(
        self,
        warden: Warden,
        process: Process,
        kind: str,
        code: str,
        stdin: str | None,
        deadline: float,
        limit: int,
        last: bool,
        opened: Callable[[socket.socket], None] | None = None,
    ):
        self._opened = opened
        self.warden = warden
        self.process = process
        self.deadline = deadline
        self.limit = limit
        self.last = last
        self.made = time.monotonic()
        self.began: float | None = self.made if process.ready else None
        self.ended = 0.0
        self.done = False
        self.alive = True  # whether the sandbox can be used again
        self.begun = False  # whether the code itself has
        self.failure: str | None = None  # why there is no sandbox
        self.reply: dict[str, Any] | None = None
        self.end: dict[str, Any] | None = None
        self.verdict: Status | None = None
        self._killed: float | None = None
        # A reply that is late, or made up, must not pass for that to another call.
        self._token = secrets.token_hex(8)
        self._unsent = memoryview(encode(kind, code, stdin, last, self._token))
        self._texts = {process.out: bytearray(), process.err: bytearray()}
        self._counts = {process.out: 0, process.err: 0}
        self._watched = {process.channel.fileno(), process.status.fileno(), process.out, process.err}
        with contextlib.suppress(OSError):
            while process.ready and process.channel.recv(1 << 16):
                pass  # said unasked, between the calls
        process.buffer.clear()
        with contextlib.suppress(OSError):
            process.status.send(wire.RUN)

    def watched(self) -> Iterator[tuple[int, int]]:
        """The descriptors to wait for, each with its events."""
        channel = self.process.channel.fileno()
        for fd in self._watched:
            yield fd, (_IN | _OUT if fd == channel and self._unsent else _IN)

    def until(self) -> float:
        """When :meth:`tick` has something to do."""
        if self._killed is not None:
            return self._killed + _DYING
        return self.made + _START if self.began is None else self.began + self.deadline

    def tick(self, now: float) -> None:
        """End what has taken too long."""
        if self.done or now < self.until():
            return
        if self._killed is not None:  # pragma: no cover  # the kernel is stuck; it has been told
            self._finish(False)
        else:
            self._kill("timeout")

    def handle(self, fd: int, events: int) -> None:
        """Do what a descriptor is ready for."""
        if self.done or fd not in self._watched:
            return
        if fd in self._texts:
            self._read(fd)
        elif fd == self.process.status.fileno():
            self._told()
        else:
            if events & _OUT and self._unsent:
                with contextlib.suppress(OSError):
                    self._unsent = self._unsent[self.process.channel.send(self._unsent) :]
            if events & _IN:
                self._heard()
        if not self._watched:
            self._finish(False)

    def _read(self, fd: int) -> bool:
        """Read some output; whether there was any."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._watched.discard(fd)
            return False
        text = self._texts[fd]
        text += data[: max(0, self.limit - len(text))]
        self._counts[fd] += len(data)
        if self._counts[fd] > self.limit + _DRAIN:
            self._kill("output")
        return True

    def _told(self) -> None:
        """The keeper has a door, says how it ended, or has been killed."""
        handed: list[int] = []
        data = _received(self.process.status, handed)
        for fd in handed:
            listener = socket.socket(fileno=fd)
            if self._opened is None:
                listener.close()
            else:
                self._opened(listener)
        if data is None:
            return
        if data:
            self.end = None if handed else decode(data)
            return
        self._watched.discard(self.process.status.fileno())

    def _heard(self) -> None:
        """The interpreter says something; it may be anything."""
        channel, buffer = self.process.channel, self.process.buffer
        data = _received(channel)
        if data is None:
            return
        if not data:
            self._watched.discard(channel.fileno())
            self._unsent = memoryview(b"")
            return
        if self._killed is not None:
            return
        buffer += data
        while not self.done and len(buffer) >= SIZE.size:
            size = SIZE.unpack_from(buffer)[0]
            if size > wire.most(self.limit):
                self._kill("crash")
                return
            if len(buffer) < SIZE.size + size:
                return
            message = decode(buffer[SIZE.size : SIZE.size + size])
            del buffer[: SIZE.size + size]
            self._take(message)

    def _take(self, message: dict[str, Any] | None) -> None:
        if not self.process.ready:  # until then only our own code has run there
            if message is None or not message.get("ready"):
                self.failure = str((message or {}).get("failure"))
                self._kill("crash")
                return
            self.process.ready = True
            self.began = time.monotonic()
        elif message is not None and message.get("begun") is True and message.get("token") == self._token:
            self.begun = True
        elif self.reply is None and (reply := _checked(message, self._token, self.limit, self.begun)):
            self.reply = reply
            if not self.last:
                self._finish(not self._unsent)
        elif not self.last:
            self._kill("crash")

    def _kill(self, verdict: Status) -> None:
        if self._killed is None:
            self.verdict = verdict
            self._killed = time.monotonic()
            self.warden.kill(self.process)

    def _finish(self, alive: bool) -> None:
        self.done, self.alive, self.ended = True, alive, time.monotonic()
        for fd in self._texts:
            while self._killed is None and fd in self._watched and self._read(fd):
                pass  # what is in the pipe was written before the reply
        if self._killed is not None:  # it wrote without end even then
            self.alive = False
        if alive and self.alive:
            with contextlib.suppress(OSError):
                self.process.status.send(wire.HOLD)
        else:
            self.process.close()

    def result(self, session: bool = False) -> Result:
        """What came of it.

        Raises:
            SandboxError: the sandbox could not be built.
        """
        out, err = (bytes(self._texts[fd]) for fd in self._texts)
        if self.began is None:
            reason = self.failure or (self.end or {}).get("failure")
            reason = reason or "it ended, or took too long, before it was ready"
            raise SandboxError(f"the sandbox cannot be built: {reason}")
        status, error, code = self._outcome()
        if not self.begun and status != "not_run":
            status, code = "not_run", None
            error = f"It was not run; its code or its input may be too long. {error}".rstrip()
        value = self.reply["value"] if self.reply and status == "ok" else None
        lost = session and not self.alive
        if lost:
            error = f"{error} The session's variables are lost.".lstrip()
        return Result(
            status=status,
            stdout=out.decode("utf-8", "replace"),
            stderr=err.decode("utf-8", "replace"),
            value=value,
            error=error,
            seconds=self.ended - self.began,
            truncated=any(count > self.limit for count in self._counts.values()),
            exit_status=code,
            state_lost=lost,
        )

    def _outcome(self) -> tuple[Status, str, int | None]:
        end = self.end or {}
        if end.get("stopped") == "memory":
            return "memory", "Memory limit: its processes together took more memory than they may have.", None
        if end.get("stopped") == "awake":
            return "crash", "Crash: it went on between the calls of its session, and was stopped.", None
        if end.get("stopped") == "cpu":
            return (
                "cpu",
                "Processor limit: its processes together took more processor time than they may have.",
                None,
            )
        if self.verdict == "timeout":
            return "timeout", f"Timeout: it was stopped after {self.deadline:g} seconds.", None
        if self.verdict == "output":
            return "output", "Output limit: it did not stop writing and was stopped.", None
        if self.verdict == "crash":
            return "crash", "Crash: it broke the interpreter's channel and was stopped.", None
        if self.reply is not None:
            reply = self.reply
            if reply["status"] == "not_run":
                return "not_run", f"It was not run: {reply['error']}", None
            return reply["status"], reply["error"], reply["exit"]
        if "signal" in end:
            return "crash", f"Crash: the interpreter was ended by signal {end['signal']}.", None
        if end.get("exit") == 0:
            return "ok", "", 0
        if "exit" in end:
            return "exit", f"The interpreter was ended with exit status {end['exit']}.", end["exit"]
        return "crash", "Crash: the sandbox ended without a word.", None


def _received(sock: socket.socket, handed: list[int] | None = None) -> bytes | None:
    """What there is to read: empty at the end, ``None`` if nothing yet; a descriptor that came with it is added to ``handed``."""
    for _ in range(2):
        try:
            if handed is None:
                return sock.recv(1 << 16)
            data, fds, *_ = socket.recv_fds(sock, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
            handed += fds
            return data
        except BlockingIOError:
            return None
        except ConnectionResetError:
            pass  # the other end closed with something unread; what it said before can be read after this
        except OSError:
            break
    return b""


def _checked(message: dict[str, Any] | None, token: str, limit: int, begun: bool) -> dict[str, Any] | None:
    """A reply in its bounds, whatever the other side made of it; ``None`` if it is none.

    Args:
        message: what was said.
        token: that of the call.
        limit: characters that its texts may have.
        begun: whether the code has; what has begun was run.
    """
    if message is None or message.get("token") != token:
        return None
    status, error, value, code = (message.get(name) for name in ("status", "error", "value", "exit"))
    if type(code) is not int or not isinstance(error, str) or not isinstance(value, (str, type(None))):
        return None
    if status == "not_run":
        fits = not begun
    else:
        fits = begun and ((status == "ok" and code == 0) or (status in ("error", "exit") and 0 < code <= 255))
    if not fits:
        return None
    return {
        "status": status,
        "exit": code,
        "error": _clean(wire.cut(error, limit)) if status != "ok" else "",
        "value": None if value is None else _clean(wire.cut(value, limit)),
    }


def _clean(text: str) -> str:
    """Without lone surrogates, which nothing can write."""
    return text.encode("utf-8", "replace").decode()


def drive(calls: Iterator[Call], workers: int, spare: int) -> None:
    """Carry calls out: ``workers`` at a time, and ``spare`` more while some take long.

    The iterator launches a call when it is asked for the next one.
    """
    active: list[Call] = []
    owners: dict[int, Call] = {}
    poll = select.poll()
    masks: dict[int, int] = {}
    try:
        more = True
        while True:
            now = time.monotonic()
            slow = sum(call.began is not None and now - call.began > _PATIENCE for call in active)
            while more and len(active) < workers + min(slow, spare):
                call = next(calls, None)
                if call is None:
                    more = False
                    break
                active.append(call)
            if not active:
                return
            wanted = {fd: (events, call) for call in active for fd, events in call.watched()}
            for fd in masks.keys() - wanted.keys():
                poll.unregister(fd)
            for fd, (events, _) in wanted.items():
                if masks.get(fd) != events:
                    poll.register(fd, events)
            masks = {fd: events for fd, (events, _) in wanted.items()}
            owners = {fd: call for fd, (_, call) in wanted.items()}
            wait = min(call.until() for call in active) - now
            if more:
                wait = min(wait, _PATIENCE)
            for fd, events in poll.poll(max(0.0, wait) * 1000 + 1):
                owners[fd].handle(fd, events)
            now = time.monotonic()
            for call in active:
                call.tick(now)
            ended = [call for call in active if call.done]
            if ended:
                for call in ended:  # its descriptors may be somebody else's already
                    for fd in [fd for fd, owner in owners.items() if owner is call]:
                        poll.unregister(fd)
                        del masks[fd]
                active = [call for call in active if not call.done]
    except BaseException:
        for call in active:
            call.warden.kill(call.process)
            call.process.close()
        raise


def together(calls: Sequence[Call]) -> None:
    """Carry out calls that have all begun."""
    drive(iter(calls), len(calls), 0)
