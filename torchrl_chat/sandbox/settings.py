"""What a sandbox allows, as it travels to the processes that build it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

LEVELS = ("namespaces", "bubblewrap", "none")
NOBODY = 65534
"""Who root becomes."""
WORKSPACE = "/workspace"
"""Where a sandbox has its workspace, if it has one."""


class SandboxError(RuntimeError):
    """The isolation that was asked for cannot be had, or its processes cannot be started; the text says why."""


@dataclass(frozen=True)
class Settings:
    """The limits of one sandbox; memory and sizes in bytes, times in seconds."""

    isolation: str = "namespaces"
    deadline: float = 10.0
    cpu: float | None = None
    memory: int = 512 << 20
    scratch: int = 64 << 20
    processes: int = 64
    files: int = 256
    output: int = 64 << 10
    allow_shell: bool = False
    packages: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    door: bool = False
    workspaces: str | None = None

    def __post_init__(self) -> None:
        if self.isolation not in LEVELS:
            raise ValueError(f"isolation={self.isolation!r}: expected one of {', '.join(map(repr, LEVELS))}.")
        for name in ("deadline", "cpu", "memory", "scratch", "processes", "files", "output"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: expected a positive number.")
        if self.files < 16:
            raise ValueError(f"files={self.files}: the interpreter itself needs some; expected at least 16.")
        if self.door and self.isolation == "none":
            raise ValueError("door=True: there is no network to put a door into with isolation='none'.")

    def to_json(self) -> str:
        """All fields, for the warden."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that :meth:`to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(
            **{**values, **{name: tuple(value) for name, value in values.items() if isinstance(value, list)}}
        )


class Missing(OSError):
    """A mechanism that the kernel does not give, with a way to get it."""

    def __init__(self, mechanism: str, reason: object, hint: str):
        super().__init__(f"{mechanism}: {reason}. {hint}")


class step:
    """``with step("network namespace", hint):`` says what was being built when the kernel refused.

    Args:
        mechanism: its name.
        hint: how to get it where it is missing.
    """

    def __init__(self, mechanism: str, hint: str):
        self.mechanism, self.hint = mechanism, hint

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, KeyError)) and not isinstance(error, Missing):
            reason = f"the system call {error} is not known here" if isinstance(error, KeyError) else error
            raise Missing(self.mechanism, reason, self.hint) from error
