"""Which turns a template writes anew once the next message follows: where history policy ``"template"`` branches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torchrl_chat.templates.chat_template import ChatTemplate
from torchrl_chat.templates.kinds import Course
from torchrl_chat.templates.report import Rewrite
from torchrl_chat.templates.rewriting import Span
from torchrl_chat.templates.samples import Sample, errors, line, shared

TURNS = {
    "user": "user_turns",
    "user after system": "user_turns_after_system",
    "tool": "tool_turn",
    "reasoning and tool": "reasoned_call",
    "reasoning": "reasoning_content",
}
"""The kinds of turn, and the name of the sample that shows each."""


def rewrites(template: ChatTemplate, samples: Mapping[str, Sample]) -> Iterator[Rewrite]:
    """What becomes of each kind of turn.

    Args:
        template: the template.
        samples: sampled turns, by their names.
    """
    for kind, name in TURNS.items():
        if name in samples:
            yield _rewritten(template, kind, samples[name])
        else:
            yield Rewrite(kind, None, reason="such turns are not extended")


def _rewritten(template: ChatTemplate, kind: str, turn: Sample) -> Rewrite:
    prompt, sampled = turn.ids[: turn.start], turn.ids[turn.start :]
    try:
        [parsed] = template.parse_batch([sampled], [Course.of(turn.messages[:-1])], prompts=[prompt])
        messages = [*turn.messages[:-1], parsed.message]
        span = Span(len(messages) - 1, turn.start, len(turn.ids), parsed.stop)
        rewritten = template.rewrite(turn.ids, [span], messages, turn.new)
    except errors() as error:
        return Rewrite(kind, None, reason=line(error))
    if rewritten is None:
        return Rewrite(kind, False)
    before, after = template.codec.decode([turn.ids, rewritten.ids])
    return Rewrite(kind, True, *_around(before, after))


def _around(before: str, after: str, margin: int = 24) -> tuple[str, str]:
    """Two texts from shortly in front of their first difference to shortly behind the last one."""
    first = shared(before, after)
    rest = min(len(before), len(after)) - first
    last = min(shared(before[::-1], after[::-1]), rest)
    start, end = max(first - margin, 0), max(last - margin, 0)
    return before[start : len(before) - end], after[start : len(after) - end]
