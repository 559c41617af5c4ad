"""The door of a session: whatever name, key or address a client asks with there, it reaches that session and nothing else."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import time

import httpx
import pytest
from agents import Recorder, templates_of

from torchrl_chat.gateway import Gateway
from torchrl_chat.gateway.doors import CONNECTIONS

ASK = {"model": "m", "messages": [{"role": "user", "content": "q"}]}
MESSAGES = {**ASK, "max_tokens": 9}


@pytest.fixture(scope="module")
def gateway():
    templates = templates_of()
    engine = Recorder(templates, lambda ask: "yes")
    options = {"template": {"chat_template": templates.plain.renderer.source}, "implicit": True}
    with Gateway(engine, templates.plain.tokenizer, **options) as gateway:
        yield gateway


@pytest.fixture
def two(gateway):
    """A session with a door, another session, and the door's address."""
    with (
        gateway.session() as session,
        gateway.session() as other,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        close = session.open_door(listener.dup())
        yield session, other, url
        close()


def turns(*sessions) -> list[int]:
    return [session.report["answers"] for session in sessions]


def test_any_key_is_the_sessions_own(gateway, two):
    """In each dialect, and wherever a client shows it; also none."""
    session, other, url = two
    asks = {"chat/completions": ASK, "responses": {"model": "m", "input": "q"}, "messages": MESSAGES}
    with httpx.Client() as client:
        for number, (path, key) in enumerate(itertools.product(asks, ["", "any", other.api_key, gateway.token])):
            headers = {"authorization": f"Bearer {key}", "x-api-key": key, "api-key": key} if key else {}
            reply = client.post(f"{url}/v1/{path}", json=asks[path], headers=headers)
            assert reply.status_code == 200, reply.text
            assert turns(session, other) == [number + 1, 0]
    assert httpx.get(url + "/v1/models").json()["data"][0]["id"] == "policy"
    assert httpx.post(url + "/v1/messages/count_tokens", json=ASK).json()["input_tokens"] > 0
    assert turns(session, other) == [12, 0]


def test_what_is_streamed_is_streamed(two):
    session, _, url = two
    with httpx.stream("POST", url + "/v1/chat/completions", json={**ASK, "stream": True}) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert turns(session) == [1]


def test_there_is_nothing_else(gateway, two):
    """Neither other sessions, nor what drivers ask, by whatever path and with whatever key."""
    session, other, url = two
    sessions = set(gateway.table.open)
    paths = [
        f"/s/{other.name}/v1/chat/completions",
        f"/s/{session.name}/v1/chat/completions",
        f"/v1/../s/{other.name}/v1/chat/completions",
        f"/v1/chat/completions/../../../{other.name}/v1/chat/completions",
        f"//s/{other.name}/v1/chat/completions",
        f"/%2e%2e/{other.name}/v1/chat/completions",
        "/s/new/v1/chat/completions",
        f"/s/{session.name}/finish",
        "/finish",
        "/v1/finish",
        "/sessions",
        "/v1/sessions",
        "/health",
        "/metrics",
        "/docs",
        "/",
        "",
        "/v1/models/..",
        "/v1/models/policy",
    ]
    where = ("127.0.0.1", int(url.rpartition(":")[2]))
    for key in (gateway.token, other.api_key, session.api_key):
        for method in ("POST", "GET", "PUT", "DELETE"):
            for path in paths:
                assert b" 404 " in said(where, f"{method} {path or '/'} HTTP/1.1", key, ASK), (method, path)
    for line in (
        f"POST {gateway.url}/s/{other.name}/v1/chat/completions HTTP/1.1",  # as a proxy is asked
        f"CONNECT 127.0.0.1:{gateway.port} HTTP/1.1",
        "POST * HTTP/1.1",
    ):
        assert b" 200 " not in said(where, line, gateway.token, ASK), line
    assert set(gateway.table.open) == sessions
    assert turns(session, other) == [0, 0]
    assert not session.session.finished


def said(where, line: str, key: str, body: dict, more: str = "") -> bytes:
    """The first line of what a server says to a request as it is written."""
    raw = json.dumps(body).encode()
    head = f"{line}\r\nhost: {where[0]}:{where[1]}\r\nauthorization: Bearer {key}\r\n{more}connection: close\r\n"
    with socket.create_connection(where, 20) as client:
        client.sendall(head.encode() + f"content-length: {len(raw)}\r\n\r\n".encode() + raw)
        reply = b""
        while part := client.recv(1 << 16):
            reply += part
    return reply.partition(b"\r\n")[0]


def test_the_prefix_of_a_request_belongs_to_no_client(two):
    """Headers that proxies are asked with change nothing, nor does a second request behind the first."""
    session, other, url = two
    where = ("127.0.0.1", int(url.rpartition(":")[2]))
    more = f"x-forwarded-prefix: /s/{other.name}\r\nx-original-url: /s/{other.name}/v1/chat/completions\r\n"
    assert b" 200 " in said(where, "POST /v1/chat/completions HTTP/1.1", other.api_key, ASK, more)
    assert turns(session, other) == [1, 0]
    raw = json.dumps(ASK).encode()
    one = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" + raw
    with socket.create_connection(where, 20) as client:
        client.sendall(one % (b"/v1/chat/completions", len(raw)))
        client.sendall(one % (f"/s/{other.name}/v1/chat/completions".encode(), len(raw)))
        reply = b""
        while reply.count(b"HTTP/1.1 ") < 2 and (part := client.recv(1 << 16)):
            reply += part
    assert re.findall(rb"HTTP/1.1 (\d+)", reply) == [b"200", b"404"]
    assert turns(session, other) == [2, 0]


def test_connections_have_an_end_and_a_door_too(gateway):
    """More than there may be are closed at once, and all of them when the door is."""
    with gateway.session() as session:
        listener = socket.create_server(("127.0.0.1", 0), backlog=300)
        where = listener.getsockname()
        close = session.open_door(listener)
        clients = [socket.create_connection(where) for _ in range(CONNECTIONS)]
        until = time.monotonic() + 20
        while len(next(iter(gateway._doors))._state.connections) < CONNECTIONS and time.monotonic() < until:
            time.sleep(0.01)
        with socket.create_connection(where) as late:
            late.settimeout(20)
            assert ended(late)
        close()
        close()
        for client in clients:
            client.settimeout(20)
            with client:
                assert ended(client)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(where)
    assert not gateway._doors


def ended(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_session_that_is_over_has_nothing_behind_its_door(two):
    session, _, url = two
    session.finish(reward=1.0)
    assert httpx.post(url + "/v1/chat/completions", json=ASK).status_code == 403


def test_a_gateway_that_closes_closes_its_doors():
    templates = templates_of()
    waiting = threading.Event()

    def script(ask):
        waiting.wait(20)
        return "late"

    gateway = Gateway(
        Recorder(templates, script),
        templates.plain.tokenizer,
        template={"chat_template": templates.plain.renderer.source},
    )
    with pytest.raises(RuntimeError, match="not running"), socket.create_server(("127.0.0.1", 0)) as listener:
        gateway.open_door(None, listener)
    with gateway:
        session = gateway.session()
        listener = socket.create_server(("127.0.0.1", 0))
        where = listener.getsockname()
        session.open_door(listener)
        with socket.create_connection(where) as client:
            client.settimeout(20)
            waiting.set()
            gateway.close()
            assert ended(client)
