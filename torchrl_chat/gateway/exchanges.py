"""Requests and their answers, on their way or there; and which of them a request tries again (``B2``)."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torchrl_chat.gateway.calls import Call, Kind, Refusal, Reply, Usage
from torchrl_chat.gateway.streaming import Progress

if TYPE_CHECKING:
    from torchrl_chat.gateway.tree import Answer

_REMEMBERED = 256  # replies that are kept for retries


class Exchange:
    """A request and its answer, on its way or there.

    Attributes:
        name: the name of the reply.
        created: seconds since 1970.
        prompt: set when the prompt stands, with its tokens, or is refused; what is refused is refused before anything is streamed.
        task: it has the reply.
        answers: what was sampled.
        waiting: how many clients wait for it.
        progress: what can be told of it already.
        seconds: how long sampling took; 0 while it has not.
    """

    def __init__(self, name: str, created: int, digest: bytes):
        loop = asyncio.get_running_loop()
        self.name, self.created, self.digest = name, created, digest
        self.prompt: asyncio.Future[Usage] = loop.create_future()
        self.task: asyncio.Task[Reply] | None = None
        self.answers: list[Answer] = []
        self.waiting = 0
        self.claimed = 0  # retries that have got it
        self.progress = Progress()
        self.seconds = 0.0
        self._delivered = False

    @property
    def done(self) -> bool:
        """Whether the answer is there."""
        return self.task is not None and self.task.done()

    @property
    def delivered(self) -> bool:
        """Whether a client has got it whole."""
        return self._delivered

    def deliver(self) -> None:
        """Say that a client has got it whole."""
        self._delivered = True
        for given in self.answers:
            given.delivered = True

    async def reply(self) -> Reply:
        """The answer.

        Raises:
            Refusal: there is none.
        """
        assert self.task is not None
        return await asyncio.shield(self.task)


class Exchanges:
    """The exchanges of a session: those on their way, and the latest of those that are done."""

    def __init__(self) -> None:
        self._named: OrderedDict[str, Exchange] = OrderedDict()
        self._by_body: dict[bytes, list[Exchange]] = {}
        self._by_key: dict[str, Exchange] = {}
        self._failed: OrderedDict[bytes, int] = (
            OrderedDict()
        )  # tries that came to nothing, and were not tried again

    def __len__(self) -> int:
        return len(self._named)

    def values(self) -> Iterable[Exchange]:
        """All of them, oldest first."""
        return list(self._named.values())

    @property
    def flying(self) -> int:
        """How many are on their way."""
        return sum(not exchange.done for exchange in self._named.values())

    def add(self, exchange: Exchange, key: str | None) -> None:
        """Take in a new one, with its idempotency key."""
        self._named[exchange.name] = exchange
        self._by_body.setdefault(exchange.digest, []).append(exchange)
        if key is not None:
            self._by_key[key] = exchange

    def tried(self, call: Call, digest: bytes) -> Exchange | None:
        """The exchange that a request tries again, if it does.

        Args:
            call: the request.
            digest: of its body.

        Raises:
            Refusal: its idempotency key was another request's.
        """
        if call.key is not None and (known := self._by_key.get(call.key)) is not None:
            if known.digest != digest:
                raise Refusal("this idempotency key was used for another request.", Kind.CONFLICT)
            return known
        if call.retry and digest in self._failed:  # it tries that one again, and none of those that were answered
            self._failed[digest] -= 1
            if not self._failed[digest]:
                del self._failed[digest]
            return None
        same = self._by_body.get(digest, [])
        # One that nobody waits for, and nobody got: its client has gone, whatever the headers say.
        lost = [exchange for exchange in same if not exchange.delivered and not exchange.waiting]
        found = lost or (same if call.retry else [])
        if not found:
            return None
        known = min(found, key=lambda exchange: (exchange.claimed, exchange.delivered))
        known.claimed += 1
        if call.key is not None:
            self._by_key[call.key] = known
        return known

    def settled(self, exchange: Exchange) -> None:
        """Forget one that failed: the next try is a new request; and, of those that did not, the oldest."""
        assert exchange.task is not None
        failed = exchange.task.cancelled() or exchange.task.exception() is not None
        if not exchange.prompt.done():
            exchange.prompt.cancel()
        if failed:
            self._forget(exchange.name)
            self._failed[exchange.digest] = self._failed.pop(exchange.digest, 0) + 1
            while len(self._failed) > _REMEMBERED:
                self._failed.popitem(last=False)
        while len(self._named) > _REMEMBERED:
            oldest = next((name for name, known in self._named.items() if known.done), None)
            if oldest is None:
                break
            self._forget(oldest)

    def _forget(self, name: str) -> None:
        exchange = self._named.pop(name, None)
        if exchange is None:
            return
        same = self._by_body.get(exchange.digest, [])
        if exchange in same:
            same.remove(exchange)
        if not same:
            self._by_body.pop(exchange.digest, None)
        for key in [key for key, known in self._by_key.items() if known is exchange]:
            del self._by_key[key]
