"""Collection with Ray on a cluster of two nodes, on this machine: what arrives, and what is left when workers die."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import OBJECT_STORE, need_shared, skip_without
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.objectives.llm.grpo import MCAdvantage

from torchrl_chat import TransformersPolicy, columns, training_view
from torchrl_chat.distributed import RayChatCollector, RayEpisodeCollector, WorkersLostError
from torchrl_chat.distributed.worker import Worker, load_weights, weights_of
from torchrl_chat.playing import play
from torchrl_chat.sandbox import Sandbox, SandboxError
from torchrl_chat.tiny import tiny_model, tiny_tokenizer

ray = pytest.importorskip("ray", reason="ray is not installed")
import ray_run  # noqa: E402  (it imports ray)

pytestmark = [pytest.mark.services, pytest.mark.xdist_group("ray")]

ROWS = 24  # of GSM8K, twice each, in batches of four: twelve batches are one epoch


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    lines = need_shared("data/gsm8k/train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:ROWS]]


@pytest.fixture
def collectors(ray_cluster):
    """Makes collectors, and ends them."""
    made = []

    def make(rows, cls=RayEpisodeCollector, policy=ray_run.make_policy, env=ray_run.make_env, **options):
        made.append(cls(functools.partial(env, rows), policy, **options))
        return made[-1]

    yield make
    for collector in made:
        collector.shutdown()


def episodes_of(batch) -> list[tuple]:
    """(epoch, row, place) of each row of a batch, or of a buffer's contents."""
    keys = ("episode_epoch", "episode_row", "episode_place")
    return list(zip(*(batch[key].flatten().tolist() for key in keys), strict=True))


def answers_of(batch) -> dict[tuple, list[int]]:
    ids = columns.read_objects(batch["transcript"], batch.batch_size)
    return dict(zip(episodes_of(batch), [t.tokens.tolist() for t in ids], strict=True))


def local_answers(rows, batches: int, **policy) -> dict[tuple, list[int]]:
    """What one process plays."""
    env, answers = ray_run.make_env(rows), {}
    policy = ray_run.make_policy(**policy)
    for _ in range(batches):
        answers |= answers_of(play(env, policy))
    return answers


EPOCH = {(0, row, place) for row in range(ROWS) for place in range(2)}


@pytest.mark.by_day(3)
def test_a_killed_worker_loses_nothing(collectors, rows):
    buffer = ReplayBuffer(storage=LazyStackStorage(2 * ROWS), batch_size=4)
    collector = collectors(rows, workers=2, batches=12, replay_buffer=buffer, collect=ray_run.slowly)
    killed = None
    for done, nothing in enumerate(collector, 1):
        assert nothing is None
        assert len(buffer) == 4 * done
        if killed is None and done == 3:
            killed = int(buffer[:]["pid"][-1])
            os.kill(killed, signal.SIGKILL)
    data = buffer[:]
    assert killed is not None
    assert collector.failures == 1
    assert sorted(episodes_of(data)) == sorted(EPOCH)  # every episode once
    assert answers_of(data) == local_answers(rows, 12)  # and what one process would have sampled


@pytest.mark.full
def test_a_lost_node_loses_nothing_and_a_new_one_joins(ray_cluster, collectors, rows):
    seen, pids, newcomers = [], [], set()
    collector = collectors(rows, workers=2, collect=ray_run.slowly)
    victim = None
    for batch in collector:
        seen += episodes_of(batch)
        pids.append(int(batch["pid"][0]))
        if victim is None and len(set(pids)) == 2:
            victim = next(
                node for node in ray_cluster.worker_nodes if ray_run.number_of(node.node_id) == batch["node"][0]
            )
            ray_cluster.remove_node(victim)
        elif collector.failures and not newcomers:
            assert len(ray_cluster.worker_nodes) == 1  # the run goes on with one node
            newcomers.add(ray_cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE).node_id)
        elif len(set(pids)) == 3:
            break  # a worker on the new node has delivered
        assert len(pids) < 400, "no worker came to the new node"
    state = collector.state_dict()
    assert collector.failures == 1
    assert len(seen) == len(set(seen))  # nothing twice
    delivered = set(range(state["next"])) - set(state["again"])
    assert len(delivered) == state["delivered"] == len(pids)
    order = all_episodes(rows, state["next"])
    assert set(seen) == {episode for k in delivered for episode in order[4 * k : 4 * k + 4]}


def all_episodes(rows, batches: int) -> list[tuple]:
    env = ray_run.make_env(rows)
    return [episode for _ in range(batches) for episode in episodes_of(env.reset())]


@pytest.mark.by_day(3, place=1)
def test_new_weights_and_what_the_learner_gets(collectors, rows):
    collector = collectors(rows, workers=1, batches=4, collect=ray_run.play_and_tell, env=ray_run.graded_env)
    batches = iter(collector)
    first = next(batches)
    assert first["graded_here"].all()  # the graders are processes of the worker, wherever it is
    other = ray_run.make_policy(seed=1)
    collector.update_policy_weights_(other)
    assert collector.policy_version == 1
    rest = list(batches)
    assert [batch["policy_version"].unique().tolist() for batch in (first, *rest)] == [[0], [1], [1], [1]]
    old, new = local_answers(rows, 1), local_answers(rows, 4, seed=1)
    assert answers_of(first) == old
    for batch in rest:
        assert answers_of(batch) == {key: new[key] for key in episodes_of(batch)}
    view = training_view(rest, group="episode_row")
    assert view["group"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert view["scored"].all()
    graders = [int(pid) for pid in first["reward_parts", "pid"].flatten()]
    collector.shutdown()
    assert gone(graders)  # a worker that is killed leaves no graders behind
    with pytest.raises(RuntimeError, match="shut down"):
        next(iter(collector))


@pytest.mark.by_day(3, place=1)
def test_a_sandbox_runs_where_the_worker_is(collectors, rows):
    try:
        Sandbox("namespaces").start().close()
    except SandboxError as error:
        skip_without("bwrap", f"no isolation here: {error}")
    (batch,) = collectors(rows, workers=1, batches=1, collect=ray_run.play_in_a_box)
    assert batch["boxed"].all()


def gone(pids: list[int], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.by_day(3, place=1)
def test_an_error_loses_its_batch_to_nobody(collectors, rows):
    bad = episodes_of(ray_run.make_env(rows).reset())[0][1]  # a row of the first batch
    collector = collectors(rows, workers=1, batches=3, policy=functools.partial(ray_run.odd_policy, bad))
    with pytest.raises(ArithmeticError, match=f"row {bad}"):
        next(iter(collector))
    assert collector.failures == 0
    state = collector.state_dict()
    assert state["again"] == [0]
    assert state["delivered"] == 0
    # The same run, with a policy that does not fail.
    resumed = collectors(rows, workers=1, batches=3)
    collector.shutdown()
    resumed.load_state_dict(state)
    seen = [episode for batch in resumed for episode in episodes_of(batch)]
    assert sorted(seen) == sorted(all_episodes(rows, 3))
    with pytest.raises(RuntimeError, match="has begun"):
        resumed.load_state_dict(state)


@pytest.mark.by_day(3, place=2)
def test_a_full_buffer_loses_nothing(collectors, rows):
    class Full:
        """A buffer that has no room, once."""

        def __init__(self):
            self.batches, self.full = [], True

        def extend(self, batch):
            if self.full and self.batches:
                self.full = False
                raise MemoryError("no room")
            self.batches.append(batch)

    buffer = Full()
    collector = collectors(rows, workers=1, batches=3, replay_buffer=buffer)
    with pytest.raises(MemoryError, match="no room"):
        list(collector)
    state = collector.state_dict()
    assert (len(state["again"]), state["delivered"]) == (
        state["next"] - 1,
        1,
    )  # it is not lost where the run is saved
    assert len(list(collector)) == 2
    assert sorted(e for batch in buffer.batches for e in episodes_of(batch)) == sorted(all_episodes(rows, 3))


@pytest.mark.by_day(3, place=2)
def test_a_run_that_cannot_begin(collectors, rows):
    with pytest.raises((OSError, WorkersLostError), match="no such disk"):
        next(iter(collectors(rows, env=ray_run.broken_env, workers=1)))
    nowhere = collectors(rows, workers=1, remote_config={"resources": {"moon": 1}}, start_timeout=2.0)
    with pytest.raises(WorkersLostError, match="no worker has come in 2 s"):
        next(iter(nowhere))
    with pytest.raises(ValueError, match="workers is 0"):
        collectors(rows, workers=0)
    with pytest.raises(ValueError, match="batches is 0"):
        collectors(rows, batches=0)


@pytest.mark.full
def test_too_many_deaths(collectors, rows):
    collector = collectors(rows, workers=1, collect=ray_run.die, max_failures=1)
    with pytest.raises(WorkersLostError, match="2 workers died, max_failures=1"):
        next(iter(collector))


class TestTorchRLsOwn:
    """torchrl's ``RayLLMCollector`` and ``RayReplayBuffer``, mended."""

    @pytest.fixture
    def make(self, ray_cluster, rows):
        made = []

        def make(**options):
            env = functools.partial(ray_run.make_env, rows, **options.pop("env", {}))
            made.append(
                RayChatCollector(
                    env,
                    policy_factory=ray_run.make_policy,
                    dialog_turns_per_batch=4,
                    total_dialog_turns=12,
                    num_cpus=1,
                    **options,
                )
            )
            return made[-1]

        yield make
        for collector in made:
            ray.kill(collector._collector)

    @pytest.mark.by_day(3, place=2)
    def test_iteration_ends(self, make):
        collector = make(sync_iter=False)
        assert [batch.numel() for batch in collector] == [4, 4, 4]
        assert collector.next() is None
        assert collector.total_dialog_turns == 12
        assert collector.dialog_turns_per_batch == 4

    @pytest.mark.full
    def test_buffer_in_an_actor(self, make):
        from torchrl.data.replay_buffers.ray_buffer import RayReplayBuffer

        buffer = RayReplayBuffer(
            storage=functools.partial(LazyStackStorage, 2 * ROWS),
            sampler=SamplerWithoutReplacement,
            transform_factory=functools.partial(MCAdvantage, grpo_size=2),
            batch_size=4,
            remote_config={"num_cpus": 0},
        )
        try:
            collector = make(replay_buffer=buffer, track_policy_version=True)
            collector.increment_version()
            assert list(collector) == [None, None, None]
            assert len(buffer) == 12
            sample = buffer.sample()
            assert sample.get("advantage").shape[0] == 4
            assert set(sample["next", "policy_version"].flatten().tolist()) == {1}
        finally:
            buffer.close()

    @pytest.mark.full
    def test_two_collectors_share_one_reader(self, make):
        shared = {"ray_backend": True, "dataloader_actor_name": f"rows of {os.getpid()}", "repeats": None}
        both = [make(env=shared), make(env=shared)]
        for collector in both:
            ray.get(collector._collector.is_initialized.remote())
        seen = [episode for collector in both for batch in collector for episode in episodes_of(batch)]
        ray.kill(ray.get_actor(shared["dataloader_actor_name"]))
        assert len(seen) == len(set(seen)) == 24


class TestWorker:
    """Without Ray."""

    def test_any_worker_plays_any_batch(self, rows):
        workers = [Worker(functools.partial(ray_run.make_env, rows), ray_run.make_policy, play) for _ in range(2)]
        episodes = workers[0].describe()["episodes"]
        assert workers[0].describe()["rows"] == 4
        for first in (8, 0, 40, 8):
            a, b = (answers_of(worker.play(episodes, first, 0)) for worker in workers)
            assert a == b

    def test_without_ray(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(ImportError, match=r"torchrl_chat\[ray\]"):
            RayEpisodeCollector(ray_run.make_env, ray_run.make_policy)

    def test_not_connected(self, monkeypatch):
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        with pytest.raises(RuntimeError, match=r"call ray.init"):
            RayEpisodeCollector(ray_run.make_env, ray_run.make_policy)

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_weights_of_a_model_and_of_its_policy_are_the_same(self, wrapped):
        """A model of transformers has a ``model`` of its own, which lacks the head."""
        tokenizer = tiny_tokenizer()
        new, old = (tiny_model(len(tokenizer), seed=seed) for seed in (1, 2))
        weights = weights_of(TransformersPolicy(new, tokenizer) if wrapped else new)
        assert weights.keys() == new.state_dict().keys()
        load_weights(TransformersPolicy(old, tokenizer), weights)
        assert all(torch.equal(value, weights[key]) for key, value in old.state_dict().items())

    def test_refusals(self, rows):
        class Stone:
            model = None

        with pytest.raises(TypeError, match="a Stone has no sync"):
            load_weights(Stone(), {})
        with pytest.raises(TypeError, match="cannot be chosen by number"):
            Worker(functools.partial(ray_run.loader_env, rows), ray_run.make_policy, play)
        worker = Worker(functools.partial(ray_run.make_env, rows), ray_run.make_policy, play)
        other = Worker(functools.partial(ray_run.make_env, rows[:5]), ray_run.make_policy, play)
        with pytest.raises(ValueError, match="another sequence of episodes"):
            worker.play(other.describe()["episodes"], 0, 0)
