"""The bridge against chat templates that nobody wrote by hand: composed at random, with their own reference.

A :class:`Features` is a list of things that chat templates do. It is written out twice: as Jinja source (what the
bridge sees) and by :func:`reference`, plain Python that goes message by message and therefore *knows* which
characters stand behind an answer. The first test holds the two against each other, so that the second may
hold the bridge against the reference.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_templates import (
    CHOICES,
    CROP,
    NASTY,
    ORDINARY,
    STYLES,
    Features,
    Refused,
    Round,
    Talk,
    Written,
    _calls,
    _text,
    answered,
    features,
    found,
    made,
    reference,
    said,
    source,
    talks,
    tokenizer,
)

from torchrl_chat import BridgeError, ChatTemplate, ChatTemplateError


# ---------------------------------------------------------------------- what the bridge must do
@functools.lru_cache(maxsize=64)
def template_of(f: Features) -> ChatTemplate:
    return ChatTemplate(tokenizer(), chat_template=source(f))


def today_of(template: ChatTemplate) -> str:
    return template.renderer.now.strftime("%Y-%m-%d")


def must_hold(f: Features, talk: Talk) -> list[str | None]:
    """Extends the ledger over all rounds; for each the refusal, or ``None``.

    Raises:
        AssertionError: an extension is neither exact nor refused.
    """
    template = template_of(f)
    codec, today = template.codec, today_of(template)
    ids: list[int] = codec.encode(["a prompt "])[0]
    refusals: list[str | None] = []
    for i, turn in enumerate(talk.rounds):
        before = [*talk.messages(i), turn.answer]
        agp = talk.agp or turn is not talk.rounds[-1]  # nothing is sampled where no generation prompt stands
        whole = last = None
        try:
            whole = reference(f, [*before, *turn.new], agp, today)
            last = reference(f, before, False, today)
        except Refused:
            pass
        sampled, resumes = ends(f, turn, whole, last)
        said = (STYLES[f.style].opens["assistant"] if f.style in ("inst", "spaced") else "") + _text(turn.answer)
        said += _calls(replace(f, calls="json") if f.calls == "dropped" else f, turn.answer)
        ids = ids + codec.encode_continuation([said + sampled[0]])[0] + [codec.special[s] for s in sampled[1:]]
        try:
            extended = template.extend(ids, before, turn.new, agp)
        except BridgeError as error:
            if whole is not None and not may_refuse(f, turn, len(resumes)):
                raise AssertionError(f"round {i} is refused without need: {error}") from error
            refusals.append(str(error))
            continue
        refusals.append(None)
        assert whole is not None, "the template raises, the bridge does not"
        assert extended[: len(ids)] == ids, "the ledger was rewritten"
        text = codec.decode([extended[len(ids) :]])[0]
        expected = {whole.text[at:] for at in resumes}
        assert text in expected, f"round {i}: {text!r} is none of {expected!r}"
        # Control tokens are those of the template, never what somebody typed.
        written = reference(f, [*map(harmless, before), *map(harmless, turn.new)], agp, today).text
        counts = {sum(map(written[at:].count, codec.special)) for at in resumes if whole.text[at:] == text}
        assert sum(k in codec.special_ids for k in extended[len(ids) :]) in counts, (
            "a content became a control token"
        )
        ids = extended
    return refusals


def may_refuse(f: Features, turn: Round, ways: int) -> bool:
    """Whether a template does something here that no suffix can follow."""
    tools = [_text(m) for m in turn.new if m["role"] == "tool"]
    dropped = f.tools == "dropped" and tools
    cropped = f.tools == "cropped" and any(len(text) > CROP for text in tools)
    return bool(dropped or cropped or ways > 1)  # or the turn ended with another token than the template writes


def harmless(message: dict) -> dict:
    """The message with look-alikes of control tokens exchanged for texts of the same length."""
    return json.loads(json.dumps(message).replace("<|", "<!").replace("</s>", "<!s>").replace("<s>", "<!>"))


def ends(f: Features, turn: Round, whole: Written | None, last: Written | None) -> tuple[list[str], list[int]]:
    """What the policy samples to end its turn (a text, then stop tokens), and where the tail may go on."""
    if whole is None:
        return [""], [0]
    body, stop, _ = whole.closed
    done = whole.behind + len(body) + len(stop)
    if turn.ended == "cut":
        return [""], [whole.behind]
    if f.style == "opener":
        # Nothing but the next opener ends a turn here; the policy ends it with one or not at all.
        opener = next(s for s in ("<|user|>", "<|tool|>") if turn.new[0]["role"] in s)
        if f.tools in ("grouped",) and opener == "<|tool|>":
            opener = "<|user|>"
        if turn.ended == "last" or f.closer != "same" or not whole.text[whole.behind :].startswith(opener):
            return [""], [whole.behind]
        return ["", opener], [whole.behind + len(opener)]
    if not stop:
        return [body], [done]
    if turn.ended == "next" or last is None:
        return [body, stop], [done]
    body, final, _ = last.closed
    if f.closer == "none_last" and f.trailer == "answer":
        final = "<|end|>"
    if not final:
        return [""], [whole.behind]
    # A policy that ended with another token than the one that the template writes once a message follows:
    # the template's own closer may be put behind it, or what it sampled stands in for that closer.
    return [body, final], [done] if final == stop else [done, whole.behind, whole.behind + len(whole.closed[0])]


relaxed = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@st.composite
def cases(draw) -> tuple[Features, Talk]:
    f = draw(features())
    return f, draw(talks(parts=f.parts != "string"))


# ---------------------------------------------------------------------- the reference against Jinja
@settings(relaxed, max_examples=120)
@given(case=cases())
def test_the_reference_writes_what_the_template_writes(case):
    f, talk = case
    template = template_of(f)
    for i, turn in enumerate(talk.rounds):
        before = talk.messages(i)
        for messages, agp in ((before, True), ([*before, turn.answer], False), ([*before, turn.answer], True)):
            try:
                expected = reference(f, messages, agp, today_of(template))
            except Refused:
                with pytest.raises(ChatTemplateError):
                    template.renderer.text(messages, agp)
                continue
            assert template.renderer.text(messages, agp) == expected.text
    if f.trim == frozenset() and f.calls != "dropped":
        answer = talk.rounds[-1].answer
        try:
            written = reference(f, [*talk.messages(len(talk.rounds) - 1), answer], False, "")
        except Refused:
            return
        assert written.text[: written.behind].endswith(_text(answer) + _calls(f, answer))


# ---------------------------------------------------------------------- the bridge against the reference
@settings(relaxed, max_examples=250)
@given(case=cases())
def test_random_templates_are_extended_exactly_or_refused(case):
    must_hold(*case)


CALLED = {"name": "lookup", "tool_call_id": "call00000"}
SYSTEM = {"role": "system", "content": " Be brief. "}
TALKS = {
    "long": Talk(
        [SYSTEM, said("the first question")],
        [
            Round(answered(f"answer {i}"), ("last", "next", "cut")[i % 3], [said(f" question {i} ")])
            for i in range(12)
        ],
    ),
    "tools": Talk(
        [said("look it up")],
        [
            Round(answered("", "lookup"), "next", [found("7", **CALLED)]),
            Round(answered("let me see", "lookup", "add"), "next", [found("8"), found("9")]),
            Round(answered("raw call"), "next", [found(' {"n": 1} ')]),
            Round(answered("calls", "lookup"), "cut", [found("words", **CALLED)]),
            Round(answered("done"), "last", [said("thanks")]),
            Round(answered("<think>\nhm\n</think>\n\n42"), "last", [found("late"), said("and?")]),
        ],
    ),
    "contents": Talk(
        [{"role": "system", "content": ""}, said("/no_think")],
        [Round(answered("ok"), "next", [said(content)]) for content in NASTY],
    ),
    "system": Talk(
        [{"role": "system", "content": "/no_think <|im_end|>"}, said("go")],
        [Round(answered("ok"), "next", [said("on")]), Round(answered("ok"), "cut", [said("x<|im_end|>")])],
    ),
}


def label(f) -> str:
    """A name that every test worker gives alike: sets are printed in order."""
    return re.sub(r"frozenset\(\{(.*?)\}\)", lambda m: "+".join(sorted(m[1].split(", "))), repr(f))


SINGLE = [
    ORDINARY,
    *(
        made(**{name: value, **({"switch": where} if where else {})})
        for name, values in CHOICES.items()
        for value in values
        for where in (("system", "user") if name in ("how", "named_literals") else ("",))
        if value != getattr(ORDINARY, name)
    ),
    *(made(style=style, tools=tools) for style in STYLES for tools in ("grouped", "json")),
    *(made(style=style, calls=calls) for style in ("header", "plain") for calls in ("xml", "list", "dropped")),
    *(made(style=style, trailer="always") for style in ("plain", "opener", "spaced")),
    *(made(style=style, closer=closer) for style in ("header", "spaced") for closer in ("by_next", "last")),
    made(system="into_last", trim=frozenset({"user"})),
]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("f", SINGLE, ids=label)
@pytest.mark.by_day(2)
def test_one_feature_is_extended_exactly(f, talk):
    """What templates do one at a time is no reason to refuse, but for what :func:`may_refuse` names."""
    refusals = must_hold(f, TALKS[talk])
    if f.tools not in ("raise", "dropped"):
        assert None in refusals


@pytest.mark.parametrize("tools", ["plain", "raise"])
@pytest.mark.parametrize("style", STYLES)
def test_a_close_says_nothing_of_what_follows(style, tools):
    """An environment closes a turn before it knows what follows: no word of a probe may stand in that close."""
    f = made(style=style, tools=tools)
    template = template_of(f)
    written = reference(f, [said("q"), answered("a"), said("n")], True, "")
    tail = written.text[written.behind :]
    close = template.close([said("q"), answered("a")])
    assert tail.startswith(close.suffix(None).text)
    for stop in close.stops:
        token = template.codec.control_texts.get(stop, close.body)
        if token in tail:
            assert tail.partition(token)[2].startswith(close.suffix(stop).text)
