"""An exchange's answer on its way to a client: as a whole, or event by event as it is sampled; and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import Receive, Send

from torchrl_chat.gateway.calls import EventWriter, Kind, Refusal, Reply, Usage
from torchrl_chat.gateway.exchanges import Exchange

_PING = 15.0  # seconds of silence in a stream, after which a comment is sent
_SOON = 0.005  # seconds for which a stream waits, so as to begin with what is told first: a packet less before it


class Gone(Exception):
    """The client has left: nobody is there to be told anything."""


def _given_up() -> Refusal:
    return Refusal("the request was given up: the session is finished, or the gateway closes.", Kind.GONE)


async def left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(exchange: Exchange, gone: asyncio.Future[None]) -> Reply:
    """The reply of an exchange.

    Args:
        exchange: the exchange.
        gone: done when its client has left.

    Raises:
        Gone: the client leaves first.
        Refusal: there is no reply.
    """
    assert exchange.task is not None
    bell = _Bell(exchange.task, gone)
    try:
        await bell.rung()
    finally:
        bell.close()
    if gone.done():
        raise Gone
    if exchange.task.cancelled():
        raise _given_up()
    return exchange.task.result()


class Stream:
    """Tells a client of an answer as it grows.

    Args:
        exchange: the exchange.
        writer: writes its events.
        model: the model's name, as the client has it.
        gone: done when the client has left.
    """

    def __init__(self, exchange: Exchange, writer: EventWriter, model: str, gone: asyncio.Future[None]):
        assert exchange.task is not None
        self._exchange, self._task, self._writer, self._model, self._gone = (
            exchange,
            exchange.task,
            writer,
            model,
            gone,
        )
        self._bell = _Bell(exchange.task, gone)

    async def tell(self, send: Send, flush: Callable[[], None] | None = None) -> None:
        """All of it.

        Args:
            send: ASGI's.
            flush: sends at once what was written, where the server waits for more.

        Raises:
            Gone: the client has left.
            Refusal: the request is refused, and nothing was sent: what is refused is refused before the stream begins.
        """
        listeners = self._exchange.progress.listeners
        listeners.append(self._bell.ring)
        try:
            await self._events(send, await self._prompt(), flush)
        finally:
            listeners.remove(self._bell.ring)
            self._bell.close()

    async def _prompt(self) -> Usage:
        """The prompt's tokens, when it stands."""
        prompt = self._exchange.prompt
        while not (prompt.done() or self._task.done() or self._gone.done()):
            await self._bell.rung()
        if not prompt.done() and self._gone.done():
            raise Gone
        if not prompt.done() or prompt.cancelled():
            raise _given_up()
        return prompt.result()

    async def _events(self, send: Send, usage: Usage, flush: Callable[[], None] | None) -> None:
        exchange, writer, told, seen = self._exchange, self._writer, self._exchange.progress.told, 0
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        news = writer.begin(exchange.name, exchange.created, self._model, usage)
        if not told:
            await self._bell.rung(_SOON)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while not exchange.done:
                if self._gone.done():
                    raise Gone
                news += b"".join(map(writer.delta, told[seen:]))
                seen = len(told)
                await send({"type": "http.response.body", "body": news or writer.ping(), "more_body": True})
                news = b""
                if flush is not None:
                    flush()
                if len(told) == seen:
                    await self._bell.rung(_PING)
            reply = self._task.result()
            last = [*map(writer.delta, [*told[seen:], *exchange.progress.rest(reply)]), writer.end(reply)]
        except Refusal as refusal:
            await send({"type": "http.response.body", "body": news + writer.fail(refusal)})
            return
        except asyncio.CancelledError:
            if not exchange.done:
                raise
            await send({"type": "http.response.body", "body": news + writer.fail(_given_up())})
            return
        if self._gone.done():
            raise Gone
        await send({"type": "http.response.body", "body": b"".join([news, *last])})
        exchange.deliver()


class _Bell:
    """Wakes whoever waits, when one of some futures is done, or it is rung.

    Args:
        awaited: the futures.
    """

    def __init__(self, *awaited: asyncio.Future[Any]):
        self._awaited = awaited
        self._woken: asyncio.Future[None] | None = None
        for each in awaited:
            each.add_done_callback(self.ring)

    def ring(self, _: Any = None) -> None:
        """Wake it now; where nobody waits, nothing happens."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def rung(self, timeout: float | None = None) -> None:
        """Wait until it is rung, or for some seconds; not at all where one of the futures is done."""
        if any(each.done() for each in self._awaited):
            return
        loop = asyncio.get_running_loop()
        self._woken = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, self.ring)
        try:
            await self._woken
        finally:
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Let go of the futures."""
        for each in self._awaited:
            each.remove_done_callback(self.ring)
