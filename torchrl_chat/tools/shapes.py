"""From a Python type hint to JSON, by pydantic: the schema that a model is shown, and the way from JSON to the value.

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
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NewType, NotRequired, Required, Union

from pydantic import AfterValidator, AllowInfNan, ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from torchrl_chat.schema_references import written_out
from torchrl_chat.schemas import kind_of
from torchrl_chat.tools.arguments import ArgumentsError, faults_of

Schema = dict[str, Any]
"""A JSON schema."""

_BUILT_AS: dict[Any, Any] = {abc.Set: frozenset, abc.Mapping: dict, abc.MutableMapping: dict}
_BUILT_AS |= dict.fromkeys((abc.Sequence, abc.Iterable, abc.Collection, abc.MutableSequence), list)


@dataclass(frozen=True)
class Shape:
    """What JSON a value of a type is, and how it is made from it."""

    schema: Schema
    """The JSON schema."""
    adapter: TypeAdapter[Any]

    def make(self, value: Any, *at: str) -> Any:
        """The Python value of a JSON value that fits the schema.

        Args:
            value: the JSON value.
            at: where it stands among the arguments, for errors.

        Raises:
            ArgumentsError: the type refuses it all the same: a dataclass's own check, say.
        """
        try:
            return self.adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise ArgumentsError(faults_of(error, *at)) from None
        except TypeError as error:  # of a dataclass's own, or a set of lists
            raise ArgumentsError([str(error)]) from None


def shape_of(hint: Any, where: str = "value") -> Shape:
    """The shape of a type hint.

    Read are ``str``, ``int``, ``float``, ``bool``, ``None``, ``Any``, ``Literal``, enums, ``Optional`` and ``Union``,
    lists, tuples, sets and dicts of these, ``TypedDict``, dataclasses, ``Annotated[..., "description"]``, and whatever
    else pydantic reads.

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
    adapter = TypeAdapter(_for_pydantic(hint, where, ()))
    return Shape(_told(adapter), adapter)


def _told(adapter: TypeAdapter[Any]) -> Schema:
    return written_out(adapter.json_schema(schema_generator=_Told))


def _for_pydantic(hint: Any, where: str, outer: tuple[Any, ...]) -> Any:
    """The hint as pydantic is to read it: records closed, descriptions where it looks for them, lists as lists."""
    base, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if base is Annotated:
        notes = [note for note in inner[1:] if not isinstance(note, str)]
        notes += [Field(description=note) for note in inner[1:] if isinstance(note, str)][:1]
        return Annotated[(_for_pydantic(inner[0], where, outer), *notes)]
    if base in (Required, NotRequired):
        return _for_pydantic(inner[0], where, outer)
    if hint in (Any, object, inspect.Parameter.empty):
        return Any
    if hint is float:
        return Annotated[float, AllowInfNan(False)]  # 1e400 would become infinite
    if isinstance(hint, NewType):
        return _for_pydantic(hint.__supertype__, where, outer)
    if base in (Union, types.UnionType):
        options = [_for_pydantic(option, where, outer) for option in inner]
        # A plain None is told last, wherever it stands.
        return Union[tuple(Annotated[None, Field()] if option is type(None) else option for option in options)]  # noqa: UP007
    base = _BUILT_AS.get(base, base)
    if base in (list, tuple, set, frozenset, dict):
        if base is dict and inner and inner[0] not in (str, Any):
            keys = f"with keys of type {inner[0]!r}: the keys of a JSON object are strings."
            raise TypeError(f"{where} is a dict {keys}")
        items = tuple(item if item is Ellipsis else _for_pydantic(item, where, outer) for item in inner)
        return base[items] if items else base
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        values = tuple(member.value for member in hint)
        return Annotated[_for_pydantic(Literal[values], where, outer), AfterValidator(hint)]
    if base is Literal:
        if not all(isinstance(value, (str, int, float, bool, type(None))) for value in inner):
            simple = "only strings, numbers, booleans and None have a JSON form"
            raise TypeError(f"{where} allows {list(inner)!r:.200}: {simple}.")
        return hint
    if typing.is_typeddict(hint) or (inspect.isclass(hint) and dataclasses.is_dataclass(hint)):
        return _record(hint, where, outer)
    try:
        _told(TypeAdapter(hint))
    except PydanticUserError:
        raise TypeError(
            f"{where} has the type {hint!r}, which has no JSON form. Use str, int, float, bool, None, Any, Literal, an "
            f"enum, a TypedDict or a dataclass, or lists, tuples, sets, dicts and unions of these."
        ) from None
    return hint


def _record(hint: Any, where: str, outer: tuple[Any, ...]) -> Any:
    """A TypedDict or a dataclass as a TypedDict that takes no other keys."""
    if hint in outer:
        raise TypeError(f"{where} has the type {hint.__name__}, which contains itself: give it the type dict.")
    hints = typing.get_type_hints(hint, include_extras=True)
    if typing.is_typeddict(hint):
        needed = hint.__required_keys__
    else:
        fields = [field for field in dataclasses.fields(hint) if field.init]
        hints = {field.name: hints[field.name] for field in fields}
        needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    entries = {key: _for_pydantic(of, f"{where}, in {key!r}", (*outer, hint)) for key, of in hints.items()}
    entries = {key: (Required if key in needed else NotRequired)[of] for key, of in entries.items()}
    record = TypedDict(hint.__name__, entries)  # type: ignore[misc]
    record.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return record if typing.is_typeddict(hint) else Annotated[record, AfterValidator(lambda value: hint(**value))]


_ORDER = (
    *("type", "enum", "prefixItems", "items", "minItems", "maxItems", "uniqueItems"),
    *("properties", "required", "additionalProperties", "anyOf"),
)
_UNSAID: tuple[tuple[str, Any], ...] = (("items", {}), ("additionalProperties", True))


class _Told(GenerateJsonSchema):
    """What a model is told of a type: each thing in one form and one order, and no titles."""

    def sort(self, value: Any, parent_key: str | None = None) -> Any:
        """The schema as it is told; pydantic calls this when the schema is made."""
        if parent_key in ("properties", "$defs"):
            return {name: self.sort(schema) for name, schema in value.items()}
        if parent_key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            return [self.sort(schema) for schema in value]
        if not isinstance(value, dict) or parent_key in ("default", "discriminator"):
            return value
        if "properties" in value:
            value = {"required": [], **value}
        keys = [key for key in dict.fromkeys((*_ORDER, *value)) if key in value and key != "title"]
        told = {key: self.sort(value[key], key) for key in keys if (key, value[key]) not in _UNSAID}
        options = told.get("anyOf") or ()
        if options and all(option.keys() == {"type"} and isinstance(option["type"], str) for option in options):
            told = {"type": [option["type"] for option in told.pop("anyOf")], **told}
        return told

    def literal_schema(self, schema: Any) -> Schema:
        """A list of the values, be it of one."""
        kinds = {kind_of(value) for value in schema["expected"]}
        return {**({"type": kinds.pop()} if len(kinds) == 1 else {}), "enum": schema["expected"]}

    def complex_schema(self, schema: Any) -> Schema:
        """None: models do not know how it is spelled."""
        return self.handle_invalid_for_json_schema(schema, "complex")
