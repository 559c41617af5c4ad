"""Running code that nobody trusts: isolated by the Linux kernel, without Docker and without root.

::

    with Sandbox(deadline=10) as box:
        box.run("print(1 + 1)").stdout  # a fresh sandbox for every call
        box.run_many(programs)  # side by side
        with box.session() as session:  # variables live on
            session.run("x = 1")
            session.run("x + 1").value

Standard library only. The isolation in force is ``print(box.isolation)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.sandbox.isolation import Isolation
    from torchrl_chat.sandbox.result import Result, Status
    from torchrl_chat.sandbox.sandbox import Sandbox, Session
    from torchrl_chat.sandbox.settings import SandboxError

_HOMES = {
    "Isolation": "isolation",
    "Result": "result",
    "Sandbox": "sandbox",
    "SandboxError": "settings",
    "Session": "sandbox",
    "Status": "result",
}

__all__ = ["Isolation", "Result", "Sandbox", "SandboxError", "Session", "Status"]

__getattr__, __dir__ = lazy(__name__, _HOMES)
