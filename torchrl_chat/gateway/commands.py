"""Commands as agents, in a sandbox that reaches the gateway at their own session, and nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torchrl_chat.gateway.ends import AgentError
from torchrl_chat.gateway.serve import Served
from torchrl_chat.sandbox import Result, Sandbox
from torchrl_chat.sandbox.commands import Command
from torchrl_chat.sandbox.door import HOST, PORT
from torchrl_chat.sandbox.settings import NOBODY

_SHOWN = 2000  # characters of a command's last words
_KEY = "sandbox"  # any would do: the door knows whose it is


class SandboxedCommand:
    """An agent for :func:`~torchrl_chat.gateway.play_agents`: a command, each time in a sandbox of its own.

    As a plain command it finds the gateway's address and a key in the environment (``OPENAI_BASE_URL``, ``OPENAI_API_KEY``,
    ``ANTHROPIC_BASE_URL``, ``ANTHROPIC_API_KEY``), and the row on its standard input as JSON. But it runs in a
    :class:`~torchrl_chat.sandbox.Sandbox` with a door (:mod:`torchrl_chat.sandbox.door`): the address is its session's, whatever
    name and key it asks with, and nothing else is to be reached, neither the machine's own network nor its files, processes and
    environment. It may write to ``/tmp``, of which nothing is kept, and to its workspace, if it has one. It is killed, with what it has
    started, when it takes too long or too much.

    Args:
        command: a line of words, or a list of them. The program is looked for inside.

    Keyword Args:
        show: files and folders that it needs, read-only, at their own paths: its virtual environment, its code. Standard programs and this
            process's own Python are there.
        environment: environment variables besides the addresses; none of this process's own are handed on.
        deadline: seconds that it may take.
        memory: bytes that its processes may take together.
        scratch: bytes of ``/tmp``, in memory.
        processes: how many processes and threads it may have.
        workspaces: a folder in which each episode gets one of its session's name; the command starts in it, sees it as ``/workspace``, and
            what it leaves there is kept, for rewards to look at. Nobody else made it: links in it may lead anywhere. How much it holds has no
            limit but that of each file, ``scratch``.
        fill: called with the row and the new folder, before the command starts.
        sandbox: other arguments of :class:`~torchrl_chat.sandbox.Sandbox`: ``{"isolation": "bubblewrap", "cpu": 60.0}``.

    Raises:
        ValueError: an argument makes no sense; a path in ``show`` does not exist.

    Example:
        >>> from torchrl_chat import ChatTemplate
        >>> from torchrl_chat.gateway import Gateway, ScriptedEngine, play_agents
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> program = '''
        ... import json, os, sys, urllib.request
        ... row = json.load(sys.stdin)
        ... body = {"model": "policy", "messages": [{"role": "user", "content": row["query"]}]}
        ... urllib.request.urlopen(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode())
        ... '''
        >>> agent = SandboxedCommand(["python3", "-c", program], deadline=60)
        >>> with Gateway(ScriptedEngine(["Four."], ChatTemplate(tokenizer)), tokenizer) as gateway:
        ...     finished = play_agents(agent, [{"query": "2 + 2?"}], gateway)
        >>> agent.close()
        >>> finished["transcript"][0].messages[-1]["content"]
        'Four.'
    """

    def __init__(
        self,
        command: str | Sequence[str],
        *,
        show: Sequence[str | os.PathLike[str]] = (),
        environment: Mapping[str, str] | None = None,
        deadline: float = 600.0,
        memory: int = 2 << 30,
        scratch: int = 256 << 20,
        processes: int = 64,
        workspaces: str | os.PathLike[str] | None = None,
        fill: Callable[[Mapping[str, Any], Path], object] | None = None,
        sandbox: Mapping[str, Any] | None = None,
    ):
        self.words = shlex.split(command) if isinstance(command, str) else list(command)
        if not self.words:
            raise ValueError("the command is empty.")
        if os.path.dirname(self.words[0]):  # it does not start where this process is
            self.words[0] = os.path.abspath(self.words[0])
        self.environment = dict(environment or {})
        self.workspaces, self.fill = None if workspaces is None else Path(workspaces).absolute(), fill
        if self.workspaces is None and fill is not None:
            raise ValueError("fill: there are no workspaces to be filled.")
        if self.workspaces is not None:
            self.workspaces.mkdir(parents=True, exist_ok=True)
        limits: dict[str, Any] = {
            "deadline": deadline,
            "memory": memory,
            "scratch": scratch,
            "processes": processes,
        }
        own = {"show": show, "workspaces": self.workspaces, "allow_shell": True, "door": True}
        self.box = Sandbox(**{**limits, **dict(sandbox or {}), **own})

    def prepare(self) -> None:
        """Build a sandbox, to see that it can be done.

        Raises:
            SandboxError: it cannot be had here; the text says why, and what to do.
        """
        self.box.start()

    def close(self) -> None:
        """End all of its processes."""
        self.box.close()

    async def __call__(self, row: Mapping[str, Any], session: Served) -> None:
        """Play one episode.

        Raises:
            AgentError: the command failed, or was stopped.
            SandboxError: the sandbox could not be built.
        """
        doors: list[Callable[[], None]] = []

        def opened(listener: socket.socket) -> None:
            doors.append(session.open_door(listener))

        def start() -> Command:
            return self.box.command(
                self.words,
                environment={**addresses(), **self.environment},
                stdin=json.dumps(dict(row), default=str),
                workspace=self._workspace(row, session.name),
                opened=opened,
            )

        command = await asyncio.to_thread(start)

        def run() -> Result:
            try:
                return command.run()
            finally:
                for close in doors:
                    close()

        # A thread of its own: those of the loop are few, and a command may take long.
        thread = ThreadPoolExecutor(1, "torchrl_chat.command")
        try:
            _check(await asyncio.get_running_loop().run_in_executor(thread, run))
        finally:
            command.kill()  # nobody waits for it any more, or it has ended
            thread.shutdown(wait=False)

    def _workspace(self, row: Mapping[str, Any], name: str) -> str:
        """Make the folder of an episode; its name, or none."""
        if self.workspaces is None:
            return ""
        folder = self.workspaces / name
        folder.mkdir()
        if self.fill is not None:
            self.fill(dict(row), folder)
        if os.geteuid() == 0:  # who is nobody in there
            for path, folders, files in os.walk(folder):
                for each in [path, *(os.path.join(path, inner) for inner in folders + files)]:
                    os.lchown(each, NOBODY, NOBODY)
        return name


def addresses() -> dict[str, str]:
    """Environment variables with which an agent in a sandbox finds its session, as :meth:`Served.environment` has them."""
    root = f"http://{HOST}:{PORT}"
    return {
        "OPENAI_BASE_URL": f"{root}/v1",
        "OPENAI_API_BASE": f"{root}/v1",
        "OPENAI_API_KEY": _KEY,
        "ANTHROPIC_BASE_URL": root,
        "ANTHROPIC_API_KEY": _KEY,
    }


def _check(result: Result) -> None:
    if result.ok:
        return
    last = result.stderr.strip()[-_SHOWN:]
    if result.status == "exit":
        raise AgentError(f"the command ended with the code {result.exit_status}: {last}")
    raise AgentError(f"the command was stopped in its sandbox ({result.status}): {result.error} {last}".rstrip())
