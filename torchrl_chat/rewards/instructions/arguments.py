"""The registry of instruction checks and the validation of their arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Check: TypeAlias = Callable[[str], bool]
"""Whether a response follows one instruction."""
Kind: TypeAlias = Callable[[Any], Any]
"""Takes an argument's value as the dataset has it; returns it ready for use, or raises ValueError with what it must be."""

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": operator.ge,
    "less than": operator.lt,
    "at most": operator.le,
    "more than": operator.gt,
}
"""The comparisons of a count with its threshold. The paper's data uses the first two."""


@dataclass(frozen=True)
class Instruction:
    """One kind of instruction: its check, and what its arguments must be."""

    id: str
    check: Callable[..., bool]
    arguments: Mapping[str, Kind]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def bind(self, kwargs: Mapping[str, Any] | None) -> Check:
        """The check with its arguments; ``None`` values count as absent.

        Raises:
            ValueError: an argument is missing, unknown or of the wrong kind.
        """
        given = {} if kwargs is None else {key: value for key, value in kwargs.items() if value is not None}
        values = {}
        for name, kind in self.arguments.items():
            if name not in given:
                if name not in self.defaults:
                    raise ValueError(
                        f"IFEval instruction {self.id!r} needs the argument {name!r}; got {_keys(given)}."
                    )
                values[name] = self.defaults[name]
                continue
            value = given.pop(name)
            try:
                values[name] = kind(value)
            except ValueError as error:
                raise ValueError(
                    f"IFEval instruction {self.id!r}: argument {name!r} is {value!r:.80}, but must be {error}."
                ) from None
        if given:
            raise ValueError(
                f"IFEval instruction {self.id!r} does not take the argument {next(iter(given))!r}; "
                f"it takes {_keys(self.arguments)}."
            )
        check = self.check
        return lambda response: check(response, **values)


INSTRUCTIONS: dict[str, Instruction] = {}
"""Every kind of instruction by its id, ``"group:name"``."""


def instruction(id: str, defaults: Mapping[str, Any] | None = None, **arguments: Kind) -> Callable[[Any], Any]:
    """Register a function as the check of an instruction."""

    def register(function: Callable[..., bool]) -> Callable[..., bool]:
        INSTRUCTIONS[id] = Instruction(id, function, arguments, defaults or {})
        return function

    return register


def _keys(mapping: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, mapping)) or "none"


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


def text(value: Any) -> str:
    """A text that is not blank, without the white space around it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not blank")
    return value.strip()


def texts(value: Any) -> tuple[str, ...]:
    """One or more texts."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError("a list of texts")
    found = tuple(value)
    if not found or not all(isinstance(item, str) and item for item in found):
        raise ValueError("a list of one or more texts, none of them empty")
    return found


def count(value: Any) -> int:
    """A whole number from 0 on; a column of a table may hold it as a float."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 0:
        raise ValueError("a whole number, 0 or more")
    return operator.index(value)


def ordinal(value: Any) -> int:
    """A whole number from 1 on."""
    try:
        number = count(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError("a whole number, 1 or more")
    return number


def relation(value: Any) -> Callable[[int, int], bool]:
    """A comparison by its name."""
    if not isinstance(value, str) or value not in RELATIONS:
        raise ValueError("one of " + ", ".join(map(repr, RELATIONS)))
    return RELATIONS[value]


def character(value: Any) -> str:
    """One character, whatever its case."""
    if not isinstance(value, str) or len(value.strip()) != 1:
        raise ValueError("a single character")
    return value.strip().lower()
