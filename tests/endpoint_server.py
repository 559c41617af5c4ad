"""An OpenAI-compatible endpoint that answers as a test's script says, over real HTTP."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return json.dumps(whole).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            number = len(self.server.requests)
            self.server.flying += 1
            self.server.most = max(self.server.most, self.server.flying)
        try:
            reply = self.server.script(body, number)
        finally:
            with self.server.lock:
                self.server.flying -= 1
        if isinstance(reply, Iterator):
            return self.stream(reply)
        status, payload = reply if isinstance(reply, tuple) else (200, completion(reply))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def stream(self, events: Iterator[Any]) -> None:
        """Server-sent events, one a value, in chunks that are cut in the middle of a line."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in events:
                raw = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
                for part in (raw[:9], raw[9:]):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # whoever asked has left
            with self.server.lock:
                self.server.left += 1
        self.close_connection = True

    def log_message(self, *_):
        """Quiet."""


@contextlib.contextmanager
def serving() -> Iterator[Any]:
    """An endpoint that answers as ``script(body, number of the request)`` says."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.lock = True, threading.Lock()
    server.requests, server.flying, server.most = [], 0, 0
    server.left = 0
    server.script = lambda body, number: f"You said {body['messages'][-1]['content']!r}."
    server.handle_error = lambda *_: None  # clients that hang up are part of the tests
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
