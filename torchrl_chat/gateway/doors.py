"""Doors: addresses at which one session is served, and nothing else.

An agent in a sandbox reaches one socket, that of its session's door. What it asks there is asked of its session and with the session's key, whatever
name and key it shows: it needs to be told neither, and those of others do not help. There is no way from a door to what drivers ask.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from torchrl_chat.gateway.calls import Dialect, Kind, Refusal, dumps
from torchrl_chat.gateway.sessions import Session

CONNECTIONS = 64
"""How many connections there may be through a door at a time; more are closed at once."""
_SHOWN = (b"authorization", b"x-api-key", b"api-key")  # where a client's key may stand


class Bound:
    """An ASGI application that hands the requests of agents on, as those of one session.

    Args:
        app: the gateway's application.
        session: the session.
        dialects: what is spoken.
    """

    def __init__(self, app: ASGIApp, session: Session, dialects: Sequence[Dialect]):
        self._app, self._refused = app, dialects[0]
        self._prefix = f"/s/{session.name}"
        self._key = (b"authorization", b"Bearer " + session.key.encode())
        paths = {path for each in dialects for path in (each.path, each.count_path, "/models") if path}
        self._paths = paths | {f"/v1{path}" for path in paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] not in self._paths:
            await self._refuse(send)
            return
        path = self._prefix + scope["path"]
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _SHOWN]
        own = {"path": path, "raw_path": path.encode(), "headers": [*headers, self._key]}
        await self._app({**scope, **own}, receive, send)

    async def _refuse(self, send: Send) -> None:
        spoken = ", ".join(sorted(path for path in self._paths if path.startswith("/v1/")))
        refusal = Refusal(f"there is nothing at this address; agents ask at {spoken}.", Kind.MISSING)
        body = dumps(self._refused.refusal(refusal))
        told = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": refusal.status, "headers": told})
        await send({"type": "http.response.body", "body": body})


class Door:
    """A listening socket at which an application is served, until it is closed. It belongs to one event loop.

    Args:
        app: the application.
        protocol: uvicorn's class for HTTP, see :func:`~torchrl_chat.openenv.server.connections.timed_protocol`.
    """

    def __init__(self, app: ASGIApp, protocol: Any):
        import uvicorn
        from uvicorn.server import ServerState

        self._config = uvicorn.Config(
            app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, timeout_keep_alive=60
        )
        self._config.load()
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    async def open(self, listener: socket.socket) -> None:
        """Serve what connects to ``listener``, which is closed with the door, and where that cannot be."""
        try:
            self._server = await asyncio.get_running_loop().create_server(self._connected, sock=listener)
        except BaseException:
            listener.close()
            raise

    def close(self) -> None:
        """End all connections; a second time changes nothing."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._state.connections):
            connection.transport.abort()

    def _connected(self) -> asyncio.Protocol:
        if len(self._state.connections) >= CONNECTIONS:
            return _Refused()
        made: Any = self._config.http_protocol_class
        return made(config=self._config, server_state=self._state, app_state={})


class _Refused(asyncio.Protocol):
    """A connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.abort()  # type: ignore[attr-defined]
