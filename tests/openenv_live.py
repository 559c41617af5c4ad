"""A server of ours over real sockets in a thread, and the frames of a client."""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from types import SimpleNamespace

import httpx
import websockets.sync.client
from conftest import bpe_tokenizer

from torchrl_chat import ChatTemplate
from torchrl_chat.cli import serve
from torchrl_chat.openenv.chat.environment import ChatEnvironment
from torchrl_chat.openenv.protocol import Limits
from torchrl_chat.openenv.server import create_app, make_server

TEMPLATE = ChatTemplate(bpe_tokenizer())


@contextlib.contextmanager
def live(env=None, **settings):
    """A server in a thread of this process."""
    settings.setdefault("limits", Limits(max_sessions=100))
    app = create_app(env or (lambda: ChatEnvironment(TEMPLATE)), **settings)
    server = make_server(app, port=0, grace_seconds=3)
    ready = threading.Event()
    place = {}
    server.on_start = lambda host, port: (place.update(port=port), ready.set())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(120)
    address = f"127.0.0.1:{place['port']}"
    try:
        yield SimpleNamespace(
            app=app,
            address=address,
            url=f"http://{address}",
            sessions=app.state.sessions,
            metrics=app.state.metrics,
            server=server,
            http=httpx.Client(
                base_url=f"http://{address}", headers={"Content-Type": "application/json"}, timeout=120
            ),
        )
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


def connect(server, query="", path="/ws", **options):
    return websockets.sync.client.connect(f"ws://{server.address}{path}{query}", max_size=2**28, **options)


def ask(ws, kind, data=None, **more):
    frame = {"type": kind, **({} if data is None else {"data": data}), **more}
    ws.send(json.dumps(frame))
    return json.loads(ws.recv(timeout=120))


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def arguments(*given):
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", *given])
