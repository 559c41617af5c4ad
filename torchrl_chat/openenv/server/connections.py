"""Connections that say nothing, or half of a request, end.

uvicorn limits how long a connection may be idle between two requests, not how long a request may take to arrive: who sends
a line a minute keeps a connection open for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LOST = "torchrl_chat.lost"
"""The extension of an ASGI scope under which a future stands that is done when the client has left, where the server has it."""
FLUSH = "torchrl_chat.flush"
"""The extension under which a function stands that sends at once what was written, where the server waits for more."""


class Arrival:
    """A limit for the time in which a request arrives, of any of uvicorn's protocols."""

    request_seconds: float
    loop: Any
    transport: Any
    _arrival: asyncio.TimerHandle | None = None

    def _wait(self) -> None:
        if self._arrival is None:
            self._arrival = self.loop.call_later(self.request_seconds, self.transport.close)

    def _stop(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None


class _Timed(Arrival, H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a limit for the arrival of each request, headers and body."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.get_protocol() is self and self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._wait()
        else:
            self._stop()  # the request is here, or the connection is a WebSocket's now


def timed_protocol(request_seconds: float) -> Any:
    """The class for ``uvicorn.Config(http=...)``; a request has so many seconds from its first byte (the first one of a
    connection: from its beginning) to its last.
    """
    return type("TimedProtocol", (_Timed,), {"request_seconds": request_seconds})
