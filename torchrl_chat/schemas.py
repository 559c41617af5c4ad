"""What a text means where a JSON schema says what it should be, and what a schema has against a value.

This is the one place in which untyped text becomes a value, and the one in which ``jsonschema`` is asked.

Formats of tool calls that look like XML write ``<parameter=version>3.10</parameter>``: only the tool's schema tells
whether that is a number or a string. Where it says string, the text is the value, character for character.

Law of this file: whatever text and schema it is given, it raises nothing, and takes time proportional to the text.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from jsonschema.exceptions import UnknownType, ValidationError
from jsonschema.validators import Draft202012Validator, create
from referencing import Registry
from referencing.exceptions import Unresolvable

from torchrl_chat.schema_references import TooLargeError, pointed_to

_MAX_DEPTH = 64
_MAX_STEPS = 50_000
_ORDER = ("null", "boolean", "integer", "number", "array", "object")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,3999})")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,399})(?:\.[0-9]{1,400})?(?:[eE][-+]?[0-9]{1,3})?")
_LOOSE_INTEGER = re.compile(r"[-+]?[0-9]{1,4000}")
_LOOSE_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][-+]?[0-9]{1,3})?")
_TYPES: dict[str, type] = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a writer spells the values that are no strings; numbers are the same everywhere.

    Attributes:
        null: ``null`` or ``None``; ``None`` where the writer leaves a null out.
        true: ``true`` or ``True``.
        false: ``false`` or ``False``.
        literals: lists and objects are written as Python literals, not as JSON.
    """

    null: str | None = "null"
    true: str = "true"
    false: str = "false"
    literals: bool = False


JSON = Spelling()


def read(
    text: str,
    schema: Any,
    root: Any = None,
    spelling: Spelling = JSON,
    said: str | None = None,
) -> Any:
    """The value that a text spells under a schema.

    Where the schema takes strings only, or says nothing, that is the text itself. Of a union the other members are
    tried first and the string takes what they cannot read; there ``null`` is null only as ``spelling`` spells it.

    Args:
        text: the text, without the delimiters around it.
        schema: the schema of the value; ``None`` or ``{}`` says nothing.
        root: the schema that ``$ref`` points into.
        spelling: how the writer spells booleans, null, lists and objects.
        said: the type that the text itself is marked with, in formats that mark it: ``"string"`` or another.

    Returns:
        A JSON value; the text where the schema cannot be met, unless it is JSON of another type.

    Example:
        >>> read("3.10", {"type": "string"}), read("3.10", {"type": "number"}), read("3.10", {})
        ('3.10', 3.1, '3.10')
        >>> maybe = {"anyOf": [{"type": "string"}, {"type": "null"}]}
        >>> read("null", maybe), read("None", maybe)
        (None, 'None')
        >>> read("None", maybe, spelling=Spelling("None", "True", "False"))
    """
    kinds = kinds_of(schema, root)
    if kinds is None:
        kinds = _SILENT if said in (None, "string") else _ANY
    elif said is not None and len(kinds) > 1:
        kinds = (kinds & _SILENT if said == "string" else kinds - _SILENT) or kinds
    if kinds == _SILENT:
        return text
    strict = "string" in kinds
    for kind in _ORDER:
        if kind in kinds:
            found, value = spelled(text, kind, spelling, strict)
            if found and (not strict or admits(value, schema, root)):
                return value
    if not strict:
        for kind in _ORDER[1:]:  # of a wrong type, but a value that an error can name
            found, value = spelled(text, kind, spelling, True)
            if found:
                return value
    return text


def spelled(text: str, kind: str, spelling: Spelling = JSON, strict: bool = False) -> tuple[bool, Any]:
    """Whether a text spells a value of a kind, and which.

    Args:
        text: the text.
        kind: a type of JSON schema, but for ``string``.
        spelling: how the writer spells it.
        strict: only as ``spelling`` or JSON would; otherwise blanks around it and the words of Python are taken too.

    Example:
        >>> spelled("+3", "integer"), spelled("+3", "integer", strict=True), spelled("True", "boolean")
        ((True, 3), (False, None), (True, True))
    """
    if not strict:
        text = text.strip()
    word = text if strict else text.lower()
    if kind == "null":
        return (text == spelling.null if strict else word in ("null", "none", "")), None
    if kind == "boolean":
        for value, known in ((True, spelling.true), (False, spelling.false)):
            if text == known or word == str(value).lower():
                return True, value
    elif kind == "integer":
        if (_INTEGER if strict else _LOOSE_INTEGER).fullmatch(text):
            return True, int(text)
    elif kind == "number":
        if (_INTEGER if strict else _LOOSE_INTEGER).fullmatch(text):
            return True, int(text)
        if (_NUMBER if strict else _LOOSE_NUMBER).fullmatch(text) and math.isfinite(number := float(text)):
            return True, number
    elif kind in ("array", "object"):
        begun = text.lstrip()[:1]
        if begun == ("[" if kind == "array" else "{") or (begun == "(" and kind == "array" and spelling.literals):
            value = _json(text)
            if value is None and (spelling.literals or not strict):
                value = literal(text)
            if isinstance(value, _TYPES[kind]):
                return True, value
    return False, None


def literal(text: str) -> Any:
    """The JSON value that a list, tuple or dict of Python spells; ``None`` if it is none, or JSON cannot hold it.

    Example:
        >>> literal("{'a': [1, None, True], 'b': (2.5,)}")
        {'a': [1, None, True], 'b': [2.5]}
    """
    text = text.strip()
    # Without a bound on the depth, brackets could exhaust the stack of Python's own parser.
    if text[:1] not in ("[", "{", "(") or bracket_depth(text) > 100:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a wrong escape in somebody's text
            value = json.loads(json.dumps(ast.literal_eval(text), allow_nan=False))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be tokenized
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return value


def bracket_depth(text: str) -> int:
    """How deep the brackets of a text nest at most (brackets in strings are counted too)."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\](){}]", text):
        depth = depth + 1 if bracket in "[({" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


def _json(text: str) -> Any:
    """The JSON value of a text; ``None`` if it is none (or ``null``), not finite, or cannot be tokenized."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(number)
    return value


# ---------------------------------------------------------------------- schemas
def resolved(schema: Any, root: Any) -> Any:
    """A schema with its ``$ref`` followed; ``{}``, which takes anything, for one that points nowhere in ``root``."""
    for _ in range(16):
        ref = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(ref, str):
            return schema
        found = pointed_to(root, ref)
        if not isinstance(found, Mapping):
            return {}
        schema = {**found, **{k: v for k, v in schema.items() if k != "$ref"}}
    return {}


def kinds_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str] | None:
    """The types that a schema takes; ``None`` if it says nothing about them.

    Example:
        >>> sorted(kinds_of({"anyOf": [{"$ref": "#/$defs/N"}, {"const": "all"}]}, {"$defs": {"N": {"type": "number"}}}))
        ['integer', 'number', 'string']
    """
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return None
    found: list[frozenset[str]] = []
    names = schema.get("type")
    names = [names] if isinstance(names, str) else names
    if isinstance(names, Sequence) and (known := frozenset(name for name in names if isinstance(name, str))):
        found.append(known)
    if isinstance(schema.get("enum"), Sequence):
        found.append(frozenset(map(kind_of, schema["enum"])))
    elif "const" in schema:
        found.append(frozenset([kind_of(schema["const"])]))
    for key in ("anyOf", "oneOf"):
        if isinstance(members := schema.get(key), Sequence) and members:
            each = [kinds_of(member, root, depth + 1) for member in members[:_MAX_DEPTH]]
            found.append(frozenset().union(*(_SILENT if kinds is None else kinds for kinds in each)))
    for part in schema.get("allOf") or ():
        if (kinds := kinds_of(part, root, depth + 1)) is not None:
            found.append(kinds)
    if not found:  # what only an object has is no proof that it is one
        implied = [k for key, k in (("properties", "object"), ("items", "array")) if key in schema]
        return frozenset([*implied, "string"]) if implied else None
    found = [kinds | {"integer"} if "number" in kinds else kinds for kinds in found]
    return frozenset.intersection(*found) or None


def kind_of(value: Any) -> str:
    """The type of a JSON value, as JSON schema names it.

    Example:
        >>> kind_of(True), kind_of(1), kind_of(1.0), kind_of(None)
        ('boolean', 'integer', 'number', 'null')
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "integer" if isinstance(value, int) else "number"
    return next((kind for kind, cls in _TYPES.items() if isinstance(value, cls)), "object")


def admits(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether a schema takes a value, as far as :func:`checker` goes.

    Example:
        >>> admits([1], {"type": "array", "items": {"type": "integer"}}), admits(["a"], {"items": {"type": "integer"}})
        (True, False)
    """
    try:
        return next(checker(schema, root).iter_errors(value), None) is None
    except (TooLargeError, RecursionError):
        return True  # whoever checks the arguments says so


# ---------------------------------------------------------------------- jsonschema, as far as it is used
def checker(schema: Any, root: Any = None) -> Any:
    """A validator of ``jsonschema`` that finds the errors of values under a schema, whatever the schema is.

    What is no schema says nothing, nor does a reference that leads nowhere: nothing is fetched. Keywords whose check may
    take any time (``pattern``, ``uniqueItems``), and formats, are left to whoever takes the value. 3.0 is no integer, as
    it is none for a Python function, and of ``oneOf`` several may hold.

    Args:
        schema: the schema.
        root: the schema that references start from; by default the schema itself.

    Raises:
        TooLargeError: by its methods, after many steps.
    """
    root = schema if root is None else root
    whole = root if isinstance(root, Mapping) else {}
    # What would check formats is handed from schema to schema: here, what one check must remember.
    memory: Any = SimpleNamespace(left=_MAX_STEPS, followed=set())
    found = _Checker(
        {key: part for key, part in whole.items() if key not in ("$id", "$schema")},
        format_checker=memory,
        registry=Registry(),
    )
    return found if root is schema else found.evolve(schema=schema if isinstance(schema, (Mapping, bool)) else {})


def _bounded(check: Callable[..., Any]) -> Callable[..., Any]:
    """A keyword that counts its steps, and that says nothing where its value makes no sense."""

    def keyword(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
        validator.format_checker.left -= 1
        if validator.format_checker.left < 0:
            raise TooLargeError
        with contextlib.suppress(AttributeError, TypeError, ValueError, UnknownType, Unresolvable):
            yield from check(validator, wanted, value, schema) or ()

    return keyword


def _reference(validator: Any, ref: str, value: Any, schema: Any) -> Iterator[ValidationError]:
    followed, step = validator.format_checker.followed, (ref, id(value))
    if step not in followed:  # else it leads back to itself, and says nothing
        followed.add(step)
        yield from _DRAFT["$ref"](validator, ref, value, schema)
        followed.discard(step)


def _choice(validator: Any, options: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if not any(kind_of(option) == kind_of(value) and option == value for option in options):
        yield ValidationError("is none of the choices")


def _required(validator: Any, keys: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    for key in keys if isinstance(value, dict) else ():
        if key not in value:
            yield ValidationError("is missing", path=[key])


def _others(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(value, dict) or "patternProperties" in schema:
        return
    for key in value:
        if key in schema.get("properties", ()):
            continue
        if wanted is False:
            yield ValidationError("is unknown", path=[key])
        else:
            yield from validator.descend(value[key], wanted, path=key)


_DRAFT = Draft202012Validator.VALIDATORS
_KEYWORDS: dict[str, Callable[..., Any]] = {
    **{key: _DRAFT[key] for key in ("type", "properties", "prefixItems", "items", "anyOf", "allOf")},
    **{key: _DRAFT[key] for key in ("minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum")},
    **{key: _DRAFT[key] for key in ("exclusiveMinimum", "exclusiveMaximum")},
    "oneOf": _DRAFT["anyOf"],
    "enum": _choice,
    "const": lambda validator, only, *more: _choice(validator, [only], *more),
    "$ref": _reference,
    "required": _required,
    "additionalProperties": _others,
}
_Checker: Any = create(
    Draft202012Validator.META_SCHEMA,
    {key: _bounded(check) for key, check in _KEYWORDS.items()},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, it: kind_of(it) == "integer"),
    id_of=Draft202012Validator.ID_OF,
)
_SILENT = frozenset(["string"])
_ANY = frozenset([*_ORDER, "string"])
