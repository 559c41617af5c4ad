"""JSON posted to one address again and again, over connections that are kept: for engines that are asked hundreds of times a second.

HTTP/1.1 over asyncio's streams, and no more of it than a server of a model needs. A general client makes objects of URLs, headers,
requests and responses each time, which costs more than a gateway does for the whole of a call (``benchmarks/gateway.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

_AGAIN = frozenset({408, 409, 429})  # and whatever is an error of the server
_IDLE = 30.0  # seconds for which a connection is kept; servers close theirs, uvicorn after 5 by default
_LONGEST = 120.0  # seconds that a server may ask us to wait
_Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class PostError(RuntimeError):
    """A server refused a request.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, status: int, told: str):
        super().__init__(f"the server answered {status}: {told}")
        self.status = status


def goes_through_proxy(url: str) -> bool:
    """Whether the environment has a proxy for an address: :class:`Poster` knows none."""
    parts = urlsplit(url)
    return parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")


class Poster:
    """Posts JSON to one address; it belongs to one event loop.

    Args:
        url: the address, ``http`` or ``https``, without a login.
        headers: sent with each request.

    Keyword Args:
        retries: how often a request is tried again, after 408, 409, 429, errors of the server and lost connections.
        timeout: seconds for one try.
        pause: seconds before the first retry, twice as many before each further one, up to 8; where the server says how long
            (``Retry-After``), that.

    Raises:
        ValueError: the address is none.

    Example:
        >>> poster = Poster("http://localhost:8000/inference/v1/generate", {"Authorization": "Bearer k"})
        >>> reply = poster.post({"token_ids": [1, 2, 3]})  # await it
        >>> reply.close()
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        retries: int = 4,
        timeout: float = 60.0,
        pause: float = 0.5,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the address of an endpoint begins with http:// or https://, and has a host.")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port or (443 if self._secure else 80)
        self._ssl: ssl.SSLContext | None = None
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        shown = parts.netloc.rpartition("@")[2]
        told = {"Host": shown, "Accept": "application/json", "Content-Type": "application/json", **(headers or {})}
        if any(character in f"{name}{value}{path}" for name, value in told.items() for character in "\r\n"):
            raise ValueError("a header or the address has a line break.")
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items())]
        self._head = ("\r\n".join(lines) + "\r\nContent-Length: ").encode("latin-1")
        self._retries, self._timeout, self._pause = retries, timeout, pause
        self._idle: list[tuple[float, _Line]] = []

    async def post(self, body: Any) -> Any:
        """What the server answers to a body, both as JSON values.

        Raises:
            PostError: the server refuses, or fails each time.
            OSError: it cannot be reached; ``TimeoutError`` among them.
            ValueError: what it answers is no JSON.
        """
        return _loaded(await self._tried(self._exchange, body))

    async def stream(self, body: Any) -> AsyncIterator[Any]:
        """What the server answers to a body, event by event (server-sent events), as JSON values; an answer that is no stream is one event.

        Nothing is tried again once the answer has begun. Whoever stops reading closes the connection, by which a server knows.

        Raises:
            PostError, OSError, ValueError: as of :meth:`post`.
        """
        reader, writer, head = await self._tried(self._begun, body)
        pieces = _pieces(reader, head)
        try:
            if b"text/event-stream" not in (_header(head, b"content-type") or b""):
                yield _loaded(b"".join([piece async for piece in self._timed(pieces)]))
                return
            async for data in _events(self._timed(pieces)):
                if data == b"[DONE]":
                    return
                yield _loaded(data)
        except EOFError:
            raise ConnectionError("the connection was lost") from None
        finally:
            writer.close()

    async def _timed(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pieces of an answer, each of which comes in time."""
        while True:
            async with asyncio.timeout(self._timeout):
                piece = await anext(pieces, None)
            if piece is None:
                return
            yield piece

    async def _tried(self, exchange: Callable[[bytes], Awaitable[tuple[int, bytes, Any]]], body: Any) -> Any:
        """What an exchange has for an answer, tried again as often as it may be."""
        raw = json.dumps(body).encode() if orjson is None else orjson.dumps(body)
        message = self._head + b"%d\r\n\r\n" % len(raw) + raw
        for tried in range(self._retries + 1):
            wait: float | None = None
            try:
                async with asyncio.timeout(self._timeout):
                    status, head, answer = await exchange(message)
            except (OSError, EOFError) as error:  # a timeout is one
                failure: Exception = (
                    error if isinstance(error, OSError) else ConnectionError("the connection was lost")
                )
            else:
                if status < 300:
                    return answer
                failure = PostError(status, answer[:400].decode(errors="replace"))
                if status not in _AGAIN and status < 500:
                    raise failure
                with contextlib.suppress(ValueError):
                    wait = float(_header(head, b"retry-after") or b"none")
            if tried == self._retries or (wait is not None and wait > _LONGEST):
                raise failure
            await asyncio.sleep(wait or min(self._pause * 2**tried, 8.0) * (1 - random.random() / 4))
        raise AssertionError  # the loop returns, or raises

    async def _exchange(self, message: bytes) -> tuple[int, bytes, bytes]:
        """One try; on a connection that the server has closed meanwhile, once more on a new one."""
        line = self._kept()
        if line is not None:
            with contextlib.suppress(OSError, EOFError):
                return await self._sent(line, message)
        return await self._sent(await self._opened(), message)

    async def _begun(self, message: bytes) -> tuple[int, bytes, Any]:
        """One try, up to where the answer begins: then a connection of its own; of a refusal, its text."""
        reader, writer = await self._opened()
        try:
            writer.write(message)
            status = 100
            while 100 <= status < 200:
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head[9:12])
            if status < 300:
                return status, head, (reader, writer, head)
            told = b"".join([piece async for piece in _pieces(reader, head)])
            writer.close()
            return status, head, told
        except (ValueError, asyncio.LimitOverrunError):
            writer.close()
            raise ConnectionError("the server does not speak HTTP/1.1") from None
        except BaseException:
            writer.close()
            raise

    async def _opened(self) -> _Line:
        if self._secure and self._ssl is None:
            self._ssl = ssl.create_default_context()
        return await asyncio.open_connection(self._host, self._port, ssl=self._ssl, limit=2**20)

    def _kept(self) -> _Line | None:
        while self._idle:
            since, line = self._idle.pop()
            if time.monotonic() - since < _IDLE and not line[0].at_eof() and not line[1].is_closing():
                return line
            line[1].close()
        return None

    async def _sent(self, line: _Line, message: bytes) -> tuple[int, bytes, bytes]:
        reader, writer = line
        try:
            writer.write(message)
            status = 100
            while 100 <= status < 200:
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head[9:12])
            length = _header(head, b"content-length")
            if (_header(head, b"transfer-encoding") or b"").lower().endswith(b"chunked"):
                body = await _chunks(reader)
            elif length is not None:
                body = await reader.readexactly(int(length))
            else:
                body = await reader.read()
        except (ValueError, asyncio.LimitOverrunError):
            writer.close()
            raise ConnectionError("the server does not speak HTTP/1.1") from None
        except BaseException:  # a request that was given up, too: its answer is not to be taken for the next one's
            writer.close()
            raise
        if (_header(head, b"connection") or b"").lower() == b"close" or head.startswith(b"HTTP/1.0"):
            writer.close()
        else:
            self._idle.append((time.monotonic(), line))
        return status, head, body

    async def aclose(self) -> None:
        """Close the connections that are kept."""
        for _, (_, writer) in self._idle:
            writer.close()
        self._idle.clear()


def _header(head: bytes, name: bytes) -> bytes | None:
    lower = head.lower()
    at = lower.find(b"\r\n" + name + b":")
    if at < 0:
        return None
    begin = at + len(name) + 3
    return head[begin : head.index(b"\r\n", begin)].strip()


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    return b"".join([piece async for piece in _chunked(reader)])


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    while (await reader.readuntil(b"\r\n")) != b"\r\n":
        pass  # what trails


async def _pieces(reader: asyncio.StreamReader, head: bytes) -> AsyncIterator[bytes]:
    """The body behind a head, as it comes."""
    length = _header(head, b"content-length")
    if (_header(head, b"transfer-encoding") or b"").lower().endswith(b"chunked"):
        async for piece in _chunked(reader):
            yield piece
    elif length is not None:
        yield await reader.readexactly(int(length))
    else:
        while piece := await reader.read(1 << 16):
            yield piece


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events, whose lines come in pieces cut anywhere."""
    held, data = b"", []
    async for piece in pieces:
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []


def _loaded(raw: bytes) -> Any:
    return json.loads(raw) if orjson is None else orjson.loads(raw)
