"""``Tool``: a plain Python function as a tool that a model can call.

The function's type hints and docstring are all that there is to write: they become the JSON schema that the chat
template shows to the model, and the check that a call passes before the function sees it.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from torchrl_chat.schema_references import written_out
from torchrl_chat.tools.arguments import described, fit
from torchrl_chat.tools.shapes import Shape, shape_of

_F = TypeVar("_F", bound=Callable[..., Any])
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_.-]{0,63}")
_OPTIONS = "__torchrl_chat_tool__"


class ToolBase:
    """What a :class:`~torchrl_chat.tools.toolbox.Toolbox` asks of a tool.

    Attributes:
        name: what the model calls it.
        description: what the model is told about it.
        parameters: the JSON schema of its arguments, an object.
        deadline: seconds that a call may take; ``None`` for the toolbox's.
        per_conversation: whether it keeps state for each conversation. Its calls get the conversation's key, and those
            of one conversation are run one after another, in order.
        is_async: whether :meth:`call` returns a coroutine.
        keeps_deadline: whether the tool itself ends a call at its deadline.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    deadline: float | None = None
    per_conversation: bool = False
    is_async: bool = False
    keeps_deadline: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The tool in the form that chat templates and OpenAI-style APIs take: ``template_kwargs={"tools": [schema]}``."""
        parameters = written_out(self.parameters)  # templates know no $ref
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    @property
    def signature(self) -> str:
        """The tool's arguments in one line, for error messages.

        Example:
            >>> def add(a: int, b: int = 0) -> int: ...
            >>> Tool(add).signature
            'add(a: integer, b?: integer)'
        """
        parameters = written_out(self.parameters)
        required = parameters.get("required") or ()
        parts = [
            f"{key}{'' if key in required else '?'}: {described(schema)}"
            for key, schema in (parameters.get("properties") or {}).items()
        ]
        return f"{self.name}({', '.join(parts)})"

    def fit(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the tool takes them: checked against the schema, and mended (see :func:`.arguments.fit`).

        Raises:
            ArgumentsError: they do not fit.
        """
        return fit(dict(arguments), written_out(self.parameters))

    def call(self, arguments: dict[str, Any], conversation: Hashable = None, deadline: float | None = None) -> Any:
        """Run the tool.

        Args:
            arguments: what :meth:`fit` returned.
            conversation: the key of the conversation.
            deadline: seconds; only read by tools that keep their deadline themselves.

        Returns:
            its result, or a coroutine of it where ``is_async``.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Start what is needed, or raise what stands in the way; called before the first call, and at every reset."""

    def end(self, conversation: Hashable) -> None:
        """Let go of what is kept for a conversation, which is over."""

    def close(self) -> None:
        """Let go of everything; it is opened anew if needed."""


class Tool(ToolBase):
    """A plain function, or a coroutine function, as a tool.

    The description is the docstring's text above its first section, those of the arguments stand under ``Args:``
    (Google style) or in ``Annotated[type, "description"]``. For the types see :func:`.shapes.shape_of`; a parameter
    without a hint takes any JSON value. Arguments are converted to the hinted types before the function is called:
    enums, tuples, sets and dataclasses arrive as such.

    Args:
        function: what runs. If ``per_conversation``, it has a parameter ``conversation``, which the model does not see
            and which gets the conversation's key.
        name: instead of the function's name; letters, digits, ``_``, ``-`` and ``.``, at most 64.
        description: instead of the docstring's.
        deadline: seconds that a call may take; ``None`` for the toolbox's.
        per_conversation: see :class:`ToolBase`.
        end: called with the key of a conversation that is over.

    Raises:
        TypeError: a hint cannot be told to a model, or the signature cannot be called by name.
        ValueError: a bad name, or a docstring that describes an argument that there is none of.

    Example:
        >>> import typing
        >>> def weather(city: str, unit: typing.Literal["C", "F"] = "C") -> str:
        ...     '''The weather in a city.
        ...
        ...     Args:
        ...         city: The city, in English.
        ...     '''
        ...     return f"18 {unit} in {city}"
        >>> tool = Tool(weather)
        >>> tool.schema["function"]["parameters"]["properties"]["city"]
        {'type': 'string', 'description': 'The city, in English.'}
        >>> tool.call(tool.fit({"city": "Paris"}))
        '18 C in Paris'
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        deadline: float | None = None,
        per_conversation: bool | None = None,
        end: Callable[[Hashable], None] | None = None,
    ):
        self._given: dict[str, Any] = {"name": name, "description": description, "deadline": deadline}
        self._given |= {"per_conversation": per_conversation, "end": end}
        options = {**getattr(function, _OPTIONS, {}), **{k: v for k, v in self._given.items() if v is not None}}
        self.function = function
        self.name = str(options.get("name") or getattr(function, "__name__", type(function).__name__))
        if not is_name(self.name):
            raise ValueError(
                f"a tool cannot be called {self.name!r}: give a name of letters, digits, '_', '-' and '.', at most 64."
            )
        self.deadline = checked_deadline(options.get("deadline"), f"the tool {self.name}")
        self.per_conversation = options.get("per_conversation", False)
        self._end = options.get("end")
        called = function if inspect.isroutine(function) or isinstance(function, functools.partial) else None
        self.is_async = inspect.iscoroutinefunction(called or type(function).__call__)
        # Of an object that can be called, the docstring is its method's, or else its class's.
        doc = (
            inspect.getdoc(called)
            if called
            else inspect.getdoc(type(function).__call__) or inspect.getdoc(type(function))
        )
        text, words = read_docstring(doc)
        self.description = str(options.get("description", text))
        self._read_signature(words)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Tool, **self._given), (self.function,)

    def __repr__(self) -> str:
        return f"Tool({self.signature})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself."""
        return self.function(*args, **kwargs)

    def fit(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function takes them: checked, mended, converted, with defaults left to the function."""
        fitted = fit(dict(arguments), self.parameters, closed=not self._open)
        return {
            key: self._shapes[key].make(value, key) if key in self._shapes else value
            for key, value in fitted.items()
        }

    def call(self, arguments: dict[str, Any], conversation: Hashable = None, deadline: float | None = None) -> Any:
        """Call the function with fitted arguments."""
        arguments = dict(arguments)
        if self.per_conversation:
            arguments["conversation"] = conversation
        first = []
        for name, default in self._positional.items():
            if name not in arguments and default is inspect.Parameter.empty:
                break  # the function's own error says which is missing
            first.append(arguments.pop(name, default))
        return self.function(*first, **arguments)

    def end(self, conversation: Hashable) -> None:
        """Call the ``end`` function."""
        if self._end is not None:
            self._end(conversation)

    def _read_signature(self, words: Mapping[str, str]) -> None:
        """What the hints, the defaults and the docstring's words say of the arguments."""
        try:
            signature = inspect.signature(self.function).parameters
        except ValueError:
            raise TypeError(f"{self.name} has no signature that Python can read: wrap it in a function.") from None
        hints = _hints(self.function, self.name)
        self._shapes: dict[str, Shape] = {}
        self._positional: dict[str, Any] = {}
        self._open = False
        properties, required = {}, []
        for key, parameter in signature.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                raise TypeError(f"{self.name} takes *{key}, which a call by name cannot fill: take a list.")
            if parameter.kind is parameter.VAR_KEYWORD:
                self._open = True
                continue
            if parameter.kind is parameter.POSITIONAL_ONLY:
                self._positional[key] = parameter.default
            if key == "conversation" and self.per_conversation:
                continue
            shape = shape_of(hints.get(key, parameter.annotation), f"the argument {key!r} of {self.name}")
            self._shapes[key] = shape
            properties[key] = dict(shape.schema)
            if key in words:
                properties[key]["description"] = words[key]
            if parameter.default is parameter.empty:
                required.append(key)
            elif type(parameter.default) in (str, int, float, bool):
                properties[key]["default"] = parameter.default
        if self.per_conversation and "conversation" not in signature and not self._open:
            raise TypeError(
                f"{self.name} is per_conversation, but has no parameter 'conversation', which gets the conversation's key."
            )
        for key in words:
            if key.lstrip("*") not in signature:
                raise ValueError(
                    f"the docstring of {self.name} describes {key!r}, which is no argument of it: it has "
                    f"{', '.join(signature) or 'none'}."
                )
        self.parameters = {"type": "object", "properties": properties, "required": required}


def tool(**options: Any) -> Callable[[_F], _F]:
    """Say how a function is to be used as a tool; the function stays the function that it is.

    Args:
        **options: ``name``, ``description``, ``deadline``, ``per_conversation`` and ``end``: see :class:`Tool`.

    Example:
        >>> @tool(deadline=5.0)
        ... def double(x: int) -> int:
        ...     return 2 * x
        >>> double(2), Tool(double).deadline
        (4, 5.0)
    """
    inspect.signature(Tool).bind(None, **options)  # a name that there is none of is an error here

    def mark(function: _F) -> _F:
        setattr(function, _OPTIONS, {key: value for key, value in options.items() if value is not None})
        return function

    return mark


def checked_deadline(seconds: Any, what: str) -> float | None:
    """The deadline, if it is one.

    Raises:
        ValueError: it is not a positive number.
    """
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
        raise ValueError(f"the deadline of {what} is {seconds!r}: expected a positive number of seconds.")
    return float(seconds)


def is_name(name: str) -> bool:
    """Whether a tool could have this name."""
    return _NAME.fullmatch(name) is not None


def header_name(name: str) -> str:
    """The name in the header of a tool message: what a model made up that is no name is not written there."""
    return name if is_name(name) else "unknown"


def _hints(function: Callable[..., Any], name: str) -> dict[str, Any]:
    while isinstance(function, functools.partial):
        function = function.func
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise TypeError(f"a type hint of {name} cannot be read: {error}.") from None


_SECTION = re.compile(
    r"(Args|Arguments|Parameters|Params|Returns?|Yields?|Raises|Examples?|Notes?|Attributes|References|See Also|"
    r"Warnings?|Todo|Side Effects):[ \t]*"
)
_ARGUMENT = re.compile(r"(\*{0,2}\w+)[ \t]*(?:\([^()\n]*(?:\([^()\n]*\)[^()\n]*)*\))?[ \t]*:[ \t]*(.*)")


def read_docstring(doc: str | None) -> tuple[str, dict[str, str]]:
    """The text above the first section of a Google-style docstring, and the descriptions of the arguments.

    Example:
        >>> read_docstring('''Adds.
        ...
        ... Args:
        ...     a: The first,
        ...         an integer.
        ...     b (int): The second.
        ... ''')
        ('Adds.', {'a': 'The first, an integer.', 'b': 'The second.'})
    """
    text: list[str] = []
    sections: dict[str, list[str]] = {}
    body = text
    for line in inspect.cleandoc(doc or "").split("\n"):
        header = _SECTION.fullmatch(line)
        if header:
            body = sections.setdefault(header[1], [])
        elif body is not text and line and not line[0].isspace():
            body = sections.setdefault("", [])  # a paragraph behind a section: no part of it
        else:
            body.append(line)
    lines = [line for key in ("Args", "Arguments", "Parameters", "Params") for line in sections.get(key, ())]
    arguments: dict[str, str] = {}
    last = None
    for line in textwrap.dedent("\n".join(lines)).split("\n"):
        entry = _ARGUMENT.match(line)
        if entry:
            last = entry[1]
            arguments[last] = entry[2].strip()
        elif last is not None and line.strip():
            arguments[last] = f"{arguments[last]} {line.strip()}".strip()
    return "\n".join(text).strip(), arguments
