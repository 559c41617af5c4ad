"""A tool call found in a text, and the block of calls that it stands in.

A call format is a row of data (:class:`CallFormat`): the delimiters of a *block* of calls, and the readers
of its inside (``callreaders.py``). Which rows a template speaks is for ``dialects.py`` to find out.

Law of this file: whatever text it is given, it raises nothing, takes time proportional to the text, and
accounts for every block that was opened, as calls with a status. It knows nothing of reasoning or turns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

from torchrl_chat.templates.values import PLAIN, Values


class CallStatus(StrEnum):
    """How a tool call came out of the text.

    ``OK``: name and arguments are there. ``INVALID_JSON``: the call is closed, but cannot be read (bad
    JSON, arguments that are no object, stray text inside an XML-like call). ``MISSING_NAME``: well-formed,
    but it names no function. ``UNCLOSED``: the text ends, or the next call begins, before it is closed.
    ``UNKNOWN_TOOL``: well-formed, but the name is not among the tools that were given.
    """

    OK = "ok"
    INVALID_JSON = "invalid_json"
    MISSING_NAME = "missing_name"
    UNCLOSED = "unclosed"
    UNKNOWN_TOOL = "unknown_tool"


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One tool call found in a text.

    Attributes:
        name: the function's name, if there is one.
        arguments: a dict where the status is ``OK`` or ``UNKNOWN_TOOL``; else the raw text, or ``None``.
        status: see :class:`CallStatus`.
        span: character offsets into the text that was parsed, delimiters included. Calls that share a
            block share its delimiters out: the first call begins with the block, the last one ends it.
        id: the id that the text itself gives the call, in formats that write one.
    """

    name: str | None
    arguments: Any
    status: CallStatus
    span: tuple[int, int]
    id: str | None = None

    def message(self, index: int = 0) -> dict[str, Any]:
        """The call as an entry of a message's ``tool_calls``.

        Example:
            >>> ParsedCall("now", {}, CallStatus.OK, (0, 9)).message(1)
            {'id': 'call00001', 'type': 'function', 'function': {'name': 'now', 'arguments': {}}}
        """
        # Nine letters and digits: some templates refuse an id of any other form.
        ident = self.id or f"call{index:05d}"
        return {"id": ident, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Scan:
    """A text up to ``end``, with searches that remember their last answer.

    Finding the same close from each of many opens would be quadratic; a remembered answer makes it linear.

    Attributes:
        values: reads the arguments of calls that stand there as text.
    """

    __slots__ = ("_seen", "end", "text", "values")

    def __init__(self, text: str, end: int | None = None, values: Values = PLAIN):
        self.text = text
        self.end = len(text) if end is None else end
        self.values = values
        self._seen: dict[str, tuple[int, int]] = {}

    def find(self, needle: str, start: int) -> int:
        """Where ``needle`` next begins at or after ``start``, or -1; always -1 for an empty needle."""
        if not needle:
            return -1
        asked, found = self._seen.get(needle, (start + 1, 0))
        if asked > start or -1 < found < start:
            found = self.text.find(needle, start, self.end)
            self._seen[needle] = (start, found)
        return found

    def blank(self, at: int) -> int:
        """The position behind the whitespace at ``at``."""
        return _SPACE.match(self.text, at, self.end).end()  # type: ignore[union-attr]

    def holds(self, literal: str, at: int) -> bool:
        """Whether ``literal`` stands at ``at``."""
        return self.text.startswith(literal, at, self.end)


_SPACE = re.compile(r"\s*")
_NAMED = re.compile(r'"(?:tool_)?name"\s*:\s*"([^"\\]{1,200})"')
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\]]', re.DOTALL)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(number)  # it would be written back as Infinity, which is not JSON
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)


def json_at(scan: Scan, at: int) -> tuple[Any, int] | None:
    """The JSON value that begins at ``at`` and the position behind it; ``None`` if there is none."""
    size, whole = 4096, False
    # A window that grows: the decoder's error counts lines from the start of what it is given, which would
    # make many failures in one long text quadratic.
    while not whole:
        piece = scan.text[at : min(at + size, scan.end)]
        whole = at + size >= scan.end
        size *= 4
        try:
            value, stop = _JSON.raw_decode(piece)
            if stop == len(piece) and not whole:
                continue  # a number may go on
            if "\\u" in piece[:stop]:
                json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be tokenized
            return value, at + stop
        except json.JSONDecodeError as error:
            if error.pos < len(piece) - 12 and not error.msg.startswith("Unterminated"):
                return None
        except (ValueError, RecursionError):
            return None
    return None


def read_json(raw: str) -> Any:
    """The value of a JSON text, or ``None`` if it is not JSON (or is ``null``)."""
    scan = Scan(raw)
    found = json_at(scan, scan.blank(0))
    return found[0] if found and scan.blank(found[1]) == scan.end else None


def made_call(name: Any, arguments: Any, span: tuple[int, int], ident: Any = None) -> ParsedCall:
    """A call from what was read, with the status that it deserves; arguments may be JSON in a string."""
    ident = ident if isinstance(ident, str) and ident else None
    value = read_json(arguments) if isinstance(arguments, str) else arguments
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        value = {}
    if not isinstance(name, str) or not name.strip():
        return ParsedCall(None, arguments, CallStatus.MISSING_NAME, span, ident)
    if not isinstance(value, dict):
        raw = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return ParsedCall(name.strip(), raw, CallStatus.INVALID_JSON, span, ident)
    return ParsedCall(name.strip(), value, CallStatus.OK, span, ident)


def members(scan: Scan, at: int) -> dict[str, tuple[int, int]]:
    """Where each value of the JSON object at ``at`` stands."""
    found: dict[str, tuple[int, int]] = {}
    pos = scan.blank(at)
    while scan.text[pos : pos + 1] in ("{", ","):
        key = json_at(scan, scan.blank(pos + 1))
        if key is None or not scan.holds(":", scan.blank(key[1])):
            break
        start = scan.blank(scan.blank(key[1]) + 1)
        value = json_at(scan, start)
        if value is None:
            break
        found[str(key[0])] = start, value[1]
        pos = scan.blank(value[1])
    return found


def as_texts(call: ParsedCall, scan: Scan, place: Callable[[], int]) -> ParsedCall:
    """A call whose parameters that are strings have what was written, where that is a number or a list without quotes.

    Args:
        call: the call.
        scan: the text.
        place: where the JSON object of its arguments stands; asked only if it matters.
    """
    bare = scan.values.bare_texts(call.name, call.arguments) if call.status is CallStatus.OK else []
    if not bare:
        return call
    spans = members(scan, place())
    texts = {key: scan.text[slice(*spans[key])] for key in bare if key in spans}
    return replace(call, arguments={**call.arguments, **texts})


Batch = tuple[list[ParsedCall], int, bool]
"""What a reader found: the calls, where it stopped, and whether the last call is closed already."""


class Reader(Protocol):
    """Reads the calls that stand at ``at``, inside a block of the format ``block``; none if none begins there."""

    def read(self, scan: Scan, at: int, block: CallFormat) -> Batch:
        """The calls, the position behind the last one, and whether nothing more is needed to close it."""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One row: how a block of calls begins and ends, and the readers of its inside, in order.

    Attributes:
        open: what begins a block; a template that writes it speaks this format.
        close: what ends a block; "" where nothing does.
        readers: the first one that finds a call at the block's beginning reads it.
        marks: further strings that a template must write to speak this format.
    """

    open: str
    close: str
    readers: tuple[Reader, ...]
    marks: tuple[str, ...] = ()

    def read(self, scan: Scan, at: int) -> list[ParsedCall]:
        """The calls of the block that begins at ``at``; never none."""
        inside = at + len(self.open)
        for reader in self.readers:
            calls, stop, settled = reader.read(scan, inside, self)
            if calls:
                break
        else:
            return [self.broken(scan, at, inside)]
        after = scan.blank(stop)
        if self.close and scan.holds(self.close, after):
            stop, settled = after + len(self.close), True
        elif self.close and after < scan.end and self.close.startswith(scan.text[after : scan.end]):
            stop = scan.end  # the turn was cut inside the close
        elif self.close and not settled and after < scan.end:
            bad = self.broken(scan, calls[-1].span[0], stop)
            raw = scan.text[calls[-1].span[0] : bad.span[1]].removesuffix(self.close)
            calls[-1] = replace(bad, name=calls[-1].name, arguments=raw, id=calls[-1].id)
            stop, settled = bad.span[1], True
        last = calls[-1]
        if self.close and not settled and last.status is not CallStatus.UNCLOSED:
            raw = scan.text[last.span[0] : stop].removeprefix(self.open)
            calls[-1] = replace(last, status=CallStatus.UNCLOSED, arguments=raw)
        edges = [at, *(call.span[0] for call in calls[1:]), max(stop, calls[-1].span[1])]
        return [replace(call, span=(edges[i], edges[i + 1])) for i, call in enumerate(calls)]

    def broken(self, scan: Scan, at: int, inside: int, close: str = "", name: str | None = None) -> ParsedCall:
        """A call that cannot be read: it reaches to its own close, the block's, or the next block."""
        own, block, fence = (scan.find(s, inside) for s in (close, self.close, self.open))
        stop = min((p for p in (own, block, fence) if p >= 0), default=scan.end)
        raw = scan.text[inside:stop]
        closed = stop in (own, block) if self.close or close else balanced(raw)
        if stop == own:
            stop += len(close)
        elif stop == block and not close:
            stop += len(self.close)
        if name is None and (named := _NAMED.search(raw)):
            name = named[1]
        return ParsedCall(name, raw, CallStatus.INVALID_JSON if closed else CallStatus.UNCLOSED, (at, stop))


def balanced(raw: str) -> bool:
    """Whether every bracket and every string that JSON opens is closed again."""
    depth = 0
    for token in _BRACKETS.findall(raw):
        if token == '"':
            return False
        depth += token in "{["
        depth -= token in "}]"
    return depth <= 0
