"""The agents of a batch, each at a session whose engine is whoever looks: what they ask waits here until it is answered.

It knows agents, sessions and ledgers, and no columns: :mod:`torchrl_chat.gateway.environment` makes an environment of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from tensordict import TensorDict

from torchrl_chat._loop import LoopThread
from torchrl_chat.conversation import Transcript, Turn
from torchrl_chat.conversation.limits import NO_LIMIT
from torchrl_chat.gateway.agents import Agent, end_of, end_session, finish_all
from torchrl_chat.gateway.engines import Ask
from torchrl_chat.gateway.policies import settle
from torchrl_chat.gateway.serve import Gateway, Served
from torchrl_chat.seeds import SEED


class Nobody:
    """The engine of a gateway whose sessions have engines of their own."""

    settings: frozenset[str] = frozenset()

    async def sample(self, ask: Ask) -> Turn:
        """Not asked for: each session has its own."""
        raise RuntimeError("nobody samples here.")

    async def aclose(self) -> None:
        """Nothing is held."""


class _Episode:
    """One agent, and the engine of its session: what it asks waits here until it is answered."""

    settings: frozenset[str] = frozenset()

    def __init__(self, news: threading.Condition):
        self._news = news
        self._asked: deque[tuple[Ask, asyncio.AbstractEventLoop, asyncio.Future[Turn]]] = deque()
        self.served: Served | None = None
        self.life: Future[Any] | None = None
        self.end: Mapping[str, Any] | Exception | None = None
        self.finished = False

    async def sample(self, ask: Ask) -> Turn:
        """See :class:`~torchrl_chat.gateway.engines.Engine`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Turn] = loop.create_future()
        with self._news:
            self._asked.append((ask, loop, future))
            self._news.notify_all()
        return await future

    async def aclose(self) -> None:
        """Nothing is held."""

    @property
    def ask(self) -> Ask | None:
        """What is asked, and not answered: of several at once, the first."""
        while self._asked and self._asked[0][2].done():  # its client has left
            self._asked.popleft()
        return self._asked[0][0] if self._asked else None

    @property
    def ready(self) -> bool:
        """Whether there is something to show."""
        return self.end is not None or self.ask is not None

    def answer(self, turn: Turn | Exception) -> None:
        """Answer what is asked."""
        _, loop, future = self._asked.popleft()
        with contextlib.suppress(RuntimeError):  # a loop that is closed waits for nothing
            loop.call_soon_threadsafe(settle, future, turn)


class Desk:
    """The agents of a batch, and what each of them asks.

    Args:
        agent: the agent.
        gateway: the gateway that they ask.
        count: how many there are.
        seconds: how long an agent may take; ``None`` for no limit.
        data_key: the column that holds what an episode was asked.
    """

    def __init__(self, agent: Agent, gateway: Gateway, count: int, seconds: float | None, data_key: str):
        self._agent, self._gateway, self._seconds, self._data_key = agent, gateway, seconds, data_key
        self._news = threading.Condition()
        self._episodes: list[_Episode | None] = [None] * count
        self.ledgers: list[Transcript | None] = [None] * count
        """The prompt that was shown of each row, if it has one."""
        self._loop = LoopThread("torchrl_chat.agents", quick=True)
        # Threads are made as they are needed; an agent that does not end when it is told to keeps its own.
        self._pool = ThreadPoolExecutor(4 * count + 64, "torchrl_chat.agent")
        gateway.start()

    def begin(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Start an agent for each of these rows, in the place of those that are there."""
        self._drop(list(rows), "the environment was reset")
        for i, row in rows.items():
            episode = self._episodes[i] = _Episode(self._news)
            served = episode.served = self._gateway.session(row=row, seed=row.get(SEED))
            served.session.held = True
            served.session.engine = episode
            episode.life = self._loop.submit(self._lived(episode, row))

    async def _lived(self, episode: _Episode, row: Mapping[str, Any]) -> None:
        assert episode.served is not None
        end: Mapping[str, Any] | Exception = RuntimeError("the agent was ended")
        try:
            end = await end_of(self._agent, row, episode.served, self._pool, self._seconds)
        finally:
            self._gateway.run(functools.partial(self._gateway.table.retire, episode.served.session))
            with self._news:
                episode.end = end
                self._news.notify_all()

    def wait(self, rows: Sequence[int]) -> None:
        """Wait until each of these agents asks something, or has ended."""
        with self._news:
            self._news.wait_for(lambda: all(self._at(i).ready for i in rows))
        for i in rows:
            ask = self.asked(i)
            self.ledgers[i] = None if ask is None else ask.ledger

    def _at(self, i: int) -> _Episode:
        episode = self._episodes[i]
        if episode is None:
            raise RuntimeError(f"row {i} has no agent: reset the environment first.")
        return episode

    def asked(self, i: int) -> Ask | None:
        """What an agent asks."""
        episode = self._episodes[i]
        return None if episode is None or episode.end is not None else episode.ask

    def asks(self, i: int) -> bool:
        """Whether what was shown of a row is still to be answered."""
        return self.ledgers[i] is not None and self.asked(i) is not None

    def seed(self, i: int, known: int) -> int:
        """What the answer of a row is sampled from; the episode's own seed where nothing is asked."""
        episode, ask = self._episodes[i], self.asked(i)
        if ask is not None and ask.seed is not None:
            return ask.seed
        own = None if episode is None or episode.served is None else episode.served.session.seed
        return known if own is None else own

    def room(self, i: int) -> int:
        """How many tokens the answer of a row may have."""
        ask = self.asked(i)
        return NO_LIMIT if ask is None or ask.limit is None else ask.limit

    def check(self, held: Sequence[Transcript], goes: Sequence[bool]) -> None:
        """See that what is stepped is what was shown.

        Raises:
            RuntimeError: it is not.
        """
        for i, going in enumerate(goes):
            shown = self.ledgers[i]
            if going and self._at(i) and shown is not None and held[i] is not shown:
                if torch.equal(held[i].tokens, shown.tokens):
                    continue
                raise RuntimeError(
                    f"row {i}: this is not what its agent asks now. An agent goes on from where it stands: an earlier TensorDict cannot be "
                    "stepped again, nor that of another environment."
                )

    def answer(self, i: int, turn: Turn | Exception | None) -> None:
        """Tell an agent what the policy said."""
        with self._news:
            self._at(i).answer(turn if turn is not None else ValueError("the policy said nothing"))

    def ended(self, i: int) -> bool:
        """Whether an agent has ended, and its episode is to be finished."""
        episode = self._at(i)
        return episode.end is not None and not episode.finished

    def finish(self, rows: Sequence[int], groups: Sequence[int], on_error: str) -> TensorDict | None:
        """Grade and end these episodes; their columns, one a row."""
        if not rows:
            return None
        episodes = [self._at(i) for i in rows]
        sessions = [episode.served for episode in episodes if episode.served is not None]
        ends = [episode.end for episode in episodes if episode.end is not None]
        for episode in episodes:
            episode.finished = True
        finish_all(self._gateway, sessions, ends, on_error, [groups[i] for i in rows])
        return self._gateway.episodes(sessions, self._data_key)

    def _drop(self, rows: Sequence[int], why: str) -> None:
        """End agents that are still at it."""
        for i in rows:
            episode = self._episodes[i]
            self._episodes[i] = self.ledgers[i] = None
            if episode is None or episode.finished or episode.served is None:
                continue
            if episode.life is not None:
                episode.life.cancel()
            self._gateway.run(functools.partial(end_session, self._gateway, episode.served, {"failure": why}))

    def close(self) -> None:
        """End all agents, and the gateway."""
        self._drop(range(len(self._episodes)), "the environment was closed")
        self._loop.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._gateway.close()
