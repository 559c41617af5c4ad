"""Who may come in by a port of this machine: requests under its own names, from its own pages, with its token.

Every server of the package asks here; the questions need no library, so that whoever serves may choose one.
"""

from __future__ import annotations

import functools
import hmac
import ipaddress
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection
    from starlette.types import ASGIApp, Receive, Scope, Send


def is_loopback(host: str) -> bool:
    """Whether a server of that host is on this machine, and only this machine can reach it.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("[::1]"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@functools.lru_cache(256)
def names_loopback(host: str) -> bool:
    """Whether a ``Host`` header (RFC 9110, section 7.2) names this machine as only this machine can: ``localhost:8000``."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name is not None and is_loopback(name)


class Guard:
    """Refuses requests without the token, and those of foreign web pages.

    A browser sends the ``Origin`` (RFC 6454) of the page that makes it write: where it is another server's, the person in
    front of the browser did not mean it. A client that is no web page sends none, and passes.

    Args:
        token: the bearer token (RFC 6750); ``None`` lets everybody in.
        origins: origins of web pages that may talk to the server, besides those that it serves itself, such as
            ``"https://example.org"``; ``"*"`` lets every page.
    """

    def __init__(self, token: str | None = None, origins: Collection[str] = ()):
        if token is not None and not token.strip():
            raise ValueError("token is empty: give a secret, or None.")
        if isinstance(origins, str):
            raise ValueError(f"origins is the text {origins!r}: expected a list of origins, [{origins!r}].")
        self._token = None if token is None else token.encode()
        self._origins = {origin.rstrip("/").lower() for origin in origins}

    def refusal(self, connection: HTTPConnection) -> tuple[int, str] | None:
        """The HTTP status and the reason of a refusal; ``None`` for a request that may pass."""
        origin = connection.headers.get("origin")
        if origin is not None and "*" not in self._origins and not self._knows(origin, connection):
            return 403, "this web page's origin is not allowed here (allowed_origins)."
        if self._token is None:
            return None
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            return 401, "send the server's token: 'Authorization: Bearer TOKEN'."
        return None

    def _knows(self, origin: str, connection: HTTPConnection) -> bool:
        host = connection.headers.get("host", "")
        return origin.lower() in self._origins or (bool(host) and urlsplit(origin).netloc.lower() == host.lower())


class OwnNames:
    """ASGI middleware of a server for this machine only: refuses requests under a name that is not this machine's.

    A foreign page whose name is made to lead here (DNS rebinding) is of the same origin as the server; its name is not.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or refuse it."""
        if scope["type"] in ("http", "websocket"):
            # Of several the first, as starlette's headers have it, which are made anew for each request.
            host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
            if not names_loopback(host):
                from starlette.responses import JSONResponse

                detail = (
                    f"this server is for its own machine: ask for it as localhost or 127.0.0.1, not {host[:100]!r}."
                )
                await JSONResponse({"detail": detail}, 400)(scope, receive, send)
                return
        await self._app(scope, receive, send)
