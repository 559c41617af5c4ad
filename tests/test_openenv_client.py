"""The OpenEnv client: sessions that stay in order, whatever servers and networks do."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import pickle
import stat
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest
from conftest import CHATML, bpe_tokenizer, forked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openenv_stub import StubServer

from torchrl_chat.messages import MessageError
from torchrl_chat.openenv.client.chat import ChatEnv
from torchrl_chat.openenv.client.connection import encode
from torchrl_chat.openenv.client.errors import ConnectFailed, RequestTimeout, ServerError, SessionLost
from torchrl_chat.openenv.client.generic import GenericClient
from torchrl_chat.openenv.client.link import Link
from torchrl_chat.openenv.models import ChatAction, ChatObservation

pytestmark = pytest.mark.services

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def server():
    with StubServer() as running:
        yield running


def said(result) -> str:
    return result.observation["message"]


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail("it never happened")
        time.sleep(0.01)


# ---------------------------------------------------------------------- calls
def test_an_episode(server):
    with GenericClient(server.url) as client:
        assert said(client.reset(seed=7)) == "begin 7"
        result = client.step({"message": "abc"})
        assert (said(result), result.reward, result.done) == ("cba", 0.125, False)
        assert client.state()["step_count"] == 1
        assert client.step({"message": "stop"}).done
    assert server.resets[-1] == {"seed": 7}


def test_an_episode_in_a_loop(server):
    async def play() -> None:
        async with GenericClient(server.url) as client:
            assert said(await client.reset(seed=1)) == "begin 1"
            assert said(await client.step({"message": "abc"})) == "cba"
            # requests that are under way at once are answered in order
            many = await asyncio.gather(*(client.step({"message": f"{i}!"}) for i in range(50)))
            assert [said(result) for result in many] == [f"{i}!"[::-1] for i in range(50)]
        client = GenericClient(server.url)
        assert said(await client.reset(seed=2)) == "begin 2"  # entered by nobody, but a loop runs
        assert said(client.sync().step({"message": "ab"})) == "ba"
        client.close()

    asyncio.run(play())


def test_calls_block_without_a_loop_even_if_not_entered(server):
    client = GenericClient(server.url)
    assert said(client.reset(seed=3)) == "begin 3"
    client.close()
    assert said(client.reset(seed=4)) == "begin 4"  # used again after its end
    client.close()


def test_threads_may_share_a_client(server):
    with GenericClient(server.url) as client, ThreadPoolExecutor(8) as pool:
        client.reset()
        words = [f"word {i}" for i in range(200)]
        results = pool.map(lambda word: said(client.step({"message": word})), words)
        assert list(results) == [word[::-1] for word in words]


def test_clients_share_one_thread_which_ends_with_the_last_of_them(server):
    clients = [GenericClient(server.url) for _ in range(20)]
    for i, client in enumerate(clients):
        assert said(client.reset(seed=i)) == f"begin {i}"
    [thread] = {client._loop._thread for client in clients}
    for client in clients[1:]:
        client.close()
    assert thread.is_alive()
    assert said(clients[0].step({"message": "ab"})) == "ba"
    clients[0].close()
    assert not thread.is_alive()


def test_a_reply_in_many_frames(server):
    with GenericClient(server.url, max_message_size_mb=1) as client:
        client.reset()
        for pieces in (1, 2, 7):
            assert said(client.step({"message": f"pieces:{pieces}"})) == f"pieces:{pieces}"[::-1]
        assert said(client.step({"message": "ab"})) == "ba"


def test_close_frees_the_session_and_ends_the_thread(server):
    client = GenericClient(server.url)
    client.reset()
    assert server.active == 1
    thread = client._loop._thread
    client.close()
    wait_for(lambda: server.active == 0)
    assert not thread.is_alive()
    client.close()


def test_a_collected_client_leaves_nothing(server):
    client = GenericClient(server.url)
    client.reset()
    thread = client._loop._thread
    del client
    gc.collect()
    wait_for(lambda: server.active == 0 and not thread.is_alive())


def test_it_pickles_without_its_session(server):
    with GenericClient(server.url, token="t", message_timeout_s=3.0) as client:
        client.reset()
        copy = pickle.loads(pickle.dumps(client))
        assert copy.link == client.link
        with copy:
            assert said(copy.reset(seed=5)) == "begin 5"
        assert said(client.step({"message": "ab"})) == "ba"


def test_a_forked_child_connects_anew(server):
    with GenericClient(server.url) as client:
        client.reset()
        assert forked(lambda: said(client.reset(seed=6)) == "begin 6" and client.state()["step_count"] == 0) == 0
        assert said(client.step({"message": "ab"})) == "ba"


def test_a_forked_child_may_close_what_is_not_its_own(server):
    with GenericClient(server.url) as client:
        client.reset()
        assert forked(lambda: client.close() is None) == 0
        assert said(client.step({"message": "ab"})) == "ba"


# ---------------------------------------------------------------------- errors and time
def test_a_refused_action_leaves_the_session_in_order(server):
    with GenericClient(server.url) as client:
        client.reset()
        with pytest.raises(ServerError, match="'message' is missing") as caught:
            client.step({"massage": "?"})
        assert caught.value.code == "EXECUTION_ERROR"
        assert said(client.step({"message": "ab"})) == "ba"


@pytest.mark.parametrize("action", [{"x": float("nan")}, {"x": object()}, "text", [1, 2]])
def test_what_is_no_action_is_not_sent(server, action):
    with GenericClient(server.url) as client:
        client.reset()
        with pytest.raises((TypeError, ValueError)):
            client.step(action)
        assert client.state()["step_count"] == 0


@pytest.mark.parametrize("value", [None, {7: "key"}, "\ud800", [1.5, -0.0], 10**30, 'ü\n"', {"a": [{}, []]}])
def test_frames_say_what_json_says(value):
    assert json.loads(encode({"x": value})) == json.loads(json.dumps({"x": value}))


@pytest.mark.parametrize("value", [math.nan, [math.inf], {"null": -math.inf}, b"bytes", {1, 2}, date(2026, 1, 1)])
def test_what_is_no_json_is_no_frame(value):
    with pytest.raises((TypeError, ValueError)):
        encode({"x": value})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "no", "code": "VALIDATION_ERROR", "errors": [{"loc": 7, "msg": "odd"}]}, ServerError),
        ({"message": "no", "code": "VALIDATION_ERROR", "errors": [{"loc": ["a", 0]}, 3]}, ServerError),
        ({"message": "no", "code": ["odd"]}, ServerError),
        ({"message": None, "code": None, "errors": {"a": 1}}, ServerError),
        ({"message": "no", "code": "SESSION_ERROR", "errors": [{"loc": 7}]}, SessionLost),
    ],
)
def test_odd_errors_are_errors_still(server, error, kind):
    with GenericClient(server.url, message_timeout_s=10) as client:
        client.reset()
        with pytest.raises(kind):
            client.step({"message": "error:" + json.dumps(error)})
        if kind is ServerError:
            assert said(client.step({"message": "ab"})) == "ba"


def test_a_call_that_is_cancelled_before_it_begins_is_not_sent(server):
    async def play() -> None:
        async with GenericClient(server.url) as client:
            await client.reset()
            task = asyncio.create_task(client.step({"message": "ab"}))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert (await client.state())["step_count"] == 0

    asyncio.run(play())


def test_a_timeout_never_shifts_replies(server):
    with GenericClient(server.url) as client:
        client.reset()
        with pytest.raises(RequestTimeout, match=r"'step' within 0\.05 s"):
            client.step({"message": "late sleep:0.2"}, timeout_s=0.05)
        assert client.state()["step_count"] == 1  # and not the step's observation
        assert said(client.step({"message": "ab"})) == "ba"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.tuples(st.sampled_from(["step", "state"]), st.booleans(), st.booleans()), max_size=12))
def test_every_reply_answers_its_request(server, plan):
    """However calls time out, a reply that is returned is that of the call, and the server has seen every step."""
    with GenericClient(server.url) as client:
        client.reset()
        steps = 0
        for i, (kind, slow, hasty) in enumerate(plan):
            word = f"{i} sleep:{0.03 if slow else 0.0}"
            steps += kind == "step"
            try:
                if kind == "step":
                    result = client.step({"message": word}, timeout_s=0.004 if hasty else 5.0)
                    assert said(result) == word[::-1]
                else:
                    assert client.state(timeout_s=0.004 if hasty else 5.0)["step_count"] == steps
            except RequestTimeout:
                assert hasty
        assert client.state()["step_count"] == steps


def test_a_cancelled_call_never_shifts_replies(server):
    async def play() -> None:
        async with GenericClient(server.url) as client:
            await client.reset()
            task = asyncio.create_task(client.step({"message": "late sleep:0.1"}))
            await asyncio.sleep(0.03)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await client.state())["step_count"] == 1

    asyncio.run(play())


@pytest.mark.parametrize(
    ("word", "reason", "code"),
    [
        ("die", "connection", None),
        ("bye", r"closed the connection \(1000\)", None),
        ("fatal", "out of order", "SESSION_ERROR"),
        ("garbage", "no frame of the protocol", None),
        ("wrong", "answered 'step' with 'state'", None),
    ],
)
def test_a_lost_session_says_why_and_a_reset_begins_anew(server, word, reason, code):
    with GenericClient(server.url) as client:
        client.reset()
        with pytest.raises(SessionLost, match=reason) as caught:
            client.step({"message": word})
        assert caught.value.code == code
        for call in (lambda: client.step({"message": "ab"}), client.state):
            with pytest.raises(SessionLost, match=reason):  # never a new, empty session in silence
                call()
        assert client.lost is not None
        assert said(client.reset(seed=8)) == "begin 8"
        assert client.lost is None


def test_a_reply_to_nothing_ends_the_session(server):
    with GenericClient(server.url) as client:
        client.reset()
        client.step({"message": "twice"})
        wait_for(lambda: client.lost is not None)
        with pytest.raises(SessionLost, match="unasked"):
            client.state()


def test_a_session_that_ended_between_episodes_is_replaced(server):
    with GenericClient(server.url) as client:
        client.reset()
        server.drop()
        assert said(client.reset(seed=9)) == "begin 9"


def test_refusals_for_want_of_capacity_are_always_readable():
    with StubServer(capacity=1) as full, GenericClient(full.url) as first:
        first.reset()
        for _ in range(30):
            with GenericClient(full.url) as client, pytest.raises(SessionLost, match="full: 1") as caught:
                client.reset()
            assert caught.value.code == "CAPACITY_REACHED"
        assert said(first.step({"message": "ab"})) == "ba"


def test_a_caller_that_computes_for_long_keeps_its_session():
    """The stock client loses it: pings stay unanswered while the caller's loop is blocked."""
    with StubServer(ping_interval=0.1, ping_timeout=0.2) as strict:

        async def play() -> None:
            async with GenericClient(strict.url) as client:
                await client.reset()
                end = time.monotonic() + 1.0
                while time.monotonic() < end:  # a generate() in the caller's loop
                    sum(range(1000))
                assert said(await client.step({"message": "ab"})) == "ba"

        asyncio.run(play())


def test_large_messages(server):
    with GenericClient(server.url) as client:
        client.reset()
        assert len(said(client.step({"message": f"big:{20 * 2**20}"}))) == 20 * 2**20
    with GenericClient(server.url, max_message_size_mb=1) as client:
        client.reset()
        with pytest.raises(SessionLost, match="1009"):
            client.step({"message": f"big:{2 * 2**20}"})


# ---------------------------------------------------------------------- connecting
@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h:8000", "ws://h:8000/ws"),
        ("https://h/", "wss://h/ws"),
        ("h:8000", "ws://h:8000/ws"),
        ("ws://h/ws", "ws://h/ws"),
        ("wss://h/a/b/", "wss://h/a/b/ws"),
        ("http://h/a?key=1", "ws://h/a/ws?key=1&delta=1"),
    ],
)
def test_addresses(url, address):
    assert Link(url=url).address("delta=1" if "?" in address else "") == address


@pytest.mark.parametrize("url", ["ftp://h", "http://", "", "/ws"])
def test_no_address(url):
    with pytest.raises(ValueError, match="base_url is"):
        GenericClient(url)


def test_bad_times():
    with pytest.raises(ValueError, match="connect_timeout is 0"):
        GenericClient("http://h", connect_timeout_s=0)


def test_headers_token_and_path(server):
    client = GenericClient(server.url + "/my/space", token="secret", headers={"X-Run": "7"})
    with client:
        client.reset()
    request = server.requests[-1]
    assert request.path == "/my/space/ws"
    assert (request.headers["Authorization"], request.headers["X-Run"]) == ("Bearer secret", "7")
    assert "secret" not in repr(client) + repr(client.link)


def test_a_server_that_is_starting_is_waited_for():
    with StubServer() as probe:
        port = int(probe.url.rsplit(":", 1)[1])
    started = []
    timer = threading.Timer(0.4, lambda: started.append(StubServer(port=port)))
    timer.start()
    try:
        with GenericClient(f"http://127.0.0.1:{port}", connect_timeout_s=10) as client:
            assert said(client.reset(seed=1)) == "begin 1"
    finally:
        timer.join()
        started[0].stop()


def test_no_server():
    with StubServer() as probe:
        url = probe.url
    with pytest.raises(ConnectFailed, match="no connection to ws://127"):
        GenericClient(url, connect_timeout_s=0.3).connect()


def test_a_refused_handshake_is_not_tried_again():
    def refuse(connection, request):
        tried.append(request)
        return connection.respond(401, "who are you?")

    tried: list = []
    with StubServer(process_request=refuse) as closed, pytest.raises(ConnectFailed, match="401"):
        GenericClient(closed.url, connect_timeout_s=5).connect()
    assert len(tried) == 1


# ---------------------------------------------------------------------- deltas and resumption
class DeltaEnv:
    """Says only what is new: messages and tokens."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self, **_):
        self.count = 1
        return self._reply(0)

    def step(self, action):
        before, self.count = self.count, self.count + len(action["message"])
        return self._reply(before)

    def _reply(self, keep: int):
        new = range(keep, self.count)
        observation = {
            "messages": [{"role": "user", "content": str(i)} for i in new],
            "tokens": list(new),
            "delta": {"messages": keep, "tokens": keep},
        }
        return {"observation": observation, "reward": 0.0, "done": False}

    def state(self):
        return {"step_count": self.count}


def test_deltas_are_put_together():
    with StubServer(env=DeltaEnv) as server, GenericClient(server.url, delta=True) as client:
        assert server.requests[-1].path == "/ws?delta=1"
        first = client.reset().observation
        assert first == {"messages": [{"role": "user", "content": "0"}], "tokens": [0]}
        # what a call that timed out has missed is there all the same
        with pytest.raises(RequestTimeout):
            client.step({"message": "sleep:0.1"}, timeout_s=0.02)
        observation = client.step({"message": "ab"}).observation
        assert observation["tokens"] == list(range(1 + len("sleep:0.1") + 2))
        assert len(observation["messages"]) == len(observation["tokens"])
        assert first["tokens"] == [0]
        assert client.reset().observation["tokens"] == [0]


def test_a_delta_to_nothing_ends_the_session():
    class Wrong(DeltaEnv):
        def step(self, action):
            return self._reply(99)

    with StubServer(env=Wrong) as server, GenericClient(server.url, delta=True) as client:
        client.reset()
        with pytest.raises(SessionLost, match="a delta keeps 99 of the messages, and 1 are here"):
            client.step({"message": "a"})


# ---------------------------------------------------------------------- the chat environment's client
def test_message_to_action():
    tokenizer = bpe_tokenizer()
    client = ChatEnv("http://localhost:8000")
    action = client.message_to_action({"role": "user", "content": "Hello!"}, tokenizer)
    assert isinstance(action, ChatAction)
    assert tokenizer.decode(action.tokens) == "<|im_start|>user\nHello!<|im_end|>\n"
    other = bpe_tokenizer(CHATML.replace("<|im_start|>{{", "{{"))
    assert tokenizer.decode(client.message_to_action({"role": "user", "content": "x"}, other).tokens).startswith(
        "user"
    )
    for message in ({"content": "x"}, {"role": "user"}, {"role": "user", "content": None}):
        with pytest.raises(MessageError):
            client.message_to_action(message, tokenizer)


def test_chat_actions_and_observations():
    class Echo:
        def reset(self, **_):
            self.seen = []
            return {"observation": {"messages": [], "tokens": []}, "reward": None, "done": False}

        def step(self, action):
            self.seen.append(action)
            observation = {"messages": [], "tokens": action["tokens"], "metadata": {"keys": sorted(action)}}
            return {"observation": observation, "reward": 2, "done": True}

        def state(self):
            return {"episode_id": None, "step_count": 1, "history_messages": [], "history_tokens": [[1]]}

    import torch

    with StubServer(env=Echo) as server, ChatEnv(server.url) as client:
        assert client.reset().observation == ChatObservation()
        for action in (
            ChatAction(tokens=[1, 2]),
            [1, 2],
            torch.tensor([[1, 2]]),
            {"tokens": [1, 2], "metadata": {}},
        ):
            result = client.step(action)
            assert result.observation.tokens == [1, 2]
            # stock servers refuse fields that they do not know
            assert result.observation.metadata == {"keys": ["metadata", "tokens"]}
            assert (result.reward, result.done) == (2, True)
        assert client.state().history_tokens == [[1]]
        with pytest.raises(ValueError, match="tokens"):
            client.step([])


# ---------------------------------------------------------------------- Docker
FAKE_DOCKER = """
    #!{python}
    import os, signal, subprocess, sys, pathlib
    home = pathlib.Path(os.environ["FAKE_DOCKER"])
    command, *rest = sys.argv[1:]
    with open(home / "calls", "a") as calls:
        calls.write(" ".join(sys.argv[1:]) + "\\n")
    if command == "run":
        if rest[-1] == "no-such-image":
            sys.exit("Unable to find image")
        script = "import sys; sys.path.insert(0, {tests!r}); from openenv_stub import StubServer; import time, pathlib\\n"
        if rest[-1] == "broken-image":
            script = "print('boom: no tokenizer')"
        else:
            script += "s = StubServer(); pathlib.Path(sys.argv[1]).write_text(s.url); time.sleep(60)"
        log = open(home / "log", "w")
        child = subprocess.Popen([sys.executable, "-c", script, str(home / "url")], stdout=log, stderr=log)
        (home / "pid").write_text(str(child.pid))
        print("warning: something\\nc0ffee")
    elif command == "port":
        import time
        for _ in range(100):
            if (home / "url").exists():
                break
            time.sleep(0.05 if not (home / "log").read_text() else 0.001)
        url = (home / "url").read_text() if (home / "url").exists() else "http://127.0.0.1:1"
        print(url.removeprefix("http://"))
    elif command == "inspect":
        state = pathlib.Path("/proc/" + (home / "pid").read_text() + "/stat")
        print("true" if state.exists() and state.read_text().split()[2] != "Z" else "false")
    elif command == "logs":
        print((home / "log").read_text())
    elif command == "rm":
        os.kill(int((home / "pid").read_text()), signal.SIGKILL)
"""


@pytest.fixture
def docker(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(textwrap.dedent(FAKE_DOCKER).lstrip().format(python=sys.executable, tests=str(TESTS)))
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_DOCKER", str(tmp_path))
    return tmp_path


def test_a_server_from_an_image(docker):
    with GenericClient.from_docker_image("parrot:1", env_vars={"A": "b"}, start_timeout_s=20) as client:
        assert said(client.reset(seed=2)) == "begin 2"
    calls = (docker / "calls").read_text().splitlines()
    assert calls[0] == "run -d -p 127.0.0.1::8000 -e A=b parrot:1"
    assert calls[-1] == "rm -f c0ffee"


def test_images_that_do_not_work(docker):
    with pytest.raises(ConnectFailed, match="Unable to find image"):
        GenericClient.from_docker_image("no-such-image")
    with pytest.raises(ConnectFailed, match=r"(?s)ended by itself.*boom: no tokenizer"):
        GenericClient.from_docker_image("broken-image", start_timeout_s=5)
    assert (docker / "calls").read_text().splitlines()[-1] == "rm -f c0ffee"


def test_no_docker(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConnectFailed, match="no command 'docker'"):
        GenericClient.from_docker_image("parrot:1")
