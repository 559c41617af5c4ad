"""JSON schemas as a model is to read them: local references written out.

Chat templates and one-line signatures know no ``$ref``; what a reference stands for is part of what a tool tells.

Law of this file: a schema with its references written out allows what it allowed; one that cannot be written out (it
contains itself, or points elsewhere) keeps the reference and the definitions that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from referencing import Registry, Resource
from referencing.exceptions import Unresolvable

_DEFINITIONS = ("$defs", "definitions")
_NAMED = ("properties", "patternProperties", "dependentSchemas", *_DEFINITIONS)
"""Keys under which schemas stand by names, which may be any word."""
_VALUES = ("enum", "const", "default", "examples", "example")
"""Keys of values: a ``$ref`` in them is data."""
_LARGEST = 20_000
"""Schemas, one inside the other, that references may write out: definitions that name each other twice double each time."""


def written_out(schema: Any) -> Any:
    """The schema with its local references (``"#/$defs/Query"``) replaced by what they point to.

    Beside a reference, a key of its own wins (``description``). A definition that contains itself is written out once
    for each reference from outside, and keeps the references to itself and the definition. Other schemas lose
    definitions that nothing points to any more. Written out twice is written out once.

    Args:
        schema: a JSON schema, the root that its references start from.

    Returns:
        the schema, the very same object where it holds no reference.

    Example:
        >>> written_out({"properties": {"q": {"$ref": "#/$defs/Q"}}, "$defs": {"Q": {"type": "string"}}})
        {'properties': {'q': {'type': 'string'}}}
    """
    if not isinstance(schema, Mapping) or next(_references(schema), None) is None:
        return schema
    try:
        return _Writer(schema).written()
    except (TooLargeError, RecursionError):
        return schema


def tool_written_out(tool: Any) -> Any:
    """A tool as APIs and chat templates take it, with the references in its parameters written out.

    Args:
        tool: ``{"type": "function", "function": {"name": ..., "parameters": {...}}}``, or the function alone;
            anything else is returned as it is.
    """
    if not isinstance(tool, Mapping):
        return tool
    if isinstance(tool.get("function"), Mapping):
        function = tool_written_out(tool["function"])
        return tool if function is tool["function"] else {**tool, "function": function}
    parameters = written_out(tool.get("parameters"))
    return tool if parameters is tool.get("parameters") else {**tool, "parameters": parameters}


def pointed_to(root: Any, reference: str) -> Any:
    """What a local reference points to in a schema; ``None`` if there is nothing, or it is not local.

    Example:
        >>> pointed_to({"$defs": {"Q": {"type": "string"}}}, "#/$defs/Q")
        {'type': 'string'}
    """
    if reference != "#" and not reference.startswith("#/"):
        return None
    try:
        return Resource.opaque(root).pointer(reference[1:], resolver=Registry().resolver()).contents
    except (Unresolvable, TypeError, ValueError):
        return None


class TooLargeError(Exception):
    """A schema grows beyond all measure when it is written out, or when a value is checked against it."""


class _Writer:
    """Writes one schema out."""

    def __init__(self, root: Mapping[str, Any]):
        self.root = root
        self.size = 0

    def written(self) -> dict[str, Any]:
        body = {key: value for key, value in self.root.items() if key not in _DEFINITIONS}
        out = self.schema(body)
        kept = {name: self.root[name] for name in _DEFINITIONS if name in self.root}
        wanted = self.reached(out)
        for name, definitions in kept.items():
            named = {
                key: value
                for key, value in definitions.items()
                if any(
                    f"{unquote(ref)}/".startswith(f"#/{name}/{key.replace('~', '~0').replace('/', '~1')}/")
                    for ref in wanted
                )
            }
            if named or any(unquote(ref) == f"#/{name}" for ref in wanted):
                out[name] = named or definitions
        return out

    def schema(self, node: Any, inside: tuple[str, ...] = (), around: tuple[Mapping[str, Any], ...] = ()) -> Any:
        """A schema written out.

        Args:
            node: the schema.
            inside: the references that it is written for.
            around: the schemas that it stands in.
        """
        self.size += 1
        if self.size > _LARGEST:
            raise TooLargeError
        if not isinstance(node, Mapping):
            return node
        node = _unwrapped(node)
        reference = node.get("$ref")
        if isinstance(reference, str) and reference not in inside and reference != "#":
            found = pointed_to(self.root, reference)
            if isinstance(found, Mapping) and not self._is_written(reference, found, around):
                own = {key: value for key, value in node.items() if key != "$ref"}
                found = self.schema(found, (*inside, reference), around)
                return {**found, **self._keys(own, inside, around)}
        return self._keys(node, inside, (*around, node))

    def _keys(
        self, node: Mapping[str, Any], inside: tuple[str, ...], around: tuple[Mapping[str, Any], ...]
    ) -> dict[str, Any]:
        out = {}
        for key, value in node.items():
            if key in _VALUES:
                out[key] = value
            elif key in _NAMED and isinstance(value, Mapping):
                out[key] = {name: self.schema(entry, inside, around) for name, entry in value.items()}
            elif isinstance(value, (list, tuple)):
                out[key] = [self.schema(entry, inside, around) for entry in value]
            else:
                out[key] = self.schema(value, inside, around)
        return out

    def _is_written(self, reference: str, found: Mapping[str, Any], around: tuple[Mapping[str, Any], ...]) -> bool:
        """Whether a definition that contains itself stands around the reference already: written out twice is once."""
        if not any(_fields(node) == _fields(found) for node in around):
            return False
        return reference in self.reached(found)

    def reached(self, node: Any) -> set[str]:
        """The references in a schema, and in what they point to."""
        reached: set[str] = set()
        pending = list(_references(node))
        while pending:
            one = pending.pop()
            if one not in reached:
                reached.add(one)
                pending += _references(pointed_to(self.root, one))
        return reached


def _fields(node: Mapping[str, Any]) -> Any:
    """What tells one schema from another, references aside."""
    properties = node.get("properties")
    names = sorted(map(str, properties)) if isinstance(properties, Mapping) else None
    return node.get("type"), names, sorted(node.keys() - {"title", "description", "default", "examples"})


def _references(node: Any) -> Iterator[str]:
    """Every reference in a schema, in order."""
    pending = [node]
    while pending:
        node = pending.pop()
        if not isinstance(node, Mapping):
            pending += node if isinstance(node, (list, tuple)) else ()
            continue
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for key, value in node.items():
            if key in _VALUES:
                continue
            pending += value.values() if key in _NAMED and isinstance(value, Mapping) else [value]


def _unwrapped(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """A reference that stands alone in an ``allOf``, as it had to where words beside a reference were ignored."""
    parts = node.get("allOf")
    if isinstance(parts, (list, tuple)) and len(parts) == 1 and isinstance(parts[0], Mapping):
        others = {key: value for key, value in node.items() if key != "allOf"}
        if "$ref" in parts[0] and others.keys() <= {"title", "description", "default", "examples"}:
            return {**parts[0], **others}
    return node
