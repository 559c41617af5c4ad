"""What the code of a chat template looks at, read from its syntax tree.

A compiled tail is proved by trying; trying finds a condition only if it is tried with what the condition
looks for. This file says what to try (the strings that :mod:`~torchrl_chat.templates.literals` finds, fields, depths),
and where trying would not be enough: numbers too large to count up to, operations on texts that no list of probes covers.

Law of this file: what is not known to be harmless is reported; nothing is decided by a template's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import nodes

from torchrl_chat.templates.literals import literals_of

_FIELDS = (
    {"content", "text", "arguments"}
    | {"reasoning_content", "reasoning", "thinking"}
    | {"name", "id", "tool_call_id"}
)
_KEYS = _FIELDS | {"role", "tool_calls", "function", "type", "parameters", "description", "properties"}
_FOLDING = {"upper", "lower", "title", "capitalize"}
# What trying covers, of filters, methods, tests and functions.
_FILTERS = (
    _FOLDING
    | {"trim", "replace", "format", "indent", "string", "safe", "e", "escape", "tojson", "int", "default", "d"}
    | {"join", "length", "count", "first", "last", "items", "list", "dictsort"}
    | {"map", "select", "reject", "selectattr", "rejectattr"}
)
_METHODS = (
    _FOLDING
    | {"strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "replace", "format", "startswith", "endswith"}
    | {"split", "rsplit", "splitlines", "partition", "rpartition", "join"}
    | {"items", "keys", "values", "get", "append", "pop", "update"}
)
_TESTS = (
    {"defined", "undefined", "none", "true", "false"}
    | {"equalto", "eq", "ne", "in", "sameas"}
    | {"string", "mapping", "iterable", "sequence", "boolean", "number", "integer", "float"}
)
_FUNCTIONS = {"namespace", "raise_exception", "strftime_now", "range", "dict", "cycler", "joiner", "caller"}
SMALL = 16
"""Conditions on numbers up to here are met by the probes' depths and lengths."""


@dataclass(frozen=True)
class Looks:
    """What a template's code looks at."""

    literals: tuple[str, ...]  # strings that it may look for in a text
    folds_case: bool  # whether it may look for them in any case
    keys: frozenset[str]  # fields of messages that it reads besides the usual ones
    beyond_probes: str | None  # an operation that no probing covers, in words; ``None`` if there is none


def looks_of(tree: Any) -> Looks:
    """What the code of a parsed template (``jinja2.nodes.Template``) looks at."""
    called = {node.node.attr for node in tree.find_all(nodes.Call) if isinstance(node.node, nodes.Getattr)}
    filters = {node.name for node in tree.find_all(nodes.Filter)}
    folds_case = bool((filters | called) & _FOLDING)
    return Looks(literals_of(tree), folds_case, frozenset(_keys(tree) - _KEYS), _beyond(tree))


def _keys(tree: Any) -> set[str]:
    """Names under which the code reads fields of something."""
    methods = {id(node.node) for node in tree.find_all(nodes.Call)}
    keys = {node.attr for node in tree.find_all(nodes.Getattr) if id(node) not in methods}
    for node in tree.find_all(nodes.Getitem):
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            keys.add(node.arg.value)
    for node in tree.find_all(nodes.Call):
        if isinstance(node.node, nodes.Getattr) and node.node.attr == "get" and node.args:
            keys |= {c.value for c in node.args[0].find_all(nodes.Const) if isinstance(c.value, str)}
            if isinstance(node.args[0], nodes.Const):
                keys.add(str(node.args[0].value))
    for node in tree.find_all(nodes.Compare):
        if isinstance(node.expr, nodes.Const) and isinstance(node.expr.value, str):
            keys.add(node.expr.value)  # 'prefix' in message
    return keys


def _beyond(tree: Any) -> str | None:
    """The first operation that probing does not cover."""
    conversation = _conversation(tree)
    elsewhere = [node for node in tree.find_all(nodes.Filter) if node.name in ("tojson", "indent")]
    elsewhere += [
        node
        for node in tree.find_all((nodes.Macro, nodes.Compare))
        if not any(name.name in conversation for name in node.find_all(nodes.Name))
    ]
    harmless = {id(const) for node in elsewhere for const in node.find_all(nodes.Const)}
    for const in tree.find_all(nodes.Const):
        number = isinstance(const.value, (int, float)) and not isinstance(const.value, bool)
        if number and abs(const.value) > SMALL and id(const) not in harmless:
            return f"it counts to {const.value}"
    for node in tree.find_all(nodes.Filter):
        if node.name not in _FILTERS:
            return f"it uses the filter {node.name!r}"
    for node in tree.find_all(nodes.Test):
        if node.name not in _TESTS:
            return f"it uses the test {node.name!r}"
    macros = {node.name for node in tree.find_all(nodes.Macro)}
    for node in tree.find_all(nodes.Call):
        if isinstance(node.node, nodes.Getattr):
            if node.node.attr not in _METHODS:
                return f"it calls the method {node.node.attr!r}"
        elif isinstance(node.node, nodes.Name) and node.node.name not in _FUNCTIONS | macros:
            return f"it calls {node.node.name!r}"
    said = _said(tree)
    for node in tree.find_all(nodes.Compare):
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        if sum(_mentions(operand, said) for operand in operands) > 1:
            return "it compares what two messages say"
    return None


def _conversation(tree: Any) -> set[str]:
    """Variables that are made of the messages, or of the place in a loop over them."""
    found = {"messages", "loop"}
    macros = {node.name: node for node in tree.find_all(nodes.Macro)}
    while True:
        before = len(found)
        pairs = [(node.target, node.node) for node in tree.find_all(nodes.Assign)]
        pairs += [(node.target, node.iter) for node in tree.find_all(nodes.For)]
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name in macros:
                pairs += list(zip(macros[call.node.name].args, call.args, strict=False))
                named = {argument.name: argument for argument in macros[call.node.name].args}
                pairs += [(named[k.key], k.value) for k in call.kwargs if k.key in named]
        for target, value in pairs:
            names = [value, *value.find_all(nodes.Name)]
            if any(isinstance(name, nodes.Name) and name.name in found for name in names):
                targets = [target, *target.find_all((nodes.Name, nodes.NSRef))]
                found |= {t.name for t in targets if isinstance(t, (nodes.Name, nodes.NSRef))}
        if len(found) == before:
            return found


def _said(tree: Any) -> set[str]:
    """Variables that hold what a message says."""
    said: set[str] = set()
    while True:
        before = len(said)
        for node in tree.find_all(nodes.Assign):
            if _mentions(node.node, said):
                target = node.target
                said.add(f".{target.attr}" if isinstance(target, nodes.NSRef) else getattr(target, "name", ""))
        if len(said) == before:
            return said


def _mentions(node: Any, said: set[str]) -> bool:
    """Whether an expression is made of what a message says."""
    for part in (node, *node.find_all(nodes.Expr)):
        if isinstance(part, nodes.Getattr) and (part.attr in _FIELDS or f".{part.attr}" in said):
            return True
        if isinstance(part, nodes.Getitem) and isinstance(part.arg, nodes.Const) and part.arg.value in _FIELDS:
            return True
        if isinstance(part, nodes.Name) and part.name in said:
            return True
    return False
