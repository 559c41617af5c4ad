"""Requests read by ``httptools``: for servers that are asked hundreds of times a second, and have no WebSockets.

It costs half of what ``h11`` does, and has none of its limits, so those are here: of the size of headers, and of the time that a request may
take to arrive.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from torchrl_chat.openenv.server.connections import FLUSH, LOST, Arrival

_MOST = (
    64 * 1024
)  # bytes of a request beside its body, as h11 has it: headers, and what frames the chunks of a body
_FRAME = 16  # bytes beside the body that each part of it may have


class Corked:
    """A transport that writes in one go what is written in one go: a head and its body are one packet, and one system call.

    Args:
        transport: the transport.
        loop: its event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop = transport, loop
        self._waiting: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write soon, together with what else is written until then: a client of many requests is woken once for all of them."""
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(data)

    def close(self) -> None:
        """Close the transport, when all is written."""
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            data, self._waiting = b"".join(self._waiting), []
            self._transport.write(data)


class QuickProtocol(Arrival, HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol over ``httptools``, with limits for the arrival of each request and for the size of its headers."""

    _beside = 0  # bytes of the present request that are no body
    _whole = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection that says nothing ends, too."""
        super().connection_made(Corked(transport, self.loop))  # type: ignore[arg-type]
        self._lost: asyncio.Future[None] = self.loop.create_future()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is waited for any more."""
        self._stop()
        if not self._lost.done():
            self._lost.set_result(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, and wait for the rest if that is not the end."""
        self._beside += len(data)
        self._unset_keepalive_if_required()
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                self._decline(data[offer.args[0] :])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._beside > _MOST and not self.transport.is_closing():
            self.send_400_response("Invalid HTTP request received.")
        elif self._whole and self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        else:
            self._wait()

    def _decline(self, rest: bytes) -> None:
        """Read a request that offers another protocol as if it did not.

        Java's own client offers h2c with its first request; httptools leaves out the body of such a request (uvicorn's issue 2722).
        """
        names = (b"upgrade", b"http2-settings")
        told = [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name not in names]
        head = b"%b %b HTTP/1.1\r\n%b\r\n" % (self.scope["method"].encode(), self.url, b"".join(told))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(head + rest)

    def _should_upgrade(self) -> bool:
        return True  # asked where a request offers it: nothing is done with that one

    def on_message_begin(self) -> None:
        """A request begins."""
        self._whole = False
        super().on_message_begin()
        self.scope["extensions"] = {LOST: self._lost, FLUSH: self.transport.flush}  # type: ignore[dict-item]

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        self._beside -= len(body) + _FRAME
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here."""
        if self.parser.should_upgrade():
            return
        self._whole, self._beside = True, 0
        super().on_message_complete()
        self.flow.resume_reading()  # a large body has stopped it; that the client leaves is still to be seen


def quick_protocol(request_seconds: float) -> Any:
    """The class for ``uvicorn.Config(http=...)``, as :func:`~torchrl_chat.openenv.server.connections.timed_protocol` makes it."""
    return type("QuickProtocol", (QuickProtocol,), {"request_seconds": request_seconds})
