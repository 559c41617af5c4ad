"""Templates that write an end-of-turn token behind the end of an action block: ids may stop at either."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import bpe_tokenizer
from tensordict import TensorDict
from tokenizers import AddedToken
from torchrl.modules.llm.policies import Tokens

from torchrl_chat import ChatEnv, ChatTemplate, columns

TOKENS = [
    "start",
    "bot",
    "user",
    "system",
    "plan",
    "/plan",
    "action",
    "/action",
    "result",
    "/result",
    "reply",
    "/reply",
    "eot",
    "eom",
]
# name: what the template writes behind the block, and behind an answer in words
CLOSES = {
    "the same end": ("<|/action|><|eot|>", "<|eot|>"),
    "words in a block of their own": ("<|/action|><|eot|>", "<|/reply|><|eot|>"),
    "words end with the block's end": ("<|/action|><|eot|>", "<|/action|><|eot|>"),
    "no end behind words that are followed": ("<|/action|><|eot|>", "{{ '<|eot|>' if loop.last else '' }}"),
    "another end": ("<|/action|><|eom|>", "<|eot|>"),
    "a line break between": ("<|/action|>\n<|eot|>\n", "<|eot|>"),
    "an end only where a message follows": ("<|/action|>{{ '' if loop.last else '<|eot|>' }}", "<|eot|>"),
    "an end only at the end": ("<|/action|>{{ '<|eot|>' if loop.last else '' }}", "<|eot|>"),
}


def source_of(block: str, words: str) -> str:
    call = (
        '{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ c.function.name }}", '
        '"parameters": {{ c.function.arguments|tojson }}}'
    )
    # The loop over calls has a loop of its own: what looks at the message's place stands behind it.
    answer = (
        "<|start|><|bot|>{% if m.tool_calls %}{{ '<|plan|>' ~ m.content ~ '<|/plan|>' if m.content else '' }}<|action|>[\n"
        f"{{% for c in m.tool_calls %}}    {call}{{{{ '' if loop.last else ',' }}}}\n\n{{% endfor %}}]{block}"
        f"{{% else %}}{{{{ m.content }}}}{words}{{% endif %}}"
    )
    result = (
        "{{ '<|start|><|system|><|result|>[' if loop.previtem.role != 'tool' else ', ' }}"
        '{"content": {{ m.content|tojson }}}'
        "{{ ']<|/result|><|eot|>' if loop.last or loop.nextitem.role != 'tool' else '' }}"
    )
    return (
        f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% elif m.role == 'tool' %}}{result}"
        "{% else %}<|start|><|{{ m.role }}|>{{ m.content }}<|eot|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|><|bot|>{% endif %}"
    )


def tokenizer_of(case: str):
    made = bpe_tokenizer.__wrapped__(source_of(*CLOSES[case]))
    extra = [AddedToken(f"<|{name}|>", special=True, normalized=False) for name in TOKENS]
    made.add_special_tokens({"additional_special_tokens": extra})
    made.eos_token = "<|eot|>"
    return made


ASKED = {"role": "user", "content": "how high is it?"}


def answer_of(content: str, count: int) -> dict:
    function = {"name": "height", "arguments": {"place": "Säntis", "digits": 3, "feet": False}}
    calls = [{"id": f"callnr{i:03d}", "type": "function", "function": function} for i in range(count)]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def new_of(kind: str, count: int) -> list[dict]:
    found = [
        {"role": "tool", "content": f"found {i}", "name": "height", "tool_call_id": f"callnr{i:03d}"}
        for i in range(count)
    ]
    user = [{"role": "user", "content": "never mind"}]
    return {"results": found, "user": user, "both": [*found, *user]}[kind]


@pytest.mark.parametrize("case", CLOSES)
@pytest.mark.parametrize("content", ["", "I look."])
@pytest.mark.by_day(3)
def test_ids_that_stop_at_the_end_of_the_block_go_on_with_the_templates_end(case, content):
    template = ChatTemplate(tokenizer_of(case))
    prompt = template.render([ASKED])
    for count, kind in itertools.product((1, 2), ("results", "user", "both")):
        answer, new = answer_of(content, count), new_of(kind, count)
        whole = template.renderer.text([ASKED, answer, *new], True)
        block = whole[: whole.rindex("<|/action|>") + len("<|/action|>")]
        opener = whole.index("<|start|>", len(block))
        for end in dict.fromkeys((block, whole[:opener].rstrip("\n"))):
            ids = template.codec.encode([end])[0]
            assert ids[: len(prompt)] == prompt
            for ended in (None, True):
                extended = template.extend(ids, [ASKED, answer], new, ended=ended)
                assert extended[: len(ids)] == ids
                assert template.codec.decode([extended])[0] == whole, (end[-30:], count, kind, ended)


@pytest.mark.parametrize("case", ["the same end", "no end behind words that are followed", "another end"])
def test_a_cut_behind_the_block_is_followed_by_the_end_once(case):
    template = ChatTemplate(tokenizer_of(case))
    answer, new = answer_of("", 1), new_of("results", 1)
    whole = template.renderer.text([ASKED, answer, *new], True)
    ids = template.codec.encode([whole[: whole.rindex("<|/action|>") + len("<|/action|>")]])[0]
    assert template.codec.decode([template.extend(ids, [ASKED, answer], new, ended=False)])[0] == whole


def test_the_end_of_the_block_is_no_end_of_words():
    """What closes a call is a part of it: an engine that stops there has sampled the whole call."""
    template = ChatTemplate(tokenizer_of("the same end"))
    close = template.close([ASKED, answer_of("", 1)])
    block = template.codec.controls["<|/action|>"]
    assert close.suffix(block).text == "<|eot|>"
    assert close.without_end("[]<|/action|>", block, "<|/action|>") == "[]<|/action|>"
    assert not close.ends(block)


QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments|tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("policy", ["keep", "template"])
def test_a_call_that_an_engine_stopped_behind_its_close_is_a_call(policy, mode):
    """``</tool_call>`` as a stop token of the engine: the turn's own end follows unsampled, also in a branch."""
    tokenizer = bpe_tokenizer.__wrapped__(QWEN)
    tokenizer.add_tokens(
        [AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)]
    )
    kwargs = {"parse_tool_calls": True}
    env = ChatEnv(
        input_mode=mode, tokenizer=tokenizer, history_policy=policy, batch_size=(1,), template_kwargs=kwargs
    )
    td = env.reset(TensorDict(query=["go"], batch_size=(1,)))
    text = '<tool_call>\n{"name": "height", "arguments": {"digits":  3, "place": "x"}}\n</tool_call>'
    ids = torch.tensor(env.template.codec.encode([text])[0])
    for _ in range(2):
        td["tokens"] = columns.ragged(Tokens, "response", [ids], td.batch_size, None)
        td["finish_reason"] = ["stop"]
        td = env.step_mdp(env.step(td))
        message = columns.read_objects(td["transcript"], td.batch_size)[0].messages[-1]
        assert message["tool_calls"][0]["function"]["arguments"] == {"digits": 3, "place": "x"}
        found = {"role": "tool", "content": "1", "name": "height", "tool_call_id": message["tool_calls"][0]["id"]}
        td = env.append_messages(td, [[found]])
    [ledger] = columns.read_objects(td["transcript"], td.batch_size)
    whole = env.template.codec.decode([ledger.tokens.tolist()])[0]
    assert whole.count(f"{text}<|im_end|>\n<|im_start|>tool\n1<|im_end|>\n") == 2
    assert [i for s in ledger.sequences for i in s.tokens[s.mask].tolist()] == ids.tolist() * 2
