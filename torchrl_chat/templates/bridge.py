"""The bridge: what a chat template writes after an assistant turn, derived and proved.

A chat template is a program over whole conversations; the ledger needs its *suffixes*. They are
derived by rendering the conversation with a sentinel as the assistant's content and taking what
stands after it (the *tail*)::

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nSENTINEL<|im_end|>\\n<|im_start|>user\\n...
                                                                  ^ close     ^ follow

The tail splits into the *close* (what ends the turn, whatever comes next) and the *follow* (the new
messages and the generation prompt). Law of this file: a tail is used only after it was shown to agree
with the template itself: with what the template writes for real contents, at several depths, at text
level and at token level. What cannot be shown raises :class:`BridgeError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torchrl_chat.messages import Message, content_text
from torchrl_chat.templates.codec import TokenCodec
from torchrl_chat.templates.rendering import ChatTemplateError, Renderer


class BridgeError(ChatTemplateError):
    """An exact extension cannot be proved for this template; the text says which behaviour forbids it."""


class Shape(NamedTuple):
    """The roles of a regular conversation: an optional system message, then user and policy in turn."""

    system: str | None
    user: str
    policy: str

    @classmethod
    def of(cls, roles: Sequence[str]) -> Shape | None:
        """The shape of a conversation that ends with the policy's message; ``None`` if irregular."""
        if len(roles) < 2:
            return None
        start = len(roles) % 2
        shape = cls(roles[0] if start else None, roles[start], roles[-1])
        turns = (shape.user, shape.policy) * (len(roles) // 2)
        if len(set(shape)) < 3 or tuple(roles[start:]) != turns:
            return None
        return shape


@dataclass(frozen=True, slots=True)
class Close:
    """How a template ends an assistant turn."""

    lead: str  # what the policy is expected to write before its content, e.g. one space (Mistral)
    stop: str  # the end-of-turn token, sampled by a policy that ends its turn
    stop_id: int
    before: str  # text between content and stop token, nearly always empty
    after: str  # text after the stop token that ends the turn whatever follows, e.g. "\n"
    after_ids: tuple[int, ...]  # the ids of `after`
    full_ids: tuple[int, ...]  # before + stop + after, for a turn that was cut

    def ids(self, ended: bool) -> tuple[int, ...]:
        """What is still missing after a turn that ended by itself, or was cut."""
        return self.after_ids if ended else self.full_ids

    def text(self, ended: bool) -> str:
        """The same as text."""
        return self.after if ended else self.before + self.stop + self.after


@dataclass(frozen=True, slots=True)
class Follow:
    """A compiled follow: constant text around the content of one new message."""

    head: str
    edit: Callable[[str], str]  # what the template does to the content: nothing, or trimming
    suffix: str

    def text(self, content: str) -> str:
        """What the template writes for a new message of this content."""
        return self.head + self.edit(content) + self.suffix


def _same(text: str) -> str:
    return text


_EDITS: tuple[Callable[[str], str], ...] = (_same, str.strip, str.lstrip, str.rstrip)

# Contents that templates are known to treat specially: trimmed edges, escapes, markup, JSON, numbers.
_EDGED = ("\n  two lines\nwith edges \t\n", " x ", "", " ")
_PLAIN = (
    "plain words",
    "4",
    "naïve café — 北京 🎉",
    'a "quoted" {"k": [1, 2]} & <b>it</b>\'s {{ x }}',
    "first\n\nsecond\n\n\nthird: 1,234.56",
    "<think>\nmuse\n</think>\n\n4",
)


class Prover:
    """Derives closes and follows of one template and proves them.

    Args:
        renderer: the template.
        codec: its tokenizer's codec.
    """

    def __init__(self, renderer: Renderer, codec: TokenCodec):
        self.renderer = renderer
        self.codec = codec

    # ------------------------------------------------------------------ derivation
    def tail(
        self, before: Sequence[Message], answer: Message, new: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[str, str]:
        """``(lead, tail)``: what stands between the prompt and the answer's content, and after it.

        Raises:
            BridgeError: the template raises, drops the content, or does not continue its own prompt.
        """
        sentinel = _unused(before, new)
        try:
            prompt = self.renderer.text(before, True)
            full = self.renderer.text([*before, {**answer, "content": sentinel}, *new], add_generation_prompt)
        except ChatTemplateError as error:
            raise BridgeError(str(error)) from error
        if not full.startswith(prompt):
            raise BridgeError(
                "the chat template rewrites what came before: with an answer"
                + (f" and {len(new)} new message(s)" if new else "")
                + f" its text no longer starts with the prompt; {_difference(prompt, full)}"
            )
        at = full.rfind(sentinel)
        if at < len(prompt):
            raise BridgeError("the chat template does not write the content of an assistant message.")
        lead = full[len(prompt) : at]
        if lead.strip():
            # The template expects the policy to sample this text itself: nothing to bridge over.
            raise BridgeError(f"the chat template writes {lead!r} before an assistant's content.")
        return lead, full[at + len(sentinel) :]

    def close(self, shape: Shape) -> Close:
        """Derive and prove how a turn of this shape is closed."""
        system = [{"role": shape.system, "content": "Be brief."}] if shape.system else []
        before: list[Message] = [*system, {"role": shape.user, "content": "first question"}]
        answer = {"role": shape.policy, "content": ""}
        new = [{"role": shape.user, "content": "next question"}]
        lead, last = self.tail(before, answer, [], False)
        _, tail = self.tail(before, answer, new, True)
        match = self.codec.first_special(last)
        if match is None:
            raise BridgeError(
                f"the chat template ends an assistant turn with plain text ({last!r}), no special token: "
                f"a turn that ended cannot be told from one that was cut."
            )
        if not tail.startswith(last[: match.end()]):
            raise BridgeError(
                f"the chat template ends the last assistant turn with {last[: match.end()]!r}, but writes "
                f"{tail[: match.end()]!r} there once a message follows."
            )
        cut = self._boundary(last, tail, match.end())
        stop = match.group()
        after = tail[match.end() : cut]
        return Close(
            lead=lead,
            stop=stop,
            stop_id=self.codec.special[stop],
            before=last[: match.start()],
            after=after,
            after_ids=tuple(self.codec.encode_after(stop, [after])[0]),
            full_ids=tuple(self.codec.encode([tail[:cut]])[0]),
        )

    def _boundary(self, last: str, tail: str, start: int) -> int:
        """Where the close ends: as far as both tails agree, cut back to in front of a special token."""
        common = start
        while common < min(len(last), len(tail)) and last[common] == tail[common]:
            common += 1
        for cut in range(common, start, -1):
            match = self.codec.first_special(tail[cut:])
            if match is not None and match.start() == 0:
                return cut
        return start

    def follow(
        self,
        close: Close,
        before: Sequence[Message],
        answer: Message,
        new: Sequence[Message],
        add_generation_prompt: bool,
    ) -> str:
        """What the template writes after the close for new messages, checked on this very conversation."""
        _, tail = self.tail(before, answer, new, add_generation_prompt)
        head = close.text(False)
        if not tail.startswith(head):
            raise BridgeError(
                f"the chat template closes this turn with {tail[: len(head)]!r}, not {head!r}: what ends a "
                f"turn depends on what follows it."
            )
        rest, at = tail[len(head) :], 0
        for message in new:
            content = content_text(message).strip()
            found = rest.find(content, at)
            if found < 0:
                raise BridgeError(
                    f"the chat template drops or rewrites a message of role {message['role']!r} after an "
                    f"assistant turn: {content[:60]!r} is not in {rest[:120]!r}."
                )
            at = found + len(content)
        return rest

    def follow_ids(self, close: Close, texts: Sequence[str], guarded: bool = False) -> list[list[int]]:
        """Ids of follows, as they continue right after a close."""
        encode = self.codec.encode_guarded if guarded else self.codec.encode
        if close.after:  # then every follow begins with a special token, which no merge crosses
            return encode(texts)
        return [ids[1:] for ids in encode([close.stop + text for text in texts])]

    # ------------------------------------------------------------------ proof
    def compile(self, shape: Shape, close: Close, role: str, add_generation_prompt: bool) -> Follow | None:
        """The compiled follow of one new message of ``role``, if it is constant around the content.

        Returns ``None`` where the text depends on more than the content: the template is then rendered
        for every extension.

        Raises:
            BridgeError: the extension is refused for every conversation of this shape.
        """
        conversations = list(_conversations(shape))
        before, answer = conversations[0]
        sentinel = _unused(before, ())
        probe = self.follow(close, before, answer, [{"role": role, "content": sentinel}], add_generation_prompt)
        head, _, suffix = probe.partition(sentinel)
        new = [{"role": role, "content": _PLAIN[0]}]
        for before, answer in conversations:
            self._prove(close, before, answer, new, add_generation_prompt)
        candidates = [Follow(head, edit, suffix) for edit in _EDITS]
        for i, content in enumerate((*_PLAIN, *_EDGED)):
            before, answer = conversations[i % len(conversations)]
            new = [{"role": role, "content": content}]
            text = self.follow(close, before, answer, new, add_generation_prompt)
            candidates = [follow for follow in candidates if follow.text(content) == text]
        return candidates[0] if candidates else None

    def prove(
        self,
        close: Close,
        before: Sequence[Message],
        policy: str,
        new: Sequence[Message],
        add_generation_prompt: bool,
    ) -> None:
        """The derivation on one conversation, for every kind of answer.

        Raises:
            BridgeError: the template or the tokenizer disagrees.
        """
        for content in _PLAIN:
            self._prove(close, before, {"role": policy, "content": content}, new, add_generation_prompt)

    def _prove(
        self,
        close: Close,
        before: Sequence[Message],
        answer: Message,
        new: Sequence[Message],
        add_generation_prompt: bool,
    ) -> None:
        """The derivation against the template and the tokenizer, on one conversation with a real answer."""
        rest = self.follow(close, before, answer, new, add_generation_prompt)
        prompt = self.renderer.text(before, True)
        full = self.renderer.text([*before, answer, *new], add_generation_prompt)
        tail = close.text(False) + rest
        if full != prompt + close.lead + answer["content"] + tail:
            raise BridgeError(
                "the chat template changes an assistant's answer once a message follows: for the answer "
                f"{answer['content']!r} it writes {full[len(prompt) : -len(tail)]!r} and {full[-len(tail) :]!r}"
            )
        [ids] = self.codec.encode([full])
        [rest_ids] = self.follow_ids(close, [rest])
        for ended in (True, False):
            suffix = [*close.ids(ended), *rest_ids]
            if ids[len(ids) - len(suffix) :] != suffix:
                raise BridgeError(
                    f"the tokenizer merges across the end of an assistant turn: {tail[:60]!r} alone is not the "
                    f"end of the ids of the whole conversation."
                )


def _conversations(shape: Shape) -> list[tuple[list[Message], Message]]:
    """Conversations of several depths, each with the answer that it was given."""
    system: list[Message] = [{"role": shape.system, "content": "Be brief."}] if shape.system else []
    conversations = []
    for depth, content in enumerate(_PLAIN):
        turns: list[Message] = [*system]
        for turn in range(depth % 3):
            turns.append({"role": shape.user, "content": f"question {turn}"})
            turns.append({"role": shape.policy, "content": f"answer {turn}"})
        turns.append({"role": shape.user, "content": "the question"})
        conversations.append((turns, {"role": shape.policy, "content": content}))
    return conversations


def _unused(*conversations: Sequence[Message]) -> str:
    """A sentinel that stands in none of the messages."""
    number = 0
    while True:
        sentinel = f"Qz7sentinel{number}zQ"
        if not any(sentinel in content_text(m) for messages in conversations for m in messages):
            return sentinel
        number += 1


def _difference(expected: str, got: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
    start = max(0, at - 20)
    return f"at character {at}: {expected[start : at + 40]!r} became {got[start : at + 40]!r}."
