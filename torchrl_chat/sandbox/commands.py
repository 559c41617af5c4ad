"""Programs in a sandbox: what they are told, what of the machine they are shown, and where what they write is kept."""

from __future__ import annotations

import functools
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence

from torchrl_chat.sandbox.calls import Call, together
from torchrl_chat.sandbox.launch import Warden
from torchrl_chat.sandbox.result import Result
from torchrl_chat.sandbox.settings import NOBODY, WORKSPACE, SandboxError

_OWN = ("/tmp", "/proc", "/dev", "/sys")  # what a sandbox has of its own, or not at all


class Command:
    """A program in a sandbox of its own, which was started for it; see :meth:`Sandbox.command`."""

    def __init__(
        self,
        warden: Warden,
        workspace: str,
        told: str,
        stdin: str | None,
        deadline: float,
        output: int,
        opened: Callable[[socket.socket], None] | None,
    ):
        self._warden = warden
        self._process = warden.launch(workspace)
        self._make = functools.partial(
            Call, warden, self._process, "command", told, stdin, deadline, output, last=True, opened=opened
        )

    def run(self) -> Result:
        """Run it to its end, or to its deadline; all that it has started ends with it.

        Raises:
            SandboxError: the sandbox could not be built, or was killed before it was.
        """
        call = self._make()
        together([call])
        return call.result()

    def kill(self) -> None:
        """End it, from any thread; :meth:`run` returns then. One that has ended stays as it is."""
        self._warden.kill(self._process)


def as_told(words: Sequence[str], environment: Mapping[str, str], workspaces: str | None, workspace: str) -> str:
    """A command, as the interpreter in its sandbox is told it.

    Args:
        words: the program and its arguments.
        environment: environment variables.
        workspaces: the folder with workspaces, if there is one.
        workspace: the name of its own; ``""`` for none.

    Raises:
        TypeError: something is no text.
        SandboxError: there is no such workspace, or it is not to be written to in there.
    """
    texts = [*words, *environment, *environment.values()]
    if isinstance(words, str) or not words or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"expected the words and variables of a command as texts, got {words!r:.60}.")
    if workspace:
        _check_workspace(workspaces, workspace)
    folder = WORKSPACE if workspace else "/tmp"
    return json.dumps({"words": list(words), "environment": dict(environment), "folder": folder})


def _check_workspace(parent: str | None, name: str) -> None:
    if parent is None:
        raise SandboxError("this sandbox has no workspaces: make it with Sandbox(..., workspaces=FOLDER).")
    path = os.path.join(parent, name)
    if "/" in name or name in (".", "..") or os.path.islink(path) or not os.path.isdir(path):
        raise SandboxError(f"workspace={name!r} is no folder in {parent}.")
    if os.geteuid() == 0 and os.stat(path).st_uid != NOBODY:
        raise SandboxError(
            f"the workspace {path} belongs to another user: started by root, code runs as {NOBODY} (nobody); "
            f"os.chown(folder, {NOBODY}, {NOBODY}) gives it the folder."
        )


def folder_of(path: str | os.PathLike[str]) -> str:
    """A folder with workspaces.

    Raises:
        ValueError: it is none.
    """
    at = os.path.realpath(path)
    if not os.path.isdir(at):
        raise ValueError(f"workspaces: {at!r} is not a folder.")
    return at


def shown(path: str | os.PathLike[str]) -> str:
    """A path that can be shown in a sandbox.

    Raises:
        ValueError: it cannot.
    """
    at = os.path.abspath(path)
    if not os.path.exists(at):
        raise ValueError(f"show: {at!r} does not exist.")
    for place in {at, os.path.realpath(at)}:
        if place in ("/", "/etc") or any(place == own or place.startswith(f"{own}/") for own in _OWN):
            raise ValueError(
                f"show: {at!r} cannot be shown: a sandbox has {', '.join(_OWN)} and /etc of its own. Show what is needed from "
                "elsewhere."
            )
    return at
