"""Sandboxes built by bubblewrap (https://github.com/containers/bubblewrap), for those who want its audited set-up.

``bwrap`` makes the namespaces and the root file system, one process tree a call; what goes on inside is the same keeper and the same
interpreter, with the same limits, Landlock and seccomp. A call takes longer than with our own namespaces, since an
interpreter has to start in each: :class:`~torchrl_chat.sandbox.Sandbox` makes some ahead of need.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from typing import NoReturn

from torchrl_chat.sandbox import jail
from torchrl_chat.sandbox.settings import WORKSPACE, Missing, Settings

_HINT = (
    "Install it (Debian and Ubuntu: apt install bubblewrap; Fedora: dnf install bubblewrap; Arch: pacman -S bubblewrap), "
    "or use isolation='namespaces', which needs no program."
)
PROGRAM = "bwrap"
_PACKAGE = "/opt/torchrl_chat"  # where the sandbox's own modules are to be found inside
_BOOT = (
    "import sys; sys.path.append('/opt'); from torchrl_chat.sandbox.bubblewrap import inside; inside(*sys.argv[1:])"
)
_NAMESPACES = ("ipc", "pid", "net", "uts", "cgroup")
_TO_BEGIN = ("CAP_SYS_ADMIN", "CAP_SETPCAP")  # for mounts of its own, and to give up all rights for good
_TO_LEAVE_ROOT = ("CAP_SETUID", "CAP_SETGID")


class Builder:
    """Starts sandboxes with ``bwrap``. Root builds them without a user namespace; the keeper becomes nobody inside.

    Raises:
        Missing: there is no ``bwrap``, or it cannot build a sandbox here.
    """

    def __init__(self, settings: Settings):
        program = shutil.which(PROGRAM, path=f"/usr/bin:/bin:/usr/local/bin:{os.environ.get('PATH', '')}")
        if program is None:
            raise Missing("bubblewrap", f"no program {PROGRAM!r} is installed", _HINT)
        self.root = os.geteuid() == 0
        self._command = [program, *_arguments(settings, self.root)]
        self._settings = settings.to_json()
        self._files = jail.own_files(settings)
        tried = subprocess.run(
            [*self._command, "--", sys.executable, "-I", "-S", "-c", "pass"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        if tried.returncode:
            said = tried.stderr.decode("utf-8", "replace").strip() or f"exit status {tried.returncode}"
            raise Missing("bubblewrap", said, jail._USER_HINT)

    def build(self, fds: list[int]) -> int:
        """Start a sandbox.

        Args:
            fds: what its keeper speaks through, as in :func:`~torchrl_chat.sandbox.keeper.keep`.

        Returns:
            the id of the process whose end ends the sandbox.
        """
        files: list[int] = []
        extra: list[str] = []
        for path, text in self._files.items():
            end, begin = os.pipe()
            os.write(begin, text.encode())
            os.close(begin)
            files.append(end)
            extra += ["--perms", "0644", "--ro-bind-data", str(end), path]
        started = [sys.executable, "-I", "-S", "-c", _BOOT, self._settings, *map(str, fds)]
        command = [*self._command, *extra, "--remount-ro", "/", "--as-pid-1", "--", *started]
        pid = os.fork()
        if pid:
            for fd in files:
                os.close(fd)
            return pid
        try:
            for fd in [*files, *fds]:
                os.set_inheritable(fd, True)
            null = os.open("/dev/null", os.O_RDWR)
            for standard in (0, 1, 2):
                os.dup2(null, standard)
            os.execv(command[0], command)
        finally:
            os._exit(1)


def end(pid: int) -> None:
    """Kill what runs in a sandbox; ``bwrap``, its parent, then takes leave of it and ends.

    Killing ``bwrap`` instead would leave it alive where it has another user, whom ``bwrap`` may not signal.
    """
    inner: list[str] = []
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as children:
        inner = children.read().split()
    for victim in [int(name) for name in inner] or [pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def inside(settings: str, *fds: str) -> NoReturn:
    """The first process of the new PID namespace: the keeper."""
    import importlib

    from torchrl_chat.sandbox import keeper
    from torchrl_chat.sandbox.filters import sandbox_filter

    limits = Settings.from_json(settings)
    sys.path[:] = [*limits.packages, *(path for path in sys.path if path != "/opt")]
    for name in limits.preload:
        importlib.import_module(name)
    try:
        keeper.keep(list(map(int, fds)), limits, os.geteuid() == 0, sandbox_filter(door=limits.door))
    finally:
        os._exit(0)


def _arguments(settings: Settings, root: bool) -> list[str]:
    """What ``bwrap`` is to build: everything but the file system's last touches."""
    spaces = [*(f"--unshare-{name}" for name in _NAMESPACES), "--hostname", "sandbox"]
    spaces += ["--cap-drop", "ALL"]
    for capability in (*_TO_BEGIN, *(_TO_LEAVE_ROOT if root else ())):
        spaces += ["--cap-add", capability]
    if not root:
        spaces += ["--unshare-user", "--uid", str(jail.INSIDE), "--gid", str(jail.INSIDE)]
    binds: list[str] = []
    shown: set[str] = set()
    for path in ["/dev/", "/etc/", f"{_PACKAGE}/", *jail.visible_paths(settings)]:
        _show(path, binds, shown)
    here = os.path.dirname(os.path.abspath(__file__))
    for name in ("__init__.py", "_lazy.py", "processes.py", "sandbox"):
        binds += ["--ro-bind", os.path.join(os.path.dirname(here), name), f"{_PACKAGE}/{name}"]
    if settings.workspaces is not None:
        binds += ["--perms", "0755", "--dir", WORKSPACE, "--bind", settings.workspaces, jail.WORKSPACES]
    for name, device in jail.DEVICES.items():
        binds += ["--dev-bind", f"/dev/{device}", f"/dev/{name}"]
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        binds += ["--symlink", f"/proc/self/{target}", f"/dev/{name}"]
    places = ["--perms", "0755", "--dir", "/tmp", "--symlink", "/tmp", "/dev/shm", "--proc", "/proc"]
    return [*spaces, "--die-with-parent", "--new-session", *binds, *places]


def _show(path: str, binds: list[str], shown: set[str]) -> None:
    """Bind a path, read-only, and make the folders and symbolic links on the way to it.

    Args:
        path: an absolute path; with a slash at its end, a new folder, empty.
        binds: the arguments of ``bwrap``, added to.
        shown: the paths that are there already, added to.
    """
    at = ""
    names = path.split("/")[1:]
    for name in names[:-1]:
        at += f"/{name}"
        if os.path.islink(at):
            target = os.readlink(at)
            if at not in shown:
                shown.add(at)
                binds += ["--symlink", target, at]
            _show(os.path.normpath(os.path.join(os.path.dirname(at), target)) + path[len(at) :], binds, shown)
            return
        if f"{at}/*" in shown:
            return  # bound, with all that is in it
        if at not in shown:
            shown.add(at)
            # bwrap itself makes them for its owner alone.
            binds += ["--perms", "0755", "--dir", at]
    if not names[-1] or not os.path.lexists(path) or f"{path}/*" in shown:
        return
    if os.path.islink(path):
        target = os.readlink(path)
        if path not in shown:
            binds += ["--symlink", target, path]
        shown.update((path, f"{path}/*"))
        _show(os.path.normpath(os.path.join(os.path.dirname(path), target)), binds, shown)
        return
    # A folder may be there, made because of something in it, which is in what is bound over it.
    shown.update((path, f"{path}/*"))
    binds += ["--ro-bind", path, path]
