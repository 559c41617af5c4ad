"""``ChatTemplate``: a tokenizer's chat template as token suffixes, for one conversation or many at once."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from torchrl_chat.messages import Message, as_messages
from torchrl_chat.templates.bridge import BY_TEXT, BridgeError, Close, Derivation, Tail
from torchrl_chat.templates.codec import codec_of, unmarked
from torchrl_chat.templates.compiled import AnswerKind, Compiler, Kind, Roles, Rule
from torchrl_chat.templates.proof import Prover, check_real, twin
from torchrl_chat.templates.rendering import Renderer


class Rendered(NamedTuple):
    """Ids, and the text that they were made from."""

    ids: list[int]
    text: str


class Parsed(NamedTuple):
    """What a policy sampled, read as a message."""

    content: str  # the message's text, without the tokens that end the turn
    text: str  # all of the sampled text, special tokens spelled out
    ended: bool  # whether the turn ended by itself, rather than by a length limit
    stop: int | None  # the token that ended it, if the template knows it as one


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer, as a bridge from one prompt to the next.

    The prompt of the next turn is the prompt of this turn, the very ids that the policy sampled, and a
    suffix: the end of the turn, the new messages, the generation prompt. :meth:`extend` derives that
    suffix from the model's own template, and raises :class:`BridgeError` where it cannot prove it.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat_template: Jinja source to use instead of ``tokenizer.chat_template``.
        tools: JSON schemas of tools, handed to the template with every conversation.
        **template_kwargs: further variables of the template, e.g. ``enable_thinking=False``.

    Raises:
        ChatTemplateError: the tokenizer has no chat template and none is given.

    Example:
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
        **template_kwargs: Any,
    ):
        self.tokenizer = tokenizer
        self.codec = codec_of(tokenizer)
        self.renderer = Renderer(tokenizer, self.codec, chat_template, tools, template_kwargs)
        self._derivation = Derivation(self.renderer, self.codec)
        self._prover = Prover(self._derivation)
        self._compiler = Compiler(self._derivation, self._prover.prove)
        self._closes: dict[tuple[Roles, AnswerKind], Close | BridgeError] = {}
        self._rules: dict[Kind, Rule | BridgeError | None] = {}
        self._proofs: dict[Any, Tail | BridgeError] = {}
        reserved = _RESERVED & template_kwargs.keys()
        if reserved:
            raise ValueError(
                f"template_kwargs has {sorted(reserved)}: these are arguments of other functions, not variables of "
                f"a chat template. Pass chat_template=... for another template."
            )

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which a policy should stop: the tokens that end a turn in this template, and the tokenizer's eos."""
        ids = {self.tokenizer.eos_token_id} - {None}
        for kind in (AnswerKind(), AnswerKind(1, False)):
            close = self._close(_ROLES, kind)
            if isinstance(close, Close) and close.stops:
                # Of the tokens behind a call, the last one ends the turn; the others end the call.
                ids.update(list(close.stops)[-1:] if kind.calls else close.stops)
        return frozenset(ids - {BY_TEXT})

    # ------------------------------------------------------------------ first prompt
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
        unique: dict[Any, int] = {}
        places = []
        pending: list[tuple[str, bool]] = []
        for messages in conversations:
            key = _key(messages)
            place = unique.get(key)
            if place is None:
                place = unique[key] = len(pending)
                guarded, marked = self.renderer.guard(as_messages(messages))
                pending.append((self.renderer.text(guarded, add_generation_prompt), marked))
            places.append(place)
        rendered = self._encode(pending)
        return [rendered[place] for place in places]

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
        closes = list(map(self.close, messages))
        stops = []
        for ids, close, stopped in zip(token_ids, closes, ended, strict=True):
            # A finish reason of "stop" without a stop token among the ids (servers often strip it) changes nothing.
            stops.append(self._stop(close, ids) if stopped is not False and len(ids) else None)
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
        """
        return _raised(self.try_close(list(map(_role, messages)), messages[-1]))

    def try_close(self, roles: Sequence[str], answer: Message | None = None) -> Close | BridgeError:
        """The close of a conversation with these roles, or the reason why there is none.

        Args:
            roles: the roles of the conversation, the policy's last.
            answer: the policy's message, where it is known: one with tool calls may be closed differently.
        """
        kind = AnswerKind.of(answer) if answer else AnswerKind()
        return self._close(Roles.of(tuple(roles)) or _ROLES._replace(policy=roles[-1]), kind)

    def _close(self, roles: Roles, kind: AnswerKind) -> Close | BridgeError:
        key = (roles, kind)
        close = self._closes.get(key)
        if close is None:
            try:
                close = self._prover.close(roles, kind)
            except BridgeError as error:
                close = error
            self._closes[key] = close
        return close

    def follow_batch(
        self,
        messages: Sequence[Sequence[Message]],
        new_messages: Sequence[Sequence[Message]],
        add_generation_prompt: bool = True,
        roles: Sequence[Sequence[str]] | None = None,
        stops: Sequence[int | None] | None = None,
    ) -> list[Rendered]:
        """What follows a closed assistant turn: new messages, then the generation prompt.

        Args:
            messages: conversations that each end with a closed assistant turn.
            new_messages: what is appended to each.
            add_generation_prompt: whether the ids end with what opens an assistant turn.
            roles: the roles of each conversation, where they are at hand.
            stops: the token that ended each turn, ``None`` for one that was cut by a limit.

        Raises:
            BridgeError: for the first conversation whose extension cannot be proved.
        """
        if roles is None:
            roles = [tuple(map(_role, conversation)) for conversation in messages]
        if stops is None:
            stops = [None] * len(messages)
        pending = []
        for conversation, new, said_by, stop in zip(messages, new_messages, roles, stops, strict=True):
            pending.append(self._follow(conversation, new, tuple(said_by), stop, add_generation_prompt))
        encoded = self._derivation.ids_batch(pending)
        return [
            Rendered(ids, unmarked(text) if marked else text)
            for ids, (_, text, marked) in zip(encoded, pending, strict=True)
        ]

    def _follow(
        self,
        messages: Sequence[Message],
        new: Sequence[Message],
        said_by: tuple[str, ...],
        stop: int | None,
        agp: bool,
    ) -> tuple[int | None, str, bool]:
        """Behind which token the text goes on, the text, and whether it carries marks."""
        answer, roles = messages[-1], Roles.of(said_by)
        close = _raised(self.try_close(said_by, answer))
        guarded, marked = self.renderer.guard(new)
        system = messages[0]["content"] if roles is not None and roles.system else ""
        rule = self._rule(roles, answer, new, agp) if roles is not None and isinstance(system, str) else None
        if rule is not None and not any(trigger in m["content"] for trigger in rule.triggers for m in new):
            tail, text = rule.tail, rule.text(system, answer, guarded)
        else:
            self._check_new(new, said_by[-1])
            tail = self._proved(messages, new, agp)
            before, marked_before = self.renderer.guard(messages[:-1])
            marked = marked or marked_before
            text = self._derivation.tail(before, answer, guarded, agp)
            check_real(tail, unmarked(text), new)
        certain = close.suffix(stop).text
        rest = text if stop is None else text[tail.resume.get(stop, 0) :]
        if not rest.startswith(certain):
            raise BridgeError(
                f"the chat template continues this turn with {rest[: len(certain) + 20]!r}, others with {certain!r}."
            )
        if certain:
            stop = None
        return stop, rest[len(certain) :], marked

    def _check_new(self, new: Sequence[Message], policy: str) -> None:
        if not new:
            raise BridgeError("there is no new message to extend the conversation by.")
        if any(message["role"] == policy for message in new):
            raise BridgeError(f"a message of role {policy!r} is sampled by the policy, not appended.")

    def _proved(self, messages: Sequence[Message], new: Sequence[Message], agp: bool) -> Tail:
        """Prove a rendered extension once for conversations of these roles and kinds of message."""
        kinds = tuple((m["role"], *sorted(m.keys() - {"content"})) for m in (*messages, *new))
        key = (kinds, len(new), AnswerKind.of(messages[-1]), agp)
        if key not in self._proofs:
            probes = twin([*messages[:-1], *new])
            before, following = probes[: len(messages) - 1], probes[len(messages) - 1 :]
            try:
                self._proofs[key] = self._prover.prove(before, messages[-1], following, agp)
            except BridgeError as error:
                self._proofs[key] = error
        return _raised(self._proofs[key])

    def _rule(self, roles: Roles, answer: Message, new: Sequence[Message], agp: bool) -> Rule | None:
        """The compiled tail of this kind of extension, if there is one."""
        kind = Kind.of(roles, answer, new, agp)
        if kind is None:
            return None
        if kind not in self._rules:
            try:
                self._check_new(new, roles.policy)
                self._rules[kind] = self._compiler.compile(kind)
            except BridgeError as error:
                self._rules[kind] = error
        return _raised(self._rules[kind])

    # ------------------------------------------------------------------ ids <-> text
    def _encode(self, items: Sequence[tuple[str, bool]]) -> list[Rendered]:
        """Ids of first prompts, those with marked look-alikes guarded."""
        plain = iter(self.codec.encode([text for text, marked in items if not marked]))
        return [
            Rendered(self.codec.encode_guarded([text])[0], unmarked(text))
            if marked
            else Rendered(next(plain), text)
            for text, marked in items
        ]

    def parse_batch(
        self,
        sampled: Sequence[Sequence[int]],
        closes: Sequence[Close | BridgeError],
        finish_reasons: Sequence[str | None] | None = None,
    ) -> list[Parsed]:
        """Read what a policy sampled: the message's content, the text, and whether the turn ended.

        Args:
            sampled: for each row, the ids that the policy sampled.
            closes: for each row, how its turn is closed (see :meth:`try_close`).
            finish_reasons: why the policy stopped, as servers report it (``"stop"``, ``"length"``); where it is
                ``None`` the last id tells.
        """
        reasons = finish_reasons or [None] * len(sampled)
        eos = self.tokenizer.eos_token_id
        parsed = []
        for ids, text, close, reason in zip(sampled, self.codec.decode(sampled), closes, reasons, strict=True):
            content, last = text, ids[-1]
            if isinstance(close, BridgeError):
                stop, body, lead = None, "", ""
            else:
                stop, body, lead = close.stop(last, text), close.body, close.lead
            ended = reason != "length" if reason is not None else stop is not None or last == eos
            if ended and (stop is not None or last == eos):
                end = "" if stop == BY_TEXT else self.codec.token_text(last)
                content = content.removesuffix(end).removesuffix(body)
            parsed.append(Parsed(content.removeprefix(lead), text, ended, stop if ended else None))
        return parsed


_role = itemgetter("role")
_ROLES = Roles(None, "user", None, "assistant")
_PLAIN_KEYS = {"role", "content"}
_RESERVED = {
    "add_generation_prompt",
    "chat_template_name",
    "continue_final_message",
    "conversation",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "truncation",
}


def _raised(value: Any) -> Any:
    if isinstance(value, BridgeError):
        raise value
    return value


def _key(messages: Sequence[Message]) -> Any:
    """A key under which equal conversations of plain messages meet; a fresh object for any other."""
    if any(message.keys() != _PLAIN_KEYS for message in messages):
        return object()
    key = tuple((message["role"], message["content"]) for message in messages)
    try:
        hash(key)
    except TypeError:  # a content of parts
        return object()
    return key
