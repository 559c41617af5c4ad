"""A slow conversation does not hold up the others: torchrl's asynchronous pool and collector with our environments."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torchrl.collectors.llm import LLMCollector
from torchrl.envs import AsyncEnvPool

from torchrl_chat import GSM8KEnv, TransformersPolicy, columns, training_view
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.services

TOKENIZER = tiny_tokenizer(TEXT_ALPHABET)
ENVS = 4
SLOW = "#### 0"


class Gate:
    """A verifier whose grade of one row waits until the test opens it."""

    def __init__(self):
        self.open = threading.Event()
        self.asked = threading.Event()

    def __call__(self, response: str, reference: str) -> float:
        if reference == SLOW:
            self.asked.set()
            assert self.open.wait(60), "the test never opened the gate"
        return 1.0


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()  # a failing test must not leave a thread behind


def make_env(index: int, verifier, mode: str = "tokens", max_steps: int = 1) -> GSM8KEnv:
    """The conversations about the question ``index``, one shard of the dataset."""
    rows = [{"question": f"question {i}", "answer": f"#### {i}"} for i in range(ENVS)]
    return GSM8KEnv(
        dataset=rows,
        tokenizer=TOKENIZER,
        input_mode=mode,
        system_prompt="s",
        verifier=verifier,
        max_steps=max_steps,
        shuffle=False,
        seed=0,
        shard=(index, ENVS),
    )


def make_policy() -> TransformersPolicy:
    model = tiny_model(len(TOKENIZER), hidden=16, layers=1)
    return TransformersPolicy(model, TOKENIZER, max_new_tokens=4, seeded=True)


def collect(gate, mode: str, turns: int) -> LLMCollector:
    pool = AsyncEnvPool(
        [functools.partial(make_env, i, gate, mode) for i in range(ENVS)], stack="lazy", backend="threading"
    )
    return LLMCollector(
        pool,
        policy=make_policy(),
        dialog_turns_per_batch=1,
        total_dialog_turns=turns,
        yield_completed_trajectories=True,
    )


def test_the_others_finish_while_one_waits(gate, mode):
    collector = collect(gate, mode, turns=1000)
    batches = iter(collector)
    seen: list[str] = []
    while min(seen.count(f"#### {i}") for i in range(1, ENVS)) < 4:  # the others, again and again
        seen.append(next(batches)["answer"][0])
        assert len(seen) < 500
    assert gate.asked.wait(30)
    assert SLOW not in seen
    gate.open.set()
    assert any(batch["answer"][0] == SLOW for batch in batches)  # then it arrives too
    collector.shutdown()


@pytest.mark.by_day(3)
def test_what_arrives_is_what_one_environment_plays(gate, mode):
    gate.open.set()
    collector = collect(gate, mode, turns=8)
    batches = list(collector)
    collector.shutdown()
    for batch in batches:
        index = int(batch["answer"][0].split()[1])
        alone = make_env(index, gate, mode)
        for _ in range(int(batch["episode_epoch"][0]) + 1):
            td = alone.step(make_policy()(alone.reset()))
        assert batch["episode_seed"].tolist() == td["episode_seed"].tolist()
        (ours,) = columns.read_objects(td["next", "transcript"], td.batch_size)
        (theirs,) = columns.read_objects(batch["next", "transcript"], batch.batch_size)
        assert theirs.tokens.tolist() == ours.tokens.tolist()
        assert theirs.log_probs.tolist() == pytest.approx(ours.log_probs.tolist(), abs=1e-5)
        assert batch["next", "reward"].shape == (1, 1, 1)
    view = training_view(batches, group="answer", layout="padded")
    assert view.batch_size == (8,)
    assert view["scored"].all()


def test_first_episodes_are_dropped_by_the_collector(gate):
    """torchrl's collectors reset once to see what comes, and play from another reset: documented in docs/train/scaling.md."""
    gate.open.set()
    collector = collect(gate, "tokens", turns=ENVS)
    first = list(collector)
    collector.shutdown()
    assert torch.cat([batch["episode_epoch"] for batch in first]).min() == 1
    for again in (False, True):
        env = make_env(0, gate)
        collector = LLMCollector(env, policy=make_policy(), dialog_turns_per_batch=1, total_dialog_turns=1)
        if again:
            env.reset_dataloader()
        (batch,) = collector
        assert batch["episode_epoch"].flatten().tolist() == [0 if again else 1]


@pytest.mark.by_day(3, place=1)
def test_processes(gate):
    """The same over a pool of processes, where an environment and its ledgers go through queues."""
    pool = AsyncEnvPool(
        [functools.partial(make_env, i, None) for i in (2, 3)],
        stack="lazy",
        backend="multiprocessing",
        exchange="queue",
    )
    collector = LLMCollector(
        pool,
        policy=make_policy(),
        dialog_turns_per_batch=1,
        total_dialog_turns=6,
        yield_completed_trajectories=True,
    )
    batches = list(collector)
    collector.shutdown()
    assert len(batches) == 6
    view = training_view(batches, group="answer")
    assert set(view["group"].tolist()) == {0, 1}
    assert view["scored"].all()
