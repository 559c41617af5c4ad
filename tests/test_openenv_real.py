"""Real peers: OpenEnv's own servers and clients, and this package's server in another process.

What needs OpenEnv runs in environments of their own, made by ``make openenv``, and skips where they are absent. The environments
that ``openenv init`` makes come with the packages; those of the repository need that:

- ``TORCHRL_CHAT_OPENENV_010``, ``TORCHRL_CHAT_OPENENV_03``: virtual environments with openenv 0.10 and openenv-core 0.3;
- ``TORCHRL_CHAT_OPENENV_REPO``: OpenEnv's repository, a work tree or a bare one.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer, respond
from tensordict import TensorDict
from torchrl.envs import StepCounter, Transform, TransformedEnv, check_env_specs
from torchrl.envs.transforms import Compose
from torchrl_grpo import grpo

from torchrl_chat import DatasetChatEnv, RewardTransform, StopReason, TransformersPolicy, columns
from torchrl_chat.openenv.batch.adapters import CHAT, CHAT_ENV, CHAT_TEXT, ECHO_ENV, text_adapter
from torchrl_chat.openenv.batch.env import OpenEnvChatEnv
from torchrl_chat.openenv.client.chat import ChatEnv
from torchrl_chat.openenv.client.errors import ReplyLost, ServerError, SessionLost
from torchrl_chat.openenv.client.generic import GenericClient
from torchrl_chat.openenv.models import ChatAction
from torchrl_chat.rewards import NumberVerifier
from torchrl_chat.tiny import last_digit_rows, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.openenv

ROOT = Path(__file__).parent.parent
ENVS = ("chat_env", "echo_env", "grid_world_env", "reasoning_gym_env")
VERSIONS = {"0.10": "TORCHRL_CHAT_OPENENV_010", "0.3": "TORCHRL_CHAT_OPENENV_03"}


# ---------------------------------------------------------------------- the peers
def need(variable: str, default: str) -> Path:
    """A path from the environment, or a skip that says which is missing."""
    path = Path(os.environ.get(variable, ROOT / ".openenv" / default)).resolve()
    if not path.exists():
        pytest.skip(f"no {variable} at {path}: `make openenv` makes it")
    return path


def need_python(version: str) -> str:
    variable = VERSIONS[version]
    return str(need(variable, variable[-3:].strip("_").lower()) / "bin" / "python")


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """A folder with OpenEnv's ``envs``."""
    path = need("TORCHRL_CHAT_OPENENV_REPO", "repo")
    if (path / "envs").is_dir():
        return path
    tree = tmp_path_factory.mktemp("openenv")
    names = [f"envs/{name}" for name in ENVS]
    archive = subprocess.run(
        ["git", f"--git-dir={path}", "archive", "HEAD", *names], stdout=subprocess.PIPE, check=True
    ).stdout
    subprocess.run(["tar", "x"], input=archive, cwd=tree, check=True)
    return tree


class Process:
    """A server in another process, until the tests are over."""

    def __init__(self, command: list[str], log: Path, cwd: Path | None = None, port: int = 0, **env: str):
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, cwd=cwd, env={**os.environ, **env})
        self._wait(90)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                    return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the server did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def template(folder: Path, version: str) -> Path:
    """The environment that ``openenv init`` makes, an echo, open to many sessions."""
    script = Path(need_python(version)).with_name("openenv")
    folder.mkdir()
    subprocess.run([script, "init", "demo_env"], cwd=folder, check=True, capture_output=True)
    app = folder / "demo_env" / "server" / "app.py"
    app.write_text(app.read_text().replace("max_concurrent_envs=1,", "max_concurrent_envs=32,"))
    return folder / "demo_env"


@pytest.fixture(scope="session")
def stock(request, tmp_path_factory):
    """Starts OpenEnv's servers, each once: ``stock("chat_env", "0.10")`` is its URL."""
    running: dict[tuple[str, str], Process] = {}
    folder = tmp_path_factory.mktemp("stock")
    plain = copy.deepcopy(bpe_tokenizer())
    plain.chat_template = None  # with a chat template, every session of chat_env fails
    plain.save_pretrained(folder / "tokenizer")

    def start(name: str, version: str) -> str:
        if (name, version) not in running:
            if name == "demo_env":
                module, home = "server.app:app", template(folder / f"demo-{version}", version)
            else:
                module, home = f"envs.{name}.server.app:app", request.getfixturevalue("repository")
            port = free_port()
            command = [need_python(version), "-m", "uvicorn", module, "--port", str(port), "--log-level", "warning"]
            running[name, version] = Process(
                command,
                folder / f"{name}-{version}.log",
                home,
                port,
                TOKENIZER_NAME=str(folder / "tokenizer"),
                MAX_CONCURRENT_ENVS="32",
            )
        return running[name, version].url

    yield start
    for process in running.values():
        process.stop()


SERVE = """
import argparse, sys
from torchrl_chat.cli import serve
parser = argparse.ArgumentParser()
serve.add_parser(parser.add_subparsers())
arguments = parser.parse_args()
sys.exit(arguments.run(arguments))
"""


@pytest.fixture(scope="session")
def ours(tmp_path_factory):
    """This package's server in another process: ``ours("digits")`` is its URL."""
    running: dict[str, Process] = {}
    folder = tmp_path_factory.mktemp("ours")
    bpe_tokenizer().save_pretrained(folder / "tokenizer")

    def start(name: str) -> str:
        if name not in running:
            port = free_port()
            tokenizer = "tiny" if name == "digits" else str(folder / "tokenizer")
            options = ["--env", name, "--tokenizer", tokenizer, "--port", str(port), "--log-level", "error"]
            command = [sys.executable, "-c", SERVE, "serve", *options]
            running[name] = Process(command, folder / f"{name}.log", ROOT, port, OMP_NUM_THREADS="1")
        return running[name].url

    yield start
    for process in running.values():
        process.stop()


def batch(url, adapter, rows=3, mode="tokens", **options):
    options = {"tokenizer": bpe_tokenizer(), "seed": 1, **options}
    env = OpenEnvChatEnv(url, adapter=adapter, input_mode=mode, batch_size=(rows,), **options)
    return TransformedEnv(env, Compose())


def flat(rows):
    return [item for row in rows for item in row]


def messages(td, row):
    return list(columns.read_objects(td.get("transcript"), td.batch_size)[row].messages)


# ---------------------------------------------------------------------- our client, their servers
@pytest.mark.parametrize("version", VERSIONS)
def test_our_client_with_chat_env(stock, version):
    with ChatEnv(stock("chat_env", version)) as client:
        assert client.reset(seed=3).observation.messages == []
        sent = []
        for turn in range(20):
            tokens = bpe_tokenizer().encode(f"answer {turn}")
            sent += tokens
            observation = client.step(ChatAction(tokens=tokens)).observation
            assert observation.tokens == sent
            assert observation.messages[-1] == {"role": "assistant", "content": f"answer {turn}"}
        assert flat(client.state().history_tokens) == sent
        with pytest.raises(ServerError, match="tokens") as caught:
            client.step({"tokens": []})
        assert caught.value.code == "VALIDATION_ERROR"
        with ChatEnv(client.link.url) as second, pytest.raises(SessionLost) as caught:
            second.reset()  # chat_env has one session
        assert caught.value.code == "CAPACITY_REACHED"
        assert client.step(ChatAction(tokens=[70])).observation.tokens == [*sent, 70]


@pytest.mark.parametrize("version", VERSIONS)
def test_our_client_with_echo_env(stock, version):
    with GenericClient(stock("echo_env", version)) as client:
        client.reset()
        call = {"type": "call_tool", "tool_name": "echo_message", "arguments": {"message": "hi"}}
        for _ in range(20):
            assert client.step(call).observation["result"]["data"] == "hi"
        assert client.state()["step_count"] == 20
        tools = client.mcp("tools/list")["tools"]
        assert {tool["name"] for tool in tools} == {"echo_message", "echo_with_length"}
        with pytest.raises(ServerError):
            client.step({"type": "call_tool"})
        assert client.state()["step_count"] == 20


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.by_day(2, place=1)
def test_our_client_with_the_environment_of_openenv_init(stock, version):
    with GenericClient(stock("demo_env", version)) as client:
        client.reset()
        for turn in range(20):
            length = turn % 10 + 1
            result = client.step({"message": "x" * length})
            assert result.observation["message_length"] == length
            assert result.reward == pytest.approx(0.1 * length)
        assert client.state()["step_count"] == 20
        with pytest.raises(ServerError) as caught:
            client.step({"message": 5})
        assert caught.value.code == "VALIDATION_ERROR"
        assert client.step({"message": ""}).observation["message_length"] == 0


# ---------------------------------------------------------------------- our environment, their servers
@pytest.mark.parametrize("version", VERSIONS)
def test_the_batch_over_the_environment_of_openenv_init(stock, version, mode):
    env = batch(stock("demo_env", version), text_adapter("echoed_message", "message"), 16, mode)
    check_env_specs(env)
    td = env.reset()
    for turn in range(3):
        texts = [f"{row} {turn}" for row in range(16)]
        td = env.step(respond(env, td, texts))
        assert [messages(td["next"], row)[-1]["content"] for row in range(16)] == texts
        assert td["next", "reward"].flatten().tolist() == pytest.approx([0.1 * len(text) for text in texts])
        td = env.step_mdp(td)
    env.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_batch_over_chat_env(stock, version, mode):
    env = batch(stock("chat_env", version), CHAT_ENV, 1, mode, data_key="query")
    td = env.reset(TensorDict(query=["what is 12?"], batch_size=(1,)))
    for turn in range(3):
        td = env.step(respond(env, td, [f"answer {turn}"]))
        assert not td["next", "done"].any()
        assert messages(td["next"], 0)[-1] == {"role": "assistant", "content": f"answer {turn}"}
        td = env.step_mdp(td)
        td = env.base_env.append_messages(td, ["and 30?"])
    assert [m["role"] for m in messages(td, 0)] == ["user", *["assistant", "user"] * 3]
    env.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_batch_over_echo_env(stock, version, mode):
    env = batch(stock("echo_env", version), ECHO_ENV, 16, mode)
    check_env_specs(env)
    td = env.reset()
    for turn in range(3):
        texts = [f"{row} {turn}" for row in range(16)]
        td = env.step(respond(env, td, texts))
        assert [messages(td["next"], row)[-1]["content"] for row in range(16)] == texts
        td = env.step_mdp(td)
    env.close()


def test_the_batch_over_grid_world(stock):
    env = batch(stock("grid_world_env", "0.10"), text_adapter("message", "action", str.strip), 1, "text")
    td = env.reset()
    moves = ["DOWN"] * 4 + ["RIGHT"] * 4
    rewards = []
    for move in moves:
        td = env.step(respond(env, td, [move]))
        rewards.append(td["next", "reward"].item())
        td = env.step_mdp(td)
    assert rewards == pytest.approx([-0.1] * 7 + [1.0])
    assert td["terminated"].item()
    assert td["stop_reason"].item() == StopReason.ANSWERED
    with pytest.warns(RuntimeWarning, match="Input should be 'UP'"):
        td = env.step(respond(env, env.reset(), ["sideways"]))
    assert td["next", "truncated"].item()
    env.close()


def test_the_batch_over_reasoning_gym(stock):
    adapter = text_adapter("question", "answer")
    task = {"dataset_name": "leg_counting", "dataset_config": {}, "size": 5}
    env = batch(stock("reasoning_gym_env", "0.10"), adapter, 8, "text", reset_kwargs=task, repeats=4)
    td = env.reset()
    questions = columns.read_objects(td["query"], td.batch_size)
    assert len(set(questions)) == 2  # a seed a group, a question a seed
    assert questions[:4] == questions[:1] * 4
    following = env.step(respond(env, td, ["no idea"] * 8))["next"]
    answers = [seen["correct_answer"] for seen in columns.read_objects(following["observation"], td.batch_size)]
    assert following["terminated"].all()
    env.base_env.set_seed(1)
    td = env.reset()
    assert columns.read_objects(td["query"], td.batch_size) == questions
    assert env.step(respond(env, td, answers))["next", "reward"].flatten().tolist() == [1.0] * 8
    env.close()


# ---------------------------------------------------------------------- their clients, our server
PEER = """
import asyncio, json, sys
from openenv.core.generic_client import GenericEnvClient
if len(sys.argv) > 2:
    sys.path.insert(0, sys.argv[2])
    from envs.chat_env.client import ChatEnv as Client
    from envs.chat_env.models import ChatAction
    def get(value, name): return getattr(value, name)
else:
    Client = GenericEnvClient
    def ChatAction(**fields): return fields
    def get(value, name): return value[name]

async def chat(url):
    async with Client(base_url=url) as client:
        result = await client.reset(seed=1)
        prefix, exact = get(result.observation, "tokens"), True
        for turn in range(20):
            tokens = [70 + turn, 71, 72]
            observation = (await client.step(ChatAction(tokens=tokens))).observation
            exact = exact and get(observation, "tokens")[:len(prefix) + 3] == prefix + tokens
            prefix = get(observation, "tokens")
        state = await client.state()
    return {"exact": exact, "messages": len(get(observation, "messages")), "steps": get(state, "step_count"),
            "ledger": sum(get(state, "history_tokens"), []) == prefix}

async def errors(url):
    async with GenericEnvClient(base_url=url) as client:
        await client.reset()
        texts = []
        for action in ({"tokens": []}, {"tokens": [10**9]}, {"tokens": "abc"}, {}):
            try:
                await client.step(action)
            except Exception as error:
                texts.append(str(error))
        state = await client.state()
    return {"errors": texts, "steps": state["step_count"]}

async def many(url):
    async def one(i):
        async with GenericEnvClient(base_url=url) as client:
            await client.reset()
            for turn in range(5):
                result = await client.step({"tokens": [70 + i % 20, 71]})
            return len(result.observation["messages"])
    return await asyncio.gather(*(one(i) for i in range(64)))

async def main():
    url = sys.argv[1]
    print(json.dumps({"chat": await chat(url), "errors": await errors(url), "many": await many(url)}))

asyncio.run(main())
"""


@pytest.mark.parametrize("client", ["GenericEnvClient", "chat_env"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.by_day(2)
def test_their_clients_with_our_server(ours, request, version, client):
    command = [need_python(version), "-c", PEER, ours("chat")]
    if client == "chat_env":
        command.append(str(request.getfixturevalue("repository")))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["chat"] == {"exact": True, "messages": 20, "steps": 20, "ledger": True}
    assert len(told["errors"]["errors"]) == 4
    assert told["errors"]["steps"] == 0
    assert told["many"] == [5] * 64


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.by_day(2)
def test_their_validators(ours, tmp_path, version):
    """Of a server that runs, and of the folder that their command line takes."""
    script = str(Path(need_python(version)).with_name("openenv"))
    done = subprocess.run([script, "validate", "--url", ours("chat")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = shutil.copytree(ROOT / "examples" / "chat_env", tmp_path / "chat_env")
    options = ["--level", "static", "--skip-build"]
    if version == "0.3":
        (folder / "uv.lock").touch()  # only looked for; `uv lock` makes it where there is an index
        options = []
    done = subprocess.run(
        [script, "validate", ".", *options], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------- our client and environment, our server
def test_our_client_with_our_server(ours):
    tokenizer = bpe_tokenizer()
    for delta in (False, True):
        with ChatEnv(ours("chat"), delta=delta) as client:
            observation = client.reset(messages=[{"role": "user", "content": "Hi"}]).observation
            for turn in range(20):
                before = observation.tokens
                answer = ChatAction(tokens=tokenizer.encode(f"answer {turn}<|im_end|>"))
                observation = client.step(answer).observation
                assert observation.tokens[: len(before) + len(answer.tokens)] == before + answer.tokens
                question = client.message_to_action({"role": "user", "content": "And?"}, tokenizer)
                observation = client.step(question).observation
                assert observation.messages[-1] == {"role": "user", "content": "And?"}
            assert len(observation.messages) == 41
            assert flat(client.state().history_tokens) == observation.tokens


def test_a_session_outlives_its_connection(ours):
    def cut(client):
        async def abort():
            client._channel._held.transport.abort()

        client._loop.run(abort())

    with ChatEnv(ours("chat"), resume=True) as client:
        client.reset(messages="Hi")
        first = client.step(ChatAction(text="Hello")).observation
        cut(client)
        assert client.state().history_messages == first.messages  # resumed, not begun anew
        assert client.lost is None
        second = client.step(ChatAction(messages=[{"role": "user", "content": "Well?"}])).observation
        assert second.messages[:-1] == first.messages
        cut(client)
        third = client.step(ChatAction(text="Fine")).observation
        assert third.tokens[: len(second.tokens)] == second.tokens
        session = client._channel._id
    with ChatEnv(f"{ours('chat')}/?session_id={session}") as late, pytest.raises(SessionLost):
        late.state()  # closing it has ended it for good


def test_a_session_that_another_connection_takes_is_not_taken_back(ours):
    with ChatEnv(ours("chat"), resume=True) as client:
        client.reset(messages="Hi")
        with ChatEnv(f"{ours('chat')}?session_id={client._channel._id}") as other:
            assert other.state().history_messages == [{"role": "user", "content": "Hi"}]
            with pytest.raises(SessionLost, match="4001") as caught:
                client.state()
            assert caught.value.code == "TAKEN_OVER"
            assert other.step(ChatAction(text="Hello")).observation.messages[-1]["content"] == "Hello"
        client.reset(messages="Anew")
        assert client.state().history_messages == [{"role": "user", "content": "Anew"}]


@pytest.mark.parametrize("done_before", [False, True])
def test_a_step_is_never_done_twice(ours, done_before):
    """The connection breaks during a step: before the server has done it, or behind."""
    with ChatEnv(ours("chat"), resume=True) as client:
        client.reset(messages="Hi")
        channel = client._channel

        async def break_it():
            held = channel._held
            say = held._say

            def saying(frame):
                if done_before:
                    held._take = lambda frame: None  # the reply gets lost
                    say(frame)
                asyncio.get_running_loop().call_later(0.3 if done_before else 0, held.transport.abort)

            held._say = saying

        client._loop.run(break_it())
        if done_before:
            with pytest.raises(ReplyLost, match="counts 1 steps, replies came to 0"):
                client.step(ChatAction(text="Hello"))
        else:
            assert client.step(ChatAction(text="Hello")).observation.messages[-1]["content"] == "Hello"
        state = client.state()
        assert state.step_count == 1
        assert [message["content"] for message in state.history_messages] == ["Hi", "Hello"]


def test_without_resumption_a_lost_session_is_lost(ours):
    with ChatEnv(ours("chat")) as client:
        client.reset(messages="Hi")

        async def abort():
            client._channel._held.transport.abort()

        client._loop.run(abort())
        with pytest.raises(SessionLost):
            client.step(ChatAction(text="Hello"))


def test_the_batch_over_our_server(ours, mode):
    """The server's ledger and ours are the same tokens."""
    env = batch(ours("chat"), CHAT, 64, mode, task_keys=["query"])
    td = env.reset(TensorDict(query=[f"question {i}" for i in range(64)], batch_size=(64,)))
    assert messages(td, 5) == [{"role": "user", "content": "question 5"}]
    td = env.step(respond(env, td, [f"answer {i}" for i in range(64)]))
    assert messages(td["next"], 63)[1:] == [{"role": "assistant", "content": "answer 63"}]
    assert not td["next", "done"].any()
    env.close()


def test_the_batch_survives_its_connections(ours):
    env = batch(ours("chat"), CHAT, 8, task_keys=["query"], link={"resume": True})
    td = env.step(respond(env, env.reset(TensorDict(query=["Hi"] * 8, batch_size=(8,))), ["Hello"] * 8))
    sessions = env.base_env._sessions

    async def cut():
        for channel in sessions._held:
            channel._held.transport.abort()

    sessions._loop.run(cut())
    td = env.base_env.append_messages(env.step_mdp(td), ["Well?"] * 8)
    td = env.step(respond(env, td, ["Fine"] * 8))
    assert not td["next", "done"].any()
    assert [message["content"] for message in messages(td["next"], 7)] == ["Hi", "Hello", "Well?", "Fine"]
    env.close()


def test_text_actions(ours):
    env = batch(ours("chat"), CHAT_TEXT, 2, "text", task_keys=["query"], tokenizer=tiny_tokenizer("abc "))
    td = env.reset(TensorDict(query=["a", "b"], batch_size=(2,)))  # the server has another tokenizer
    td = env.step(respond(env, td, ["abc", "cab"]))
    assert messages(td["next"], 1)[1:] == [{"role": "assistant", "content": "cab"}]
    assert columns.read_objects(td["next", "env_failure"], td.batch_size) == ["", ""]
    env.close()


# ---------------------------------------------------------------------- the same training, local and remote
class Record(Transform):
    """Writes down what every step leaves, and marks success."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def _step(self, tensordict, following):
        transcripts = columns.read_objects(following["transcript"], following.batch_size)
        self.steps.append((list(transcripts), following["reward"].clone(), following["done"].clone()))
        if "success" not in following.keys():
            following["success"] = following["reward"] > 0
        return following


def train(env, steps=3):
    env = env.append_transform(Record())
    tokenizer = tiny_tokenizer()
    policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=3, seeded=True)
    torch.manual_seed(0)
    list(grpo(env, policy, steps=steps, group_size=4, minibatch=16))
    return env.transform[-1].steps, policy.model.state_dict()


@pytest.mark.by_day(2, place=1)
def test_grpo_is_the_same_over_a_server(ours):
    """The same seeds give the same transcripts, rewards and weights, local and over the server in another process."""

    def dataset():
        options = {
            "dataset": last_digit_rows(seed=0),
            "num_envs": 4,
            "repeats": 4,
            "group_repeats": True,
            "seed": 3,
        }
        return DatasetChatEnv(tokenizer=tiny_tokenizer(), input_mode="tokens", **options)

    local = dataset()
    local = local.append_transform(StepCounter(max_steps=1))
    local = local.append_transform(RewardTransform(NumberVerifier()))
    expected, weights = train(local)

    remote = OpenEnvChatEnv(
        ours("digits"),
        tokenizer=tiny_tokenizer(),
        input_mode="tokens",
        batch_size=(16,),
        task_keys={"episode_row": "index", "episode_seed": "seed"},
    )
    got, trained = train(TransformedEnv(remote, dataset().primer.clone()))
    remote.close()

    assert len(got) == len(expected) == 3
    for (theirs, reward, done), (mine, expected_reward, expected_done) in zip(got, expected, strict=True):
        for one, other in zip(theirs, mine, strict=True):
            assert one == other
        assert torch.equal(reward, expected_reward)
        assert torch.equal(done, expected_done)
    assert any(reward.any() for _, reward, _ in got)
    assert all(torch.equal(trained[name], weights[name]) for name in weights)
