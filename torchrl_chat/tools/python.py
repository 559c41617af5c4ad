"""``PythonTool``: a Python interpreter in a sandbox, as a tool."""

from __future__ import annotations

import re
import threading
from collections.abc import Hashable
from typing import Any

from torchrl_chat.sandbox import Sandbox, Session
from torchrl_chat.tools.function import ToolBase
from torchrl_chat.tools.results import ToolError, ToolTimeout

_FENCE = re.compile(r"```(?:python|py|python3)[ \t]*\r?\n(.*?)\r?\n?```", re.DOTALL | re.IGNORECASE)


def fenced_code(text: str) -> list[str]:
    """The Python programs of a text: what stands in blocks fenced as ```` ```python ````.

    Example:
        >>> fenced_code("Let me see:\\n```python\\nprint(1)\\n```\\nso.")
        ['print(1)']
    """
    return [code for code in _FENCE.findall(text) if code.strip()]


class PythonTool(ToolBase):
    """Runs Python code in a :class:`~torchrl_chat.sandbox.Sandbox`.

    The result is what the code prints, and the value of its last expression, as in a notebook. An exception is reported
    as an error with its traceback.

    Args:
        sandbox: where the code runs. Defaults to a sandbox of its own with the strongest isolation, which is an error
            where it cannot be had.
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

    def call(self, arguments: dict[str, Any], conversation: Hashable = None, deadline: float | None = None) -> str:
        """Run ``arguments["code"]``.

        Raises:
            ToolError: the code failed; the text says how.
            ToolTimeout: it was ended at its deadline.
        """
        if not self.per_conversation:
            result = self.sandbox.run(arguments["code"], deadline)
        else:
            with self._lock:
                session = self._sessions.get(conversation)
                if session is None:
                    session = self._sessions[conversation] = self.sandbox.session()
            result = session.run(arguments["code"], deadline)
        if result.ok:
            return result.text or "(no output)"
        failure = ToolTimeout if result.status == "timeout" else ToolError
        raise failure(result.text or f"it was ended: {result.status}")

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
