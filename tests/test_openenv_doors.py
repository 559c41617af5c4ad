"""Who gets into a server and for how long: pages of other origins, bodies, sessions that nobody uses, slow connections."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import time

import pytest
import websockets
from openenv_live import TEMPLATE, ask, connect, live, wait_for

from torchrl_chat.access import Guard, names_loopback
from torchrl_chat.cli import play, serve
from torchrl_chat.openenv.chat.environment import ChatEnvironment
from torchrl_chat.openenv.protocol import Limits
from torchrl_chat.openenv.web import web_routes

pytestmark = pytest.mark.services

ELSEWHERE = ["https://bad.example", "http://localhost:1", "http://127.0.0.1", "null", "file://"]


def arguments(command, *words):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args([command.__name__.rsplit(".", 1)[1], *words])


@pytest.fixture(scope="module")
def plain():
    """A server as people make it: no word about origins."""
    with live(extra_routes=web_routes()) as running:
        yield running


# ---------------------------------------------------------------------- pages of other origins
@pytest.mark.parametrize("origin", ELSEWHERE)
def test_pages_of_other_origins_drive_nothing(plain, origin):
    headers = {"Origin": origin}
    for path in ("/reset", "/step", "/close", "/mcp", "/chat_env/tasks"):
        assert plain.http.post(path, json={}, headers=headers).status_code == 403, path
    assert plain.http.get("/state", headers=headers).status_code == 403
    for path in ("/ws", "/web/ws"):
        with pytest.raises(websockets.InvalidStatus) as refused:
            connect(plain, path=path, origin=origin)
        assert refused.value.response.status_code == 403
    assert len(plain.sessions) == 0


def test_its_own_page_and_clients_that_are_no_page_pass(plain):
    for origin in (f"http://{plain.address}", None):
        headers = {} if origin is None else {"Origin": origin}
        assert plain.http.post("/reset", json={}, headers=headers).status_code == 200
        for path in ("/ws", "/web/ws"):
            with connect(plain, path=path, origin=origin) as ws:
                assert ask(ws, "reset")["type"] == "observation"


@pytest.mark.parametrize("words", [(), ("--no-auth", "--host", "0.0.0.0"), ("--token", "secret")])
def test_serve_checks_origins_however_it_is_started(words):
    app = serve.make_app(arguments(serve, *words))
    assert app.state.guard._origins == set()
    assert play.make_app(arguments(play)).state.guard._origins == set()


def test_a_page_that_is_allowed_may_send_json_and_read_the_answer():
    good = "https://good.example"
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with live(allowed_origins=[good + "/"]) as server:
        asked = server.http.options("/reset", headers={"Origin": good, **asking})
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, good)
        answer = server.http.post("/reset", json={}, headers={"Origin": good})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, good)
        asked = server.http.options("/reset", headers={"Origin": "https://bad.example", **asking})
        assert "access-control-allow-origin" not in asked.headers
    with live(allowed_origins=["*"]) as server:
        assert server.http.post("/reset", json={}, headers={"Origin": "https://any.example"}).status_code == 200


def test_one_origin_as_a_text_is_refused():
    with pytest.raises(ValueError, match="expected a list of origins"):
        Guard(origins="https://good.example")


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *(
            (name, True)
            for name in ("localhost", "localhost:8000", "127.0.0.1:8000", "127.0.0.2", "[::1]:80", "LOCALHOST")
        ),
        *(
            (name, False)
            for name in ("evil.example", "localhost.evil.example:80", "", "[", "10.0.0.1", "127.0.0.1.evil")
        ),
    ],
)
def test_names_of_this_machine(host, own):
    assert names_loopback(host) is own


def test_a_server_for_this_machine_is_reached_by_this_machines_name_only():
    with live(loopback=True) as server:
        for name, status in (("evil.example", 400), ("localhost", 200), (server.address, 200)):
            assert server.http.get("/health", headers={"Host": name}).status_code == status
            assert server.http.post("/reset", json={}, headers={"Host": name}).status_code == status
        with pytest.raises(websockets.InvalidStatus) as refused:
            connect(server, additional_headers={"Host": "evil.example"})
        assert refused.value.response.status_code == 400


# ---------------------------------------------------------------------- bodies
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None, "json"]
)
def test_bodies_that_do_not_say_that_they_are_json_are_refused(plain, kind):
    for path in ("/reset", "/step", "/mcp", "/close"):
        request = plain.http.build_request("POST", path, content=b"{}")
        del request.headers["Content-Type"]
        if kind is not None:
            request.headers["Content-Type"] = kind
        answer = plain.http.send(request)
        assert answer.status_code == 415
        assert "application/json" in answer.json()["detail"]


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"]
)
def test_bodies_that_say_so_are_read(plain, kind):
    assert plain.http.post("/reset", content=b"{}", headers={"Content-Type": kind}).status_code == 200


def test_a_request_without_a_body_needs_no_type(plain):
    request = plain.http.build_request("POST", "/reset")
    del request.headers["Content-Type"]
    assert plain.http.send(request).status_code == 200


# ---------------------------------------------------------------------- sessions that nobody uses
def made(server, **headers):
    body = {"jsonrpc": "2.0", "id": 1, "method": "openenv/session/create"}
    return server.http.post("/mcp", json=body, headers=headers).json()


def test_sessions_that_nobody_attaches_to_end_and_the_others_stay():
    limits = Limits(max_sessions=12, max_sessions_per_address=12, attach_seconds=3.0)  # all are made in that time
    with live(limits=limits) as server, contextlib.ExitStack() as sockets:
        kept = server.http.post("/reset", json={"keep": True}).json()["observation"]["metadata"]["session_id"]
        taken = sockets.enter_context(connect(server, f"?session_id={made(server)['result']['session_id']}"))
        opened = sockets.enter_context(connect(server))
        for _ in range(9):
            assert "result" in made(server)
        assert "sessions" in made(server)["error"]["message"]
        assert wait_for(lambda: len(server.sessions) == 3)  # those that somebody came to
        assert server.metrics.total("sessions_closed_total", reason="idle") == 9
        for socket_ in (taken, opened):
            assert ask(socket_, "reset")["type"] == "observation"
        step = {"session_id": kept, "action": {"text": "hi"}}
        assert server.http.post("/step", json=step).status_code == 200
        assert "result" in made(server)


def test_no_address_takes_every_place():
    assert [Limits(max_sessions=n).sessions_of_one for n in (1, 2, 3, 4, 1024)] == [1, 2, 3, 3, 768]
    with live(limits=Limits(max_sessions=8)) as server:
        ids = []
        while "result" in (reply := made(server)):
            ids.append(reply["result"]["session_id"])
        assert len(ids) == 6
        assert "127.0.0.1 has 6 sessions" in reply["error"]["message"]
        # Another address, as a proxy on this machine tells it.
        other = {"X-Forwarded-For": "192.0.2.7"}
        assert "result" in made(server, **other)
        assert server.http.post("/reset", json={"keep": True}, headers=other).status_code == 200
        with connect(server) as full:
            assert json.loads(full.recv(timeout=20))["data"]["code"] == "CAPACITY_REACHED"
        body = {"jsonrpc": "2.0", "id": 1, "method": "openenv/session/close", "params": {"session_id": ids[0]}}
        server.http.post("/mcp", json=body)
        assert "result" in made(server)  # its place is free again


def test_places_are_counted_right_when_the_environment_cannot_be_made():
    broken = [True]

    def make():
        if broken[0]:
            raise RuntimeError("no GPU")
        return ChatEnvironment(TEMPLATE)

    with live(make, limits=Limits(max_sessions=4)) as server:
        for _ in range(9):
            assert "no GPU" in made(server)["error"]["message"]
            assert server.http.post("/reset", json={}).status_code == 500
        broken[0] = False
        assert [("result" in made(server)) for _ in range(4)] == [True, True, True, False]
        assert server.http.post("/reset", json={}).status_code == 503


# ---------------------------------------------------------------------- slow connections
HALVES = {
    "nothing": b"",
    "half a line": b"POST /re",
    "half the headers": b"POST /reset HTTP/1.1\r\nHost: localhost\r\nX: ",
    "half a body": b"POST /reset HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    "half a handshake": b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n",
}


@pytest.fixture(scope="module")
def hurried():
    with live(limits=Limits(request_seconds=1.0)) as running:
        yield running


@pytest.mark.parametrize("name", HALVES)
def test_half_a_request_ends(hurried, name):
    host, port = hurried.address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(HALVES[name])
        assert line.recv(1000) == b""


def test_half_a_second_request_ends_and_trickling_does_not_help(hurried):
    host, port = hurried.address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert line.recv(1000).startswith(b"HTTP/1.1 200")
        sent, gone = 0, False
        while not gone and sent < 300:  # a byte each tenth of a second: half a minute if nothing ended it
            try:
                line.sendall(b"G")
                sent += 1
                line.settimeout(0.1)
                gone = line.recv(100) == b""
            except TimeoutError:
                continue
            except OSError:
                gone = True
        assert gone
        assert sent < 300


def test_a_request_may_take_long_to_answer_and_a_socket_may_be_silent(hurried):
    with connect(hurried) as ws:
        time.sleep(1.5)  # longer than a request may take to arrive
        assert ask(ws, "reset")["type"] == "observation"
    assert hurried.http.get("/health").status_code == 200
