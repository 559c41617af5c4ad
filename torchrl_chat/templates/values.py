"""The arguments of a call that stand in it as text: which value they spell, and how a call is written to be read back.

What a template writes around an argument and how it spells one that is no string is *derived*: a call with known
arguments is rendered, and read back with nothing taken off (:func:`manner_of`). What type an argument has is told by
the tool's schema, and read by :mod:`torchrl_chat.schemas`.

Law of this file: a string comes out as exactly the characters that the template would write for it, and a call that is
written (:func:`written_call`) was read back, by the parser that reads what a policy samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_chat.schemas import JSON, Spelling, kind_of, kinds_of, literal, read, resolved


@dataclass(frozen=True, slots=True)
class Manner:
    """How a template writes an argument between the delimiters of its format."""

    lead: str = "\n"  # what it writes in front of a string
    trail: str = "\n"  # what it writes behind one
    spelling: Spelling = JSON  # how it spells what is no string
    # the quote that it puts around a string without escaping anything in it; "" where it escapes, or puts
    # none
    bare: str = ""


USUAL = Manner()
"""Taken of a template that cannot be asked: a line break on either side belongs to it."""

Calls = Callable[[str, "Values"], Sequence[Any]]
"""The calls (``toolcalls.ParsedCall``) in a text, their arguments read with these values."""

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


def manner_of(write: Callable[[dict[str, Any]], str], calls: Calls) -> Manner:
    """How a template writes the arguments of calls.

    Args:
        write: a conversation that ends with a call of :data:`PROBE_NAME` with these arguments, as the template writes it;
            "" where it refuses.
        calls: the calls in a text, read with these values.

    Returns:
        what was found out; :data:`USUAL` where the template writes no calls that are read here.
    """
    as_written = _AsWritten()

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


# ---------------------------------------------------------------------- a call that is read back
Write = Callable[[str, Mapping[str, Any]], Iterable[str]]
"""The turn that is one call, as the template writes it: each way in which it may be cut out of the template's text."""


def written_call(name: str, arguments: Mapping[str, Any], values: Values, calls: Calls, write: Write) -> str | None:
    """A call in a template's own format that is read back as itself; ``None`` if no way to write it is.

    The template writes it first. An argument that does not come back (left out, or with a quote that ends it too early)
    is written again: a sentinel is put in its place, and the sentinel replaced by other spellings of the value until one
    is read as that value.

    Args:
        name: the tool's name.
        arguments: its arguments, JSON values.
        values: what reads the arguments.
        calls: reads it back.
        write: the template.
    """
    known = values
    if (
        name not in known.parameters
    ):  # nothing is known of its types: all that can be asked is that they are spelled so
        typed = {key: {"type": kind_of(value)} for key, value in arguments.items()}
        values = Values([{"name": name, "parameters": {"properties": typed}}], lambda: known.manner)

    def read(text: str) -> Any:
        found = [call for call in calls(text, values) if call.name == name]
        return found[0] if len(found) == 1 and found[0].status == "ok" else None

    for text in write(name, arguments):
        call = read(text)
        if call is not None and same(call.arguments, dict(arguments)):
            return text[slice(*call.span)].strip()
        respelled = _respelled(name, arguments, call.arguments if call else {}, read, write)
        if respelled is not None:
            return respelled
    return None


def _respelled(
    name: str,
    arguments: Mapping[str, Any],
    found: Mapping[str, Any],
    read: Callable[[str], Any],
    write: Write,
) -> str | None:
    """A call whose arguments that did not come back are spelled otherwise."""
    lost = {key: f"Qz{i:03d}lost9zQ" for i, key in enumerate(arguments) if not _came_back(key, arguments, found)}
    for text in write(name, {**arguments, **lost}):
        for key, sentinel in lost.items():
            for spelled in _spellings(text, sentinel, arguments[key]):
                call = read(spelled)
                if call is not None and _came_back(key, arguments, call.arguments):
                    text = spelled
                    break
            else:
                return None
        call = read(text)
        if call is not None and same(call.arguments, dict(arguments)):
            return text[slice(*call.span)].strip()
    return None


def _came_back(key: str, arguments: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return key in found and same(found[key], arguments[key])


def _spellings(text: str, sentinel: str, value: Any) -> Iterator[str]:
    """The text with other spellings of a value in place of the sentinel, and of quotes around it."""
    at = text.find(sentinel)
    if at < 0:
        return
    end = at + len(sentinel)
    quoted = text[at - 1 : at] == text[end : end + 1] != "" and text[at - 1] in "'\""
    spelled = json.dumps(value, ensure_ascii=False)
    for form in dict.fromkeys([spelled, repr(value), json.dumps(value)]):
        if quoted:
            yield text[: at - 1] + form + text[end + 1 :]
        yield text[:at] + form + text[end:]


def same(one: Any, other: Any) -> bool:
    """Equality as JSON has it, with types: true is not 1, and 1 is not 1.0.

    Example:
        >>> same({"a": [1]}, {"a": [1]}), same([1], [True]), same(1, 1.0)
        (True, False, False)
    """
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
