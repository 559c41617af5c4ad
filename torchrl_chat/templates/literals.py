"""Strings that the code of a chat template may look for in what messages say, read from its syntax tree.

Most strings of a template are only written. To be looked for, a string must reach a comparison, a test or a
search together with something that is made of the conversation; a message's role is, but nobody says it. Each
string that is tried costs dozens of renderings, so those that cannot be found are left out.

Law of this file: names are followed without their scopes, and what is not known to be harmless looks for
everything that reaches it: a string too many costs time, one too few a proof.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from jinja2 import nodes

# Methods and filters that look for what they are given in what they belong to,
_SEARCHES = {"startswith", "endswith", "split", "rsplit", "partition", "rpartition", "replace"} | {
    "strip",
    "lstrip",
    "rstrip",
    "trim",
    "removeprefix",
    "removesuffix",
}
# and those that look for nothing. Functions that do not, beside the template's macros.
_PASSES = (
    {"items", "keys", "values", "join", "format", "splitlines", "default", "d"}
    | {"upper", "lower", "title", "capitalize", "indent", "tojson", "string", "safe", "e", "escape"}
    | {"length", "count", "first", "last", "list", "int", "dictsort"}
)
_FUNCTIONS = {"namespace", "raise_exception", "strftime_now", "range", "dict", "cycler", "joiner"}
_NO_TEXTS = (nodes.Compare, nodes.Test, nodes.Not)  # true or false, whatever they are made of
# What is written in one place and read in another, beside all names.
_OPAQUE = (nodes.FilterBlock, nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)
_OPAQUE_NAMES = {"varargs", "kwargs", "caller", "self"}


class _Flow(NamedTuple):
    """A value, and the names under which the code finds it: ``x``; ``.x`` for an attribute or a key."""

    names: frozenset[str]
    value: Any


class _Look(NamedTuple):
    """What is compared, or searched in one another."""

    operands: list[Any]
    sought: list[Any]  # those whose strings may be what is looked for, or what is looked through


def literals_of(tree: Any) -> tuple[str, ...]:
    """The strings of a parsed template (``jinja2.nodes.Template``) that it may look for in what messages say.

    Blanks are left out: they are in the texts that every template is tried with.

    Example:
        >>> import jinja2
        >>> source = "{% for m in messages %}{{ '<|' + m.role + '|>' if 'stop' in m.content else '' }}{% endfor %}"
        >>> literals_of(jinja2.Environment().parse(source))
        ('stop',)
    """
    names = {name.name for name in tree.find_all(nodes.Name)}
    if next(tree.find_all(_OPAQUE), None) or names & _OPAQUE_NAMES:
        found = tree.find_all(nodes.Const)
    else:
        looked = {id(const) for const in _looked_for(tree)}
        found = (const for const in tree.find_all(nodes.Const) if id(const) in looked)
    return tuple(dict.fromkeys(c.value for c in found if isinstance(c.value, str) and c.value.strip()))


def _looked_for(tree: Any) -> Iterator[Any]:
    """The constants that reach a look into the conversation."""
    flows = list(_flows(tree))
    heard = {
        "messages",
        ".previtem",
        ".nextitem",
    }  # names of what is made of the conversation; the last are a loop's
    while grown := {name for flow in flows if heard & _named(flow.value) for name in flow.names} - heard:
        heard |= grown
    pending = [
        part
        for look in _looks(tree)
        if any(heard & _named(operand) for operand in look.operands)
        for value in look.sought
        for part in _parts(value)
    ]
    reached: set[str] = set()
    while pending:
        part = pending.pop()
        if isinstance(part, nodes.Const):
            yield part
        elif new := _names(part) - reached:
            reached |= new
            pending += [inner for flow in flows if flow.names & new for inner in _parts(flow.value)]


def _looks(tree: Any) -> Iterator[_Look]:
    """Where the code compares or searches."""
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    role = _is_role if _roles_are_told_by_messages(tree) else lambda node: False
    for node in tree.find_all(nodes.Compare):
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        if not _of_role(operands, role):
            yield _Look(operands, operands)
    for node in tree.find_all(nodes.Test):
        operands = [node.node, *_given(node)]
        if len(operands) > 1 and not _of_role(operands, role):
            yield _Look(operands, operands)
    for node in tree.find_all(nodes.Getitem):
        if not isinstance(node.arg, (nodes.Const, nodes.Slice)):  # what is said may be the key of a table
            yield _Look([node.arg], [node.node, node.arg])
    for node in tree.find_all((nodes.Call, nodes.Filter)):
        given = _given(node)
        if isinstance(node, nodes.Filter):
            name, owner = node.name, [node.node] if node.node is not None else []
        elif isinstance(node.node, nodes.Getattr):
            name, owner = node.node.attr, [node.node.node]
        elif isinstance(node.node, nodes.ExtensionAttribute):  # {% generation %}
            continue
        else:
            name, owner = getattr(node.node, "name", ""), []
            if name in macros | _FUNCTIONS:  # a macro's arguments flow into it
                continue
        fixed = bool(given) and isinstance(given[0], nodes.Const)
        if name in _PASSES or (name == "get" and fixed):
            continue
        if name in ("selectattr", "rejectattr") and fixed:  # a key, the name of a test, and what it compares with
            given = [] if role(nodes.Getitem(owner[0], given[0], "load")) else given[2:]
        if not given:
            continue
        # Only what is no constant may be found in a text that the template has made.
        constant = name in _SEARCHES and all(isinstance(value, nodes.Const) for value in given)
        yield _Look([*owner, *given], given if constant else [*owner, *given])


def _of_role(operands: list[Any], role: Any) -> bool:
    """Whether a message's role is compared with constants."""
    one, *others = operands
    sides = [(one, others)] + ([(others[0], [one])] if len(others) == 1 else [])
    return any(
        role(side) and all(isinstance(part, nodes.Const) for value in rest for part in _leaves(value))
        for side, rest in sides
    )


def _leaves(value: Any) -> list[Any]:
    return list(value.items) if isinstance(value, (nodes.List, nodes.Tuple)) else [value]


def _is_role(node: Any) -> bool:
    """Whether an expression reads the role of a message."""
    if isinstance(node, nodes.Getattr):
        return node.attr == "role"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "role"
    given = _given(node) if isinstance(node, nodes.Call) else []
    return (
        bool(given)
        and isinstance(node.node, nodes.Getattr)
        and node.node.attr == "get"
        and all(isinstance(value, nodes.Const) for value in given)
        and given[0].value == "role"
    )


def _roles_are_told_by_messages(tree: Any) -> bool:
    """Whether nothing that was said becomes the role of something that the template makes itself."""
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    made = [(pair.key, pair.value) for pair in tree.find_all(nodes.Pair)]
    for call in tree.find_all(nodes.Call):
        if getattr(call.node, "name", "") not in macros:
            made += [(nodes.Const(keyword.key), keyword.value) for keyword in call.kwargs]
    for node in tree.find_all((nodes.Assign, nodes.AssignBlock)):
        made += [(nodes.Const(ref.attr), getattr(node, "node", node)) for ref in node.find_all(nodes.NSRef)]
    return all(isinstance(k, nodes.Const) and (k.value != "role" or isinstance(v, nodes.Const)) for k, v in made)


def _given(node: Any) -> list[Any]:
    """The arguments of a call, a filter or a test."""
    named = [keyword.value for keyword in node.kwargs or ()]
    return [*(node.args or ()), *named, *filter(None, (node.dyn_args, node.dyn_kwargs))]


def _flows(tree: Any) -> Iterator[_Flow]:
    """What goes where by name."""
    for node in tree.find_all(nodes.Assign):
        yield _Flow(_named(node.target), node.node)
    for node in tree.find_all(nodes.AssignBlock):
        yield from (_Flow(_named(node.target), part) for part in (*node.body, node.filter) if part is not None)
    for node in tree.find_all(nodes.For):
        yield _Flow(_named(node.target), node.iter)
    for node in tree.find_all(nodes.With):
        yield from (_Flow(_named(t), value) for t, value in zip(node.targets, node.values, strict=True))
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for name, macro in macros.items():
        yield from (_Flow(frozenset({name}), part) for part in macro.body)
        with_defaults = macro.args[len(macro.args) - len(macro.defaults) :]
        yield from (_Flow(_named(a), value) for a, value in zip(with_defaults, macro.defaults, strict=True))
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            names = [argument.name for argument in macros[call.node.name].args]
            yield from (_Flow(frozenset({name}), value) for name, value in zip(names, call.args, strict=False))
            yield from (_Flow(frozenset({keyword.key}), keyword.value) for keyword in call.kwargs)
            spread = filter(None, (call.dyn_args, call.dyn_kwargs))
            yield from (_Flow(frozenset(names), value) for value in spread)


def _parts(node: Any) -> Iterator[Any]:
    """The constants of a value and what names others, as far as they are in its text."""
    if isinstance(node, _NO_TEXTS) or (isinstance(node, nodes.Filter) and node.name in ("length", "count", "int")):
        return
    if isinstance(node, (nodes.Const, nodes.Name, nodes.NSRef)):
        yield node
        return
    if isinstance(node, (nodes.Getattr, nodes.Getitem)):
        yield node
    keys: list[Any] = [node.arg] if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) else []
    if isinstance(node, (nodes.If, nodes.CondExpr)):
        keys.append(node.test)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
        keys += node.args[:1]
    for child in node.iter_child_nodes():
        if not any(child is key for key in keys):
            yield from _parts(child)


def _named(node: Any) -> frozenset[str]:
    """All names in a value or a target."""
    parts = (node, *node.find_all((nodes.Name, nodes.NSRef, nodes.Getattr, nodes.Getitem)))
    return frozenset(name for part in parts for name in _names(part))


def _names(node: Any) -> frozenset[str]:
    """The names of one node."""
    if isinstance(node, nodes.Name):
        return frozenset({node.name})
    if isinstance(node, nodes.NSRef):
        return frozenset({node.name, f".{node.attr}"})
    if isinstance(node, nodes.Getattr):
        return frozenset({f".{node.attr}"})
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return frozenset({f".{node.arg.value}"})
    return frozenset()
