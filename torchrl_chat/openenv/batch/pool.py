"""N sessions with OpenEnv servers on one event loop: what one row suffers, the others do not notice."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_chat._loop import LoopThread
from torchrl_chat.openenv.client.channel import Channel
from torchrl_chat.openenv.client.errors import OpenEnvError, RequestTimeout, SessionLost
from torchrl_chat.openenv.client.link import Link
from torchrl_chat.openenv.protocol import ErrorCode

_HANDSHAKES = 32  # at once: a server that starts an environment for each is slow enough

Reply = dict[str, Any] | Exception
"""The data of a reply, or why there is none."""


class Pool:
    """One session a row, each opened when it is first reset.

    A row whose request fails keeps its session if the session is in order (the server refused); a session that is lost, or
    that owes a reply, is given up, and the row's next reset opens another.

    Args:
        links: how to reach the server of each row.
        reset_timeout: seconds for the reply to a reset.
        step_timeout: seconds for the reply to a step.
    """

    def __init__(self, links: Sequence[Link], reset_timeout: float | None, step_timeout: float | None):
        self._links = list(links)
        self._reset_timeout = reset_timeout
        self._step_timeout = step_timeout
        self._held: list[Channel | None] = [None] * len(links)
        self._handshakes = asyncio.Semaphore(_HANDSHAKES)
        self._closing: set[asyncio.Task[None]] = set()
        self._loop = LoopThread("torchrl_chat.openenv", quick=True)

    @property
    def alive(self) -> bool:
        """Whether there is a thread that serves them: not in a forked child."""
        return self._loop.alive

    @property
    def connected(self) -> bool:
        """Whether any row holds a session in order."""
        return any(channel is not None and channel.connected for channel in self._held)

    def reset(self, wanted: Mapping[int, Mapping[str, Any]]) -> dict[int, Reply]:
        """Reset some rows at once.

        Args:
            wanted: the arguments of each row's reset.
        """
        return self._loop.run(self._all(self._reset, wanted))

    def step(self, actions: Mapping[int, Mapping[str, Any]]) -> dict[int, Reply]:
        """Step some rows at once.

        Args:
            actions: the fields of each row's action.
        """
        return self._loop.run(self._all(self._step, actions))

    def close(self) -> None:
        """End all sessions, and the thread."""
        if self._loop.alive:
            self._loop.run(self._close())
            self._loop.close()

    # ------------------------------------------------------------------ on the loop
    async def _all(self, one: Any, wanted: Mapping[int, Mapping[str, Any]]) -> dict[int, Reply]:
        replies = await asyncio.gather(*(one(row, data) for row, data in wanted.items()), return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, Exception):
                raise reply
        return dict(zip(wanted, replies, strict=True))  # type: ignore[arg-type]

    async def _reset(self, row: int, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        loop, delay = asyncio.get_running_loop(), 0.05
        give_up = loop.time() + self._links[row].connect_timeout
        while True:
            channel = self._held[row]
            if channel is None:
                channel = self._held[row] = Channel(self._links[row])
            async with self._handshakes:
                await channel.open()
            try:
                return await channel.request("reset", kwargs, self._reset_timeout)
            except RequestTimeout:
                self._give_up(row)
                raise
            except SessionLost as error:
                self._give_up(row)
                if error.code != ErrorCode.CAPACITY_REACHED or loop.time() + delay >= give_up:
                    raise
            await asyncio.sleep(delay)  # a full server may get room
            delay = min(2 * delay, 1.0)

    async def _step(self, row: int, action: Mapping[str, Any]) -> dict[str, Any]:
        channel = self._held[row]
        if channel is None:
            raise OpenEnvError("the row has no session: it was closed, or belongs to another process.")
        try:
            return await channel.request("step", action, self._step_timeout)
        except (RequestTimeout, SessionLost):
            self._give_up(row)
            raise

    def _give_up(self, row: int) -> None:
        """Close a row's session without waiting for it."""
        channel, self._held[row] = self._held[row], None
        if channel is not None:
            task = asyncio.get_running_loop().create_task(channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self) -> None:
        for row in range(len(self._held)):
            self._give_up(row)
        await asyncio.gather(*self._closing, return_exceptions=True)
