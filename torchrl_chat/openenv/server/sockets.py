"""The WebSocket ``/ws``: one session a socket, one reply a frame, in order."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from torchrl_chat.access import Guard
from torchrl_chat.openenv.protocol import CloseCode, ErrorCode, ProtocolError, parse_frame
from torchrl_chat.openenv.server import mcp
from torchrl_chat.openenv.server.security import Bucket, address_of
from torchrl_chat.openenv.server.sessions import ServerSession, SessionTable

_GONE = (WebSocketDisconnect, RuntimeError, OSError)  # what sending to a closed socket raises
_YES = frozenset({"1", "true", "yes"})


@dataclass(eq=False)
class Line:
    """One socket and its session."""

    socket: WebSocket
    """The accepted socket. Frames go past it, straight to and from the server: it would look at each twice."""
    receive: Receive
    send: Send
    sessions: SessionTable
    busy: bool = False
    """Whether a frame is being answered."""
    leaving: tuple[ProtocolError | None, int, str] | None = None
    """Why the server closes the socket."""

    def __post_init__(self) -> None:
        self._bucket = Bucket(self.sessions.limits.requests_per_second)

    async def serve(self) -> None:
        """Answer frames until either side closes."""
        try:
            session = await self._session()
        except ProtocolError as error:
            await self._send(self.sessions.told(error).frame())
            await self._close(CloseCode.NORMAL, str(error.code))
            return
        try:
            await self._talk(session)
        finally:
            await self.sessions.detach(session, self)

    async def end(self, error: ProtocolError | None, code: int, reason: str) -> None:
        """Close the socket, after the step that is under way."""
        self.leaving = error, code, reason
        if not self.busy:
            await self._leave()

    async def _session(self) -> ServerSession:
        query = self.socket.query_params
        wanted = query.get("session_id")
        if wanted:
            session = self.sessions.find(wanted)
            before, session.line = session.line, self
            session.resumable = True
            session.replies.forget()
            if before is not None:  # of two sockets the newer one is right: the older may be half open
                await before.end(None, CloseCode.TAKEN_OVER, "resumed by another socket")
        else:
            resumable = query.get("resume", "").lower() in _YES
            session = await self.sessions.open(address_of(self.socket), resumable=resumable)
            session.line, session.attached = self, True
        if (delta := query.get("delta")) is not None:
            session.replies.delta = delta.lower() in _YES
        return session

    async def _talk(self, session: ServerSession) -> None:
        while self.leaving is None:
            message = await self.receive()
            if message["type"] != "websocket.receive":
                return
            raw = message.get("text")
            self.busy = True
            try:
                reply = await self._answer(session, message.get("bytes") or b"" if raw is None else raw)
            finally:
                self.busy = False
            if reply is None:
                await self._close(CloseCode.NORMAL, "")
                return
            if not await self._send(reply):
                return
        await self._leave()

    async def _answer(self, session: ServerSession, raw: str | bytes) -> bytes | None:
        """The reply to a frame; ``None`` where the client wants to leave."""
        try:
            if not self._bucket.takes():
                raise ProtocolError(
                    ErrorCode.RATE_LIMITED,
                    f"more than {self.sessions.limits.requests_per_second:g} requests a second.",
                )
            kind, data = parse_frame(raw, self.sessions.limits)
            self.sessions.metrics.count("requests_total", kind=kind)
            if kind == "step":
                return b'{"type":"observation","data":%b}' % await session.step(data)
            if kind == "reset":
                return b'{"type":"observation","data":%b}' % await session.reset(data)
            if kind == "state":
                return b'{"type":"state","data":%b}' % await session.state()
            if kind == "mcp":
                return b'{"type":"mcp","data":%b}' % await mcp.answer(data, self.sessions, address_of(self.socket))
            return None
        except Exception as error:  # this session is told, the others go on
            return self.sessions.told(error, session=session.id).frame()

    async def _send(self, reply: bytes) -> bool:
        try:
            await self.send({"type": "websocket.send", "text": reply.decode()})
        except _GONE:
            return False
        self.sessions.metrics.count("bytes_sent_total", amount=len(reply))
        return True

    async def _leave(self) -> None:
        assert self.leaving is not None
        error, code, reason = self.leaving
        if error is not None:
            await self._send(error.frame())
        await self._close(code, reason)

    async def _close(self, code: int, reason: str) -> None:
        if self.socket.application_state is WebSocketState.DISCONNECTED:
            return
        try:
            await asyncio.wait_for(self.socket.close(code, reason), 5.0)
        except (*_GONE, TimeoutError):
            pass  # it is closed, as wanted


@dataclass(frozen=True)
class Endpoint:
    """The endpoint of ``/ws``, an ASGI application."""

    sessions: SessionTable
    guard: Guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one socket."""
        socket = WebSocket(scope, receive, send)
        refusal = self.guard.refusal(socket)
        try:
            if refusal is None:
                await socket.accept()
            else:
                status, reason = refusal
                self.sessions.metrics.count("refused_total", reason=str(status))
                await socket.send_denial_response(JSONResponse({"detail": reason}, status_code=status))
        except _GONE:
            return
        if refusal is None:
            await Line(socket, receive, send, self.sessions).serve()
