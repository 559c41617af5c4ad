"""``AgentEnv`` as torchrl's environment: turn by turn it plays what it plays whole, in collectors, buffers and losses."""

from __future__ import annotations

import pickle
import threading

import pytest
import torch
from agents import client_of
from openai import AsyncOpenAI, OpenAI
from tensordict import lazy_stack
from torchrl.collectors import Collector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.envs import StepCounter
from torchrl.envs.utils import check_env_specs
from torchrl_grpo import grpo

from torchrl_chat import DatasetChatEnv, TransformersPolicy, columns, play, training_view
from torchrl_chat.conversation import StopReason
from torchrl_chat.gateway import AgentEnv
from torchrl_chat.rewards import NumberVerifier, WeightedSum, grades
from torchrl_chat.tiny import last_digit_rows, tiny_model, tiny_tokenizer
from torchrl_chat.training import group_advantages, policy_loss, sequence_log_probs
from torchrl_chat.transforms import Budget, RewardTransform

TOKENIZER = tiny_tokenizer()


async def turns(row, session):
    """One turn or two, by the row."""
    async with client_of(session, AsyncOpenAI, max_retries=0) as client:
        messages = [{"role": "user", "content": row["query"]}]
        for _ in range(1 + row["episode_row"] % 2):
            reply = await client.chat.completions.create(model="m", messages=messages)
            messages += [reply.choices[0].message, {"role": "user", "content": "last(1)="}]


async def turn(row, session):
    async with client_of(session, AsyncOpenAI, max_retries=0) as client:
        ask = [{"role": "user", "content": row["query"]}]
        await client.chat.completions.create(model="m", messages=ask)


def length(response, reference):
    return len(response) / 4


def make(agent=turns, mode: str = "tokens", verifier=None, **more) -> AgentEnv:
    env = DatasetChatEnv(
        dataset=last_digit_rows(6), tokenizer=TOKENIZER, input_mode=mode, num_envs=2, repeats=2, group_repeats=True,
        seed=5,
    )  # fmt: skip
    env = env.append_transform(RewardTransform(verifier or length))
    return AgentEnv(env.append_transform(Budget(max_turns=3)), agent, **more)


@pytest.fixture
def policy() -> TransformersPolicy:
    return TransformersPolicy(tiny_model(len(TOKENIZER), hidden=16), TOKENIZER, max_new_tokens=4, seeded=True)


@pytest.fixture
def made():
    """Makes environments that are closed at the end."""
    envs: list[AgentEnv] = []

    def making(*arguments, **more):
        envs.append(make(*arguments, **more))
        return envs[-1]

    yield making
    for env in envs:
        env.close()


def ends(td) -> dict[int, object]:
    """The ledger that each row ended with."""
    ledgers = columns.read_objects(td["next"].get("transcript"), td.batch_size)
    done = td["next", "done"].squeeze(-1).tolist()
    count = td.batch_size[1]
    return {i: ledgers[i * count + row.index(True)] for i, row in enumerate(done)}


@pytest.mark.parametrize("mode", ["tokens", "text", "history"])
def test_turn_by_turn_is_played_what_is_played_whole(made, policy, mode):
    env = made(mode=mode, verifier=WeightedSum({"number": NumberVerifier(), "length": length}))
    check_env_specs(env)
    env.reset_dataloader()
    whole = play(env, policy)
    env.reset_dataloader()
    td = env.rollout(4, policy, break_when_any_done=False, break_when_all_done=True)
    assert set(whole.keys()) - set(td["next"].keys()) <= {"finish_reason"}
    for i, ledger in ends(td).items():
        other = whole["transcript"][i]
        assert ledger.tokens.tolist() == other.tokens.tolist()
        assert torch.allclose(ledger.log_probs, other.log_probs, atol=1e-5)
        at = td["next", "done"][i].flatten().tolist().index(True)
        for key in ("reward", "success", "graded", "stop_reason", ("reward_parts", "length")):
            assert td["next"][i][at][key].tolist() == whole[i][key].tolist(), key
        for key in ("query", "extracted", "episode_seed", "env_failure"):
            assert td["next"][i][at].get(key) == whole[i].get(key), key
    # What is shown in between is what the policy will have read, and what of it was sampled.
    first, then = td[:, 0], td[:, 1]
    going = (~first["next", "done"]).flatten().tolist()
    assert any(going)
    for i in (i for i, goes in enumerate(going) if goes):
        before, after = first["transcript"][i], then["transcript"][i]
        said = first["tokens"][i].response if mode == "tokens" else after.tokens[after.mask]
        assert after.tokens[after.mask].tolist() == said.tolist()
        assert after.tokens[: len(before)].tolist() == before.tokens.tolist()


def test_torchrl_collects_stores_and_learns_from_it(made, policy):
    env = made()
    collector = Collector(env, policy, frames_per_batch=8, total_frames=32, use_buffers=False)
    buffer = ReplayBuffer(storage=LazyStackStorage(64), batch_size=8)
    for batch in collector:
        assert batch.batch_size == (4, 2)
        buffer.extend(batch.reshape(-1))
    collector.shutdown(close_env=False)
    assert len(buffer) == 32
    assert len(set(buffer.sample()["query"])) > 1
    # Whole episodes are the rows that are done; their group is that of their dataset row.
    view = training_view(lazy(buffer, done=True), group="query", layout="padded")
    assert view["masks"].all_assistant_mask.any()
    view["advantage"] = group_advantages(view)
    scores = sequence_log_probs(policy.model, view)
    assert torch.allclose(scores.log_probs[scores.mask], view["log_probs"].full[scores.mask], atol=1e-4)
    loss, _ = policy_loss(scores.log_probs, view["log_probs"].full, view["advantage"], scores.mask)
    loss.backward()


def lazy(buffer, done: bool):
    rows = [td["next"] for td in buffer[:].unbind(0) if bool(td["next", "done"].any()) is done]
    return lazy_stack(rows)


def test_torchrls_own_loss_takes_its_turns(made):
    policy = TransformersPolicy(tiny_model(len(TOKENIZER), hidden=16), TOKENIZER, max_new_tokens=4)
    steps = list(grpo(made(turn), policy, steps=2, group_size=2, minibatch=4))
    assert steps[0].ess[0] == pytest.approx(1.0, rel=1e-4)  # the sampler's log-probs are the learner's
    assert len(steps) == 2


def test_transforms_stand_around_it(made, policy):
    env = made().append_transform(StepCounter(1))
    td = play(env, policy)
    assert td["step_count"].tolist() == [[1]] * 4
    assert env.base_env._desk is not None  # stepped: whole episodes would have left out the transform


def test_what_an_agent_asks_at_once_is_asked_in_turn_and_with_seeds_of_its_own(made, policy):
    async def twice(row, session):
        import asyncio

        async with client_of(session, AsyncOpenAI, max_retries=0) as client:
            ask = [{"role": "user", "content": row["query"]}]
            await asyncio.gather(*(client.chat.completions.create(model="m", messages=ask) for _ in range(3)))

    td = made(twice).rollout(5, policy, break_when_any_done=False, break_when_all_done=True)
    assert td.batch_size == (4, 3)
    for i, ledger in ends(td).items():
        assert len(ledger.sequences) == 3
        assert len(set(td["episode_seed"][i].tolist())) == 3
        assert td["next", "episode_seed"][i, -1] == td["episode_seed"][i, 0]


def test_agents_that_fail_ask_nothing_or_use_up_their_budget_end_their_own_episode(made, policy):
    async def agent(row, session):
        if row["episode_place"] == 0:
            return {"reward": 0.5}
        while True:
            await turns(row, session)

    env = made(agent, on_error="fail")
    td = env.rollout(6, policy, break_when_any_done=False, break_when_all_done=True)
    first = td["next"][::2, 0]
    assert first["done"].all()
    assert all("nothing was sampled" in why for why in first["env_failure"])
    last = td["next"][1::2, -1]
    assert last["stop_reason"].flatten().tolist() == [StopReason.MAX_TURNS] * 2
    assert last["truncated"].all()
    assert td["next", "reward"][1::2].sum() == td["next", "reward"][1::2, -1].sum()


def test_only_what_was_shown_can_be_stepped_and_a_reset_ends_its_agents(made, policy):
    ended: list = []
    env = made(gateway={"ended": ended.append})
    saved = policy(env.reset())
    again = saved.clone()
    td = env.step_mdp(env.step(saved))
    longer = [i for i, row in enumerate(td["episode_row"].tolist()) if row % 2]
    assert longer
    with pytest.raises(RuntimeError, match=f"row {longer[0]}: this is not what its agent asks now"):
        env.step(again)
    count = len(ended)
    env.reset(td.set("_reset", torch.tensor([[i in longer] for i in range(4)])))
    assert [session.failure for session in ended[count:]] == ["the environment was reset"] * len(longer)
    plain = made()
    plain.reset()
    assert pickle.loads(pickle.dumps(plain))._desk is None


def test_verifiers_of_groups_want_whole_groups(made, policy):
    @grades("group")
    def longest(group):
        return [float(len(episode.response)) for episode in group]

    env = made(verifier=longest)
    assert play(env, policy)["graded"].all()
    with pytest.raises(ValueError, match="play whole episodes"):
        env.reset()


def test_an_agent_that_never_ends_keeps_nobody_from_closing(policy):
    over = threading.Event()

    def agent(row, session):
        client = client_of(session, OpenAI, max_retries=0)
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": row["query"]}])
        over.wait()

    env = make(agent)
    policy(env.reset())
    try:
        env.close()  # and not only behind its end
        assert not over.is_set()
    finally:
        over.set()
