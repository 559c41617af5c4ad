"""The arguments of a tool call against the tool's JSON schema: checked, and mended where only one reading is possible.

Models write ``"3"`` for 3, and a template that was not told the tools reads every untyped argument as a string. So a value
that does not fit is read again as what the schema asks for: a string as the number, boolean, list or object that it
spells, and an integer or a boolean as the string that spells it. A value that fits is never changed.

Law of this file: whatever JSON it is given, it raises only :class:`ArgumentsError`, in time proportional to the value
times the schema, and says for every fault where it is, what was expected and what was found. Keywords that it does not
know (``pattern``, ``format``, ...) are left to whoever runs the tool.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_chat.schemas import resolved, spelled

_MAX_FAULTS = 5  # more help nobody, and each costs tokens
_MAX_STEPS = 200_000
_MAX_DEPTH = 64
_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class ArgumentsError(ValueError):
    """The arguments of a call do not fit the tool's schema.

    Attributes:
        faults: what is wrong, a sentence each.
    """

    def __init__(self, faults: Sequence[str]):
        super().__init__("; ".join(faults))
        self.faults = list(faults)


def fit(value: Any, schema: Mapping[str, Any], name: str = "", closed: bool = False) -> Any:
    """The value, mended where it does not fit the schema but spells one that does.

    Args:
        value: a JSON value.
        schema: a JSON schema. Read are ``type``, ``enum``, ``const``, ``properties``, ``required``,
            ``additionalProperties``, ``items``, ``prefixItems``, ``minItems``, ``maxItems``, ``minimum``, ``maximum``,
            ``anyOf``, ``oneOf``, ``allOf``, and ``$ref`` to its own definitions.
        name: what error messages call the value.
        closed: refuse keys that the schema does not name, even if it does not say so.

    Raises:
        ArgumentsError: it does not fit.

    Example:
        >>> fit({"n": "3"}, {"type": "object", "properties": {"n": {"type": "integer"}}})
        {'n': 3}
        >>> fit({"n": "three"}, {"type": "object", "properties": {"n": {"type": "integer"}}})
        Traceback (most recent call last):
        torchrl_chat.tools.arguments.ArgumentsError: 'n' must be an integer, not the string "three"
    """
    fitter = _Fitter(schema)
    try:
        fitted = fitter.fit(value, schema, name, mend=True, closed=closed)
    except RecursionError:
        raise ArgumentsError(["the arguments are nested too deeply"]) from None
    if fitter.faults:
        raise ArgumentsError(fitter.faults)
    return fitted


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether the value fits the schema as it is.

    Example:
        >>> fits(3, {"type": "integer"}), fits("3", {"type": "integer"})
        (True, False)
    """
    fitter = _Fitter(schema)
    try:
        fitter.fit(value, schema, "", mend=False)
    except (ArgumentsError, RecursionError):
        return False
    return not fitter.faults


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


class _Fitter:
    """One pass over one value."""

    def __init__(self, root: Mapping[str, Any]):
        self.root = root
        self.faults: list[str] = []
        self.steps = 0

    def fault(self, text: str) -> None:
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append(text)

    def fit(self, value: Any, schema: Any, at: str, mend: bool, closed: bool = False, depth: int = 0) -> Any:
        self.steps += 1
        if self.steps > _MAX_STEPS or depth > _MAX_DEPTH:
            raise ArgumentsError(["the arguments are too large, or nested too deeply"])
        schema = self.resolved(schema)
        if not isinstance(schema, Mapping):
            if schema is False:
                self.fault(f"{_at(at)} is not allowed")
            return value
        for part in schema.get("allOf") or ():
            value = self.fit(value, part, at, mend, depth=depth + 1)
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                value = self.either(value, schema, schema[key], at, mend, depth)
        kinds = schema.get("type")
        if isinstance(kinds, str):
            kinds = [kinds]
        if kinds and not any(_is(value, kind) for kind in kinds):
            found, value = _mended(value, kinds) if mend else (False, value)
            if not found:
                self.fault(f"{_at(at)} must be {_a(described({'type': kinds}))}, not {_shown(value)}")
                return value
        if "enum" in schema or "const" in schema:
            return self.chosen(value, schema["enum"] if "enum" in schema else [schema["const"]], at, mend)
        if isinstance(value, dict):
            return self.fields(value, schema, at, mend, closed, depth)
        if isinstance(value, list):
            return self.items(value, schema, at, mend, depth)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = schema.get("minimum"), schema.get("maximum")
            if isinstance(low, (int, float)) and value < low:
                self.fault(f"{_at(at)} must be at least {low}, not {_shown(value)}")
            if isinstance(high, (int, float)) and value > high:
                self.fault(f"{_at(at)} must be at most {high}, not {_shown(value)}")
        return value

    def resolved(self, schema: Any) -> Any:
        return resolved(schema, self.root)  # what points out of the schema is left to whoever runs the tool

    def either(
        self, value: Any, schema: Mapping[str, Any], branches: Sequence[Any], at: str, mend: bool, depth: int
    ) -> Any:
        before, self.faults = self.faults, []
        best: list[str] | None = None
        # First as it is in any branch: mending must not change a value that one of them takes.
        for mending in (False, True) if mend else (False,):
            for branch in branches:
                self.faults = []
                fitted = self.fit(value, branch, at, mending, depth=depth + 1)
                if not self.faults:
                    self.faults = before
                    return fitted
                if best is None or mending:
                    best = self.faults
        self.faults = before
        only = (
            [b for b in branches if self.resolved(b).get("type") != "null"]
            if all(isinstance(self.resolved(b), Mapping) for b in branches)
            else branches
        )
        if len(only) == 1:  # of an optional value, say what is wrong with it
            self.fit(value, only[0], at, mend, depth=depth + 1)
        else:
            self.fault(f"{_at(at)} must be {_a(described(schema))}, not {_shown(value)}")
        return value

    def chosen(self, value: Any, options: Sequence[Any], at: str, mend: bool) -> Any:
        for option in options:
            if _same(value, option):
                return value
        if mend and isinstance(value, str):
            for option in options:
                if not isinstance(option, str) and value.strip() == _json(option):
                    return option
        if mend and not isinstance(value, str):
            for option in options:
                if isinstance(option, str) and option == _json(value):
                    return option
        names = ", ".join(_json(option) for option in options)
        if len(names) > 400:
            names = names[:400] + ", ..."
        self.fault(f"{_at(at)} must be {'one of ' if len(options) > 1 else ''}{names}, not {_shown(value)}")
        return value

    def fields(
        self, value: dict[str, Any], schema: Mapping[str, Any], at: str, mend: bool, closed: bool, depth: int
    ) -> Any:
        known = schema.get("properties")
        known = known if isinstance(known, Mapping) else {}
        others = schema.get("additionalProperties", not closed)
        if "patternProperties" in schema and others is False:
            others = True
        fitted = {}
        for key, one in value.items():
            if key in known:
                fitted[key] = self.fit(one, known[key], _under(at, key), mend, depth=depth + 1)
            elif others is False:
                near = difflib.get_close_matches(key[:100], known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; there is {_names(known)}"
                self.fault(f"{_at(_under(at, key[:100]))} is unknown{hint}")
            else:
                fitted[key] = self.fit(one, others, _under(at, key), mend, depth=depth + 1)
        for key in schema.get("required") or ():
            if key not in value:
                said = known.get(key)
                kind = described(self.resolved(said)) if said else "any"
                self.fault(f"{_at(_under(at, key))} is missing ({kind})")
        return fitted

    def items(self, value: list[Any], schema: Mapping[str, Any], at: str, mend: bool, depth: int) -> Any:
        low, high = schema.get("minItems"), schema.get("maxItems")
        if isinstance(low, int) and len(value) < low:
            self.fault(f"{_at(at)} must have at least {low} items, not {len(value)}")
        if isinstance(high, int) and len(value) > high:
            self.fault(f"{_at(at)} must have at most {high} items, not {len(value)}")
        places = schema.get("prefixItems") or ()
        rest = schema.get("items")
        rest = rest if isinstance(rest, (Mapping, bool)) else {}
        return [
            self.fit(one, places[i] if i < len(places) else rest, f"{at}[{i}]", mend, depth=depth + 1)
            for i, one in enumerate(value)
        ]


def _is(value: Any, kind: Any) -> bool:
    if kind == "integer" and isinstance(value, float):
        return False  # 3.0 is an integer in JSON schema, but not in Python: it is mended
    if isinstance(value, bool) and kind in ("integer", "number"):
        return False
    return isinstance(value, _KINDS.get(kind, (object,)))


def _mended(value: Any, kinds: Sequence[str]) -> tuple[bool, Any]:
    """Whether the value spells one of a kind, and which."""
    for kind in kinds:
        if kind == "integer" and isinstance(value, float) and value.is_integer():
            return True, int(value)
        if isinstance(value, str) and kind != "string":
            found, read = spelled(value, kind)
            if found:
                return True, read
        # Of a float, a list or an object it is not known how it was spelled: 3.10 has become 3.1.
        if kind == "string" and isinstance(value, (bool, int)):
            return True, _json(value)
    return False, value


def _same(one: Any, other: Any) -> bool:
    """Equality as JSON has it: true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


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


def _at(at: str) -> str:
    return repr(at) if at else "the value"


def _under(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def _names(known: Mapping[str, Any]) -> str:
    names = ", ".join(map(repr, known))
    return names if len(names) <= 400 else names[:400] + ", ..."
