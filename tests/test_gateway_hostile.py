"""Clients that hang up, agents that are killed, engines that die: nobody else's session is touched, and nothing is left over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from agents import Recorder, check_law, client_of, templates_of
from conftest import of_the_day

from torchrl_chat.gateway import Gateway, RemoteEngine, Settings
from torchrl_chat.tiny import tiny_tokenizer

PATHS = ("/chat/completions", "/responses", "/messages")


def gateway_of(script, **more) -> Gateway:
    templates = templates_of()
    return Gateway(
        Recorder(templates, script),
        templates.plain.tokenizer,
        template={"chat_template": templates.plain.renderer.source},
        settings=Settings(patience=0.02),
        **more,
    )


async def slow(ask):
    await asyncio.sleep(0.02)
    return f"answer to {ask.messages[-1]['content']}"


def settled(gateway) -> bool:
    """Whether nothing is on its way any more."""
    waited = time.monotonic()
    while time.monotonic() - waited < 30:
        if not gateway.run(lambda: any(session.flying for session in gateway.table.open.values())):
            return True
        time.sleep(0.02)
    return False


def body_of(path: str, messages: list[dict], stream: bool) -> dict:
    """A request of the dialect of a path."""
    whole = {"model": "m", "input" if path == "/responses" else "messages": messages, "stream": stream}
    return {**whole, "max_tokens": 100} if path == "/messages" else whole


async def hang_up(gateway, session, number: int, draw: random.Random, path: str = PATHS[0]) -> None:
    """Send a request, or the beginning of one, and break the connection at some point."""
    reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
    message = {"role": "user", "content": f"question {number}"}
    body = json.dumps(body_of(path, [message], number % 4 > 0)).encode()
    head = (
        f"POST /s/{session.name}/v1{path} HTTP/1.1\r\nhost: localhost\r\n"
        f"authorization: Bearer {session.api_key}\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    raw = head + body
    writer.write(raw if draw.random() < 0.8 else raw[: draw.randrange(1, len(raw))])
    await writer.drain()
    if draw.random() < 0.6:
        try:
            await asyncio.wait_for(reader.read(draw.randrange(1, 400)), draw.choice([0.005, 0.03, 0.1]))
        except TimeoutError:
            pass
    if draw.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.full)])
@pytest.mark.parametrize("path", of_the_day(*PATHS))
def test_clients_that_hang_up_leave_nothing_behind(path, count):
    draw = random.Random(0)
    with gateway_of(slow) as gateway:
        session, other = gateway.session(), gateway.session()
        client = client_of(other)
        messages: list = [{"role": "user", "content": "hi"}]
        tasks = gateway.run(lambda: len(asyncio.all_tasks()))
        for start in range(0, count, 20):

            async def some(start=start):
                await asyncio.gather(*(hang_up(gateway, session, start + i, draw, path) for i in range(20)))

            asyncio.run(some())
            message = client.chat.completions.create(model="m", messages=messages).choices[0].message
            messages += [message, {"role": "user", "content": f"go on {start}"}]
        assert settled(gateway)
        waited = time.monotonic()
        while gateway.run(lambda: len(asyncio.all_tasks())) > tasks + 2 and time.monotonic() - waited < 30:
            time.sleep(0.02)  # a connection takes a moment to be seen as closed; the client's own stays open
        assert gateway.run(lambda: len(asyncio.all_tasks())) <= tasks + 2
        assert other.report["sequences"] == 1
        assert other.report["answers"] == count // 20
        report = session.report
        assert report["sequences"] == report["answers"] - report["undelivered"]
        exchanges = gateway.run(lambda: list(session.session._exchanges.values()))
        assert all(exchange.done and not exchange.waiting for exchange in exchanges)
        first = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "still there?"}])
        assert first.choices[0].message.content == "answer to still there?"


def test_what_was_cut_off_is_answered_again_and_trained_once():
    """Each of many clients hangs up in the middle of its stream, and asks once more."""
    with gateway_of(slow) as gateway:
        session = gateway.session(settings=Settings(patience=5.0))

        async def lose_all() -> None:
            for number in range(1, 12):
                if number % 4:
                    await hang_up(gateway, session, number, random.Random(number))

        asyncio.run(lose_all())
        client = client_of(session)
        for number in range(1, 12):
            ask = [{"role": "user", "content": f"question {number}"}]
            reply = client.chat.completions.create(model="m", messages=ask)
            assert reply.choices[0].message.content == f"answer to question {number}"
        assert settled(gateway)
        undelivered = session.report["undelivered"]
        assert check_law(session.session, lost=undelivered) == session.report["answers"] - undelivered


def test_an_engine_that_dies_is_told_to_its_agents_alone():
    dead = [False]

    def script(ask):
        return RuntimeError("the process is gone") if dead[0] and "b" in str(ask.messages) else "fine"

    with gateway_of(script) as gateway:
        sessions = {name: gateway.session() for name in "ab"}
        clients = {name: client_of(each, max_retries=0) for name, each in sessions.items()}
        for name, client in clients.items():
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": name}])
        dead[0] = True
        with pytest.raises(Exception, match="the process is gone"):
            clients["b"].chat.completions.create(model="m", messages=[{"role": "user", "content": "b again"}])
        clients["a"].chat.completions.create(model="m", messages=[{"role": "user", "content": "a again"}])
        assert sessions["a"].report["counts"].get("engine errors") is None
        assert sessions["b"].report["answers"] == 1


# It answers three requests, and keeps all others waiting; with "well" it answers all.
ENGINE = """
import itertools, json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
numbers = itertools.count(1)
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *words): pass
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["token_ids"]
        if sys.argv[2] != "well" and next(numbers) > 3:
            os.write(1, b"waits\\n")  # one write: two that wait at once would mix their lines
            time.sleep(600)
        content = [{"token_id": i, "logprob": -0.25} for i in (asked[-1], 2)]
        choice = {"index": 0, "token_ids": [asked[-1], 2], "finish_reason": "stop", "logprobs": {"content": content}}
        body = json.dumps({"request_id": "x", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def engine_process(port: int, how: str):
    command = [sys.executable, "-S", "-c", ENGINE, str(port), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def asked(session, path: str, messages: list[dict], stream: bool) -> httpx.Response:
    body = body_of(path, messages, stream)
    return httpx.post(session.base_url + path, json=body, headers={"x-api-key": session.api_key}, timeout=60)


def test_an_engine_that_is_killed_is_an_error_of_each_dialect_and_its_sessions_go_on():
    """Killed while it samples for all of them, streams and whole answers; another one at its address goes on with the same ledgers."""
    with ThreadPoolExecutor(6) as pool, engine_process(0, "ill") as (process, port):
        engine = RemoteEngine("m", f"http://127.0.0.1:{port}/v1", "k", stop_ids={2}, retries=0)
        with Gateway(engine, tiny_tokenizer()) as gateway:
            sessions = {path: gateway.session() for path in PATHS}
            begins = [{"role": "user", "content": "last(1)="}]
            first = {path: asked(each, path, begins, False).json() for path, each in sessions.items()}
            others = [{"role": "user", "content": "last(2)="}]
            waiting = {
                (path, stream): pool.submit(asked, each, path, others, stream)
                for path, each in sessions.items()
                for stream in (False, True)
            }
            for _ in waiting:
                assert process.stdout.readline() == "waits\n"
            process.kill()
            for (path, stream), future in waiting.items():
                told = future.result(60)
                # What is a stream has begun by then, and ends with an event.
                assert told.status_code == (200 if stream else 500)
                events = [json.loads(line[6:]) for line in told.text.splitlines() if line.startswith("data: {")]
                error = (events[-1] if stream else told.json())["error"]
                assert "the engine failed" in error["message"]
                assert error["type"] == ("api_error" if path == "/messages" else "server_error")
            with engine_process(port, "well"):
                for path, session in sessions.items():
                    answer = answered(path, first[path])
                    reply = asked(session, path, [*begins, *answer, {"role": "user", "content": "2"}], False)
                    assert reply.status_code == 200, reply.text
                    report = session.report
                    assert (report["answers"], report["sequences"], report["counts"]["begins"]) == (2, 1, 1)
                    [branch] = session.transcript.sequences
                    assert branch.mask.sum() == 4


def answered(path: str, reply: dict) -> list[dict]:
    """An answer, as the next request of its dialect has it."""
    if path == "/responses":
        return reply["output"]
    if path == "/messages":
        return [{"role": "assistant", "content": reply["content"]}]
    return [reply["choices"][0]["message"]]


def test_a_gateway_that_closes_ends_what_is_on_its_way():
    async def never(ask):
        await asyncio.sleep(600)

    gateway = gateway_of(never)
    gateway.start()
    session = gateway.session()
    client = client_of(session, max_retries=0)
    failed: list = []

    def agent() -> None:
        try:
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=agent)
    thread.start()
    waited = time.monotonic()
    while not gateway.run(lambda: session.session.flying) and time.monotonic() - waited < 20:
        time.sleep(0.01)
    gateway.close()
    thread.join(20)
    assert failed
    assert not thread.is_alive()
    assert session.session.failure == "the gateway was closed"
    gateway.close()  # once more changes nothing
