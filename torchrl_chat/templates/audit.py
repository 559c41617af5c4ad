"""The audit: which kinds of turn a chat template's bridge proves, what it writes there, and what else would drift.

Every capability is one conversation, sampled as the template writes it and extended as an environment extends it.
What fails is asked of the template itself: does it raise at such a turn, does it leave a message out?

Law of this file: a finding is what was tried on this tokenizer and this template, just now; nothing is known of any
model by its name.
"""

from __future__ import annotations

import functools
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torchrl_chat.messages import Message, content_text
from torchrl_chat.templates import probes
from torchrl_chat.templates import report as r
from torchrl_chat.templates.chat_template import ChatTemplate
from torchrl_chat.templates.drift import drift
from torchrl_chat.templates.past import rewrites
from torchrl_chat.templates.probes import ANSWER, MORE, NEXT, PLACE, REASONING, SYSTEM, TOOL, USER
from torchrl_chat.templates.rendering import ChatTemplateError, at_another_time, remembered_texts
from torchrl_chat.templates.samples import Sample, errors, line, sample, shared

DEPTH = 16
# The forms that special tokens have and words have not; "[INST]" is a word of some templates and a token of others.
_TOKEN_LIKE = re.compile(
    r"<\|[^|<>\s]{1,60}\|>|<｜[^｜<>\s]{1,60}｜>|</?s>|<(?:bos|eos|pad|sop|eop|start_of_turn|end_of_turn)>|\[gMASK\]"
)
_TAG = re.compile(r"[<\[]\S{1,60}[>\]]")


class BrokenTemplateError(ChatTemplateError):
    """A chat template that Jinja cannot parse."""


def audit(
    tokenizer: Any, *, chat_template: str | None = None, tools: Sequence[Any] | None = None, **template_kwargs: Any
) -> r.Report:
    """Find out which turns are exact with a tokenizer's chat template, and why the others are not.

    Args:
        tokenizer: a Hugging Face tokenizer or processor.
        chat_template: Jinja source used instead of its own, or the name of one of its templates.
        tools: schemas for the system prompt; by default one of a small tool.
        **template_kwargs: further variables of the template, e.g. ``enable_thinking=False``.

    Returns:
        The report; what a template cannot do stands in it and raises nothing.

    Raises:
        ChatTemplateError: there is no chat template.
        BrokenTemplateError: it is no valid Jinja.

    Example:
        >>> report = audit(tokenizer)
        >>> report["user_turns"].status
        <Status.PROVED: 'proved'>
        >>> [token.text for token in report["user_turns"].tail][:3]
        ['<|im_end|>', '\\n', '<|im_start|>']
    """
    options = {"chat_template": chat_template, "parse_tool_calls": True, **template_kwargs}
    tools = list(tools or [TOOL])
    template, equipped = _made(tokenizer, **options), _made(tokenizer, tools=tools, **options)
    with remembered_texts(), _counted(template), _counted(equipped):
        return _Audit(template, equipped, tools, template_kwargs).report()


class _Audit:
    """One audit: the template, the same with tools, and the samples that several parts look at."""

    def __init__(self, template: ChatTemplate, equipped: ChatTemplate, tools: list[Any], variables: dict[str, Any]):
        self.template = template
        self.equipped = equipped
        self.tools = tools
        self.variables = variables
        self.samples: dict[str, Sample] = {}

    def report(self) -> r.Report:
        """All of it."""
        parser, codec = self.template.parser, self.template.codec
        capabilities = tuple(self._capabilities())
        self._sample_reasoned_call()
        name = getattr(self.template.tokenizer, "name_or_path", "") or type(self.template.tokenizer).__name__
        stops = tuple(r.Token(i, codec.token_text(i)) for i in sorted(_tried(lambda: self.template.stop_ids, ())))
        reasons = {finding.name: finding.reason or "" for finding in capabilities}
        turns = {"user": "user_turns", "tool": "tool_turn", "reasoning": "reasoning_content"}
        return r.Report(
            schema=r.SCHEMA,
            tokenizer=name,
            template=self._template(),
            parsing=r.Parsing(
                reasoning=tuple(r.Delimiters(pair.open, pair.close) for pair in parser.pairs),
                segments=parser.channels is not None,
                tool_calls=tuple(r.Delimiters(row.open, row.close) for row in parser.formats),
                bare_json=parser.bare_json,
                response_template=parser.schema is not None,
            ),
            stop_tokens=stops,
            capabilities=capabilities,
            history=tuple(rewrites(self.template, self.samples)),
            warnings=tuple(self._missing_tokens()),
            drift=tuple(
                entry
                for turn, key in turns.items()
                for entry in drift(self.template, turn, self.samples.get(key), reasons[key])
            ),
        )

    # ------------------------------------------------------------------ facts
    def _template(self) -> r.Template:
        renderer = self.template.renderer
        prompt = _tried(lambda: _generation_prompt(self.template, [USER]), None)
        return r.Template(
            sha256=hashlib.sha256(renderer.source.encode()).hexdigest(),
            length=len(renderer.source),
            wants_parts=_tried(lambda: renderer.wants_parts, False),
            variables=self.variables,
            clock="strftime_now" in renderer.source,
            date=_tried(lambda: _date(self.template), None) or _tried(lambda: _date(self.equipped), None),
            generation_prompt=prompt,
            opens_reasoning=bool(prompt) and self.template.parser.opened_by(prompt or ""),
        )

    def _missing_tokens(self) -> Iterator[str]:
        """Warnings of what looks like a special token where the template writes it, and is none for the tokenizer."""
        calls, result = probes.calling(self.tools, 1), probes.result(self.tools)
        texts = [
            _tried(functools.partial(template.renderer.text, conversation, True), "")
            for template in (self.template, self.equipped)
            for conversation in ([SYSTEM, USER, ANSWER, NEXT], [USER, ANSWER, NEXT], [USER, calls, result])
        ]
        found = {match.group(): None for text in texts for match in _TOKEN_LIKE.finditer(text)}
        close = _tried(lambda: self.template.close([USER, ANSWER]), None)
        if close is not None and close.by_text and _TAG.fullmatch(close.body.strip()):
            found[close.body.strip()] = None
        codec = self.template.codec
        for token in found:
            [ids] = codec.encode_continuation([token])
            if token not in codec.controls and len(ids) > 1:
                pieces = " ".join(repr(codec.token_text(i)) for i in ids[:8]) + " ..." * (len(ids) > 8)
                yield (
                    f"the template writes {token!r}, a special token that the tokenizer does not have: it becomes "
                    f"{len(ids)} tokens of text ({pieces}), which a user or a tool can write too. This is the "
                    f"template of another tokenizer, or the tokenizer lacks tokens that its model was trained with."
                )

    # ------------------------------------------------------------------ capabilities
    def _capabilities(self) -> Iterator[r.Finding]:
        calls, result = probes.calling(self.tools, 1), probes.result(self.tools)
        inline = self._reasoned(ANSWER["content"], answer_opens=True)
        said = self._reasoned(ANSWER["content"], answer_opens=False)
        yield self._finding("user_turns", "user turns", [USER], ANSWER, [NEXT])
        yield self._finding(
            "user_turns_after_system", "user turns after a system prompt", [SYSTEM, USER], ANSWER, [NEXT]
        )
        yield self._finding(
            "system_mid_conversation", "a system message mid-conversation", [USER], ANSWER, [SYSTEM]
        )
        yield self._noted(self._finding("tool_turn", "tool turns, one call", [USER], calls, [result]))
        yield self._finding(
            "tool_turn_two_results",
            "tool turns, two results",
            [USER],
            probes.calling(self.tools, 2),
            [result, probes.result(self.tools, 1)],
        )
        raw = self._raw_call(calls, result)
        yield self._finding(
            "tool_turn_raw",
            "tool turns, the call as raw text",
            [USER],
            {**ANSWER, "content": raw},
            [result],
            said=raw,
        )
        yield self._with_tools(calls, result)
        yield self._finding(
            "reasoning_in_content",
            "reasoning in the content",
            [USER],
            {**ANSWER, "content": inline},
            [NEXT],
            said=said,
        )
        yield self._reasoning_content(said)
        yield self._finding("several_new_messages", "several new messages at once", [USER], ANSWER, [NEXT, MORE])
        yield self._finding(
            "result_and_user", "a tool result and a user message at once", [USER], calls, [result, NEXT]
        )
        yield self._finding("truncated_turns", "turns cut by a limit", [USER], ANSWER, [NEXT], ended=False)
        yield self._finding("empty_answers", "empty answers", [USER], {**ANSWER, "content": ""}, [NEXT])
        yield self._depth()

    def _finding(
        self,
        name: str,
        title: str,
        before: list[Message],
        answer: Message,
        new: list[Message],
        *,
        said: str | None = None,
        ended: bool = True,
        template: ChatTemplate | None = None,
    ) -> r.Finding:
        """One capability, tried on one conversation."""
        template = template or self.template
        conversation = [*before, answer, *new]
        start = time.perf_counter()
        try:
            turn = sample(template, before, answer, new, said=said, ended=ended)
        except errors() as error:
            took = _since(start)
            return r.Finding(name, title, *self._failed(template, conversation, len(before), error), took)
        took = _since(start)
        self.samples[name] = turn
        rendered = _renderings(template)
        template.extend(turn.ids, turn.messages, turn.new, ended=None if ended else False)
        mode = "rendered" if _renderings(template) > rendered else "compiled"
        tail = self._tail(template, turn)
        reason = self._own_rule(template, conversation)
        if reason is not None:
            return r.Finding(name, title, r.Status.UNSUPPORTED, mode, reason, None, took, tail)
        return r.Finding(name, title, r.Status.PROVED, mode, None, None, took, tail)

    def _failed(
        self, template: ChatTemplate, conversation: Sequence[Message], answered: int, error: Exception
    ) -> tuple[r.Status, None, str, str | None]:
        """Of a conversation that was not extended: unsupported by the template's own rule, or refused; why; a note."""
        own = self._own_rule(template, conversation)
        if own is not None:
            return r.Status.UNSUPPORTED, None, own, None
        text = _letters(template.renderer.text(conversation, True))
        answer = text.rfind(_letters(content_text(conversation[answered])))
        moved = [m["role"] for m in conversation[answered + 1 :] if text.rfind(_letters(content_text(m))) < answer]
        note = f"the template writes what is new ({moved[0]}) in front of the answer" if moved else None
        return r.Status.REFUSED, None, line(error), note

    def _own_rule(self, template: ChatTemplate, conversation: Sequence[Message]) -> str | None:
        """What the template itself has against a conversation: it raises, or leaves a message out."""
        try:
            text = template.renderer.text(conversation, True)
        except errors() as error:
            return line(error)
        for message in conversation:
            content = content_text(message).strip()
            if message["role"] != "assistant" and _letters(content) not in _letters(text):
                return f"the chat template leaves out a message of role {message['role']!r}: {content!r}."
        return None

    def _tail(self, template: ChatTemplate, turn: Sample) -> tuple[r.TailToken, ...]:
        """The end of the turn and what follows it, token by token."""
        ids, codec = turn.exact[len(turn.ids) :], template.codec
        closing = len(turn.close.suffix(turn.stop_id).ids)
        opening = _tried(lambda: _generation_prompt(template, [*turn.messages, *turn.new]), None) or ""
        first, length = len(ids), len("".join(opening.split()))  # some tokens swallow the blanks beside them
        while first > closing and len("".join(codec.decode([ids[first:]])[0].split())) < length:
            first -= 1
        origins = [r.Origin.CLOSE] * closing + [r.Origin.NEW] * (first - closing)
        origins += [r.Origin.GENERATION_PROMPT] * (len(ids) - first)
        sampled = [r.TailToken(i, codec.token_text(i), r.Origin.STOP) for i in turn.stop]
        return (*sampled, *(r.TailToken(i, codec.token_text(i), o) for i, o in zip(ids, origins, strict=True)))

    # ------------------------------------------------------------------ tools
    def _raw_call(self, calls: Message, result: Message) -> str:
        """The text of a call: as the template writes it, or in a form that many models write."""
        try:
            return sample(self.template, [USER], calls, [result]).text or probes.plain_call(calls)
        except errors():
            return probes.plain_call(calls)

    def _noted(self, finding: r.Finding) -> r.Finding:
        """Whether the template writes structured calls at all."""
        turn = self.samples.get(finding.name)
        if turn is None:
            return finding
        text = self.template.renderer.text([*turn.messages, *turn.new], True)
        note = None if PLACE in text else "the template leaves out tool_calls; the ledger keeps them as sampled"
        return replace(finding, note=note)

    def _with_tools(self, calls: Message, result: Message) -> r.Finding:
        name, title = "tools_in_prompt", "tools in the system prompt"
        finding = self._finding(name, title, [USER], calls, [result], template=self.equipped)
        bare = _tried(lambda: self.template.renderer.text([USER], True), "")
        text = _tried(lambda: self.equipped.renderer.text([USER], True), "")
        if finding.status is r.Status.PROVED and (text == bare or probes.tool_name(self.tools) not in text):
            reason = "the chat template does not write the tools that it is given."
            return replace(finding, status=r.Status.UNSUPPORTED, reason=reason)
        return finding

    # ------------------------------------------------------------------ reasoning
    def _reasoned(self, content: str, answer_opens: bool) -> str:
        """An answer with reasoning in the template's own delimiters, or in ``<think>`` if it has none."""
        parser = self.template.parser
        pair = parser.pairs[0] if parser.pairs else r.Delimiters("<think>", "</think>")
        opened = not answer_opens and self._opens()
        return f"{'' if opened else pair.open + chr(10)}{REASONING}\n{pair.close}\n\n{content}"

    def _opens(self) -> bool:
        prompt = _tried(lambda: self.template.renderer.text([USER], True), "")
        return self.template.parser.opened_by(prompt)

    def _reasoning_content(self, said: str) -> r.Finding:
        """Reasoning as a field of the message; sampled as the template writes it, where it does."""
        name, title = "reasoning_content", "reasoning as reasoning_content"
        answer = {**ANSWER, "reasoning_content": REASONING}
        text = _tried(lambda: self.template.renderer.text([USER, answer], False), "")
        shown = REASONING in text
        finding = self._finding(name, title, [USER], answer, [NEXT], said=None if shown else said)
        if finding.status is r.Status.PROVED and not shown:
            note = "the template leaves out reasoning_content; the ledger keeps it as sampled"
            return replace(finding, note=note)
        return finding

    def _sample_reasoned_call(self) -> None:
        """A call behind reasoning, where the template writes both: what history policy ``"template"`` must follow."""
        answer = {**probes.calling(self.tools, 1), "reasoning_content": REASONING}
        turn = _tried(lambda: sample(self.template, [USER], answer, [probes.result(self.tools)]), None)
        text = "" if turn is None else self.template.codec.decode([turn.ids])[0]
        if turn is not None and REASONING in text and PLACE in text:
            self.samples["reasoned_call"] = turn

    # ------------------------------------------------------------------ depth
    def _depth(self) -> r.Finding:
        """Many turns, each extended from the one before."""
        name, title = "depth", f"{DEPTH} turns"
        messages, ids = [USER], None
        start, modes, turn = time.perf_counter(), set(), None
        for k in range(DEPTH):
            new: list[Message] = [{"role": "user", "content": f"And number {k}?"}]
            answer: Message = {"role": "assistant", "content": f"That is {k}."}
            rendered = 0
            try:
                turn = sample(self.template, messages, answer, new, ids=ids)
                rendered = _renderings(self.template)
                self.template.extend(turn.ids, turn.messages, turn.new)
            except errors() as error:
                took = _since(start)
                conversation = [*messages, answer, *new]
                status, _, why, note = self._failed(self.template, conversation, len(messages), error)
                return r.Finding(name, title, status, None, f"turn {k + 1}: {why}", note, took)
            modes.add("rendered" if _renderings(self.template) > rendered else "compiled")
            messages, ids = [*turn.messages, *new], turn.exact
        assert turn is not None
        whole = _tried(lambda: self.template.render(messages), None)
        note = None if whole == ids else "the template, rendered anew, writes another past than the model saw"
        mode = "compiled" if modes == {"compiled"} else "rendered"
        return r.Finding(
            name, title, r.Status.PROVED, mode, None, note, _since(start), self._tail(self.template, turn)
        )


# ---------------------------------------------------------------------- small parts
def _made(tokenizer: Any, **options: Any) -> ChatTemplate:
    """The template, if Jinja can parse it."""
    import jinja2

    try:
        return ChatTemplate(tokenizer, **options)
    except ChatTemplateError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise BrokenTemplateError(str(error)) from error
        raise


def _generation_prompt(template: ChatTemplate, messages: Sequence[Message]) -> str:
    text = template.renderer.text(messages, True)
    at = shared(text, template.renderer.text(messages, False))
    # What only the last message has (<|endoftext|>) may begin like what opens the turn (<|assistant|>).
    inside = (match.start() for match in template.codec.control_tokens(text) if match.start() < at < match.end())
    return text[next(inside, at) :]


def _date(template: ChatTemplate) -> str | None:
    """Today's date as it stands in a prompt: what changes if it is another day."""
    today = template.renderer.text([USER], True)
    with at_another_time():
        later = template.renderer.text([USER], True)
    if today == later:
        return None
    line = today[today.rfind("\n", 0, shared(today, later)) + 1 :]
    return line.split("\n", 1)[0][:80]


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isalnum())


def _since(start: float) -> float:
    return round(1e3 * (time.perf_counter() - start), 2)


def _tried(ask: Callable[[], Any], default: Any) -> Any:
    try:
        return ask()
    except errors():
        return default


@contextmanager
def _counted(template: ChatTemplate) -> Iterator[None]:
    """Count how often the template is rendered: a compiled turn renders nothing."""
    renderer, original = template.renderer, template.renderer.text

    def text(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        vars(renderer)["renderings"] = _renderings(template) + 1
        return original(messages, add_generation_prompt)

    vars(renderer)["text"] = text
    try:
        yield
    finally:
        vars(renderer).pop("text", None)


def _renderings(template: ChatTemplate) -> int:
    return vars(template.renderer).get("renderings", 0)
