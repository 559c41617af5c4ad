"""``ChatTemplate``: a tokenizer's chat template as token suffixes, for one conversation or many at once."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from torchrl_chat.messages import Message, as_messages
from torchrl_chat.templates.bridge import BridgeError, Close, Follow, Prover, Shape
from torchrl_chat.templates.codec import MARK, codec_of
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
        self._prover = Prover(self.renderer, self.codec)
        self._closes: dict[Shape, Close | BridgeError] = {}
        self._follows: dict[tuple[Shape, str, bool], Follow | BridgeError | None] = {}
        self._rendered: dict[Any, BridgeError | None] = {}
        reserved = _RESERVED & template_kwargs.keys()
        if reserved:
            raise ValueError(
                f"template_kwargs has {sorted(reserved)}: these are arguments of other functions, not variables of "
                f"a chat template. Pass chat_template=... for another template."
            )

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which a policy should stop: the template's end-of-turn token, and the tokenizer's eos."""
        ids = {self.tokenizer.eos_token_id} - {None}
        close = self.try_close(["user", "assistant"])
        if isinstance(close, Close):
            ids.add(close.stop_id)
        return frozenset(ids)

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
        follows = self.follow_batch(messages, new_messages, add_generation_prompt)
        results = []
        for ids, conversation, stopped, follow in zip(token_ids, messages, ended, follows, strict=True):
            close = self.close(conversation)
            if stopped is None or (stopped and ids[-1] != close.stop_id):
                # A finish reason of "stop" without the close token among the ids (servers often strip it).
                stopped = len(ids) > 0 and ids[-1] == close.stop_id
            results.append([*ids, *close.ids(stopped), *follow.ids])
        return results

    def close(self, messages: Sequence[Message]) -> Close:
        """How the template ends the assistant turn that ``messages`` ends with.

        Raises:
            BridgeError: the template's close cannot be derived.
        """
        return _raised(self.try_close(list(map(_role, messages))))

    def try_close(self, roles: Sequence[str]) -> Close | BridgeError:
        """The close of a conversation with these roles, or the reason why there is none."""
        return self._close(Shape.of(roles) or Shape(None, "user", roles[-1]))

    def _close(self, key: Shape) -> Close | BridgeError:
        close = self._closes.get(key)
        if close is None:
            try:
                close = self._prover.close(key)
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
    ) -> list[Rendered]:
        """What follows a closed assistant turn: new messages, then the generation prompt.

        Args:
            messages: conversations that each end with a closed assistant turn.
            new_messages: what is appended to each.
            add_generation_prompt: whether the ids end with what opens an assistant turn.
            roles: the roles of each conversation, where they are at hand.

        Raises:
            BridgeError: for the first conversation whose extension cannot be proved.
        """
        pending: list[tuple[str, bool]] = []
        closes: list[Close] = []
        if roles is None:
            roles = [list(map(_role, conversation)) for conversation in messages]
        for conversation, new, said_by in zip(messages, new_messages, roles, strict=True):
            text, marked, close = self._follow_text(conversation, new, said_by, add_generation_prompt)
            pending.append((text, marked))
            closes.append(close)
        if not pending:
            return []
        if any(close is not closes[0] for close in closes):  # conversations of several shapes
            return [self._encode([item], close)[0] for item, close in zip(pending, closes, strict=True)]
        return self._encode(pending, closes[0])

    def _follow_text(
        self,
        messages: Sequence[Message],
        new: Sequence[Message],
        roles: Sequence[str],
        add_generation_prompt: bool,
    ) -> tuple[str, bool, Close]:
        """The text that follows a closed turn, whether it carries marks, and the close it continues."""
        shape = Shape.of(roles)
        close = _raised(self._close(shape or Shape(None, "user", roles[-1])))
        if len(new) == 1 and shape is not None and new[0].keys() == _PLAIN_KEYS:
            content = new[0]["content"]
            rule = _raised(self._compiled(shape, close, new[0]["role"], add_generation_prompt))
            if rule is not None and isinstance(content, str):
                marked = self.codec.spells_special(content)
                return rule.text(self.codec.mark_specials(content) if marked else content), marked, close
        if not new:
            raise BridgeError("there is no new message to extend the conversation by.")
        if any(message["role"] == roles[-1] for message in new):
            raise BridgeError(f"a message of role {roles[-1]!r} is sampled by the policy, not appended.")
        if messages[-1].get("tool_calls"):
            raise BridgeError("an answer with structured tool calls cannot be bridged yet.")
        self._proved(close, messages, new, add_generation_prompt)
        before, _ = self.renderer.guard(messages[:-1])
        guarded, marked = self.renderer.guard(new)
        return self._prover.follow(close, before, messages[-1], guarded, add_generation_prompt), marked, close

    def _proved(
        self,
        close: Close,
        messages: Sequence[Message],
        new: Sequence[Message],
        add_generation_prompt: bool,
    ) -> None:
        """Prove a rendered extension once for conversations of these roles and kinds of message."""
        kinds = tuple((m["role"], *sorted(m.keys() - {"content"})) for m in (*messages, *new))
        key = (kinds, len(new), add_generation_prompt)
        if key not in self._rendered:
            before = [{**m, "content": f"said {i}"} for i, m in enumerate(messages[:-1])]
            following = [{**m, "content": f"new {i}"} for i, m in enumerate(new)]
            try:
                self._prover.prove(close, before, messages[-1]["role"], following, add_generation_prompt)
                self._rendered[key] = None
            except BridgeError as error:
                self._rendered[key] = error
        _raised(self._rendered[key])

    def _compiled(
        self, shape: Shape, close: Close, role: str, add_generation_prompt: bool
    ) -> Follow | BridgeError | None:
        key = (shape, role, add_generation_prompt)
        if key not in self._follows:
            try:
                if role == shape.policy:
                    raise BridgeError(f"a message of role {role!r} is sampled by the policy, not appended.")
                self._follows[key] = self._prover.compile(shape, close, role, add_generation_prompt)
            except BridgeError as error:
                self._follows[key] = error
        return self._follows[key]

    # ------------------------------------------------------------------ ids <-> text
    def _encode(self, items: Sequence[tuple[str, bool]], close: Close | None = None) -> list[Rendered]:
        """Ids of texts (follows of ``close``, if given), those with marked look-alikes guarded."""
        if not any(marked for _, marked in items):
            texts = [text for text, _ in items]
            ids = self.codec.encode(texts) if close is None else self._prover.follow_ids(close, texts)
            return list(map(Rendered, ids, texts))
        results: list[Rendered] = []
        for text, marked in items:
            if not marked:
                results += self._encode([(text, False)], close)
                continue
            encoded = (
                self.codec.encode_guarded([text])
                if close is None
                else self._prover.follow_ids(close, [text], guarded=True)
            )
            results.append(Rendered(encoded[0], text.replace(MARK, "")))
        return results

    def parse_batch(self, sampled: Sequence[Sequence[int]], closes: Sequence[Close | BridgeError]) -> list[Parsed]:
        """Read what a policy sampled: the message's content, the text, and whether the turn ended.

        Args:
            sampled: for each row, the ids that the policy sampled.
            closes: for each row, how its turn is closed (see :meth:`try_close`).
        """
        eos = self.tokenizer.eos_token_id
        parsed = []
        for ids, text, close in zip(sampled, self.codec.decode(sampled), closes, strict=True):
            content, last = text, ids[-1]
            stop = self.codec.stop_text(last) if last in self.codec.special_ids else ""
            if isinstance(close, BridgeError):
                ended = last == eos
                parsed.append(Parsed(text[: len(text) - len(stop)] if ended else text, text, ended))
                continue
            ended = last == close.stop_id
            if ended or last == eos:
                content = text[: len(text) - len(stop)]
                if close.before:
                    content = content.removesuffix(close.before)
            if close.lead:
                content = content.removeprefix(close.lead)
            parsed.append(Parsed(content, text, ended))
        return parsed


_role = itemgetter("role")
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
