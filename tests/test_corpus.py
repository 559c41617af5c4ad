"""Every development template of the shared corpus: the shared harness, look-alikes, and the template's own mask.

What is expected of a template is read off its own rendering through ``apply_chat_template``, never off its name;
the one table here (``MARKED``) says what sixteen templates mark as the assistant's beside what a policy samples.
"""

from __future__ import annotations

import functools
import itertools
import json
import re

import pytest
import torch
from conftest import all_corpus, corpus_tokenizer, need_shared, while_of_one_template
from tensordict import TensorDict
from torchrl.modules.llm.policies import Tokens

from torchrl_chat import ChatEnv, ChatTemplate, ChatTemplateError, columns
from torchrl_chat.messages import content_text

pytestmark = pytest.mark.corpus

SYSTEM = {"role": "system", "content": "Be brief."}
CALL_ID = "abcdefgh0"  # nine letters: some templates insist
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@pytest.fixture(scope="session", params=all_corpus())
def name(request) -> str:
    """Every template in turn; all tests of one before the next, so that its tokenizer is loaded once."""
    return request.param


@while_of_one_template
def template_of(name: str, guard: bool = True) -> ChatTemplate:
    return ChatTemplate(corpus_tokenizer(name), guard=guard)


def user(content) -> dict:
    return {"role": "user", "content": content}


def said(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def call(arguments, call_id: str = CALL_ID) -> dict:
    calls = [{"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}]
    return said("", tool_calls=calls)


def result(content, call_id: str = CALL_ID, name: str = "get_weather") -> dict:
    return {"role": "tool", "content": content, "tool_call_id": call_id, "name": name}


@while_of_one_template
def raw_render(name: str):
    """The template's own rendering, in whichever form it reads content; "" where it raises."""
    tokenizer = corpus_tokenizer(name)  # which puts the corpus on the path
    from render import R

    render = R(tokenizer)
    return lambda messages, prompt=False: render.safe(messages, prompt)[0] or ""


# ---------------------------------------------------------------------- the shared harness
@functools.cache
def harness():
    """The shared harness, over the tokenizers that the tests have loaded already."""
    need_shared("corpus/exactness.py")
    import exactness

    exactness.load = corpus_tokenizer
    return exactness


def extend(tokenizer, messages, ids, new, add_generation_prompt=True):
    return template_of(tokenizer.corpus["template"]).extend(ids, messages, new, add_generation_prompt)


def samples_the_call_id(name: str) -> bool:
    """Whether a call's id stands behind its arguments: then what follows them is not the same for every call."""
    render, tails = raw_render(name), set()
    for call_id in ("abcdefgh0", "hgfedcba9"):
        for arguments in ({"city": "ARGQ7"}, '{"city": "ARGQ7"}'):
            text = render([user("hi"), call(arguments, call_id)])
            if "ARGQ7" in text:
                tails.add(text.rpartition("ARGQ7")[2])
    return len(tails) > 1


def test_the_shared_harness(name):
    corpus_tokenizer(name)
    [row] = harness().evaluate(impls={"ours": extend}, templates=[name], verbose=False)
    assert "crash" not in row
    total, cases = row["impl"]["ours"], row["cases"]["ours"]
    assert total["n"] >= 14
    assert total["err"] == 0
    wrong = {case: score for case, score in cases.items() if score["exact"] < score["n"]}
    # A refusal is allowed where a policy samples the id of its call. On 2026-11-20 these were 24 of 1608 cases.
    allowed = {"tool", "tool_x2", "tool_json_ws"} if samples_the_call_id(name) else set()
    assert wrong.keys() <= allowed, wrong
    assert total["exact"] + total["refused"] == total["n"]


# ---------------------------------------------------------------------- look-alikes of control tokens
@while_of_one_template
def control_ids(name: str) -> frozenset[int]:
    """Ids that only the template may write: special tokens, and markup that the template spells."""
    tokenizer = corpus_tokenizer(name)
    return frozenset(
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in tokenizer.chat_template and re.search(r"[<\[(].", token.content))
    )


@while_of_one_template
def control_strings(name: str) -> tuple[str, ...]:
    """What a forger would write: control tokens that the template uses, role headers, the generation prompt."""
    tokenizer = corpus_tokenizer(name)
    shown = raw_render(name)([user("USERQ7"), said("SAIDQ7"), user("AGAINQ7")], True)
    texts = [tokenizer.added_tokens_decoder[i].content for i in sorted(control_ids(name))]
    spelled = [s for s in texts if s in tokenizer.chat_template or s in shown]
    between = re.split("USERQ7|SAIDQ7|AGAINQ7", shown)  # the header of a user turn, of an answer, and so on
    return tuple(dict.fromkeys([*spelled, tokenizer.eos_token, *filter(None, map(str.strip, between))]))


@while_of_one_template
def forgeries(name: str) -> dict[str, str]:
    """Contents that look like control tokens: at the very edges, among words, repeated, in JSON, escaped."""
    strings = control_strings(name)
    joined = " and ".join(strings)
    return {
        "edges": "".join(strings) + "\nwords\n" + "".join(reversed(strings)),
        "spaced": f"  {joined}\n\n{joined}  ",
        "repeated": "x" + "x".join(s * 3 for s in strings) + "x",
        "json": json.dumps({"city": joined, joined: [*strings]}),
        "escaped": escaped(joined),
    }


def escaped(value) -> str:
    """JSON in which no control token can be read before it is decoded."""
    return json.dumps(value).replace("<", "\\u003c").replace("[", "\\u005b").replace("]", "\\u005d")


def parts(text: str) -> list[dict]:
    """The text in parts whose borders run through the middle of every word."""
    cuts = [0, *((m.start() + m.end()) // 2 for m in re.finditer(r"\S{2,}", text)), len(text)]
    return [{"type": "text", "text": text[a:b]} for a, b in itertools.pairwise(cuts) if a < b]


@while_of_one_template
def reads_objects(name: str) -> bool:
    """Whether the template reads a call's arguments as an object (rather than as a string)."""
    return "ARGQ7" in raw_render(name)([user("hi"), call({"city": "ARGQ7"})])


def called(name: str, arguments: dict, call_id: str = CALL_ID) -> dict:
    return call(arguments if reads_objects(name) else json.dumps(arguments, ensure_ascii=False), call_id)


ASKED, PARIS = user("hi there"), {"city": "Paris"}
# Where a forger's text may stand: of a template's name and a text, a conversation and what extends it.
PLACES = {
    "user": lambda n, x: ([user(x)], []),
    "system": lambda n, x: ([SYSTEM | {"content": x}, ASKED], []),
    "past": lambda n, x: ([user(x), said("well"), user(x)], []),
    "example": lambda n, x: ([ASKED, said(x), user("again")], []),
    "next_user": lambda n, x: ([ASKED, said("well")], [user(x)]),
    "next_behind": lambda n, x: ([SYSTEM | {"content": x}, user(x), said("well")], [user(x)]),
    "parts": lambda n, x: ([user(parts(x))], []),
    "next_parts": lambda n, x: ([ASKED, said("well")], [user(parts(x))]),
    "tool": lambda n, x: ([ASKED, called(n, PARIS), result(x)], []),
    "tool_parts": lambda n, x: ([ASKED, called(n, PARIS), result(parts(x))], []),
    "tool_name": lambda n, x: ([ASKED, called(n, PARIS), result("22C", name=x)], []),
    "tool_id": lambda n, x: ([ASKED, called(n, PARIS, x), result("22C", x)], []),
    "next_tool": lambda n, x: ([ASKED, called(n, PARIS)], [result(x)]),
    "next_tool_parts": lambda n, x: ([ASKED, called(n, PARIS)], [result(parts(x))]),
    "next_tool_name": lambda n, x: ([ASKED, called(n, PARIS)], [result("22C", name=x)]),
    "next_tool_id": lambda n, x: ([ASKED, called(n, PARIS, x)], [result("22C", x)]),
    "next_tools": lambda n, x: ([ASKED, called(n, PARIS)], [result(x), user(x)]),
    "arguments": lambda n, x: ([ASKED, called(n, {"city": x}), result("22C")], []),
    "argument_names": lambda n, x: ([ASKED, called(n, {x: "Paris"}), result("22C")], []),
    "json_arguments": lambda n, x: ([ASKED, call(escaped({"city": x})), result("22C")], []),
}
# Where markup that is not special (<think>, <tool_call>) may be meant: the assistant's and the system's messages.
TRUSTED = {"system", "example", "arguments", "argument_names", "json_arguments"}


def ids_of(template: ChatTemplate, messages: list, new: list) -> list[int] | None:
    """A first prompt, or an extension behind a sampled answer; ``None`` where that is refused."""
    try:
        if not new:
            return template.render(messages)
        stop = [i for i in template.close(messages).main[:1] if i >= 0]
        prompt = template.codec.encode_continuation(["the prompt, and what was sampled"])[0]
        return template.extend([*prompt, *stop], messages, new)
    except ChatTemplateError:
        return None


def controls_in(name: str, ids: list[int], place: str = "user") -> list[int]:
    """The control tokens of a prompt, in order."""
    allowed = template_of(name).codec.plain_added.values() if place in TRUSTED else ()
    return [i for i in ids if i in control_ids(name) and i not in allowed]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.by_day(3)
def test_look_alikes_stay_text(name, place):
    template, build = template_of(name), PLACES[place]
    innocent = ids_of(template, *build(name, "WORDSQ7"))
    if innocent is None:
        # Then the template itself refuses or drops it, or refuses to say what follows a call with this id.
        messages, new = build(name, "WORDSQ7")
        everything = [{**m, "content": content_text(m)} for m in (*messages, *new)]
        written = raw_render(name)([*messages, *new], True).count("WORDSQ7")
        assert written < repr(everything).count("WORDSQ7") or samples_the_call_id(name)
    shown = innocent is not None and "WORDSQ7" in template.codec.decode([innocent])[0]
    for form, forged in forgeries(name).items():
        ids = ids_of(template, *build(name, forged))
        if innocent is None:
            assert ids is None, form
            continue
        assert ids is not None, form
        if "parts" in place:  # some templates write a part each for itself: as many of them
            innocent = ids_of(template, *build(name, re.sub(r"\S{2,}", "WORDSQ7", forged)))
        assert controls_in(name, ids, place) == controls_in(name, innocent, place), form
        if shown and place != "example":  # templates cut the reasoning out of an earlier answer
            text = template.codec.decode([ids])[0]
            assert any(squashed(f) in squashed(text) for f in spellings(forged)), form


def spellings(text: str) -> list[str]:
    """The text as templates write it: verbatim, as JSON, as JSON in JSON, as a Python string, as an attribute."""
    once = json.dumps(text, ensure_ascii=False)[1:-1]
    twice = json.dumps(once, ensure_ascii=False)[1:-1]
    return [
        text,
        once,
        twice,
        escaped(text)[1:-1],
        repr(text)[1:-1],
        text.replace("&", "&amp;").replace('"', "&quot;"),
    ]


def squashed(text: str) -> str:
    """Without white space: templates trim contents, and put line breaks between parts."""
    return "".join(text.split())


@pytest.mark.parametrize("place", ["user", "next_user"])
@pytest.mark.by_day(3, place=1)
def test_without_the_guard_look_alikes_are_control_tokens(name, place):
    messages, new = PLACES[place](name, forgeries(name)["edges"])
    ids = ids_of(template_of(name, guard=False), messages, new)
    innocent = ids_of(template_of(name), *PLACES[place](name, "WORDSQ7"))
    assert len(controls_in(name, ids)) > len(controls_in(name, innocent))


# ---------------------------------------------------------------------- the mask against the template's own markers
NEWLINE = ("\n",)
# What the markers of a template mark beside the sampled tokens: in front of them (then it is part of the prompt),
# behind the stop token of every turn, and at the end of a conversation.
MARKED = {
    "lc_LFM2.5-8B-A1B": ((), NEWLINE, ()),
    "lc_poolside-Laguna-S-2.1": (("<assistant>", "<think>"), NEWLINE, ()),
    "lc_poolside-Laguna-XS-2.1": (("<assistant>", "\n", "</think>"), NEWLINE, ()),
    "trl_deepseekv3_training": (("<｜Assistant｜>",), (), ()),
    "trl_gptoss_training": (("<|start|>", "assistant"), (), ()),
    "trl_lfm2_2_5_v2": ((), NEWLINE, ()),
    "trl_lfm2_v2_training": ((), NEWLINE, ()),
    "trl_muse_glimmer_training": (("<|start|>", "assistant"), (), ()),
    "trl_nemotron_3_nano_training": (("<think>", "</think>"), NEWLINE, ()),
    "trl_nemotron_3_super_training": (("<think>", "</think>"), NEWLINE, ()),
    "trl_nemotron_3_ultra_training": (("<think>", "</think>"), NEWLINE, ()),
    "trl_phi3_5_training": ((), (), ("<|endoftext|>",)),
    "trl_phi3_training": ((), (), ("<|endoftext|>",)),
    "trl_qwen2_5_training": (NEWLINE, NEWLINE, ()),
    "trl_qwen3_instruct_2507_training": ((), NEWLINE, ()),
    "trl_qwen3_vl_training": ((), NEWLINE, ()),
}
# Reasoning models whose prompt opens a reasoning that the history leaves out: with it off, prompt and history agree.
VARIABLES = {name: {"enable_thinking": False} for name in MARKED if "nemotron" in name}
# And one whose prompt always ends with text that its history never has.
OPENED = {"trl_deepseekv3_training": "<think>\n"}
TALK = [
    ("What is the capital of France?", "Paris, since 987; population 2,102,650."),
    ("Und die nächste? 東京", "naïve café — 北京 🎉 ½"),
    ("def f(x):\n    return x**2\nExplain.", "f(12) == 144\n\n- squared\n- `x**2`"),
]


@while_of_one_template
def marked_env(name: str) -> ChatEnv:
    variables = VARIABLES.get(name, {})
    return ChatEnv(input_mode="tokens", tokenizer=corpus_tokenizer(name), template_kwargs=variables)


def runs_of(mask: list[int]) -> list[tuple[int, int]]:
    """The stretches of ones."""
    edges = [i for i, (a, b) in enumerate(itertools.pairwise([0, *mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_every_template_with_markers_is_here():
    folder = need_shared("corpus/templates")
    sources = {path.stem: path.read_text() for path in folder.glob("*.jinja")}
    assert {name for name, source in sources.items() if MARKERS.search(source)} == MARKED.keys()


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("marked", MARKED)
def test_the_mask_is_what_the_markers_mark(marked, turns, system):
    name, tokenizer = marked, corpus_tokenizer(marked)
    spelled = tokenizer.convert_ids_to_tokens if tokenizer.corpus["base"] == "phi3" else piecewise(tokenizer)
    front, behind, final = MARKED[name]
    start = [SYSTEM] if system else []
    messages = [*start, *(m for question, answer in TALK[:turns] for m in (user(question), said(answer)))]
    whole = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True, **VARIABLES.get(name, {})
    )
    ids, marks = whole["input_ids"], whole["assistant_masks"]
    runs, sampled = runs_of(marks), []
    assert len(runs) == turns
    for k, (first, last) in enumerate(runs):
        tail = (*behind, *final) if k + 1 == turns else behind
        assert spelled(ids[first : first + len(front)]) == list(front)
        assert spelled(ids[last - len(tail) : last]) == list(tail)
        sampled.append((first + len(front), last - len(tail)))

    env = marked_env(name)
    opened = env.template.codec.encode([OPENED[name]])[0] if name in OPENED else []
    td = env.reset(TensorDict(query=[[*start, user(TALK[0][0])]], batch_size=(1,)))
    for k, (first, last) in enumerate(sampled):
        prompt = td["tokens"][0].prompt.tolist()
        expected = list(ids[:first])
        for begin, _ in reversed(sampled[: k + 1]):
            expected[begin:begin] = opened
        assert prompt == expected
        td["tokens"] = columns.ragged(Tokens, "response", [torch.tensor(ids[first:last])], td.batch_size, None)
        td = env.step_mdp(env.step(td))
        if k + 1 < turns:
            td = env.append_messages(td, [TALK[k + 1][0]])
    [ledger] = columns.read_objects(td["transcript"], td.batch_size)
    tokens, mask = ledger.tokens.tolist(), ledger.mask.tolist()
    for begin, _ in sampled:  # from left to right: each goes where it has come from
        assert tokens[begin : begin + len(opened)] == opened
        assert not any(mask[begin : begin + len(opened)])
        del tokens[begin : begin + len(opened)], mask[begin : begin + len(opened)]
    end = len(ids) - len(final)
    assert tokens == ids[:end]
    assert [i for i, m in enumerate(mask) if m] == [i for a, b in sampled for i in range(a, b)]


def piecewise(tokenizer):
    return lambda ids: [tokenizer.decode([i]) for i in ids]


# ---------------------------------------------------------------------- calls
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}}}},
}  # fmt: skip
# Templates that write the calls of past turns in another form than the one that they ask for, or none at all.
NOT_WRITTEN = {"lc_Kimi-K2-Instruct", "lc_Kimi-K2-Thinking", "lc_llama-cpp-deepseek-r1", "ax_falcon_h1"}


def test_a_call_as_the_model_is_to_write_it(name):
    """What a model is shown as a call, whatever the format, is read as that call and nothing else."""
    template = ChatTemplate(corpus_tokenizer(name), tools=[ADD])
    written = template.call_text("add", {"a": 1, "s": "x"})
    if written is None:
        assert name in NOT_WRITTEN or "tool_calls" not in template.renderer.source
        return
    [found] = template.parser.parse(written).calls
    assert (found.name, found.arguments, found.span) == ("add", {"a": 1, "s": "x"}, (0, len(written)))


def opened(template: ChatTemplate, text: str) -> str:
    """The text behind a reasoning that the generation prompt has opened, if it has."""
    parser = template.parser
    if not parser.opened_by(template.renderer.text([user("?")], True)):
        return text
    if parser.channels:
        return f"so{parser.channels.ends[0].replace('{channel}', parser.channels.reasoning[0])}{text}"
    return f"so\n{parser.pairs[0].close}\n\n{text}"


def gone_on(template: ChatTemplate, text: str, reason: str | None, head: str = "") -> tuple[dict, str]:
    """What a sampled text is read as, and the whole sequence once the call's result is there."""
    [ids] = template.codec.encode([text + head])
    [read] = template.parse_batch([ids], finish_reasons=[reason])
    calls = read.message.get("tool_calls", [])
    new = [result("3", c["id"], "add") for c in calls] or [user("?")]
    try:
        [follow] = template.follow_batch([[user("?"), read.message]], [new], stops=[read.stop])
    except ChatTemplateError:
        return read.message, "refused"
    return read.message, template.codec.decode([[*ids, *read.ending.ids, *follow.ids]])[0]


@pytest.mark.by_day(2)
def test_a_complete_call_without_the_token_that_ended_its_turn(name):
    """Engines take the stop token away: the call stays a call, and the ledger gets the token as unsampled."""
    template = ChatTemplate(corpus_tokenizer(name), tools=[ADD])
    written = template.call_text("add", {"a": 1, "s": "3.10"})
    if written is None:
        assert name in NOT_WRITTEN or "tool_calls" not in template.renderer.source
        return
    text, close = opened(template, written), template.close([user("?"), call({"a": 1})])
    stop = next(stop for stop in close.main if close.heads[stop])
    head = max(close.heads[stop], key=len)
    message, whole = gone_on(template, text, None, head)
    assert [c["function"] for c in message["tool_calls"]] == [{"name": "add", "arguments": {"a": 1, "s": "3.10"}}]
    if head not in template.renderer.text([user("?"), message, result("3", "call00000", "add")], True):
        whole = whole.replace(head, "", 1)  # written behind the last message only
    for reason in ("stop", "tool_calls", None):
        assert gone_on(template, text, reason) == (message, whole), reason
    for row in template.parser.formats:
        if row.close and written.startswith(row.open) and written.endswith(row.close):
            cut = text.removesuffix(row.close)
            assert gone_on(template, cut, "stop") == (message, whole), "the engine took the end of the call"
            for reason in ("length", None):
                read, shown = gone_on(template, cut, reason)
                if "tool_calls" in read:  # nothing more could stand in the block
                    assert (read, shown) == (message, whole)
                else:
                    assert [c["status"] for c in read["invalid_tool_calls"]] == ["unclosed"]
