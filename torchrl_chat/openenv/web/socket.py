"""``/web/ws``: the way of a web page to ``/ws`` where the server asks for a token.

A browser cannot send ``Authorization`` with a WebSocket's handshake. It can name subprotocols (RFC 6455, section 1.9),
and these never stand in an address, a history or a log: the page offers ``torchrl-chat`` and ``bearer.TOKEN``, the token in
base64url. Here it becomes the header that ``/ws`` asks for, and ``torchrl-chat`` is what is agreed on.
"""

from __future__ import annotations

import base64
import binascii

from starlette.types import Message, Receive, Scope, Send

_NAME = "torchrl-chat"
_BEARER = "bearer."


class TokenSocket:
    """An ASGI endpoint that hands a handshake on to ``/ws`` of the same application, its token as a header."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one socket."""
        offered = scope.get("subprotocols", [])
        headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        headers += [
            (b"authorization", b"Bearer " + _decoded(name.removeprefix(_BEARER)))
            for name in offered
            if name.startswith(_BEARER)
        ]
        path = scope.get("root_path", "") + "/ws"

        async def agreeing(message: Message) -> None:
            if message["type"] == "websocket.accept" and _NAME in offered:
                message = {**message, "subprotocol": _NAME}
            await send(message)

        await scope["app"](
            {**scope, "headers": headers, "path": path, "raw_path": path.encode()}, receive, agreeing
        )


def _decoded(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        return b""
