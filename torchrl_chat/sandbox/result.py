"""What came of running code in a sandbox."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "error", "exit", "timeout", "cpu", "memory", "output", "crash", "not_run"]
"""How a call ended.

===========  ================================================================
``ok``       it ran to its end, or left with exit status 0
``error``    an exception
``exit``     ``sys.exit`` or a command with another exit status
``timeout``  it was killed at its deadline
``cpu``      it was killed for the processor time of its processes together
``memory``   it was killed for the memory of its processes together
``output``   it was killed because it never stopped writing
``crash``    its interpreter was ended by a signal, or ended without a word
``not_run``  not one line of it ran: the disk was full, or its input or itself too long for the sandbox
===========  ================================================================
"""


@dataclass(frozen=True)
class Result:
    """The result of one call.

    Example:
        >>> Result("ok", stdout="2\\n", value="3").text
        '2\\n3'
    """

    status: Status
    stdout: str = ""
    """What it wrote to its standard output, also by C code and by programs that it started; possibly cut."""
    stderr: str = ""
    """What it wrote to its standard error; possibly cut."""
    value: str | None = None
    """The ``repr`` of the last statement's value, where that is an expression and not ``None``."""
    error: str = ""
    """The traceback of the user's own frames, or why it was ended."""
    seconds: float = 0.0
    """Wall time from when the sandbox was ready."""
    truncated: bool = False
    """Whether some of what it wrote is not here. A value that is too long is cut, with a note where."""
    exit_status: int | None = None
    """The exit status, 0 to 255, as a shell would see it (128 and the signal, for a command that one ended); ``None`` where
    the process was killed or never ran."""
    notice: str = ""
    """In a session: that variables of earlier calls were lost."""
    state_lost: bool = False
    """In a session: whether this call ended it, so that the next one starts without variables."""

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, with exit status 0."""
        return self.status == "ok"

    @property
    def ran(self) -> bool:
        """Whether it was begun at all; what was not is no wrong program."""
        return self.status != "not_run"

    @property
    def output(self) -> str:
        """The standard output; the name that ``CodeVerifier`` reads."""
        return self.stdout

    @property
    def text(self) -> str:
        """All of it as one text, in the order in which a notebook shows it: what a model is told."""
        cut = "[the output was too long: the rest was left out]" if self.truncated else ""
        parts = (self.notice, self.stdout, self.stderr, cut, self.value or "", self.error)
        return "\n".join(part.removesuffix("\n") for part in parts if part)
