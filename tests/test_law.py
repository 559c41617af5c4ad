"""The law, over real tokenizers and random conversations, through the environment in all three modes.

The next prompt starts with this prompt and the sampled ids, id for id; the mask marks exactly the sampled
tokens; log-probs stay aligned; the three modes hold the same ledger.
"""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import CORPUS, bpe_tokenizer, corpus_tokenizer, stop_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from law_turns import check, contents, sample
from tensordict import TensorDict
from torchrl.modules.llm.policies import LogProbs, Tokens

from torchrl_chat import ChatEnv, columns

MODES = ("history", "text", "tokens")

turns = st.lists(st.tuples(contents, contents, st.booleans(), st.integers(0, 10**6)), min_size=1, max_size=4)


def play(env: ChatEnv, stop: int, conversations: list[list[tuple]]) -> list[list]:
    """Play the conversations, checking every turn; returns the ledgers after each turn."""
    rows = len(conversations)
    td = env.reset(TensorDict(query=[turns[0][0] for turns in conversations], batch_size=(rows,)))
    ledgers, sampled_total = [], [0] * rows
    for turn in range(len(conversations[0])):
        prompts = [row.clone() for row in columns.read_field(td["tokens"], "prompt", td.batch_size)]
        ids = [torch.tensor(sample(env.tokenizer, stop, c[turn][1], c[turn][2], c[turn][3])) for c in conversations]
        scores = [-torch.rand(len(row), generator=torch.Generator().manual_seed(turn)) for row in ids]
        td["tokens"] = columns.ragged(Tokens, "response", ids, td.batch_size, None)
        td["log_probs"] = columns.ragged(LogProbs, "response", scores, td.batch_size, None)
        td = env.step_mdp(env.step(td))
        check(td, prompts, ids, scores, sampled_total)
        if turn + 1 < len(conversations[0]):
            td = env.append_messages(td, [turns[turn + 1][0] for turns in conversations])
            check(td, prompts, ids, scores, sampled_total)
        for i, row in enumerate(ids):
            sampled_total[i] += len(row)
        ledgers.append(columns.read_objects(td["transcript"], td.batch_size))
    return ledgers


@functools.cache
def env_of(tokenizer, mode: str, rows: int) -> ChatEnv:
    # Environments hold no conversation, so one serves all examples.
    return ChatEnv(input_mode=mode, tokenizer=tokenizer, batch_size=(rows,))


def run_law(tokenizer, conversations) -> None:
    stop = stop_of(env_of(tokenizer, "tokens", 1).template)
    shortest = min(map(len, conversations))
    conversations = [turns[:shortest] for turns in conversations]
    batched = [play(env_of(tokenizer, mode, len(conversations)), stop, conversations) for mode in MODES]
    # The rows of each alone: the others in the batch must not matter.
    alone = [play(env_of(tokenizer, "tokens", 1), stop, [turns]) for turns in conversations]
    for turn in range(shortest):
        for row in range(len(conversations)):
            history, text, tokens = (ledgers[turn][row] for ledgers in batched)
            single = alone[row][turn][0]
            for other in (history, text, single):
                assert other.tokens.tolist() == tokens.tokens.tolist()
                assert other.mask.tolist() == tokens.mask.tolist()
                assert other.log_probs.tolist() == tokens.log_probs.tolist()
                assert other.messages == tokens.messages
                assert (other.ended, other.closed) == (tokens.ended, tokens.closed)


relaxed = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("name", CORPUS)
@relaxed
@given(conversations=st.lists(turns, min_size=1, max_size=3))
@pytest.mark.by_day(2)
def test_law_on_real_tokenizers(name, conversations):
    run_law(corpus_tokenizer(name), conversations)


@relaxed
@given(conversations=st.lists(turns, min_size=1, max_size=3))
def test_law_on_a_trained_tokenizer(conversations):
    run_law(bpe_tokenizer(), conversations)


@pytest.mark.parametrize("name", CORPUS)
@relaxed
@given(question=contents, answer=st.sampled_from(["yes", "The answer is 42.", "a\n\nb"]), follow=contents)
def test_next_prompt_is_what_the_template_writes(name, question, answer, follow):
    """Where the sampled ids are canonical and nothing is guarded, the prompt is the template's own rendering."""
    tokenizer = corpus_tokenizer(name)
    template = env_of(tokenizer, "tokens", 1).template
    if any(template.codec.spells(text) for text in (question, follow)):
        return
    close = template.close([{"role": "user"}, {"role": "assistant"}])
    messages = [{"role": "user", "content": question}]
    prompt = template.render(messages)
    text = (
        template.renderer.text(messages, True) + close.lead + answer + template.codec.token_text(stop_of(template))
    )
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    if whole[: len(prompt)] != prompt:
        return  # the answer merges into the prompt: no policy can have sampled it canonically
    messages.append({"role": "assistant", "content": answer})
    extended = template.extend(whole, messages, [{"role": "user", "content": follow}])
    canonical = template.render([*messages, {"role": "user", "content": follow}])
    assert extended == canonical
