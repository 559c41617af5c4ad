"""A WebSocket for a protocol of short questions and answers; the package ``websockets`` does all but the last step.

Its own connections keep messages in a queue until a task asks for them, and send in coroutines. Here a message is handed
on in the very call that read it, and sent in the call that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosedOK
from websockets.frames import DATA_OPCODES, Frame
from websockets.protocol import State


class Socket(ClientConnection):
    """An open connection; made by ``websockets.connect(create_connection=Socket)``."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._taker: Callable[[bytes], None] | None = None
        self._early: list[bytes] = []
        self._parts: list[bytes] = []

    @property
    def taker(self) -> Callable[[bytes], None] | None:
        """What is called with each message as it comes; what comes before there is one waits for it."""
        return self._taker

    @taker.setter
    def taker(self, taker: Callable[[bytes], None]) -> None:
        self._taker = taker
        early, self._early = self._early, []
        for message in early:
            taker(message)

    def say(self, message: bytes) -> None:
        """Send a text message. One that can no longer be sent is dropped: :meth:`~ClientConnection.wait_closed` is near."""
        if self.state is State.OPEN:
            self.protocol.send_text(message)
            self.send_data()

    def ending(self) -> str:
        """How the connection ended, for people; once it has."""
        error = self.protocol.close_exc
        if not isinstance(error, ConnectionClosedOK):
            return f"the connection broke: {error}"
        code, reason = self.close_code, self.close_reason
        return f"the server closed the connection ({code}{' ' + reason if reason else ''})"

    def process_event(self, event: Any) -> None:
        """Hand on a message once its last frame is here; everything else is the base class's affair."""
        if self.response is None or not isinstance(event, Frame) or event.opcode not in DATA_OPCODES:
            super().process_event(event)
            return
        message = bytes(event.data)
        if self._parts or not event.fin:
            self._parts.append(message)
            if not event.fin:
                return
            message, self._parts = b"".join(self._parts), []
        if self._taker is None:
            self._early.append(message)
        else:
            self._taker(message)
