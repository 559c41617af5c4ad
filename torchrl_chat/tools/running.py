"""The execution of one tool call under a deadline, wherever it belongs: in a thread, or on an event loop.

Law of this file: a call that does not end costs nobody else anything. It is given up at its deadline, and what could
not be stopped is known, counted, and of no tool more than ``max_stuck``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torchrl_chat import telemetry
from torchrl_chat._loop import LoopThread
from torchrl_chat.tools.function import ToolBase
from torchrl_chat.tools.results import ToolStatus, ToolTimeout, as_text, clean, cut, error_text
from torchrl_chat.tools.threads import Crew

_GRACE = 0.5  # seconds that a cancelled coroutine has to end


@dataclass(frozen=True, slots=True)
class Run:
    """What became of one call."""

    status: ToolStatus
    text: str
    left_out: int = 0
    seconds: float = 0.0
    still_running: bool = False


class Runner:
    """Runs calls: functions in threads, coroutines on an event loop of their own.

    Args:
        workers: how many functions run at once.
        concurrency: how many coroutines run at once.
        limit: characters of a result.
        max_stuck: how many calls of one tool that were given up may still be running; with more, it is refused.
    """

    def __init__(self, workers: int, concurrency: int, limit: int, max_stuck: int):
        self.limit = limit
        self.max_stuck = max_stuck
        # Not the loop that the coroutines of tools run on: one that blocks must not stop the clock of the others.
        self.loop = LoopThread("torchrl_chat.tools.clock")
        self._crew = Crew("torchrl_chat.tools.worker")
        self._coroutines: LoopThread | None = None
        self._threads = asyncio.Semaphore(workers)
        self._awaited = asyncio.Semaphore(concurrency)
        self._stuck: dict[str, set[Future[Any]]] = {}  # by the tool's name
        self._stuck_of: dict[Hashable, Future[Any]] = {}
        self._lock = threading.Lock()

    @property
    def stuck(self) -> int:
        """How many calls that were given up are still running."""
        return sum(map(len, self._stuck.values()))

    def close(self) -> None:
        """End the loops and the idle threads."""
        self.loop.close()
        if self._coroutines is not None:
            self._coroutines.close(patience=2 * _GRACE)
        self._crew.close()

    async def one(self, tool: ToolBase, arguments: dict[str, Any], conversation: Hashable, deadline: float) -> Run:
        """Run one call; it raises nothing."""
        if tool.per_conversation and conversation in self._stuck_of:
            text = "Error: an earlier call in this conversation is still running, so nothing was run."
            return self._ended(ToolStatus.ERROR, text)
        places = self._awaited if tool.is_async else self._threads
        async with places:
            begun = time.monotonic()
            with telemetry.span("execute_tool", tool.name) as span:
                run = await (self._coroutine if tool.is_async else self._function)(
                    tool, arguments, conversation, deadline
                )
                if span:
                    _tell(span, tool, arguments, run)
            return dataclasses.replace(run, seconds=time.monotonic() - begun)

    # ------------------------------------------------------------------ functions
    async def _function(
        self, tool: ToolBase, arguments: dict[str, Any], conversation: Hashable, deadline: float
    ) -> Run:
        stuck = len(self._stuck.get(tool.name, ()))
        if stuck >= self.max_stuck:
            text = f"Error: {tool.name} is out of order: {stuck} earlier calls of it are still running."
            return self._ended(ToolStatus.ERROR, text)
        own = tool.keeps_deadline
        job = self._crew.start(lambda: self._settled(lambda: tool.call(arguments, conversation, deadline)))
        done = asyncio.wrap_future(job)
        finished, _ = await asyncio.wait([done], timeout=None if own else deadline)
        if finished:
            return done.result()
        self._give_up(job, tool, conversation)
        return self._late(tool, deadline, still_running=True)

    def _settled(self, call: Callable[[], Any]) -> Run:
        """The outcome of a function; its text is made here too, since a huge result takes its time."""
        try:
            value = call()
            if inspect.iscoroutine(value):
                value.close()
                raise TypeError("the function returned a coroutine: declare it with `async def`")
            return self._result(value)
        except BaseException as error:  # whatever a tool raises, sys.exit() too
            return self._failed(error)

    def _result(self, value: Any) -> Run:
        return self._ended(ToolStatus.OK, as_text(value))

    def _failed(self, error: BaseException) -> Run:
        status = ToolStatus.TIMEOUT if isinstance(error, ToolTimeout) else ToolStatus.ERROR
        return self._ended(status, error_text(error))

    def _late(self, tool: ToolBase, deadline: float, still_running: bool = False) -> Run:
        end = (
            "could not be stopped: it is still running and may yet take effect" if still_running else "was stopped"
        )
        text = f"Error: {tool.name} did not finish within {deadline:g} s and {end}."
        return self._ended(ToolStatus.TIMEOUT, text, still_running)

    def _ended(self, status: ToolStatus, text: str, still_running: bool = False) -> Run:
        return Run(status, *cut(clean(text), self.limit), still_running=still_running)

    def _give_up(self, job: Future[Any], tool: ToolBase, conversation: Hashable) -> None:
        with self._lock:
            self._stuck.setdefault(tool.name, set()).add(job)
            if tool.per_conversation:
                self._stuck_of[conversation] = job

        def ended(job: Future[Any]) -> None:
            with self._lock:
                self._stuck[tool.name].discard(job)
                if tool.per_conversation and self._stuck_of.get(conversation) is job:
                    del self._stuck_of[conversation]

        job.add_done_callback(ended)

    # ------------------------------------------------------------------ coroutines
    async def _coroutine(
        self, tool: ToolBase, arguments: dict[str, Any], conversation: Hashable, deadline: float
    ) -> Run:
        if self._coroutines is None:
            self._coroutines = LoopThread("torchrl_chat.tools.coroutines")
        loop = self._coroutines
        ended: Future[Any] = Future()
        begun = False

        async def attempt() -> Run:
            nonlocal begun
            begun = True
            try:
                return self._result(await tool.call(arguments, conversation, deadline))
            except asyncio.CancelledError as error:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # by us, not by the tool
                    raise
                return self._failed(error)
            except BaseException as error:  # sys.exit() would end the loop's thread
                return self._failed(error)
            finally:
                ended.set_result(None)

        job = loop.submit(attempt())
        done = asyncio.wrap_future(job)
        finished, _ = await asyncio.wait([done], timeout=None if tool.keeps_deadline else deadline)
        if finished:
            return done.result()
        job.cancel()
        answer = loop.submit(asyncio.sleep(0)) if loop.alive else None  # it may have been replaced already
        stopped, _ = await asyncio.wait([asyncio.wrap_future(ended)], timeout=_GRACE)
        if stopped:
            return self._late(tool, deadline)
        if answer is not None and not answer.done() and self._coroutines is loop:
            # Some call blocks the loop: those to come get another one.
            self._coroutines = None
            loop.close(patience=0.0)
        if not begun:  # it was waiting for the loop, and will not begin any more
            return self._late(tool, deadline)
        self._give_up(ended, tool, conversation)
        return self._late(tool, deadline, still_running=True)


def _tell(span: telemetry.Span, tool: ToolBase, arguments: dict[str, Any], run: Run) -> None:
    """Say in a span what became of a call."""
    span.set({"gen_ai.tool.name": tool.name, "gen_ai.tool.type": "function"})
    if run.status != ToolStatus.OK:
        span.fail(run.status.name.lower())
    if telemetry.content():
        said = json.dumps(arguments, ensure_ascii=False, default=str)
        span.set({"gen_ai.tool.call.arguments": said, "gen_ai.tool.call.result": run.text})
