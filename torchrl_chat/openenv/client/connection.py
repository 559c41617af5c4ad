"""One session with an OpenEnv server: one WebSocket, one environment at its other end.

The protocol has no request ids: a server answers in the order of the requests, one reply each. So every request takes a
place in a queue, and a reply belongs to the oldest place. A request that is given up (a timeout, a cancelled task) keeps its
place; the reply that comes late is recognised by it, and dropped. What contradicts this order (a reply of the wrong kind, a
reply to nothing) ends the session: from then on nobody could tell what answers what.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import orjson

from torchrl_chat._endpoint import shown_url
from torchrl_chat.openenv.client.errors import RequestTimeout, ServerError, SessionLost
from torchrl_chat.openenv.client.link import Link
from torchrl_chat.openenv.protocol import CloseCode, ErrorCode

if TYPE_CHECKING:
    from torchrl_chat.openenv.client.socket import Socket

_REPLIES = {"reset": "observation", "step": "observation", "state": "state", "mcp": "mcp"}
# Sent unasked, in front of the end of the connection; they answer no request.
_FATAL = {ErrorCode.CAPACITY_REACHED, ErrorCode.FACTORY_ERROR, ErrorCode.SESSION_ERROR, ErrorCode.UNAUTHORIZED}
# What json would refuse is left to json, which says so.
_PLAIN = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS


class Session:
    """One connection; all of it is used on one event loop.

    Args:
        link: how to reach the server.
        socket: an open WebSocket, from :meth:`Link.connect`.
        on_reply: sees the data of every reply that is no error, in order, even of requests that were given up; what it
            returns is the result of the request.
    """

    def __init__(
        self, link: Link, socket: Socket, on_reply: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None
    ):
        self.link = link
        self._on_reply = on_reply
        self._socket = socket
        self._waiting: deque[tuple[str, asyncio.Future[Any]]] = deque()
        self._end: tuple[str, str | None] | None = None  # why the session is over, and the server's error code
        self._loop = asyncio.get_running_loop()
        self._watch = self._loop.create_task(self._see_it_end())
        socket.taker = self._take

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

    @property
    def steps_under_way(self) -> int:
        """How many steps have no reply yet, those that were given up among them."""
        return sum(kind == "step" for kind, _ in self._waiting)

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
        frame = encode({"type": kind} if data is None else {"type": kind, "data": data})
        if self._end is not None:
            raise SessionLost(*self._end)
        reply: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._waiting.append((kind, reply))
        self._socket.say(frame)
        if timeout is None:
            return await reply
        limit = self._loop.call_later(timeout, self._too_late, kind, reply, timeout)
        try:
            return await reply
        finally:
            limit.cancel()

    async def close(self) -> None:
        """End the session; the server frees its environment."""
        if self._end is None:
            self._over("it was closed here")
            self._socket.say(b'{"type":"close"}')
        await self._socket.close()

    # ------------------------------------------------------------------ the other direction
    def _too_late(self, kind: str, reply: asyncio.Future[Any], timeout: float) -> None:
        if not reply.done():
            reply.set_exception(
                RequestTimeout(f"no reply to {kind!r} within {timeout:g} s from {shown_url(self.link.url)}.")
            )

    async def _see_it_end(self) -> None:
        try:
            await self._socket.wait_closed()
        except asyncio.CancelledError:
            self._over("the event loop ended")
            self._socket.transport.abort()  # nobody will be there to close it in order
            raise
        # Another connection has the session now: to take it back would begin a quarrel.
        taken = self._socket.close_code == CloseCode.TAKEN_OVER
        self._over(self._socket.ending(), CloseCode.TAKEN_OVER.name if taken else None)

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
        if refusal is None and self._on_reply is not None:
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
        self._closing = self._loop.create_task(self._socket.close())

    def _over(self, reason: str, code: str | None = None) -> None:
        if self._end is not None:
            return
        self._end = (f"the session with {shown_url(self.link.url)} is lost: {reason}", code)
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
