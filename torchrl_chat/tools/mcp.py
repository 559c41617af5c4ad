"""``MCPTools``: the tools of an MCP server (Model Context Protocol, modelcontextprotocol.io).

Law of this file: an error is an error. What a server reports with ``isError``, what it refuses, a connection that ends
and an answer that does not come are never a result; and where a server may have forgotten what it kept for a
conversation, the next answer says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from torchrl_chat._loop import LoopThread
from torchrl_chat.endpoint import without_login
from torchrl_chat.tools.function import ToolBase, checked_deadline, is_name
from torchrl_chat.tools.mcp_link import Forgotten, Link, Lost, NoSession, NotSent, Server, Unreachable, http_pool
from torchrl_chat.tools.results import ToolError, ToolTimeout

_RENEWED = (
    "[The connection to the tool server was renewed since the last call in this conversation: whatever the server kept "
    "for it is lost.]\n"
)
_CONNECTS_AT_ONCE = 8
_log = logging.getLogger(__name__)


class MCPTools:
    """The tools of one MCP server, over its standard streams or over streamable HTTP.

    The server is started, or connected to, when it is first needed, and the connection is initialised as the protocol
    asks for. It may be used from any thread. It pickles; a copy connects anew.

    A connection that has died is opened again for the next call, which says so to the model if it is not the
    conversation's first. A call is sent a second time only if it is certain that the server has not seen it.

    Args:
        server: a URL (``"http://localhost:8000/mcp"``), or a command and its arguments (``["python", "server.py"]``).
        allow: the names of the tools to offer; all if ``None``.
        per_conversation: give each conversation a session of its own, for servers that keep state in it: a process of
            its own for a command, an HTTP session for a URL. Otherwise all share one.
        deadline: seconds for one call, from when it is sent.
        connect_timeout: seconds for starting a server, connecting and initialising.
        max_sessions: with more conversations than this, the one that was idle longest loses its session.
        prefix: put in front of the tools' names.
        env: environment variables of a command, besides ``HOME``, ``PATH`` and the like, which alone it inherits.
        cwd: the directory that a command runs in.
        headers: HTTP headers, such as ``{"Authorization": ...}``.

    Raises:
        ImportError: the package ``mcp`` is not there.
        ValueError: the arguments do not describe a server.

    Example:
        >>> server = MCPTools(["python", "notes_server.py"], allow=["read", "write"], per_conversation=True)
        >>> server.server.command
        ('python', 'notes_server.py')
    """

    def __init__(
        self,
        server: str | Sequence[str],
        *,
        allow: Sequence[str] | None = None,
        per_conversation: bool = False,
        deadline: float = 30.0,
        connect_timeout: float = 30.0,
        max_sessions: int = 256,
        prefix: str = "",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        _need_mcp()
        self.server = _server(server, env, cwd, headers)
        if isinstance(allow, str):
            raise ValueError(f"allow is the string {allow!r}: expected a list of names.")
        if max_sessions < 1:
            raise ValueError(f"max_sessions is {max_sessions}: expected at least 1.")
        self.allow = None if allow is None else tuple(allow)
        self.per_conversation = per_conversation
        self.deadline = checked_deadline(deadline, "MCPTools") or 30.0
        self.connect_timeout = checked_deadline(connect_timeout, "connecting to an MCP server") or 30.0
        self.max_sessions = max_sessions
        self.prefix = prefix
        self._listed: list[MCPTool] | None = None
        self._sessions: _Sessions | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sessions": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"MCPTools({str(self.server)!r})"

    def __enter__(self) -> MCPTools:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tools(self) -> list[MCPTool]:
        """The tools that the server lists and ``allow`` lets through; asked for once.

        Raises:
            ConnectionError: the server cannot be reached or does not start; with the reason.
            ValueError: ``allow`` names a tool that the server does not have, or a name is none for a tool.
        """
        with self._lock:
            if self._listed is None:
                sessions = self._opened()
                self._listed = self._choose(sessions.loop.run(sessions.list()))
            return list(self._listed)

    def end(self, conversation: Hashable) -> None:
        """Close the session of a conversation that is over."""
        self.end_all([conversation])

    def end_all(self, conversations: Iterable[Hashable]) -> None:
        """Close the sessions of conversations that are over, all at once: a server may take seconds to go."""
        sessions, over = self._sessions, list(conversations)
        if sessions is not None and sessions.loop.alive:
            sessions.loop.run(sessions.end(over))

    def close(self) -> None:
        """Close all sessions, and end the processes that were started; opened anew if used again."""
        with self._lock:
            sessions, self._sessions = self._sessions, None
        if sessions is not None and sessions.loop.alive:
            sessions.loop.run(sessions.close())
            sessions.loop.close()

    async def call(self, name: str, arguments: dict[str, Any], conversation: Hashable, deadline: float) -> str:
        """The text of a tool's result; may be awaited on any event loop.

        Raises:
            ToolError: the tool, the server or the connection failed.
            ToolTimeout: no answer came within the deadline.
        """
        sessions = self._opened()
        future = sessions.loop.submit(sessions.call(name, arguments, conversation, deadline))
        return await asyncio.wrap_future(future)

    def _opened(self) -> _Sessions:
        with self._lock:
            if self._sessions is None or not self._sessions.loop.alive:  # never, closed, or before a fork
                self._sessions = _Sessions(self)
            return self._sessions

    def _choose(self, listed: list[Any]) -> list[MCPTool]:
        by_name = {tool.name: tool for tool in listed}
        missing = [name for name in self.allow or () if name not in by_name]
        if missing:
            raise ValueError(
                f"allow names {missing[0]!r}, but {self.server} has: {', '.join(by_name) or 'no tools'}."
            )
        names = by_name if self.allow is None else [name for name in by_name if name in self.allow]
        for name in names:
            if not is_name(self.prefix + name):
                raise ValueError(
                    f"{self.server} has a tool {name!r}, which is no name for a tool: leave it out of allow."
                )
        return [
            MCPTool(self, name, by_name[name].description or "", dict(by_name[name].input_schema)) for name in names
        ]


class MCPTool(ToolBase):
    """One tool of an MCP server."""

    is_async = True
    keeps_deadline = True  # so that the server is told, and the time for starting it does not count

    def __init__(self, home: MCPTools, name: str, description: str, parameters: dict[str, Any]):
        self.home = home
        self.remote_name = name
        self.name = home.prefix + name
        self.description = description
        self.parameters = parameters
        self.deadline = home.deadline
        self.per_conversation = home.per_conversation

    def __repr__(self) -> str:
        return f"MCPTool({self.signature})"

    def call(self, arguments: dict[str, Any], conversation: Hashable = None, deadline: float | None = None) -> Any:
        """A coroutine of the result's text."""
        return self.home.call(self.remote_name, arguments, conversation, deadline or self.home.deadline)


class _Slot:
    """Where the connection of one conversation, or of all, is kept."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self.opening = asyncio.Lock()
        self.users = 0
        self.failures = 0  # how often it could not be opened
        self.reason = ""  # why, the last time


class _Sessions:
    """The connections of one :class:`MCPTools`; everything but the constructor runs on its loop."""

    def __init__(self, home: MCPTools):
        # Not the object itself: calls under way must not keep it from being collected.
        self.server = home.server
        self.per_conversation = home.per_conversation
        self.connect_timeout = home.connect_timeout
        self.max_sessions = home.max_sessions
        self.loop = LoopThread("torchrl_chat.tools.mcp")
        self._slots: OrderedDict[Hashable, _Slot] = OrderedDict()
        self._seen: dict[Hashable, int] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._gate = asyncio.Semaphore(_CONNECTS_AT_ONCE)
        self._pool: Any = None

    async def list(self) -> list[Any]:
        try:
            link = await self._connected()
        except NoSession as error:
            raise ValueError(str(error)) from None
        except Unreachable as error:
            raise ConnectionError(f"no connection to {self.server}: {error}") from None
        try:
            return await asyncio.wait_for(link.tools(), self.connect_timeout)
        except Exception as error:
            raise ConnectionError(f"{self.server} does not list its tools: {error!r}") from None
        finally:
            if self.per_conversation:
                await link.close()
            else:
                self._slots.setdefault(None, _Slot()).link = link

    async def call(self, name: str, arguments: dict[str, Any], conversation: Hashable, deadline: float) -> str:
        from mcp import MCPError

        key = conversation if self.per_conversation else None
        slot = self._slots.setdefault(key, _Slot())
        self._slots.move_to_end(key)
        slot.users += 1
        try:
            end, pause = None, 0.05
            while True:
                link = await self._linked(slot)
                end = end or time.monotonic() + deadline
                left = end - time.monotonic()
                if left <= 0:
                    raise ToolError("the tool server cannot be reached; nothing was run")
                renewed = self._seen.get(conversation, link.number) != link.number
                try:
                    result = await link.call(name, arguments, left)
                    break
                except NotSent:
                    await asyncio.sleep(min(pause, left))  # it may be about to come back
                    pause *= 2
                except Forgotten:
                    continue
            self._seen[conversation] = link.number
            failed, text = result.is_error, _text_of(result)
        except Unreachable as error:
            _log.warning("%s cannot be reached: %s", self.server, error)  # commands and paths are not for the model
            raise ToolError("the tool server cannot be reached; nothing was run") from None
        except Lost as error:
            self._seen.setdefault(conversation, 0)
            _log.warning("the connection to %s ended during a call of %s%s", self.server, name, link.last_words)
            raise ToolError(
                f"the connection to the tool server ended during this call ({error}): it may have taken effect or not"
            ) from None
        except TimeoutError:
            self._seen.setdefault(conversation, link.number)
            raise ToolTimeout(
                f"{name} did not finish within {deadline:g} s; the tool server was told to stop"
            ) from None
        except MCPError as error:
            raise ToolError(error.message) from None
        finally:
            slot.users -= 1
        text = (_RENEWED if renewed else "") + text
        if failed:
            raise ToolError(text)
        return text

    async def end(self, conversations: Sequence[Hashable]) -> None:
        links = []
        for conversation in conversations:
            self._seen.pop(conversation, None)
            slot = self._slots.pop(conversation, None) if self.per_conversation else None
            if slot is not None and slot.link is not None:
                links.append(slot.link)
        await asyncio.gather(*(link.close() for link in links))

    async def close(self) -> None:
        links = [slot.link for slot in self._slots.values() if slot.link is not None]
        self._slots.clear()
        self._seen.clear()
        await asyncio.gather(*(link.close() for link in links), *self._retiring, return_exceptions=True)
        if self._pool is not None:
            pool, self._pool = self._pool, None
            await pool.aclose()

    async def _linked(self, slot: _Slot) -> Link:
        failures = slot.failures
        async with slot.opening:
            if slot.link is None or slot.link.dead:
                if slot.failures > failures:  # or all calls of a batch would wait for a dead server one by one
                    raise Unreachable(slot.reason)
                dead, slot.link = slot.link, None
                if dead is not None:
                    task = asyncio.create_task(dead.retire())
                    self._retiring.add(task)
                    task.add_done_callback(self._retiring.discard)
                await self._make_room()
                try:
                    slot.link = await self._connected()
                except Unreachable as error:
                    slot.failures, slot.reason = slot.failures + 1, str(error)
                    raise
            return slot.link

    async def _connected(self) -> Link:
        async with self._gate:  # many processes that start at once would all be late
            if self._pool is None and self.server.url is not None:
                self._pool = http_pool()
            link = await Link.open(self.server, self.connect_timeout, self._pool)
        if self.per_conversation and self.server.url is not None and link.http_session is None:
            await link.close()
            raise NoSession(
                f"{self.server} opens no session, so it keeps no state for a conversation: use per_conversation=False"
            )
        return link

    async def _make_room(self) -> None:
        idle = [key for key, slot in self._slots.items() if slot.users == 0]
        for key in idle[: max(0, len(self._slots) - self.max_sessions)]:
            slot = self._slots.pop(key)
            if slot.link is not None:
                await slot.link.close()


def _text_of(result: Any) -> str:
    """A tool result as text: its text parts, and a description of each other part."""
    parts = [_part(part) for part in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _part(part: Any) -> str:
    if part.type == "text":
        return part.text
    if part.type in ("image", "audio"):
        return f"[{part.type}, {part.mime_type}, {len(part.data) * 3 // 4:,} bytes]"
    if part.type == "resource_link":
        return f"[resource {part.uri}: {part.name}]"
    resource = getattr(part, "resource", None)
    if resource is None:
        return f"[{part.type}]"
    if getattr(resource, "text", None) is not None:
        return f"[resource {resource.uri}]\n{resource.text}"
    return f"[resource {resource.uri}, {resource.mime_type}, {len(resource.blob) * 3 // 4:,} bytes]"


def _server(
    server: str | Sequence[str], env: Mapping[str, str] | None, cwd: str | None, headers: Mapping[str, str] | None
) -> Server:
    if isinstance(server, str):
        if not server.startswith(("http://", "https://")):
            raise ValueError(
                f"server is {server!r}: expected a URL ('http://...'), or a command as a list (['python', 'server.py'])."
            )
        if env or cwd:
            warnings.warn("env and cwd are for servers that are started by a command.", UserWarning, stacklevel=3)
        url, login = without_login(server)  # HTTP clients write URLs into their logs
        return Server(url=url, headers={**({"Authorization": login} if login else {}), **(headers or {})})
    command = tuple(server)
    if not command or not all(isinstance(word, str) for word in command):
        raise ValueError(f"server is {server!r}: expected a URL, or a command as a list of strings.")
    return Server(command=command, env=None if env is None else dict(env), cwd=cwd)


def _need_mcp() -> None:
    try:
        from mcp import ClientSession  # noqa: F401
        from mcp.types import UNSUPPORTED_PROTOCOL_VERSION  # noqa: F401
    except ImportError as error:
        raise ImportError("MCPTools needs the package mcp, version 2: pip install 'torchrl_chat[mcp]'") from error
