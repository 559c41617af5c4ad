"""The arguments of a call that stand in it as text: which characters are the value, and which value they spell.

What a template writes around an argument and how it spells one that is no string is *derived*: a call with known
arguments is rendered, and read back with nothing taken off (:func:`manner_of`). What type an argument has is told by
the tool's schema, and read by :mod:`torchrl_chat.schemas`.

Law of this file: a string comes out as exactly the characters that the template would write for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_chat.schemas import JSON, Spelling, kinds_of, literal, read, resolved


@dataclass(frozen=True, slots=True)
class Manner:
    """How a template writes an argument between the delimiters of its format.

    Attributes:
        lead: what it writes in front of a string.
        trail: what it writes behind one.
        spelling: how it spells what is no string.
        bare: the quote that it puts around a string without escaping anything in it; "" where it escapes, or puts none.
    """

    lead: str = "\n"
    trail: str = "\n"
    spelling: Spelling = JSON
    bare: str = ""


USUAL = Manner()
"""Taken of a template that cannot be asked: a line break on either side belongs to it."""

_AS_WRITTEN = Manner("", "")
_STRING = frozenset(["string"])


class Values:
    """Reads the arguments of the calls of one template.

    Args:
        tools: JSON schemas of the tools, as the template gets them.
        manner: how the template writes arguments, or what finds it out when it is first needed.
    """

    def __init__(self, tools: Sequence[Any] = (), manner: Manner | Callable[[], Manner] = USUAL):
        self.parameters = parameters_of(tools)
        self._manner = manner

    @property
    def manner(self) -> Manner:
        """How the template writes arguments."""
        if not isinstance(self._manner, Manner):
            self._manner = self._manner()
        return self._manner

    def read(self, name: str, key: str, raw: str, said: str | None = None) -> Any:
        """The value of one argument.

        Args:
            name: the tool that is called.
            key: the parameter.
            raw: what stands between the delimiters of the format.
            said: ``"string"`` or another type, where the format marks it.
        """
        root = self.parameters.get(name)
        return self.text(raw, inner(root, key, root), root, said)

    def text(self, raw: str, schema: Any, root: Any, said: str | None = None) -> Any:
        """The value that a text spells under a schema."""
        manner = self.manner
        return read(raw.removeprefix(manner.lead).removesuffix(manner.trail), schema, root, manner.spelling, said)

    def bare_texts(self, name: str | None, arguments: Mapping[str, Any]) -> list[str]:
        """The arguments that should be strings, and nothing else, but were read as a number, a boolean or a container."""
        root = self.parameters.get(name or "")
        if root is None:
            return []
        return [
            key
            for key, value in arguments.items()
            if not isinstance(value, (str, type(None))) and kinds_of(inner(root, key, root), root) == _STRING
        ]


class _AsWritten(Values):
    """Reads every argument as the characters that stand there."""

    def text(self, raw: str, schema: Any, root: Any, said: str | None = None) -> Any:
        return raw


def parameters_of(tools: Sequence[Any]) -> dict[str, Any]:
    """The schemas of the tools' parameters, by the names of the tools.

    Args:
        tools: what a chat template takes: ``{"type": "function", "function": {...}}``, its inner part alone, or Python
            functions, which transformers describes by their docstrings.
    """
    found: dict[str, Any] = {}
    for tool in tools:
        if callable(tool) and not isinstance(tool, Mapping):
            from transformers.utils import get_json_schema

            tool = get_json_schema(tool)
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            found[function["name"]] = function.get("parameters") or function.get("input_schema") or {}
    return found


def inner(schema: Any, step: str | int, root: Any) -> Any:
    """The schema of a key of an object, or of an item of a list; ``None`` where nothing is said of it.

    Example:
        >>> inner({"properties": {"a": {"type": "string"}}}, "a", None), inner({"items": {"const": 1}}, 0, None)
        ({'type': 'string'}, {'const': 1})
    """
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return None
    if isinstance(step, str):
        known = schema.get("properties")
        found = known.get(step) if isinstance(known, Mapping) else None
        found = schema.get("additionalProperties") if found is None else found
    else:
        places = schema.get("prefixItems") or ()
        found = places[step] if step < len(places) else schema.get("items")
    if isinstance(found, Mapping):
        return found
    parts = [part for key in ("anyOf", "oneOf", "allOf") for part in schema.get(key) or ()]
    return next((found for part in parts if (found := inner(part, step, root)) is not None), None)


PLAIN = Values()
"""Knows of no tool: every argument is a string, unless its format marks it as something else."""


# ---------------------------------------------------------------------- what a template does
PROBE_NAME = "lookup"
_SENTINEL = "Qz8value8zQ"


def manner_of(write: Callable[[dict[str, Any]], str], calls: Callable[[str, Values], Sequence[Any]]) -> Manner:
    """How a template writes the arguments of calls.

    Args:
        write: a conversation that ends with a call of :data:`PROBE_NAME` with these arguments, as the template writes it;
            "" where it refuses.
        calls: the calls in a text, read with these values.

    Returns:
        what was found out; :data:`USUAL` where the template writes no calls that are read here.
    """
    as_written = _AsWritten((), _AS_WRITTEN)

    def written(arguments: dict[str, Any]) -> dict[str, Any]:
        found = [call.arguments for call in calls(write(arguments), as_written) if call.name == PROBE_NAME]
        return found[-1] if found and isinstance(found[-1], dict) else {}

    raw = written({"q": _SENTINEL}).get("q")
    if not isinstance(raw, str) or _SENTINEL not in raw:
        return USUAL
    lead, _, trail = raw.partition(_SENTINEL)
    # Each alone: a template may refuse one of them, or leave it out.
    words = {word: written({"q": value}).get("q") for word, value in _WORDS.items()}
    texts = {
        word: text.removeprefix(lead).removesuffix(trail) for word, text in words.items() if isinstance(text, str)
    }
    spelling = Spelling(
        null=texts.get("null", None if words["null"] is None and texts else "null") or None,
        true=texts.get("true", "true"),
        false=texts.get("false", "false"),
        literals="None" in texts.get("list", "") and literal(texts["list"]) is not None,
    )
    return Manner(lead, trail, spelling, _bare_quote(write))


_WORDS: dict[str, Any] = {"null": None, "true": True, "false": False, "list": [None, "x"]}


def _bare_quote(write: Callable[[dict[str, Any]], str]) -> str:
    """The quote around strings, if nothing in them is escaped."""
    probe = f"{_SENTINEL}\\'\"\n{_SENTINEL}"
    text = write({"q": probe})
    at = text.rfind(probe)
    if at <= 0:
        return ""
    before, after = text[at - 1], text[at + len(probe) : at + len(probe) + 1]
    return before if before == after and before in "'\"" else ""
