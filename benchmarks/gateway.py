"""The gateway beside OpenEnv's capture server, on the same stub engine: calls per second, CPU, memory, the first streamed token.

    python benchmarks/gateway.py [--quick] [--json] [--openenv PYTHON] [--stack] [--profile FILE]

Sessions (16 and 64) play 20 turns each: the agent sends its whole history and 20 words more, and gets 100 sampled tokens. All
sessions are at the same turn at the same time, so a turn has a rate and a CPU time of its own. The engine is a process that answers at
once from a few prepared answers: as vLLM's ``/inference/v1/generate`` for ours, and as its chat completions with
``return_token_ids`` for OpenEnv's ``CaptureServer`` app (``openenv`` 0.10, in the Python that ``--openenv`` names; default: the one that
``make peers`` makes), with prompts that extend each other, its best case.

Each server is a process of its own. Both run at the same time, and are asked in turns: a turn of all sessions of the one, the same turn of
all sessions of the other, so that whatever else the machine does is shared. So that processes do not push each other from core to core, the
servers have one core then, and the client and the engine another, where there are two; neither server has work for a second one.

The client is the same for both. What an agent itself does, writing a request and reading an answer, it does between the turns: the clock
runs from the first byte of a turn's first request to the last byte of its last answer. The client's CPU and the engine's are told apart from the
server's, which is that of all threads of its process; ours does the tokenizing, too, which with OpenEnv the engine does.

There are as many calls of each number of sessions: four rounds of 16 for one of 64, and eight of those. Rates and CPU are medians of the
rounds; of a turn's CPU, the least of the rounds, as other processes only add to it. "flat" is that at turns 19 and 20, divided by turns 2
and 3; a turn of 16 sessions takes milliseconds, hence so many rounds. Memory is what the server's process has grown by in the first round,
after a warm run, divided by the sessions. The first streamed token is that of one session alone, the least of the turns of eight in each
round, less what the engine takes when it is asked directly.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKENS, TURNS, WORDS, ANSWERS = 100, 20, 4000, 37

STUB = """
import asyncio, sys
import orjson
port, tokens, answers, first, end = map(int, sys.argv[1:])
def said(k):
    return [(7 * k + 31 * i) % 3000 for i in range(tokens - 1)]
def logprobs(ids):
    return {"content": [{"token": f"token_id:{i}", "logprob": -0.5, "bytes": None, "top_logprobs": []} for i in ids]}
GENERATED, CHAT = [], []
for k in range(answers):
    ids = [first + w for w in said(k)] + [end]
    text = " ".join(f"w{w}" for w in said(k))
    choice = {"index": 0, "token_ids": ids, "logprobs": logprobs(ids), "finish_reason": "stop"}
    GENERATED.append(orjson.dumps({"request_id": "r", "choices": [choice]}))
    message = {"role": "assistant", "content": text}
    CHAT.append(orjson.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{**choice, "message": message}], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}})[:-1])
KNOWN = {}
def prompt(messages):
    found = []
    for m in messages:
        ids = KNOWN.get((m["role"], m["content"]))
        if ids is None:
            body = [first + int(w[1:]) for w in m["content"].split()]
            ids = KNOWN[m["role"], m["content"]] = ([end] if m["role"] != "assistant" else []) + body + [end]
        found += ids
    return found
count = 0
def reply(path, body):
    global count
    count += 1
    if path.endswith("/generate"):
        return GENERATED[count % answers]
    if path.endswith("/completions"):
        ids = prompt(orjson.loads(body)["messages"])
        return CHAT[count % answers] + b',"prompt_token_ids":' + orjson.dumps(ids) + b"}"
    return b'{"object":"list","data":[{"id":"m","object":"model"}]}'
class Server(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.held = transport, b""
    def data_received(self, data):
        self.held += data
        while b"\\r\\n\\r\\n" in self.held:
            head, rest = self.held.split(b"\\r\\n\\r\\n", 1)
            lines = head.split(b"\\r\\n")
            length = next((int(l.split(b":")[1]) for l in lines if l.lower().startswith(b"content-length")), 0)
            if len(rest) < length:
                return
            self.held, body = rest[length:], rest[:length]
            out = reply(lines[0].split()[1].decode(), body)
            self.transport.write(b"HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(out) + out)
async def main():
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", port)
    await server.serve_forever()
try:
    import uvloop
    uvloop.run(main())
except ImportError:
    asyncio.run(main())
"""

OURS = """
import cProfile, gc, os, signal, sys, time
from transformers import AutoTokenizer
from torchrl_chat.gateway import Gateway, RemoteEngine
from torchrl_chat.openenv.protocol import ServerLimits
folder, port, stub, profile = sys.argv[1:5]
engine = RemoteEngine("m", f"http://127.0.0.1:{stub}/v1", "none", max_new_tokens=256)
gateway = Gateway(engine, AutoTokenizer.from_pretrained(folder), port=int(port), token="driver", server=ServerLimits(max_sessions=1000))
if profile:
    kept = cProfile.Profile()
    gateway.start()
    gateway.run(kept.enable)
    signal.signal(signal.SIGTERM, lambda *_: (gateway.run(kept.disable), kept.dump_stats(profile), os._exit(0)))
else:
    gateway.start()
gc.collect(), gc.freeze(), gc.set_threshold(20_000, 20, 20)  # as torchrl-chat gateway does
while True:
    time.sleep(2)
    gateway.take()  # what has ended is its driver's
"""

THEIRS = """
import sys, uvicorn
from openenv.core.harness.capture.server import create_app
port, stub = sys.argv[2:4]
app = create_app(llm_url=f"http://127.0.0.1:{stub}", model="m")
uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error", access_log=False)
"""

STACK = """
import asyncio, sys
import orjson, uvicorn, uvloop
from torchrl_chat.openenv.server.quick import quick_protocol
from torchrl_chat.posting import Poster
port, stub = sys.argv[2:4]
poster = Poster(f"http://127.0.0.1:{stub}/inference/v1/generate")
text = " ".join(f"w{31 * i % 3000}" for i in range(99))
whole = orjson.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})
event = b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}) + b"\\n\\n"
PLAIN = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(whole))]
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    stream = body.endswith(b'"stream":true}')
    if scope["method"] == "POST" and scope["path"] != "/sessions":
        await poster.post({"token_ids": []})
    await send({"type": "http.response.start", "status": 200, "headers": STREAM if stream else PLAIN})
    await send({"type": "http.response.body", "body": event if stream else whole})
config = uvicorn.Config(app, host="127.0.0.1", port=int(port), log_config=None, access_log=False, lifespan="off", ws="none", http=quick_protocol(60))
uvloop.run(uvicorn.Server(config).serve())
"""


# ---------------------------------------------------------------------- processes
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def process(python: str | Path, script: str, port: int, health: str, *arguments: str) -> Iterator[int]:
    """A server in a process of its own, ready; its process id."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    running = subprocess.Popen([python, "-c", script, *arguments], env=environment, stderr=subprocess.PIPE)
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{health}", timeout=1).read()
                break
            except OSError:
                if running.poll() is not None:
                    told = running.stderr.read().decode()[-2000:] if running.stderr else ""
                    raise RuntimeError(f"a server did not start: {told}") from None
                time.sleep(0.1)
        yield running.pid
    finally:
        running.terminate()
        running.wait(60)


@contextlib.contextmanager
def apart(servers: Sequence[int], others: Sequence[int]) -> Iterator[None]:
    """Servers have one core meanwhile, and other processes another, if there are two."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    parts = [(servers, cores[:1]), (others, cores[1:2])] if len(cores) > 1 else []
    try:
        for pids, own in parts:
            keep_on(pids, own)
        yield
    finally:
        for pids, _ in parts:
            keep_on(pids, cores)


def keep_on(pids: Sequence[int], cores: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):  # one that has ended
            for thread in [*Path(f"/proc/{pid}/task").iterdir()]:
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread.name), cores)


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process."""
    found = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += int((thread / "schedstat").read_text().split()[0])
    return found / 1e9


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def save_tokenizer(folder: Path) -> tuple[int, int]:
    """A tokenizer of words, with ChatML; the id of the first word, and of the end of a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*special, *letters, "system", "user", "assistant"]
    vocab = {token: i for i, token in enumerate(names + [f"Ġw{i}" for i in range(WORDS)])}
    vocab |= {f"w{i}": len(vocab) + i for i in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<|pad|>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<|pad|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return len(names), vocab["<|im_end|>"]


# ---------------------------------------------------------------------- the agents
class Client(asyncio.Protocol):
    """One connection that is kept, and a history.

    Args:
        port: of the server.
        path: where it asks.
        key: what it shows.
        end: how its session ends, as method and path; ``None`` where there is none.
    """

    def __init__(self, port: int, path: str, key: str, end: tuple[str, str] | None = None):
        self.port, self.leaving = port, end
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n"
        self.head = (head + "content-type: application/json\r\ncontent-length: ").encode()
        self.history = bytearray(b'{"model":"m","messages":[')
        self.last = ""
        self.transport: Any = None

    async def turn(self, number: int, stream: bool = False) -> float:
        """One call; seconds until the whole answer is there, or with ``stream`` its first words."""
        await self.prepare(number, stream)
        took = await self.ask()
        self.read()
        return took

    async def prepare(self, number: int, stream: bool = False) -> None:
        """Write a request."""
        import orjson

        loop = asyncio.get_running_loop()
        if self.transport is None:
            await loop.create_connection(lambda: self, "127.0.0.1", self.port)
        asked = " ".join(f"w{(number * 20 + i) % 3000}" for i in range(20))
        self.history += (b"," if number else b"") + orjson.dumps({"role": "user", "content": asked})
        body = self.history + (b'],"stream":true}' if stream else b"]}")
        self.message = self.head + b"%d\r\n\r\n" % len(body) + body
        self.held, self.stream, self.first, self.body, self.end = bytearray(), stream, 0.0, 0, 0
        self.told: asyncio.Future[None] = loop.create_future()

    async def ask(self) -> float:
        """Send it; seconds as of :meth:`turn`."""
        begun = time.perf_counter()
        self.transport.write(self.message)
        await self.told
        return (self.first if self.stream else time.perf_counter()) - begun

    def read(self) -> None:
        """Read the answer."""
        import orjson

        if self.stream:
            events = [line[6:] for line in self.held.split(b"\n") if line.startswith(b'data: {"')]
            deltas = [choice["delta"] for event in events for choice in orjson.loads(event)["choices"]]
            self.last = "".join(delta.get("content") or "" for delta in deltas)
        else:
            self.last = orjson.loads(self.held[self.body :])["choices"][0]["message"]["content"]
        self.history += b"," + orjson.dumps({"role": "assistant", "content": self.last})

    def connection_made(self, transport: Any) -> None:
        """asyncio's: it is open."""
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's: it is lost."""
        if not self.told.done():
            self.told.set_exception(error or ConnectionError(bytes(self.held[:1000])))

    def data_received(self, data: bytes) -> None:
        """asyncio's: a part of an answer."""
        self.held += data
        if not self.body:
            head = self.held.find(b"\r\n\r\n") + 4
            if head < 4:
                return
            if not self.held.startswith(b"HTTP/1.1 200"):
                self.transport.close()
                return
            self.body = head
            if not self.stream:
                [length] = re.findall(rb"(?i)content-length: ?(\d+)", self.held[:head])
                self.end = head + int(length)
        if not self.stream:
            whole = len(self.held) == self.end
        else:
            if not self.first and re.search(rb'"content": ?"[^"]', self.held):
                self.first = time.perf_counter()
            whole = self.held.endswith(b"\r\n0\r\n\r\n")
        if whole:
            self.told.set_result(None)

    def close(self) -> None:
        """Hang up, and end the session: a server holds no more of them in the last round than in the first."""
        self.transport.close()
        if self.leaving is not None:
            method, path = self.leaving
            driven(self.port, path, method)


def driven(port: int, path: str, method: str = "POST") -> Any:
    """What a server answers to its driver."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=b"{}",
        headers={"authorization": "Bearer driver", "content-type": "application/json"},
        method=method,
    )
    return json.loads(urllib.request.urlopen(request, timeout=60).read())


def client_of(system: str, port: int) -> Client:
    """A new session of a server, and its agent."""
    if system == "stack":
        return Client(port, "/v1/chat/completions", "none")
    made = driven(port, "/sessions")
    if system == "ours":
        name = f"/s/{made['name']}"
        return Client(port, f"{name}/v1/chat/completions", made["api_key"], ("POST", f"{name}/finish"))
    name = made["session_id"]
    return Client(port, "/v1/chat/completions", name, ("DELETE", f"/sessions/{name}"))


async def warm(systems: Mapping[str, tuple[int, int]]) -> None:
    for system, (port, _) in systems.items():
        agents = [client_of(system, port) for _ in range(4)]
        for turn in range(5):
            await asyncio.gather(*(agent.turn(turn) for agent in agents))
        for agent in agents:
            agent.close()


async def play(systems: Mapping[str, tuple[int, int]], engine: int, sessions: int) -> dict[str, dict[str, Any]]:
    """One round of each system, given by port and process, turn by turn in turns."""
    agents = {system: [client_of(system, port) for _ in range(sessions)] for system, (port, _) in systems.items()}
    memory = {system: resident(pid) for system, (_, pid) in systems.items()}
    spent: dict[str, list[tuple[float, ...]]] = {system: [] for system in systems}
    for turn in range(TURNS):
        for system in sorted(systems, reverse=turn % 2 > 0):
            _, pid = systems[system]
            for agent in agents[system]:
                await agent.prepare(turn)
            before = cpu_seconds(pid), cpu_seconds(engine), time.process_time(), time.perf_counter()
            await asyncio.gather(*(agent.ask() for agent in agents[system]))
            after = cpu_seconds(pid), cpu_seconds(engine), time.process_time(), time.perf_counter()
            for agent in agents[system]:
                agent.read()
            spent[system].append(tuple(b - a for a, b in zip(before, after, strict=True)))
    found = {}
    for system, (_, pid) in systems.items():
        assert all(len(agent.last.split()) == TOKENS - 1 for agent in agents[system])
        cpu, engines, client, seconds = (sum(column) for column in zip(*spent[system], strict=True))
        calls = sessions * TURNS
        found[system] = {
            "calls_per_second": calls / seconds,
            "cpu_ms": 1e3 * cpu / calls,
            "client_cpu_ms": 1e3 * client / calls,
            "engine_cpu_ms": 1e3 * engines / calls,
            "cpu_ms_by_turn": [1e3 * turn[0] / sessions for turn in spent[system]],
            "kb_per_session": (resident(pid) - memory[system]) / sessions / 1024,
        }
        for agent in agents[system]:
            agent.close()
    return found


async def first_tokens(systems: Mapping[str, tuple[int, int]], engine: int, sessions: int = 8) -> dict[str, float]:
    """Milliseconds until the first words of an answer, the least of all turns of some sessions: other processes only add."""
    took: dict[str, list[float]] = {"engine": [], **{system: [] for system in systems}}
    for _ in range(sessions):
        for name, times in took.items():
            direct = name == "engine"
            agent = Client(engine, "/v1/chat/completions", "none") if direct else client_of(name, systems[name][0])
            times += [await agent.turn(turn, stream=not direct) for turn in range(TURNS)]
            agent.close()
    return {name: 1e3 * min(times) for name, times in took.items()}


# ---------------------------------------------------------------------- everything
def run(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        from uvloop import new_event_loop
    except ImportError:
        from asyncio import new_event_loop  # type: ignore[assignment]
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds of 16 sessions")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--openenv", type=Path, default=ROOT / ".openenv/010/bin/python", metavar="PYTHON")
    parser.add_argument(
        "--stack",
        action="store_true",
        help="also what the same HTTP stack costs that asks the engine and answers a constant",
    )
    parser.add_argument(
        "--profile", metavar="FILE", help="only ours, 16 sessions, under cProfile: the file of the profile"
    )
    given = parser.parse_args()
    counts, rounds = ([16], 3) if given.quick else ([16, 64], 8)
    pythons: dict[str, str | Path] = {"ours": sys.executable}
    if given.profile:
        counts, rounds = [16], 1
    elif given.openenv.exists():
        pythons["openenv"] = given.openenv
    else:
        print(f"{given.openenv} is not there ('make peers' makes it): only ours is measured.", file=sys.stderr)
    if given.stack:
        pythons["stack"] = sys.executable
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    firsts: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        first, end = save_tokenizer(Path(folder))
        stub = free_port()
        numbers = map(str, (stub, TOKENS, ANSWERS, first, end))
        engine = stack.enter_context(process(sys.executable, STUB, stub, "/v1/models", *numbers))
        systems = {}
        for system, python in pythons.items():
            script, port = {"ours": OURS, "openenv": THEIRS, "stack": STACK}[system], free_port()
            arguments = (folder, str(port), str(stub), given.profile or "")
            systems[system] = port, stack.enter_context(process(python, script, port, "/health", *arguments))
        run(warm(systems))
        for _ in range(rounds):
            for count in [each for each in counts for _ in range(max(counts) // each)]:
                with apart([pid for _, pid in systems.values()], [engine, os.getpid()]):
                    played = run(play(systems, engine, count))
                for system, found in played.items():
                    runs.setdefault((count, system), []).append(found)
            firsts.append(run(first_tokens(systems, stub)))
    found = result(runs, firsts)
    print(json.dumps(found, indent=2) if given.json else text(found))


def result(runs: dict[tuple[int, str], list[dict[str, Any]]], firsts: list[dict[str, float]]) -> dict[str, Any]:
    rows = []
    for (sessions, system), found in sorted(runs.items()):
        middle = {
            key: statistics.median(run[key] for run in found)
            for key in ("calls_per_second", "cpu_ms", "client_cpu_ms", "engine_cpu_ms")
        }
        by_turn = [min(values) for values in zip(*(run["cpu_ms_by_turn"] for run in found), strict=True)]
        flat, memory = sum(by_turn[-2:]) / sum(by_turn[1:3]), found[0]["kb_per_session"]
        rows.append(
            {
                "sessions": sessions,
                "system": system,
                **middle,
                "flat": flat,
                "kb_per_session": memory,
                "cpu_ms_by_turn": by_turn,
            }
        )
    least = {name: min(found[name] for found in firsts) for name in firsts[0]}
    engine = least.pop("engine")
    added = {name: value - engine for name, value in least.items()}
    ratios: dict[str, Any] = {}
    by = {(row["sessions"], row["system"]): row for row in rows}
    for sessions in sorted({row["sessions"] for row in rows}):
        if (theirs := by.get((sessions, "openenv"))) is not None:
            ours = by[sessions, "ours"]
            ratios[str(sessions)] = {
                key: ours[key] / theirs[key] for key in ("calls_per_second", "cpu_ms", "kb_per_session")
            }
    if "openenv" in added:
        ratios["first_token"] = added["ours"] / added["openenv"]
    return {"rows": rows, "first_token_added_ms": added, "engine_ms": engine, "ratios": ratios}


def text(found: dict[str, Any]) -> str:
    heads = ("sessions", "system", "calls/s", "CPU ms", "flat", "KB/session", "client ms", "engine ms")
    lines = [" ".join(f"{head:>10}" for head in heads)]
    lines += [
        f"{row['sessions']:>10} {row['system']:>10} {row['calls_per_second']:>10.0f} {row['cpu_ms']:>10.2f} "
        f"{row['flat']:>10.2f} {row['kb_per_session']:>10.0f} {row['client_cpu_ms']:>10.2f} {row['engine_cpu_ms']:>10.2f}"
        for row in found["rows"]
    ]
    lines += [
        f"first streamed token, {name}: {ms:.2f} ms added" for name, ms in found["first_token_added_ms"].items()
    ]
    for sessions, ratios in found["ratios"].items():
        if isinstance(ratios, dict):
            told = ", ".join(f"{key} {value:.2f}" for key, value in ratios.items())
            lines.append(f"ours / openenv, {sessions} sessions: {told}")
        else:
            lines.append(f"ours / openenv, first streamed token: {ratios:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
