"""A conversation's line to its server, over as many connections as it takes.

Only what is safe is done twice: connecting, a reset, a look at the state. A step is sent again only if the server's count of
steps shows that it was not done. A new session is opened by a reset only, since nobody expects anything to be there then.

Two extensions of this package's server are used where the link asks for them; other servers ignore the wish. ``delta``:
observations carry what is new, and the whole is put together here. ``resume``: the session outlives its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchrl_chat.endpoint import shown_url
from torchrl_chat.openenv.client.errors import OpenEnvError, ReplyLost, SessionLost
from torchrl_chat.openenv.client.link import CLOSE_SECONDS, Link

if TYPE_CHECKING:
    from torchrl_chat.openenv.client.connection import Connection

_RESETS = 2  # in sessions that may have ended since they were last used


class Channel:
    """Requests to one session; all of it is used on one event loop.

    Args:
        link: how to reach the server.
    """

    def __init__(self, link: Link):
        self.link = link
        self._held: Connection | None = None
        self._opening = asyncio.Lock()
        self._id: str | None = None  # of a session that can be resumed
        self._used = False  # whether the session has ever answered: one that has may have ended since
        self._steps = 0  # that the server has confirmed in this episode
        self._whole: dict[str, list[Any]] = {}  # the last observation's messages and tokens

    @property
    def lost(self) -> SessionLost | None:
        """Why the session is over, if it is and cannot be resumed."""
        error = None if self._held is None else self._held.lost
        return None if error is not None and self._resumable(error) else error

    @property
    def connected(self) -> bool:
        """Whether there is a session in order."""
        return self._held is not None and self._held.lost is None

    async def open(self, anew: bool = False) -> Connection:
        """The connection to the session: a new one before the first request, and to resume the session.

        Args:
            anew: whether a session that is lost for good is followed by another; else its connection is returned.

        Raises:
            ConnectFailed: the server cannot be reached.
        """
        async with self._opening:
            held = self._held
            if held is not None:
                error = held.lost
                if error is None:
                    return held
                if not self._resumable(error):
                    if not anew:
                        return held
                    self._id = None
                await held.leave()
            asked = [f"session_id={self._id}"] if self._id else ["resume=1"] if self.link.resume else []
            query = "&".join(asked + (["delta=1"] if self.link.delta else []))
            self._held = await self.link.connect(query, self._replied)
            self._used = self._id is not None
            return self._held

    async def request(self, kind: str, data: Mapping[str, Any] | None, timeout: float | None) -> dict[str, Any]:
        """The ``data`` of the reply; see :meth:`~torchrl_chat.openenv.client.connection.Connection.ask`.

        Raises:
            ReplyLost: see there.
        """
        if kind == "reset":
            return await self._reset(data, timeout)
        connection = await self.open()
        before = connection.steps_under_way  # given up, and perhaps done
        try:
            return await connection.ask(kind, data, timeout)
        except SessionLost as error:
            if not self._resumable(error):
                raise
        known, connection = self._steps, await self.open()
        if kind == "step":
            count = (await connection.ask("state", None, timeout)).get("step_count")
            self._steps = count if isinstance(count, int) else known
            if not isinstance(count, int) or count > known + before:
                raise ReplyLost(
                    f"the connection to {shown_url(self.link.url)} broke during a step; the server has done it (it counts {count} "
                    f"steps, replies came to {known}), and its reply is lost."
                )
        return await connection.ask(kind, data, timeout)

    async def _reset(self, data: Mapping[str, Any] | None, timeout: float | None) -> dict[str, Any]:
        for _ in range(_RESETS):
            connection, used = await self.open(anew=True), self._used
            try:
                return await connection.ask("reset", data, timeout)
            except SessionLost:
                if not used:
                    raise
        return await (await self.open(anew=True)).ask("reset", data, timeout)

    async def close(self) -> None:
        """End the session, one that could be resumed too."""
        held, self._held = self._held, None
        if held is None:
            return
        if self._id is not None and held.lost is None:
            params = {"session_id": self._id}
            end = {"jsonrpc": "2.0", "id": 0, "method": "openenv/session/close", "params": params}
            try:
                await held.ask("mcp", end, CLOSE_SECONDS)
            except (OpenEnvError, ConnectionError):  # then the server ends it by itself after a while
                pass
        self._id = None
        await held.leave()

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
