"""A tool call found in a text, the block of calls that it stands in, and the readers of a block's inside.

A call format is a row of data (:class:`CallFormat`): the delimiters of a *block* of calls, and the readers of its
inside: JSON, JSON behind a head, XML-like tags, nested tags, Python calls. Their delimiters are data too, so that a new
format is a new row of the table in ``dialects.py``, seldom a new reader. Which rows a template speaks is found out there.

Law of this file: whatever text it is given, it raises nothing, takes time proportional to the text, and
accounts for every block that was opened, as calls with a status. It knows nothing of reasoning or turns.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

from torchrl_chat.schemas import bracket_depth, kinds_of
from torchrl_chat.templates.kinds import call_of
from torchrl_chat.templates.values import PLAIN, Values, inner


class CallStatus(StrEnum):
    """How a tool call came out of the text."""

    OK = "ok"  # name and arguments are there
    # closed, but it cannot be read (bad JSON, arguments that are no object, stray text inside an XML-like call)
    INVALID_JSON = "invalid_json"
    MISSING_NAME = "missing_name"  # well-formed, but it names no function
    UNCLOSED = "unclosed"  # the text ends, or the next call begins, before it is closed
    UNKNOWN_TOOL = "unknown_tool"  # well-formed, but no tool has its name (the package ``renderers`` looks)


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One tool call found in a text."""

    name: str | None  # the function's name, if there is one
    arguments: Any  # a dict where the status is ``OK`` or ``UNKNOWN_TOOL``; else the raw text, or ``None``
    status: CallStatus  # see :class:`CallStatus`
    # character offsets into the text that was parsed, delimiters included. Calls that share a block share its
    # delimiters out: the first call begins with the block, the last one ends it
    span: tuple[int, int]
    id: str | None = None  # the id that the text itself gives the call, in formats that write one

    def message(self, index: int = 0) -> dict[str, Any]:
        """The call as an entry of a message's ``tool_calls``.

        Example:
            >>> ParsedCall("now", {}, CallStatus.OK, (0, 9)).message(1)
            {'id': 'call00001', 'type': 'function', 'function': {'name': 'now', 'arguments': {}}}
        """
        # Nine letters and digits: some templates refuse an id of any other form.
        return call_of(self.name, self.arguments, self.id or f"call{index:05d}")


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


_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


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
    """One row: how a block of calls begins and ends, and the readers of its inside, in order."""

    open: str  # what begins a block; a template that writes it speaks this format
    close: str  # what ends a block; "" where nothing does
    readers: tuple[Reader, ...]  # the first one that finds a call at the block's beginning reads it
    marks: tuple[str, ...] = ()  # further strings that a template must write to speak this format

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


# ---------------------------------------------------------------------- the readers
@dataclass(frozen=True, slots=True)
class JsonReader:
    """``{"name": ..., "arguments": {...}}``, one or several, in a list or not."""

    keyed: bool = False  # the only key of the object is the name, and its value the arguments

    def read(self, scan: Scan, at: int, block: CallFormat) -> Batch:
        """The calls at ``at``; see :class:`Reader`."""
        calls: list[ParsedCall] = []
        pos = scan.blank(at)
        if listed := scan.holds("[", pos):
            pos = scan.blank(pos + 1)
        while scan.holds("{", pos):
            if (found := json_at(scan, pos)) is None:
                calls.append(block.broken(scan, pos, pos))
                return calls, calls[-1].span[1], True
            call = self.call(found[0], (pos, found[1]))
            calls.append(as_texts(call, scan, functools.partial(self.place, scan, pos)))
            pos = scan.blank(found[1])
            if scan.holds(",", pos):
                pos = scan.blank(pos + 1)
            elif listed or not block.close:  # without a close, what follows an object is text
                break
        if listed and scan.holds("]", pos):
            return calls, pos + 1, True
        if listed and calls and pos < scan.end:
            bad = block.broken(scan, calls[-1].span[0], pos)
            calls.append(replace(bad, span=(pos, bad.span[1])))
            return calls, bad.span[1], True
        if listed and calls:
            calls[-1] = replace(calls[-1], status=CallStatus.UNCLOSED, arguments=scan.text[calls[-1].span[0] : pos])
        return calls, calls[-1].span[1] if calls else pos, not block.close

    def call(self, value: Any, span: tuple[int, int]) -> ParsedCall:
        """The call that a JSON object spells."""
        if self.keyed and isinstance(value, dict) and len(value) == 1 and "name" not in value:
            ((name, arguments),) = value.items()
            return made_call(name, arguments, span)
        inner = value.get("function") if isinstance(value.get("function"), dict) else value
        arguments = next((inner[k] for k in _ARGUMENTS if k in inner), None)
        ident = value.get("id") or value.get("tool_call_id")
        return made_call(inner.get("name") or inner.get("tool_name"), arguments, span, ident)

    def place(self, scan: Scan, at: int) -> int:
        """Where the arguments of the call at ``at`` stand."""
        spans = members(scan, at)
        if self.keyed:
            return next(iter(spans.values()), (at, at))[0]
        if "function" in spans and scan.holds("{", spans["function"][0]):
            spans = members(scan, spans["function"][0])
        return next((spans[k][0] for k in _ARGUMENTS if k in spans), at)


_ARGUMENTS = ("arguments", "parameters", "args", "input")


@dataclass(frozen=True, slots=True)
class HeadReader:
    """Calls that begin with a head, one or several; what stands behind the head is read by the classes below."""

    head: re.Pattern[str]  # matches what opens a call; its groups are ``name`` and, if it likes, ``id``
    close: str  # ends one call; "" where only the block ends it: then there is one call

    def read(self, scan: Scan, at: int, block: CallFormat) -> Batch:
        """The calls at ``at``; see :class:`Reader`."""
        calls: list[ParsedCall] = []
        stop, pos = at, scan.blank(at)
        while head := self.head.match(scan.text, pos, scan.end):
            calls.append(self.call(scan, head, block))
            stop = calls[-1].span[1]
            if calls[-1].status is CallStatus.UNCLOSED:
                return calls, stop, True
            if not self.close:  # another head would begin another block
                break
            pos = scan.blank(stop)
        return calls, stop, bool(self.close) or scan.text.endswith(block.close, at, stop)

    def call(self, scan: Scan, head: re.Match[str], block: CallFormat) -> ParsedCall:
        """The call that begins with ``head``."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class HeadedReader(HeadReader):
    """Behind the head the arguments as JSON."""

    fence: str = ""  # may stand between the JSON and ``close``

    def call(self, scan: Scan, head: re.Match[str], block: CallFormat) -> ParsedCall:
        """The call that begins with ``head``."""
        found = json_at(scan, scan.blank(head.end()))
        after = scan.blank(found[1]) if found else 0
        if found and self.fence and scan.holds(self.fence, after):
            after = scan.blank(after + len(self.fence))
        if not found or not scan.holds(self.close, after):
            return block.broken(scan, head.start(), head.end(), self.close, head["name"].strip())
        arguments = found[0] if isinstance(found[0], dict) else scan.text[head.end() : found[1]]
        span = (head.start(), after + len(self.close))
        call = made_call(head["name"], arguments, span, head.groupdict().get("id"))
        return as_texts(call, scan, functools.partial(scan.blank, head.end()))


@dataclass(frozen=True, slots=True)
class TaggedReader(HeadReader):
    """Behind the head parameters between delimiters of their own."""

    param: re.Pattern[str]  # matches what opens a parameter; its groups are ``key`` and, if it likes, ``kind``
    param_close: str  # what ends a parameter

    def call(self, scan: Scan, head: re.Match[str], block: CallFormat) -> ParsedCall:
        """The call that begins with ``head``."""
        name, stop, arguments = head["name"].strip(), head.end(), dict[str, Any]()
        while param := self.param.match(scan.text, scan.blank(stop), scan.end):
            if (found := scan.find(self.param_close, param.end())) < 0:
                break
            raw, said = scan.text[param.end() : found], param.groupdict().get("kind")
            said = "string" if said == "true" else said  # string="true"
            arguments[param["key"]] = scan.values.read(name, param["key"], raw, said)
            stop = found + len(self.param_close)
        if param or not scan.holds(self.close, scan.blank(stop)):
            bad = block.broken(scan, head.start(), stop, self.close, name)
            return replace(bad, arguments=scan.text[head.end() : bad.span[1]])
        stop = scan.blank(stop) + len(self.close) if self.close else stop
        return made_call(name, arguments, (head.start(), stop))


@dataclass(frozen=True, slots=True)
class TreeReader(HeadReader):
    """Behind the head arguments as elements named by their keys, nested where a value is."""

    mark: str  # stands before every tag of the format, which is how text with tags stays text

    def call(self, scan: Scan, head: re.Match[str], block: CallFormat) -> ParsedCall:
        """The call that begins with ``head``."""
        name, start = head["name"].strip(), head.end()
        fence, end = scan.find(block.open, start), scan.find(self.close, start)
        closed = end >= 0 and (fence < 0 or end < fence)
        tree = self.tree(scan.text[start:end], scan.values, name) if closed else None
        if not isinstance(tree, dict):
            return block.broken(scan, head.start(), start, self.close, name)
        return made_call(name, tree, (head.start(), end + len(self.close)))

    def tree(self, raw: str, values: Values, name: str) -> Any:
        """The arguments of a tool that the elements of ``raw`` spell; ``None`` if they do not nest."""
        root = values.parameters.get(name)
        stack = [_Element("", 0, root)]
        for tag in re.finditer(re.escape(self.mark) + r"<(/?)([^<>/\s]{1,200})>", raw):
            if not tag[1]:
                stack.append(_Element(tag[2], tag.end(), stack[-1].inner(tag[2], root)))
                continue
            element = stack.pop()
            if element.key != tag[2] or not stack:
                return None
            value = element.value(raw[element.start : tag.start()], values, root)
            stack[-1].children.append((element.key, value))
        return dict(stack[0].children) if len(stack) == 1 else None


@dataclass(slots=True)
class _Element:
    """An element that is still open: its name, where its inside begins, and what its value should be, if that is known."""

    key: str
    start: int
    schema: Any
    children: list[tuple[str, Any]] = field(default_factory=list)

    def inner(self, key: str, root: Any) -> Any:
        """The schema of a child."""
        if self.schema is None:
            return None
        kinds = kinds_of(self.schema, root)
        listed = key == "item" and kinds is not None and "array" in kinds
        return inner(self.schema, len(self.children) if listed else key, root)

    def value(self, raw: str, values: Values, root: Any) -> Any:
        """The value of the element, which ends here."""
        kinds = kinds_of(self.schema, root)
        if self.children and kinds != _TEXT:
            items = all(key == "item" for key, _ in self.children)
            if items and (kinds is None or "array" in kinds or "object" not in kinds):
                return [value for _, value in self.children]
            return dict(self.children)
        if not raw and kinds and not kinds & {"string", "null"}:  # so is an empty container written
            return {} if "object" in kinds else [] if "array" in kinds else raw
        return values.text(raw, self.schema, root)


_TEXT = frozenset(["string"])
_WORDS = {"true": True, "false": False, "null": None}
_TOO_DEEP = 100


_CALL = re.compile(r"\s*(?P<name>[^\W\d][\w.-]{0,200})\(\s*")
_KEY = re.compile(r"\s*(?P<key>[^\W\d][\w-]{0,200})\s*=\s*")
_TOKEN = re.compile(r"'[^'\\]*(?:\\.[^'\\]*)*'|\"[^\"\\]*(?:\\.[^\"\\]*)*\"|[\[\](){},'\"]", re.DOTALL)
# Behind a quote that ends a string comes the next argument, or the end of the call and then another call or nothing.
_BEHIND = r"(?=\s*(?:,\s*[^\W\d][\w-]{0,200}\s*=|\)\s*(?:,\s*[^\W\d][\w.-]{0,200}\(|\]?\s*$)))"
_BARE_ENDS = {quote: re.compile(quote + _BEHIND) for quote in "'\""}


@dataclass(frozen=True, slots=True)
class PythonReader:
    """``[name(key=value, ...), ...]``: calls as Python writes them; JSON's ``true`` and ``null`` too.

    Where the template escapes nothing in its strings, a string reaches to the first quote behind which the call goes on or
    ends, and is what stands there, backslashes, quotes and line breaks included.
    """

    def read(self, scan: Scan, at: int, block: CallFormat) -> Batch:
        """The calls at ``at``; see :class:`Reader`."""
        ends = (scan.find(block.close, at), scan.find(block.open, at))
        stop = min((p for p in ends if p >= 0), default=scan.end)
        raw = scan.text[at:stop].rstrip()
        inside = Scan(raw, values=scan.values)
        start = inside.blank(0)
        if bracket_depth(raw) > _TOO_DEEP:  # sampled brackets could exhaust the stack of Python's own parser
            return [], at, False
        listed = raw.startswith("[", start)
        pos, found = start + listed, list[tuple[str, dict[str, Any], int]]()
        while head := _CALL.match(raw, pos):
            name = head["name"].removesuffix(".call")
            arguments = self._arguments(inside, head.end(), name)
            if arguments is None:
                return [], at, False
            found.append((name, arguments[0], head.start("name")))
            pos = inside.blank(arguments[1])
            if not (listed and raw.startswith(",", pos)):
                break
            pos += 1
        if raw[pos:] != ("]" if listed else ""):
            return [], at, False
        return [made_call(n, a, (at + begun, at + len(raw))) for n, a, begun in found], at + len(raw), False

    def _arguments(self, scan: Scan, pos: int, name: str) -> tuple[dict[str, Any], int] | None:
        """The arguments that begin at ``pos``, and the position behind the bracket that ends them."""
        raw, values, found = scan.text, scan.values, dict[str, Any]()
        quote = values.manner.bare
        while not raw.startswith(")", pos):
            key = _KEY.match(raw, pos)
            if key is None:
                return None
            pos = key.end()
            if quote and raw.startswith(quote, pos) and (end := _BARE_ENDS[quote].search(raw, pos + 1)):
                found[key["key"]], pos = raw[pos + 1 : end.start()], end.end()
            else:
                stop = _literal_end(raw, pos)
                value = _python_value(raw[pos:stop].strip()) if stop is not None else None
                if value is None or stop is None:
                    return None
                found[key["key"]], pos = value[0], stop
                if values.bare_texts(name, {key["key"]: value[0]}):
                    found[key["key"]] = raw[key.end() : stop].strip()
            pos = scan.blank(pos)
            if raw.startswith(",", pos):
                pos = scan.blank(pos + 1)
            elif not raw.startswith(")", pos):
                return None
        return found, pos + 1


def _literal_end(raw: str, pos: int) -> int | None:
    """Where the literal ends that begins at ``pos``: at the comma or bracket that is not its own."""
    depth = 0
    for token in _TOKEN.finditer(raw, pos):
        if token[0] in ("'", '"'):
            return None  # a string that is not closed
        if token[0] in ("(", "[", "{"):
            depth += 1
        elif token[0] in (",", ")") and depth == 0:
            return token.start()
        elif token[0] in (")", "]", "}"):
            depth -= 1
    return None


def _python_value(raw: str) -> tuple[Any] | None:
    """The value of a literal of Python or of JSON, in a tuple; ``None`` if it is none or JSON cannot hold it."""
    if (value := read_json(raw)) is not None:
        return (value,)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a wrong escape in sampled text is nobody's bug
            value = ast.literal_eval(_Words().visit(ast.parse(raw, mode="eval").body))
        value = json.loads(json.dumps(value, allow_nan=False))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be tokenized
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return (value,)


class _Words(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node
