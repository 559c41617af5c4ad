"""The isolation that is in force, to be read and printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torchrl_chat.sandbox.settings import WORKSPACE, Settings

_DOOR = "a namespace with a loopback; TCP connections to one port of it, where the caller listens"


@dataclass(frozen=True)
class Isolation:
    """The level in force, and what each mechanism of it does here.

    Example:
        >>> Isolation("none", {"network": "not isolated"})["network"]
        'not isolated'
    """

    level: str
    mechanisms: Mapping[str, str]

    def __getitem__(self, mechanism: str) -> str:
        return self.mechanisms[mechanism]

    def __str__(self) -> str:
        width = max(map(len, self.mechanisms))
        lines = [f"  {name:<{width}}  {text}" for name, text in self.mechanisms.items()]
        return "\n".join([f"isolation: {self.level}", *lines])

    @classmethod
    def of(cls, settings: Settings, root: bool, landlock: int) -> Isolation:
        """What a warden that is up has in force.

        Args:
            settings: its limits.
            root: whether it is real root.
            landlock: the version of Landlock's interface; 0 for none.
        """
        limits = {
            "wall time": f"{settings.deadline:g} s a call",
            "memory": f"{settings.memory >> 20} MiB a process",
            "output": f"{settings.output >> 10} KiB a stream",
        }
        if settings.isolation == "none":
            absent = ("user", "files", "processes", "network", "shared memory", "system calls")
            return cls("none", {**dict.fromkeys(absent, "NOT isolated"), **limits})
        limits["memory"] += ", and of all together"
        if settings.cpu is not None:
            limits["processor time"] = f"{settings.cpu:g} s of all processes together"
        user = "nobody (the caller is root)" if root else "the caller's, without any right"
        kept = "" if settings.workspaces is None else f"; {WORKSPACE}, a folder of the host"
        builder = "; built by bwrap" if settings.isolation == "bubblewrap" else ""
        return cls(
            settings.isolation,
            {
                "user": f"{user}; two user namespaces" if not root else f"{user}; a user namespace",
                "capabilities": "none, for good; no new privileges",
                "files": f"a private root, read-only; {settings.scratch >> 20} MiB of scratch in /tmp{kept}{builder}",
                "processes": f"a PID namespace; {settings.processes} at most",
                "network": _DOOR if settings.door else "a namespace without interfaces; no sockets",
                "shared memory": "an IPC namespace; System V and POSIX queues refused",
                "hostname and cgroup": "namespaces",
                "system calls": "seccomp: a list of what is allowed",
                "locks": "on files of the scratch folder only",
                "Landlock": f"version {landlock}" if landlock else "absent: this kernel has none",
                **limits,
            },
        )
