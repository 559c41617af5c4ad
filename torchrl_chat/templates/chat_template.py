"""``ChatTemplate``: a tokenizer's chat template as token suffixes, for one conversation or many at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torchrl_chat.messages import Message, MessageError, as_messages
from torchrl_chat.schema_references import tool_written_out
from torchrl_chat.templates.backends import tokenizer_of, unmarked
from torchrl_chat.templates.bridge import BY_TEXT, Bridge, BridgeError, Close
from torchrl_chat.templates.capabilities import CAPABILITIES
from torchrl_chat.templates.codec import codec_of
from torchrl_chat.templates.following import Follower, raised
from torchrl_chat.templates.kinds import AnswerKind, Course, Roles, calling
from torchrl_chat.templates.parsing import AnswerParser, Parsed, ParsedCall, Reader, RenderersParser
from torchrl_chat.templates.rendering import ChatTemplateError, Renderer
from torchrl_chat.templates.rewriting import Rewriter, Rewritten, Span
from torchrl_chat.templates.values import PROBE_NAME, Values, written_call


class Rendered(NamedTuple):
    """Ids, and the text that they were made from."""

    ids: list[int]
    text: str


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer, as a bridge from one prompt to the next.

    The prompt of the next turn is the prompt of this turn, the very ids that the policy sampled, and a
    suffix: the end of the turn, the new messages, the generation prompt. :meth:`extend` derives that
    suffix from the model's own template, and raises :class:`BridgeError` where it cannot prove it.

    Args:
        tokenizer: a Hugging Face tokenizer, fast or slow; or a processor, for conversations of text: its tokenizer
            makes the ids, its chat template (or else its tokenizer's) the text.
        chat_template: Jinja source to use instead of ``tokenizer.chat_template``, or the name of one of several
            templates that it has. Of those, ``tool_use`` is used where there are ``tools``, else ``default``. For
            base models, whose tokenizers bring none, there are ``"plain"`` and ``"r1-zero"``
            (:data:`~torchrl_chat.templates.named.NAMED`).
        tools: JSON schemas of tools, handed to the template with every conversation, local references (``$ref``) written
            out.
        parse_reasoning: whether reasoning that the template's own delimiters set off (``<think>``) becomes
            ``reasoning_content`` of the parsed message, instead of a part of its content.
        parse_tool_calls: whether calls in the template's own format become ``tool_calls`` of the parsed
            message. ``None``: where ``tools`` are given.
        renderer: the name of a renderer of the optional package ``renderers`` (``"qwen3"``) that is to read the
            answers instead. The bridge does not depend on it.
        require: kinds of turn (see :attr:`capabilities`) that must be proved: what is not raises here, instead of
            when it is first used.
        guard: whether control tokens spelled in the messages' contents stay text. Without it, a user or a
            tool that types ``<|im_end|>`` ends the turn.
        **template_kwargs: further variables of the template, e.g. ``enable_thinking=False``.

    Raises:
        ChatTemplateError: the tokenizer has no chat template and none is given, or none of the name given.
        TypeError: neither a tokenizer nor a processor, or a tokenizer that parses no special tokens.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> template = ChatTemplate(tokenizer)
        >>> messages = [{"role": "user", "content": "2 + 2?"}]
        >>> prompt = template.render(messages)
        >>> sampled = [19, 151645]  # "4", "<|im_end|>"
        >>> messages.append({"role": "assistant", "content": "4"})
        >>> more = [{"role": "user", "content": "And 3 + 3?"}]
        >>> extended = template.extend(prompt + sampled, messages, more)
        >>> extended[: len(prompt) + 2] == prompt + sampled
        True
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        parse_reasoning: bool = True,
        parse_tool_calls: bool | None = None,
        renderer: str | None = None,
        guard: bool = True,
        require: Sequence[str] = (),
        **template_kwargs: Any,
    ):
        self.tokenizer = tokenizer_of(tokenizer)
        self.codec = codec_of(self.tokenizer)
        tools = [tool_written_out(tool) for tool in tools] if tools else tools
        self._tools = tuple(tools or ())
        self.renderer = Renderer(tokenizer, self.codec, chat_template, tools, template_kwargs, guard=guard)
        self._bridge = Bridge(self.renderer)
        self._follower = Follower(self._bridge)
        self.parser = AnswerParser(
            self.renderer.source if parse_reasoning or parse_tool_calls or tools else "",
            self.codec.controls,
            schema=getattr(self.tokenizer, "response_template", None),
            parse_calls=bool(tools) if parse_tool_calls is None else parse_tool_calls,
            parse_reasoning=parse_reasoning,
            tools=tools,
            write=self._probe_call,
        )
        self._rewriter = Rewriter(self._bridge, self.parser, self.close)
        peer = RenderersParser(tokenizer, self.codec, renderer, tools) if renderer else None
        self._peer = peer is not None
        self._reader = Reader(self.renderer, self.parser, peer, self._follower.close)
        reserved = _RESERVED & template_kwargs.keys()
        if reserved:
            raise ValueError(
                f"template_kwargs has {sorted(reserved)}: these are arguments of other functions, not variables of "
                f"a chat template. Pass chat_template=... for another template."
            )
        for capability in require:
            if (reason := self.refusal(capability)) is not None:
                raise BridgeError(f"this chat template cannot be bridged for {capability!r}: {reason}")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which a policy should stop: the tokens that end a turn in this template, and the tokenizer's eos."""
        ids = {self.tokenizer.eos_token_id} - {None}
        close, of_call = (self._follower.close(_ROLES, kind) for kind in (AnswerKind(), _A_CALL))
        if isinstance(close, Close):
            ids.update(close.main)
        if isinstance(of_call, Close):  # a call may end with a token of its own
            ids.update(set(of_call.stops) & ids or of_call.main)
        return frozenset(ids - {BY_TEXT})

    # ------------------------------------------------------------------ first prompt
    def unwritten_tools(self) -> list[str]:
        """The names of the tools it was given that it does not write into a first prompt: a model is told nothing of them.

        None where the template refuses such a prompt, with a system message and without: then nothing is known.

        Example:
            >>> from torchrl_chat import Toolbox
            >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
            >>> def add(a: int, b: int) -> int:
            ...     return a + b
            >>> tools = Toolbox([add]).schemas  # the tiny tokenizer's template knows no tools
            >>> ChatTemplate(tiny_tokenizer(TEXT_ALPHABET), tools=tools).unwritten_tools()
            ['add']
        """
        if not self._tools:
            return []
        names = [schema.get("function", schema).get("name", "") for schema in self._tools]
        asked = {"role": "user", "content": "?"}
        system = {"role": "system", "content": "?"}  # which some templates ask for
        told = self.renderer.tried([asked], True) or self.renderer.tried([system, asked], True)
        return [name for name in names if name not in told] if told else []

    @functools.cached_property
    def tools_warning(self) -> str:
        """What goes wrong with tools under this template, and what to do; "" where it writes all that it was given.

        Example:
            >>> from torchrl_chat import Toolbox
            >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
            >>> def add(a: int, b: int) -> int:
            ...     return a + b
            >>> tools = Toolbox([add]).schemas
            >>> ChatTemplate(tiny_tokenizer(TEXT_ALPHABET, tools=True), tools=tools).tools_warning
            ''
        """
        if not (untold := self.unwritten_tools()):
            return ""
        said = f"The chat template does not write the tools that it is given ({', '.join(untold)}): the model is told nothing of them"
        if self._peer or self.parser.reads_calls or not self.parser.parse_calls:
            return f"{said}. Say it in the system prompt, or take a template that writes tools (its option chat_template=...)."
        return f"{said}, and no answer is read as a call. Take a template that writes tools (its option chat_template=...)."

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a first prompt.

        Args:
            messages: the conversation so far.
            add_generation_prompt: whether the ids end with what opens an assistant turn.

        Raises:
            MessageError: a message is malformed.
            ChatTemplateError: the template refuses the conversation.
        """
        return self.render_batch([messages], add_generation_prompt)[0].ids

    def render_batch(
        self, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool = True
    ) -> list[Rendered]:
        """First prompts of many conversations, with one call into the tokenizer.

        Equal conversations (the groups of GRPO) are rendered and tokenized once.
        """
        keys, pending = [], dict[Any, tuple[str, bool]]()
        for messages in conversations:
            if not isinstance(messages, (list, tuple)) or not all(isinstance(m, Mapping) for m in messages):
                messages = as_messages(messages)
            keys.append(_key(messages))
            if keys[-1] not in pending:
                guarded, marked = self.renderer.guard(as_messages(messages))
                pending[keys[-1]] = self.renderer.text(guarded, add_generation_prompt), marked
        plain = iter(self.codec.encode([text for text, marked in pending.values() if not marked]))
        rendered = {
            key: Rendered(self.codec.encode_guarded([text])[0], unmarked(text))
            if marked
            else Rendered(next(plain), text)
            for key, (text, marked) in pending.items()
        }
        return [rendered[key] for key in keys]

    # ------------------------------------------------------------------ extension
    def extend(
        self,
        token_ids: Sequence[int],
        messages: Sequence[Message],
        new_messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        ended: bool | None = None,
    ) -> list[int]:
        """The next prompt: ``token_ids``, id for id, then the end of the turn and the new messages.

        Args:
            token_ids: a prompt plus what was sampled after it.
            messages: the conversation; its last message is the one that was sampled.
            new_messages: one or more messages that follow, none of them the policy's.
            add_generation_prompt: whether the result ends with what opens an assistant turn.
            ended: whether the policy ended the turn itself (its finish reason was "stop", not
                "length"); inferred from the last id if ``None``.

        Raises:
            BridgeError: the extension cannot be proved exact; the text says why.
            MessageError: a message is malformed.
        """
        return self.extend_batch([token_ids], [messages], [new_messages], add_generation_prompt, [ended])[0]

    def extend_batch(
        self,
        token_ids: Sequence[Sequence[int]],
        messages: Sequence[Sequence[Message]],
        new_messages: Sequence[Sequence[Message]],
        add_generation_prompt: bool = True,
        ended: Sequence[bool | None] | None = None,
    ) -> list[list[int]]:
        """:meth:`extend` for many conversations, with one call into the tokenizer."""
        if ended is None:
            ended = [None] * len(token_ids)
        new_messages = [
            as_messages(new, where=f"new_messages of row {i}") if new else [] for i, new in enumerate(new_messages)
        ]
        closes = list(map(self.close, messages))
        # A finish reason of "stop" without a stop token among the ids (servers often strip it) changes nothing.
        stops = [
            self._stop(close, ids) if stopped is not False and len(ids) else None
            for ids, close, stopped in zip(token_ids, closes, ended, strict=True)
        ]
        follows = self.follow_batch(messages, new_messages, add_generation_prompt, stops=stops)
        return [
            [*ids, *close.suffix(stop).ids, *follow.ids]
            for ids, close, stop, follow in zip(token_ids, closes, stops, follows, strict=True)
        ]

    def _stop(self, close: Close, ids: Sequence[int]) -> int | None:
        """The token that ended a turn, inferred from its last ids."""
        text = self.codec.decode([ids[-4 - len(close.body) :]])[0] if close.by_text else ""
        return close.stop(ids[-1], text)

    def close(self, messages: Sequence[Message]) -> Close:
        """How the template ends the assistant turn that ``messages`` ends with.

        Raises:
            BridgeError: the template's close cannot be derived.
            MessageError: there is no message.
        """
        if not messages:
            raise MessageError("there is no conversation: its last message is the answer that the turn holds.")
        return raised(self._follower.close(_course(messages).shape, AnswerKind.of(messages[-1])))

    def close_of(self, roles: Roles, kind: AnswerKind) -> Close | BridgeError:
        """How a turn is closed in conversations of these roles, with this kind of answer; or why that is not known."""
        return self._follower.close(roles, kind)

    def opening_after(self, messages: Sequence[Message], course: Course) -> str:
        """What opens a turn of the policy right behind one of its own, the end of that turn left out.

        Raises:
            BridgeError: the template refuses it, or writes the answer otherwise when another follows.
        """
        before, answer = messages[:-1], messages[-1]
        ended = self._bridge.tail(before, answer, [], False)
        opened = self._bridge.tail(before, answer, [], True)
        if not opened.startswith(ended) or opened == ended:
            raise BridgeError(
                f"the chat template opens no turn behind an answer: it ends with {ended[-60:]!r} either way."
                if opened == ended
                else f"the chat template ends an answer with {opened[:60]!r} where another follows, else with {ended[:60]!r}."
            )
        self._bridge.check_answer(before, answer, [], True, opened)
        return opened[len(ended) :]

    def suffix_ids(self, stop: int | None, text: str) -> list[int]:
        """Ids of a text as it continues a turn that ended with ``stop``, or whose end stands there already (``None``)."""
        return self._bridge.ids(stop, text)

    def follow_batch(
        self,
        messages: Sequence[Sequence[Message]],
        new_messages: Sequence[Sequence[Message]],
        add_generation_prompt: bool = True,
        courses: Sequence[Course] | None = None,
        stops: Sequence[int | None] | None = None,
        errors: dict[int, ChatTemplateError] | None = None,
    ) -> list[Rendered]:
        """What follows a closed assistant turn: new messages, then the generation prompt.

        Args:
            messages: conversations that each end with a closed assistant turn.
            new_messages: what is appended to each.
            add_generation_prompt: whether the ids end with what opens an assistant turn.
            courses: the course of each conversation, where it is at hand.
            stops: the token that ended each turn, ``None`` for one that was cut by a limit.
            errors: takes the errors of the conversations whose extension cannot be proved, by their place; nothing
                follows those, and nothing is raised.

        Raises:
            BridgeError: without ``errors``: for the first conversation whose extension cannot be proved.
        """
        if courses is None:
            courses = list(map(_course, messages))
        if stops is None:
            stops = [None] * len(messages)
        pending = []
        for i, (conversation, new, course, stop) in enumerate(
            zip(messages, new_messages, courses, stops, strict=True)
        ):
            try:
                pending.append(self._follower.follow(conversation, new, course, stop, add_generation_prompt))
            except ChatTemplateError as error:
                if errors is None:
                    raise
                errors[i] = error
                pending.append((None, "", False))
        encoded = self._bridge.ids_batch(pending)
        return [
            Rendered(ids, unmarked(text) if marked else text)
            for ids, (_, text, marked) in zip(encoded, pending, strict=True)
        ]

    def rewrite(
        self,
        token_ids: Sequence[int],
        spans: Sequence[Span],
        messages: Sequence[Message],
        new_messages: Sequence[Message],
        add_generation_prompt: bool = True,
    ) -> Rewritten | None:
        """The past as the template writes it once ``new_messages`` follow: what ``history_policy="template"`` shows.

        Args:
            token_ids: the sequence so far.
            spans: where the sampled answers stand in it, in order.
            messages: the conversation, the last of them sampled.
            new_messages: what follows.
            add_generation_prompt: whether what opens an assistant turn follows them.

        Returns:
            The new sequence up to the end of the last answer, with the ids that were sampled wherever the
            template keeps them; ``None`` if the past stays as it is.

        Raises:
            BridgeError: the template changes the words of an earlier answer, or drops one.
        """
        return self._rewriter.rewrite(token_ids, spans, messages, new_messages, add_generation_prompt)

    # ------------------------------------------------------------------ answers
    def parse_batch(
        self,
        sampled: Sequence[Sequence[int]],
        courses: Sequence[Course] | None = None,
        finish_reasons: Sequence[str | None] | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> list[Parsed]:
        """Read what a policy sampled: the message, the text, and how the turn ended.

        Args:
            sampled: for each row, the ids that the policy sampled.
            courses: for each row, the course of its conversation up to the prompt. Without them, that of a
                user's question.
            finish_reasons: why the policy stopped, as servers report it (``"stop"``, ``"length"``); where it is
                ``None`` the last id tells.
            prompts: for each row, its prompt, or the last ids of it: they tell whether the prompt has opened the
                reasoning already. Without them the template's usual generation prompt does.

        Raises:
            ValueError: nothing was sampled in a row.
        """
        for i, ids in enumerate(sampled):
            if not len(ids):
                raise ValueError(f"sampled[{i}] is empty: a turn has at least one id, if only its stop token.")
        return self._reader.read(sampled, courses, finish_reasons, prompts)

    def _probe_call(self, arguments: dict[str, Any]) -> str:
        """A conversation that ends with a call of these arguments, as the template writes it; "" where it refuses."""
        question: Message = {"role": "user", "content": "?"}
        return self.renderer.tried([question, calling(PROBE_NAME, arguments, ["call00000"])], False)

    def call_text(self, name: str, arguments: Mapping[str, Any]) -> str | None:
        """A tool call as the model is to write it: as the template writes it, and as :meth:`parse_batch` reads it back.

        Where the template's own writing of a value cannot be read back (it leaves it out, say), it is spelled as it can.

        Args:
            name: the tool's name.
            arguments: its arguments. Of a tool that the template was not given, those that a format writes without
                any type count as read back if they are spelled so: whoever knows the tool's schema reads them further.

        Returns:
            the text, without the turn around it; ``None`` where the template has no way to write one that is read here.

        Example:
            >>> from torchrl_chat import Toolbox
            >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
            >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
            >>> ChatTemplate(tokenizer).call_text("add", {"a": 1}) is None  # Qwen3's writes '<tool_call>...'
            True
        """

        def calls(text: str, values: Values) -> Sequence[ParsedCall]:
            return self.parser.parse(text, values=values).calls

        return written_call(name, arguments, self.parser.values, calls, self._turn_of_call)

    def _turn_of_call(self, name: str, arguments: Mapping[str, Any]) -> Iterator[str]:
        """What the policy writes for a turn that is one call, in each way in which it may be cut out of the template's text."""
        question: Message = {"role": "user", "content": "?"}
        try:
            before, opened = (self.renderer.text([question], generation) for generation in (False, True))
            written = self.renderer.text([question, calling(name, arguments, ["call00000"])], False)
        except ChatTemplateError:
            return
        for start in (opened, before):
            if written.startswith(start):
                ids = self.codec.encode([written[len(start) :]])[0]
                end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
                yield self.codec.decode([ids[:end]])[0]

    # ------------------------------------------------------------------ what is proved
    @property
    def capabilities(self) -> dict[str, str | None]:
        """For each kind of turn, ``None`` if it is proved, else the reason why it is refused.

        The names are those of :data:`~torchrl_chat.templates.capabilities.CAPABILITIES`. Each is proved when it
        is first asked for, and kept.
        """
        return {name: self.refusal(name) for name in CAPABILITIES}

    def refusal(self, capability: str) -> str | None:
        """Why a kind of turn is refused; ``None`` if it is proved.

        Raises:
            ValueError: there is no such capability.
        """
        if capability not in CAPABILITIES:
            raise ValueError(f"there is no capability {capability!r}: expected one of {', '.join(CAPABILITIES)}.")
        kept, probe = self._follower.proofs.capabilities, CAPABILITIES[capability]
        if capability not in kept:
            try:
                close = self.close(probe.messages)
                stop = close.main[0] if probe.stopped and close.main else None
                self.follow_batch([probe.messages], [probe.new], stops=[stop])
                kept[capability] = None
            except BridgeError as error:
                kept[capability] = str(error)
        return kept[capability]


_A_CALL = AnswerKind(1, False)
_ROLES = Roles(None, "user", None, "assistant")
_PLAIN_KEYS = {"role", "content"}
_RESERVED = (
    {"conversation", "chat_template_name", "add_generation_prompt", "continue_final_message"}
    | {"tokenize", "padding", "truncation"}
    | {"return_assistant_tokens_mask", "return_dict", "return_tensors"}
)


def _course(messages: Sequence[Message]) -> Course:
    """The course of a conversation that ends with an answer."""
    return Course.of(messages, messages[-1]["role"])


def _key(messages: Sequence[Message]) -> Any:
    """A key under which equal conversations of plain messages meet; a fresh object for any other."""
    if any(message.keys() != _PLAIN_KEYS or not isinstance(message["content"], str) for message in messages):
        return object()
    return tuple((message["role"], message["content"]) for message in messages)
