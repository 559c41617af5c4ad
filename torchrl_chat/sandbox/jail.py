"""Namespaces and mounts: the part of a machine that a sandbox sees.

Built in two steps. The warden enters namespaces of its own once and makes a read-only root of just what an interpreter
needs there. Each sandbox copies that with its own processes, network, hostname, shared memory and scratch folder: some
tens of system calls, about a millisecond.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from torchrl_chat.sandbox import kernel
from torchrl_chat.sandbox.settings import NOBODY, WORKSPACE, Settings, step

INSIDE = 1000  # who everybody is inside
WORKSPACES = "/workspaces"  # all of them, while a sandbox is built
# What stands in /dev, and the device that it is. The real zero can be mapped, to memory that no limit counts.
DEVICES = {"null": "null", "zero": "full", "full": "full", "random": "random", "urandom": "urandom"}

_USER_HINT = (
    "Ordinary users get it where the sysctl user.max_user_namespaces is above 0 and, where they exist, "
    "kernel.unprivileged_userns_clone is 1 (Debian) and kernel.apparmor_restrict_unprivileged_userns is 0 (Ubuntu). "
    "In a Docker container, start it with --security-opt seccomp=unconfined --security-opt systempaths=unconfined "
    "(and apparmor=unconfined where that is in use)."
)
_MOUNT_HINT = (
    "In a container the runtime may forbid it: with Docker, start it with --security-opt seccomp=unconfined, "
    "--security-opt apparmor=unconfined and --security-opt systempaths=unconfined."
)
_KERNEL_HINT = "It takes Linux 5.14 or newer."
_SPACES_HINT = (
    "The kernel has to be built with all namespaces (CONFIG_NAMESPACES, CONFIG_NET_NS, CONFIG_PID_NS ...)."
)
_SHARED = kernel.NEWNS | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWNET | kernel.NEWCGROUP


def privileged(network: bool = False) -> bool:
    """Whether this process may make namespaces and mounts, and set up a ``network``, without a user namespace of its own."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                capabilities = int(line.split()[1], 16)
                # CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_SYS_ADMIN; CAP_NET_ADMIN
                needed = (6, 7, 8, 21, *([12] if network else []))
                return os.geteuid() == 0 and all(capabilities >> c & 1 for c in needed)
    return False


def enter(network: bool = False) -> bool:
    """Move to namespaces of the warden's own; its next child will be the first process of one.

    Root stays root here where it can, so that what follows is owned by root and not by the code in the sandbox, which
    becomes nobody later. A root without the needed capabilities becomes nobody at once.

    Args:
        network: whether a network is to be set up.

    Returns:
        whether this process is real root.

    Raises:
        Missing: the kernel refused.
    """
    if not sys.platform.startswith("linux"):
        with step(
            "namespaces", "They are the Linux kernel's: use Linux, or a container or virtual machine with it."
        ):
            raise OSError(f"this is {sys.platform}")
    if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) < (5, 14):
        with step("a limit on processes per sandbox", _KERNEL_HINT):
            raise OSError(f"this is Linux {os.uname().release}")
    root = privileged(network)
    if not root:
        if os.geteuid() == 0:
            with step(
                "leaving root", "A root without CAP_SETUID and CAP_SETGID cannot; start as an ordinary user."
            ):
                become_nobody()
        uid, gid = os.geteuid(), os.getegid()
        with step("user namespace", _USER_HINT):
            kernel.unshare(kernel.NEWUSER)
            map_ids(uid, uid, gid, gid)
    with step(
        "mount, PID, network, IPC, UTS and cgroup namespaces",
        _USER_HINT if not root else f"{_SPACES_HINT} {_MOUNT_HINT}",
    ):
        kernel.unshare(_SHARED | kernel.NEWPID)
    return root


def become_nobody() -> None:
    """Give up root and its groups, for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # or /proc/self belongs to root, and no user namespace can be mapped


def map_ids(inside_uid: int, uid: int, inside_gid: int, gid: int) -> None:
    """In a new user namespace: one user and one group, and no others."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside_uid} {uid} 1"),
        ("gid_map", f"{inside_gid} {gid} 1"),
    ):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def make_root(settings: Settings) -> None:
    """Make the read-only root and move there; nothing else of the file system is left.

    Raises:
        Missing: the kernel refused.
    """
    paths = visible_paths(settings)
    with step("a private root file system", _MOUNT_HINT):
        kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID, "size=1m,mode=755")
        os.mkdir("/tmp/.old")
        os.chdir("/tmp")
        kernel.pivot_root("/tmp", "/tmp/.old")
        os.chdir("/")
        for folder in ("/tmp", "/proc", "/dev", "/etc"):
            os.mkdir(folder, 0o755)
        bare: set[str] = set()
        for path in paths:
            _show(path, bare)
        for name, device in DEVICES.items():
            open(f"/dev/{name}", "w").close()
            kernel.mount(f"/.old/dev/{device}", f"/dev/{name}", None, kernel.MS_BIND)
        for name, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1")):
            os.symlink(target, f"/dev/{name}")
        if settings.workspaces is not None:
            for folder in (WORKSPACES, WORKSPACE):
                os.mkdir(folder, 0o755)
            kernel.mount(f"/.old{settings.workspaces}", WORKSPACES, None, kernel.MS_BIND)
        os.symlink("/proc/self/fd/2", "/dev/stderr")
        os.symlink("/tmp", "/dev/shm")
        for path, text in own_files(settings).items():
            with open(path, "w") as file:
                file.write(text)
    with step("a /proc of its own", _MOUNT_HINT):
        # Mounted while the real one is still there: an ordinary user may not see more of /proc than before.
        kernel.mount("proc", "/proc", "proc", _QUIET, "subset=pid")
    with step("a private root file system", _MOUNT_HINT):
        kernel.unmount("/.old")
        os.rmdir("/.old")
        kernel.set_mount("/", kernel.ATTR_RDONLY | kernel.ATTR_NOSUID)
        if settings.workspaces is not None:
            kernel.set_mount(WORKSPACES, kernel.ATTR_NODEV, clear=kernel.ATTR_RDONLY)


_QUIET = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC


def own_files(settings: Settings) -> dict[str, str]:
    """Files that are the sandbox's own, by their paths."""
    files = {
        "/etc/passwd": f"user:x:{INSIDE}:{INSIDE}::/tmp:/bin/sh\n",
        "/etc/group": f"user:x:{INSIDE}:\n",
    }
    if settings.door:  # names are not asked for anywhere
        files |= {"/etc/hosts": "127.0.0.1 localhost\n", "/etc/nsswitch.conf": "hosts: files\n"}
    return files


def visible_paths(settings: Settings) -> list[str]:
    """What of the machine's files is to be seen: the interpreter, its libraries, and packages on request."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix, "/usr"}
    paths = [f"{prefix}/{lib}" for prefix in sorted(prefixes) for lib in ("lib", "lib64", "lib32")]
    paths += ["/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/usr/share/zoneinfo", os.path.dirname(os.__file__)]
    paths += [sys.executable, os.path.realpath(sys.executable)]
    if settings.allow_shell:
        paths += ["/bin", "/usr/bin", os.path.dirname(sys.executable), "/etc/alternatives"]
    paths += settings.packages
    for path in settings.shown:
        paths += [path, *_python_of(path)]
    with open("/proc/self/maps") as maps:  # wherever the libraries are that were loaded
        files = {line.split(None, 5)[5].strip() for line in maps if line.count("/")}
    return paths + sorted({os.path.dirname(file) for file in files if ".so" in file and os.path.exists(file)})


def _python_of(path: str) -> list[str]:
    """Where a virtual environment's own Python lies, which its folder only refers to; nothing for other paths."""
    program = os.path.join(path, "bin", "python")
    if not os.path.exists(os.path.join(path, "pyvenv.cfg")) or not os.path.islink(program):
        return []
    target = os.path.join(os.path.dirname(program), os.readlink(program))
    prefix = os.path.dirname(os.path.dirname(os.path.realpath(program)))
    return [os.path.normpath(target), os.path.realpath(program), *(f"{prefix}/{lib}" for lib in ("lib", "lib64"))]


def _show(path: str, bare: set[str]) -> None:
    """Bind a path of the old root, or make the same symbolic link, unless it is to be seen already.

    Args:
        path: what is to be seen.
        bare: the folders, and links to them, that were made because of something in them, and show nothing else; those
            made here are added.
    """
    path = os.path.abspath(path)
    old = f"/.old{path}"
    if not os.path.lexists(old) or (os.path.lexists(path) and path not in bare):
        return
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        _show_parents(path, bare)
        if os.path.lexists(path) and path not in bare:
            return
    if os.path.islink(old):
        target = os.readlink(old)
        if path in bare:
            bare.remove(path)
        else:
            os.symlink(target, path)
        _show(os.path.join(parent, target), bare)
        return
    if not os.path.isdir(old):
        open(path, "w").close()
    elif path in bare:  # what was shown in it is to be seen in the whole, too
        bare.remove(path)
    else:
        os.mkdir(path)
    kernel.mount(old, path, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.set_mount(path, kernel.ATTR_RDONLY | kernel.ATTR_NOSUID | kernel.ATTR_NODEV)


def _show_parents(path: str, bare: set[str]) -> None:
    """Make the folders above a path, empty, and the links among them as they are."""
    at = ""
    for name in path.split("/")[1:-1]:
        at += f"/{name}"
        if os.path.lexists(at):
            continue
        if os.path.islink(f"/.old{at}"):
            target = os.path.abspath(os.path.join(os.path.dirname(at), os.readlink(f"/.old{at}")))
            os.symlink(target, at)
            bare.add(at)
            _show_parents(f"{target}/x", bare)
        else:
            os.mkdir(at, 0o755)
            bare.add(at)


def new_sandbox(settings: Settings, workspace: str = "") -> int:
    """In the first process of a new PID namespace: everything else of its own; for the arguments see :func:`own_mounts`.

    Returns:
        a view of all its processes, see :func:`own_mounts`.

    Raises:
        Missing: the kernel refused.
    """
    with step("mount, network, IPC, UTS and cgroup namespaces", _USER_HINT):
        kernel.unshare(_SHARED)
        kernel.set_hostname(b"sandbox")
    return own_mounts(settings, workspace)


def own_mounts(settings: Settings, workspace: str = "") -> int:
    """In the first process of a new PID namespace: a scratch folder, and a /proc with its processes and nothing else.

    Args:
        settings: the limits.
        workspace: the name of its workspace; without one it has none.

    Returns:
        a descriptor of a second /proc, that stands nowhere: it shows every process. The one in the sandbox hides whatever
        makes itself unreadable (``PR_SET_DUMPABLE``, a program without read permission), from those who count, too.

    Raises:
        Missing: the kernel refused.
    """
    if settings.workspaces is not None:
        with step("a workspace of its own", _MOUNT_HINT):
            if workspace:
                kernel.mount(f"{WORKSPACES}/{workspace}", WORKSPACE, None, kernel.MS_BIND)
            kernel.unmount(WORKSPACES)  # those of others are not to be seen
    with step("a scratch folder of limited size", _MOUNT_HINT):
        inodes = max(64, settings.scratch >> 12)
        flags = kernel.MS_NOSUID | kernel.MS_NODEV
        kernel.mount("tmpfs", "/tmp", "tmpfs", flags, f"size={settings.scratch},nr_inodes={inodes},mode=1777")
    with step("a /proc of its own", _MOUNT_HINT):
        kernel.mount("proc", "/tmp", "proc", _QUIET, "subset=pid")
        every = os.open("/tmp", os.O_RDONLY | os.O_DIRECTORY)
        kernel.unmount("/tmp")
        kernel.mount("proc", "/proc", "proc", _QUIET, "subset=pid,hidepid=invisible")
    os.chdir("/tmp")
    return every


def close_all(keep: Iterable[int]) -> None:
    """Close all descriptors but some, which become 0, 1, 2 ... in their order."""
    keep = list(keep)
    highest = [os.dup(fd) for fd in keep]  # a copy first: a descriptor may sit where another belongs
    while min(highest) < len(keep):
        highest = [os.dup(fd) for fd in highest]
    for number, fd in enumerate(highest):
        os.dup2(fd, number, inheritable=number < 3)
    os.closerange(len(keep), 1 << 20)
