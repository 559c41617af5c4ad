"""The arguments of a tool call against the tool's JSON schema: checked, and mended where only one reading is possible.

Models write ``"3"`` for 3, and a template that was not told the tools reads every untyped argument as a string. So a value
that does not fit is read again as what the schema asks for: a string as the number, boolean, list or object that it
spells, and an integer or a boolean as the string that spells it. A value that fits is never changed.

Law of this file: whatever JSON it is given, it raises only :class:`ArgumentsError`, in time proportional to the value
times the schema, and says for every fault where it is, what was expected and what was found: in the same words, whether
``jsonschema`` has found it or pydantic. What :func:`~torchrl_chat.schemas.checker` does not check is left to whoever runs
the tool.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchrl_chat.schema_references import TooLargeError
from torchrl_chat.schemas import checker, spelled

if TYPE_CHECKING:
    from jsonschema import ValidationError
    from pydantic import ValidationError as PydanticError

_MAX_FAULTS = 5  # more help nobody, and each costs tokens
_MAX_ROUNDS = 64


class ArgumentsError(ValueError):
    """The arguments of a call do not fit the tool's schema.

    Attributes:
        faults: what is wrong, a sentence each.
    """

    def __init__(self, faults: Sequence[str]):
        super().__init__("; ".join(faults))
        self.faults = list(faults)


def fit(value: Any, schema: Mapping[str, Any], closed: bool = False) -> Any:
    """The value, mended where it does not fit the schema but spells one that does.

    Args:
        value: a JSON value.
        schema: a JSON schema.
        closed: refuse keys that the schema does not name, where it says nothing about them.

    Raises:
        ArgumentsError: it does not fit.

    Example:
        >>> fit({"n": "3"}, {"type": "object", "properties": {"n": {"type": "integer"}}})
        {'n': 3}
        >>> fit({"n": "three"}, {"type": "object", "properties": {"n": {"type": "integer"}}})
        Traceback (most recent call last):
        torchrl_chat.tools.arguments.ArgumentsError: 'n' must be an integer, not the string "three"
    """
    try:
        fitted, errors = _fit(checker({"additionalProperties": False, **schema} if closed else schema), value)
    except (TooLargeError, RecursionError):
        raise ArgumentsError(["the arguments are too large, or nested too deeply"]) from None
    if errors:
        raise ArgumentsError([fault for error in errors for fault in _faults(error)][:_MAX_FAULTS])
    return fitted


def described(schema: Any) -> str:
    """A schema in a few words.

    Example:
        >>> described({"type": "array", "items": {"type": "integer"}}), described({"enum": ["C", "F"]})
        ('array of integer', '"C" | "F"')
    """
    if not isinstance(schema, Mapping):
        return "any"
    if isinstance(options := schema.get("enum"), Sequence):
        return " | ".join(_json(option) for option in options)
    if "const" in schema:
        return _json(schema["const"])
    branches = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(branches, Sequence) and branches:
        return " | ".join(dict.fromkeys(map(described, branches)))
    kind = schema.get("type", "any")
    if isinstance(kind, Sequence) and not isinstance(kind, str):
        return " | ".join(map(str, kind))
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        return f"array of {described(schema['items'])}"
    return str(kind)


# ---------------------------------------------------------------------- mending
def _fit(check: Any, value: Any) -> tuple[Any, list[ValidationError]]:
    """The value, read again wherever that helps, and the errors that are left."""
    for _ in range(_MAX_ROUNDS):  # what is read again is checked again, but a schema may contradict itself
        errors = _one_a_place(check.iter_errors(value))
        readings = {place: _read_again(check, error) for place, error in errors.items()}
        new = [place for place, reading in readings.items() if reading is not errors[place].instance]
        if not new:
            break
        for place in sorted(new, key=len, reverse=True):
            value = _put(value, place, readings[place])
    return value, list(errors.values())


def _one_a_place(errors: Iterable[ValidationError]) -> dict[tuple[str | int, ...], ValidationError]:
    """One error for each place in the value: of a wrong type nothing else is to be said."""
    found: dict[tuple[str | int, ...], ValidationError] = {}
    for error in errors:
        place = tuple(error.absolute_path)
        if place not in found or error.validator == "type":
            found[place] = error
    return found


def _read_again(check: Any, error: ValidationError) -> Any:
    """The value of an error as what the schema asks for; the very same object where it spells nothing of that."""
    value, asked = error.instance, error.validator_value
    if error.validator == "type":
        return _mended(value, [asked] if isinstance(asked, str) else asked)
    if error.validator in ("enum", "const"):
        return _chosen(value, asked if error.validator == "enum" else [asked])
    if error.validator in ("anyOf", "oneOf"):
        for branch in asked:
            fitted, errors = _fit(check.evolve(schema=branch), value)
            if not errors:
                return fitted
        if (only := _only(asked)) is not None:  # so that what is wrong inside can be told
            return _fit(check.evolve(schema=asked[only]), value)[0]
    return value


def _mended(value: Any, kinds: Sequence[str]) -> Any:
    for kind in kinds:
        if kind == "integer" and isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, str) and kind != "string":
            found, read = spelled(value, kind)
            if found:
                return read
        # Of a float, a list or an object it is not known how it was spelled: 3.10 has become 3.1.
        if kind == "string" and isinstance(value, (bool, int)):
            return _json(value)
    return value


def _chosen(value: Any, options: Sequence[Any]) -> Any:
    text = value.strip() if isinstance(value, str) else _json(value)
    alike = [option for option in options if text == (option if isinstance(option, str) else _json(option))]
    return next((option for option in alike if type(option) is not type(value)), value)


def _only(branches: Sequence[Any]) -> int | None:
    """The place of the one branch that is not null."""
    others = [i for i, b in enumerate(branches) if not (isinstance(b, Mapping) and b.get("type") == "null")]
    return others[0] if len(others) == 1 else None


def _put(value: Any, place: Sequence[Any], new: Any) -> Any:
    """A copy of a value with another one in this place."""
    if not place:
        return new
    copied = value.copy()
    copied[place[0]] = _put(value[place[0]], place[1:], new)
    return copied


# ---------------------------------------------------------------------- what is said
_LIMITS = {
    "minimum": "must be at least {}, not {}",
    "maximum": "must be at most {}, not {}",
    "exclusiveMinimum": "must be more than {}, not {}",
    "exclusiveMaximum": "must be less than {}, not {}",
    "minItems": "must have at least {} items, not {}",
    "maxItems": "must have at most {} items, not {}",
    "minLength": "must have at least {} characters, not {}",
    "maxLength": "must have at most {} characters, not {}",
}


def _faults(error: ValidationError) -> Iterator[str]:
    """What ``jsonschema`` has found, in our words."""
    at, kind, asked, schema = _at(error.absolute_path), error.validator, error.validator_value, error.schema
    if kind == "required":
        yield f"{at} is missing ({described((schema.get('properties') or {}).get(error.path[-1]))})"
    elif kind == "additionalProperties":
        known = schema.get("properties") or {}
        near = difflib.get_close_matches(error.path[-1][:100], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {_listed(map(repr, known))}"
        yield f"{at} is unknown; {hint}"
    elif kind in ("anyOf", "oneOf") and (only := _only(asked)) is not None:
        # Of an optional value, what is wrong with it.
        inside = _one_a_place(inner for inner in error.context or () if inner.relative_schema_path[0] == only)
        for inner in inside.values():
            yield from _faults(inner)
    elif kind in ("type", "anyOf", "oneOf"):
        yield f"{at} must be {_a(described({'type': asked} if kind == 'type' else schema))}, not {_shown(error.instance)}"
    elif kind in ("enum", "const"):
        options = asked if kind == "enum" else [asked]
        one_of = "one of " if len(options) > 1 else ""
        yield f"{at} must be {one_of}{_listed(map(_json, options))}, not {_shown(error.instance)}"
    elif kind in _LIMITS:
        sized = kind.endswith(("Items", "Length"))
        yield f"{at} {_LIMITS[kind].format(asked, len(error.instance) if sized else _shown(error.instance))}"
    else:
        yield f"{at} is not allowed"


def faults_of(error: PydanticError, *at: str) -> list[str]:
    """What pydantic refuses of a value that fits the schema; the check of a type of its own speaks for itself.

    Args:
        error: the error.
        at: where the value stands among the arguments.
    """
    own = [fault["ctx"]["error"] for fault in error.errors() if fault["type"] == "value_error"]
    return [str(fault) for fault in own] or [f"{_at((*at, *f['loc']))}: {f['msg']}" for f in error.errors()]


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)


_WORDS = {str: "the string", bool: "the boolean", list: "the array", dict: "the object"}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = _json(value)
    return f"{_WORDS.get(type(value), 'the number')} {text if len(text) <= 80 else text[:60] + '...'}"


def _a(words: str) -> str:
    if "|" in words:
        return f"one of {words.replace(' | ', ', ')}" if words.count("|") > 1 else words.replace(" | ", " or ")
    return words if words == "null" else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _at(path: Iterable[str | int]) -> str:
    """A place in a value, as ``'options.tags[1]'``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:100]}" for step in path)
    return repr(text.removeprefix(".")) if text else "the value"


def _listed(names: Iterable[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 400 else text[:400] + ", ..."
