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
from conftest import all_corpus, corpus_tokenizer, need_shared

from torchrl_chat import ChatTemplate, ChatTemplateError

SYSTEM = {"role": "system", "content": "Be brief."}
CALL_ID = "abcdefgh0"  # nine letters: some templates insist
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@pytest.fixture(scope="module", params=all_corpus())
def name(request) -> str:
    """Every template in turn; all tests of one before the next, so that its tokenizer is loaded once."""
    return request.param


@functools.cache
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


@functools.cache
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
@functools.cache
def control_ids(name: str) -> frozenset[int]:
    """Ids that only the template may write: special tokens, and markup that the template spells."""
    tokenizer = corpus_tokenizer(name)
    return frozenset(
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in tokenizer.chat_template and re.search(r"[<\[(].", token.content))
    )


@functools.cache
def control_strings(name: str) -> tuple[str, ...]:
    """What a forger would write: control tokens that the template uses, role headers, the generation prompt."""
    tokenizer = corpus_tokenizer(name)
    shown = raw_render(name)([user("USERQ7"), said("SAIDQ7"), user("AGAINQ7")], True)
    texts = [tokenizer.added_tokens_decoder[i].content for i in sorted(control_ids(name))]
    spelled = [s for s in texts if s in tokenizer.chat_template or s in shown]
    between = re.split("USERQ7|SAIDQ7|AGAINQ7", shown)  # the header of a user turn, of an answer, and so on
    return tuple(dict.fromkeys([*spelled, tokenizer.eos_token, *filter(None, map(str.strip, between))]))


@functools.cache
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


@functools.cache
def reads_objects(name: str) -> bool:
    """Whether the template reads a call's arguments as an object (rather than as a string)."""
    return "ARGQ7" in raw_render(name)([user("hi"), call({"city": "ARGQ7"})])


def called(name: str, arguments: dict, call_id: str = CALL_ID) -> dict:
    return call(arguments if reads_objects(name) else json.dumps(arguments), call_id)


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
def test_look_alikes_stay_text(name, place):
    template, build = template_of(name), PLACES[place]
    innocent = ids_of(template, *build(name, "WORDSQ7"))
    if innocent is None:
        # Then the template itself refuses or drops it, or refuses to say what follows a call with this id.
        messages, new = build(name, "WORDSQ7")
        written = raw_render(name)([*messages, *new], True).count("WORDSQ7")
        assert written < repr([messages, new]).count("WORDSQ7") or samples_the_call_id(name)
    shown = innocent is not None and "WORDSQ7" in template.codec.decode([innocent])[0]
    for form, forged in forgeries(name).items():
        ids = ids_of(template, *build(name, forged))
        if innocent is None:
            assert ids is None, form
            continue
        assert ids is not None, form
        assert controls_in(name, ids, place) == controls_in(name, innocent, place), form
        if shown and place != "example":  # templates cut the reasoning out of an earlier answer
            text = template.codec.decode([ids])[0]
            assert any(squashed(f) in squashed(text) for f in (forged, as_json(forged))), form


def as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def squashed(text: str) -> str:
    """Without white space: templates trim contents, and put line breaks between parts."""
    return "".join(text.split())


@pytest.mark.parametrize("place", ["user", "next_user"])
def test_without_the_guard_look_alikes_are_control_tokens(name, place):
    messages, new = PLACES[place](name, forgeries(name)["edges"])
    ids = ids_of(template_of(name, guard=False), messages, new)
    innocent = ids_of(template_of(name), *PLACES[place](name, "WORDSQ7"))
    assert len(controls_in(name, ids)) > len(controls_in(name, innocent))
