"""JSON posted to one address again and again, over connections that are kept: for engines that are asked hundreds of times a second.

HTTP/1.1 over asyncio's transports, and no more of it than a server of a model needs. A general client makes objects of URLs, headers,
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
_HEAD = 2**20  # bytes of an answer's headers, at most
_LAST = 0.1  # seconds in which the end of a stream's body is waited for, when its last event has come


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
        self._streams: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: Any) -> Any:
        """What the server answers to a body, both as JSON values; arrays of numbers (numpy's) in a body are lists.

        Raises:
            PostError: the server refuses, or fails each time.
            OSError: it cannot be reached; ``TimeoutError`` among them.
            ValueError: what it answers is no JSON.
        """
        return _loaded(await self._tried(self._exchange, body))

    async def stream(self, body: Any) -> AsyncIterator[Any]:
        """What the server answers to a body, event by event (server-sent events), as JSON values; an answer that is no stream is one event.

        A connection that was read to its end is kept for the next one. Nothing is tried again once the answer has begun. Whoever stops
        reading closes the connection, by which a server knows.

        Raises:
            PostError, OSError, ValueError: as of :meth:`post`.
        """
        reader, writer, head = await self._tried(self._streaming, body)
        pieces, whole = self._timed(_pieces(reader, head)), False
        try:
            if b"text/event-stream" not in (_header(head, b"content-type") or b""):
                raw = b"".join([piece async for piece in pieces])
                whole = True
                yield _loaded(raw)
                return
            async for data in _events(pieces):
                if data == b"[DONE]":
                    whole = await _ended(pieces)
                    return
                yield _loaded(data)
            whole = True
        except EOFError:
            raise ConnectionError("the connection was lost") from None
        finally:
            if whole and not _is_last(head) and (_is_chunked(head) or _header(head, b"content-length") is not None):
                self._keep(reader, writer)
            else:
                writer.close()

    def _keep(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep a stream's connection for the next one; of those that are kept, the oldest may be of no use by now."""
        while self._streams and not _is_fresh(*self._streams[0][:2]):
            self._streams.pop(0)[2].close()
        self._streams.append((time.monotonic(), reader, writer))

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
        if orjson is None:
            raw = json.dumps(body, default=lambda array: array.tolist()).encode()
        else:
            raw = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        message = self._head + b"%d\r\n\r\n" % len(raw) + raw
        for tried in range(self._retries + 1):
            wait: float | None = None
            try:
                status, head, answer = await exchange(message)
            except OSError as error:  # a timeout is one
                failure: Exception = error
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

    async def _exchange(self, message: bytes) -> tuple[int, bytes, bytes | bytearray]:
        """One try; on a connection that the server has closed meanwhile, once more on a new one."""
        line = self._kept()
        if line is not None:
            try:
                return await self._sent(line, message, self._timeout)
            except TimeoutError:
                raise
            except OSError:
                pass
        begun = time.monotonic()
        async with asyncio.timeout(self._timeout):
            line = await self._opened()
        return await self._sent(line, message, self._timeout - (time.monotonic() - begun))

    async def _streaming(self, message: bytes) -> tuple[int, bytes, Any]:
        """One try, up to where the answer begins: its connection; of a refusal, its text.

        On a connection that the server has closed meanwhile, once more on a new one.
        """
        while self._streams:
            since, reader, writer = self._streams.pop()
            if not _is_fresh(since, reader):
                writer.close()
                continue
            try:
                async with asyncio.timeout(self._timeout):
                    return await _begun(reader, writer, message)
            except TimeoutError:
                raise
            except OSError:
                break
        async with asyncio.timeout(self._timeout):
            reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._context(), limit=_HEAD)
            return await _begun(reader, writer, message)

    def _context(self) -> ssl.SSLContext | None:
        if self._secure and self._ssl is None:
            self._ssl = ssl.create_default_context()
        return self._ssl

    async def _opened(self) -> _Line:
        loop = asyncio.get_running_loop()
        _, line = await loop.create_connection(_Line, self._host, self._port, ssl=self._context())
        return line

    def _kept(self) -> _Line | None:
        while self._idle:
            since, line = self._idle.pop()
            if time.monotonic() - since < _IDLE and not line.lost:
                return line
            line.close()
        return None

    async def _sent(self, line: _Line, message: bytes, timeout: float) -> tuple[int, bytes, bytes | bytearray]:
        status, head, body = await line.ask(message, timeout)
        if not line.lost:
            self._idle.append((time.monotonic(), line))
        return status, head, body

    async def aclose(self) -> None:
        """Close the connections that are kept."""
        for _, line in self._idle:
            line.close()
        for _, _, writer in self._streams:
            writer.close()
        self._idle.clear()
        self._streams.clear()


class _Line(asyncio.Protocol):
    """One connection: a request, its answer, and the next.

    Attributes:
        lost: whether nothing more can be asked over it.
    """

    def __init__(self) -> None:
        self.lost = False
        self._transport: asyncio.Transport
        self._answer: asyncio.Future[tuple[int, bytes, bytes | bytearray]] | None = None
        self._begin()

    def _begin(self) -> None:
        self._held = bytearray()  # what has come of the answer and was not read yet
        self._head = b""  # its status and headers, once they are there
        self._length: int | None = None  # of its body, where that is told before
        self._chunks: list[bytes] | None = None  # its body so far, where it comes in chunks

    async def ask(self, message: bytes, timeout: float) -> tuple[int, bytes, bytes | bytearray]:
        """Status, headers and body of the answer to a message.

        Raises:
            OSError: there is none, or it is no HTTP/1.1; ``TimeoutError`` after so many seconds.
        """
        if self.lost:
            raise ConnectionError("the connection was lost")
        loop = asyncio.get_running_loop()
        self._begin()
        self._answer = answer = loop.create_future()
        timer = loop.call_later(timeout, self._fail, TimeoutError(f"no answer within {timeout:g} s"))
        self._transport.write(message)
        try:
            return await answer
        except (
            BaseException
        ):  # of a request that was given up, too, the answer is not to be taken for the next one's
            self.close()
            raise
        finally:
            timer.cancel()
            self._answer = None

    def close(self) -> None:
        """Hang up."""
        self.lost = True
        self._transport.close()

    # ------------------------------------------------------------------ what the event loop calls
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self._head and self._length is None and self._chunks is None and error is None:
            self._tell(self._held)  # the end of the body is the connection's
        self._fail(error if isinstance(error, OSError) else ConnectionError("the connection was lost"))

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # nobody has asked
            self.close()
            return
        self._held += data
        try:
            self._read()
        except ValueError:
            self._fail(ConnectionError("the server does not speak HTTP/1.1"))

    # ------------------------------------------------------------------ reading
    def _read(self) -> None:
        while not self._head:
            end = self._held.find(b"\r\n\r\n")
            if end < 0:
                if len(self._held) > _HEAD:
                    raise ValueError
                return
            head = bytes(self._held[: end + 4])
            del self._held[: end + 4]
            if 100 <= int(head[9:12]) < 200:  # it says that there will be an answer
                continue
            self._head = head
            length = _header(head, b"content-length")
            if _is_chunked(head):
                self._chunks = []
            elif length is not None:
                self._length = _size(length, 10)
        if self._length is not None and len(self._held) >= self._length:
            more = len(self._held) > self._length
            self._tell(self._held[: self._length] if more else self._held, more)
        elif self._chunks is not None:
            self._read_chunks(self._chunks)

    def _read_chunks(self, found: list[bytes]) -> None:
        while (line := self._held.find(b"\r\n")) >= 0:
            size = _size(self._held[:line].partition(b";")[0], 16)
            if not size:  # what trails ends with an empty line
                end = line if self._held[line + 2 : line + 4] == b"\r\n" else self._held.find(b"\r\n\r\n", line)
                if end >= 0:
                    self._tell(b"".join(found), len(self._held) > end + 4)
                return
            if len(self._held) < line + 2 + size + 2:
                return
            found.append(bytes(self._held[line + 2 : line + 2 + size]))
            del self._held[: line + 2 + size + 2]

    def _tell(self, body: bytes | bytearray, more: bool = False) -> None:
        head = self._head
        if more or _is_last(head):
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((int(head[9:12]), head, body))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def _size(word: bytes | bytearray, base: int) -> int:
    size = int(word, base)
    if size < 0:
        raise ValueError
    return size


def _is_last(head: bytes) -> bool:
    """Whether the server hangs up behind this answer."""
    return (_header(head, b"connection") or b"").lower() == b"close" or head.startswith(b"HTTP/1.0")


def _is_chunked(head: bytes) -> bool:
    return (_header(head, b"transfer-encoding") or b"").lower().endswith(b"chunked")


def _header(head: bytes, name: bytes) -> bytes | None:
    lower = head.lower()
    at = lower.find(b"\r\n" + name + b":")
    if at < 0:
        return None
    begin = at + len(name) + 3
    return head[begin : head.index(b"\r\n", begin)].strip()


# ---------------------------------------------------------------------- streams
async def _begun(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes
) -> tuple[int, bytes, Any]:
    """Ask over a connection, up to where the answer begins."""
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
    except EOFError:
        writer.close()
        raise ConnectionError("the connection was lost") from None
    except (ValueError, asyncio.LimitOverrunError):
        writer.close()
        raise ConnectionError("the server does not speak HTTP/1.1") from None
    except BaseException:
        writer.close()
        raise


def _is_fresh(since: float, reader: asyncio.StreamReader) -> bool:
    """Whether something may be asked over a connection: nothing has come that nobody asked for, an end included."""
    if time.monotonic() - since >= _IDLE:
        return False
    reading = reader.read(1)
    try:
        reading.send(None)
    except (StopIteration, OSError):  # there is something, or it is broken: a read of what is quiet waits
        return False
    reading.close()
    return True


async def _ended(pieces: AsyncIterator[bytes]) -> bool:
    """Whether a body ends, now that its last event has come."""
    with contextlib.suppress(TimeoutError, EOFError, OSError, ValueError):
        async with asyncio.timeout(_LAST):
            async for _ in pieces:
                pass
            return True
    return False


async def _pieces(reader: asyncio.StreamReader, head: bytes) -> AsyncIterator[bytes]:
    """The body behind a head, as it comes."""
    length = _header(head, b"content-length")
    if _is_chunked(head):
        while size := _size((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        while (await reader.readuntil(b"\r\n")) != b"\r\n":
            pass  # what trails
    elif length is not None:
        yield await reader.readexactly(_size(length, 10))
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


def _loaded(raw: bytes | bytearray) -> Any:
    return json.loads(raw) if orjson is None else orjson.loads(raw)
