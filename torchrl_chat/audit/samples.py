"""What a policy would sample on a template: turns to try a bridge with, as ids.

The canonical answer is the one that the template itself writes behind its generation prompt, so that a policy that
was trained on the template would write it. The same text in other tokens is what sampling gives now and then.

Law of this file: only public calls of :class:`~torchrl_chat.templates.chat_template.ChatTemplate` are used, so
that what is tried is what an environment does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jinja2

from torchrl_chat.messages import Message, content_text
from torchrl_chat.templates.bridge import BY_TEXT, Close, shared_prefix
from torchrl_chat.templates.chat_template import ChatTemplate
from torchrl_chat.templates.dialects import Pair
from torchrl_chat.templates.kinds import Course
from torchrl_chat.templates.parsing import Parsed

ERRORS = (ValueError, jinja2.TemplateError)
"""What a template, its bridge or its tokenizer may raise at a conversation."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A turn as it was sampled, and the prompt that follows it."""

    messages: list[Message]  # the conversation with its answer
    new: list[Message]  # the messages that follow
    ids: list[int]  # prompt and sampled ids
    start: int  # where the sampled ids begin
    text: str  # the sampled text without its end
    stop: list[int]  # the ids, at the end of the sampled ones, that end the turn; none if it was cut
    close: Close  # how the template closes it
    exact: list[int]  # the next prompt
    ended: bool  # whether the policy ended its turn; else a limit cut it

    @property
    def stop_id(self) -> int | None:
        """The stop token as the bridge knows it."""
        if not self.stop:
            return None
        return self.stop[-1] if self.stop[-1] in self.close.stops else BY_TEXT

    def parsed(self, template: ChatTemplate) -> Parsed:
        """The answer as it is read out of its ids."""
        prompt, sampled = self.ids[: self.start], self.ids[self.start :]
        return template.parse_batch([sampled], [Course.of(self.messages[:-1])], prompts=[prompt])[0]


def sample(
    template: ChatTemplate,
    before: Sequence[Message],
    answer: Message,
    new: Sequence[Message],
    *,
    said: str | None = None,
    ended: bool = True,
    ids: Sequence[int] | None = None,
) -> Sample:
    """One turn: the prompt, an answer sampled after it, and the exact next prompt.

    Args:
        template: the template.
        before: the conversation up to the answer.
        answer: the answer.
        new: what follows it.
        said: the text that the policy writes; by default as the template writes the answer.
        ended: whether the policy ends its turn; else a limit cuts it.
        ids: the conversation's ids so far; by default those of a first prompt.

    Raises:
        ChatTemplateError: the template refuses the conversation, or the bridge the extension.
    """
    prompt = template.render(before) if ids is None else list(ids)
    messages, following = [*before, answer], list(new)
    close = template.close(messages)
    text = written(template, before, answer) if said is None else said
    if text is None or (said is not None and not text.startswith(close.lead)):
        text = close.lead + (text or content_text(answer))
    tried = []
    # Of several tokens that end a turn, the right one depends on what follows: it saves most of the tail.
    for stop in (close.main or (None,)) if ended else (None,):
        core, end = _parted(template, close, text, stop, whole=said is None)
        after = [prompt[-1]] if prompt else None
        sampled = template.codec.encode_continuation([core + end], after=after)[0]
        begun = template.codec.encode_continuation([core], after=after)[0] if core else []
        last = sampled[-1:] if stop is not None and stop != BY_TEXT else sampled[len(begun) :]
        last = last if end or last == [stop] else []  # what closes a call ends the turn, and is part of the call
        exact = template.extend(prompt + sampled, messages, following, ended=None if ended else False)
        tried.append(Sample(messages, following, prompt + sampled, len(prompt), core, last, close, exact, ended))
    return min(tried, key=lambda turn: len(turn.exact))


def _parted(template: ChatTemplate, close: Close, text: str, stop: int | None, whole: bool) -> tuple[str, str]:
    """A text as the template writes it, parted into what is said and what ends the turn."""
    if stop is None:
        stops = [s for s in close.main if s != BY_TEXT]
        text = next((cut for s in stops if (cut := _parted(template, close, text, s, whole)[0]) != text), text)
        return text.removesuffix(close.body) if close.body and whole else text, ""
    token = "" if stop == BY_TEXT else template.codec.token_text(stop)
    end = close.body + token
    at = text.rfind(token or end) if whole and end else -1
    if at < 0:
        return text, end
    ended = text[: at + len(token or end)]
    core = close.without_end(ended, stop, token)
    if token and core != ended and core.rstrip().endswith(token):  # some write it twice behind the last turn
        return _parted(template, close, core.rstrip(), stop, whole)
    return core, ended[len(core) :]


def written(template: ChatTemplate, before: Sequence[Message], answer: Message) -> str | None:
    """The answer as the template writes it behind its own generation prompt, with all that ends it; or ``None``."""
    prompt, whole = template.renderer.tried(before, True), template.renderer.tried([*before, answer], False)
    if not prompt or not whole:
        return None
    if whole.startswith(prompt):
        text = _lasting(template, prompt, whole[len(prompt) :], [*before, answer, before[-1]])
    else:
        text = _reopened(template.parser.pairs, prompt, whole)
    return text if content_text(answer).strip() in text else None


def _lasting(template: ChatTemplate, prompt: str, text: str, continued: Sequence[Message]) -> str:
    """An answer without an empty reasoning block that stands on the last turn alone: no part of a plain answer."""
    opened = template.parser.opened_by(prompt)
    parsed = template.parser.parse(text, opened)
    if opened or parsed.reasoning is None or parsed.reasoning.strip():
        return text
    later = template.renderer.tried(continued, False)
    return text if not later or later.startswith(prompt + text[: parsed.start]) else text[parsed.start :]


def _reopened(pairs: Sequence[Pair], prompt: str, whole: str) -> str:
    """An answer behind a prompt that opens its reasoning, or closes it already, where the past does not repeat that."""
    base, tag = prompt.rstrip(), ""
    tags = [(side.strip(), pair) for pair in pairs for side in (pair.open, pair.close)]
    while found := next(((side, pair) for side, pair in tags if side and base.endswith(side)), None):
        base, tag, pair = base.removesuffix(found[0]).rstrip(), tag or found[0], found[1]
    text = whole[len(shared_prefix([base, whole])) :]
    if not tag:
        return text
    block = text.lstrip()
    if tag == pair.open.strip():  # the policy goes on inside the reasoning
        block = block.removeprefix(pair.open)
        return block if block.lstrip().startswith(pair.close) else f"{pair.close}\n\n{block}"
    block = block.removeprefix(pair.open).lstrip()
    return block.removeprefix(pair.close).lstrip() if block.startswith(pair.close) else text


def other_tokens(template: ChatTemplate, turn: Sample) -> Sample | None:
    """The same turn with the answer's text in other tokens; ``None`` if the tokenizer has but one way to write it.

    Raises:
        ChatTemplateError: the bridge refuses the extension.
    """
    codec = template.codec
    sampled = turn.ids[turn.start : len(turn.ids)]
    core = sampled[: len(sampled) - len(turn.stop)]
    [text] = codec.decode([core])
    after = [turn.ids[turn.start - 1]] if turn.start else None
    # From the end: there stands what is said, in front of it what the template may leave out later.
    for cut in range(len(text) - 1, 0, -1):
        if not (text[cut - 1].isalnum() and text[cut].isalnum()):
            continue
        try:
            ids = codec.encode_continuation([text[:cut]], after)[0] + codec.encode_continuation([text[cut:]])[0]
        except ValueError:  # the tokenizer merges across this cut
            continue
        if ids != core and codec.decode([ids]) == [text]:
            ids = turn.ids[: turn.start] + ids + turn.stop
            return replace(turn, ids=ids, exact=template.extend(ids, turn.messages, turn.new))
    return None


def line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())
