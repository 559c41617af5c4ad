"""JSON posted to one address again and again, over connections that are kept: for engines that are asked hundreds of times a second.

HTTP/1.1 over asyncio's transports, and no more of it than a server of a model needs. A general client makes objects of URLs, headers,
requests and responses each time, which costs more than a gateway does for the whole of a call (``benchmarks/gateway.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
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
_MOST = 2**20  # bytes of an answer's headers; and of a stream, that are there and were not read yet
_LAST = 0.1  # seconds in which the end of a stream's body is waited for, when its last event has come
_EARLY = 0.002  # seconds by which timers come early: uvloop's count whole milliseconds
_HEAD, _PIECE, _WHOLE = range(3)  # what of an answer is waited for: its headers, more of its body, all of it


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
        deadline: seconds for all tries of a request, and for the whole of a stream.
        decode: makes a value of an answer's JSON, or of that of an event of a stream; ``None``: what JSON has.
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
        deadline: float = float("inf"),
        pause: float = 0.5,
        decode: Callable[[bytes], Any] | None = None,
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
        self._retries, self._timeout, self._deadline, self._pause = retries, timeout, deadline, pause
        self._decode = decode or _loaded
        self._idle: list[tuple[float, _Line]] = []

    async def post(self, body: Any) -> Any:
        """What the server answers to a body; arrays of numbers (numpy's) in a body are lists.

        Raises:
            PostError: the server refuses, or fails each time.
            OSError: it cannot be reached; ``TimeoutError`` among them.
            ValueError: what it answers is no JSON.
        """
        line = await self._tried(body, time.monotonic() + self._deadline, _WHOLE)
        raw = line.taken()
        self._keep(line)
        return self._decode(raw)

    async def stream(self, body: Any) -> AsyncGenerator[Any, None]:
        """What the server answers to a body, event by event (server-sent events); an answer that is no stream is one event.

        Nothing is tried again once the answer has begun. Whoever stops reading closes the connection, by which a server knows.

        Raises:
            PostError, OSError, ValueError: as of :meth:`post`.
        """
        until = time.monotonic() + self._deadline
        line = await self._tried(body, until, _HEAD)
        try:
            if b"text/event-stream" not in (_header(line.head, b"content-type") or b""):
                await self._waited(line, _WHOLE, until)
                yield self._decode(line.taken())
                return
            async with (
                contextlib.aclosing(self._pieces(line, until)) as pieces,
                contextlib.aclosing(_events(pieces)) as events,
            ):
                async for data in events:
                    if data == b"[DONE]":
                        with contextlib.suppress(OSError):
                            await line.wait(_WHOLE, _LAST)
                        return
                    if not line.whole:
                        self._left(until)
                    yield self._decode(data)
        finally:
            self._keep(line)

    async def _pieces(self, line: _Line, until: float) -> AsyncGenerator[bytes, None]:
        """The body of an answer, as it comes."""
        while True:
            if not line.whole:
                self._left(until)
            if piece := line.taken():
                yield piece
            elif line.whole:
                return
            else:
                await self._waited(line, _PIECE, until)

    async def _waited(self, line: _Line, what: int, until: float) -> None:
        """Wait for more of an answer that has begun.

        Raises:
            OSError: it does not come; of a ``TimeoutError`` it is told whether the deadline is what has passed.
        """
        if line.whole:
            return
        try:
            await line.wait(what, self._left(until))
        except TimeoutError:
            self._left(until)
            raise

    def _left(self, until: float) -> float:
        """Seconds for what is tried next.

        Raises:
            TimeoutError: there are none.
        """
        left = until - time.monotonic()
        if left <= _EARLY:
            raise TimeoutError(f"no reply within {self._deadline:g} s, with all tries")
        return min(left, self._timeout)

    async def _tried(self, body: Any, until: float, what: int) -> _Line:
        """The connection with the answer to a body, as much of it as is waited for; tried again as often as it may be, until a time."""
        if orjson is None:
            raw = json.dumps(body, default=lambda array: array.tolist()).encode()
        else:
            raw = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        message = self._head + b"%d\r\n\r\n" % len(raw) + raw
        for tried in range(self._retries + 1):
            wait: float | None = None
            try:
                ends = time.monotonic() + self._left(until)
                line = await self._asked(message, ends - time.monotonic(), what)
                if line.status < 300:
                    return line
                await line.wait(_WHOLE, ends - time.monotonic())
            except OSError as error:  # a timeout is one
                self._left(until)
                failure: Exception = error
            else:
                status = line.status
                failure = PostError(status, line.taken()[:400].decode(errors="replace"))
                wait = _seconds(_header(line.head, b"retry-after"))
                self._keep(line)
                if status not in _AGAIN and status < 500:
                    raise failure
            if tried == self._retries or (wait is not None and wait > _LONGEST):
                raise failure
            wait = wait or min(self._pause * 2**tried, 8.0) * (1 - random.random() / 4)
            await asyncio.sleep(min(wait, max(until - time.monotonic(), 0)))
        raise AssertionError  # the loop returns, or raises

    async def _asked(self, message: bytes, timeout: float, what: int) -> _Line:
        """One try; on a connection that the server has closed meanwhile, once more on a new one."""
        begun = time.monotonic()
        line = self._kept()
        if line is not None:
            try:
                await line.ask(message, timeout, what)
                return line
            except TimeoutError:
                raise
            except OSError:
                pass
        async with asyncio.timeout(timeout - (time.monotonic() - begun)):
            line = await self._opened()
        await line.ask(message, timeout - (time.monotonic() - begun), what)
        return line

    async def _opened(self) -> _Line:
        if self._secure and self._ssl is None:
            self._ssl = ssl.create_default_context()
        loop = asyncio.get_running_loop()
        _, line = await loop.create_connection(_Line, self._host, self._port, ssl=self._ssl)
        return line

    def _kept(self) -> _Line | None:
        while self._idle:
            since, line = self._idle.pop()
            if time.monotonic() - since < _IDLE and not line.lost:
                return line
            line.close()
        return None

    def _keep(self, line: _Line) -> None:
        """Keep a connection whose answer was read to its end; of those that are kept, the oldest may be of no use by now."""
        now = time.monotonic()
        while self._idle and (now - self._idle[0][0] >= _IDLE or self._idle[0][1].lost):
            self._idle.pop(0)[1].close()
        if line.whole and not line.lost:
            self._idle.append((now, line))
        else:
            line.close()

    async def aclose(self) -> None:
        """Close the connections that are kept."""
        for _, line in self._idle:
            line.close()
        self._idle.clear()


class _Line(asyncio.Protocol):
    """One connection: a request, its answer, and the next.

    Attributes:
        lost: whether nothing more can be asked over it.
        head: the status and the headers of the answer, once they are there.
        status: its HTTP status.
        whole: whether all of it is there.
    """

    def __init__(self) -> None:
        self.lost = False
        self._transport: asyncio.Transport
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False
        self._begin()
        self.whole = True

    def _begin(self) -> None:
        self.head, self.status, self.whole = b"", 0, False
        self._held = bytearray()  # what has come of the answer and was not read yet
        self._length: int | None = None  # of the rest of its body, where that is told before
        self._chunked = False
        self._pieces: list[bytes] = []  # its body, as far as it was read and not taken yet
        self._ready = 0  # how many bytes these are
        self._resume()
        self._failure: Exception | None = None
        self._what = _WHOLE

    async def ask(self, message: bytes, timeout: float, what: int) -> None:
        """Send a message, and wait for its answer.

        Args:
            message: the request.
            timeout: seconds.
            what: as of :meth:`wait`.

        Raises:
            OSError: as of :meth:`wait`.
        """
        if self.lost:
            raise ConnectionError("the connection was lost")
        self._begin()
        if what == _WHOLE:  # behind whatever else is asked at the same time: an engine is woken once for all of it
            asyncio.get_running_loop().call_soon(self._write, message)
        else:  # somebody reads along
            self._write(message)
        await self.wait(what, timeout)

    async def wait(self, what: int, timeout: float) -> None:
        """Wait for the head of the answer, for more of its body, or for all of it.

        Raises:
            OSError: it does not come, or is no HTTP/1.1; ``TimeoutError`` after so many seconds. The connection is closed.
        """
        if self._failure is None and self._there(what):
            return
        loop = asyncio.get_running_loop()
        self._what, self._waiter = what, loop.create_future()
        timer = loop.call_later(timeout, self._late, timeout)
        self._resume()
        if self._failure is not None:
            self._waiter.set_exception(self._failure)
        try:
            await self._waiter
        except (
            BaseException
        ):  # of a request that was given up, too, the answer is not to be taken for the next one's
            self.close()
            raise
        finally:
            timer.cancel()
            self._waiter = None

    def taken(self) -> bytes:
        """What has come of the body since it was asked last."""
        pieces, self._pieces, self._ready = self._pieces, [], 0
        self._resume()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Hang up."""
        self.lost = True
        self._transport.close()

    def _write(self, message: bytes) -> None:
        if not self.lost:
            self._transport.write(message)

    def _there(self, what: int) -> bool:
        return self.whole or (what == _HEAD and self.head != b"") or (what == _PIECE and self._pieces != [])

    def _tell(self) -> None:
        if self._waiter is not None and not self._waiter.done() and self._there(self._what):
            self._waiter.set_result(None)

    def _late(self, timeout: float) -> None:
        if self._waiter is not None and not self._waiter.done():  # what has come meanwhile came in time
            self._fail(TimeoutError(f"no answer within {timeout:g} s"))

    def _resume(self) -> None:
        if self._paused and not self.lost:
            self._transport.resume_reading()
        self._paused = False

    def _fail(self, error: Exception) -> None:
        if self.whole:
            return
        self._failure = self._failure or error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._failure)

    # ------------------------------------------------------------------ what the event loop calls
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self.head and self._length is None and not self._chunked and error is None:
            self.whole = True  # the end of the body is the connection's
            self._tell()
        self._fail(error if isinstance(error, OSError) else ConnectionError("the connection was lost"))

    def data_received(self, data: bytes) -> None:
        if self.whole:  # nobody has asked
            self.close()
            return
        self._held += data
        try:
            if self.head or self._read_head():
                self._read_body()
        except ValueError:
            self._tell()  # what came before it is good
            self._fail(ConnectionError("the server does not speak HTTP/1.1"))
            self.close()
            return
        self._tell()
        waits = self._waiter is not None and not self._waiter.done()
        if not (waits or self.whole or self._paused) and self._ready + len(self._held) > _MOST:
            self._paused = True  # whoever reads along is slower than the server
            self._transport.pause_reading()

    # ------------------------------------------------------------------ reading
    def _read_head(self) -> bool:
        while (end := self._held.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._held[: end + 4])
            del self._held[: end + 4]
            status = int(head[9:12])
            if 100 <= status < 200:  # it says that there will be an answer
                continue
            self.head, self.status = head, status
            length = b"0" if status in (204, 304) else _header(head, b"content-length")
            self._chunked = status not in (204, 304) and _is_chunked(head)
            if length is not None and not self._chunked:
                self._length = _size(length, 10)
            return True
        if len(self._held) > _MOST:
            raise ValueError
        return False

    def _read_body(self) -> None:
        if self._chunked:
            self._read_chunks()
            return
        most = len(self._held) if self._length is None else min(self._length, len(self._held))
        if most:
            self._add(bytes(self._held[:most]))
            del self._held[:most]
        if self._length is not None:
            self._length -= most
            if not self._length:
                self._end(len(self._held) > 0)

    def _read_chunks(self) -> None:
        while (line := self._held.find(b"\r\n")) >= 0:
            size = _size(self._held[:line].partition(b";")[0], 16)
            if not size:  # what trails ends with an empty line
                end = line if self._held[line + 2 : line + 4] == b"\r\n" else self._held.find(b"\r\n\r\n", line)
                if end >= 0:
                    self._end(len(self._held) > end + 4)
                    return
                break
            if len(self._held) < line + 2 + size + 2:
                return
            self._add(bytes(self._held[line + 2 : line + 2 + size]))
            del self._held[: line + 2 + size + 2]
        if len(self._held) > _MOST:  # neither a size nor what trails is as long
            raise ValueError

    def _add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._ready += len(piece)

    def _end(self, more: bool) -> None:
        self.whole = True
        # What comes behind it was not asked for, and is not to be taken for the next answer.
        if more or (_header(self.head, b"connection") or b"").lower() == b"close" or self.head[:8] == b"HTTP/1.0":
            self.close()


def _size(word: bytes | bytearray, base: int) -> int:
    size = int(word, base)
    if size < 0:
        raise ValueError
    return size


def _seconds(word: bytes | None) -> float | None:
    """How long a server asks us to wait; ``None`` where it does not say so in seconds."""
    with contextlib.suppress(ValueError):
        if word is not None and math.isfinite(told := float(word)) and told >= 0:
            return told
    return None


def _is_chunked(head: bytes) -> bool:
    return (_header(head, b"transfer-encoding") or b"").lower().endswith(b"chunked")


def _header(head: bytes, name: bytes) -> bytes | None:
    lower = head.lower()
    at = lower.find(b"\r\n" + name + b":")
    if at < 0:
        return None
    begin = at + len(name) + 3
    return head[begin : head.index(b"\r\n", begin)].strip()


async def _events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
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
