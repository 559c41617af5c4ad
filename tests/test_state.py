"""Determinism and resume: the order of episodes and their seeds, states, conversations in flight, and runs that are killed."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer, of_the_day
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from state_run import ROWS, advance, episodes, ledgers, make, run, shown
from tensordict import TensorDict
from torch.utils.data import DataLoader, RandomSampler
from torchrl.collectors.llm import LLMCollector
from torchrl.envs import AsyncEnvPool, ParallelEnv, SerialEnv, StepCounter
from torchrl.envs.utils import check_env_specs

from torchrl_chat import Budget, ChatEnv, DatasetChatEnv, DatasetError, TransformersPolicy, UserSimulator, columns
from torchrl_chat.envs.loading import dataset_episodes
from torchrl_chat.envs.state import collector_state, load_collector_state, load_state, save_state
from torchrl_chat.seeds import EPISODE_KEYS, episode_seed, mixed
from torchrl_chat.tiny import tiny_model
from torchrl_chat.transforms.user_models import ModelUser

quick = settings(max_examples=12, deadline=None)


def bare(**options) -> DatasetChatEnv:
    """Messages only: cheap, for what concerns the order alone."""
    return DatasetChatEnv(**{"dataset": ROWS, "seed": 3, **options})


def started(env: DatasetChatEnv, count: int, draw: random.Random | None = None) -> list[tuple[int, ...]]:
    """The first ``count`` episodes that start, conversations ending at random."""
    td = env.reset()
    found = episodes(td)
    while len(found) < count:
        fresh = [draw is None or draw.random() < 0.5 for _ in range(len(td))]
        if any(fresh):
            td["_reset"] = torch.tensor(fresh).reshape(-1, 1)
            td = env.reset(td)
            found += itertools.compress(episodes(td), fresh)
    return found[:count]


def through(path: Path, state: dict) -> dict:
    save_state(path, state)
    return load_state(path)


class TestOrder:
    @quick
    @given(
        num_envs=st.integers(1, 8),
        repeats=st.integers(1, 3),
        group=st.booleans(),
        shuffle=st.booleans(),
        block=st.integers(1, 9),
        seed=st.integers(0, 2**40),
        draw=st.randoms(use_true_random=False),
    )
    def test_any_batch_plays_the_same_episodes(self, num_envs, repeats, group, shuffle, block, seed, draw):
        """The law of the order, and the layout of batches has no part in it."""
        count = 3 * len(ROWS) * repeats
        options = {"seed": seed, "repeats": repeats, "shuffle": shuffle}
        env = bare(num_envs=num_envs, group_repeats=group, batch_size_dl=block, **options)
        played = started(env, count, draw)
        assert played == started(bare(**options), count)
        for epoch in range(3):
            of_epoch = played[epoch * len(ROWS) * repeats :][: len(ROWS) * repeats]
            assert Counter(row for _, row, _, _ in of_epoch) == dict.fromkeys(range(len(ROWS)), repeats)
            assert [place for *_, place in of_epoch] == [*range(repeats)] * len(ROWS)
            assert {e for _, _, e, _ in of_epoch} == {epoch}
        assert [s for s, *_ in played] == [episode_seed(seed, *rest) for _, *rest in played]
        assert len({s for s, *_ in played}) == count

    def test_rows_are_those_of_the_dataset(self):
        td = bare(num_envs=9).reset()
        assert td["query"] == [ROWS[row]["query"] for row in td["episode_row"].tolist()]

    def test_each_epoch_has_its_own_order(self):
        played = [row for _, row, _, _ in started(bare(), 4 * len(ROWS))]
        orders = {tuple(played[i : i + len(ROWS)]) for i in range(0, len(played), len(ROWS))}
        assert len(orders) == 4
        assert played != [row for _, row, _, _ in started(bare(seed=4), 4 * len(ROWS))]

    @quick
    @given(count=st.integers(1, 9), repeats=st.integers(1, 3), taken=st.integers(1, 12), shuffle=st.booleans())
    def test_shards_divide_the_order(self, count, repeats, taken, shuffle):
        """Shards that have taken k rows each have taken the first rows of the whole, none twice."""
        options = {"repeats": repeats, "shuffle": shuffle}
        shards = [started(bare(shard=(i, count), **options), taken * repeats) for i in range(count)]
        whole = started(bare(**options), taken * repeats * count)
        assert sorted(itertools.chain(*shards)) == sorted(whole)
        woven = [shards[i][k * repeats : (k + 1) * repeats] for k in range(taken) for i in range(count)]
        assert list(itertools.chain(*woven)) == whole

    @pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
    def test_no_such_shard(self, shard):
        with pytest.raises(ValueError, match="expected .index, count."):
            bare(shard=shard)

    def test_clashes_and_collate_functions_that_drop_rows(self):
        with pytest.raises(ValueError, match=r"column\(s\) \['episode_row'\].*rename"):
            bare(dataset=[{"query": "x", "episode_row": 1}])
        env = bare(batch_size_dl=2, collate_fn=lambda rows: {"query": [r["query"] for r in rows][:2]})
        assert len(started(env, 5)) == 5
        with pytest.raises(DatasetError, match="collate_fn made 1 rows of 3.*Filter the dataset"):
            bare(batch_size_dl=3, collate_fn=lambda rows: {"query": [rows[0]["query"]]})

    def test_mixed(self):
        """Fixed for good: a run is resumed by another version."""
        assert mixed(0, "order", 1) == 2002067703672271585
        assert len({mixed(*parts) for parts in [(1, 23), (12, 3), ("1", 23), (1, "23"), (123,)]}) == 5


class TestContainers:
    @pytest.mark.parametrize("rows", [1, 4])
    def test_specs(self, mode, rows):
        env = make(mode, num_envs=rows, repeats=2)
        check_env_specs(env)
        td = env.rollout(3, lambda td: env.rand_action(td), break_when_any_done=False)
        for key in EPISODE_KEYS:
            assert td[key].dtype == torch.int64
            assert td[key].shape == td["next", key].shape == (rows, 3)

    @pytest.mark.parametrize("kind", [SerialEnv, ParallelEnv])
    @pytest.mark.by_day(2, place=1)
    def test_vectorized(self, mode, kind):
        """The states of the workers, and what each plays, one shard a worker."""
        makers = [functools.partial(make, mode, num_envs=2, shard=(i, 2)) for i in range(2)]
        more = {} if kind is SerialEnv else {"use_buffers": False, "mp_start_method": "forkserver"}
        env = kind(2, makers, **more)
        try:
            check_env_specs(env)
            env.reset()
            state = env.state_dict()
            follows = [episodes(row) for row in env.reset().unbind(0)]
            env.reset()
            env.load_state_dict(state)
            assert [episodes(row) for row in env.reset().unbind(0)] == follows
            assert set(follows[0]).isdisjoint(follows[1])
        finally:
            env.close()

    def test_async_env_pool(self, mode):
        makers = [functools.partial(make, mode, shard=(i, 3)) for i in range(3)]
        pool = AsyncEnvPool(makers, backend="threading", stack="lazy")
        try:
            got = [episodes(row)[0] for row in pool.reset().unbind(0)]
            assert got == started(bare(), 3)
            collector = LLMCollector(pool, policy=lambda td: td, dialog_turns_per_batch=1, total_dialog_turns=1)
            with pytest.raises(TypeError, match="AsyncEnvPool"):
                collector_state(collector)
        finally:
            pool._maybe_shutdown()

    @pytest.mark.parametrize("options", [{}, {"yield_completed_trajectories": True}])
    def test_collector(self, tmp_path, options):
        """A collector that is interrupted between any two batches gives what one gives that is not."""

        def collector():
            torch.manual_seed(0)
            tokenizer = bpe_tokenizer()
            policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4, seeded=True)
            return LLMCollector(
                make(num_envs=3), policy=policy, dialog_turns_per_batch=6, total_dialog_turns=24, **options
            )

        def read(batch):
            flat = batch.reshape(-1)
            return list(zip(episodes(flat), map(shown, ledgers(flat["next"])), strict=True))

        whole = [read(batch) for batch in collector()]
        assert len(whole) > 3
        for taken in (1, 2, 3):
            first = collector()
            got = [read(batch) for batch in itertools.islice(first, taken)]
            state = through(tmp_path / "collector.pt", collector_state(first))
            second = collector()
            load_collector_state(second, state)
            assert got + [read(batch) for batch in second] == whole
        with pytest.raises(ValueError, match="batch of"):
            load_collector_state(second, {**state, "next": state["next"][:1]})


class TestState:
    @quick
    @given(
        num_envs=st.integers(1, 5),
        repeats=st.integers(1, 3),
        group=st.booleans(),
        block=st.integers(1, 3),
        before=st.integers(0, 9),
        draw=st.randoms(use_true_random=False),
    )
    def test_next_episodes(self, num_envs, repeats, group, block, before, draw):
        """Saved after any number of episodes, loaded into a fresh environment, or pickled: the same episodes follow."""
        options = {"num_envs": num_envs, "repeats": repeats, "group_repeats": group, "batch_size_dl": block}
        env = bare(**options)
        if before:
            started(env, before, draw)
        state = json.loads(json.dumps(env.state_dict()))  # a few numbers
        copy = pickle.loads(pickle.dumps(env))
        follows = started(env, 40)
        assert started(copy, 40) == follows
        fresh = bare(**options, seed=99)  # the seed is in the state
        fresh.reset()
        fresh.load_state_dict(state)
        assert started(fresh, 40) == follows
        other = bare(num_envs=2, repeats=repeats)  # the layout of batches is not
        other.load_state_dict(state)
        assert started(other, 40) == follows

    @quick
    @given(
        num_envs=st.integers(1, 4),
        repeats=st.integers(1, 2),
        steps=st.integers(0, 6),
        mode=st.sampled_from(["tokens", "text", "history"]),
    )
    def test_conversations_in_flight(self, num_envs, repeats, steps, mode):
        """Interrupted after any step, in another environment: the same ledgers, step for step."""
        env = make(mode, num_envs=num_envs, repeats=repeats)
        td = env.reset()
        for _ in range(steps):
            td, _ = advance(env, td)
        with tempfile.TemporaryDirectory() as folder:
            state = through(Path(folder, "state.pt"), {"env": env.state_dict(), "td": td})
        again, other = state["td"], make(mode, num_envs=num_envs, repeats=repeats, seed=8)
        other.load_state_dict(state["env"])
        assert set(again.keys()) == set(td.keys())
        assert list(map(shown, ledgers(again))) == list(map(shown, ledgers(td)))
        for _ in range(5):
            td, finished = advance(env, td)
            again, likewise = advance(other, again)
            assert likewise == finished
            assert episodes(again) == episodes(td)
            assert list(map(shown, ledgers(again))) == list(map(shown, ledgers(td)))

    def test_episodes_do_not_depend_on_the_batch(self, mode):
        """What is said in an episode is the same in batches of any size: users, prompts to think, answers."""

        def played(num_envs: int) -> dict:
            env, found = make(mode, num_envs=num_envs), {}
            td = env.reset()
            while not set(wanted) <= set(found):
                td, finished = advance(env, td)
                found.update(finished)
            return {episode: found[episode] for episode in wanted}

        wanted = started(bare(), 12)
        alone = played(1)
        assert played(4) == alone == played(8)
        assert max(len(messages) for _, messages, _ in alone.values()) > 4

    def test_a_state_is_small(self, tmp_path):
        """No spare capacity of the ledgers: what is written grows with the tokens, by their columns' bytes."""
        sizes = []
        for words in (10, 2000):
            env = make(dataset=[{"query": "a b " * words}], num_envs=4)
            td = env.reset()
            save_state(tmp_path / "state.pt", {"td": td})
            sizes.append(((tmp_path / "state.pt").stat().st_size, 4 * len(ledgers(td)[0])))
        (small, few), (large, many) = sizes
        text = 4 * 2 * 4 * 2000  # the query, in its column and in the messages
        assert large - small - text < 1.1 * 2 * 13 * (many - few)  # 13 bytes a token, in the ledger and its columns

    def test_another_process(self, tmp_path):
        options = {"mode": "text", "num_envs": 3, "repeats": 2}
        (tmp_path / "whole").mkdir()
        (tmp_path / "parts").mkdir()
        run(tmp_path / "whole", 9, **options)
        run(tmp_path / "parts", 4, **options)
        script = Path(__file__).with_name("state_run.py")
        command = [sys.executable, str(script), str(tmp_path / "parts"), "9", json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        whole, parts = (load_state(tmp_path / name / "state.pt") for name in ("whole", "parts"))
        assert whole["trained"] == parts["trained"]
        assert whole["trained"]
        assert list(map(shown, ledgers(whole["td"]))) == list(map(shown, ledgers(parts["td"])))

    def test_other_episodes_are_refused(self):
        state = bare(repeats=2).state_dict()
        for options, found in (
            ({"repeats": 3}, r"\{'repeats': 2\}.*\{'repeats': 3\}"),
            ({"repeats": 2, "shuffle": False}, "'shuffle': True"),
            ({"repeats": 2, "dataset": ROWS[:3]}, r"'rows': 7.*'rows': 3"),
        ):
            with pytest.raises(ValueError, match=f"another sequence of episodes.*{found}"):
                bare(**options).load_state_dict(state)
        with pytest.raises(ValueError, match=r"another sequence of episodes.*'shard': \[0, 2\]"):
            bare(shard=(1, 2)).load_state_dict(bare(shard=(0, 2)).state_dict())

    @given(
        before=st.integers(1, 6),
        after=st.integers(1, 6),
        rows=st.integers(0, 12),
        repeats=st.integers(1, 3),
        shuffle=st.booleans(),
    )
    def test_another_number_of_shards_goes_on_behind_what_was_taken(self, before, after, rows, repeats, shuffle):
        """Each of some has taken so many rows: together the first of the whole order, and others take the next."""

        def taken(count, each, states=None):
            settings = {"seed": 3, "repeats": repeats, "shuffle": shuffle}
            shards = [dataset_episodes(ROWS, shard=(index, count), **settings) for index in range(count)]
            for index, shard in enumerate(shards if states else ()):
                shard.load_state_dict(states[index if len(states) == count else 0])
            rows = [[shard.next() for _ in range(each * repeats)] for shard in shards]
            order = [
                row[turn * repeats + place] for turn in range(each) for row in rows for place in range(repeats)
            ]
            return [tuple(episode[key] for key in EPISODE_KEYS) for episode in order], [
                s.state_dict() for s in shards
            ]

        first, states = taken(before, rows)
        if rows * before % after:
            with pytest.raises(ValueError, match=f"{after} shards cannot have played"):
                taken(after, 1, states)
            return
        then, _ = taken(after, 2, states)
        assert first + then == taken(1, rows * before + 2 * after)[0]

    def test_an_interrupted_write_leaves_the_old_state(self, tmp_path):
        path = tmp_path / "state.pt"
        save_state(path, {"step": 1})
        with pytest.raises(Exception, match="pickle"):
            save_state(path, {"step": 2, "bad": lambda: None})
        assert load_state(path) == {"step": 1}
        assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]

    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
    def test_the_file_may_be_read_by_whom_the_umask_says(self, tmp_path, umask):
        before = os.umask(umask)
        try:
            save_state(tmp_path / "state.pt", {"step": 1})
            (tmp_path / "another").touch()
            mode = (tmp_path / "another").stat().st_mode
            assert (tmp_path / "state.pt").stat().st_mode == mode
            (tmp_path / "state.pt").chmod(0o640)
            save_state(tmp_path / "state.pt", {"step": 2})
            assert (tmp_path / "state.pt").stat().st_mode & 0o777 == 0o640
        finally:
            os.umask(before)

    def test_chat_env(self):
        env = ChatEnv(tokenizer=bpe_tokenizer(), input_mode="tokens")
        assert not env.state_dict()
        assert not env.load_state_dict(env.state_dict()).missing_keys

    def test_time_between_runs_does_not_count(self, monkeypatch):
        env = bare().append_transform(Budget(max_seconds=100.0))
        clock = [1000.0]
        monkeypatch.setattr("torchrl_chat.transforms.budgets.time.time", lambda: clock[0])

        def over(env, td) -> bool:
            td = td.copy()
            td["history"] = columns.histories(
                "response", [columns.history_messages([ANSWER])], env.batch_size, None
            )
            return bool(env.step(td)["next", "done"])

        td = env.reset()
        clock[0] += 60
        state = env.state_dict()
        clock[0] += 5000
        assert over(env, td)  # a run that went on all the time
        again = bare().append_transform(Budget(max_seconds=100.0))
        again.load_state_dict(state)
        assert not over(again, td)
        second = again.reset()
        clock[0] += 41
        assert over(again, td)
        assert not over(again, second)  # begun behind the pause, which is not its own
        clock[0] += 60
        assert over(again, second)


ANSWER = {"role": "assistant", "content": "42"}


class Counting:
    """A loader of anybody's that knows where it is."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 4:
            self.at += 1
            yield [{"query": f"batch {self.at} row {i}"} for i in range(3)]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def shuffled(kind: type = DataLoader, **options) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    return kind(
        Dataset.from_list(ROWS), batch_size=3, shuffle=True, generator=generator, collate_fn=list, **options
    )


# torchrl makes spawn the default, which is slow.
IN_WORKERS = {"multiprocessing_context": "forkserver", "timeout": 60}


def torchdata_loader(workers: int):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    more = IN_WORKERS if workers else {}
    return shuffled(stateful.StatefulDataLoader, num_workers=workers, **more)


LOADERS = {
    "list": lambda: [ROWS[:3], ROWS[3:]],
    "sequential": lambda: DataLoader(Dataset.from_list(ROWS), batch_size=3, collate_fn=list),
    "shuffled": shuffled,
    "sampler": lambda: DataLoader(
        Dataset.from_list(ROWS),
        batch_size=2,
        sampler=RandomSampler(ROWS, generator=torch.Generator().manual_seed(1)),
        collate_fn=list,
    ),
    "workers": lambda: shuffled(num_workers=1, **IN_WORKERS),
    "counting": Counting,
    "torchdata": lambda: torchdata_loader(0),
    "torchdata workers": lambda: torchdata_loader(1),
}


class TestDataloaders:
    @staticmethod
    def env(loader, **options) -> DatasetChatEnv:
        return DatasetChatEnv.from_dataloader(loader, **{"seed": 2, "repeats": 2, "batch_size": 1, **options})

    @staticmethod
    def drawn(env, count):
        tds = [env.reset() for _ in range(count)]
        return [(td["query"][0], *episodes(td)[0]) for td in tds]

    @pytest.mark.parametrize("first", of_the_day(0, 1, 2))
    @pytest.mark.parametrize("name", LOADERS)
    @pytest.mark.by_day(2)
    def test_resume_anywhere(self, name, first):
        """From each third place of two epochs the next two come as without the interruption; a pickled copy goes on too."""
        slow = "workers" in name  # a worker process takes its time to end
        count = 24 if slow else 46
        whole = self.drawn(self.env(LOADERS[name]()), count)
        env = self.env(LOADERS[name]())
        for taken in range(0 if slow else 30):
            if taken % 3 == first:
                state = env.state_dict()
                other = self.env(LOADERS[name]())
                self.drawn(other, taken % 5)  # whatever it has read before
                other.load_state_dict(state)
                assert self.drawn(other, 16) == whole[taken : taken + 16]
                if taken // 3 % 3 == 0:
                    assert self.drawn(pickle.loads(pickle.dumps(env)), 16) == whole[taken : taken + 16]
            assert self.drawn(env, 1) == whole[taken : taken + 1]
        for taken in (7,) if slow else ():
            env = self.env(LOADERS[name]())
            self.drawn(env, taken)
            other = self.env(LOADERS[name]())
            other.load_state_dict(env.state_dict())
            assert self.drawn(other, 17) == whole[taken : taken + 17]

    def test_columns(self):
        played = self.drawn(self.env(LOADERS["list"]()), 30)
        assert [row for _, _, row, _, _ in played] == [i // 2 % 7 for i in range(30)]
        assert [epoch for _, _, _, epoch, _ in played] == [i // 14 for i in range(30)]
        assert [place for *_, place in played] == [0, 1] * 15
        assert [seed for _, seed, *_ in played] == [episode_seed(2, *rest) for _, _, *rest in played]

    def test_reset_dataloader_gives_the_same_order(self):
        env = self.env(shuffled())
        first = self.drawn(env, 20)
        env.reset_dataloader()
        assert self.drawn(env, 20) == first
        env.set_seed(7)  # the seeds of what follows, not the loader's order
        assert self.drawn(env, 1)[0][1] == episode_seed(7, 3, 1, 0)

    def test_iterators(self):
        """Can be read only once: a state fits in front of one of which nothing has been drawn."""
        env = self.env(iter([ROWS[:3], ROWS[3:]]))
        self.drawn(env, 5)
        state = env.state_dict()
        other = self.env(iter([ROWS[:3], ROWS[3:]]))
        other.load_state_dict(state)
        assert self.drawn(other, 9) == self.drawn(env, 9)
        for begun in (lambda: env.load_state_dict(state), env.reset_dataloader):
            with pytest.raises(DatasetError, match="can be read only once"):
                begun()
        with pytest.raises(DatasetError, match="at its end"):
            env.reset()
        with pytest.raises(DatasetError, match="at its end|ends before row 2"):
            self.env(iter([ROWS[:1]])).load_state_dict(state)

    def test_an_order_that_nobody_can_have_again(self):
        env = self.env(DataLoader(Dataset.from_list(ROWS), batch_size=3, shuffle=True, collate_fn=list))
        assert pickle.loads(pickle.dumps(env)).reset()["query"]  # nothing is lost yet
        env.reset()
        with pytest.raises(DatasetError, match="RandomSampler draws from torch's global generator.*generator="):
            env.state_dict()

    def test_a_shorter_loader(self):
        env = self.env([ROWS])
        self.drawn(env, 12)
        with pytest.raises(DatasetError, match="ends before row 6 of epoch 0"):
            self.env([ROWS[:4]]).load_state_dict(env.state_dict())
        with pytest.raises(ValueError, match="'kind': 'dataloader'"):
            bare(repeats=2).load_state_dict(env.state_dict())
        with pytest.raises(ValueError, match="without, or the reverse"):
            self.env(Counting()).load_state_dict(env.state_dict())


@pytest.mark.services
@pytest.mark.xdist_group("ray")
def test_ray_actor(ray_cluster):
    """Environments that share an actor draw from one sequence, and its state is the state."""
    import ray

    envs = [bare(ray_backend=True, dataloader_actor_name="drawn from", repeats=2) for _ in range(2)]
    try:
        got = [episodes(env.reset())[0] for env in (*envs, *envs)]
        assert got == started(bare(repeats=2), 4)
        state, follows = envs[0].state_dict(), started(envs[1], 3)
        envs[1].load_state_dict(state)
        assert started(pickle.loads(pickle.dumps(envs[0])), 3) == follows
        check_env_specs(envs[0])
    finally:
        ray.kill(ray.get_actor("drawn from"))


class TestModelUser:
    def test_replies_are_drawn_from_the_episode(self):
        """In batches of any size, and whatever was sampled before."""
        tokenizer = bpe_tokenizer()
        model = tiny_model(len(tokenizer))

        def lines(num_envs: int, seed: int | None) -> dict:
            user, found = ModelUser(model, tokenizer, max_new_tokens=6, seed=seed), {}
            env = DatasetChatEnv(dataset=ROWS, seed=1, tokenizer=tokenizer, input_mode="tokens", num_envs=num_envs)
            env = env.append_transform(UserSimulator(user)).append_transform(StepCounter(max_steps=2))
            td = env.reset()
            while len(found) < 8:
                td, finished = advance(env, td)
                found.update(finished)
            return {episode: found[episode] for episode in started(bare(seed=1), 8)}

        assert lines(1, None) == lines(4, None) == lines(8, None)
        assert lines(8, 1) != lines(8, None)

    def test_the_generator_is_in_the_state(self):
        """Where there are no episodes, what a seeded user draws next is kept."""
        tokenizer = bpe_tokenizer()
        model = tiny_model(len(tokenizer))

        def make_env():
            env = ChatEnv(tokenizer=tokenizer, input_mode="text", batch_size=(2,))
            return env.append_transform(UserSimulator(ModelUser(model, tokenizer, max_new_tokens=6, seed=1)))

        def turn(env):
            td = env.reset(TensorDict(query=["a", "b"], batch_size=(2,)))
            td["text"].response = ["x<|im_end|>", "y<|im_end|>"]
            return [transcript.messages[-1]["content"] for transcript in ledgers(env.step(td)["next"])]

        env = make_env()
        first, state, second = turn(env), env.state_dict(), turn(env)
        assert first != second
        other = make_env()
        other.load_state_dict(state)
        assert turn(other) == second


def descendants(pid: int) -> list[tuple[int, str]]:
    """The processes below a process, each with the time at which it started."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := stat_of(int(entry.name))):
            parents[int(entry.name)] = int(fields[1]), fields[19]
    found, ahead = [], [pid]
    while ahead:
        above = ahead.pop()
        below = [child for child, (parent, _) in parents.items() if parent == above]
        found += [(child, parents[child][1]) for child in below]
        ahead += below
    return found


def stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; ``None`` if the process is over."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields


def test_killed_at_any_time(tmp_path):
    """Ten times killed -9 wherever it was, and resumed: the same episodes in the same order, none lost, none trained twice."""
    options = {"num_envs": 4, "repeats": 2, "graded": True}
    steps, kills = 60, 10
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    context = multiprocessing.get_context("forkserver")
    draw, left, seen = random.Random(0), kills, 0
    reference = context.Process(target=run, args=(whole, steps), kwargs=options, daemon=True)
    reference.start()
    reference.join(300)
    assert reference.exitcode == 0
    while True:
        process = context.Process(target=run, args=(parts, steps), kwargs=options, daemon=True)
        process.start()
        if not left:
            process.join(300)
            assert process.exitcode == 0
            break
        before = journal_steps(parts)
        while journal_steps(parts) == before and process.is_alive():
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGSTOP)
        family = descendants(process.pid)
        seen += len(family)
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        if process.exitcode == 0:  # it was at its end: too slow to be killed
            pytest.fail(f"the run was over before the kill, with {left} kills to go")
        left -= 1
        while any(
            (fields := stat_of(pid)) and fields[19] == begun for pid, begun in family
        ):  # orphans hold up the test
            time.sleep(0.02)
    assert seen  # graders had processes of their own

    expected, got = load_state(whole / "state.pt"), load_state(parts / "state.pt")
    assert got["trained"] == expected["trained"]
    trained = [episode for episode, _ in got["trained"]]
    assert len(set(trained)) == len(trained) > 2 * len(ROWS)
    assert episodes(got["td"]) == episodes(expected["td"])
    assert set(trained) | set(episodes(got["td"])) == set(started(bare(repeats=2), len(trained) + len(got["td"])))
    lines = dict(journal(whole))
    redone = journal(parts)
    assert all(lines[step] == finished for step, finished in redone)  # also what a kill made undone
    assert {step for step, _ in redone} == set(lines)


def journal(folder: Path) -> list:
    """The steps of a journal; a line that a kill has cut is left out."""
    entries = []
    for line in (folder / "journal").read_text().splitlines():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def journal_steps(folder: Path) -> int:
    path = folder / "journal"
    return path.read_text().count("\n") if path.exists() else 0
