"""How to reach an OpenEnv server: its address, what a connection is allowed, and connecting."""

from __future__ import annotations

import asyncio
import functools
import importlib
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from torchrl_chat.access import is_loopback
from torchrl_chat.endpoint import shown_url
from torchrl_chat.openenv.client.errors import ConnectFailed

if TYPE_CHECKING:
    from torchrl_chat.openenv.client.connection import Connection

_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
CLOSE_SECONDS = 2.0
"""How long a server may take to say good-bye."""


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

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # it may hold a token
    connect_timeout: float = 10.0
    timeout: float | None = 60.0
    max_bytes: int | None = None
    ping_interval: float | None = 20.0
    ping_timeout: float | None = 120.0
    delta: bool = False
    resume: bool = False
    compress: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

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
            raise ValueError(
                f"base_url is {shown_url(self.url)!r}: expected http(s)://HOST[:PORT][/PATH], or ws(s)://."
            )
        path = parts.path.rstrip("/")
        path = path if path.endswith("/ws") else path + "/ws"
        joined = "&".join(filter(None, (parts.query, query)))
        return urlunsplit((_SCHEMES[parts.scheme], parts.netloc, path, joined, ""))

    async def connect(self, query: str, on_reply: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Connection:
        """An open connection.

        Args:
            query: a further part of the address's query string.
            on_reply: see :class:`~torchrl_chat.openenv.client.connection.Connection`.

        Raises:
            ConnectFailed: not within ``connect_timeout``, or the server refuses.
        """
        from websockets.asyncio.client import connect

        from torchrl_chat.openenv.client.connection import Connection

        address, loop = self.address(query), asyncio.get_running_loop()
        give_up, delay = loop.time() + self.connect_timeout, 0.05
        options: dict[str, Any] = {"proxy": None} if is_loopback(urlsplit(address).hostname or "") else {}
        while True:
            try:
                connection = await connect(
                    address,
                    create_connection=functools.partial(  # type: ignore[arg-type]  # any callable is one
                        Connection, url=self.url, on_reply=on_reply
                    ),
                    additional_headers=dict(self.headers),
                    open_timeout=max(0.05, give_up - loop.time()),
                    close_timeout=CLOSE_SECONDS,
                    max_size=self.max_bytes,
                    ping_interval=self.ping_interval,
                    ping_timeout=self.ping_timeout,
                    compression="deflate" if self.compress else None,
                    **{**options, **self.options},
                )
                assert isinstance(connection, Connection)
                connection.watch()
                return connection
            except Exception as error:
                if not _may_pass(error) or loop.time() + delay >= give_up:
                    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                    raise ConnectFailed(f"no connection to {shown_url(address)}: {said}") from error
            await asyncio.sleep(delay)
            delay = min(2 * delay, 1.0)


def need_websockets() -> None:
    """Make sure that the package ``websockets`` is there.

    Raises:
        ImportError: it is not installed; the text names the extra.
    """
    try:
        importlib.import_module("websockets.asyncio.client")
    except ImportError as error:
        raise ImportError(
            "an OpenEnv client needs the package 'websockets': pip install 'torchrl_chat[openenv]'."
        ) from error


def _may_pass(error: Exception) -> bool:
    """Whether a server that refused may take the next connection: it is starting, or busy."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (429, 502, 503, 504)
    return isinstance(error, OSError) or isinstance(error.__cause__, EOFError)
