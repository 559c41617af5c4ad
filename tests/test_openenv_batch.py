"""``OpenEnvChatEnv``: many sessions as one environment; what one row suffers, the others do not notice."""

from __future__ import annotations

import functools
import pickle
import re
import threading
import time
import warnings

import pytest
import torch
from conftest import bpe_tokenizer, respond
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openenv_stub import ParrotEnv, StubServer
from tensordict import TensorDict
from torchrl.collectors.llm import LLMCollector
from torchrl.envs import ParallelEnv, SerialEnv, TransformedEnv, check_env_specs
from torchrl.envs.transforms import Compose
from torchrl_grpo import grpo

from torchrl_chat import (
    Budget,
    RewardTransform,
    StopReason,
    TransformersPolicy,
    UserSimulator,
    columns,
    training_view,
)
from torchrl_chat.openenv.batch.adapters import Adapter, text_adapter
from torchrl_chat.openenv.batch.env import FAILED, OpenEnvChatEnv
from torchrl_chat.openenv.client.errors import ConnectFailed, ServerError
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.services

PARROT = text_adapter("message", "message")


@pytest.fixture(scope="module")
def server():
    with StubServer() as running:
        yield running


@pytest.fixture
def make(server):
    """Environments over the stub, closed when the test is over."""
    made = []

    def build(rows=4, mode="tokens", url=None, **options):
        size = (rows,) if isinstance(rows, int) else rows
        env = OpenEnvChatEnv(
            url or server.url,
            **{"adapter": PARROT, "tokenizer": bpe_tokenizer(), "input_mode": mode, "batch_size": size, **options},
        )
        made.append(env)
        return TransformedEnv(env, Compose())  # as the other tests' environments: with a base_env

    yield build
    for env in made:
        env.close()


def play(env, td, texts):
    """One step; what failing rows warn of is looked at elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return env.step(respond(env, td, texts))


def strings(td, key) -> list[str]:
    return columns.read_objects(td.get(key), td.batch_size)


def conversation(td, row) -> list[str]:
    return [
        message["content"] for message in columns.read_objects(td.get("transcript"), td.batch_size)[row].messages
    ]


# ---------------------------------------------------------------------- episodes
def test_an_episode(make, server, mode):
    env = make(3, mode, seed=5)
    td = env.reset()
    seeds = td["episode_seed"].flatten().tolist()
    assert [conversation(td, i) for i in range(3)] == [[f"begin {seed}"] for seed in seeds]
    assert sorted(reset["seed"] for reset in server.resets[-3:]) == sorted(seeds)
    assert len(set(seeds)) == 3
    before = columns.read_objects(td["transcript"], env.batch_size)
    td = play(env, td, ["abc", "stop", "de"])
    following = td["next"]
    assert following["reward"].shape == (3, 1, 1)
    assert following["reward"].dtype == torch.float32
    assert following["reward"].flatten().tolist() == [0.125, 1.0, 0.125]
    assert (
        following["done"].flatten().tolist() == following["terminated"].flatten().tolist() == [False, True, False]
    )
    assert not following["truncated"].any()
    assert following["stop_reason"].flatten().tolist() == [0, StopReason.ANSWERED, 0]
    assert [conversation(following, i)[1:] for i in range(3)] == [["abc", "cba"], ["stop"], ["de", "ed"]]
    assert strings(following, "observation")[2] == {"message": "ed"}
    assert strings(following, "query") == [f"begin {seed}" for seed in seeds]
    for old, new in zip(before, columns.read_objects(following["transcript"], env.batch_size), strict=True):
        assert torch.equal(new.tokens[: len(old)], old.tokens)  # the law
        span = new.spans[0]
        assert new.mask.nonzero().flatten().tolist() == list(range(span.start, span.end))


def test_specs(make, mode):
    check_env_specs(make(2, mode))
    check_env_specs(make((2, 2), mode))


def test_without_a_tokenizer(make):
    env = make(2, "history", tokenizer=None)
    td = env.reset()
    td["history"] = columns.histories(
        "response",
        [columns.history_messages([{"role": "assistant", "content": t}]) for t in ("abc", "stop")],
        td.batch_size,
        None,
    )
    following = env.step(td)["next"]
    assert conversation(following, 0)[1:] == ["abc", "cba"]
    assert following["done"].flatten().tolist() == [False, True]


def test_a_partial_reset_touches_its_rows_only(make, server):
    env = make(3, seed=1)
    td = env.step_mdp(play(env, env.reset(), ["abc", "stop", "de"]))
    count, seeds = len(server.resets), td["episode_seed"].flatten().tolist()
    td.set("_reset", torch.tensor([[False], [True], [False]]))
    td = env.reset(td)
    assert len(server.resets) == count + 1
    assert [len(conversation(td, i)) for i in range(3)] == [3, 1, 3]
    now = td["episode_seed"].flatten().tolist()
    assert (now[0], now[2]) == (seeds[0], seeds[2])
    assert now[1] != seeds[1]
    td = play(env, td, ["x", "y", "z"])
    assert td["next", "reward"].flatten().tolist() == [0.25, 0.125, 0.25]  # the sessions count their steps


def test_seeds_belong_to_episodes(make):
    def seeds(env, episodes=3):
        return torch.stack([env.reset()["episode_seed"].flatten() for _ in range(episodes)]).tolist()

    first = seeds(make(4, seed=3))
    assert first == seeds(make(4, seed=3))
    assert first != seeds(make(4, seed=4))
    assert len({seed for episode in first for seed in episode}) == 12
    env = make(4, seed=9)
    env.set_seed(3)
    assert seeds(env) == first
    grouped = seeds(make(4, seed=3, repeats=2))
    assert all(a == b and c == d and a != c for a, b, c, d in grouped)


def test_what_resets_are_sent(make, server):
    env = make(2, reset_kwargs={"level": 3}, task_keys=["index", "seed"])
    td = TensorDict(index=torch.tensor([[4], [5]]), seed=torch.tensor([[7], [8]]), batch_size=(2,))
    td = env.reset(td)
    sent = sorted(server.resets[-2:], key=lambda reset: reset["index"])
    assert sent == [{"level": 3, "index": 4, "seed": 7}, {"level": 3, "index": 5, "seed": 8}]
    assert td["episode_seed"].flatten().tolist() == [7, 8]
    with pytest.raises(KeyError, match="task_keys names 'index'"):
        env.reset()


def test_the_tensordict_may_begin_the_conversation(make, mode):
    silent = Adapter(lambda seen: None, lambda answer: {"message": answer.text})
    env = make(2, mode, adapter=silent, data_key="query", system_prompt="Be kind.")
    td = env.reset(TensorDict(query=["abc", "de"], batch_size=(2,)))
    assert [conversation(td, i) for i in range(2)] == [["Be kind.", "abc"], ["Be kind.", "de"]]
    td = play(env, td, ["x", "y"])
    assert strings(td, "query") == strings(env.step_mdp(td), "query") == ["abc", "de"]
    assert strings(td["next"], "observation") == [{"message": "x"}, {"message": "y"}]
    with pytest.raises(Exception, match="says nothing at the reset"):
        make(2, adapter=silent).reset()


def test_several_servers(make, server):
    with StubServer() as other:
        env = make(4, url=[server.url, other.url])
        before = server.active
        env.reset()
        assert (server.active - before, other.active) == (2, 2)
        env.close()


# ---------------------------------------------------------------------- rows that fail
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("die", "SessionLost"),
        ("bye", r"SessionLost: .*closed the connection"),
        ("fatal", r"SessionLost: .*out of order"),
        ("garbage", "SessionLost"),
        ("wrong", "SessionLost"),
        ("sleep:5", r"RequestTimeout: no reply to 'step' within 1.5 s"),
        ('reward:"much"', r"OpenEnvError: the server's reward is 'much'"),
    ],
)
def test_one_row_fails(make, server, mode, word, reason):
    env = make(3, mode, step_timeout=1.5)
    td = play(env, env.reset(), ["abc", "abc", "abc"])
    with pytest.warns(RuntimeWarning, match="1 of 3 sessions failed"):
        td = env.step(respond(env, env.step_mdp(td), ["de", word, "fg"]))
    following = td["next"]
    assert following["done"].flatten().tolist() == following["truncated"].flatten().tolist() == [False, True, False]
    assert not following["terminated"].any()
    assert following["stop_reason"].flatten().tolist() == [0, FAILED, 0]
    assert following["reward"].flatten().tolist() == [0.25, 0.0, 0.25]
    failures = strings(following, "env_failure")
    assert failures[0] == failures[2] == ""
    assert re.search(reason, failures[1])
    assert conversation(following, 1)[3:] == [word]  # what was sampled is in the ledger

    td = env.step_mdp(td)
    td.set("_reset", td["done"].clone())
    td = play(env, env.reset(td), ["x", "y", "z"])
    assert td["next", "reward"].flatten().tolist() == [
        0.375,
        0.125,
        0.375,
    ]  # a new session for the row, and for no other
    assert strings(td["next"], "env_failure") == [""] * 3


def test_a_refused_answer_ends_its_row_or_is_told(make):
    class Strict(ParrotEnv):
        def step(self, action):
            if action["message"] == "up":
                raise ValueError("not up again")
            return super().step(action)

    def parse(text):
        if text == "?":
            raise ValueError("not a move")
        return text

    adapter = text_adapter("message", "message", parse)
    with StubServer(env=Strict) as server:
        env = make(3, url=server.url, adapter=adapter)
        following = play(env, env.reset(), ["up", "?", "down"])["next"]
        assert following["done"].flatten().tolist() == [True, True, False]
        assert "not up again" in strings(following, "env_failure")[0]
        assert strings(following, "env_failure")[1] == "ValueError: not a move"

        env = make(3, url=server.url, adapter=adapter, on_refusal="tell")
        td = play(env, env.reset(), ["up", "?", "down"])
        assert not td["next", "done"].any()
        assert conversation(td["next"], 0)[1:] == ["up", "Error: EXECUTION_ERROR: not up again"]
        assert conversation(td["next"], 1)[1:] == ["?", "Error: not a move"]
        td = play(env, env.step_mdp(td), ["down"] * 3)
        assert td["next", "reward"].flatten().tolist() == [0.125, 0.125, 0.25]


def test_a_reset_that_fails_ends_its_row_at_the_first_step(make, mode):
    env = make(3, mode, task_keys=["refuse"])
    refuse = torch.tensor([[False], [True], [False]])
    with pytest.warns(RuntimeWarning, match="no such task"):
        td = env.reset(TensorDict(refuse=refuse, batch_size=(3,)))
    assert not td["done"].any()
    assert "no such task" in strings(td, "env_failure")[1]
    following = play(env, td, ["abc", "abc", "abc"])["next"]
    assert following["done"].flatten().tolist() == following["truncated"].flatten().tolist() == [False, True, False]
    [_, failed, _] = columns.read_objects(following["transcript"], env.batch_size)
    assert not failed.mask.any()  # nothing to train on
    assert following["reward"].flatten().tolist() == [0.125, 0.0, 0.125]


def test_bad_observations_end_their_row(make):
    class Odd(ParrotEnv):
        def step(self, action):
            return {"observation": {"message": {"role": 7}}, "reward": 1.0, "done": False}

    odd = Adapter(lambda seen: seen["message"], lambda answer: {"message": answer.text})
    with StubServer(env=Odd) as server:
        env = make(2, url=server.url, adapter=odd)
        following = play(env, env.reset(), ["a", "b"])["next"]
        assert following["truncated"].all()
        assert "role" in strings(following, "env_failure")[0]


def test_an_outage_is_no_row_failure(make):
    with StubServer() as server:
        url = server.url
        env = make(2, url=url, connect_timeout=0.3)
        td = env.reset()
    following = play(env, td, ["a", "b"])["next"]
    assert following["truncated"].all()
    with pytest.raises(ConnectFailed, match="no connection to"):
        env.reset()
    with pytest.raises(ServerError, match="no such task"):
        make(2, reset_kwargs={"refuse": True}).reset()


def test_a_full_server_is_waited_for(make):
    with StubServer(capacity=2) as server:
        env = make(3, url=server.url, connect_timeout=2.0)
        with pytest.warns(RuntimeWarning, match="1 of 3 sessions failed"):
            td = env.reset()
        [full] = [text for text in strings(td, "env_failure") if text]
        assert "CAPACITY_REACHED" in full
        other = make(2, url=server.url, connect_timeout=60.0)
        timer = threading.Timer(0.3, env.base_env.close)
        timer.start()
        assert strings(other.reset(), "env_failure") == ["", ""]
        timer.join()
        other.close()


def test_rows_run_at_once(make):
    env = make(16, step_timeout=120)
    following = env.step(respond(env, env.reset(), ["together:16"] * 16))["next"]
    assert strings(following, "env_failure") == [""] * 16


WORDS = st.sampled_from(["ab", "stop", "die", "bye", "garbage"])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.lists(WORDS, min_size=4, max_size=4), min_size=1, max_size=4))
def test_rows_live_their_own_lives(make, plan):
    """Whatever happens in which row when: each has the rewards and ends that it would have alone."""
    env = make(4, mode="text")
    td, steps = env.reset(), [0] * 4
    for words in plan:
        following = play(env, td, words)["next"]
        steps = [count + 1 for count in steps]
        told = [
            (1.0, True, False) if w == "stop" else (n / 8, False, False) for w, n in zip(words, steps, strict=True)
        ]
        told = [(0.0, False, True) if w not in ("ab", "stop") else t for w, t in zip(words, told, strict=True)]
        seen = [following[key].flatten().tolist() for key in ("reward", "terminated", "truncated")]
        assert list(zip(*seen, strict=True)) == told
        done = following["done"]
        steps = [0 if over else count for over, count in zip(done.flatten().tolist(), steps, strict=True)]
        td = following.copy()
        if done.any():
            td = env.reset(td.set("_reset", done.clone()))
    env.close()


@pytest.mark.parametrize(
    ("metadata", "stop", "natural"),
    [
        ({}, StopReason.ANSWERED, True),
        ({"stop_reason": "terminated"}, StopReason.ANSWERED, True),
        ({"stop_reason": "max_turns"}, StopReason.MAX_TURNS, False),
        ({"stop_reason": 7}, StopReason.ANSWERED, True),
    ],
)
def test_why_the_server_ends_an_episode(make, metadata, stop, natural):
    class Limited(ParrotEnv):
        def step(self, action):
            return {"observation": {"message": "", "metadata": metadata}, "reward": True, "done": True}

    with StubServer(env=Limited) as server:
        env = make(1, url=server.url)
        following = play(env, env.reset(), ["a"])["next"]
    assert following["stop_reason"].item() == stop
    assert (following["terminated"].item(), following["truncated"].item()) == (natural, not natural)
    assert following["reward"].item() == 1.0
    assert following["graded"].all()


# ---------------------------------------------------------------------- sessions are no values
def test_a_row_cannot_be_stepped_twice(make):
    env = make(2)
    td = respond(env, env.reset(), ["a", "b"])
    env.step(td.copy())
    with pytest.raises(ValueError, match=r"row 0 does not show the present state of its session"):
        env.step(td)
    other = make(2)
    other.reset()
    with pytest.raises(ValueError, match="row 0"):
        other.step(td)
    with pytest.raises(KeyError, match="ticket"):
        env.step(td.exclude("ticket"))


def test_rows_that_are_over_stay_as_they_are(make):
    env = make(2)
    td = play(env, env.reset(), ["stop", "ab"])
    again = play(env, env.step_mdp(td), ["more", "cd"])["next"]
    assert again["done"].flatten().tolist() == again["terminated"].flatten().tolist() == [True, False]
    assert conversation(again, 0)[1:] == ["stop"]
    assert again["reward"].flatten().tolist() == [0.0, 0.25]


def test_close_frees_the_sessions_and_ends_the_thread(make):
    with StubServer() as server:
        env = make(8, url=server.url)
        env.reset()
        assert server.active == 8
        thread = env.base_env._sessions._loop._thread
        env.close()
        assert not thread.is_alive()
        end = time.monotonic() + 60
        while server.active and time.monotonic() < end:
            time.sleep(0.01)
        assert server.active == 0


def test_an_interrupted_step_ends_its_rows(make, monkeypatch):
    env = make(2)
    td = respond(env, env.reset(), ["stop", "ab"])
    loop = env.base_env._sessions._loop

    def interrupted(coroutine):
        loop.submit(coroutine).result()  # the servers have done it
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        env.step(td)
    monkeypatch.undo()
    following = env.step(td)["next"]  # nothing is stepped a second time
    assert following["truncated"].all()
    assert strings(following, "env_failure") == ["the step was interrupted"] * 2
    assert play(env, env.reset(), ["ab", "cd"])["next", "reward"].flatten().tolist() == [0.125, 0.125]


def test_it_pickles_without_its_sessions(make, server):
    env = make(2, seed=3).base_env
    env.reset()
    copy = pickle.loads(pickle.dumps(env))
    assert copy.reset()["transcript"][0].messages
    copy.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": []}, "url is empty"),
        ({"url": "ftp://x"}, "base_url is"),
        ({"repeats": 0}, "repeats is 0"),
        ({"task_keys": "index"}, "task_keys is 'index'"),
        ({"on_refusal": "ignore"}, "on_refusal is 'ignore'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        OpenEnvChatEnv(**{"url": "http://localhost:1", "tokenizer": bpe_tokenizer(), **options})


# ---------------------------------------------------------------------- in torchrl
def policy_for(tokenizer, **options):
    return TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4, **options)


@pytest.mark.parametrize(
    "kind", [SerialEnv, functools.partial(ParallelEnv, use_buffers=False, mp_start_method="forkserver")]
)
@pytest.mark.by_day(3)
def test_under_batched_envs(server, mode, kind):
    factory = functools.partial(
        OpenEnvChatEnv, server.url, adapter=PARROT, tokenizer=bpe_tokenizer(), input_mode=mode, batch_size=(2,)
    )
    env = kind(2, factory)
    try:
        policy, td, rewards = policy_for(bpe_tokenizer()), env.reset(), []
        for _ in range(3):
            td = env.step(policy(td))
            rewards.append(td["next", "reward"].flatten().tolist())
            td = env.step_mdp(td)
        assert rewards == [[0.125] * 4, [0.25] * 4, [0.375] * 4]
    finally:
        env.close()


def test_under_a_collector(server):
    tokenizer = tiny_tokenizer(TEXT_ALPHABET)
    env = OpenEnvChatEnv(
        server.url, adapter=PARROT, tokenizer=tokenizer, input_mode="tokens", batch_size=(4,), seed=1
    )
    env = TransformedEnv(env, Budget(max_turns=2))
    collector = LLMCollector(env, policy=policy_for(tokenizer), dialog_turns_per_batch=8, total_dialog_turns=24)
    try:
        for batch in collector:
            assert batch.batch_size.numel() == 8
            assert set(batch["next", "reward"].flatten().tolist()) <= {0.125, 0.25}
            assert (batch["next", "stop_reason"] == StopReason.MAX_TURNS).sum() == 4
    finally:
        collector.shutdown()
        env.close()


def test_grpo(server):
    tokenizer = tiny_tokenizer(TEXT_ALPHABET)
    env = OpenEnvChatEnv(
        server.url, adapter=PARROT, tokenizer=tokenizer, input_mode="tokens", batch_size=(8,), seed=1, repeats=4
    )
    env = TransformedEnv(
        env, RewardTransform(lambda text, reference: float("a" in text), reference_key="episode_seed")
    )
    policy = policy_for(tokenizer)
    metrics = list(grpo(env, policy, steps=2, group_size=4, minibatch=8))
    assert [step.step for step in metrics] == [0, 1]
    assert all(step.reward > 0 for step in metrics)
    assert metrics[0].ess == pytest.approx([1.0])  # the first update is exactly on-policy
    env.close()


def test_a_user_on_top(make, mode):
    env = make(2, mode, adapter=Adapter(lambda seen: None, PARROT.to_action), data_key="query")
    env = env.append_transform(UserSimulator(["And?", "Well?"]))
    td = env.reset(TensorDict(query=["a", "b"], batch_size=(2,)))
    td = play(env, td, ["x", "stop"])
    assert conversation(td["next"], 0) == ["a", "x", "And?"]
    assert conversation(td["next"], 1) == ["b", "stop"]
    td = play(env, env.step_mdp(td), ["y", "z"])
    assert conversation(td["next"], 0)[3:] == ["y", "Well?"]


def test_training_leaves_out_what_failed_without_the_policy(make):
    env = make(3, step_timeout=1.5, on_refusal="end", adapter=text_adapter("message", "message", _no_questions))
    following = play(env, env.reset(), ["abc", "sleep:5", "?"])["next"]
    assert following["graded"].flatten().tolist() == [True, False, True]  # a bad answer is the policy's own
    assert "RequestTimeout" in strings(following, "grade_failure")[1]
    rows = training_view(following)
    trained = [bool(mask.any()) for mask in rows.get(("masks", "all_assistant_mask"), as_list=True)]
    assert trained == [True, False, True]


def _no_questions(text: str) -> str:
    if text == "?":
        raise ValueError("no questions")
    return text
