"""torchrl's ``sota-implementations/grpo`` with our environment in place of its own.

The script needs CUDA and vLLM; its other pieces (factory, collector, buffer, ``MCAdvantage``, loss, what it logs) run here
as it puts them together, with a transformers wrapper where it has vLLM. What the script asks of an environment is
listed in five points, each a test.
"""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
from torchrl.collectors.llm import LLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.data.llm import History
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs.llm.transforms import PolicyVersion
from torchrl.modules.llm.policies import ChatHistory
from torchrl.objectives.llm.grpo import GRPOLoss, MCAdvantage

from torchrl_chat import AddThinkingPrompt, GSM8KEnv
from torchrl_chat.policies import ExactTransformersWrapper
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.services

TOKENIZER = tiny_tokenizer(TEXT_ALPHABET)
ROWS = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(6)]
REPEATS, ENVS = 3, 6


def make_env(reasoning: bool = False, max_steps: int = 2, **options) -> GSM8KEnv:
    """The script's factory: its keyword arguments, and what it appends."""
    arguments = {
        "repeats": REPEATS,
        "tokenizer": TOKENIZER,
        "num_envs": ENVS,
        "max_steps": max_steps if reasoning else 1,
        "device": torch.device("cpu"),
    }
    env = GSM8KEnv(dataset=ROWS, seed=0, shuffle=False, **arguments, **options)
    if reasoning:
        env = env.append_transform(
            AddThinkingPrompt(
                cond=lambda td: td["reward"] <= 0.1 and td["step_count"] < max_steps,
                role="user",
                edit_last_turn=False,
                zero_reward=False,
                undo_done=True,
                random_prompt=True,
            )
        )
    return env


def make_wrapper(**options) -> ExactTransformersWrapper:
    model = tiny_model(len(TOKENIZER), hidden=16, layers=1, context=2048)
    sampling = {"max_new_tokens": 6, "do_sample": True}
    return ExactTransformersWrapper(
        model, tokenizer=TOKENIZER, input_mode="history", generate_kwargs=sampling, pad_output=False, **options
    )


@pytest.fixture(params=[False, True], ids=["answer", "reasoning"])
def reasoning(request) -> bool:
    return request.param


def test_1_factory(reasoning):
    factory = functools.partial(make_env, reasoning)
    env = pickle.loads(pickle.dumps(factory))()
    assert env.base_env.input_mode == "history"
    assert env.batch_size == (ENVS,)
    versioned = env.append_transform(PolicyVersion())
    assert type(versioned) is type(env)
    assert versioned.base_env is env.base_env


def test_2_reset(reasoning):
    env = make_env(reasoning)
    td = env.reset()
    assert isinstance(td["history"], ChatHistory)
    assert isinstance(td["history"].prompt, History)
    assert td["history"].prompt.batch_size == (ENVS, 2)  # system and user
    queries = list(td["query"])
    assert queries == [f"{i} + {i}?" for i in (0, 0, 0, 1, 1, 1)]
    policy, seen = make_wrapper(), []
    for _ in range(6):
        td, following = env.step_and_maybe_reset(policy(td))
        assert list(td["query"]) == queries  # kept at the root
        done = td["next", "done"].flatten().tolist()
        seen += [query for query, ended in zip(queries, done, strict=True) if ended]
        td = following
        queries = list(td["query"])
    turns = 2 if reasoning else 1  # of each conversation: all answers are wrong
    assert {query: seen.count(query) for query in seen} == {
        f"{i} + {i}?": 6 * ENVS // (turns * len(ROWS)) for i in range(len(ROWS))
    }


def test_3_step():
    env, policy = make_env(), make_wrapper()
    td = policy(env.reset())
    assert td["history"].full.batch_size == (ENVS, 3)
    before = {key: set(td[key].keys()) for key in ("tokens", "log_probs", "masks", "text") if key in td.keys()}
    td = env.step(td)
    assert td["next", "history"].prompt.batch_size == (ENVS, 3)
    for key, fields in before.items():
        assert fields <= set(td[key].keys())
    for key in (("tokens", "full"), ("tokens", "response"), ("log_probs", "full")):
        assert all(len(row) for row in td.get(key, as_list=True))
    text = td[0]["next", "history"].prompt.apply_chat_template(tokenizer=TOKENIZER)
    assert "0 + 0?" in text


def test_4_reward_and_done(reasoning):
    env, policy = make_env(reasoning), make_wrapper()
    td = env.step(policy(env.reset()))
    assert td["next", "reward"].shape == (ENVS, 1, 1)
    assert td["next", "reward"].dtype is torch.float32
    for key in ("done", "terminated", "truncated"):
        assert td["next", key].shape == (ENVS, 1)
    assert td["next", "step_count"].flatten().tolist() == [1] * ENVS
    assert td["next", "done"].all() != reasoning  # a wrong answer is thought over once
    if reasoning:
        td = env.step(policy(env.step_mdp(td)))
        assert td["next", "done"].all()
        assert td["next", "step_count"].flatten().tolist() == [2] * ENVS


def test_5_collector_buffer_loss(reasoning):
    """The script's loop, in one process."""
    policy = make_wrapper()
    buffer = ReplayBuffer(
        storage=LazyStackStorage(REPEATS * ENVS),
        sampler=SamplerWithoutReplacement(),
        transform=MCAdvantage(grpo_size=REPEATS),
        batch_size=3,
    )
    collector = LLMCollector(
        functools.partial(make_env, reasoning),
        policy=policy,
        dialog_turns_per_batch=ENVS,
        total_dialog_turns=6 * ENVS,
        replay_buffer=buffer,
        track_policy_version=True,
        yield_only_last_steps=reasoning,
    )
    actor = make_wrapper(generate=False)
    actor.model.load_state_dict(policy.model.state_dict())
    loss_module = GRPOLoss(
        actor, kl_to_inference_coeff=1e-2, entropy_coeff=1e-4, masking_strategy="rlhf" if reasoning else "sft"
    )
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    trained = 0
    for nothing in collector:
        assert nothing is None
        if not len(buffer):
            continue  # MCAdvantage waits for whole groups
        for batch in buffer:
            loss = loss_module(batch)
            if trained == 0:
                assert float(loss.ESS) == pytest.approx(1.0, abs=1e-4)
            loss.mean(reduce=True).backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in actor.parameters())
            optimizer.step()
            optimizer.zero_grad()
            trained += batch.numel()
        content = buffer[:]  # what the script logs
        assert content.get(("next", "step_count")).view(-1).float().mean() == (2 if reasoning else 1)
        assert content.get(("next", "policy_version")).view(-1).float().min() >= 0
        assert torch.cat(content.get(("next", "reward"), as_list=True)).isfinite().all()
        assert all(row.numel() for row in content.get(("tokens", "response"), as_list=True))
        policy.model.load_state_dict(actor.model.state_dict())
        collector.increment_version()
        buffer.empty(empty_write_count=False)
    assert trained >= 4 * REPEATS
    collector.shutdown()
