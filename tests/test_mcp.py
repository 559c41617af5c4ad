"""The tools of a real MCP server, over stdio and over streamable HTTP."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("mcp.server.mcpserver", reason="needs the package mcp, version 2")

from torchrl_chat.tools import MCPTools, Toolbox
from torchrl_chat.tools.mcp import _text_of

SERVER = str(Path(__file__).parent / "mcp_server.py")
STDIO = [sys.executable, SERVER, "stdio"]
RENEWED = "[The connection to the tool server was renewed since the last call in this conversation:"


def call(name, **arguments):
    return [{"id": "call00000", "type": "function", "function": {"name": name, "arguments": arguments}}]


class HttpServer:
    """The server in a process of its own, on a port that it keeps when it is started again."""

    def __init__(self, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self.flags = flags
        self.start()

    def start(self):
        command = [sys.executable, SERVER, "http", str(self.port), *self.flags]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("the server did not start")

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def http():
    server = HttpServer()
    yield server
    server.stop()


@pytest.fixture
def serve():
    """Starts servers that are stopped at the end, however the test ends."""
    servers = []

    def serve(*flags):
        servers.append(HttpServer(*flags))
        return servers[-1]

    yield serve
    for server in servers:
        server.stop()


@pytest.fixture
def make():
    """A toolbox of an MCP server, closed at the end."""
    boxes = []

    def make(server, **options):
        boxes.append(Toolbox([MCPTools(server, **options)]))
        return boxes[-1]

    yield make
    for box in boxes:
        box.close()


@pytest.fixture(params=["stdio", "http"])
def server(request):
    return STDIO if request.param == "stdio" else request.getfixturevalue("http").url


def ask(toolbox, name, conversation=None, **arguments):
    return toolbox.run(call(name, **arguments), conversation)[0]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class TestBothTransports:
    def test_tools_calls_and_errors(self, server, make):
        toolbox = make(server, deadline=10.0)
        assert set(toolbox.tools) == {"add", "fail", "hang", "remember", "die", "picture", "whoami"}
        schema = toolbox.schemas[0]
        assert schema["function"]["description"] == "Add two numbers."
        assert set(schema["function"]["parameters"]["properties"]) == {"a", "b"}
        assert "context" not in str(toolbox.tools["remember"].schema)

        answer = ask(toolbox, "add", a=1, b="2")
        assert answer.message == {"role": "tool", "tool_call_id": "call00000", "name": "add", "content": "3"}
        failed = ask(toolbox, "fail", reason="no such row")
        assert failed.status.value == "error"
        assert failed.content.endswith("no such row")
        assert ask(toolbox, "picture").content == "a dot:\n[image, image/png, 3 bytes]\ndone"
        wrong = ask(toolbox, "add", a="one")
        assert wrong.status.value == "invalid_arguments"
        assert "'a' must be an integer, not the string \"one\"" in wrong.content
        assert "'b' is missing (integer)" in wrong.content

    @pytest.mark.by_day(2, place=1)
    def test_a_hanging_tool_delays_nobody(self, server, make):
        toolbox = make(server, deadline=2.0)
        ask(toolbox, "add", a=1, b=1)  # connected
        begun = time.monotonic()
        assert ask(toolbox, "hang").status.value == "timeout"
        alone, begun = time.monotonic() - begun, time.monotonic()
        results = toolbox.run_batch([call("hang")] + [call("add", a=i, b=0) for i in range(8)] + [call("hang")])
        assert (time.monotonic() - begun) / alone < 2
        assert [row[0].status.value for row in results] == ["timeout"] + ["ok"] * 8 + ["timeout"]
        assert [row[0].content for row in results[1:-1]] == [str(i) for i in range(8)]
        assert results[0][0].content.startswith("Error: hang did not finish within 2 s")
        assert ask(toolbox, "add", a=1, b=1).content == "2"

    def test_one_session_is_shared(self, server, make):
        toolbox = make(server)
        assert [ask(toolbox, "remember", n, note=n).content for n in "ab"] == ["a", "a,b"]

    @pytest.mark.by_day(2)
    def test_conversations_do_not_mix(self, server, make):
        count = 64 if isinstance(server, str) else 6  # a process each
        toolbox = make(server, per_conversation=True, deadline=60.0, connect_timeout=60.0)
        keys = [f"conversation {i}" for i in range(count)]
        for turn in range(3):
            rows = [
                call("remember", note=f"{i}.{turn}a") + call("remember", note=f"{i}.{turn}b") for i in range(count)
            ]
            results = toolbox.run_batch(rows, keys)
        for i, row in enumerate(results):
            kept = [f"{i}.{turn}{which}" for turn in range(3) for which in "ab"]
            assert [result.content for result in row] == [",".join(kept[:-1]), ",".join(kept)]
        toolbox.end(keys[0])
        assert ask(toolbox, "remember", keys[0], note="new").content == "new"
        assert ask(toolbox, "remember", keys[1], note="x").content.endswith("1.2b,x")

    def test_an_allow_list(self, server):
        with MCPTools(server, allow=["add"], prefix="math_") as tools:
            assert [tool.name for tool in tools.tools] == ["math_add"]
            toolbox = Toolbox([tools])
            assert ask(toolbox, "math_add", a=1, b=1).content == "2"
            assert ask(toolbox, "fail", reason="x").status.value == "unknown_tool"
        with (
            MCPTools(server, allow=["ad"]) as tools,
            pytest.raises(ValueError, match="allow names 'ad', but .* has: add,"),
        ):
            _ = tools.tools

    def test_pickles_and_works_from_many_threads(self, server, make):
        toolbox = pickle.loads(pickle.dumps(make(server)))
        wrong = []

        def use(n):
            for i in range(5):
                answer = ask(toolbox, "add", a=n, b=i)
                if answer.content != str(n + i):
                    wrong.append(answer)

        threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        toolbox.close()
        assert not wrong


class TestServersThatDie:
    def test_stdio(self, make, caplog):
        toolbox = make(STDIO, per_conversation=True, deadline=20.0)
        for key in "ab":
            assert ask(toolbox, "remember", key, note="1").content == "1"
        with caplog.at_level(logging.WARNING):
            died = ask(toolbox, "die", "a")
        assert died.status.value == "error"
        assert "ended during this call" in died.content
        assert "may have taken effect or not" in died.content
        assert "during a call of die" in caplog.text
        back = ask(toolbox, "remember", "a", note="2")
        assert back.content.startswith(RENEWED)
        assert back.content.endswith("]\n2")  # nothing of before
        assert ask(toolbox, "remember", "a", note="3").content == "2,3"  # said once
        assert ask(toolbox, "remember", "b", note="2").content == "1,2"  # another process

    def test_stdio_between_two_calls(self, make):
        toolbox = make(STDIO, deadline=20.0)
        pid = int(ask(toolbox, "whoami").content)
        os.kill(pid, 9)
        time.sleep(0.3)
        answer = ask(toolbox, "add", a=1, b=1)  # the server had not seen it: it is safe to send it to the new one
        assert answer.status.value == "ok"
        assert answer.content.startswith(RENEWED)
        assert answer.content.endswith("]\n2")

    def test_http(self, make, serve):
        server = serve()
        toolbox = make(server.url, per_conversation=True, deadline=1.5)
        keys = list("abcdefgh")
        rows = [call("remember", note="1")] * len(keys)
        assert {row[0].content for row in toolbox.run_batch(rows, keys)} == {"1"}
        assert "ended during this call" in ask(toolbox, "die", "a").content
        server.process.wait()
        down = ask(toolbox, "remember", "a", note="2")
        assert (down.status.value, down.content) == (
            "error",
            "Error: the tool server cannot be reached; nothing was run",
        )
        server.start()
        results = toolbox.run_batch(rows, keys)
        assert {row[0].status.value for row in results} == {"ok"}
        for row in results:
            assert row[0].content.startswith(RENEWED)
            assert row[0].content.endswith("]\n1")
        assert {row[0].content for row in toolbox.run_batch(rows, keys)} == {"1,1"}

    def test_http_that_comes_back_within_the_deadline(self, make, serve):
        server = serve()
        toolbox = make(server.url, deadline=60.0)
        assert ask(toolbox, "add", a=1, b=1).content == "2"
        server.stop()
        timer = threading.Timer(0.5, server.start)
        timer.start()
        answers = toolbox.run_batch([call("add", a=i, b=1) for i in range(4)])
        timer.join()
        assert [row[0].content.rpartition("\n")[2] for row in answers] == ["1", "2", "3", "4"]


class TestServers:
    def test_that_do_not_start(self, make):
        with MCPTools([*STDIO, "broken"]) as tools, pytest.raises(ConnectionError, match="no such database"):
            _ = tools.tools
        with MCPTools(["no-such-command"]) as tools, pytest.raises(ConnectionError, match="FileNotFoundError"):
            _ = tools.tools
        with (
            MCPTools([sys.executable, "-c", "import time; time.sleep(60)"], connect_timeout=0.5) as tools,
            pytest.raises(ConnectionError, match="did not answer within 0.5 s"),
        ):
            _ = tools.tools

    def test_without_sessions_cannot_keep_state(self, make, serve):
        server = serve("stateless")
        with (
            MCPTools(server.url, per_conversation=True) as tools,
            pytest.raises(ValueError, match="opens no session"),
        ):
            _ = tools.tools
        assert ask(make(server.url), "add", a=1, b=1).content == "2"

    def test_a_command_inherits_no_secrets(self, make, monkeypatch):
        monkeypatch.setenv("GREETING", "secret")
        assert ask(make(STDIO), "whoami").content.split()[1:] == []
        assert ask(make(STDIO, env={"GREETING": "hello"}), "whoami").content.split()[1:] == ["hello"]

    def test_close_ends_the_processes(self, make):
        toolbox = make(STDIO, per_conversation=True)
        pids = [int(ask(toolbox, "whoami", key).content) for key in "abc"]
        assert all(map(alive, pids))
        toolbox.end("a")
        assert [alive(pid) for pid in pids] == [False, True, True]
        toolbox.close()
        assert not any(map(alive, pids))
        assert int(ask(toolbox, "whoami", "a").content) not in pids  # used again, it starts anew

    @pytest.mark.by_day(2)
    def test_those_that_take_long_to_end_end_at_once(self, make):
        toolbox = make([*STDIO, "slow"], per_conversation=True, connect_timeout=60.0)
        rows = [call("add", a=1, b=1)] * 4
        assert {row[0].content for row in toolbox.run_batch(rows, list("abcd"))} == {"2"}
        begun = time.monotonic()
        toolbox.end("a")
        alone, begun = time.monotonic() - begun, time.monotonic()  # two seconds and a little
        toolbox.end(*"bcd")
        assert (time.monotonic() - begun) / alone < 2.5

    def test_no_more_than_max_sessions(self, make):
        toolbox = make(STDIO, per_conversation=True, max_sessions=2)
        pids = [int(ask(toolbox, "whoami", key).content) for key in "abc"]
        assert [alive(pid) for pid in pids] == [False, True, True]
        assert ask(toolbox, "remember", "a", note="x").content.startswith(RENEWED)

    def test_what_is_no_server(self):
        for server in ("python server.py", [], [1]):
            with pytest.raises(ValueError, match="expected a URL"):
                MCPTools(server)
        with pytest.raises(ValueError, match="allow is the string 'add'"):
            MCPTools(STDIO, allow="add")

    def test_a_missing_package_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "mcp", None)
        with pytest.raises(ImportError, match=r"torchrl_chat\[mcp\]"):
            MCPTools(STDIO)


def test_other_parts_are_described():
    from mcp.types import (
        AudioContent,
        BlobResourceContents,
        CallToolResult,
        EmbeddedResource,
        ResourceLink,
        TextContent,
        TextResourceContents,
    )

    parts = [
        TextContent(text="x"),
        AudioContent(data="AAAAAAAA", mime_type="audio/wav"),
        ResourceLink(uri="file:///a", name="a"),
        EmbeddedResource(resource=TextResourceContents(uri="file:///b", text="inside")),
        EmbeddedResource(resource=BlobResourceContents(uri="file:///c", blob="AAAA", mime_type="x/y")),
    ]
    assert _text_of(CallToolResult(content=parts)).split("\n") == [
        "x",
        "[audio, audio/wav, 6 bytes]",
        "[resource file:///a: a]",
        "[resource file:///b]",
        "inside",
        "[resource file:///c, x/y, 3 bytes]",
    ]
    assert _text_of(CallToolResult(content=[], structured_content={"a": 1})) == '{"a": 1}'


def test_calls_that_wait_for_a_dead_server_fail_together(make, tmp_path):
    gone = tmp_path / "gone"
    script = f"import os, sys, time\nif os.path.exists({str(gone)!r}): time.sleep(60)\n"
    script += f"os.execv(sys.executable, [sys.executable, {SERVER!r}, 'stdio'])"
    toolbox = make([sys.executable, "-c", script], connect_timeout=20.0)
    assert ask(toolbox, "add", a=1, b=1).content == "2"
    [home] = {tool.home for tool in toolbox.tools.values()}
    home.connect_timeout = 1.0
    home.close()
    gone.touch()  # from now on it hangs before it speaks
    begun = time.monotonic()
    toolbox.run_batch([call("add", a=1, b=1)], [0])
    alone, begun = time.monotonic() - begun, time.monotonic()  # for connecting and ending it
    answers = toolbox.run_batch([call("add", a=1, b=1)] * 8, list(range(8)))
    assert (time.monotonic() - begun) / alone < 4
    assert {answer.content for [answer] in answers} == {"Error: the tool server cannot be reached; nothing was run"}
    gone.unlink()
    home.close()
    home.connect_timeout = 20.0
    assert ask(toolbox, "add", a=1, b=2).content == "3"
