"""Messages to text with the model's own Jinja template, contents guarded.

The template is used as it is: never replaced, never patched, never chosen by the model's name. What is
adapted is the *form* in which messages reach it, because templates differ in what they can read: content
as a string or as a list of parts, arguments of a tool call as an object or as a string. Which of them a
template reads is found out by asking it, with a sentinel.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import functools
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

from torchrl_chat.messages import Message, content_text
from torchrl_chat.templates.backends import MARK, tokenizer_of
from torchrl_chat.templates.codec import TokenCodec
from torchrl_chat.templates.kinds import call_of
from torchrl_chat.templates.looks import Looks, looks_of
from torchrl_chat.templates.named import NAMED, named_template

_PROBE = "Qz7probe7zQ"
# Who may spell the template's own control strings (<think>, <tool_call>): special tokens, nobody.
_TRUSTED = frozenset({"assistant", "system", "developer"})


_later: contextvars.ContextVar[datetime.timedelta] = contextvars.ContextVar("_later", default=datetime.timedelta())


@contextlib.contextmanager
def at_another_time() -> Iterator[None]:
    """Within it, templates are told another moment than theirs: year, month, day, weekday and time of day differ."""
    token = _later.set(datetime.timedelta(days=403, hours=13, minutes=17, seconds=23, microseconds=29))
    try:
        yield
    finally:
        _later.reset(token)


_texts: contextvars.ContextVar[dict[Any, str] | None] = contextvars.ContextVar("_texts", default=None)


@contextlib.contextmanager
def remembered_texts() -> Iterator[None]:
    """Within it no conversation is rendered twice: proofs look at the same ones again and again."""
    if _texts.get() is not None:
        yield
        return
    token = _texts.set({})
    try:
        yield
    finally:
        _texts.reset(token)


class ChatTemplateError(ValueError):
    """The tokenizer has no chat template, or the template refuses the messages."""


class Renderer:
    """Renders conversations with one tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer, or a processor: then its own chat template is used, and its tokenizer's
            where it has none. :attr:`tokenizer` is the processor's tokenizer.
        codec: its codec; its special tokens decide which contents need guarding.
        chat_template: as of :class:`~torchrl_chat.templates.ChatTemplate`, like what follows.
        tools: JSON schemas handed to the template with every conversation.
        template_kwargs: further variables for the template.
        guard: whether look-alikes of control tokens in contents are marked as text at all.

    Raises:
        ChatTemplateError: if there is no chat template, or none of that name.
        TypeError: neither a tokenizer nor a processor that has one.
    """

    def __init__(
        self,
        tokenizer: Any,
        codec: TokenCodec,
        chat_template: str | None,
        tools: Sequence[Any] | None,
        template_kwargs: dict[str, Any],
        guard: bool = True,
    ):
        # A processor's apply_chat_template does the same with text, but warns of every variable of the template.
        self.tokenizer = tokenizer_of(tokenizer)
        self.codec = codec
        self.source = _source(tokenizer, chat_template, bool(tools))
        try:
            _compiled(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template is no valid Jinja, line {error.lineno}: {error.message}"
            ) from error
        self.guards = guard
        # What strftime_now tells: a conversation that lasts over midnight keeps its date.
        self.now = datetime.datetime.now()
        self._kwargs: dict[str, Any] = dict(template_kwargs)
        self.tells_time = "strftime_now" in self.source
        self.renderings = 0  # how often a text was asked for: a compiled turn asks for none
        if tools:
            self._kwargs["tools"] = list(tools)
        # Always the source: which of several named templates applies is then decided once, here.
        self._kwargs["chat_template"] = self.source
        # Control strings that the template itself writes, though their tokens are not flagged special.
        self.controls = {s for s in codec.plain_added if len(s) > 2 and not s.isalnum() and s in self.source}

    @property
    def variables(self) -> dict[str, Any]:
        """What conversations are rendered with, but for their tools: the template's source as ``chat_template``, and its variables."""
        return {key: value for key, value in self._kwargs.items() if key != "tools"}

    @property
    def key(self) -> Any:
        """Equal for renderers that write the same texts, but for the time that they tell (proofs look at two times)."""
        variables = sorted((key, repr(value)) for key, value in self._kwargs.items())
        bound = getattr(self.tokenizer.apply_chat_template, "__func__", self.tokenizer.apply_chat_template)
        return bound, tuple(variables), self.guards

    # ------------------------------------------------------------------ text
    def text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The template's text; raises :class:`ChatTemplateError` where the template does."""
        self.renderings += 1
        adapted, known = [self._adapt(message) for message in messages], _texts.get()
        if known is None:
            return self._apply(adapted, add_generation_prompt)
        key = (self, _later.get(), add_generation_prompt, pickle.dumps(adapted))
        if key not in known:
            known[key] = self._apply(adapted, add_generation_prompt)
        return known[key]

    def tried(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """:meth:`text`, or "" where the template refuses the conversation."""
        try:
            return self.text(messages, add_generation_prompt)
        except ChatTemplateError:
            return ""

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if self.tells_time:
            _stop_clock(self.source)
        moment = _moment.set(self.now + _later.get())
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **self._kwargs
            )
        except (jinja2.TemplateError, TypeError, LookupError, ValueError, AttributeError, ArithmeticError) as error:
            roles = [message.get("role") for message in messages]
            raise ChatTemplateError(
                f"the chat template refuses a conversation with the roles {roles}: {error}"
            ) from error
        finally:
            _moment.reset(moment)

    def _as_it_is(self, messages: Sequence[Message]) -> str:
        """The text of messages that are not adapted, or "" where the template refuses them."""
        try:
            return self._apply(messages, False)
        except ChatTemplateError:
            return ""

    # ------------------------------------------------------------------ the form of messages
    @functools.cached_property
    def wants_parts(self) -> bool:
        """Whether the template reads content as a list of parts and nothing else."""
        message = {"role": "user", "content": _PROBE}
        return _PROBE not in self._as_it_is([message]) and _PROBE in self._as_it_is([_in_parts(message)])

    @functools.cached_property
    def reads_parts(self) -> bool:
        """Whether the template reads a list of text parts (rather than printing the list itself)."""
        text = self._as_it_is([_in_parts({"role": "user", "content": _PROBE})])
        return _PROBE in text and "'type'" not in text and '"type"' not in text

    @functools.cached_property
    def wants_argument_strings(self) -> bool:
        """Whether the template reads a tool call's arguments as a JSON string only."""
        return not self._shows_call({"q": _PROBE}) and self._shows_call(json.dumps({"q": _PROBE}))

    @functools.cached_property
    def wants_bare_calls(self) -> bool:
        """Whether the template writes a call only where the message has no content at all, not even an empty one."""
        arguments = json.dumps({"q": _PROBE}) if self.wants_argument_strings else {"q": _PROBE}
        return not self._shows_call(arguments, ("",)) and self._shows_call(arguments, (None,))

    def _shows_call(self, arguments: Any, contents: Sequence[str | None] = ("", None)) -> bool:
        asked = self._adapt_content({"role": "user", "content": "hi"})
        said: Message = {"role": "assistant", "tool_calls": [call_of("lookup", arguments, "abcdefgh0")]}
        answers = [said if text is None else self._adapt_content({**said, "content": text}) for text in contents]
        return any(_PROBE in self._as_it_is([asked, answer]) for answer in answers)

    def _adapt(self, message: Message) -> Message:
        """The message in the form that the template reads.

        ``null`` is no value: OpenAI's wire form writes it for a content that is not there beside calls, and many
        templates read a content without asking. Calls that are not there must not be there as an empty list, which
        templates that ask for the key alone take for a call.
        """
        if "tool_calls" not in message:
            return self._adapt_content(message)
        calls = message["tool_calls"]
        if not calls:
            return self._adapt_content({key: value for key, value in message.items() if key != "tool_calls"})
        if not message.get("content") and self.wants_bare_calls:
            message = {key: value for key, value in message.items() if key != "content"}
        else:
            message = self._adapt_content(message)
        return {**message, "tool_calls": [self._adapt_call(call) for call in calls]}

    def _adapt_content(self, message: Message) -> Message:
        content = message.get("content")
        if content is None:
            message, content = {**message, "content": ""}, ""
        if isinstance(content, str):
            return _in_parts(message) if self.wants_parts else message
        texts = isinstance(content, (list, tuple)) and all(
            isinstance(part, Mapping) and part.get("type", "text") == "text" for part in content
        )
        if texts and not self.reads_parts:
            return {**message, "content": content_text(message)}
        return message

    def _adapt_call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return call
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            if self.wants_argument_strings:
                return call
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return call
        elif self.wants_argument_strings:
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    # ------------------------------------------------------------------ what the template looks for
    @functools.cached_property
    def looks(self) -> Looks:
        """What the template's code looks at in a conversation."""
        return looks_of(_compiled(self.source).environment.parse(self.source))

    # ------------------------------------------------------------------ guarding
    def guard(self, messages: Sequence[Message]) -> tuple[Sequence[Message], bool]:
        """The messages with look-alikes of control tokens marked, and whether there were any.

        Every string of a message is looked at (content, parts, names, tool calls and their arguments), but for
        its role; and it is looked at in the form in which it reaches the template.
        """
        if not self.guards:
            return messages, False
        # Only tool calls and parts have a form that a template may need changed.
        adapted = [
            self._adapt(m) if "tool_calls" in m or not isinstance(m.get("content"), (str, type(None))) else m
            for m in messages
        ]
        # Of a plain message, only the content is looked at: its other string is its role.
        spelled = [
            self._spells(m["content"] if len(m) == 2 and "content" in m else m, m.get("role") in _TRUSTED)
            for m in adapted
        ]
        if not any(spelled):
            return messages, False
        return [
            {**self._marked(message, message["role"] in _TRUSTED), "role": message["role"]} if spells else message
            for message, spells in zip(adapted, spelled, strict=True)
        ], True

    def _spells(self, value: Any, trusted: bool) -> bool:
        if isinstance(value, str):
            return self.codec.spells(value, () if trusted else self.controls)
        if isinstance(value, (list, tuple)):
            # Parts that spell nothing one by one may spell something where a template writes them side by side.
            parts = [*value, _joined(value)]
            return any(self._spells(part, trusted) for part in parts)
        if isinstance(value, (dict, Mapping)):  # the usual type first: an abstract class answers slowly
            return any(
                self._spells(key, trusted) or (key != "role" and self._spells(entry, trusted))
                for key, entry in value.items()
            )
        return False

    def _marked(self, value: Any, trusted: bool) -> Any:
        if isinstance(value, str):
            return self.codec.mark(value, () if trusted else self.controls)
        if isinstance(value, Mapping):
            return {self._marked(key, trusted): self._marked(entry, trusted) for key, entry in value.items()}
        if not isinstance(value, (list, tuple)):
            return value
        marked = [self._marked(entry, trusted) for entry in value]
        if self._spells(_joined(value), trusted):
            marked[1:] = [{**e, "text": MARK + e["text"]} if _is_text(e) else e for e in marked[1:]]
        return marked


_moment: contextvars.ContextVar[datetime.datetime | None] = contextvars.ContextVar("moment", default=None)


def _compiled(source: str) -> Any:
    """The template as transformers compiles and keeps it."""
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template(source)


def _stop_clock(source: str) -> None:
    """Let the template's ``strftime_now`` tell the renderer's moment while one of ours renders.

    transformers reads the clock at every rendering, and hands no function through its template variables.
    """
    names = _compiled(source).globals
    clock = names["strftime_now"]

    def stopped(form: str) -> str:
        moment = _moment.get()
        return clock(form) if moment is None else moment.strftime(form)

    if not getattr(clock, "stops", False):
        stopped.stops = True  # type: ignore[attr-defined]
        names["strftime_now"] = stopped


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _joined(parts: Sequence[Any]) -> str:
    """The texts of a list of parts, side by side."""
    return "".join(part["text"] for part in parts if _is_text(part)) if len(parts) > 1 else ""


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _source(tokenizer: Any, chat_template: str | None, with_tools: bool) -> str:
    """The Jinja source that is used, of one template or of several named ones."""
    own = _own(tokenizer) or _own(tokenizer_of(tokenizer))  # a processor's first
    named = own if isinstance(own, Mapping) else {}
    if chat_template is None and named:
        chat_template = "tool_use" if with_tools and "tool_use" in named else "default"
        if chat_template not in named:
            raise ChatTemplateError(
                f"the tokenizer has the chat templates {sorted(named)} and no default: pass chat_template=NAME."
            )
    if chat_template in named:
        return named[chat_template]
    if chat_template in NAMED:
        return named_template(chat_template, tokenizer_of(tokenizer))
    if chat_template is not None and "{" not in chat_template:
        raise ChatTemplateError(
            f"chat_template is {chat_template!r}: no Jinja source, and the tokenizer has no template of that name "
            f"(it has {sorted(named) or 'no named ones'}); for base models there are {', '.join(map(repr, NAMED))}."
        )
    source = chat_template or own
    if not source:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ChatTemplateError(
            f"tokenizer {name!r} has no chat template: set tokenizer.chat_template, or pass "
            f"chat_template=... with the Jinja source that the model was trained with. For a base model, trained with "
            f"none, there are {' and '.join(f'chat_template={one!r}' for one in NAMED)}."
        )
    return source


def _own(source: Any) -> Any:
    """The chat template of a tokenizer or a processor, or its named ones by their names."""
    own = getattr(source, "chat_template", None)
    if isinstance(own, (list, tuple)):  # the form in tokenizer_config.json
        return {entry["name"]: entry["template"] for entry in own}
    return own
