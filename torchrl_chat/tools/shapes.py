"""From a Python type hint to JSON: the schema that a model is shown, and the way from a JSON value to the Python value.

Law of this file: a value that fits a shape's schema can be built, or is refused with a message; a hint that cannot be
told to a model is refused when the shape is made.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import types
import typing
from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from torchrl_chat.tools.arguments import ArgumentsError, fits

Schema = dict[str, Any]
"""A JSON schema."""

_SIMPLE: dict[Any, str] = {str: "string", int: "integer", bool: "boolean", type(None): "null"}
_SEQUENCES = (list, abc.Sequence, abc.Iterable, abc.Collection, abc.MutableSequence)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_SETS: dict[Any, Callable[[Any], Any]] = {set: set, frozenset: frozenset, abc.Set: frozenset}


@dataclass(frozen=True)
class Shape:
    """What JSON a value of a type is, and how it is made from it."""

    schema: Schema
    """The JSON schema."""
    build: Callable[[Any], Any] | None = None
    """The Python value of a JSON value that fits the schema; ``None`` where that is the JSON value itself."""

    def make(self, value: Any) -> Any:
        """The Python value of a JSON value that fits the schema."""
        return value if self.build is None else self.build(value)


def shape_of(hint: Any, where: str = "value") -> Shape:
    """The shape of a type hint.

    Read are ``str``, ``int``, ``float``, ``bool``, ``None``, ``Any``, ``Literal``, enums, ``Optional`` and ``Union``,
    lists, tuples, sets and dicts of these, ``TypedDict``, dataclasses, and ``Annotated[..., "description"]``.

    Args:
        hint: the type hint.
        where: what an error message calls it, e.g. ``"the argument 'city' of get_weather"``.

    Raises:
        TypeError: the hint has no JSON form.

    Example:
        >>> shape_of(list[int] | None).schema
        {'anyOf': [{'type': 'array', 'items': {'type': 'integer'}}, {'type': 'null'}]}
        >>> shape_of(tuple[int, str]).make([1, "a"])
        (1, 'a')
    """
    return _shape(hint, where, ())


def _shape(hint: Any, where: str, outer: tuple[Any, ...]) -> Shape:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        shape = _shape(inner[0], where, outer)
        text = next((note for note in inner[1:] if isinstance(note, str)), None)
        return shape if text is None else Shape({**shape.schema, "description": text}, shape.build)
    if hint is Any or hint is inspect.Parameter.empty or hint is object:
        return Shape({})
    hint = type(None) if hint is None else hint
    if hint is float:
        return Shape({"type": "number"}, _float)
    if hint in _SIMPLE:
        return Shape({"type": _SIMPLE[hint]})
    if origin is Literal:
        return _choice(list(inner), dict(zip(inner, inner, strict=True)), where)
    if origin in (Union, types.UnionType):
        return _union([_shape(option, where, outer) for option in inner])
    if isinstance(hint, typing.NewType):
        return _shape(hint.__supertype__, where, outer)
    base = origin or hint
    if base in _SEQUENCES or base in _SETS or base is tuple:
        return _sequence(base, inner, where, outer)
    if base in _MAPPINGS:
        return _mapping(inner, where, outer)
    if inspect.isclass(hint):
        if any(hint is one for one in outer):
            raise TypeError(f"{where} has the type {hint.__name__}, which contains itself: give it the type dict.")
        if issubclass(hint, enum.Enum):
            members = {member.value: member for member in hint}
            return _choice(list(members), members, where)
        if typing.is_typeddict(hint):
            hints, needed = typing.get_type_hints(hint, include_extras=True), hint.__required_keys__  # type: ignore[attr-defined]
            return _record(hint, hints, needed, where, outer)
        if dataclasses.is_dataclass(hint):
            return _dataclass(hint, where, outer)
    raise TypeError(
        f"{where} has the type {hint!r}, which has no JSON form. Use str, int, float, bool, None, Any, Literal, an "
        f"enum, a TypedDict or a dataclass, or lists, tuples, sets, dicts and unions of these."
    )


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ArgumentsError(["a number is too large for a float"]) from None


def _choice(values: list[Any], members: Mapping[Any, Any], where: str) -> Shape:
    kinds = {_SIMPLE.get(type(value), "number" if isinstance(value, float) else "") for value in values}
    if "" in kinds:
        raise TypeError(
            f"{where} allows {values!r:.200}: only strings, numbers, booleans and None have a JSON form."
        )
    schema: Schema = {"type": kinds.pop(), "enum": values} if len(kinds) == 1 else {"enum": values}
    if all(value is member for value, member in members.items()):
        return Shape(schema)
    # Keyed by JSON text: 1 and True are the same key of a dict.
    by_text = {json.dumps(value): members[value] for value in values}
    return Shape(schema, lambda value: by_text[json.dumps(value)])


def _union(options: list[Shape]) -> Shape:
    simple = [option.schema["type"] for option in options if set(option.schema) == {"type"}]
    schema: Schema
    if len(simple) == len(options) and all(isinstance(kind, str) for kind in simple):
        schema = {"type": simple if len(simple) > 1 else simple[0]}
    else:
        schema = {"anyOf": [option.schema for option in options]}
    if all(option.build is None for option in options):
        return Shape(schema)

    def build(value: Any) -> Any:
        chosen = next((option for option in options if fits(value, option.schema)), options[0])
        return chosen.make(value)

    return Shape(schema, build)


def _sequence(base: Any, inner: tuple[Any, ...], where: str, outer: tuple[Any, ...]) -> Shape:
    if base is tuple and inner and inner[-1] is not Ellipsis:
        places = [_shape(item, where, outer) for item in inner]
        schema: Schema = {"type": "array", "prefixItems": [place.schema for place in places]}
        schema |= {"minItems": len(places), "maxItems": len(places)}
        return Shape(schema, lambda value: tuple(p.make(v) for p, v in zip(places, value, strict=True)))
    item = _shape(inner[0], where, outer) if inner else Shape({})
    schema = {"type": "array", "items": item.schema} if item.schema else {"type": "array"}
    if base in _SETS:
        return Shape({**schema, "uniqueItems": True}, lambda value: _as_set(_SETS[base], map(item.make, value)))
    if base is tuple:
        return Shape(schema, lambda value: tuple(map(item.make, value)))
    return Shape(schema, None if item.build is None else lambda value: list(map(item.make, value)))


def _as_set(kind: Callable[[Any], Any], items: Any) -> Any:
    try:
        return kind(items)
    except TypeError:
        raise ArgumentsError(["a set can hold only strings, numbers, booleans and null"]) from None


def _mapping(inner: tuple[Any, ...], where: str, outer: tuple[Any, ...]) -> Shape:
    if inner and inner[0] not in (str, Any):
        raise TypeError(f"{where} is a dict with keys of type {inner[0]!r}: the keys of a JSON object are strings.")
    item = _shape(inner[1], where, outer) if inner else Shape({})
    schema = {"type": "object", "additionalProperties": item.schema} if item.schema else {"type": "object"}
    if item.build is None:
        return Shape(schema)
    return Shape(schema, lambda value: {key: item.make(one) for key, one in value.items()})


def _record(
    hint: Any, hints: Mapping[str, Any], required: abc.Collection[str], where: str, outer: tuple[Any, ...]
) -> Shape:
    fields = {}
    for key, of in hints.items():
        while typing.get_origin(of) in (typing.Required, typing.NotRequired):
            (of,) = typing.get_args(of)
        fields[key] = _shape(of, f"{where}, in {key!r}", (*outer, hint))
    schema: Schema = {"type": "object", "properties": {key: field.schema for key, field in fields.items()}}
    schema |= {"required": [key for key in fields if key in required], "additionalProperties": False}
    if all(field.build is None for field in fields.values()):
        return Shape(schema)
    return Shape(schema, lambda value: {key: fields[key].make(one) for key, one in value.items()})


def _dataclass(hint: Any, where: str, outer: tuple[Any, ...]) -> Shape:
    fields = [field for field in dataclasses.fields(hint) if field.init]
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    hints = typing.get_type_hints(hint, include_extras=True)
    record = _record(hint, {field.name: hints[field.name] for field in fields}, needed, where, outer)

    def build(value: Any) -> Any:
        try:
            return hint(**record.make(value))
        except (TypeError, ValueError) as error:  # its own checks
            raise ArgumentsError([str(error)]) from None

    return Shape(record.schema, build)
