"""How often a client may ask, and which it is; who may ask at all is the affair of :mod:`torchrl_chat.access`."""

from __future__ import annotations

import time

from starlette.requests import HTTPConnection


def address_of(connection: HTTPConnection) -> str:
    """The client's address; empty for one without (a Unix socket)."""
    return connection.client.host if connection.client else ""


class Bucket:
    """A token bucket: so many requests a second, twice as many at once.

    Args:
        rate: requests a second; ``None`` for no limit.
    """

    __slots__ = ("_filled", "_left", "_rate")

    def __init__(self, rate: float | None):
        self._rate = rate
        self._left = 0.0 if rate is None else max(1.0, 2 * rate)
        self._filled = time.monotonic()

    def takes(self) -> bool:
        """Whether another request may pass now."""
        if self._rate is None:
            return True
        now = time.monotonic()
        self._left = min(max(1.0, 2 * self._rate), self._left + (now - self._filled) * self._rate)
        self._filled = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
