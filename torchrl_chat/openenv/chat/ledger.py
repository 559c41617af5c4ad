"""Who writes the ledger of one episode: messages and answers in, a new :class:`Ledger` out.

Law of this file: a ledger is a value. What cannot be written raises, and the ledger that was stays what it was. What
the policy has answered to is never written anew; what it has not yet answered to may be, because the next message
can change how a template renders it (a system prompt that is merged into the first question).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchrl_chat.conversation import ResponseError, Transcript, Turn, answer, append
from torchrl_chat.conversation.turn import check_ids, check_turns
from torchrl_chat.messages import Message, MessageError
from torchrl_chat.templates import ChatTemplate, ChatTemplateError
from torchrl_chat.templates.kinds import Roles

_ROLES = ("user", "assistant", "system", "tool")
_SENTINEL = "qzj"


@dataclass(frozen=True, slots=True)
class Ledger:
    """One conversation, and where each of its messages ends in the tokens.

    Attributes:
        transcript: the tokens and messages now.
        ends: for each message, where its tokens end. Messages that were written at once: all tokens stand with the last.
        answered: the transcript as it was after the policy's last answer; ``None`` before the first.
        kept: how many messages and tokens are the same as in the ledger that this one was made of.
    """

    transcript: Transcript
    ends: tuple[int, ...] = ()
    answered: Transcript | None = None
    kept: tuple[int, int] = (0, 0)

    @property
    def awaits_policy(self) -> bool:
        """Whether a question stands unanswered."""
        messages = self.transcript.messages
        return (
            self.transcript.ended is None and bool(messages) and messages[-1]["role"] not in ("assistant", "system")
        )

    @classmethod
    def of(cls, transcript: Transcript) -> Ledger:
        """The ledger of a conversation whose messages were written at once."""
        count = len(transcript.messages)
        return cls(transcript, (0,) * (count - 1) + (len(transcript),) * (count > 0))

    def then(self, transcript: Transcript, answered: Transcript | None = None) -> Ledger:
        """The next ledger of the same conversation, and its part that the policy has answered."""
        was, length = len(self.transcript), len(transcript)
        kept = min(was, length)
        if answered is not transcript:  # what was not answered yet may have been written anew
            same = 0 if self.answered is None else len(self.answered)
            old, new = (ledger.token_array[same:kept] for ledger in (self.transcript, transcript))
            differs = (old != new).nonzero()[0]
            kept = same + int(differs[0]) if len(differs) else kept
        before, now = len(self.ends), len(transcript.messages)
        ends = [min(end, kept) for end in self.ends[:now]] if kept < was else self.ends[:now]
        added = [kept] * (now - before - 1) + [length] if now > before else []
        return Ledger(transcript, (*ends, *added), answered, (min(before, now), kept))

    def segments(self) -> list[list[int]]:
        """The tokens that each message brought."""
        starts = (0, *self.ends)
        return [self.transcript.token_array[a:b].tolist() for a, b in zip(starts, self.ends, strict=False)]


@dataclass
class _Known:
    """What has been found out about a template, shared by all its writers."""

    proved: set[Roles] = field(default_factory=set)  # kinds of conversation in which an answer was closed already
    renderings: dict[str, tuple[str, str]] | None = None
    may_open: dict[int, bool] = field(default_factory=dict)  # whether a rendering may begin with this token


_known: weakref.WeakKeyDictionary[ChatTemplate, _Known] = weakref.WeakKeyDictionary()


def writer_of(tokenizer: Any, **template: Any) -> Writer:
    """The writer for a tokenizer: its chat template bridged; or, for one that has little more than
    ``apply_chat_template`` and ``decode`` (a mock, a remote one), message by message.

    Args:
        tokenizer: a tokenizer or processor of transformers, a :class:`~torchrl_chat.ChatTemplate` to share, or an object
            with those two methods.
        **template: arguments of :class:`~torchrl_chat.ChatTemplate`.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(tokenizer, ChatTemplate):
        return TemplateWriter(tokenizer)
    if hasattr(tokenizer, "get_vocab") or hasattr(tokenizer, "tokenizer"):
        return TemplateWriter(ChatTemplate(tokenizer, **template))
    if callable(getattr(tokenizer, "apply_chat_template", None)) and callable(getattr(tokenizer, "decode", None)):
        return Writer(tokenizer)
    raise TypeError(
        f"tokenizer is a {type(tokenizer).__name__}: expected a tokenizer with apply_chat_template and decode."
    )


class Writer:
    """Writes ledgers with one tokenizer, message by message: one with ``apply_chat_template`` and ``decode`` only.

    Such a tokenizer does not tell how a turn is opened or closed, so nothing is added to what is rendered and sampled,
    and every message is rendered alone. This is what OpenEnv's own chat environment does with every tokenizer; a
    tokenizer of transformers is bridged instead, see :class:`TemplateWriter`.

    Args:
        tokenizer: the tokenizer.
    """

    template: ChatTemplate | None = None
    """The bridged chat template; ``None`` where messages are rendered one by one."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def start(self, messages: Sequence[Message]) -> Ledger:
        """A conversation that begins with these messages; there may be none."""
        return self.add(Ledger(Transcript.start([], ())), messages)

    def add(self, ledger: Ledger, messages: Sequence[Message]) -> Ledger:
        """The ledger with further messages, and what opens the policy's turn behind them."""
        for message in messages:
            after = ledger.transcript.appended(self._render(message), [message])
            ledger = ledger.then(after, after)
        return ledger

    def answer(self, ledger: Ledger, turn: Turn) -> Ledger:
        """The ledger with what the policy sampled, id for id, and the end of its turn."""
        if turn.ids is None:
            turn = replace(turn, ids=Turn.of(self._render({"role": "assistant", "content": turn.text})).ids)
        try:
            size = len(self.tokenizer)
        except TypeError:
            size = 2**31
        wrong: dict[int, Exception] = {}
        check_turns({0: turn}, size, wrong)
        if wrong:
            raise wrong[0]
        cut = turn.cut()
        try:
            content = self.tokenizer.decode(cut.sampled.tolist(), skip_special_tokens=True)
        except Exception as error:
            raise ResponseError(f"the tokenizer cannot decode the action's ids: {error}") from error
        message = {"role": "assistant", "content": content}
        ended = cut.finish_reason != "length"
        after = ledger.transcript.sampled(cut.sampled, None, message, ended=ended)
        return ledger.then(after, after)

    def recognise(self, ids: Sequence[int]) -> Message | None:
        """The message of which these ids are the whole rendering; ``None`` if they are none, or do not show their role."""
        return None

    def is_quick(self, ledger: Ledger) -> bool:
        """Whether an answer costs its own tokens only: nothing about the template has to be proved first."""
        return True

    def _render(self, message: Message) -> list[int]:
        ids = self.tokenizer.apply_chat_template(conversation=[message], tokenize=True)
        ids = ids["input_ids"] if hasattr(ids, "keys") else ids
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        while ids and isinstance(ids[0], (list, tuple)):
            ids = list(ids[0])
        return list(map(int, ids))


class TemplateWriter(Writer):
    """Writes by the bridge of a real chat template; safe to share between sessions.

    Args:
        template: the chat template.
    """

    template: ChatTemplate

    def __init__(self, template: ChatTemplate):
        self.template = template
        self._known = _known.setdefault(template, _Known())

    def start(self, messages: Sequence[Message]) -> Ledger:
        """See :class:`Writer`. A system prompt that the template cannot render alone has no tokens before a question."""
        if not messages:
            return Ledger.of(Transcript.start([], ()))
        opens = messages[-1]["role"] != "assistant"
        try:
            ids = self.template.render_batch([messages], opens)[0].ids
        except ChatTemplateError:
            if any(message["role"] != "system" for message in messages):
                raise
            ids = []
        return Ledger.of(Transcript.start(ids, messages))

    def add(self, ledger: Ledger, messages: Sequence[Message]) -> Ledger:
        """See :class:`Writer`."""
        answered = ledger.answered
        if answered is None:
            return ledger.then(self.start([*ledger.transcript.messages, *messages]).transcript, None)
        waiting = [*ledger.transcript.messages[len(answered.messages) :], *messages]
        return ledger.then(append([answered], [waiting], self.template)[0], answered)

    def answer(self, ledger: Ledger, turn: Turn) -> Ledger:
        """See :class:`Writer`."""
        before = ledger.transcript
        if before.messages and not len(before):
            raise ResponseError("the template cannot render what there is so far: send a user message first.")
        [after] = answer([before], [turn], self.template)
        self._known.proved.add(before.course.shape)
        return ledger.then(after, after)

    def recognise(self, ids: Sequence[int]) -> Message | None:
        """See :class:`Writer`. Exact: rendering the message gives the very ids."""
        known = self._known
        if known.renderings is None:
            known.renderings = dict(self._learn())
        if not known.renderings or not self._may_open(ids[0]):
            return None
        check_ids(ids, self.template.codec.vocab_size)
        text = self.template.codec.decode([ids])[0]
        for role, (head, tail) in known.renderings.items():
            if text.startswith(head) and text.endswith(tail) and len(text) >= len(head) + len(tail):
                message = {"role": role, "content": text[len(head) : len(text) - len(tail)]}
                try:
                    if self.template.render([message], False) == list(ids):
                        return message
                except (ChatTemplateError, MessageError):
                    continue
        return None

    def _may_open(self, token_id: int) -> bool:
        """Whether a message may begin with a token: nearly no sampled answer gets past this, and needs no decoding."""
        known = self._known
        found = known.may_open.get(token_id)
        if found is None:
            check_ids([token_id], self.template.codec.vocab_size)
            first = self.template.codec.decode([[token_id]])[0].rstrip("\ufffd")  # of a character that goes on
            heads = [head for head, _ in (known.renderings or {}).values()]
            found = any(head.startswith(first) or first.startswith(head) for head in heads)
            known.may_open[token_id] = found
        return found

    def is_quick(self, ledger: Ledger) -> bool:
        """See :class:`Writer`."""
        known = self._known
        return known.renderings is not None and ledger.transcript.course.shape in known.proved

    def _learn(self) -> list[tuple[str, tuple[str, str]]]:
        """What the template puts around a message that stands alone, for the roles where that names the role."""
        found = []
        for role in _ROLES:
            try:
                text = self.template.render_batch([[{"role": role, "content": _SENTINEL}]], False)[0].text
            except ChatTemplateError:
                continue
            head, sentinel, tail = text.partition(_SENTINEL)
            if sentinel and head:
                found.append((role, (head, tail)))
        heads = [around for _, around in found]
        return [(role, around) for role, around in found if heads.count(around) == 1]
