"""Messages as APIs send them: a content that is null or in parts, keys without a value, calls that are not there."""

from __future__ import annotations

import pytest
from conftest import all_corpus, bpe_tokenizer, corpus_tokenizer
from tensordict import TensorDict

from torchrl_chat import ChatEnv, ChatTemplate, MessageError, columns
from torchrl_chat.messages import as_messages, content_text

FUNCTION = {"name": "elevation", "arguments": {"place": "Brig", "digits": 3}}
CALL = {"id": "callnr000", "type": "function", "function": FUNCTION}
RESULT = {"role": "tool", "tool_call_id": "callnr000", "name": "elevation", "content": "678"}
ASKED, NEXT = {"role": "user", "content": "How high is Brig?"}, {"role": "user", "content": "And Chur?"}
SAID = {"role": "assistant", "content": "678 m."}
NOTHING = dict.fromkeys(("refusal", "audio", "function_call", "annotations", "reasoning_content", "name"))


def talk(**form) -> list[dict]:
    """A conversation with a call, in another form."""
    return [ASKED, {"role": "assistant", "tool_calls": [CALL], **form}, RESULT, SAID, NEXT]


@pytest.mark.parametrize("name", all_corpus())
@pytest.mark.by_day(3)
def test_no_content_beside_calls_renders_like_an_empty_one(name):
    template = ChatTemplate(corpus_tokenizer(name))
    try:
        wanted = template.render(talk(content=""))
    except ValueError:
        pytest.skip("the template refuses such a conversation")
    for form in ({"content": None}, {}, {"content": None, **NOTHING}):
        assert template.render(talk(**form)) == wanted, form
    # An empty list of calls is none, and neither is null.
    plain = template.render([ASKED, SAID, NEXT])
    for calls in ([], None):
        assert template.render([{**ASKED, "tool_calls": calls}, {**SAID, "tool_calls": calls}, NEXT]) == plain
    # The same behind a prompt: what follows a call, and what follows a conversation with one.
    ids = [*template.render([ASKED]), *template.codec.encode_continuation(["x"])[0]]
    for messages, new in ((talk()[:2], [RESULT]), (talk()[:4], [NEXT])):
        extended = []
        for content in ("", None):
            form = [{**m, "content": content} if "tool_calls" in m else m for m in messages]
            try:
                extended.append(template.extend(ids, form, new))
            except ValueError as error:
                extended.append(type(error))
        assert extended[0] == extended[1]


def test_null_in_a_batch_of_every_mode(mode):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.strip() }}{% if m.tool_calls is defined %}"
        "{{ m.tool_calls|tojson }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    env = ChatEnv(input_mode=mode, tokenizer=bpe_tokenizer.__wrapped__(source), batch_size=(3,))
    queries = [talk(content=None), talk(content=""), talk(content=None, **NOTHING)]
    prompts = env.reset(TensorDict(query=queries, batch_size=(3,))).get(("tokens", "prompt"), as_list=True)
    assert prompts[0].tolist() == prompts[1].tolist() == prompts[2].tolist()


def test_a_template_that_writes_calls_only_without_a_content():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if 'content' in m %}{{ m.content }}"
        "{% else %}{{ m.tool_calls|tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    template = ChatTemplate(bpe_tokenizer.__wrapped__(source))
    for form in ({"content": ""}, {"content": None}, {}):
        assert "elevation" in template.renderer.text(talk(**form), False)
    assert "678 m." in template.renderer.text(talk(), False)


# ---------------------------------------------------------------------- parts
PARTS = [{"type": "text", "text": "How high "}, {"text": "is"}, {"type": "text", "text": " Brig?", "cache": "x"}]
NO_TEXT = {
    "image_url": {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    "image": {"type": "image", "image": object()},
    "input_audio": {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    "video": {"type": "video", "path": "x.mp4"},
    "thinking": {"type": "thinking", "thinking": "hm"},
    "None": {"type": None, "text": "x"},
}


def test_a_list_of_text_parts_is_text():
    for role in ("user", "system", "tool", "assistant"):
        [message] = as_messages([{"role": role, "content": PARTS, "name": "x"}])
        assert message == {"role": role, "content": "How high is Brig?", "name": "x"}
    assert as_messages({"role": "user", "content": []}) == [{"role": "user", "content": ""}]
    assert PARTS[0] == {"type": "text", "text": "How high "}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_parts_that_are_no_text_are_named(kind, mode):
    wanted = rf"\[1\] \(role 'user'\): part 1 of its 'content' is of type '?{kind}"
    talked = [SAID, {"role": "user", "content": [{"type": "text", "text": "see"}, NO_TEXT[kind]]}]
    with pytest.raises(MessageError, match=wanted):
        as_messages(talked)
    with pytest.raises(MessageError, match="part 0"):
        as_messages({"role": "tool", "content": [NO_TEXT[kind]]})
    template = ChatTemplate(bpe_tokenizer())
    with pytest.raises(MessageError, match=wanted):
        template.render(talked)
    with pytest.raises(MessageError, match=wanted):
        template.extend([5], [ASKED, SAID], talked)
    env = ChatEnv(input_mode=mode, tokenizer=bpe_tokenizer(), batch_size=(2,), errors="raise")
    with pytest.raises(MessageError, match=wanted.replace(r"\[1\]", r"'query' of row 1\[1\]")):
        env.reset(TensorDict(query=[[ASKED], talked], batch_size=(2,)))


@pytest.mark.parametrize("name", all_corpus())
def test_parts_render_like_their_text(name, mode):
    env = ChatEnv(input_mode=mode, tokenizer=corpus_tokenizer(name), batch_size=(2,))
    queries = [
        [{"role": "user", "content": PARTS}],
        [{"role": "user", "content": content_text({"content": PARTS})}],
    ]
    td = env.reset(TensorDict(query=queries, batch_size=(2,)))
    parted, plain = td.get(("tokens", "prompt"), as_list=True)
    assert parted.tolist() == plain.tolist()
    messages = [ledger.messages for ledger in columns.read_objects(td["transcript"], td.batch_size)]
    assert messages[0] == messages[1]
