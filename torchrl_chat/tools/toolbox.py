"""``Toolbox``: the calls of a whole batch of conversations, run at once, each answered with a tool message.

Law of this file: there is an answer to every call, in the order of the calls. Whatever one call does, no other call is
lost, and none waits for it beyond its deadline.
"""

from __future__ import annotations

import asyncio
import functools
import json
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torchrl_chat.messages import Message
from torchrl_chat.schema_references import written_out
from torchrl_chat.tools.arguments import ArgumentsError
from torchrl_chat.tools.function import Tool, ToolBase, checked_deadline, header_name
from torchrl_chat.tools.results import (
    ToolResult,
    ToolStatus,
    clean,
    cut,
    error_text,
    example_arguments,
    malformed_text,
    unknown_text,
)
from torchrl_chat.tools.running import Run, Runner

Calls: TypeAlias = Message | Sequence[Mapping[str, Any]] | None
"""The calls of one conversation: its assistant message, or a list of calls; ``None`` where there are none."""

_CALL_FORMAT = '{"name": "<the tool\'s name>", "arguments": {"<argument>": <value>}}'

WriteCall: TypeAlias = Callable[[str, dict[str, Any]], "str | None"]
"""Writes a call of a tool, with these arguments, as the model is to write it; ``None`` where it cannot tell."""


class Toolbox:
    """The tools of an environment, and what runs them.

    Functions run in threads, coroutine functions on an event loop, the calls of all rows at once. A call that does not
    end within its deadline is given up. A coroutine is cancelled; a thread cannot be stopped: it is abandoned, the
    answer says that it is still running, and so does a warning. What must be stoppable belongs in a sandbox.

    Args:
        tools: functions, :class:`Tool` objects, and whatever has ``tools`` of its own, such as ``MCPTools``.
        deadline: seconds for one call, from when it starts. A tool's own deadline wins.
        max_result_chars: longer results are cut in the middle, with a note.
        workers: how many functions run at once.
        concurrency: how many coroutines run at once.
        max_stuck: a tool with more abandoned threads than this is no longer run, but answered with an error.
        call_format: an example of a call as the model is to write it, for the answers to malformed calls. Defaults to one
            in the format of the conversation's own template, where :class:`~torchrl_chat.transforms.ToolExecutor` runs
            the calls, else to JSON.

    Raises:
        ValueError: two tools have one name, or a limit is not positive.

    Example:
        >>> def add(a: int, b: int) -> int:
        ...     return a + b
        >>> call = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
        >>> with Toolbox([add]) as toolbox:
        ...     toolbox.run([call])[0].message
        {'role': 'tool', 'tool_call_id': 'call00000', 'name': 'add', 'content': '3'}
    """

    def __init__(
        self,
        tools: Iterable[Any],
        *,
        deadline: float = 30.0,
        max_result_chars: int = 20_000,
        workers: int = 256,
        concurrency: int = 1024,
        max_stuck: int = 256,
        call_format: str | None = None,
    ):
        limits = {"max_result_chars": max_result_chars, "workers": workers, "concurrency": concurrency}
        for name, value in {**limits, "max_stuck": max_stuck}.items():
            least = 64 if name == "max_result_chars" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}: expected an integer of at least {least}.")
        if deadline is None:
            raise ValueError("deadline is None: a toolbox needs one, or a tool that hangs would stop the batch.")
        self.deadline = checked_deadline(deadline, "the toolbox")
        self.max_result_chars = max_result_chars
        self.workers = workers
        self.concurrency = concurrency
        self.max_stuck = max_stuck
        self.call_format = call_format
        self._groups = list(tools)
        self.tools: dict[str, ToolBase] = {}
        """The tools by name."""
        for given in self._groups:
            for tool in given.tools if hasattr(given, "tools") else [given]:
                tool = tool if isinstance(tool, ToolBase) else Tool(tool)
                if tool.name in self.tools:
                    raise ValueError(f"two tools are called {tool.name!r}: give one of them another name.")
                self.tools[tool.name] = tool
        self.counts: dict[str, Counter[ToolStatus]] = {}
        """How the calls of each tool ended; those that name none of the tools are under ``""``."""
        self._warned: set[str] = set()
        self._runner: Runner | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runner": None, "_lock": None, "counts": {}, "_warned": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them: ``template_kwargs={"tools": toolbox.schemas}``."""
        return [tool.schema for tool in self.tools.values()]

    @property
    def per_conversation(self) -> bool:
        """Whether some tool keeps state for each conversation, so that :meth:`run` needs the conversation's key."""
        return any(tool.per_conversation for tool in self.tools.values())

    @property
    def totals(self) -> Counter[ToolStatus]:
        """How all calls so far ended."""
        return sum(self.counts.values(), Counter())

    @property
    def stuck(self) -> int:
        """How many calls that were given up are still running."""
        return self._runner.stuck if self._runner is not None else 0

    def start(self) -> None:
        """Start what the tools need, so that what cannot be had is known before a model is told of it.

        Raises:
            Exception: what a tool raises: :class:`~torchrl_chat.sandbox.SandboxError` where there is no isolation, say.
        """
        for group in self._keepers():
            if hasattr(group, "start"):
                group.start()

    def run(self, calls: Calls, conversation: Hashable = None) -> list[ToolResult]:
        """The answers to the calls of one conversation; see :meth:`run_batch`."""
        return self.run_batch([calls], None if conversation is None else [conversation])[0]

    def run_batch(
        self,
        rows: Sequence[Calls],
        conversations: Sequence[Hashable] | None = None,
        write_call: WriteCall | None = None,
    ) -> list[list[ToolResult]]:
        """The answers to the calls of all rows, run at once.

        Args:
            rows: for each conversation its assistant message (``tool_calls`` and ``invalid_tool_calls`` are read), a
                list of calls, or ``None``. A call is ``{"id", "type": "function", "function": {"name", "arguments"}}``.
            conversations: for each row, the key of its conversation; needed if a tool keeps state for each of them.
            write_call: writes the example of a call in the answers to malformed ones, if there is no ``call_format``.

        Returns:
            for each row an answer a call: those to well-formed calls in their order, then those to malformed ones.

        Raises:
            ValueError: a tool is ``per_conversation``, and there are no keys, or not as many as rows.
        """
        if conversations is None and self.per_conversation:
            names = ", ".join(tool.name for tool in self.tools.values() if tool.per_conversation)
            raise ValueError(
                f"{names}: state is kept per conversation, so `conversations` must give a key for each row."
            )
        keys = [None] * len(rows) if conversations is None else list(conversations)
        if len(keys) != len(rows):
            raise ValueError(f"there are {len(rows)} rows, but {len(keys)} conversations.")
        read = [
            [self._read(*call, place, key, write_call) for place, call in enumerate(_calls(calls))]
            for calls, key in zip(rows, keys, strict=True)
        ]
        waiting: dict[Hashable, list[_Call]] = {}
        for row, calls in enumerate(read):
            for place, call in enumerate(calls):
                if call.tool is not None:
                    # Calls that share state wait for one another, all others for nothing.
                    chain = ("of", call.conversation) if call.tool.per_conversation else (row, place)
                    waiting.setdefault(chain, []).append(call)
        if waiting:
            with self._lock:
                if self._runner is None or not self._runner.loop.alive:  # never started, closed, or before a fork
                    self.start()
                    self._runner = Runner(self.workers, self.concurrency, self.max_result_chars, self.max_stuck)
                runner = self._runner
            runner.loop.run(self._all(runner, list(waiting.values())))
        results = [[call.result() for call in calls] for calls in read]
        self._report(results)
        return results

    def end(self, *conversations: Hashable) -> None:
        """Let go of what the tools keep for conversations that are over."""
        for group in self._keepers():
            # Where each takes its time, a group ends all of them at once.
            ends = (
                [functools.partial(group.end_all, conversations)]
                if hasattr(group, "end_all")
                else [functools.partial(group.end, conversation) for conversation in conversations]
            )
            for end in ends:
                try:
                    end()
                except Exception as error:  # the others are still to be told
                    warnings.warn(
                        f"ending {end.args[0]!r:.60} in {group!r:.60}: {error}", RuntimeWarning, stacklevel=2
                    )

    def close(self) -> None:
        """Let go of everything: threads, loops, and what the tools hold. Used again, it starts anew."""
        with self._lock:
            runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
        for group in self._keepers():
            group.close()

    def _keepers(self) -> list[Any]:
        grouped = [group for group in self._groups if hasattr(group, "tools")]
        inside = {id(tool) for group in grouped for tool in group.tools}
        return grouped + [tool for tool in self.tools.values() if id(tool) not in inside]

    # ------------------------------------------------------------------ one call
    def _read(
        self, call: Any, malformed: bool, place: int, conversation: Hashable, write_call: WriteCall | None
    ) -> _Call:
        """What is to be run for a call, or what it is answered at once."""
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        name = name if isinstance(name, str) else ""
        ident = call.get("id") if isinstance(call, Mapping) else None
        # Nine letters and digits: some templates refuse an id of any other form.
        ident = ident if isinstance(ident, str) and ident else f"{'bad0' if malformed else 'call'}{place:05d}"
        read = _Call(ident, name if name in self.tools else header_name(name), conversation)
        tool = self.tools.get(name)
        if malformed and (not name or call.get("status") != "unknown_tool"):
            signature = tool.signature if tool is not None else None
            said = malformed_text(call, self._format(tool, write_call), signature)
            status = ToolStatus.MALFORMED
        elif not name:
            said = malformed_text({"status": "missing_name"}, self._format(None, write_call))
            status = ToolStatus.MALFORMED
        elif tool is None:
            status, said = ToolStatus.UNKNOWN_TOOL, unknown_text(name, self.tools)
        else:
            status = ToolStatus.INVALID_ARGUMENTS
            try:
                read.arguments = _fitted(tool, function.get("arguments"))
                read.tool = tool
                return read
            except ArgumentsError as error:
                faults = "\n".join(f"- {fault}" for fault in error.faults)
                said = f"Error: the arguments do not fit {tool.signature}; nothing was run.\n{faults}"
            except Exception as error:  # a tool of somebody's own
                said = error_text(error)
        read.run = Run(status, *cut(clean(said), self.max_result_chars))
        return read

    def _format(self, tool: ToolBase | None, write_call: WriteCall | None) -> str:
        """An example of a call: of this tool, or else of the first."""
        if self.call_format is not None:
            return self.call_format
        tool = tool or next(iter(self.tools.values()), None)
        written = (
            write_call(tool.name, example_arguments(written_out(tool.parameters))) if write_call and tool else None
        )
        return written or _CALL_FORMAT

    async def _all(self, runner: Runner, chains: list[list[_Call]]) -> None:
        async def one(chain: list[_Call]) -> None:
            for call in chain:
                tool = call.tool
                assert tool is not None
                try:
                    limit = tool.deadline or self.deadline or 30.0
                    call.run = await runner.one(tool, call.arguments, call.conversation, limit)
                except Exception as error:  # no defect of ours may lose the other rows
                    call.run = Run(ToolStatus.ERROR, error_text(error))

        await asyncio.gather(*map(one, chains))

    def _report(self, results: list[list[ToolResult]]) -> None:
        stuck = set()
        with self._lock:
            for result in (result for row in results for result in row):
                name = result.message["name"] if result.message["name"] in self.tools else ""
                self.counts.setdefault(name, Counter())[result.status] += 1
                if result.still_running and name not in self._warned:
                    stuck.add(name)
            self._warned |= stuck
        for name in stuck:
            warnings.warn(
                f"a call of the tool {name!r} did not end within its deadline and could not be stopped: it is still "
                f"running. Give the tool a time limit of its own, or run it in a sandbox. (Said once for each tool.)",
                RuntimeWarning,
                stacklevel=3,
            )


@dataclass(slots=True)
class _Call:
    """A call: how it is answered, what is to be run for it, and what became of it."""

    ident: str
    name: str
    conversation: Hashable
    tool: ToolBase | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    run: Run | None = None

    def result(self) -> ToolResult:
        assert self.run is not None
        message = {"role": "tool", "tool_call_id": self.ident, "name": self.name, "content": self.run.text}
        run = self.run
        return ToolResult(message, run.status, run.seconds, run.left_out, run.still_running)


def _calls(calls: Calls) -> list[tuple[Any, bool]]:
    """The calls of a row, each with whether it is malformed."""
    if calls is None:
        return []
    if isinstance(calls, Mapping):
        well = [(call, False) for call in calls.get("tool_calls") or ()]
        return well + [(call, True) for call in calls.get("invalid_tool_calls") or ()]
    return [(call, False) for call in calls]


def _fitted(tool: ToolBase, arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, str):  # as OpenAI-style APIs give them
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ArgumentsError([f"they are no JSON: {error}"]) from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ArgumentsError(["they must be a JSON object"])
    return tool.fit(arguments)
