"""The formats in which the caller, the warden, the keepers and the interpreters speak with each other.

Nothing that comes out of a sandbox is ever unpickled: it is bytes of limited length, JSON at most, and checked.
"""

from __future__ import annotations

import json
import socket
from typing import Any

from torchrl_chat import processes

_NOTE = 64  # characters that a note of what was cut may have
# To a keeper, one byte a message:
RUN = b"R"  # a call begins
HOLD = b"H"  # a call has ended: stop everything until the next
# The first word to it, where there are workspaces: the name of its own, of so many bytes at most, or that it has none.
NAME, NOWHERE = 256, "/"


def frame(message: dict[str, Any]) -> bytes:
    """A message, as it is sent."""
    return processes.frame(json.dumps(message).encode("ascii"))


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """The next message from a trusted end, or ``None`` when that has gone."""
    data = processes.receive_frame(sock)
    return None if data is None else json.loads(data)


def most(output: int) -> int:
    """The longest reply that an interpreter may send: its two texts, each character as two escapes at the worst."""
    return 2 * 12 * output + (64 << 10)


def cut(text: str, limit: int) -> str:
    """The text; where it is too long, its two ends, as a traceback tells most in its last line.

    Both sides cut with this: what has been cut once is left as it is.

    Args:
        text: any text.
        limit: how many characters are kept; the note between them comes on top.
    """
    if len(text) <= limit + _NOTE:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[len(text) - half :]}"
