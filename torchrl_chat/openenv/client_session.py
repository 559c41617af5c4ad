"""One session with an OpenEnv server: one WebSocket, one environment at its other end.

The protocol has no request ids: a server answers in the order of the requests, one reply each. So every request takes a
place in a queue, and a reply belongs to the oldest place. A request that is given up (a timeout, a cancelled task) keeps its
place; the reply that comes late is recognised by it, and dropped. What contradicts this order (a reply of the wrong kind, a
reply to nothing) ends the session: from then on nobody could tell what answers what.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import orjson

from torchrl_chat.openenv.protocol import CloseCode, ErrorCode

_REPLIES = {"reset": "observation", "step": "observation", "state": "state", "mcp": "mcp"}
# Sent unasked, in front of the end of the connection; they answer no request.
_FATAL = {ErrorCode.CAPACITY_REACHED, ErrorCode.FACTORY_ERROR, ErrorCode.SESSION_ERROR, ErrorCode.UNAUTHORIZED}
_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
_CLOSE_SECONDS = 2.0


class OpenEnvError(RuntimeError):
    """Something went wrong between a client and an OpenEnv server.

    Attributes:
        code: the error code that the server sent, if it did (``"VALIDATION_ERROR"``, ``"CAPACITY_REACHED"`` ...).
    """

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code


class ServerError(OpenEnvError):
    """The server answered a request with an error; the session lives on.

    Attributes:
        errors: what exactly is wrong, where the server says so (pydantic's list of errors).
    """

    def __init__(self, message: str, code: str | None = None, errors: Any = None):
        super().__init__(message, code)
        self.errors = errors


class SessionLost(OpenEnvError, ConnectionError):
    """The session is over, and with it the conversation that the server kept; a reset begins a new one."""


class ConnectFailed(OpenEnvError, ConnectionError):
    """The server cannot be reached, or refuses the connection."""


class RequestTimeout(OpenEnvError, TimeoutError):
    """No reply in time. The server may still act on the request; its late reply is dropped."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """How to reach a server. Times are in seconds.

    Attributes:
        url: the server's base URL (``http``, ``https``, ``ws`` or ``wss``, with any path in front of ``/ws``).
        headers: HTTP headers of the connection.
        connect_timeout: for connecting; a server that does not listen yet is tried again within it.
        timeout: for one reply; ``None`` for no limit.
        max_bytes: of one message; ``None`` for no limit.
        ping_interval: between pings; ``None`` for none.
        ping_timeout: how long a server may take to answer one before the session counts as lost.
        delta: whether observations may carry only what is new (for servers that can; see ``client_channel.py``).
        resume: whether the session shall outlive its connection, where the server can do that.
        compress: whether to offer ``permessage-deflate``: half the bytes, for two to three times the time.
        options: further arguments for ``websockets.connect`` (``ssl``, ``proxy`` ...).
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # it may hold a token
    connect_timeout: float = 10.0
    timeout: float | None = 60.0
    max_bytes: int | None = None
    ping_interval: float | None = 20.0
    ping_timeout: float | None = 120.0
    delta: bool = False
    resume: bool = False
    compress: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("connect_timeout", "timeout", "max_bytes", "ping_interval", "ping_timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: expected a positive number, or None.")
        self.address()

    def address(self, query: str = "") -> str:
        """The address of the WebSocket, with a further part of its query string.

        Raises:
            ValueError: the URL has another scheme, or names no host.
        """
        parts = urlsplit(self.url if "://" in self.url else f"http://{self.url}")
        if parts.scheme not in _SCHEMES or not parts.hostname:
            raise ValueError(f"base_url is {self.url!r}: expected http(s)://HOST[:PORT][/PATH], or ws(s)://.")
        path = parts.path.rstrip("/")
        path = path if path.endswith("/ws") else path + "/ws"
        joined = "&".join(filter(None, (parts.query, query)))
        return urlunsplit((_SCHEMES[parts.scheme], parts.netloc, path, joined, ""))

    async def connect(self, query: str = "") -> Any:
        """An open WebSocket.

        Raises:
            ConnectFailed: not within ``connect_timeout``, or the server refuses.
        """
        websockets = need_websockets()
        address, loop = self.address(query), asyncio.get_running_loop()
        give_up, delay = loop.time() + self.connect_timeout, 0.05
        options: dict[str, Any] = {} if not _is_loopback(address) else {"proxy": None}
        while True:
            try:
                return await websockets.connect(
                    address,
                    additional_headers=dict(self.headers),
                    open_timeout=max(0.05, give_up - loop.time()),
                    close_timeout=_CLOSE_SECONDS,
                    max_size=self.max_bytes,
                    ping_interval=self.ping_interval,
                    ping_timeout=self.ping_timeout,
                    compression="deflate" if self.compress else None,
                    **{**options, **self.options},
                )
            except Exception as error:
                if not _may_pass(error) or loop.time() + delay >= give_up:
                    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                    raise ConnectFailed(f"no connection to {address}: {said}") from error
            await asyncio.sleep(delay)
            delay = min(2 * delay, 1.0)


class Session:
    """One connection; all of it is used on one event loop.

    Args:
        link: how to reach the server.
        socket: an open WebSocket, from :meth:`Link.connect`.
        on_reply: sees the data of every reply that is no error, in order, even of requests that were given up; what it
            returns is the result of the request.
    """

    def __init__(
        self, link: Link, socket: Any, on_reply: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None
    ):
        self.link = link
        self._on_reply = on_reply
        self._socket = socket
        self._waiting: deque[tuple[str, asyncio.Future[Any]]] = deque()
        self._end: tuple[str, str | None] | None = None  # why the session is over, and the server's error code
        self._reader = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def open(cls, link: Link, query: str = "", on_reply: Any = None) -> Session:
        """Connect.

        Raises:
            ConnectFailed: the server cannot be reached.
        """
        return cls(link, await link.connect(query), on_reply)

    @property
    def lost(self) -> SessionLost | None:
        """Why the session is over, if it is."""
        return None if self._end is None else SessionLost(*self._end)

    async def request(
        self, kind: str, data: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """The ``data`` of the reply to one request.

        Args:
            kind: ``"reset"``, ``"step"``, ``"state"`` or ``"mcp"``.
            data: what goes with it.
            timeout: seconds until the reply; ``None`` for no limit.

        Raises:
            ServerError: the server answered with an error.
            RequestTimeout: no reply in time.
            SessionLost: the session is over.
            TypeError, ValueError: ``data`` is not JSON.
        """
        frame = json.dumps({"type": kind} if data is None else {"type": kind, "data": data}, allow_nan=False)
        if self._end is not None:
            raise SessionLost(*self._end)
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((kind, reply))
        # In a task of its own: a frame whose place is taken is sent, even if the caller gives up meanwhile.
        sending = asyncio.ensure_future(self._socket.send(frame))
        sending.add_done_callback(self._sent)
        try:
            async with asyncio.timeout(timeout) as limit:
                return await reply
        except TimeoutError:
            if not limit.expired():
                raise
            raise RequestTimeout(f"no reply to {kind!r} within {timeout:g} s from {self.link.url}.") from None

    async def close(self) -> None:
        """End the session; the server frees its environment."""
        if self._end is None:
            self._over("it was closed here")
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._socket.send('{"type": "close"}')
            except Exception:  # it is closed all the same
                pass
        await self._socket.close()
        self._reader.cancel()

    # ------------------------------------------------------------------ the other direction
    def _sent(self, sending: asyncio.Future[None]) -> None:
        if sending.cancelled():
            self._over("the event loop ended")
        elif (error := sending.exception()) is not None and self._reader.done():
            self._over(f"sending failed: {error}")  # otherwise the reader comes to the end, and knows why

    async def _read(self) -> None:
        try:
            async for frame in self._socket:
                self._take(frame)
                if self._end is not None:
                    break
            else:
                self._over(f"the server closed the connection{_closing(self._socket)}")
        except asyncio.CancelledError:
            self._over("the event loop ended")
            self._socket.transport.abort()  # nobody will be there to close it in order
            raise
        except Exception as error:
            # Another connection has the session now: to take it back would begin a quarrel.
            taken = self._socket.close_code == CloseCode.TAKEN_OVER
            self._over(f"the connection broke: {error}", CloseCode.TAKEN_OVER.name if taken else None)
        await self._socket.close()

    def _take(self, frame: str | bytes) -> None:
        try:
            reply = orjson.loads(frame)
            kind, data = reply["type"], reply.get("data") or {}
            if not isinstance(data, dict):
                raise TypeError("its data are no object")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return self._over(f"the server sent what is no frame of the protocol ({error}): {frame[:80]!r}")
        if kind == "error" and data.get("code") in _FATAL:
            return self._over(f"the server ended it: {data.get('message')} ({data['code']})", data["code"])
        if not self._waiting:
            return self._over(f"the server sent {kind!r} unasked")
        asked, waiting = self._waiting.popleft()
        if kind not in ("error", _REPLIES.get(asked)):
            self._waiting.appendleft((asked, waiting))
            return self._over(f"the server answered {asked!r} with {kind!r}")
        if kind != "error" and self._on_reply is not None:
            try:
                data = self._on_reply(asked, data)
            except Exception as error:
                self._waiting.appendleft((asked, waiting))
                return self._over(f"its reply to {asked!r} cannot be read: {error}")
        if waiting.done():
            return  # it was given up
        if kind == "error":
            waiting.set_exception(_refusal(data))
        else:
            waiting.set_result(data)

    def _over(self, reason: str, code: str | None = None) -> None:
        if self._end is not None:
            return
        self._end = (f"the session with {self.link.url} is lost: {reason}", code)
        while self._waiting:
            _, waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(SessionLost(*self._end))


def need_websockets() -> Any:
    """The module ``websockets.asyncio.client``.

    Raises:
        ImportError: it is not installed; the text names the extra.
    """
    try:
        import websockets.asyncio.client
    except ImportError as error:
        raise ImportError(
            "an OpenEnv client needs the package 'websockets': pip install 'torchrl_chat[openenv]'."
        ) from error
    return websockets.asyncio.client


def _may_pass(error: Exception) -> bool:
    """Whether a server that refused may take the next connection: it is starting, or busy."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (429, 502, 503, 504)
    return isinstance(error, OSError) or isinstance(error.__cause__, EOFError)


def _refusal(data: dict[str, Any]) -> ServerError:
    code, said, errors = data.get("code"), str(data.get("message")), data.get("errors")
    if isinstance(errors, list):  # OpenEnv says only "Invalid message" there
        details = [
            f"{'.'.join(map(str, item.get('loc') or ()))}: {item.get('msg')}"
            for item in errors
            if isinstance(item, dict)
        ]
        missing = [detail for detail in details[:8] if detail not in said]
        said = "; ".join([said, *missing])
    return ServerError(f"{code}: {said}", code, errors)


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _closing(socket: Any) -> str:
    code, reason = socket.close_code, socket.close_reason
    return f" ({code}{' ' + reason if reason else ''})"
