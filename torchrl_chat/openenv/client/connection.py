"""One connection to an OpenEnv server, one environment at its other end; ``websockets`` does all but the last step.

The protocol has no request ids: a server answers in the order of the requests, one reply each. So every request takes a
place in a queue, and a reply belongs to the oldest place. A request that is given up (a timeout, a cancelled task) keeps its
place; the reply that comes late is recognised by it, and dropped. What contradicts this order (a reply of the wrong kind, a
reply to nothing) ends the session: from then on nobody could tell what answers what.

The connections of ``websockets`` keep messages in a queue until a task asks for them, and send in coroutines. Here a message
is read in the very call that received it, and sent in the call that asks for it.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosedOK
from websockets.frames import DATA_OPCODES, Frame
from websockets.protocol import State

from torchrl_chat.endpoint import shown_url
from torchrl_chat.openenv.client.errors import RequestTimeout, ServerError, SessionLost
from torchrl_chat.openenv.protocol import CloseCode, ErrorCode

_REPLIES = {"reset": "observation", "step": "observation", "state": "state", "mcp": "mcp"}
# Sent unasked, in front of the end of the connection; they answer no request.
_FATAL = {ErrorCode.CAPACITY_REACHED, ErrorCode.FACTORY_ERROR, ErrorCode.SESSION_ERROR, ErrorCode.UNAUTHORIZED}
# What json would refuse is left to json, which says so.
_PLAIN = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS


class Connection(ClientConnection):
    """An open connection, made by :meth:`~torchrl_chat.openenv.client.link.Link.connect`; used on one event loop.

    Args:
        url: of the server, for errors.
        on_reply: sees the data of every reply that is no error, in order, even of requests that were given up; what it
            returns is the result of the request.
    """

    def __init__(
        self, *arguments: Any, url: str, on_reply: Callable[[str, dict[str, Any]], dict[str, Any]], **options: Any
    ):
        super().__init__(*arguments, **options)
        self._url = shown_url(url)
        self._on_reply = on_reply
        self._waiting: deque[tuple[str, asyncio.Future[Any]]] = deque()
        self._end: tuple[str, str | None] | None = None  # why the session is over, and the server's error code
        self._parts: list[bytes] = []

    def watch(self) -> None:
        """Notice the end of the connection, once it is open."""
        self._watch = self.loop.create_task(self._see_it_end())

    @property
    def lost(self) -> SessionLost | None:
        """Why the session is over, if it is."""
        return None if self._end is None else SessionLost(*self._end)

    @property
    def steps_under_way(self) -> int:
        """How many steps have no reply yet, those that were given up among them."""
        return sum(kind == "step" for kind, _ in self._waiting)

    async def ask(
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
        frame = encode({"type": kind} if data is None else {"type": kind, "data": data})
        if self._end is not None:
            raise SessionLost(*self._end)
        reply: asyncio.Future[dict[str, Any]] = self.loop.create_future()
        self._waiting.append((kind, reply))
        self._say(frame)
        if timeout is None:
            return await reply
        limit = self.loop.call_later(timeout, self._too_late, kind, reply, timeout)
        try:
            return await reply
        finally:
            limit.cancel()

    async def leave(self) -> None:
        """End the session; the server frees its environment."""
        if self._end is None:
            self._over("it was closed here")
            self._say(b'{"type":"close"}')
        await self.close()

    def process_event(self, event: Any) -> None:
        """Read a message once its last frame is here; everything else is the base class's affair."""
        if self.response is None or not isinstance(event, Frame) or event.opcode not in DATA_OPCODES:
            super().process_event(event)
            return
        self._parts.append(bytes(event.data))
        if event.fin:
            message, self._parts = b"".join(self._parts), []
            self._take(message)

    # ------------------------------------------------------------------ the other direction
    def _say(self, message: bytes) -> None:
        """Send a message. One that can no longer be sent is dropped: the end of the connection is near."""
        if self.state is State.OPEN:
            self.protocol.send_text(message)
            self.send_data()

    def _too_late(self, kind: str, reply: asyncio.Future[Any], timeout: float) -> None:
        if not reply.done():
            reply.set_exception(RequestTimeout(f"no reply to {kind!r} within {timeout:g} s from {self._url}."))

    async def _see_it_end(self) -> None:
        try:
            await self.wait_closed()
        except asyncio.CancelledError:
            self._over("the event loop ended")
            self.transport.abort()  # nobody will be there to close it in order
            raise
        error, reason = self.protocol.close_exc, f" {self.close_reason}" if self.close_reason else ""
        if isinstance(error, ConnectionClosedOK):
            said = f"the server closed the connection ({self.close_code}{reason})"
        else:
            said = f"the connection broke: {error}"
        # Another connection has the session now: to take it back would begin a quarrel.
        taken = self.close_code == CloseCode.TAKEN_OVER
        self._over(said, CloseCode.TAKEN_OVER.name if taken else None)

    def _take(self, frame: bytes) -> None:
        if self._end is not None:
            return
        try:
            reply = orjson.loads(frame)
            kind, data = reply["type"], reply.get("data") or {}
            if not isinstance(data, dict):
                raise TypeError("its data are no object")
            refusal = ServerError.of(data) if kind == "error" else None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return self._fail(f"the server sent what is no frame of the protocol ({error}): {frame[:80]!r}")
        if refusal is not None and refusal.code in _FATAL:
            return self._fail(f"the server ended it: {data.get('message')} ({refusal.code})", refusal.code)
        if not self._waiting:
            return self._fail(f"the server sent {kind!r} unasked")
        asked, waiting = self._waiting[0]
        if kind not in ("error", _REPLIES.get(asked)):
            return self._fail(f"the server answered {asked!r} with {kind!r}")
        if refusal is None:
            try:
                data = self._on_reply(asked, data)
            except Exception as error:
                return self._fail(f"its reply to {asked!r} cannot be read: {error}")
        self._waiting.popleft()
        if waiting.done():
            return  # it was given up
        if refusal is not None:
            waiting.set_exception(refusal)
        else:
            waiting.set_result(data)

    def _fail(self, reason: str, code: str | None = None) -> None:
        """End the session for what the server sent."""
        self._over(reason, code)
        self._closing = self.loop.create_task(self.close())

    def _over(self, reason: str, code: str | None = None) -> None:
        if self._end is not None:
            return
        self._end = (f"the session with {self._url} is lost: {reason}", code)
        while self._waiting:
            _, waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(SessionLost(*self._end))


def encode(value: Any) -> bytes:
    """A value as JSON.

    Raises:
        TypeError, ValueError: it is not JSON; NaN and infinity are not.
    """
    try:
        frame = orjson.dumps(value, option=_PLAIN)
    except TypeError:  # a key that is a number, half a surrogate pair: json knows what to do, or what is wrong
        pass
    else:
        if b"null" not in frame:  # which is what orjson makes of numbers that JSON does not have
            return frame
    return json.dumps(value, allow_nan=False).encode()
