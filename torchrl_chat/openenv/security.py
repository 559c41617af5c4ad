"""Who may talk to a server: a bearer token, the origin of web pages, the rate of requests."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

_MAX_ADDRESSES = 10_000


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Refuses requests without the token, and those of foreign web pages.

    Args:
        token: the bearer token (RFC 6750); ``None`` lets everybody in.
        origins: origins of web pages that may talk to the server, besides those that it serves itself, such as
            ``"https://example.org"``; ``None`` lets every page.
    """

    def __init__(self, token: str | None = None, origins: Collection[str] | None = None):
        if token is not None and not token.strip():
            raise ValueError("token is empty: give a secret, or None.")
        self._token = None if token is None else token.encode()
        self._origins = None if origins is None else {origin.rstrip("/").lower() for origin in origins}

    def refusal(self, connection: HTTPConnection) -> tuple[int, str] | None:
        """The HTTP status and the reason of a refusal; ``None`` for a request that may pass."""
        origin = connection.headers.get("origin")
        if origin is not None and self._origins is not None and not self._knows(origin, connection):
            return 403, "this web page's origin is not allowed here (allowed_origins)."
        if self._token is None:
            return None
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            return 401, "send the server's token: 'Authorization: Bearer TOKEN'."
        return None

    def _knows(self, origin: str, connection: HTTPConnection) -> bool:
        assert self._origins is not None
        host = connection.headers.get("host", "")
        return origin.lower() in self._origins or (bool(host) and urlsplit(origin).netloc.lower() == host.lower())


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


class Buckets:
    """A bucket for every address; the oldest are forgotten.

    Args:
        rate: requests a second of one address.
    """

    def __init__(self, rate: float | None):
        self._rate = rate
        self._table: dict[str, Bucket] = {}

    def takes(self, address: str) -> bool:
        """Whether another request of this address may pass now."""
        if self._rate is None:
            return True
        bucket = self._table.pop(address, None) or Bucket(self._rate)
        self._table[address] = bucket
        if len(self._table) > _MAX_ADDRESSES:
            del self._table[next(iter(self._table))]
        return bucket.takes()
