"""Other ways to the next prompt, and whether they give the exact one on a template.

Three that are in wide use are tried, each in its plain form: rendering and tokenizing the whole conversation again;
the suffix that the new messages have behind a dummy turn, cut at the last end-of-sequence token; and the
tokens by which a fixed conversation grows. None of them looks at what was sampled, and that is where they differ.

Law of this file: a method is compared by its ids, with what an environment would feed the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchrl_chat.audit.report import Drift
from torchrl_chat.audit.samples import ERRORS, Sample, line, other_tokens
from torchrl_chat.messages import Message
from torchrl_chat.templates.bridge import shared_prefix
from torchrl_chat.templates.chat_template import ChatTemplate
from torchrl_chat.templates.kinds import call_of

METHODS = {
    "rerender": "render and tokenize everything again, canonical tokens sampled",
    "rerender_other_tokens": "the same, other tokens of the same text sampled",
    "dummy_suffix": "suffix behind a dummy turn, cut at the last eos (as TRL does)",
    "fixed_base": "difference on a fixed conversation (as verl does)",
}
"""What the methods are, for people."""

_SHOWN = 4  # tokens of a difference


def drift(template: ChatTemplate, turn: str, sample: Sample | None, reason: str = "") -> list[Drift]:
    """Every method on one turn.

    Args:
        template: the template.
        turn: what to call the turn.
        sample: the turn; ``None`` if its exact prompt is not proved.
        reason: why it is not.
    """
    if sample is None:
        return [Drift(turn, method, None, reason or None) for method in METHODS]
    ways = {"rerender": rerendered, "dummy_suffix": dummy_suffix, "fixed_base": fixed_base}
    found = {name: _compared(template, turn, name, sample, way) for name, way in ways.items()}
    name, other = "rerender_other_tokens", other_tokens(template, sample)
    if other is None:
        found[name] = Drift(turn, name, None, "the tokenizer has one way only to write this answer")
    else:
        found[name] = _compared(template, turn, name, other, rerendered)
    return [found[method] for method in METHODS]


def rerendered(template: ChatTemplate, sample: Sample) -> list[int]:
    """The whole conversation, rendered and tokenized again, with the answer as it is read out of its ids.

    That is what a loop holds that keeps messages.
    """
    message, said = sample.parsed(template).message, sample.messages[-1].get("tool_calls")
    if said and message.get("tool_calls"):  # ids of calls are made up in parsing; results name those of the probe
        calls = [{**a, "id": b["id"]} for a, b in zip(message["tool_calls"], said, strict=False)]
        message = {**message, "tool_calls": calls}
    return template.render([*sample.messages[:-1], message, *sample.new])


def dummy_suffix(template: ChatTemplate, sample: Sample) -> list[int]:
    """What the new messages add behind a dummy turn; what the policy ends its turn with is cut off.

    Raises:
        ValueError: the dummy turn is not rendered alike with and without the new messages.
    """
    answer: Message = {"role": sample.messages[-1]["role"], "content": "dummy"}
    if results := [message for message in sample.new if message["role"] == "tool"]:
        calls = [call_of(m.get("name", "dummy"), {}, m.get("tool_call_id", "dummy0000")) for m in results]
        answer = {**answer, "content": "", "tool_calls": calls}
    base = [{"role": "user", "content": "dummy"}, answer]
    without, whole = _rendered(template, base, sample.new)
    eos = template.tokenizer.eos_token_id
    if eos in without:
        without = without[: len(without) - without[::-1].index(eos)]
    if whole[: len(without)] != without:
        at = len(shared_prefix([whole, without]))
        raise ValueError(
            f"the dummy turn changes once a message follows it: {_shown(template, without[at:])} becomes "
            f"{_shown(template, whole[at:])}"
        )
    return sample.ids + whole[len(without) :]


def fixed_base(template: ChatTemplate, sample: Sample) -> list[int]:
    """The tokens by which a fixed conversation grows when the new messages are put behind it."""
    base = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "I am a user."},
    ]
    without, whole = _rendered(template, base, sample.new)
    return sample.ids + whole[len(without) :]


def _rendered(
    template: ChatTemplate, base: Sequence[Message], new: Sequence[Message]
) -> tuple[list[int], list[int]]:
    texts = [template.renderer.text(base, False), template.renderer.text([*base, *new], True)]
    without, whole = template.codec.encode(texts)
    return without, whole


def _compared(
    template: ChatTemplate,
    turn: str,
    name: str,
    sample: Sample,
    method: Callable[[ChatTemplate, Sample], list[int]],
) -> Drift:
    try:
        ids = method(template, sample)
    except ERRORS as error:
        return Drift(turn, name, False, line(error))
    if ids == sample.exact:
        return Drift(turn, name, True)
    at = len(shared_prefix([ids, sample.exact]))
    where = "prompt" if at < sample.start else "answer" if at < len(sample.ids) else "tail"
    differs = f"{_shown(template, ids[at:])} instead of {_shown(template, sample.exact[at:])}"
    return Drift(turn, name, False, f"token {at} ({where}): {differs}")


def _shown(template: ChatTemplate, ids: Sequence[int]) -> str:
    """The first tokens, each for itself: texts can be alike where tokens are not."""
    texts = " ".join(repr(template.codec.token_text(i)) for i in ids[:_SHOWN])
    return (texts if len(ids) <= _SHOWN else f"{texts} …") or "the end"
