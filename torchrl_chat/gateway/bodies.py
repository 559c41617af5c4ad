"""Bodies that begin as an earlier one of their session: what of a history was read once is not read again.

An agent sends its whole history each time, and nearly always the bytes of its last request stand at the beginning of the next one, up to
the end of their list of messages. Of those it is known already what they say; what is read is the rest, put behind the beginning
without its messages. So the cost of a request is that of its new messages, but for a comparison of bytes.

Law of this file: a value is the same as if the whole body had been read. That a beginning is a list of the body, and ends behind one of its
items, is not believed but tried: a word that nobody else knows is read in the place of its items, and has to stand there alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from torchrl_chat.gateway.calls import Refusal, loads
from torchrl_chat.messages import Message

_MOST, _BYTES = (
    16,
    2**22,
)  # beginnings that are kept, as many as branches may be on their way; and their bytes, but for the newest
_MARK = f"torchrl_chat {secrets.token_hex(16)}"
_BLANKS = " \t\n\r"
_SCAN: Any = vars(json.JSONDecoder())["scan_once"]  # where an item ends; what it says is orjson's affair


class History(list[Any]):
    """The items of a history, the first of which were read before.

    Attributes:
        read: how many were.
        known: the messages that they were read as.
    """

    read: int = 0
    known: Sequence[Message] = ()


def begun(items: Sequence[Any]) -> tuple[int, Sequence[Message]]:
    """How many items of a history were read before, and as which messages."""
    return (items.read, items.known) if isinstance(items, History) else (0, ())


class _Beginning(NamedTuple):
    raw: bytes
    """Up to the end of an item."""
    head: int
    """How much of it stands before the first item."""
    items: Sequence[Any]
    known: Sequence[Message]
    hashed: Any
    """The state of the digest behind ``raw``."""


class Body(NamedTuple):
    """A body that was read."""

    value: Any
    """What it says."""
    digest: bytes
    """The same for the same bytes at the same address."""
    path: str
    key: str | None
    raw: bytes
    before: _Beginning | None


class Bodies:
    """The bodies of one session."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, _Beginning]] = []

    def __len__(self) -> int:
        """How many bytes of them are held."""
        return sum(len(each.raw) for _, each in self._kept)

    def read(self, raw: bytes, path: str, key: str | None, max_depth: int = 64) -> Body:
        """What a body says.

        Args:
            raw: the body.
            path: where it was sent to.
            key: the key under which its history stands, if it has one.
            max_depth: how deep it may be nested.

        Raises:
            Refusal: it is no JSON, or nested too deep.
        """
        for place in range(len(self._kept) - 1, -1, -1):
            of, before = self._kept[place]
            if of == path and key is not None and raw.startswith(before.raw):
                value = self._shortened(raw, before, key, max_depth)
                if value is not None:
                    hashed = before.hashed.copy()
                    hashed.update(raw[len(before.raw) :])
                    return Body(value, hashed.digest(), path, key, raw, before)
        return Body(loads(raw, max_depth), hashlib.sha256(path.encode() + raw).digest(), path, key, raw, None)

    @staticmethod
    def _shortened(raw: bytes, before: _Beginning, key: str, max_depth: int) -> Any:
        """What a body says that begins like this; ``None`` where it has to be read as a whole."""
        try:
            value = loads(b'%b"%b"%b' % (raw[: before.head], _MARK.encode(), raw[len(before.raw) :]), max_depth)
        except Refusal:  # the whole of it tells where
            return None
        items = value.get(key) if isinstance(value, dict) else None
        if not isinstance(items, list) or items[:1] != [_MARK]:
            return None
        history = History(before.items)
        history += items[1:]
        history.read, history.known = len(before.items), before.known
        value[key] = history
        return value

    def keep(self, body: Body, known: Sequence[Message]) -> None:
        """Remember how a body begins.

        Args:
            body: the body.
            known: the messages that its history was read as.
        """
        items = body.value.get(body.key) if body.key is not None else None
        # An answer at the end may go on with the next item.
        if not isinstance(items, list) or not known or known[-1]["role"] == "assistant":
            return
        before = body.before
        if before is not None:
            head, start, count = before.head, len(before.raw), len(before.items)
        else:
            found = re.search(rb'"%b"[ \t\n\r]*:[ \t\n\r]*\[' % re.escape(str(body.key).encode()), body.raw)
            if found is None:
                return
            head = start = found.end()
            count = 0
        end = _end(body.raw, start, len(items) - count)
        if end is None or (before is None and not self._stands(body, head, end)):
            return
        if before is not None:
            hashed = before.hashed.copy()
            hashed.update(body.raw[start:end])
        else:
            hashed = hashlib.sha256(body.path.encode() + body.raw[:end])
        kept = [entry for entry in self._kept if entry[1] is not before]
        kept.append((body.path, _Beginning(body.raw[:end], head, list(items), tuple(known), hashed)))
        self._kept = kept[-_MOST:]
        while len(self._kept) > 1 and len(self) > _BYTES:
            del self._kept[0]

    @staticmethod
    def _stands(body: Body, head: int, end: int) -> bool:
        """Whether the items stand alone in their list between two places of a body."""
        try:
            value = loads(b'%b"%b"%b' % (body.raw[:head], _MARK.encode(), body.raw[end:]))
        except Refusal:
            return False
        return isinstance(value, dict) and value.get(body.key) == [_MARK]

    def forget(self) -> None:
        """Let go of all of them."""
        self._kept.clear()


def _end(raw: bytes, start: int, count: int) -> int | None:
    """Where so many items end that stand behind a place of a body, the first of them behind a comma if others stand before it."""
    text, at = raw[start:].decode(), 0
    try:
        for _ in range(count):
            while text[at] in _BLANKS or text[at] == ",":
                at += 1
            _, at = _SCAN(text, at)
    except (StopIteration, ValueError, IndexError, RecursionError):
        return None
    return start + (at if len(text) == len(raw) - start else len(text[:at].encode()))
