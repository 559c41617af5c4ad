"""The caller's end of the warden: starts it, orders sandboxes, kills them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from collections import deque
from typing import Any

from torchrl_chat.processes import FORK, KILL, ForkServer, Silent
from torchrl_chat.sandbox import wire
from torchrl_chat.sandbox.settings import SandboxError, Settings

_START = 60.0  # seconds that the warden may take to start, on a busy machine
_BOOT = (
    "import json, socket, sys; s = socket.socket(fileno=int(sys.argv[1])); "
    "n = int.from_bytes(s.recv(4, socket.MSG_WAITALL), 'big'); "
    "sys.path.append(json.loads(s.recv(n, socket.MSG_WAITALL))['home']); s.detach(); "
    "from torchrl_chat.sandbox.warden import main; main(int(sys.argv[1]))"
)


class Process:
    """One sandbox: the near ends of its sockets and pipes."""

    def __init__(self, number: int, channel: socket.socket, status: socket.socket, out: int, err: int):
        self.number = number
        self.channel = channel
        self.status = status
        self.out = out
        self.err = err
        self.ready = False
        self.buffer = bytearray()
        self.open = True

    def unused(self) -> bool:
        """Whether it is there, for one in which nothing runs now: its keeper speaks only when it ends."""
        try:
            self.status.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Let go of it; its keeper ends it then."""
        if self.open:
            self.open = False
            self.channel.close()
            self.status.close()
            os.close(self.out)
            os.close(self.err)

    def __del__(self) -> None:
        self.close()  # a session that was dropped: unlike sockets, descriptors of pipes do not close by themselves


class Warden(ForkServer):
    """The process that forks sandboxes.

    Raises:
        SandboxError: the isolation cannot be had.
    """

    def __init__(self, settings: Settings):
        self._numbers = itertools.count(1)
        self._idle: deque[Process] = deque()  # made ahead of need
        home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        # The interpreter itself, not that of a virtual environment, whose folder is not to be seen inside.
        python = getattr(sys, "_base_executable", None) or sys.executable
        try:
            super().__init__(
                lambda fd: [python, "-I", "-S", "-c", _BOOT, str(fd)],
                stdout=subprocess.DEVNULL,
                env={"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"no warden process can be started: {error}") from error
        self._workspaces = settings.workspaces is not None
        settled = {"home": home, "settings": settings.to_json(), "caller": self.owner}
        try:
            answer = json.loads(self.greet(wire.frame({"home": home}), wire.frame(settled), within=_START))
        except Silent as error:
            answer = {"ready": False, "reason": str(error)}
        if not answer["ready"]:
            self.close()
            raise SandboxError(
                f"isolation={settings.isolation!r} cannot be had: {answer['reason']} Nothing was run. Without any isolation, "
                "at your own risk: isolation='none'."
            )
        self.control.settimeout(None)
        self.landlock: int = answer["landlock"]
        self.root: bool = answer["root"]

    def take(self, ahead: int = 0) -> Process:
        """A sandbox nobody has used: one that was made ahead of need, or a new one.

        Args:
            ahead: how many are to be there for the next calls.

        Raises:
            SandboxError: as :meth:`launch`.
        """
        process = None
        while process is None:
            try:
                process = self._idle.popleft()
            except IndexError:
                process = self.launch()
            else:
                if not process.unused():  # the first to go where the machine runs out of memory
                    process.close()
                    process = None
        while len(self._idle) < ahead:
            self._idle.append(self.launch())
        return process

    def launch(self, workspace: str = "") -> Process:
        """Order a sandbox; it may be spoken to at once.

        Args:
            workspace: the name of its workspace, where there are any.

        Raises:
            SandboxError: the warden has gone, or there can be no more files.
        """
        near: list[Any] = []
        far: list[int] = []
        try:
            for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
                here, there = socket.socketpair(socket.AF_UNIX, kind)
                here.setblocking(False)
                near.append(here)
                far.append(there.detach())
            for _ in range(2):
                read, write = os.pipe()
                os.set_blocking(read, False)
                near.append(read)
                far.append(write)
            number = next(self._numbers)
            if self._workspaces:
                near[1].send((workspace or wire.NOWHERE).encode())
            self.order(FORK, number, far)
        except OSError as error:
            for end in near:
                if isinstance(end, int):
                    os.close(end)
                else:
                    end.close()
            raise SandboxError(f"no sandbox can be started: {error}") from error
        finally:
            for fd in far:
                os.close(fd)
        return Process(number, *near)

    def kill(self, process: Process) -> None:
        """End a sandbox with all its processes, whatever they do."""
        with contextlib.suppress(OSError):
            self.order(KILL, process.number)

    def close(self) -> None:
        """End it with all sandboxes. In a forked copy of the caller: only let go of it."""
        while self._idle:
            self._idle.pop().close()
        super().close()


def encode(kind: str, code: str, stdin: str | None, last: bool, token: str) -> bytes:
    """A request to an interpreter, whose reply shall bear the token."""
    return wire.frame({"kind": kind, "code": code, "stdin": stdin, "last": last, "token": token})


def decode(data: bytes | bytearray) -> dict[str, Any] | None:
    """A message out of a sandbox, or ``None`` if it is not one."""
    try:
        message = json.loads(bytes(data))
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
