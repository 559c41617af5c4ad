"""The server over real sockets: frames, sessions, limits, and that one client's trouble is nobody else's."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import websockets
import websockets.asyncio.client
import websockets.sync.client
from conftest import bpe_tokenizer
from openenv_live import HELLO, TEMPLATE, arguments, ask, connect, live, wait_for

from torchrl_chat.cli import serve
from torchrl_chat.openenv.chat.environment import ChatEnvironment
from torchrl_chat.openenv.chat.pool import EnvPool, TorchRLEnvironment
from torchrl_chat.openenv.models import Action, ChatAction, Observation, State
from torchrl_chat.openenv.protocol import Limits, dumps
from torchrl_chat.openenv.server import create_app

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def server():
    with live() as running:
        yield running


# ---------------------------------------------------------------------- frames
def test_frames_are_openenvs(server):
    with connect(server) as ws:
        reply = ask(ws, "reset", {"seed": 1, "episode_id": "e"})
        assert reply == {
            "type": "observation",
            "data": {"observation": {"messages": [], "tokens": [], "metadata": {}}, "reward": None, "done": False},
        }
        reply = ask(ws, "step", {"tokens": [5, 6, 7], "metadata": {}})
        assert reply.keys() == {"type", "data"}
        data = reply["data"]
        assert data["observation"]["tokens"][:3] == [5, 6, 7]
        assert data["observation"]["messages"][0]["role"] == "assistant"
        assert (data["reward"], data["done"]) == (0.0, False)
        assert data["metadata"] == data["observation"]["metadata"] == {"sampled": [0, 3]}
        state = ask(ws, "state")
        assert state["type"] == "state"
        assert (state["data"]["episode_id"], state["data"]["step_count"]) == ("e", 1)
        assert state["data"]["history_tokens"] == [data["observation"]["tokens"]]
        assert (
            ask(ws, "mcp", {"jsonrpc": "2.0", "method": "tools/list", "id": 1})["data"]["error"]["code"] == -32603
        )
        ws.send('{"type":"close"}')
        with pytest.raises(websockets.ConnectionClosedOK):
            ws.recv(timeout=10)


def test_a_whole_reply_is_the_environments_observation(server):
    env = ChatEnvironment(TEMPLATE)
    with connect(server) as ws:
        assert ask(ws, "reset", {"query": "hi"})["data"]["observation"]["tokens"] == env.reset(query="hi").tokens
        actions = [{"tokens": [5, 6]}, HELLO, HELLO, {"text": 'good 🙂 \u2028 "day"'}, {"tokens": [7]}, HELLO]
        for action in actions:
            data = ask(ws, "step", action)["data"]
            expected = env.step(ChatAction(**action))
            assert data["observation"]["messages"] == expected.messages
            assert data["observation"]["tokens"] == expected.tokens


def test_deltas_add_up_to_the_whole_and_their_size_stays(server):
    env = ChatEnvironment(TEMPLATE)
    env.reset(query="hi")
    messages, tokens, sizes = [], [], []
    with connect(server, "?delta=1") as ws:

        def take(reply):
            observation = json.loads(reply)["data"]["observation"]
            delta = observation["delta"]
            del messages[delta["messages"] :], tokens[delta["tokens"] :]
            messages.extend(observation["messages"])
            tokens.extend(observation["tokens"])
            sizes.append(len(reply))

        ws.send('{"type":"reset","data":{"query":"hi"}}')
        take(ws.recv())
        for turn in range(40):
            action = HELLO if turn % 2 else {"tokens": [20 + turn % 3] * 50}
            ws.send(json.dumps({"type": "step", "data": action}))
            take(ws.recv())
            expected = env.step(ChatAction(**action))
            assert (messages, tokens) == (expected.messages, expected.tokens)
            assert ask(ws, "step", {"tokens": [-1]})["data"]["code"] == "VALIDATION_ERROR"
    assert max(sizes[30:]) <= max(sizes[1:11]) + 16  # two counters have a digit more


def test_delta_may_be_asked_for_with_a_reset(server):
    with connect(server) as ws:
        assert "delta" in ask(ws, "reset", {"delta": True})["data"]["observation"]
        assert "delta" in ask(ws, "step", HELLO)["data"]["observation"]
        assert "delta" not in ask(ws, "reset", {"delta": False})["data"]["observation"]
        assert ask(ws, "reset", {"delta": "yes"})["data"]["code"] == "VALIDATION_ERROR"


def test_errors_leave_the_session_as_it_was(server):
    with connect(server) as ws:
        ask(ws, "reset", {"query": "hi"})
        before = ask(ws, "state")
        for frame, code in (
            ({"type": "step", "data": {"tokens": [10**6]}}, "EXECUTION_ERROR"),
            ({"type": "step", "data": {"tokens": []}}, "VALIDATION_ERROR"),
            ({"type": "step"}, "VALIDATION_ERROR"),
            ({"type": "jump"}, "UNKNOWN_TYPE"),
            ({"type": "state", "extra": 1}, "VALIDATION_ERROR"),
        ):
            ws.send(json.dumps(frame))
            assert json.loads(ws.recv())["data"]["code"] == code
        assert ask(ws, "state") == before


# ---------------------------------------------------------------------- HTTP
def test_http_reset_and_step_are_stateless_unless_a_session_is_kept(server):
    http, count = server.http, len(server.sessions)
    assert http.post("/reset").json()["observation"]["messages"] == []
    assert len(http.post("/step", json={"action": {"tokens": [5]}}).json()["observation"]["messages"]) == 1
    assert http.get("/state").json() == {"episode_id": None, "step_count": 0}
    assert len(server.sessions) == count
    kept = http.post("/reset", json={"keep": True, "episode_id": "mine"}).json()
    session = {"session_id": kept["metadata"]["session_id"]}
    for number in (1, 2):
        reply = http.post("/step", json={"action": {"tokens": [5]}, **session}).json()
        assert len(reply["observation"]["messages"]) == number
    assert http.get("/state", params=session).json()["step_count"] == 2
    assert http.post("/reset", json=session).json()["observation"]["messages"] == []
    assert http.post("/close", json=session).json() == {"closed": True}
    assert http.post("/step", json={"action": {"tokens": [5]}, **session}).status_code == 404
    assert len(server.sessions) == count


def test_documents(server):
    http = server.http
    assert http.get("/health").json() == {"status": "healthy"}
    assert http.get("/metadata").json()["name"] == "chat_env"
    schema = http.get("/schema").json()
    assert schema.keys() == {"action", "observation", "state"}
    assert "tokens" in schema["action"]["properties"]
    document = http.get("/openapi.json").json()
    assert document["info"]["version"] == "1.0.0"
    assert {"/reset", "/step", "/state", "/mcp"} <= document["paths"].keys()
    for page in ("/docs", "/redoc"):
        assert "Begin an episode" in http.get(page).text
    assert "torchrl_chat_openenv_sessions" in http.get("/metrics").text
    assert http.get("/list_environments").json() == ["chat_env"]
    assert http.get("/chat_env/splits").status_code == 501


def test_json_rpc_sessions(server):
    def call(method, **params):
        body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
        return server.http.post("/mcp", json=body).json()

    made = call("openenv/session/create")["result"]
    with connect(server, f"?session_id={made['session_id']}") as ws:
        assert ask(ws, "reset")["type"] == "observation"
    assert call("openenv/session/close", **made)["result"]["closed"] is True
    assert call("openenv/session/close", **made)["error"]["code"] == -32602
    assert call("nonsense")["error"]["code"] == -32601
    assert server.http.post("/mcp", content=b"{").json()["error"]["code"] == -32700


def test_the_task_api_serves_datasets():
    from torchrl_chat.envs import CountdownEnv

    def make(split):
        return CountdownEnv(
            size=5, seed=0, tokenizer=bpe_tokenizer(), input_mode="tokens", shuffle=False, split=split
        )

    pool = EnvPool(make, ("train", "test"), "countdown")
    with live(lambda: TorchRLEnvironment(pool), env_name="countdown") as server:
        http = server.http
        assert http.get("/countdown/splits").json() == [
            {"name": "train", "type": "train"},
            {"name": "test", "type": "test"},
        ]
        assert http.post("/countdown/num_tasks", json={"split": "test"}).json() == {"num_tasks": 5}
        task = http.post("/countdown/task", json={"split": "test", "index": 3}).json()["task"]
        found = http.post("/countdown/task_range", json={"split": "test", "start": 3, "stop": 4}).json()
        assert found == {"tasks": [task]}
        assert len(http.post("/countdown/tasks", json={"split": "test"}).json()["tasks"]) == 5
        assert http.post("/countdown/task", json={"split": "test", "index": 9}).status_code == 400
        assert http.post("/countdown/task", json={"split": "nope", "index": 0}).status_code == 400
        assert http.post("/countdown/task", json={"split": "test"}).status_code == 422
        assert http.post("/other/task", json={"split": "test", "index": 0}).status_code == 404
        with connect(server) as ws:
            observation = ask(ws, "reset", {"split": "test", "index": 3})["data"]["observation"]
            assert observation["messages"][-1]["content"] == task["query"]
            assert observation["metadata"]["task"] == {"split": "test", "index": 3}
            data = ask(ws, "step", {"text": "<answer>1</answer>"})["data"]
            assert (data["done"], data["reward"]) == (True, 0.0)
            assert ask(ws, "step", {"text": "more"})["data"]["code"] == "EXECUTION_ERROR"
            assert ask(ws, "reset", {"split": "nope"})["data"]["code"] == "EXECUTION_ERROR"


# ---------------------------------------------------------------------- other environments
class CountAction(Action):
    by: int = 1


class Counter:
    """An environment against OpenEnv's interface, that knows nothing of us."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        self.total = 0

    def reset(self, seed=None):
        self.total = seed or 0
        return Observation(metadata={"total": self.total})

    def step(self, action):
        if action.by == 13:
            raise RuntimeError("bad luck")
        self.total += action.by
        return Observation(reward=float("nan") if action.by == 0 else 1, metadata={"total": self.total})

    @property
    def state(self):
        return State(step_count=self.total, secret=object.__name__)


def test_any_environment_with_openenvs_methods_is_served():
    with live(Counter, action_cls=CountAction, observation_cls=Observation, state_cls=State) as server:
        with connect(server) as ws:
            reply = ask(ws, "reset", {"seed": 5, "unknown": 1})
            assert reply["data"]["observation"] == {"metadata": {"total": 5}}
            assert ask(ws, "step", {"by": 2})["data"]["metadata"] == {"total": 7}
            assert ask(ws, "step", {"by": 0})["data"]["reward"] is None  # NaN is no JSON
            assert ask(ws, "step", {"by": 13})["data"]["message"] == "RuntimeError: bad luck"
            assert ask(ws, "state")["data"] == {"episode_id": None, "step_count": 7, "secret": "object"}
        assert server.http.get("/metadata").json()["name"] == "chat_env"


def test_an_environment_for_one_session_only_is_not_served_to_many():
    class Single(Counter):
        SUPPORTS_CONCURRENT_SESSIONS = False

    with pytest.raises(ValueError, match="max_concurrent_envs=1"):
        create_app(Single, max_concurrent_envs=2)
    create_app(Single, max_concurrent_envs=1)


def test_a_factory_that_fails_is_told_to_the_client():
    def broken():
        raise OSError("no such tokenizer")

    with live(broken) as server:
        with connect(server) as ws:
            reply = json.loads(ws.recv(timeout=10))
            assert (reply["data"]["code"], reply["data"]["factory_name"]) == ("FACTORY_ERROR", "broken")
        assert server.http.post("/reset").status_code == 500
        assert server.http.get("/health").status_code == 200


# ---------------------------------------------------------------------- sessions
def test_capacity_is_told_and_given_back():
    with live(max_concurrent_envs=2) as server:
        with connect(server) as first, connect(server) as second:
            ask(first, "reset")
            ask(second, "reset")
            for _ in range(3):
                with connect(server) as third:
                    reply = json.loads(third.recv(timeout=10))
                    assert reply["data"]["code"] == "CAPACITY_REACHED"
                    assert (reply["data"]["active_sessions"], reply["data"]["max_sessions"]) == (2, 2)
                    with pytest.raises(websockets.ConnectionClosedOK):
                        third.recv(timeout=10)
            body = {"jsonrpc": "2.0", "id": 1, "method": "openenv/session/create"}
            assert server.http.post("/mcp", json=body).json()["error"]["code"] == -32000
            assert server.http.post("/reset").status_code == 503
            assert ask(first, "step", HELLO)["type"] == "observation"
        assert wait_for(lambda: len(server.sessions) == 0)
        with connect(server) as ws:
            assert ask(ws, "reset")["type"] == "observation"


def test_idle_sessions_are_really_closed():
    closed = []

    class Watched(ChatEnvironment):
        def close(self):
            closed.append(self)

    limits = Limits(max_sessions=2, idle_seconds=2.0)
    with live(lambda: Watched(TEMPLATE), limits=limits) as server:
        idle, busy = connect(server), connect(server)
        ask(idle, "reset")
        while not closed:
            assert ask(busy, "reset")["type"] == "observation"
            time.sleep(0.05)
        assert len(server.sessions) == len(closed) == 1
        reply = json.loads(idle.recv(timeout=5))  # told, then closed
        assert reply["data"]["code"] == "SESSION_ERROR"
        with pytest.raises(websockets.ConnectionClosed):
            ask(idle, "step", HELLO)
        with connect(server) as third:  # its place is free
            assert ask(third, "reset")["type"] == "observation"
        busy.close()
        assert wait_for(lambda: len(closed) == 3)


def hanging(seconds):
    """A chat environment whose second answer is graded for so long."""

    def rubric(action, observation):
        if len(observation.messages) > 1:
            time.sleep(seconds)
        return 1.0

    return lambda: ChatEnvironment(TEMPLATE, rubric=rubric)


def test_a_hung_step_keeps_no_idle_session():
    with live(hanging(8), limits=Limits(step_seconds=0.5, idle_seconds=1.0)) as server:
        sockets = [connect(server, ping_interval=None) for _ in range(4)]
        for ws in sockets:
            ask(ws, "reset")
        ask(sockets[0], "step", HELLO)
        reply = ask(sockets[0], "step", HELLO)
        assert "takes longer than 0.5 s" in reply["data"]["message"]
        assert server.app.state.sessions.workers.stuck == 1
        assert wait_for(lambda: len(server.sessions) == 0)
        assert server.app.state.sessions.workers.stuck == 1  # before the step has come to its end
        for ws in sockets:
            ws.close()


def test_hung_steps_of_some_cost_nobody_else_anything():
    with live(hanging(5), limits=Limits(step_seconds=0.5), workers=2) as server:
        for _ in range(6):  # three times as many as there are workers
            with connect(server) as ws:
                ask(ws, "reset")
                ask(ws, "step", HELLO)
                assert "takes longer" in ask(ws, "step", HELLO)["data"]["message"]
        with connect(server) as ws:
            assert ask(ws, "reset")["type"] == "observation"
            assert ask(ws, "step", HELLO)["type"] == "observation"
        assert "late_calls 6" in server.http.get("/metrics").text
        assert wait_for(lambda: server.app.state.sessions.workers.stuck == 0)


def test_a_session_over_http_is_kept_while_it_is_not_idle():
    """It has no socket to lose: what a lost socket is granted does not apply."""
    with live(limits=Limits(resume_seconds=0.2, idle_seconds=60)) as server:
        session = server.http.post("/reset", json={"keep": True}).json()["observation"]["metadata"]["session_id"]
        time.sleep(0.8)
        body = {"session_id": session, "action": HELLO}
        assert server.http.post("/step", json=body).status_code == 200


def test_the_time_limit_of_a_step():
    with live(hanging(1.5), limits=Limits(step_seconds=60)) as server:
        session = server.http.post("/reset", json={"keep": True}).json()["observation"]["metadata"]["session_id"]
        body = {"session_id": session, "action": HELLO, "timeout_s": 0.1}
        assert server.http.post("/step", json=body).status_code == 200
        refused = server.http.post("/step", json=body)
        assert "takes longer than 0.35 s" in refused.text


def test_a_lost_socket_is_resumed_with_the_conversation(server):
    with connect(server, "?resume=1&delta=1") as ws:
        session = ask(ws, "reset", {"query": "hi"})["data"]["metadata"]["session_id"]
        before = ask(ws, "step", {"tokens": [5, 6]})
        state = ask(ws, "state")
        ws.socket.close()  # no close frame
    with connect(server, f"?session_id={session}&delta=1") as ws:
        assert ask(ws, "state") == state
        observation = ask(ws, "step", HELLO)["data"]["observation"]
        assert observation["delta"] == {"messages": 0, "tokens": 0}  # the client may have lost the last reply
        size = before["data"]["observation"]["delta"]["tokens"] + len(before["data"]["observation"]["tokens"])
        assert observation["tokens"][:size] == sum(state["data"]["history_tokens"], [])  # noqa: RUF017
        with connect(server, f"?session_id={session}") as newer:  # the older socket may be half open
            assert ask(newer, "state")["data"]["step_count"] == 2
            with pytest.raises(websockets.ConnectionClosed) as gone:
                ws.recv(timeout=10)
            assert gone.value.rcvd.code == 4001
            assert ask(newer, "step", {"tokens": [7]})["type"] == "observation"
    server.http.post("/close", json={"session_id": session})
    with connect(server, f"?session_id={session}") as ws:
        assert json.loads(ws.recv(timeout=10))["data"]["code"] == "SESSION_ERROR"


def test_a_session_that_nobody_resumes_is_closed():
    limits = Limits(max_sessions=1, resume_seconds=0.3)
    with live(limits=limits) as server:
        with connect(server, "?resume=1") as ws:
            ask(ws, "reset")
        assert len(server.sessions) == 1
        assert wait_for(lambda: len(server.sessions) == 0)


def test_a_thousand_abrupt_disconnects_leak_no_session(caplog):
    async def slow(action, observation):
        await asyncio.sleep(0.01)
        return 0.0

    async def one(server, number, gate):
        async with gate:
            url = f"ws://{server.address}/ws"
            ws = await websockets.asyncio.client.connect(url, compression=None, ping_interval=None)
            if number % 5:  # at any point: after the handshake, before and after the first reply
                await ws.send(dumps({"type": "reset", "data": {}}).decode())
                if number % 2:
                    await ws.recv()
                await ws.send(dumps({"type": "step", "data": {"tokens": [5] * 20}}).decode())
                await asyncio.sleep(0.002 * (number % 3))
            ws.transport.abort()

    async def all_of_them(server):
        gate = asyncio.Semaphore(64)
        await asyncio.gather(*[one(server, number, gate) for number in range(1000)])

    rubrics = iter(range(10**6))
    with (
        caplog.at_level(logging.WARNING),
        live(
            lambda: ChatEnvironment(TEMPLATE, rubric=slow if next(rubrics) % 50 == 0 else None),
            limits=Limits(max_sessions=1000),
        ) as server,
    ):
        with connect(server) as witness:
            ask(witness, "reset")
            asyncio.run(all_of_them(server))
            assert wait_for(lambda: len(server.sessions) == 1, 20)
            assert ask(witness, "step", HELLO)["type"] == "observation"
        assert wait_for(lambda: len(server.sessions) == 0)
        assert server.metrics.total("sessions_opened_total") == server.metrics.total("sessions_closed_total")
        assert server.metrics.total("sessions_opened_total") > 900
    assert not [record for record in caplog.records if record.exc_info]


def test_a_slow_step_holds_up_nobody_else():
    go_on = threading.Event()

    def slow(action, observation):
        return float(go_on.wait(300))

    made = iter([slow, None])
    with live(lambda: ChatEnvironment(TEMPLATE, rubric=next(made))) as server, connect(server) as first:
        ask(first, "reset")
        with connect(server) as second:
            ask(second, "reset")
            first.send(json.dumps({"type": "step", "data": HELLO}))
            for _ in range(20):
                assert ask(second, "step", {"tokens": [5]})["type"] == "observation"
        go_on.set()
        assert json.loads(first.recv(timeout=120))["data"]["reward"] == 1.0


def test_a_step_that_takes_too_long_is_an_error_and_reset_mends_it():
    go_on = threading.Event()

    def slow(action, observation):
        return float(go_on.wait(300))

    limits = Limits(step_seconds=0.7)
    with live(lambda: ChatEnvironment(TEMPLATE, rubric=slow), limits=limits) as server, connect(server) as ws:
        ask(ws, "reset")
        assert "longer than" in ask(ws, "step", HELLO)["data"]["message"]
        assert "still running" in ask(ws, "reset")["data"]["message"]
        go_on.set()
        assert wait_for(lambda: server.app.state.sessions.workers.stuck == 0)
        assert "reset the session" in ask(ws, "step", HELLO)["data"]["message"]
        assert ask(ws, "reset")["type"] == "observation"
        assert ask(ws, "step", HELLO)["data"]["reward"] == 1.0


# ---------------------------------------------------------------------- who may use it
def test_a_token_is_required_of_everything_but_health():
    with live(token="secret") as server:
        right = {"Authorization": "Bearer secret"}
        assert server.http.get("/health").status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer"},
        ):
            for path in ("/metadata", "/metrics", "/state", "/docs"):
                assert server.http.get(path, headers=headers).status_code == 401
            assert server.http.post("/reset", headers=headers).status_code == 401
            with pytest.raises(websockets.InvalidStatus) as refused:
                connect(server, additional_headers=headers)
            assert refused.value.response.status_code == 401
        assert server.http.get("/metrics", headers=right).status_code == 200
        with connect(server, additional_headers=right) as ws:
            assert ask(ws, "reset")["type"] == "observation"


def test_foreign_web_pages_are_refused():
    with live(allowed_origins=["https://good.example"]) as server:
        for origin, status in (("https://bad.example", 403), ("null", 403), ("https://good.example", 200)):
            assert server.http.post("/reset", headers={"Origin": origin}).status_code == status
        with pytest.raises(websockets.InvalidStatus) as refused:
            connect(server, origin="https://bad.example")
        assert refused.value.response.status_code == 403
        for origin in ("https://good.example", f"http://{server.address}", None):
            with connect(server, origin=origin) as ws:
                assert ask(ws, "reset")["type"] == "observation"


def test_requests_are_limited_a_connection():
    with live(limits=Limits(requests_per_second=5)) as server:
        with connect(server) as ws, connect(server) as other:
            replies = [ask(ws, "reset") for _ in range(60)]
            codes = {reply["data"].get("code") for reply in replies}
            assert codes == {None, "RATE_LIMITED"}
            assert ask(other, "reset")["type"] == "observation"
            time.sleep(0.5)
            assert ask(ws, "reset")["type"] == "observation"
        statuses = {server.http.get("/health").status_code for _ in range(20)}
        assert statuses == {200, 429}


# ---------------------------------------------------------------------- the command


def test_a_port_that_others_reach_needs_a_token_or_a_word():
    with pytest.raises(ValueError, match="--token"):
        serve.make_app(arguments("--host", "0.0.0.0"))
    for given in (["--token", "x"], ["--no-auth"]):
        assert serve.make_app(arguments("--host", "0.0.0.0", *given))
    with pytest.raises(ValueError, match="no environment 'nope'"):
        serve.make_app(arguments("--env", "nope"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        serve.make_app(arguments("--env", "no_such_module:make"))


@pytest.mark.by_day(2)
def test_the_command_serves_until_sigterm_and_finishes_steps(tmp_path):
    (tmp_path / "slow_env.py").write_text(
        "import time\n"
        "from torchrl_chat.openenv.chat.environment import ChatEnvironment\n"
        "def rubric(action, observation):\n    time.sleep(1.0)\n    return 1.0\n"
        "def make(tokenizer):\n    return ChatEnvironment(tokenizer, rubric=rubric)\n"
    )
    main = "import sys; from openenv_live import arguments; a = arguments(*sys.argv[1:]); sys.exit(a.run(a))"
    path = os.pathsep.join([str(tmp_path), os.path.dirname(__file__)])
    process = subprocess.Popen(
        [sys.executable, "-c", main, "--env", "slow_env:make", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        line = json.loads(process.stderr.readline())
        assert line["event"] == "listening"
        server = SimpleNamespace(address=f"127.0.0.1:{line['port']}")
        with connect(server) as idle, connect(server) as ws:
            ask(idle, "reset")
            ask(ws, "reset")
            ws.send(json.dumps({"type": "step", "data": {"text": "hello"}}))
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            for socket in (idle, ws):
                if socket is ws:
                    assert json.loads(ws.recv(timeout=10))["data"]["reward"] == 1.0
                with pytest.raises(websockets.ConnectionClosed) as gone:
                    socket.recv(timeout=10)
                assert gone.value.rcvd.code == 1001
        rest = process.stderr.read()
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert "Traceback" not in rest
        assert all(json.loads(entry)["event"] for entry in rest.splitlines())
    finally:
        process.kill()
        process.wait()
