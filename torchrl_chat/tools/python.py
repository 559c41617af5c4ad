"""``PythonTool``: a Python interpreter in a sandbox, as a tool."""

from __future__ import annotations

import re
import textwrap
import threading
import warnings
from collections.abc import Hashable
from typing import Any, NamedTuple

from torchrl_chat.sandbox import Result, Sandbox, SandboxError, Session
from torchrl_chat.tools.function import ToolBase
from torchrl_chat.tools.results import ToolError, ToolTimeout

_OPENS = re.compile(r"(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)(?P<more>[^`]*)")
_LANGUAGES = {"python", "py", "python3"}


class Fenced(NamedTuple):
    """A block of Python code in a text."""

    code: str
    closed: bool  # false where the text ends before the block does


def fenced_code(text: str) -> list[Fenced]:
    """The Python programs of a text: what stands in blocks fenced as ```` ```python ````.

    Fences are read line by line, as CommonMark's: a block ends with a line of nothing but a fence of the same kind, at
    least as long, so that a program may write fences itself. More lenient than there, a block may begin behind other words
    (a list's dash). What is indented throughout is moved to the left.

    Example:
        >>> fenced_code("Let me see:\\n```python\\nprint(1)\\n```\\nso.")
        [Fenced(code='print(1)', closed=True)]
    """
    found, lines = [], iter(text.splitlines())
    for line in lines:
        opening = _OPENS.fullmatch(line)
        if opening is None:
            continue
        fence, inside, closed = opening["fence"], [], False
        for line in lines:
            end = line.strip()
            if len(end) >= len(fence) and not end.strip(fence[0]):
                closed = True
                break
            inside.append(line)
        if opening["language"].lower() in _LANGUAGES:
            code = textwrap.dedent("\n".join(inside))
            if code.strip():
                found.append(Fenced(code, closed))
    return found


class PythonTool(ToolBase):
    """Runs Python code in a :class:`~torchrl_chat.sandbox.Sandbox`.

    The result is what the code prints, and the value of its last expression, as in a notebook. An exception is reported
    as an error with its traceback.

    Args:
        sandbox: where the code runs. Defaults to a sandbox of its own with the strongest isolation. Where its isolation
            cannot be had, :meth:`start` says so, which a toolbox calls before the first call and an environment at its reset.
        persistent: whether variables live on from call to call of one conversation.
        name: what the model calls it.
        deadline: seconds for one call. Defaults to the sandbox's.

    Example:
        >>> tool = PythonTool(name="python")
        >>> tool.signature
        'python(code: string)'
    """

    is_async = False
    keeps_deadline = True

    def __init__(
        self,
        sandbox: Sandbox | None = None,
        *,
        persistent: bool = False,
        name: str = "python",
        deadline: float | None = None,
    ):
        self.sandbox = Sandbox() if sandbox is None else sandbox
        self.name = name
        self.per_conversation = persistent
        self.deadline = self.sandbox.settings.deadline if deadline is None else deadline
        lives_on = " Variables live on from call to call." if persistent else " Every call starts afresh."
        self.description = f"Runs Python code and returns what it prints.{lives_on}"
        self.parameters = {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The Python code to run."}},
            "required": ["code"],
        }
        self._reset()

    def _reset(self) -> None:
        self._sessions: dict[Hashable, Session] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_sessions", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def start(self) -> None:
        """Start the sandbox.

        Raises:
            SandboxError: its isolation cannot be had; the text says why, and what to do.
        """
        if not self.sandbox.running:
            self.sandbox.start()

    def call(self, arguments: dict[str, Any], conversation: Hashable = None, deadline: float | None = None) -> str:
        """Run ``arguments["code"]``.

        Raises:
            ToolError: the code failed; the text says how.
            ToolTimeout: it was ended at its deadline.
        """
        try:
            result = self._run(arguments["code"], conversation, deadline)
        except SandboxError as error:  # of no use to a model, and nothing that it should take advice from
            warnings.warn(f"{self.name}: {error}", RuntimeWarning, stacklevel=2)
            raise ToolError("the interpreter cannot be had now; nothing was run.") from error
        if result.ok:
            return result.text or "(no output)"
        failure = ToolTimeout if result.status == "timeout" else ToolError
        raise failure(result.text or f"it was ended: {result.status}")

    def _run(self, code: str, conversation: Hashable, deadline: float | None) -> Result:
        if not self.per_conversation:
            return self.sandbox.run(code, deadline)
        with self._lock:
            session = self._sessions.get(conversation)
            if session is None:
                session = self._sessions[conversation] = self.sandbox.session()
        return session.run(code, deadline)

    def end(self, conversation: Hashable) -> None:
        """End the conversation's session, if it has one."""
        with self._lock:
            session = self._sessions.pop(conversation, None)
        if session is not None:
            session.__exit__()

    def close(self) -> None:
        """End all sessions and the sandbox's processes."""
        for conversation in list(self._sessions):
            self.end(conversation)
        self.sandbox.close()
