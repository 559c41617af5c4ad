"""What a process gives up before it runs code that nobody trusts."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource

from torchrl_chat.sandbox import door, jail, kernel
from torchrl_chat.sandbox.filters import sandbox_filter
from torchrl_chat.sandbox.settings import WORKSPACE, Settings, step


def confine(settings: Settings, root: bool, program: bytes) -> int:
    """Give up all rights, in a sandbox's own namespaces; there is no way back.

    The user namespace made here owns nothing but itself: the mounts and the other namespaces belong to the one above,
    so that even a capability regained in here would be good for nothing.

    Args:
        settings: the limits.
        root: this process is real root, and becomes nobody.
        program: the seccomp filter.

    Returns:
        the descriptor at which the keeper answers for calls that wait (see :mod:`~torchrl_chat.sandbox.gate`); -1 where the
        machine has a listener of its own already, and there can be no second one: such calls are refused then.

    Raises:
        Missing: the kernel refused.
    """
    if root:
        with step("leaving root", "The warden needs CAP_SETUID and CAP_SETGID."):
            jail.become_nobody()
    uid, gid = os.geteuid(), os.getegid()
    with step("user namespace", jail._USER_HINT):
        kernel.unshare(kernel.NEWUSER)
        jail.map_ids(jail.INSIDE, uid, jail.INSIDE, gid)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if the machine runs out of memory, this goes first
    with step("no new privileges", "The kernel is too old."):
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    version = kernel.landlock_version()
    if version:
        with step("Landlock", "The kernel has it but refuses it."):
            devices = [f"/dev/{name}" for name in jail.DEVICES]
            folders = ["/tmp"] if settings.workspaces is None else ["/tmp", WORKSPACE]
            kernel.landlock(version, [*folders, *devices], door.PORT if settings.door else None)
    limit(settings)
    hint = "The kernel has to be built with CONFIG_SECCOMP_FILTER"
    hint += ", and nobody else may listen to its filters (a container's runtime, say)." if settings.door else "."
    with step("seccomp", hint):
        try:
            return kernel.set_filter(program, listen=True)
        except OSError as error:
            if error.errno != errno.EBUSY or settings.door:
                raise
        return kernel.set_filter(sandbox_filter(gate=False))


def limit(settings: Settings) -> None:
    """Set the limits of this process and of those that it starts."""
    pages = 0
    with contextlib.suppress(FileNotFoundError), open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    space = pages * os.sysconf("SC_PAGE_SIZE") + settings.memory
    cpu = math.ceil(settings.cpu or settings.deadline) + 1
    limits = {
        "RLIMIT_AS": (space, space),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_CPU": (cpu, resource.RLIM_INFINITY),
        "RLIMIT_FSIZE": (settings.scratch, settings.scratch),
        "RLIMIT_NOFILE": (settings.files, settings.files),
        "RLIMIT_MEMLOCK": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
        "RLIMIT_SIGPENDING": (256, 256),
    }
    if settings.isolation != "none":  # there the count is that of all the user's processes
        limits["RLIMIT_NPROC"] = (settings.processes, settings.processes)
    for name, (soft, hard) in limits.items():
        if hasattr(resource, name):
            kind = getattr(resource, name)
            most = resource.getrlimit(kind)[1]
            if most != resource.RLIM_INFINITY:
                hard = most if hard == resource.RLIM_INFINITY else min(hard, most)
                soft = min(soft, hard)
            resource.setrlimit(kind, (soft, hard))
