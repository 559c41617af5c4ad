"""The environments inside torchrl: vectorized environments, collectors, buffers, pickling, GRPO's own parts."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
from conftest import bpe_tokenizer
from tensordict import TensorDict, lazy_stack
from torchrl.collectors.llm import LLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import AsyncEnvPool, ParallelEnv, SerialEnv
from torchrl.objectives.llm.grpo import MCAdvantage

from torchrl_chat import ChatEnv, DatasetChatEnv, GSM8KEnv, TransformersPolicy, columns
from torchrl_chat.tiny import tiny_model

ROWS = [{"question": f"what is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(12)]


def make_env(mode: str, rows: int = 2, **kwargs) -> GSM8KEnv:
    return GSM8KEnv(dataset=ROWS, tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=rows, seed=0, **kwargs)


def make_policy() -> TransformersPolicy:
    tokenizer = bpe_tokenizer()
    return TransformersPolicy(
        tiny_model(len(tokenizer)), tokenizer, max_new_tokens=5, generator=torch.Generator().manual_seed(0)
    )


def ledgers(td) -> list:
    return columns.read_objects(td.get("transcript"), td.batch_size)


def check_rollout(td: TensorDict) -> None:
    """In every step, what follows continues what the policy read and sampled, id for id."""
    for step in td.reshape(-1).unbind(0):
        before = step.get("transcript").data
        after = step["next"].get("transcript").data
        assert after.tokens[: len(before)].tolist() == before.tokens.tolist()
        response = step["tokens"].response
        sampled = after.tokens[len(before) : len(before) + len(response)]
        assert sampled.tolist() == response.tolist()
        assert after.num_sampled == before.num_sampled + len(response)


class TestVectorized:
    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.by_day(2, place=1)
    def test_serial_env(self, mode, workers):
        env = SerialEnv(workers, functools.partial(make_env, mode))
        td = env.rollout(3, make_policy(), break_when_any_done=False)
        assert td.shape == (workers, 2, 3)
        check_rollout(td)

    def test_serial_env_of_all_lengths(self):
        """Prompts and answers of many lengths: some combinations of them failed in tensordict's naming of dimensions."""
        tokenizer = bpe_tokenizer()
        rows = [{"query": "a" * (i + 1)} for i in range(12)]
        factory = functools.partial(
            DatasetChatEnv, dataset=rows, tokenizer=tokenizer, input_mode="tokens", num_envs=2, seed=0
        )
        policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        for seed in range(8):
            torch.manual_seed(seed)
            check_rollout(SerialEnv(2, factory).rollout(3, policy, break_when_any_done=False))

    @pytest.mark.by_day(3)
    def test_parallel_env(self, mode):
        """Without shared buffers, since rows differ in length; in processes of their own."""
        env = ParallelEnv(2, functools.partial(make_env, mode), use_buffers=False, mp_start_method="forkserver")
        try:
            td = env.rollout(3, make_policy(), break_when_any_done=False)
            assert td.shape == (2, 2, 3)
            check_rollout(td)
        finally:
            env.close()

    @pytest.mark.parametrize(
        ("mode", "backend"),
        [
            *(pytest.param(mode, "threading") for mode in ("history", "text", "tokens")),
            ("history", "multiprocessing"),
            pytest.param("text", "multiprocessing", marks=pytest.mark.full),
            pytest.param("tokens", "multiprocessing", marks=pytest.mark.full),
        ],
    )
    @pytest.mark.by_day(2)
    def test_async_env_pool(self, mode, backend):
        """``stack="lazy"``, since rows differ in length; one conversation an environment, as torchrl's collectors use it."""
        pool = AsyncEnvPool([functools.partial(make_env, mode, 1)] * 3, backend=backend, stack="lazy")
        try:
            act, td, steps = make_policy(), pool.reset(), 0
            assert td.shape == (3, 1)
            while steps < 9:
                pool.async_step_and_maybe_reset_send(lazy_stack([act(row) for row in td.unbind(0)]))
                done, td = pool.async_step_and_maybe_reset_recv(min_get=1)
                check_rollout(done)
                steps += len(done)
        finally:
            pool._maybe_shutdown()

    def test_async_env_pool_in_a_collector(self, mode):
        pool = AsyncEnvPool([functools.partial(make_env, mode, 1)] * 2, backend="threading", stack="lazy")
        collector = LLMCollector(
            pool,
            policy=make_policy(),
            dialog_turns_per_batch=1,
            total_dialog_turns=4,
            yield_completed_trajectories=True,
        )
        count = 0
        for batch in collector:
            check_rollout(batch)
            count += batch.numel()
        assert count == 4
        collector.shutdown()


class TestCollector:
    def test_steps(self, mode):
        collector = LLMCollector(
            make_env(mode, 4), policy=make_policy(), dialog_turns_per_batch=8, total_dialog_turns=16
        )
        batches = list(collector)
        assert [batch.numel() for batch in batches] == [8, 8]
        for batch in batches:
            check_rollout(batch)
            assert batch["next", "reward"].shape == (4, 2, 1, 1)
        collector.shutdown()

    def test_completed_trajectories(self, mode):
        collector = LLMCollector(
            make_env(mode, 2, max_steps=3), policy=make_policy(), dialog_turns_per_batch=3, total_dialog_turns=12,
            yield_completed_trajectories=True,
        )  # fmt: skip
        for batch in collector:
            assert batch["next", "done"].reshape(-1)[-1]
            check_rollout(batch)
        collector.shutdown()

    def test_policy_version(self, mode):
        collector = LLMCollector(
            make_env(mode, 2),
            policy=make_policy(),
            dialog_turns_per_batch=2,
            total_dialog_turns=4,
            track_policy_version=True,
        )
        for batch in collector:
            assert ("next", "policy_version") in batch.keys(True)
        collector.shutdown()

    def test_into_a_replay_buffer_with_advantages(self, mode):
        env = make_env(mode, 2, repeats=4, group_repeats=True)
        buffer = ReplayBuffer(
            storage=LazyStackStorage(64),
            sampler=SamplerWithoutReplacement(),
            batch_size=4,
            transform=MCAdvantage(4),
        )
        collector = LLMCollector(
            env, policy=make_policy(), dialog_turns_per_batch=8, total_dialog_turns=16, replay_buffer=buffer
        )
        for _ in collector:
            pass
        assert len(buffer) == 16
        for sample in buffer:
            assert sample["advantage"].shape == (4, 1, 1)
            for row in ledgers(sample):
                assert row.num_sampled == 0  # the prompt; the answer stands beside it
            assert len(sample.get(("tokens", "full"), as_list=True)) == 4
        collector.shutdown()


class TestStorage:
    def test_lazy_stack_storage_keeps_rows(self, mode):
        td = make_env(mode, 4).rollout(2, make_policy(), break_when_any_done=False)
        flat = td.reshape(-1)
        buffer = ReplayBuffer(storage=LazyStackStorage(8), batch_size=8)
        buffer.extend(flat)
        assert sorted(map(len, ledgers(buffer[:]))) == sorted(map(len, ledgers(flat)))
        sample = buffer.sample(4)
        stepped = make_env(mode, 4).base_env.step(sample.exclude("next"))
        assert [len(t) for t in ledgers(stepped["next"])] >= [len(t) for t in ledgers(sample)]

    def test_pickling(self, mode):
        env = pickle.loads(pickle.dumps(make_env(mode)))
        td = env.rollout(2, make_policy(), break_when_any_done=False)
        again = pickle.loads(pickle.dumps(td))
        assert ledgers(again) == ledgers(td)
        check_rollout(again)

    def test_two_dimensional_chat_env(self, mode):
        env = ChatEnv(input_mode=mode, tokenizer=bpe_tokenizer(), batch_size=(2, 2))
        td = env.reset(TensorDict(query=[["a", "b b"], ["c c c", "d"]], batch_size=(2, 2)))
        act = make_policy()
        check_rollout(env.rollout(2, act, auto_reset=False, tensordict=td))
