"""One connection to an MCP server: opened, initialised, used, found dead, closed.

It lives on one event loop, in a task of its own: the ``mcp`` package opens and closes a connection in one and the same
task, while calls come from many.

Law of this file: how a request failed is known: it did not reach the server, or nobody knows what became of it. Only
the first kind may be sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from torchrl_chat.endpoint import shown_url

NOT_SENT = -32801  # our own error codes, outside of those that JSON-RPC and MCP use
LOST = -32802
FORGOTTEN = -32803
_numbers = itertools.count(1)
_TAIL = 2000  # bytes of the server's stderr that are kept to explain why it died


class NotSent(Exception):
    """The request did not reach the server."""


class Lost(Exception):
    """The connection ended while the request was under way: nobody knows what became of it."""


class Forgotten(Exception):
    """The server does not know the session (any more); it has done nothing."""


class Unreachable(Exception):
    """No connection could be opened."""


class NoSession(Unreachable):
    """A connection could be opened, but the server keeps no session."""


@dataclass(frozen=True)
class Server:
    """Where a server is: a command that speaks MCP over its standard streams, or a URL."""

    url: str | None = None
    command: tuple[str, ...] = ()
    env: Mapping[str, str] | None = field(default=None, repr=False)  # it may hold a key, as headers may
    cwd: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return shown_url(self.url) or " ".join(self.command)


class Link:
    """A connection; see :meth:`open`."""

    def __init__(self, server: Server, pool: Any = None):
        self.server = server
        self.number = next(_numbers)
        """Tells this connection from any other."""
        self.dead = False
        self.http_session: str | None = None
        self.under_way = 0
        self._pool = pool
        self._stop = asyncio.Event()
        self._ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self._said = _Tail()

    @classmethod
    async def open(cls, server: Server, timeout: float, pool: Any = None) -> Link:
        """Connect and initialise.

        Args:
            server: where.
            timeout: seconds.
            pool: the HTTP transport that the connections to one server share.

        Raises:
            Unreachable: with the reason, and with what the server wrote to its standard error.
        """
        link = cls(server, pool)
        link._task = asyncio.create_task(link._live())
        try:
            await asyncio.wait_for(asyncio.shield(link._ready), timeout)
        except TimeoutError:
            await link.close()
            raise Unreachable(f"it did not answer within {timeout:g} s{link._said.text()}") from None
        except asyncio.CancelledError:
            link._task.cancel()
            raise
        except Exception as error:
            await link.close()
            raise Unreachable(f"{_reason(error)}{link._said.text()}") from None
        return link

    async def close(self) -> None:
        """End the session, and the server's process if it was started for it; never raises."""
        self._die()
        if self._task is not None:
            if not self._ready.done():
                self._task.cancel()
            _, running = await asyncio.wait([self._task], timeout=10.0)
            for task in running:
                task.cancel()

    async def retire(self) -> None:
        """Close when the last call has its answer; each has a deadline."""
        while self.under_way:
            await asyncio.sleep(0.05)
        await self.close()

    async def tools(self) -> list[Any]:
        """All tools that the server lists."""
        from mcp.types import PaginatedRequestParams

        tools: list[Any] = []
        cursor = None
        for _ in range(1000):  # a server that never ends its list
            page = await self._ready.result().list_tools(params=PaginatedRequestParams(cursor=cursor))
            tools += page.tools
            cursor = page.next_cursor
            if not cursor:
                break
        return tools

    async def call(self, name: str, arguments: dict[str, Any], timeout: float) -> Any:
        """Call a tool; the server is told when the time is up.

        Raises:
            TimeoutError: it did not answer in time.
            NotSent, Lost, Forgotten: see there.
            mcp.MCPError: the server refused the request.
        """
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED, REQUEST_TIMEOUT

        if self.dead:
            raise NotSent
        self.under_way += 1
        try:
            return await self._ready.result().call_tool(name, arguments, read_timeout_seconds=timeout)
        except MCPError as error:
            if error.code == REQUEST_TIMEOUT:
                raise TimeoutError from None
            if error.code == NOT_SENT:
                raise NotSent(error.message) from None
            if error.code == FORGOTTEN:
                self.dead = True  # but not closed: other calls that are under way are to be told the same
                raise Forgotten from None
            if error.code in (LOST, CONNECTION_CLOSED):
                if self.server.url is None:
                    self._die()
                raise Lost(error.message) from None
            raise
        finally:
            self.under_way -= 1

    @property
    def last_words(self) -> str:
        """What the server wrote to its standard error last; for logs, not for the model."""
        return self._said.text()

    # ------------------------------------------------------------------ the connection's own task
    def _die(self) -> None:
        self.dead = True
        self._stop.set()

    async def _live(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                stack.callback(self._said.close)
                read, write = await self._streams(stack)
                await self._session(stack, _Watched(read, self._die), write)
                await self._stop.wait()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._fail(error)
        finally:
            self.dead = True
            self._fail(ConnectionError("the server ended the connection"))

    def _fail(self, error: BaseException) -> None:
        if not self._ready.done():
            self._ready.set_exception(error if isinstance(error, Exception) else ConnectionError(repr(error)))
            self._ready.exception()  # looked at, should nobody wait any more

    async def _streams(self, stack: AsyncExitStack) -> tuple[Any, Any]:
        if self.server.url is None:
            from mcp import StdioServerParameters, stdio_client

            command, *rest = self.server.command
            env = None if self.server.env is None else dict(self.server.env)
            parameters = StdioServerParameters(command=command, args=rest, env=env, cwd=self.server.cwd)
            return await stack.enter_async_context(stdio_client(parameters, errlog=self._said.open()))
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        client = httpx2.AsyncClient(
            transport=_guard(self), headers=dict(self.server.headers), timeout=httpx2.Timeout(30.0, read=300.0)
        )
        await stack.enter_async_context(client)
        return await stack.enter_async_context(streamable_http_client(self.server.url, http_client=client))

    async def _session(self, stack: AsyncExitStack, read: Any, write: Any) -> None:
        from mcp import ClientSession, MCPError
        from mcp.types import UNSUPPORTED_PROTOCOL_VERSION, Implementation

        about = Implementation(name="torchrl_chat", version="0.1")
        session = await stack.enter_async_context(ClientSession(read, write, client_info=about))
        try:
            await session.initialize()  # the handshake that opens a session, in which a server may keep state
        except MCPError as error:
            if error.code != UNSUPPORTED_PROTOCOL_VERSION:
                raise
            await session.discover()  # protocol revisions without sessions
        if not self._ready.done():
            self._ready.set_result(session)


class _Watched:
    """A stream of messages from the server that tells when it ends."""

    def __init__(self, stream: Any, ended: Callable[[], None]):
        self._stream = stream
        self._ended = ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def __aenter__(self) -> _Watched:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> Any:
        return await self._stream.__aexit__(*error)

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._stream.__anext__()
        except BaseException:
            self._ended()
            raise


class _Tail:
    """The end of what a process writes to its standard error."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._read: int | None = None
        self._file: Any = None

    def open(self) -> Any:
        """The file to hand to the process."""
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        self._file = os.fdopen(write, "w")
        asyncio.get_running_loop().add_reader(self._read, self._more)
        return self._file

    def _more(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._read is not None and (data := os.read(self._read, 65536)):
                self._kept += data
                del self._kept[:-_TAIL]
            if self._read is not None:  # nobody holds the other end
                asyncio.get_running_loop().remove_reader(self._read)

    def close(self) -> None:
        """Close both ends."""
        if self._read is None:
            return
        self._more()
        read, self._read = self._read, None
        asyncio.get_running_loop().remove_reader(read)
        self._file.close()
        os.close(read)

    def text(self) -> str:
        """What is kept, for an error message."""
        if self._read is not None:
            self._more()
        said = bytes(self._kept).decode(errors="replace").strip()
        return f"; it wrote: {said}" if said else ""


def http_pool() -> Any:
    """An HTTP transport without a limit of connections: each session holds one open for what the server may send."""
    import httpx2

    return httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64))


def _guard(link: Link) -> Any:
    """The link's way into the shared pool. A request that fails is answered with an error of its own.

    Raised through the ``mcp`` client, the error would tear down the session with all other requests in it.
    """
    import httpx2

    class Guard(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            try:
                response = await link._pool.handle_async_request(request)
            except httpx2.TransportError as error:
                if request.method == "DELETE":  # the end of a session whose server is gone
                    return httpx2.Response(204)
                unsent = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
                return self.failed(NOT_SENT if unsent else LOST, error)
            if response.status_code == 404 and "mcp-session-id" in request.headers:
                await response.aclose()  # how a server says that the session has ended
                if request.method == "DELETE":
                    return httpx2.Response(204)
                return self.failed(FORGOTTEN, ConnectionError("the session has ended"))
            link.http_session = response.headers.get("mcp-session-id") or link.http_session
            return response

        @staticmethod
        def failed(code: int, error: Exception) -> httpx2.Response:
            text = str(error) or type(error).__name__
            body = {"jsonrpc": "2.0", "id": None, "error": {"code": code, "message": text}}
            return httpx2.Response(503, headers={"content-type": "application/json"}, content=json.dumps(body))

    return Guard()


def _reason(error: BaseException) -> str:
    """The innermost error of a group, in words."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
