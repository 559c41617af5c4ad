"""A conversation's line to its server, over as many connections as it takes.

Only what is safe is done twice: connecting, a reset, a look at the state. A step is sent again only if the server's count of
steps shows that it was not done. A new session is opened by a reset only, since nobody expects anything to be there then.

Two extensions of this package's server are used where the link asks for them; other servers ignore the wish. ``delta``:
observations carry what is new, and the whole is put together here. ``resume``: the session outlives its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from torchrl_chat._endpoint import shown_url
from torchrl_chat.openenv.client.connection import Session
from torchrl_chat.openenv.client.errors import OpenEnvError, ReplyLost, SessionLost
from torchrl_chat.openenv.client.link import CLOSE_SECONDS, Link

_RESETS = 2  # in sessions that may have ended since they were last used


class Channel:
    """Requests to one session; all of it is used on one event loop.

    Args:
        link: how to reach the server.
    """

    def __init__(self, link: Link):
        self.link = link
        self._session: Session | None = None
        self._opening = asyncio.Lock()
        self._id: str | None = None  # of a session that can be resumed
        self._used = False  # whether the session has ever answered: one that has may have ended since
        self._steps = 0  # that the server has confirmed in this episode
        self._whole: dict[str, list[Any]] = {}  # the last observation's messages and tokens

    @property
    def lost(self) -> SessionLost | None:
        """Why the session is over, if it is and cannot be resumed."""
        error = None if self._session is None else self._session.lost
        return None if error is not None and self._resumable(error) else error

    @property
    def connected(self) -> bool:
        """Whether there is a session in order."""
        return self._session is not None and self._session.lost is None

    async def open(self) -> None:
        """Connect, if there is no session yet.

        Raises:
            ConnectFailed: the server cannot be reached.
        """
        await self._ready()

    async def request(self, kind: str, data: Mapping[str, Any] | None, timeout: float | None) -> dict[str, Any]:
        """The ``data`` of the reply; see :meth:`Session.request`.

        Raises:
            ReplyLost: see there.
        """
        if kind == "reset":
            return await self._reset(data, timeout)
        session = await self._ready()
        before = session.steps_under_way  # given up, and perhaps done
        try:
            return await session.request(kind, data, timeout)
        except SessionLost as error:
            if not self._resumable(error):
                raise
        known, session = self._steps, await self._ready()
        if kind == "step":
            count = (await session.request("state", None, timeout)).get("step_count")
            self._steps = count if isinstance(count, int) else known
            if not isinstance(count, int) or count > known + before:
                raise ReplyLost(
                    f"the connection to {shown_url(self.link.url)} broke during a step; the server has done it (it counts {count} "
                    f"steps, replies came to {known}), and its reply is lost."
                )
        return await session.request(kind, data, timeout)

    async def _reset(self, data: Mapping[str, Any] | None, timeout: float | None) -> dict[str, Any]:
        for _ in range(_RESETS):
            session = await self._ready(anew=True)
            used = self._used
            try:
                return await session.request("reset", data, timeout)
            except SessionLost:
                if not used:
                    raise
        return await (await self._ready(anew=True)).request("reset", data, timeout)

    async def close(self) -> None:
        """End the session, one that could be resumed too."""
        session, self._session = self._session, None
        if session is None:
            return
        if self._id is not None and session.lost is None:
            params = {"session_id": self._id}
            end = {"jsonrpc": "2.0", "id": 0, "method": "openenv/session/close", "params": params}
            try:
                await session.request("mcp", end, CLOSE_SECONDS)
            except (OpenEnvError, ConnectionError):  # then the server ends it by itself after a while
                pass
        self._id = None
        await session.close()

    # ------------------------------------------------------------------ sessions
    async def _ready(self, anew: bool = False) -> Session:
        """The session in order, or one that is lost for good."""
        if self.connected:
            assert self._session is not None
            return self._session
        async with self._opening:
            session = self._session
            error = None if session is None else session.lost
            if session is not None and error is None:
                return session
            if error is not None and session is not None:
                resumed = self._resumable(error)
                if not resumed and not anew:
                    return session
                await session.close()
                if not resumed:
                    self._id = None
            asked = [f"session_id={self._id}"] if self._id else ["resume=1"] if self.link.resume else []
            query = "&".join(asked + (["delta=1"] if self.link.delta else []))
            self._session = await Session.open(self.link, query, self._replied)
            self._used = self._id is not None
            return self._session

    def _resumable(self, error: SessionLost) -> bool:
        # A session that the server ended with an error, or gave to another connection, is gone.
        return self._id is not None and error.code is None

    # ------------------------------------------------------------------ replies
    def _replied(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        self._used = True
        if kind not in ("reset", "step"):
            return data
        observation = data.get("observation")
        fields = observation if isinstance(observation, dict) else {}
        if kind == "reset":
            self._steps = 0
            metadata = fields.get("metadata") or data.get("metadata") or {}
            identity = metadata.get("session_id") if isinstance(metadata, dict) else None
            self._id = identity if self.link.resume and isinstance(identity, str) else self._id
        else:
            self._steps += 1
        if self.link.delta:
            self._put_together(fields)
        return data

    def _put_together(self, observation: dict[str, Any]) -> None:
        """Make an observation that holds what is new the whole one.

        Raises:
            ValueError: it goes on from what is not here.
        """
        delta = observation.pop("delta", None)
        for key in ("messages", "tokens"):
            new = observation.get(key)
            if isinstance(new, list) and delta is not None:
                before, keep = self._whole.get(key, []), delta[key]
                if not 0 <= keep <= len(before):
                    raise ValueError(f"a delta keeps {keep} of the {key}, and {len(before)} are here")
                del before[keep:]
                before += new
                self._whole[key] = before
                observation[key] = list(before)
            elif isinstance(new, list):
                self._whole[key] = list(new)
