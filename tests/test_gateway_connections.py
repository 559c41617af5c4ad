"""Connections of the gateway: requests in pieces, one behind the other, half of them, and headers without an end."""

from __future__ import annotations

import json
import socket

import pytest
from agents import Recorder, templates_of

from torchrl_chat.gateway import Gateway
from torchrl_chat.openenv.protocol import ServerLimits


def gateway_of(seconds):
    templates = templates_of()
    return Gateway(
        Recorder(templates, lambda ask: f"answer to {ask.messages[-1]['content']}"),
        templates.plain.tokenizer,
        template={"chat_template": templates.plain.renderer.source},
        server=ServerLimits(request_seconds=seconds),
    )


@pytest.fixture(scope="module")
def hurried():
    with gateway_of(1.0) as gateway:
        yield gateway


@pytest.fixture
def line(hurried):
    with socket.create_connection((hurried.host, hurried.port), timeout=30) as line:
        yield line


def head_of(session, *more):
    lines = [
        f"POST /s/{session.name}/v1/chat/completions HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {session.api_key}",
    ]
    return "\r\n".join([*lines, *more]).encode() + b"\r\n\r\n"


def body_of(text):
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()


def answers(line, count):
    """What so many answers say, each with a length."""
    held, found = b"", []
    while len(found) < count:
        more = line.recv(65536)
        assert more, held
        held += more
        while b"\r\n\r\n" in held:
            head, _, rest = held.partition(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split()[0])
            if len(rest) < length:
                break
            assert b" 200 " in head.split(b"\r\n")[0], held
            found.append(json.loads(rest[:length])["choices"][0]["message"]["content"])
            held = rest[length:]
    assert not held
    return found


HALVES = {
    "nothing": b"",
    "blank lines": b"\r\n\r\n",
    "half a line": b"POST /s",
    "half the headers": b"POST /s/x/v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX: ",
    "half a body": b"POST /s/x/v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
}


@pytest.mark.parametrize("name", HALVES)
def test_half_a_request_ends(line, name):
    line.sendall(HALVES[name])
    told = line.recv(1000)
    assert told == b"" or (name == "blank lines" and told.startswith(b"HTTP/1.1 400"))  # h11 says why


def test_blank_lines_behind_an_answer_keep_no_connection(hurried, line):
    session, body = hurried.session(), body_of("hi")
    line.sendall(head_of(session, f"Content-Length: {len(body)}") + body)
    assert answers(line, 1) == ["answer to hi"]
    line.sendall(b"\r\n")
    told = line.recv(1000)
    assert told == b"" or told.startswith(b"HTTP/1.1 400")  # h11, without httptools, says why


@pytest.mark.parametrize("where", ["one header", "many headers", "trailer"])
def test_headers_without_an_end_are_refused(hurried, line, where):
    session = hurried.session()
    piece = {
        "one header": b"x" * 1000,
        "many headers": b"x" * 990 + b"\r\nX: ",
        "trailer": b"x" * 990 + b"\r\nX: ",
    }[where]
    begin = head_of(session, "Transfer-Encoding: chunked") + b"1\r\n{\r\n0\r\nX: "
    line.sendall(begin if where == "trailer" else head_of(session)[:-2] + b"X: ")
    sent, told = 0, b""
    try:
        while sent < 2**20:
            line.sendall(piece)
            sent += len(piece)
        told = line.recv(1000)
    except OSError:
        told = told or b"HTTP/1.1 400 (the connection was closed)"
    assert sent < 2**20 or told.startswith(b"HTTP/1.1 400")


def test_requests_one_behind_the_other_and_in_pieces(hurried, line):
    session = hurried.session()
    bodies = [body_of(text) for text in ("a", "b", "c é")]
    raw = b"".join(head_of(session, f"Content-Length: {len(body)}") + body for body in bodies[:2])
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, bodies[2][i : i + 1]) for i in range(len(bodies[2]))) + b"0\r\n\r\n"
    raw += head_of(session, "Transfer-Encoding: chunked") + chunks
    for at in range(0, len(raw), 37):
        line.sendall(raw[at : at + 37])
    assert answers(line, 3) == ["answer to a", "answer to b", "answer to c é"]


def test_a_large_body_of_small_chunks_is_taken():
    with gateway_of(60.0) as gateway, socket.create_connection((gateway.host, gateway.port), timeout=60) as line:
        session, body = gateway.session(), body_of("x" * 200_000)
        chunks = b"".join(b"8\r\n%b\r\n" % body[at : at + 8] for at in range(0, len(body) - len(body) % 8, 8))
        rest = body[len(body) - len(body) % 8 :]
        chunks += b"%x\r\n%b\r\n" % (len(rest), rest) if rest else b""
        line.sendall(head_of(session, "Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n")
        assert answers(line, 1) == ["answer to " + "x" * 200_000]


def test_a_client_that_waits_for_100_and_one_that_offers_h2c(hurried, line):
    session, body = hurried.session(), body_of("hi")
    line.sendall(head_of(session, f"Content-Length: {len(body)}", "Expect: 100-continue"))
    assert line.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    line.sendall(body)
    assert answers(line, 1) == ["answer to hi"]
    offer = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"]
    line.sendall(head_of(session, f"Content-Length: {len(body)}", *offer) + body)
    assert answers(line, 1) == ["answer to hi"]
