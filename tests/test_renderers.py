"""The optional package ``renderers`` as parser and as judge: another hand has written what we derive."""

from __future__ import annotations

import pytest
from conftest import bpe_tokenizer, corpus_tokenizer

from torchrl_chat import ChatTemplate

TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look something up.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}
ANSWERS = [
    "<think>\nhm\n</think>\n\nThe answer is 4.",
    '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "lookup", "arguments": {"q": "it"}}\n</tool_call>',
    '<tool_call>\n{"name": "lookup", "arguments": {"q": }\n</tool_call>',
]


@pytest.fixture
def templates():
    tokenizer = corpus_tokenizer("lc_Qwen-Qwen3-0.6B")
    return ChatTemplate(tokenizer, tools=[TOOL]), ChatTemplate(tokenizer, tools=[TOOL], renderer="qwen3")


@pytest.mark.parametrize("answer", ANSWERS)
def test_both_parsers_read_the_same_message(templates, answer):
    ours, theirs = templates
    ids = [*ours.codec.encode([answer])[0], ours.tokenizer.eos_token_id]
    [mine], [other] = ours.parse_batch([ids]), theirs.parse_batch([ids])
    assert [c.status for c in mine.answer.calls] == [c.status for c in other.answer.calls]
    assert mine.message.get("reasoning_content") == other.message.get("reasoning_content")
    names = [[c["function"] for c in m.message.get("tool_calls", ())] for m in (mine, other)]
    assert names[0] == names[1]
    assert (mine.ended, mine.stop) == (other.ended, other.stop)


def test_both_bridges_write_the_same_ids(templates):
    ours, theirs = templates
    question = [{"role": "user", "content": "What is it?"}]
    prompt = ours.render(question)
    ids = [*ours.codec.encode([ANSWERS[1]])[0], ours.tokenizer.eos_token_id]
    [parsed] = ours.parse_batch([ids])
    result = {"role": "tool", "content": "found", "name": "lookup", "tool_call_id": "call00000"}
    extended = ours.extend([*prompt, *ids], [*question, parsed.message], [result])
    bridged = theirs._reader.peer.renderer.bridge_to_next_turn(prompt, ids, [result], tools=[TOOL])
    assert extended == list(bridged.token_ids)


def test_an_unknown_renderer(tokenizer):
    with pytest.raises(ValueError, match="no renderer 'nonsense'"):
        ChatTemplate(bpe_tokenizer(), renderer="nonsense")
