"""``Sandbox``: runs code that nobody trusts, and ``Session``: one that keeps its variables."""

from __future__ import annotations

import os
import socket
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torchrl_chat.sandbox.calls import Call, drive, together
from torchrl_chat.sandbox.commands import Command, as_told, folder_of, shown
from torchrl_chat.sandbox.isolation import Isolation
from torchrl_chat.sandbox.launch import Process, Warden
from torchrl_chat.sandbox.result import Result
from torchrl_chat.sandbox.settings import SandboxError, Settings


class Sandbox:
    """Runs Python programs, and shell commands on request, in isolation by the Linux kernel.

    Every call has a sandbox of its own, made for it and gone after it: its own processes, users, mounts, network (none),
    shared memory and scratch folder ``/tmp``, which is also its home. Of the machine it sees the interpreter and its
    libraries, read-only. It has no rights, a list of allowed system calls, and the limits below. Neither Docker nor root
    is needed; started by root, the code runs as nobody. What cannot be had is an error, never a weaker isolation.

    Not covered: faults of the kernel itself and of the processor. The code can spoil its own result, and in a session later
    ones. Memory that the kernel keeps beside a process's own comes on top of ``memory`` and ``scratch``; with the limits below
    as they are, measured on Linux 6.18: watches of ``epoll`` 190 MiB (less with fewer ``processes`` and ``files``), files of
    the scratch folder 16 MiB, stacks 11 MiB; by the sizes of the kernel's objects: full pipes 120 MiB, full sockets 52 MiB (80 with a door),
    locks 24 MiB. Page tables and mappings count to ``memory``.

    Locks can be had on files of the scratch folder only, and no timer sends a signal but ``SIGALRM`` and its kin.

    May be used from several threads, and pickled (the copy starts processes of its own). All processes end with
    :meth:`close`, with the object, and with the process that made it.

    Args:
        isolation: ``"namespaces"``; ``"bubblewrap"``: the namespaces and mounts are made by the program ``bwrap`` (Debian
            package ``bubblewrap``), which is slower; or ``"none"``: the same without isolation, as the same user; it
            warns.
        deadline: seconds of wall time for one call.
        cpu: seconds of processor time for all processes of one call together, those left out that live for less than some
            hundredths of a second and are not waited for. Defaults to no limit but what the deadline allows.
        memory: bytes that all processes of a sandbox together may take beyond the interpreter's own (about 48 MiB).
            A single process gets a ``MemoryError`` there; several are killed, some hundredths of a second later.
        scratch: bytes of the scratch folder, in memory, on top of ``memory``.
        processes: how many processes and threads there may be.
        files: how many open files a process may have.
        output: bytes that are kept of each output stream; a writer that goes on for 16 MiB more is stopped.
        allow_shell: whether there are a shell and programs: :meth:`shell`, ``os.system``, ``subprocess``.
        packages: folders of third-party packages that may be imported, such as ``site-packages``; read-only.
        preload: modules that are imported once, before any call, rather than in every call.
        show: more files and folders of the machine to be seen, read-only, at their own paths: the virtual environment of a program, say (the
            Python that it refers to is shown, too).
        door: whether its network has a door: a port of its own loopback at which the caller listens, and nothing else; for
            :meth:`command`. Off by default: no sockets then.
        workspaces: a folder with folders for :meth:`command`, in which what a program writes is kept. How much that is has no limit but that
            of each file, ``scratch``.
        workers: how many calls :meth:`run_many` runs at a time. Defaults to the cores that this process may use.
        spare: how many more it runs while some take long. Each may take ``memory``.
        ahead: how many sandboxes are made ahead of need, so that a call need not wait for one to be built.

    Raises:
        ValueError: an argument makes no sense.
        SandboxError: at first use: the isolation cannot be had here; the text says why, and what to do.

    Example:
        >>> from torchrl_chat.sandbox import Sandbox
        >>> with Sandbox(deadline=5) as box:
        ...     print(box.run("print(1 + 1)").stdout, end="")
        2
    """

    def __init__(
        self,
        isolation: str = "namespaces",
        *,
        deadline: float = 10.0,
        cpu: float | None = None,
        memory: int = 512 << 20,
        scratch: int = 64 << 20,
        processes: int = 64,
        files: int = 256,
        output: int = 64 << 10,
        allow_shell: bool = False,
        packages: Sequence[str | os.PathLike[str]] = (),
        preload: Sequence[str] = (),
        show: Sequence[str | os.PathLike[str]] = (),
        door: bool = False,
        workspaces: str | os.PathLike[str] | None = None,
        workers: int | None = None,
        spare: int = 32,
        ahead: int = 2,
    ):
        if isinstance(packages, str) or isinstance(preload, str) or isinstance(show, str):
            raise ValueError("packages, preload and show: expected lists of texts, not a text.")
        folders = tuple(os.path.realpath(path) for path in packages)
        for path in folders:
            if not os.path.isdir(path):
                raise ValueError(f"packages: {path!r} is not a folder.")
        self.settings = Settings(
            isolation,
            deadline,
            cpu,
            memory,
            scratch,
            processes,
            files,
            output,
            allow_shell,
            folders,
            tuple(preload),
            tuple(map(shown, show)),
            door,
            None if workspaces is None else folder_of(workspaces),
        )
        if (workers is not None and workers < 1) or spare < 0 or ahead < 0:
            raise ValueError(f"workers={workers}, spare={spare}, ahead={ahead}: expected at least 1, 0 and 0.")
        self.workers = workers or _cores()
        self.spare = spare
        self.ahead = 0 if door else ahead  # a door is opened as its sandbox is made
        if isolation == "none":
            warnings.warn(
                "isolation='none': code runs as this user, with all that this user may read, write and reach.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._reset()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._warden: Warden | None = None
        self._finalizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "workers": self.workers, "spare": self.spare, "ahead": self.ahead}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __enter__(self) -> Sandbox:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Sandbox:
        """Start the processes now rather than at first use, and build a sandbox to see that it can be done.

        Raises:
            SandboxError: the isolation cannot be had.
        """
        self.run("", 60.0)
        return self

    @property
    def running(self) -> bool:
        """Whether its processes have been started, and live."""
        return self._owner == os.getpid() and self._warden is not None and self._warden.alive()

    def warden(self) -> Warden:
        """The process that makes sandboxes; started if there is none."""
        if self._owner != os.getpid():  # in a forked copy of the caller
            if self._finalizer is not None:
                self._finalizer()
            self._reset()
        with self._lock:
            if self._warden is None or not self._warden.alive():
                if self._finalizer is not None:
                    self._finalizer()
                self._warden = Warden(self.settings)
                self._finalizer = weakref.finalize(self, self._warden.close)
            return self._warden

    def close(self) -> None:
        """End all processes, those of sessions too; it starts anew if it is used again."""
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()
            self._warden = self._finalizer = None

    @property
    def isolation(self) -> Isolation:
        """The isolation in force, mechanism by mechanism."""
        warden = self.warden()
        return Isolation.of(self.settings, warden.root, warden.landlock)

    def run(self, code: str, deadline: float | None = None, *, stdin: str | None = None) -> Result:
        """Run a program in a fresh sandbox.

        ``CodeVerifier(box.run)`` takes this method as its runner.

        Args:
            code: the program.
            deadline: seconds for this call. Defaults to the sandbox's.
            stdin: its standard input. Defaults to none: ``input()`` raises an ``EOFError`` that says so.

        Raises:
            SandboxError: no sandbox could be built.
        """
        return self._run_all("python", [code], deadline, stdin, 1, 0)[0]

    def run_many(
        self, codes: Sequence[str], deadline: float | None = None, *, stdin: str | None = None
    ) -> list[Result]:
        """Run programs side by side, each in a fresh sandbox.

        Returns:
            their results, in order; ``not_run`` for one whose sandbox could not be built.

        Raises:
            SandboxError: none of them could be built.
        """
        return self._run_all("python", list(codes), deadline, stdin, self.workers, self.spare)

    def shell(self, command: str, deadline: float | None = None, *, stdin: str | None = None) -> Result:
        """Run a command of ``/bin/sh`` in a fresh sandbox.

        Raises:
            SandboxError: the sandbox has no shell (``allow_shell=True`` gives it one), or could not be built.
        """
        self.need_shell()
        return self._run_all("shell", [command], deadline, stdin, 1, 0)[0]

    def need_shell(self) -> None:
        """Check that commands are allowed.

        Raises:
            SandboxError: they are not.
        """
        if not self.settings.allow_shell:
            raise SandboxError("this sandbox has no shell: make it with Sandbox(..., allow_shell=True).")

    def command(
        self,
        words: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdin: str | None = None,
        deadline: float | None = None,
        workspace: str = "",
        opened: Callable[[socket.socket], None] | None = None,
    ) -> Command:
        """A program in a fresh sandbox, to be run: ``box.command(["ls", "-l"]).run()``.

        Args:
            words: the program and its arguments.

        Keyword Args:
            environment: environment variables besides ``PATH``, ``HOME``, ``TMPDIR`` and ``LANG``; none of this process's own are handed on.
            stdin, deadline: as for :meth:`run`.
            workspace: the name of a folder in ``workspaces``, which is there as ``/workspace``, to be written to, and where the program
                starts; it has to be there, and to belong to nobody (65534) if root is the caller. Without one it starts in ``/tmp``.
            opened: called with the socket that listens at the sandbox's door (:mod:`torchrl_chat.sandbox.door`), before the program
                starts; it is the function's to close. ``None``: nobody listens there.

        Raises:
            SandboxError: the sandbox has no shell, there is no door to be opened, or no such workspace, or it could not be started.
        """
        self.need_shell()
        if opened is not None and not self.settings.door:
            raise SandboxError("this sandbox has no door: make it with Sandbox(..., door=True).")
        told = as_told(words, environment or {}, self.settings.workspaces, workspace)
        seconds = check_deadline(deadline, self.settings)
        return Command(self.warden(), workspace, told, stdin, seconds, self.settings.output, opened)

    def session(self) -> Session:
        """A session, whose variables live on from call to call.

        Raises:
            SandboxError: the sandbox has a door, which is for commands.
        """
        if self.settings.door:
            raise SandboxError("a sandbox with a door is for commands: make one without for sessions.")
        return Session(self)

    def _run_all(
        self, kind: str, codes: list[str], deadline: float | None, stdin: str | None, workers: int, spare: int
    ) -> list[Result]:
        for code in codes:
            if not isinstance(code, str):
                raise TypeError(f"expected the code as a text, got {code!r:.60} ({type(code).__name__}).")
        warden, seconds, calls = self.warden(), check_deadline(deadline, self.settings), []
        ahead = self.ahead if len(codes) == 1 else 0  # many calls at once keep the warden busy as it is

        def launch() -> Iterator[Call]:
            for code in codes:
                output = self.settings.output
                call = Call(warden, warden.take(ahead), kind, code, stdin, seconds, output, last=True)
                calls.append(call)
                yield call

        drive(launch(), workers, spare)
        results, failed = [], None
        for call in calls:
            try:
                results.append(call.result())
            except SandboxError as error:  # the others are not lost for it
                failed = error
                results.append(Result("not_run", error=f"It was not run: {error}"))
        if failed is not None and all(call.began is None for call in calls):
            raise failed
        return results


class Session:
    """Code runs in it call after call, in one interpreter: variables, functions and files live on.

    Exceptions and ``sys.exit`` do not end it. A call that is killed does: it says so, and so does the next one, which
    starts without variables. Between calls all its processes stand still; a session that will not, or takes more memory than it
    may, is ended then, and the next call says so. One call at a time: others wait.
    """

    def __init__(self, box: Sandbox):
        self.box = box
        self._lock = threading.Lock()
        self._process: Process | None = None
        self._warden: Warden | None = None
        self._lost = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()

    def run(self, code: str, deadline: float | None = None, *, stdin: str | None = None) -> Result:
        """Run a piece of code; the arguments are those of :meth:`Sandbox.run`."""
        if not isinstance(code, str):
            raise TypeError(f"expected the code as a text, got {code!r:.60} ({type(code).__name__}).")
        return self._run("python", code, deadline, stdin)

    def shell(self, command: str, deadline: float | None = None, *, stdin: str | None = None) -> Result:
        """Run a command of ``/bin/sh`` among the session's files."""
        self.box.need_shell()
        return self._run("shell", command, deadline, stdin)

    def reset(self) -> None:
        """Forget everything; the next call starts afresh."""
        with self._lock:
            self._end()
            self._lost = False

    def _end(self) -> None:
        if self._process is not None and self._warden is not None and self._process.open:
            self._warden.kill(self._process)
            self._process.close()
        self._process = None

    def _run(self, kind: str, code: str, deadline: float | None, stdin: str | None) -> Result:
        settings = self.box.settings
        seconds = check_deadline(deadline, settings)
        with self._lock:
            warden = self.box.warden()
            if warden is not self._warden:
                self._lost |= self._process is not None
                self._process, self._warden = None, warden
            if self._process is not None and not self._process.unused():  # its keeper had to end it meanwhile
                self._process.close()
                self._process, self._lost = None, True
            lost, self._lost = self._lost, False
            if self._process is None:
                self._process = warden.take(self.box.ahead)
            call = Call(warden, self._process, kind, code, stdin, seconds, settings.output, last=False)
            try:
                together([call])
                result = call.result(session=True)
            except BaseException:
                self._process, self._lost = None, True
                raise
            if not call.alive:
                self._process, self._lost = None, True
        if lost:
            text = "The session was started anew: the variables of earlier calls are lost."
            result = Result(**{**result.__dict__, "notice": text})
        return result


def check_deadline(deadline: float | None, settings: Settings) -> float:
    """The deadline of a call.

    Raises:
        ValueError: it is not positive.
    """
    if deadline is None:
        return settings.deadline
    if not deadline > 0:
        raise ValueError(f"deadline={deadline}: expected a positive number of seconds.")
    return float(deadline)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
