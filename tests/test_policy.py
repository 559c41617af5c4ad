"""``TransformersPolicy``: exact ids, and log-probs of exactly those ids."""

from __future__ import annotations

import pytest
import torch
from conftest import bpe_tokenizer
from tensordict import TensorDict, lazy_stack
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.objectives.llm.grpo import GRPOLoss

from torchrl_chat import ChatEnv, TransformersPolicy, columns
from torchrl_chat.cli.tiny import tiny_model, tiny_tokenizer


def policy(tokenizer=None, **kwargs) -> TransformersPolicy:
    tokenizer = tokenizer or bpe_tokenizer()
    kwargs = {"max_new_tokens": 7, "generator": torch.Generator().manual_seed(0), **kwargs}
    return TransformersPolicy(tiny_model(len(tokenizer), seed=1), tokenizer, **kwargs)


def reference_log_probs(model, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-prob of every token after the first, by one unpadded forward pass."""
    logits = model(input_ids=ids[None]).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)


def start(mode: str, rows: int = 4) -> tuple[ChatEnv, TensorDict]:
    env = ChatEnv(input_mode=mode, tokenizer=bpe_tokenizer(), batch_size=(rows,))
    return env, env.reset(TensorDict(query=[f"what is {'1 + ' * i}2" for i in range(rows)], batch_size=(rows,)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_over_turns(mode, temperature):
    """Over a ragged multi-turn episode, the carried log-probs are those of one forward pass over the result."""
    act = policy(temperature=temperature)
    env, td = start(mode)
    for turn in range(3):
        td = env.step_mdp(env.step(act(td)))
        if turn < 2:
            td = env.append_messages(td, [f"and {'then ' * i}?" for i in range(4)])
    for transcript in columns.read_objects(td["transcript"], td.batch_size):
        assert transcript.scored
        with torch.no_grad():
            expected = reference_log_probs(act.model, transcript.tokens, temperature)
        mask = transcript.mask[1:]
        assert torch.allclose(transcript.log_probs[1:][mask], expected[mask], atol=1e-5)
        assert mask.sum() > 3


def test_shapes_and_masks(mode):
    env, td = start(mode)
    prompts = columns.read_field(td["tokens"], "prompt", td.batch_size)
    td = policy()(td)

    def rows(container, key):
        return columns.read_field(td[container], key, td.batch_size)

    for i, prompt in enumerate(prompts):
        response = rows("tokens", "response")[i]
        assert rows("tokens", "full")[i].tolist() == prompt.tolist() + response.tolist()
        assert rows("log_probs", "full")[i].shape == rows("tokens", "full")[i].shape
        assert rows("masks", "all_assistant_mask")[i].tolist() == [False] * len(prompt) + [True] * len(response)
        assert rows("masks", "all_attention_mask")[i].all()
        assert rows("text", "response")[i] == env.tokenizer.decode(response)
    env.step(td)


def test_rows_do_not_depend_on_padding():
    act = policy(temperature=0)
    env, td = start("tokens", 4)
    together = columns.read_field(act(td)["tokens"], "response", td.batch_size)
    for i in range(4):
        alone = act.generate([columns.read_field(td["tokens"], "prompt", td.batch_size)[i]])[0][0]
        assert alone.tolist() == together[i].tolist()
    assert env.batch_size == (4,)


def test_stop_token_is_kept_and_nothing_follows():
    tokenizer = tiny_tokenizer()
    act = policy(tokenizer, max_new_tokens=40)
    prompts = [torch.tensor(tokenizer("last(1,2)=")["input_ids"])] * 64
    ids, scores = act.generate(prompts)
    stop = tokenizer.eos_token_id
    ended = [row for row in ids if stop in row.tolist()]
    assert ended
    for row, score in zip(ids, scores, strict=True):
        assert row.tolist().count(stop) <= 1
        assert stop not in row.tolist()[:-1]
        assert len(row) == len(score) <= 40
        assert len(row) == 40 or row[-1] == stop


def test_same_generator_same_sample():
    _, td = start("tokens")
    first = columns.read_field(policy()(td.copy())["tokens"], "response", td.batch_size)
    second = columns.read_field(policy()(td.copy())["tokens"], "response", td.batch_size)
    assert [row.tolist() for row in first] == [row.tolist() for row in second]


@pytest.mark.parametrize("strategy", ["sft", "rlhf"])
def test_grpo_loss_sees_the_sampling_distribution(strategy):
    """Before any update the effective sample size is 1 and the approximate KL 0, also on a second turn."""
    act = policy(temperature=0.8)
    env, td = start("tokens", 8)
    td = act(env.append_messages(env.step_mdp(env.step(act(td))), ["go on"] * 8))
    td["advantage"] = torch.randn(8, 1, 1)
    buffer = ReplayBuffer(storage=LazyStackStorage(8), batch_size=8)
    buffer.extend(lazy_stack(list(td.unbind(0))))
    loss = GRPOLoss(act, masking_strategy=strategy)(buffer.sample())
    assert loss.ESS.item() == pytest.approx(1.0, abs=1e-4)
    assert abs(loss.kl_approx.item()) < 1e-5
    loss.loss_objective.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in act.model.parameters())


def test_ids_beyond_the_vocabulary_are_never_sampled():
    """Models pad their embeddings: Qwen2.5 has 151,936 rows for 151,665 tokens."""
    tokenizer = bpe_tokenizer()
    model = tiny_model(len(tokenizer) + 500, seed=1)
    act = TransformersPolicy(model, tokenizer, max_new_tokens=20, generator=torch.Generator().manual_seed(0))
    env, td = start("tokens", 8)
    td = act(td)
    env.step(td)
    assert act.get_dist(td).logits.shape[-1] == len(tokenizer)


def test_bad_arguments():
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        policy(max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        policy(temperature=-1)
    with pytest.raises(KeyError, match=r"\('tokens', 'prompt'\)"):
        policy()(TensorDict(batch_size=(1,)))
