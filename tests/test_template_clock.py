"""Templates that tell the time: what is proved of one holds for all its environments, and each tells its own time."""

from __future__ import annotations

import datetime

import pytest
from conftest import CHATML, bpe_tokenizer, corpus_tokenizer, stop_of

from torchrl_chat import ChatTemplate
from torchrl_chat.templates import following

HEAD = "{{ 'Today: ' ~ strftime_now('%d %B %Y, %H:%M:%S.%f') }}\n" + CHATML
# Every user message tells the time at which it was written: no constant text follows an answer.
TURNS = CHATML.replace(
    "{{ m['content'] }}", "{{ strftime_now('%H:%M:%S ') if m['role'] == 'user' }}{{ m['content'] }}"
)
BEHIND = CHATML.replace("<|im_end|>", "<|im_end|>{{ strftime_now(' %H:%M:%S') if m['role'] == 'assistant' }}")
ASKED = [{"role": "user", "content": "what is 12 + 30?"}]
TALK = [*ASKED, {"role": "assistant", "content": "42"}]
MORE = [{"role": "user", "content": "sure?"}]


def at(tokenizer, moment: datetime.datetime) -> ChatTemplate:
    template = ChatTemplate(tokenizer)
    template.renderer.now = moment
    return template


def extended(template: ChatTemplate) -> str:
    sampled = [*template.codec.encode_continuation(["42"])[0], stop_of(template)]
    return template.codec.decode([template.extend([*template.render(ASKED), *sampled], TALK, MORE)])[0]


@pytest.mark.parametrize("source", [HEAD, TURNS, BEHIND], ids=["in front", "in every turn", "behind answers"])
def test_each_conversation_tells_the_time_of_its_environment(source):
    tokenizer = bpe_tokenizer.__wrapped__(source)
    moments = [datetime.datetime(2026, 1 + k, 3 * k + 1, 2 * k, 5 * k, 7 * k) for k in range(1, 6)]
    for moment in moments:
        template = at(tokenizer, moment)
        assert extended(template) == template.renderer.text([*TALK, *MORE], True)
        assert f"{moment:%H:%M:%S}" in extended(template)
    assert len(following._proofs[template.codec]) == 1


def test_what_tells_the_time_is_not_compiled():
    for source, compiled in ((HEAD, True), (TURNS, False), (BEHIND, False)):
        template = ChatTemplate(bpe_tokenizer.__wrapped__(source))
        extended(template)
        rules = following._proofs[template.codec][template.renderer.key].rules.values()
        assert rules
        assert {rule.parts is not None for rule in rules} == {compiled}


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["lc_meta-llama-Llama-3.2-3B-Instruct", "lc_openai-gpt-oss-120b"])
def test_a_real_template_is_proved_once(name):
    tokenizer, asked = corpus_tokenizer(name), []
    for _ in range(4):
        template = ChatTemplate(tokenizer)
        assert template.refusal("user") is template.refusal("tool") is None
        asked.append(set(following._proofs[template.codec]))
    assert all(proofs == asked[0] for proofs in asked)
