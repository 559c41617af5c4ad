"""Which kinds of turn a chat template's bridge proves, what it writes there, and what becomes of earlier turns.

Every capability is one conversation, sampled as the template writes it and extended as an environment extends it.
What fails is asked of the template itself: does it raise at such a turn, does it leave a message out?

Law of this file: a finding is what was tried on this tokenizer and this template, just now; nothing is known of any
model by its name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jinja2

from torchrl_chat.audit import report as r
from torchrl_chat.audit.drift import drift
from torchrl_chat.audit.samples import ERRORS, Sample, line, sample
from torchrl_chat.messages import Message, content_text
from torchrl_chat.templates.bridge import loosely, shared_prefix
from torchrl_chat.templates.capabilities import ANSWER, DEPTH, NEXT, REASONING, SYSTEM, USER, Probe, probes
from torchrl_chat.templates.chat_template import ChatTemplate
from torchrl_chat.templates.dialects import Pair
from torchrl_chat.templates.rendering import ChatTemplateError, at_another_time, remembered_texts
from torchrl_chat.templates.rewriting import Span

PLACE = "Zermatt"  # stands in calls alone: where it is missing, the template leaves calls out
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_elevation",
        "description": "Says how high a place is.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Name of the place."},
                "digits": {"type": "integer", "description": "How many digits to give."},
                "feet": {"type": "boolean", "description": "Whether to give feet instead of metres."},
                "sources": {"type": "array", "items": {"type": "string"}, "description": "Where to look."},
            },
            "required": ["place"],
        },
    },
}
_BY_TYPE = {"integer": 3, "number": 0.5, "boolean": True, "array": ["atlas", "survey"], "object": {"unit": "m"}}
_PAST = {
    "user": "user_turns",
    "user after system": "user_turns_after_system",
    "tool": "tool_turn",
    "reasoning and tool": "reasoned_call",
    "reasoning": "reasoning_content",
}
"""The kinds of earlier turn, and the name of the sample that shows each."""
_DRIFT = {"user": "user_turns", "tool": "tool_turn", "reasoning": "reasoning_content"}
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
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> report = audit(tokenizer)
        >>> report["user_turns"].status
        <Status.PROVED: 'proved'>
        >>> [token.text for token in report["user_turns"].tail][:2]
        ['<|end|>', '<|user|>']
    """
    options = {"chat_template": chat_template, "parse_tool_calls": True, **template_kwargs}
    tools = list(tools or [TOOL])
    try:
        template, equipped = ChatTemplate(tokenizer, **options), ChatTemplate(tokenizer, tools=tools, **options)
    except ChatTemplateError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise BrokenTemplateError(str(error)) from error
        raise
    with remembered_texts():
        return _Audit(template, equipped, tools[0]["function"], template_kwargs).report()


class _Audit:
    """One audit: the template, the same with tools, and the samples that several parts look at.

    Args:
        template: the template without tools.
        equipped: the template with them.
        tool: the first tool, ``{"name": ..., "parameters": ...}``.
        variables: further variables of the template.
    """

    def __init__(self, template: ChatTemplate, equipped: ChatTemplate, tool: Any, variables: dict[str, Any]):
        self.template = template
        self.equipped = equipped
        self.tool = tool["name"]
        self.variables = variables
        self.probes = {probe.name: probe for probe in probes(self.tool, _arguments(tool))}
        self.samples: dict[str, Sample] = {}

    def report(self) -> r.Report:
        """All of it."""
        parser, codec = self.template.parser, self.template.codec
        own: dict[str, Callable[[Probe], r.Finding]] = {
            "tool_turn": self._tool_turn,
            "tool_turn_raw": self._raw_call,
            "tools_in_prompt": self._with_tools,
            "reasoning_in_content": self._inline,
            "reasoning_content": self._reasoning_content,
            "depth": self._depth,
        }
        capabilities = tuple(own.get(name, self._finding)(probe) for name, probe in self.probes.items())
        self._sample_reasoned_call()
        stops = tuple(r.Token(i, codec.token_text(i)) for i in sorted(_tried(lambda: self.template.stop_ids, ())))
        reasons = {finding.name: finding.reason or "" for finding in capabilities}
        return r.Report(
            schema=r.SCHEMA,
            tokenizer=getattr(self.template.tokenizer, "name_or_path", "")
            or type(self.template.tokenizer).__name__,
            template=self._template(),
            parsing=r.Parsing(
                reasoning=parser.pairs,
                segments=parser.channels is not None,
                tool_calls=tuple(Pair(row.open, row.close) for row in parser.formats),
                bare_json=parser.bare_json,
                response_template=parser.schema is not None,
            ),
            stop_tokens=stops,
            capabilities=capabilities,
            history=tuple(self._past(turn, self.samples.get(name)) for turn, name in _PAST.items()),
            warnings=tuple(self._missing_tokens()),
            drift=tuple(
                entry
                for turn, name in _DRIFT.items()
                for entry in drift(self.template, turn, self.samples.get(name), reasons[name])
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
            clock=renderer.tells_time,
            date=_tried(lambda: _date(self.template), None) or _tried(lambda: _date(self.equipped), None),
            generation_prompt=prompt,
            opens_reasoning=bool(prompt) and self.template.parser.opened_by(prompt or ""),
        )

    def _missing_tokens(self) -> Iterator[str]:
        """Warnings of what looks like a special token where the template writes it, and is none for the tokenizer."""
        tool_turn = self.probes["tool_turn"]
        texts = [
            _tried(functools.partial(template.renderer.text, conversation, True), "")
            for template in (self.template, self.equipped)
            for conversation in (
                [SYSTEM, USER, ANSWER, NEXT],
                [USER, ANSWER, NEXT],
                [*tool_turn.messages, *tool_turn.new],
            )
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
    def _finding(self, probe: Probe, said: str | None = None, template: ChatTemplate | None = None) -> r.Finding:
        """One capability, tried on one conversation."""
        template = template or self.template
        start = time.perf_counter()
        try:
            turn = sample(
                template, probe.messages[:-1], probe.messages[-1], probe.new, said=said, ended=probe.stopped
            )
        except ERRORS as error:
            took = _since(start)
            status, why, note = self._failed(
                template, [*probe.messages, *probe.new], len(probe.messages) - 1, error
            )
            return r.Finding(probe.name, probe.title, status, None, why, note, took)
        took = _since(start)
        self.samples[probe.name] = turn
        mode, tail = _mode(template, turn), self._tail(template, turn)
        reason = self._own_rule(template, [*probe.messages, *probe.new])
        status = r.Status.PROVED if reason is None else r.Status.UNSUPPORTED
        return r.Finding(probe.name, probe.title, status, mode, reason, None, took, tail)

    def _failed(
        self, template: ChatTemplate, conversation: Sequence[Message], answered: int, error: Exception
    ) -> tuple[r.Status, str, str | None]:
        """Of a conversation that was not extended: unsupported by the template's own rule, or refused; why; a note."""
        own = self._own_rule(template, conversation)
        if own is not None:
            return r.Status.UNSUPPORTED, own, None
        text = loosely(template.renderer.text(conversation, True))
        answer = text.rfind(loosely(content_text(conversation[answered])))
        moved = [m["role"] for m in conversation[answered + 1 :] if text.rfind(loosely(content_text(m))) < answer]
        note = f"the template writes what is new ({moved[0]}) in front of the answer" if moved else None
        return r.Status.REFUSED, line(error), note

    def _own_rule(self, template: ChatTemplate, conversation: Sequence[Message]) -> str | None:
        """What the template itself has against a conversation: it raises, or leaves a message out."""
        try:
            text = template.renderer.text(conversation, True)
        except ERRORS as error:
            return line(error)
        for message in conversation:
            content = content_text(message).strip()
            if message["role"] != "assistant" and loosely(content) not in loosely(text):
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
    def _tool_turn(self, probe: Probe) -> r.Finding:
        """Also whether the template writes structured calls at all."""
        finding = self._finding(probe)
        turn = self.samples.get(probe.name)
        if turn is None or PLACE in self.template.renderer.text([*turn.messages, *turn.new], True):
            return finding
        return replace(finding, note="the template leaves out tool_calls; the ledger keeps them as sampled")

    def _raw_call(self, probe: Probe) -> r.Finding:
        """The text of a call: as the template writes it, or in a form that many models write."""
        [question, call], new = self.probes["tool_turn"].messages, probe.new
        raw = _tried(lambda: sample(self.template, [question], call, new).text, "")
        if not raw:
            function = call["tool_calls"][0]["function"]
            arguments = json.dumps(function["arguments"])
            raw = f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
        return self._finding(probe._replace(messages=(question, {**ANSWER, "content": raw})), said=raw)

    def _with_tools(self, probe: Probe) -> r.Finding:
        finding = self._finding(probe, template=self.equipped)
        bare = _tried(lambda: self.template.renderer.text([USER], True), "")
        text = _tried(lambda: self.equipped.renderer.text([USER], True), "")
        if finding.status is r.Status.PROVED and (text == bare or self.tool not in text):
            reason = "the chat template does not write the tools that it is given."
            return replace(finding, status=r.Status.UNSUPPORTED, reason=reason)
        return finding

    # ------------------------------------------------------------------ reasoning
    def _inline(self, probe: Probe) -> r.Finding:
        answer = {**ANSWER, "content": self._reasoned(answer_opens=True)}
        return self._finding(probe._replace(messages=(USER, answer)), said=self._reasoned(answer_opens=False))

    def _reasoned(self, answer_opens: bool) -> str:
        """An answer with reasoning in the template's own delimiters, or in ``<think>`` if it has none."""
        parser = self.template.parser
        pair = parser.pairs[0] if parser.pairs else Pair("<think>", "</think>")
        prompt = _tried(lambda: self.template.renderer.text([USER], True), "")
        opening = f"{pair.open}\n" if answer_opens or not parser.opened_by(prompt) else ""
        return f"{opening}{REASONING}\n{pair.close}\n\n{ANSWER['content']}"

    def _reasoning_content(self, probe: Probe) -> r.Finding:
        """Reasoning as a field of the message; sampled as the template writes it, where it does."""
        shown = REASONING in _tried(lambda: self.template.renderer.text(probe.messages, False), "")
        finding = self._finding(probe, said=None if shown else self._reasoned(answer_opens=False))
        if finding.status is r.Status.PROVED and not shown:
            note = "the template leaves out reasoning_content; the ledger keeps it as sampled"
            return replace(finding, note=note)
        return finding

    def _sample_reasoned_call(self) -> None:
        """A call behind reasoning, where the template writes both: what history policy ``"template"`` must follow."""
        [question, call], new = self.probes["tool_turn"].messages, self.probes["tool_turn"].new
        answer = {**call, "reasoning_content": REASONING}
        turn = _tried(lambda: sample(self.template, [question], answer, new), None)
        text = "" if turn is None else self.template.codec.decode([turn.ids])[0]
        if turn is not None and REASONING in text and PLACE in text:
            self.samples["reasoned_call"] = turn

    # ------------------------------------------------------------------ depth
    def _depth(self, probe: Probe) -> r.Finding:
        """Many turns, each extended from the one before."""
        messages, ids = [USER], None
        start, modes, turn = time.perf_counter(), set(), None
        for k in range(DEPTH):
            new: list[Message] = [{"role": "user", "content": f"And number {k}?"}]
            answer: Message = {"role": "assistant", "content": f"That is {k}."}
            try:
                turn = sample(self.template, messages, answer, new, ids=ids)
                modes.add(_mode(self.template, turn))
            except ERRORS as error:
                took = _since(start)
                conversation = [*messages, answer, *new]
                status, why, note = self._failed(self.template, conversation, len(messages), error)
                return r.Finding(probe.name, probe.title, status, None, f"turn {k + 1}: {why}", note, took)
            messages, ids = [*turn.messages, *new], turn.exact
        assert turn is not None
        whole = _tried(lambda: self.template.render(messages), None)
        note = None if whole == ids else "the template, rendered anew, writes another past than the model saw"
        mode = "compiled" if modes == {"compiled"} else "rendered"
        tail = self._tail(self.template, turn)
        return r.Finding(probe.name, probe.title, r.Status.PROVED, mode, None, note, _since(start), tail)

    # ------------------------------------------------------------------ earlier turns
    def _past(self, kind: str, turn: Sample | None) -> r.Rewrite:
        """What becomes of a kind of turn once the next message follows: history policy ``"template"`` branches there."""
        if turn is None:
            return r.Rewrite(kind, None, reason="such turns are not extended")
        try:
            parsed = turn.parsed(self.template)
            messages = [*turn.messages[:-1], parsed.message]
            span = Span(len(messages) - 1, turn.start, len(turn.ids), parsed.stop)
            rewritten = self.template.rewrite(turn.ids, [span], messages, turn.new)
        except ERRORS as error:
            return r.Rewrite(kind, None, reason=line(error))
        if rewritten is None:
            return r.Rewrite(kind, False)
        before, after = self.template.codec.decode([turn.ids, rewritten.ids])
        return r.Rewrite(kind, True, *_around(before, after))


# ---------------------------------------------------------------------- small parts
def _arguments(tool: Any) -> dict[str, Any]:
    """A value for every argument that a tool has."""
    properties = (tool.get("parameters") or {}).get("properties") or {"place": None}
    arguments: dict[str, Any] = {}
    for name, schema in properties.items():
        kind = schema.get("type") if isinstance(schema, dict) else None
        arguments[name] = _BY_TYPE.get(kind, PLACE) if arguments and isinstance(kind, str) else PLACE
    return arguments


def _mode(template: ChatTemplate, turn: Sample) -> str:
    """Whether another turn like this one costs a rendering."""
    rendered = template.renderer.renderings
    template.extend(turn.ids, turn.messages, turn.new, ended=None if turn.ended else False)
    return "rendered" if template.renderer.renderings > rendered else "compiled"


def _generation_prompt(template: ChatTemplate, messages: Sequence[Message]) -> str:
    text = template.renderer.text(messages, True)
    at = len(shared_prefix([text, template.renderer.text(messages, False)]))
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
    line = today[today.rfind("\n", 0, len(shared_prefix([today, later]))) + 1 :]
    return line.split("\n", 1)[0][:80]


def _around(before: str, after: str, margin: int = 24) -> tuple[str, str]:
    """Two texts from shortly in front of their first difference to shortly behind the last one."""
    first = len(shared_prefix([before, after]))
    last = min(len(shared_prefix([before[::-1], after[::-1]])), min(len(before), len(after)) - first)
    start, end = max(first - margin, 0), max(last - margin, 0)
    return before[start : len(before) - end], after[start : len(after) - end]


def _since(start: float) -> float:
    return round(1e3 * (time.perf_counter() - start), 2)


def _tried(ask: Callable[[], Any], default: Any) -> Any:
    try:
        return ask()
    except ERRORS:
        return default
