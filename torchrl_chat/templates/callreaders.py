"""The readers of call blocks: JSON, JSON behind a head, XML-like tags, nested tags, Python calls.

Each reader is a small class whose delimiters are data, so that a new format is a new row of the table in
``dialects.py``, seldom a new reader.

Law of this file: a reader returns the calls that begin where it is asked, one :class:`ParsedCall` per call,
malformed ones with their status; it raises nothing and reads no character more than a few times.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

from torchrl_chat.schemas import bracket_depth, kinds_of
from torchrl_chat.templates.toolcalls import (
    Batch,
    CallFormat,
    CallStatus,
    ParsedCall,
    Scan,
    as_texts,
    json_at,
    made_call,
    members,
    read_json,
)
from torchrl_chat.templates.values import Values, inner


@dataclass(frozen=True, slots=True)
class JsonReader:
    """``{"name": ..., "arguments": {...}}``, one or several, in a list or not.

    Attributes:
        keyed: the only key of the object is the name, and its value the arguments.
    """

    keyed: bool = False

    def read(self, scan: Scan, at: int, block: CallFormat) -> Batch:
        """The calls at ``at``; see :class:`~torchrl_chat.templates.toolcalls.Reader`."""
        calls: list[ParsedCall] = []
        pos = scan.blank(at)
        if listed := scan.holds("[", pos):
            pos = scan.blank(pos + 1)
        while scan.holds("{", pos):
            if (found := json_at(scan, pos)) is None:
                calls.append(block.broken(scan, pos, pos))
                return calls, calls[-1].span[1], True
            call = self.call(found[0], (pos, found[1]))
            calls.append(as_texts(call, scan, functools.partial(self._arguments, scan, pos)))
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

    def _arguments(self, scan: Scan, at: int) -> int:
        """Where the arguments of the call at ``at`` stand."""
        spans = members(scan, at)
        if self.keyed:
            return next(iter(spans.values()), (at, at))[0]
        if "function" in spans and scan.holds("{", spans["function"][0]):
            spans = members(scan, spans["function"][0])
        return next((spans[k][0] for k in _ARGUMENTS if k in spans), at)


_ARGUMENTS = ("arguments", "parameters", "args", "input")


@dataclass(frozen=True, slots=True)
class HeadedReader:
    """A head with the name, then the arguments as JSON, then ``close``; one or several.

    Attributes:
        head: matches up to the JSON; its groups are ``name`` and, if it likes, ``id``.
        close: ends one call; "" where only the block ends it.
        fence: may stand between the JSON and ``close``.
    """

    head: re.Pattern[str]
    close: str = ""
    fence: str = ""

    def read(self, scan: Scan, at: int, block: CallFormat) -> Batch:
        """The calls at ``at``; see :class:`~torchrl_chat.templates.toolcalls.Reader`."""
        calls: list[ParsedCall] = []
        stop, pos = at, scan.blank(at)
        while head := self.head.match(scan.text, pos, scan.end):
            found = json_at(scan, scan.blank(head.end()))
            after = scan.blank(found[1]) if found else 0
            if found and self.fence and scan.holds(self.fence, after):
                after = scan.blank(after + len(self.fence))
            if found and scan.holds(self.close, after):
                stop = after + len(self.close)
                arguments = scan.text[head.end() : found[1]] if not isinstance(found[0], dict) else found[0]
                call = made_call(head["name"], arguments, (pos, stop), head.groupdict().get("id"))
                calls.append(as_texts(call, scan, functools.partial(scan.blank, head.end())))
            else:
                bad = block.broken(scan, pos, head.end(), self.close, head["name"].strip())
                calls.append(bad)
                stop = bad.span[1]
                if bad.status is CallStatus.UNCLOSED or not self.close:
                    return calls, stop, True
            if not self.close:  # one call only: another head would begin another block
                break
            pos = scan.blank(stop)
        return calls, stop, bool(self.close or not block.close)


@dataclass(frozen=True, slots=True)
class TaggedReader:
    """A head with the name, parameters between delimiters of their own, then ``close``; one or several.

    Attributes:
        head: matches what opens a call; its group is ``name``.
        param: matches what opens a parameter; its groups are ``key`` and, if it likes, ``kind``.
        param_close: what ends a parameter.
        close: ends one call; "" where only the block ends it.
    """

    head: re.Pattern[str]
    param: re.Pattern[str]
    param_close: str
    close: str = ""

    def read(self, scan: Scan, at: int, block: CallFormat) -> Batch:
        """The calls at ``at``; see :class:`~torchrl_chat.templates.toolcalls.Reader`."""
        calls: list[ParsedCall] = []
        stop, pos = at, scan.blank(at)
        while head := self.head.match(scan.text, pos, scan.end):
            arguments: dict[str, Any] = {}
            stop = head.end()
            while param := self.param.match(scan.text, scan.blank(stop), scan.end):
                if (found := scan.find(self.param_close, param.end())) < 0:
                    break
                raw, said = scan.text[param.end() : found], param.groupdict().get("kind")
                said = "string" if said == "true" else said  # string="true"
                arguments[param["key"]] = scan.values.read(head["name"].strip(), param["key"], raw, said)
                stop = found + len(self.param_close)
            if param or not scan.holds(self.close, scan.blank(stop)):
                bad = block.broken(scan, pos, stop, self.close, head["name"].strip())
                calls.append(replace(bad, arguments=scan.text[head.end() : bad.span[1]]))
                stop = bad.span[1]
                if bad.status is CallStatus.UNCLOSED:
                    return calls, stop, True
            else:
                stop = scan.blank(stop) + len(self.close) if self.close else stop
                calls.append(made_call(head["name"], arguments, (pos, stop)))
            if not self.close:
                break
            pos = scan.blank(stop)
        return calls, stop, bool(self.close)


@dataclass(frozen=True, slots=True)
class TreeReader:
    """A head with the name, then arguments as elements named by their keys, nested where a value is.

    Attributes:
        mark: stands before every tag of the format, which is how text with tags stays text.
    """

    mark: str

    def read(self, scan: Scan, at: int, block: CallFormat) -> Batch:
        """The calls at ``at``; see :class:`~torchrl_chat.templates.toolcalls.Reader`."""
        calls: list[ParsedCall] = []
        head_rx = re.compile(re.escape(self.mark) + r'<invoke name="([^"<>\n]{1,200})">')
        close = self.mark + "</invoke>"
        stop, pos = at, scan.blank(at)
        while head := head_rx.match(scan.text, pos, scan.end):
            fence, end = scan.find(block.open, head.end()), scan.find(close, head.end())
            closed = end >= 0 and (fence < 0 or end < fence)
            tree = self.tree(scan.text[head.end() : end], scan.values, head[1].strip()) if closed else None
            if isinstance(tree, dict):
                stop = end + len(close)
                calls.append(made_call(head[1], tree, (pos, stop)))
            else:
                calls.append(block.broken(scan, pos, head.end(), close, head[1].strip()))
                stop = calls[-1].span[1]
                if calls[-1].status is CallStatus.UNCLOSED:
                    break
            pos = scan.blank(stop)
        return calls, stop, True

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


class _Element:
    """An element that is still open.

    Args:
        key: its name.
        start: where its inside begins.
        schema: what its value should be, as far as that is known.
    """

    __slots__ = ("children", "key", "schema", "start")

    def __init__(self, key: str, start: int, schema: Any):
        self.key = key
        self.start = start
        self.schema = schema
        self.children: list[tuple[str, Any]] = []

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
        if (
            not raw and kinds and not kinds & {"string", "null"}
        ):  # nothing is also how an empty container is written
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
        """The calls at ``at``; see :class:`~torchrl_chat.templates.toolcalls.Reader`."""
        ends = (scan.find(block.close, at), scan.find(block.open, at))
        stop = min((p for p in ends if p >= 0), default=scan.end)
        raw = scan.text[at:stop].rstrip()
        start = _SPACE.match(raw).end()  # type: ignore[union-attr]
        if bracket_depth(raw) > _TOO_DEEP:  # sampled brackets could exhaust the stack of Python's own parser
            return [], at, False
        listed = raw.startswith("[", start)
        pos, found = start + listed, list[tuple[str, dict[str, Any], int]]()
        while head := _CALL.match(raw, pos):
            name = head["name"].removesuffix(".call")
            arguments = self._arguments(raw, head.end(), name, scan.values)
            if arguments is None:
                return [], at, False
            found.append((name, arguments[0], head.start("name")))
            pos = _SPACE.match(raw, arguments[1]).end()  # type: ignore[union-attr]
            if not (listed and raw.startswith(",", pos)):
                break
            pos += 1
        if raw[pos:] != ("]" if listed else ""):
            return [], at, False
        return [made_call(n, a, (at + begun, at + len(raw))) for n, a, begun in found], at + len(raw), False

    def _arguments(self, raw: str, pos: int, name: str, values: Values) -> tuple[dict[str, Any], int] | None:
        """The arguments that begin at ``pos``, and the position behind the bracket that ends them."""
        found: dict[str, Any] = {}
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
            pos = _SPACE.match(raw, pos).end()  # type: ignore[union-attr]
            if raw.startswith(",", pos):
                pos = _SPACE.match(raw, pos + 1).end()  # type: ignore[union-attr]
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


_SPACE = re.compile(r"\s*")
