"""The readers of call blocks: JSON, JSON behind a head, XML-like tags, nested tags, Python calls.

Each reader is a small class whose delimiters are data, so that a new format is a new row of the table in
``dialects.py``, seldom a new reader.

Law of this file: a reader returns the calls that begin where it is asked, one :class:`ParsedCall` per call,
malformed ones with their status; it raises nothing and reads no character more than a few times.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchrl_chat.templates.toolcalls import (
    Batch,
    CallFormat,
    CallStatus,
    ParsedCall,
    Scan,
    json_at,
    made_call,
    read_value,
)


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
            calls.append(self.call(found[0], (pos, found[1])))
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
        arguments = next((inner[k] for k in ("arguments", "parameters", "args", "input") if k in inner), None)
        ident = value.get("id") or value.get("tool_call_id")
        return made_call(inner.get("name") or inner.get("tool_name"), arguments, span, ident)


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
                calls.append(made_call(head["name"], arguments, (pos, stop), head.groupdict().get("id")))
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
                raw = scan.text[param.end() : found]
                arguments[param["key"]] = read_value(raw, param.groupdict().get("kind"))
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
            tree = self.tree(scan.text[head.end() : end]) if end >= 0 and (fence < 0 or end < fence) else None
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

    def tree(self, raw: str) -> Any:
        """The value that the elements of ``raw`` spell; ``None`` if they do not nest."""
        stack: list[tuple[str, list[tuple[str, Any]], int]] = [("", [], 0)]
        for tag in re.finditer(re.escape(self.mark) + r"<(/?)([^<>/\s]{1,200})>", raw):
            if not tag[1]:
                stack.append((tag[2], [], tag.end()))
                continue
            key, children, start = stack.pop()
            if key != tag[2] or not stack:
                return None
            stack[-1][1].append((key, _grown(children) if children else read_value(raw[start : tag.start()])))
        return dict(stack[0][1]) if len(stack) == 1 else None


def _grown(children: Sequence[tuple[str, Any]]) -> Any:
    """A list where every child is an item, else a dict."""
    if all(key == "item" for key, _ in children):
        return [value for _, value in children]
    return dict(children)


_WORDS = {"true": True, "false": False, "null": None}
_TOO_DEEP = 100


@dataclass(frozen=True, slots=True)
class PythonReader:
    """``[name(key=value, ...), ...]``: calls as Python writes them; JSON's ``true`` and ``null`` too."""

    def read(self, scan: Scan, at: int, block: CallFormat) -> Batch:
        """The calls at ``at``; see :class:`~torchrl_chat.templates.toolcalls.Reader`."""
        ends = (scan.find(block.close, at), scan.find(block.open, at))
        stop = min((p for p in ends if p >= 0), default=scan.end)
        first = scan.blank(at)
        raw = scan.text[first:stop].rstrip()
        # Without a bound on the depth, sampled brackets could exhaust the stack of Python's own parser.
        if "\r" in raw or _depth(raw) > _TOO_DEEP:
            return [], at, False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a wrong escape in sampled text is nobody's bug
                tree = ast.parse(raw, mode="eval").body
            nodes = tree.elts if isinstance(tree, ast.List) else [tree]
            found = [self.call(node) for node in nodes]
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            return [], at, False
        starts = _starts(raw, nodes)
        return (
            [made_call(n, a, (first + s, first + len(raw))) for (n, a), s in zip(found, starts, strict=True)],
            first + len(raw),
            False,
        )

    def call(self, node: ast.expr) -> tuple[str, dict[str, Any]]:
        """Name and arguments of one call node.

        Raises:
            ValueError: it is no call of a name with keyword literals, or JSON cannot hold an argument.
        """
        if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
            raise ValueError("not a call with keyword arguments")
        arguments = {str(k.arg): ast.literal_eval(_Words().visit(k.value)) for k in node.keywords}
        arguments = json.loads(json.dumps(arguments, allow_nan=False))
        json.dumps(arguments, ensure_ascii=False).encode()
        return ast.unparse(node.func).removesuffix(".call"), arguments


def _depth(raw: str) -> int:
    """How deep the brackets of a text nest at most (brackets in strings are counted too)."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\](){}]", raw):
        depth = depth + 1 if bracket in "[({" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


class _Words(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node


def _starts(raw: str, nodes: Sequence[ast.expr]) -> list[int]:
    """Where each node begins in ``raw``, in characters (Python counts bytes within lines)."""
    data, lines = raw.encode(), [0]
    for line in data.split(b"\n"):
        lines.append(lines[-1] + len(line) + 1)
    starts, chars, done = [], 0, 0
    for node in nodes:
        byte = lines[node.lineno - 1] + node.col_offset
        chars += len(data[done:byte].decode())
        done = byte
        starts.append(chars)
    return starts
