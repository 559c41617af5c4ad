"""The gateway beside OpenEnv's capture server, on the same stub engine: calls per second, CPU, memory, the first streamed token.

    python benchmarks/gateway.py [--quick] [--json] [--openenv PYTHON] [--profile FILE]

Sessions (16 and 64) play 20 turns each: the agent sends its whole history and 20 words more, and gets 100 sampled tokens. All
sessions are at the same turn at the same time, so a turn has a rate and a CPU time of its own. The engine is a process that answers at
once from a few prepared answers: as vLLM's ``/inference/v1/generate`` for ours, and as its chat completions with
``return_token_ids`` for OpenEnv's ``CaptureServer`` app (``openenv`` 0.10, in the Python that ``--openenv`` names; default: the one that
``make peers`` makes), with prompts that extend each other, its best case. Each server is a process of its own and is started anew for
each run; the runs are interleaved, and medians of the rounds are shown. CPU is that of all threads of the server's
process; ours does the tokenizing, too, which with OpenEnv the engine does.

"flat" is what a call costs at turns 19 and 20, divided by turns 2 and 3. Memory is what the server's process has grown by, after a
warm run, divided by the sessions. The first streamed token is that of one session alone, the least of its turns, less what the engine takes when it is asked
directly. Other processes of the machine change rates; CPU hardly.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
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
asyncio.run(main())
"""

OURS = """
import cProfile, gc, os, signal, sys
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
    signal.pause()
"""

THEIRS = """
import sys, uvicorn
from openenv.core.harness.capture.server import create_app
port, stub = sys.argv[2:4]
app = create_app(llm_url=f"http://127.0.0.1:{stub}", model="m")
uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error", access_log=False)
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
class Client:
    """One connection that is kept, and a history.

    Args:
        port: of the server.
        path: where it asks.
        key: what it shows.
    """

    def __init__(self, port: int, path: str, key: str):
        self.port, self.path, self.key = port, path, key
        self.messages: list[dict[str, str]] = []
        self.reader: Any = None

    async def turn(self, number: int, stream: bool = False) -> float:
        """One call; seconds until the whole answer is there, or with ``stream`` its first words."""
        import orjson

        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        asked = " ".join(f"w{(number * 20 + i) % 3000}" for i in range(20))
        self.messages.append({"role": "user", "content": asked})
        body = orjson.dumps({"model": "m", "messages": self.messages, **({"stream": True} if stream else {})})
        head = f"POST {self.path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {self.key}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        begun = time.perf_counter()
        self.writer.write(head.encode() + body)
        status = await self.reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in status.split(b"\r\n")[0], (status, await self.reader.read(1000))
        if not stream:
            length = next(
                int(x.split(b":")[1]) for x in status.lower().split(b"\r\n") if x.startswith(b"content-le")
            )
            raw = await self.reader.readexactly(length)
            took = time.perf_counter() - begun
            self.messages.append(
                {"role": "assistant", "content": orjson.loads(raw)["choices"][0]["message"]["content"]}
            )
            return took
        told, took, held = "", None, b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            held += (await self.reader.readexactly(size + 2))[:-2]
            while b"\n\n" in held:
                event, held = held.split(b"\n\n", 1)
                if not event.startswith(b"data: {"):
                    continue
                for choice in orjson.loads(event[6:])["choices"]:
                    if words := choice["delta"].get("content"):
                        told += words
                        took = took or time.perf_counter() - begun
        await self.reader.readexactly(2)
        self.messages.append({"role": "assistant", "content": told})
        assert took is not None
        return took

    def close(self) -> None:
        """Hang up."""
        self.writer.close()


def posted(port: int, path: str, key: str) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=b"{}",
        headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
    )
    return json.loads(urllib.request.urlopen(request, timeout=60).read())


def client_of(system: str, port: int) -> Client:
    """A new session of a server, and its agent."""
    made = posted(port, "/sessions", "driver")
    if system == "ours":
        return Client(port, f"/s/{made['name']}/v1/chat/completions", made["api_key"])
    return Client(port, "/v1/chat/completions", made["session_id"])


async def play(system: str, port: int, pid: int, sessions: int, turns: int) -> dict[str, Any]:
    """One run."""
    agents = [client_of(system, port) for _ in range(4)]  # warm
    for turn in range(5):
        await asyncio.gather(*(agent.turn(turn) for agent in agents))
    for agent in agents:
        agent.close()
    agents = [client_of(system, port) for _ in range(sessions)]
    memory, cpu, seconds = resident(pid), [], []
    for turn in range(turns):
        before, begun = cpu_seconds(pid), time.perf_counter()
        await asyncio.gather(*(agent.turn(turn) for agent in agents))
        seconds.append(time.perf_counter() - begun)
        cpu.append((cpu_seconds(pid) - before) / sessions)
    for agent in agents:
        agent.close()
    assert all(len(agent.messages[-1]["content"].split()) == TOKENS - 1 for agent in agents)
    return {
        "calls_per_second": sessions * turns / sum(seconds),
        "cpu_ms": 1e3 * sum(cpu) / turns,
        "cpu_ms_by_turn": [1e3 * value for value in cpu],
        "flat": sum(cpu[-2:]) / sum(cpu[1:3]),
        "kb_per_session": (resident(pid) - memory) / sessions / 1024,
    }


async def first_token(client: Client, turns: int, stream: bool = True) -> float:
    """Milliseconds until the first words of an answer, the least of some turns: other processes only add."""
    took = [await client.turn(turn, stream) for turn in range(turns)]
    client.close()
    return 1e3 * min(took)


# ---------------------------------------------------------------------- everything
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, 16 sessions")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--openenv", type=Path, default=ROOT / ".openenv/010/bin/python", metavar="PYTHON")
    parser.add_argument(
        "--profile", metavar="FILE", help="only ours, 16 sessions, under cProfile: the file of the profile"
    )
    given = parser.parse_args()
    counts, rounds = ([16], 1) if given.quick else ([16, 64], 3)
    pythons: dict[str, str | Path] = {"ours": sys.executable}
    if given.profile:
        counts, rounds = [16], 1
    elif given.openenv.exists():
        pythons["openenv"] = given.openenv
    else:
        print(f"{given.openenv} is not there ('make peers' makes it): only ours is measured.", file=sys.stderr)
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    firsts: dict[str, list[float]] = {system: [] for system in ("engine", *pythons)}
    with tempfile.TemporaryDirectory() as folder:
        first, end = save_tokenizer(Path(folder))
        stub = free_port()
        numbers = map(str, (stub, TOKENS, ANSWERS, first, end))
        with process(sys.executable, STUB, stub, "/v1/models", *numbers):
            for _ in range(rounds):
                direct = Client(stub, "/v1/chat/completions", "none")
                firsts["engine"].append(asyncio.run(first_token(direct, TURNS, stream=False)))
                for system, python in pythons.items():
                    script, port = (OURS if system == "ours" else THEIRS), free_port()
                    arguments = (folder, str(port), str(stub), given.profile or "")
                    with process(python, script, port, "/health", *arguments) as pid:
                        for count in counts:
                            run = asyncio.run(play(system, port, pid, count, TURNS))
                            runs.setdefault((count, system), []).append(run)
                        firsts[system].append(asyncio.run(first_token(client_of(system, port), TURNS)))
    print(json.dumps(result(runs, firsts), indent=2) if given.json else text(result(runs, firsts)))


def result(runs: dict[tuple[int, str], list[dict[str, Any]]], firsts: dict[str, list[float]]) -> dict[str, Any]:
    rows = []
    for (sessions, system), found in sorted(runs.items()):
        middle = {
            key: statistics.median(run[key] for run in found)
            for key in ("calls_per_second", "cpu_ms", "flat", "kb_per_session")
        }
        by_turn = [
            statistics.median(values) for values in zip(*(run["cpu_ms_by_turn"] for run in found), strict=True)
        ]
        rows.append({"sessions": sessions, "system": system, **middle, "cpu_ms_by_turn": by_turn})
    engine = min(firsts["engine"])
    added = {name: min(values) - engine for name, values in firsts.items() if values and name != "engine"}
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
    lines = [f"{'sessions':>8} {'system':>8} {'calls/s':>8} {'CPU ms':>8} {'flat':>6} {'KB/session':>11}"]
    lines += [
        f"{row['sessions']:>8} {row['system']:>8} {row['calls_per_second']:>8.0f} {row['cpu_ms']:>8.2f} "
        f"{row['flat']:>6.2f} {row['kb_per_session']:>11.0f}"
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
