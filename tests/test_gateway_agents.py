"""Agents played to the end: functions and commands, what goes wrong with them, and the same episodes as an environment's."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from agents import Recorder, client_of, templates_of
from openai import AsyncOpenAI, OpenAI, PermissionDeniedError

from torchrl_chat import DatasetChatEnv, TransformersPolicy, play, training_view
from torchrl_chat.cli.gateway import make_gateway
from torchrl_chat.cli.main import make_parser
from torchrl_chat.conversation import Limits, StopReason
from torchrl_chat.gallery import make_env
from torchrl_chat.gateway import AgentEnv, Gateway, play_agents
from torchrl_chat.gateway.calls import Refusal
from torchrl_chat.named import named
from torchrl_chat.openenv.protocol import ServerLimits
from torchrl_chat.policies import Policy
from torchrl_chat.rewards import NumberVerifier, grades
from torchrl_chat.rollouts import episodes as lines
from torchrl_chat.rollouts import read_rollouts
from torchrl_chat.templates import ChatTemplate
from torchrl_chat.tiny import SIGNS, TOOL_ALPHABET, last_digit_rows, tiny_model, tiny_tokenizer
from torchrl_chat.transforms import Budget, RewardTransform

ROOT = Path(__file__).parents[1]
ROWS = [{"query": f"q{i}", "answer": str(i)} for i in range(3)]


def gateway_of(script, **more) -> Gateway:
    templates = templates_of()
    return Gateway(
        Recorder(templates, script),
        templates.plain.tokenizer,
        template={"chat_template": templates.plain.renderer.source},
        **more,
    )


async def asking(row, session):
    client = client_of(session, AsyncOpenAI, max_retries=0)
    ask = [{"role": "user", "content": row["query"]}]
    return (await client.chat.completions.create(model="m", messages=ask)).choices[0].message.content


async def told(row, session):
    await asking(row, session)


def said(ask) -> str:
    return ask.messages[-1]["content"].removeprefix("q")


def test_every_row_is_played_as_often_as_asked():
    flying, most = [0], [0]

    async def agent(row, session):
        flying[0] += 1
        most[0] = max(most[0], flying[0])
        await told(row, session)
        await asyncio.sleep(0.01)
        flying[0] -= 1

    with gateway_of(said, reward=NumberVerifier()) as gateway:
        td = play_agents(agent, ROWS, gateway, repeats=4, concurrency=5, seed=3)
        engine = gateway.engine
    assert most[0] == 5
    assert td["query"] == [row["query"] for row in ROWS for _ in range(4)]
    assert td["reward"].flatten().tolist() == [1.0] * 12
    assert td["episode_place"].tolist() == [0, 1, 2, 3] * 3
    assert len(set(td["episode_seed"].tolist())) == 12
    assert {each.seed for each in engine.asked} == set(td["episode_seed"].tolist())
    assert training_view(td)["group"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [line["group"] for line in lines(td)] == ["0.0"] * 4 + ["0.1"] * 4 + ["0.2"] * 4


def test_agents_may_be_plain_functions_and_say_their_rewards():
    def agent(row, session):
        client = client_of(session)
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": row["query"]}])
        row["query"] = "changed"
        return {"q0": 0.5, "q1": {"reward": 0.25, "parts": {"a": 1}}}.get(session.session.row["query"])

    with gateway_of(said, reward=NumberVerifier()) as gateway:
        td = play_agents(agent, ROWS, gateway)
    assert td["reward"].flatten().tolist() == [0.5, 0.25, 1.0]
    assert td["reward_parts", "a"].flatten().tolist() == [0.0, 1.0, 0.0]


COMMAND = """
import json, os, subprocess, sys, time, urllib.request
row = json.load(sys.stdin)
url, key = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
assert os.environ["ANTHROPIC_BASE_URL"] + "/v1" == url
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": row["query"]}]}).encode()
request = urllib.request.Request(url + "/chat/completions", body, {"authorization": "Bearer " + key})
urllib.request.urlopen(request).read()
if row["query"] == "q1":
    sys.exit("it broke " + key)
if row["query"] == "q2":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stderr=sys.stderr)
    time.sleep(600)
"""


@pytest.mark.parametrize("on_error", ["fail", pytest.param("score", marks=pytest.mark.full)])
def test_a_command_is_an_agent_and_ends_in_time(on_error):
    ended: list = []
    with gateway_of(said, reward=NumberVerifier(), ended=ended.append) as gateway:
        td = play_agents([sys.executable, "-c", COMMAND], ROWS, gateway, seconds=10, on_error=on_error)
        assert not gateway.take()  # they are the episodes
    if on_error == "score":
        assert td["reward"].flatten().tolist() == [1.0] * 3
        assert td["env_failure"] == [""] * 3
    else:
        assert td["reward"].flatten().tolist() == [1.0, 0.0, 0.0]
        assert "it broke [hidden]" in td["env_failure"][1]
        assert "more than 10 s" in td["env_failure"][2]
        assert training_view(td)["group"].tolist() == [0, -1, -1]
    assert len(ended) == 3
    assert not any(session.key in str(td["env_failure"]) for session in ended)


def test_a_budget_that_stops_an_agent_is_no_failure_and_an_engine_that_fails_is():
    async def endless(row, session):
        while True:
            await asking(row, session)

    with gateway_of(said, limits=Limits(max_turns=3)) as gateway:
        td = play_agents(endless, ROWS[:1], gateway, on_error="fail")
    assert (td["stop_reason"].item(), td["env_failure"]) == (StopReason.MAX_TURNS, [""])
    with gateway_of(lambda ask: ValueError("down") if "q1" in str(ask.messages) else said(ask)) as gateway:
        td = play_agents(told, ROWS[:2], gateway)
    assert td["env_failure"][0] == ""
    assert "the engine failed" in td["env_failure"][1]


def _exits(row, session):
    raise SystemExit(3)


async def _exits_in_a_task(row, session):
    async def part():
        raise SystemExit(3)

    await asyncio.create_task(part())


async def _is_cancelled(row, session):
    raise asyncio.CancelledError


async def _interrupts(row, session):
    raise KeyboardInterrupt


BAD = {
    "a thread that exits": (_exits, "SystemExit"),
    "a task that exits": (_exits_in_a_task, "SystemExit"),
    "an interrupt": (_interrupts, "KeyboardInterrupt"),
    "a cancellation": (_is_cancelled, "CancelledError"),
    "an iterator's end": (lambda row, session: next(iter(())), "StopIteration"),
    "another key": (lambda row, session: {"score": 1}, "'score'"),
    "no number": (lambda row, session: float("nan"), "finite"),
    "parts of words": (lambda row, session: {"reward": 1, "parts": {"a": "x"}}, "parts"),
    "a list": (lambda row, session: [1, 2], "finite"),
}


@pytest.mark.parametrize("what", BAD)
def test_whatever_an_agent_does_costs_its_own_episode(what, caplog):
    bad, words = BAD[what]
    ended: list = []

    async def agent(row, session):
        await asking(row, session)
        if row["query"] == "q1":
            if asyncio.iscoroutinefunction(bad):
                return await bad(row, session)
            return bad(row, session)
        return None

    def plain(row, session):
        return asyncio.run(told(row, session)) if row["query"] != "q1" else bad(row, session)

    played = plain if what in ("a thread that exits", "an iterator's end") else agent
    with gateway_of(said, reward=NumberVerifier(), ended=ended.append) as gateway:
        td = play_agents(played, ROWS, gateway, on_error="fail")
        assert not gateway.table.open
    assert td["reward"].flatten().tolist() == [1.0, 0.0, 1.0]
    assert words in td["env_failure"][1]
    assert words in caplog.text
    assert [bool(session.findings and "its agent failed" in session.findings[-1]) for session in ended] == [
        False, True, False,
    ]  # fmt: skip


def test_sessions_begin_when_their_agents_do_and_are_held_meanwhile():
    """More episodes than there are places, and a reaper that passes by."""
    most = [0]

    async def agent(row, session):
        most[0] = max(most[0], len(gateway.table.open))
        session.session.used -= 1000
        await asyncio.sleep(0.05)  # the reaper comes by
        await told(row, session)

    limits = ServerLimits(max_sessions=2, idle_seconds=0.04)
    with gateway_of(said, reward=NumberVerifier(), server=limits) as gateway:
        td = play_agents(agent, ROWS * 3, gateway, concurrency=9)
        assert not gateway.table.open
    assert most[0] <= 2
    assert td["reward"].flatten().tolist() == [1.0] * 9
    assert set(td["env_failure"]) == {""}


def test_a_play_that_breaks_off_leaves_no_session_open():
    ended: list = []
    with gateway_of(said, reward=NumberVerifier(), ended=ended.append) as gateway:
        with pytest.raises(KeyError, match="no 'answer'"):
            play_agents(told, [{"query": "q1"}] * 2, gateway)
        with pytest.raises(KeyError, match="no 'answer'"):
            gateway.session().finish()
        gateway.table.limits = ServerLimits(max_sessions=1)
        with pytest.raises(Refusal, match="as many as there may be"):
            play_agents(told, ROWS, gateway)
        assert len(gateway.table.open) == 1
    assert [session.failure for session in ended] == ["the play was broken off: KeyError"] * 2 + [
        "the gateway was closed"
    ]


def test_an_agent_out_of_time_samples_no_more():
    late, over = [], threading.Event()

    def agent(row, session):
        over.wait(20)
        ask = [{"role": "user", "content": row["query"]}]
        try:
            client_of(session, max_retries=0).chat.completions.create(model="m", messages=ask)
        except Exception as error:
            late.append(error)

    with gateway_of(said) as gateway:
        td = play_agents(agent, ROWS[:1], gateway, seconds=0.05, on_error="fail")
        over.set()
        waited = time.monotonic()
        while not late and time.monotonic() - waited < 20:
            time.sleep(0.01)
        assert isinstance(late[0], PermissionDeniedError)
        assert not gateway.engine.asked
    assert "more than 0.05 s" in td["env_failure"][0]


def test_an_engine_failure_that_its_agent_hides_leaves_the_episode_out():
    tries = iter([ValueError("down"), "0", ValueError("down"), "1"])

    async def agent(row, session):
        try:
            await asking(row, session)
        except Exception:
            await asking(row if row["query"] == "q0" else {"query": "something else"}, session)

    with gateway_of(lambda ask: next(tries), reward=NumberVerifier()) as gateway:
        td = play_agents(agent, ROWS[:2], gateway, concurrency=1)
    assert td["env_failure"][0] == ""  # the same was asked once more, and answered
    assert "the engine failed" in td["env_failure"][1]


def test_a_verifier_of_groups_sees_whole_groups():
    seen = []

    @grades("group")
    def longest(group):
        seen.append(len(group))
        return [float(len(episode.response)) for episode in group]

    with gateway_of(said, reward=longest) as gateway:
        play_agents(told, ROWS, gateway, repeats=2)
    assert seen == [2, 2, 2]


def test_options_that_cannot_be_are_refused():
    with gateway_of(said) as gateway:
        with pytest.raises(ValueError, match="repeats=0"):
            play_agents(told, ROWS, gateway, repeats=0)
        with pytest.raises(ValueError, match="on_error='skip'"):
            play_agents(told, ROWS, gateway, on_error="skip")
    with pytest.raises(ValueError, match="no tokenizer"):
        AgentEnv(DatasetChatEnv(dataset=ROWS, input_mode="history"), told)


def test_an_agent_plays_what_the_environment_plays():
    """The same rows, seeds, tokens, log-probs, grades and columns."""
    tokenizer = tiny_tokenizer()
    policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4, seeded=True)

    def make():
        env = DatasetChatEnv(
            dataset=last_digit_rows(6), tokenizer=tokenizer, input_mode="tokens", num_envs=3, repeats=2,
            group_repeats=True, seed=5, shuffle=True,
        )  # fmt: skip
        return env.append_transform(RewardTransform(NumberVerifier())).append_transform(Budget(max_turns=2))

    plain, env = play(make(), policy), AgentEnv(make(), told)
    found = play(env, policy)
    assert set(plain.keys()) - {"text", "tokens_left"} == set(found.keys())
    for key in ("query", "answer", "env_failure", "grade_failure"):
        assert list(plain[key]) == list(found[key]), key
    for key in ("reward", "success", "graded", "done", "episode_seed", "episode_row", "episode_place"):
        assert torch.equal(plain[key], found[key]), key
        assert plain[key].dtype == found[key].dtype
    for one, other in zip(plain["transcript"], found["transcript"], strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert torch.allclose(one.log_probs, other.log_probs, atol=1e-5)
    again = play(env, policy)
    assert list(again["query"]) != list(found["query"])
    env.load_state_dict(make().state_dict())
    env.reset_dataloader()
    assert list(play(env, policy)["query"]) == list(found["query"])
    assert env._gateway.engine.batches
    env.close()


class Coder(Policy):
    """Writes programs of all kinds, and whatever they print as its answer."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.stop_ids, self.seeded = tokenizer, frozenset({tokenizer.eos_token_id}), True
        self.codec, self.in_keys, self.out_keys = (
            ChatTemplate(tokenizer).codec,
            ["tokens", "episode_seed"],
            ["tokens"],
        )

    def _sample(self, prompts):
        ids = [self.codec.encode([self._said(prompt)])[0] + [min(self.stop_ids)] for prompt in prompts]
        ids = [row[: prompt.limit] for row, prompt in zip(ids, prompts, strict=True)]
        return self._turns(prompts, ids, [[-0.5] * len(row) for row in ids])

    def _said(self, prompt) -> str:
        shown = self.tokenizer.decode(prompt.ids)
        if "<|tool|>" in shown:
            return shown.split("<|tool|>")[1].split("<|end|>")[0].strip()
        name, a, b = shown.split("<|user|>")[1].split("<|end|>")[0].split()
        program = f"print({a}{SIGNS[name]}{b})"
        return [
            f"```python\n{program}\n```", f"```python\n{program}", f"{program}", "```python\nprint(1)\n```",
            "```python\nprint(a)\n```", f"```python\n{program}\n``` \n```python\n1\n```", "```python\npass\n```", a * 60,
        ][prompt.seed % 8]  # fmt: skip


def test_the_agent_of_the_examples_plays_the_tool_task():
    """Programs that run, fail, print nothing, are not closed or cut off; and answers without one."""
    tokenizer = tiny_tokenizer(TOOL_ALPHABET)

    def make():
        return make_env(
            "python-tool", limits={"max_turn_tokens": 50}, seed=1, tokenizer=tokenizer, input_mode="tokens", num_envs=8,
            repeats=4, group_repeats=True,
        )  # fmt: skip

    plain, env = make(), AgentEnv(make(), named(f"{ROOT / 'examples' / 'tool_agent.py'}:agent"))
    one, other = play(plain, Coder(tokenizer)), play(env, Coder(tokenizer))
    env.close()
    plain.close()
    assert len({seed % 8 for seed in one["episode_seed"].tolist()}) > 5
    assert 0 < one["success"].float().mean() < 1
    for key in ("reward", "success", "graded", "episode_seed"):
        assert torch.equal(one[key], other[key]), key
    assert list(one["extracted"]) == list(other["extracted"])
    for mine, its in zip(one["transcript"], other["transcript"], strict=True):
        assert mine.tokens.tolist() == its.tokens.tolist()
        assert mine.mask.tolist() == its.mask.tolist()


def test_agents_of_one_gateway_do_not_meet():
    async def agent(row, session):
        client = client_of(session, AsyncOpenAI)
        messages = [{"role": "user", "content": row["query"]}]
        for turn in range(4):
            reply = await client.chat.completions.create(model="m", messages=messages)
            messages += [reply.choices[0].message, {"role": "user", "content": f"{row['query']} {turn}"}]

    sessions: list = []
    with gateway_of(said, ended=sessions.append) as gateway:
        td = play_agents(agent, ROWS * 4, gateway)
    for row, transcript in zip(ROWS * 4, td["transcript"], strict=True):
        assert len(transcript.sequences) == 1
        words = " ".join(message["content"] for message in transcript.messages if message["role"] == "user")
        assert set(words.replace(row["query"], "").split()) <= set("0123")
    assert len(sessions) == 12


# ---------------------------------------------------------------------- the command line
def test_the_command_serves_a_model_and_keeps_what_it_sampled(tmp_path):
    path = tmp_path / "runs" / "agents.jsonl"
    words = ["gateway", "--port", "0", "--max-new-tokens", "5", "--max-turns", "1", "--rollouts", str(path)]
    arguments = make_parser().parse_args([*words, "--implicit", "--allow", "temperature"])
    with make_gateway(arguments) as gateway:
        client = OpenAI(base_url=f"{gateway.url}/s/mine/v1", api_key="k")
        assert client.models.list().data[0].id == "tiny"
        reply = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
        assert reply.usage.completion_tokens <= 5
        with pytest.raises(PermissionDeniedError, match="max_turns"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "more"}])
        assert gateway.settings.allow == {"temperature", "max_tokens", "stop"}
    [line] = read_rollouts(path)
    assert (line["id"], line["stop"], line["turns"]) == ("mine", "error", 1)
    assert line["sequences"][0]["sampled"]


@pytest.mark.full
def test_the_command_ends_when_it_is_told_to():
    command = [sys.executable, "-m", "torchrl_chat.cli.main", "gateway", "--port", "0", "--token", "t"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline()
        assert "http://127.0.0.1:" in address
        url = address.split()[1].split("/s/")[0]
        assert httpx.get(f"{url}/sessions", headers={"authorization": "Bearer t"}).json() == {"sessions": []}
        process.terminate()
        assert process.wait(60) == 0
        assert process.stdout.read() == ""
