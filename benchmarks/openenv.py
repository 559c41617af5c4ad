"""Our server beside OpenEnv's own: steps per second, bytes a turn, memory a session.

    TORCHRL_CHAT_OPENENV_REPO=CHECKOUT python benchmarks/openenv.py [--quick] [--json] [--cache FOLDER]

Every session sends 50 answers of 100 tokens. OpenEnv's server is ``envs/chat_env`` of its repository (TORCHRL_CHAT_OPENENV_REPO names a
checkout; its package is on no index) behind ``openenv`` of PyPI, which the script installs into an environment of its own
under the cache folder. It allows one session; the limit is lifted by the class attribute that it has for that. It is
measured as it is, a tokenizer a session; with one tokenizer shared, which its users would have to write; and that without
the compression of messages that its server offers and its client takes. "times" is to the second of these. Clients:
``GenericEnvClient`` of the same package, for both servers; and ours, whose observations carry what is new. The runs are
interleaved; the medians of the rounds are shown.

The second table is 256 sessions with a vocabulary of 150,000 tokens; the third the bytes of a reply at turns 1 to 50.
"""

from __future__ import annotations

import argparse
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

VERSION = "0.10.0"
PEER = "openenv, one tokenizer"
HERE = Path(__file__).resolve().parent.parent

_SHOWN = ("steps_per_second", "p50_ms", "p99_ms", "server_cpu_ms", "client_cpu_ms")

STOCK = """
import sys
sys.path.insert(0, sys.argv[1] + "/envs")
import uvicorn
from transformers import AutoTokenizer
from chat_env.models import ChatAction, ChatObservation
from chat_env.server.chat_environment import ChatEnvironment
from openenv.core.env_server.http_server import create_app
folder, port, shared = sys.argv[2], int(sys.argv[3]), sys.argv[4] in ("shared", "plain")
ChatEnvironment.SUPPORTS_CONCURRENT_SESSIONS = True
kept = AutoTokenizer.from_pretrained(folder) if shared else None
def make():
    return ChatEnvironment(tokenizer=kept or AutoTokenizer.from_pretrained(folder))
app = create_app(make, ChatAction, ChatObservation, env_name="chat_env", max_concurrent_envs=1024)
deflate = sys.argv[4] != "plain"
uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", ws_per_message_deflate=deflate)
"""

OURS = """
import sys
from transformers import AutoTokenizer
from torchrl_chat.openenv.gallery import factory_of
from torchrl_chat.openenv.server import create_app, run
factory, name = factory_of("chat", AutoTokenizer.from_pretrained(sys.argv[2]))
run(create_app(factory, env_name=name), port=int(sys.argv[3]))
"""

CLIENT = """
import asyncio, json, random, sys, time
kind, port, sessions, turns, tokens = sys.argv[1], *map(int, sys.argv[2:6])
url, draw = f"http://127.0.0.1:{port}", random.Random(0)
answers = [[draw.randrange(300, 8000) for _ in range(tokens)] for _ in range(turns)]
if kind == "stock":
    from openenv.core.generic_client import GenericEnvClient as Client
    make, actions = (lambda: Client(base_url=url)), [{"tokens": ids} for ids in answers]
else:
    from torchrl_chat.openenv.client.chat import ChatEnv
    from torchrl_chat.openenv.models import ChatAction
    make, actions = (lambda: ChatEnv(url)), [ChatAction(tokens=ids) for ids in answers]
times, failed = [], []
async def one():
    client = make()
    try:
        await client.connect()
        await client.reset()
        for action in actions:
            start = time.perf_counter()
            result = await client.step(action)
            times.append(time.perf_counter() - start)
        seen = result.observation
        tokens_seen = seen["tokens"] if isinstance(seen, dict) else seen.tokens
        assert len(tokens_seen) >= turns * tokens
    except Exception as error:
        failed.append(repr(error)[:100])
    finally:
        try:
            await client.close()
        except Exception:
            pass
async def main():
    start = time.perf_counter()
    await asyncio.gather(*[one() for _ in range(sessions)])
    return time.perf_counter() - start
cpu = time.process_time()
seconds = asyncio.run(main())
cpu = time.process_time() - cpu
times.sort()
at = lambda share: 1e3 * times[min(len(times) - 1, int(share * len(times)))] if times else None
print(json.dumps({"steps_per_second": len(times) / seconds, "p50_ms": at(0.5), "p99_ms": at(0.99), "failed": len(failed),
    "client_cpu_ms": 1e3 * cpu / max(1, len(times)), "steps": len(times), "why": failed[:1]}))
"""

HOLD = """
import asyncio, json, sys
import websockets
port, sessions = int(sys.argv[1]), int(sys.argv[2])
frame = json.dumps({"type": "step", "data": {"tokens": list(range(1010, 1110))}})
async def main():
    kept, failed = [], 0
    async def one():
        nonlocal failed
        try:
            ws = await websockets.connect(f"ws://127.0.0.1:{port}/ws", max_size=2**27, open_timeout=10, ping_timeout=None)
            for message in ('{"type":"reset","data":{}}', *[frame] * 5):
                await ws.send(message)
                assert json.loads(await asyncio.wait_for(ws.recv(), 60))["type"] == "observation"
            kept.append(ws)
        except Exception:
            failed += 1
    await asyncio.gather(*[one() for _ in range(sessions)])
    print(json.dumps({"failed": failed}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
asyncio.run(main())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, 64 sessions with the vocabulary")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--openenv-repo", default=os.environ.get("TORCHRL_CHAT_OPENENV_REPO"), metavar="FOLDER")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torchrl_chat"
    parser.add_argument("--cache", type=Path, default=cache, metavar="FOLDER")
    arguments = parser.parse_args()
    stock = stock_python(arguments.cache) if arguments.openenv_repo else None
    if stock is None:
        print(
            "TORCHRL_CHAT_OPENENV_REPO names no checkout of OpenEnv: only our own server is measured.",
            file=sys.stderr,
        )
    turns, rounds, many = (50, 1, 64) if arguments.quick else (50, 3, 256)
    with tempfile.TemporaryDirectory() as folder:
        small, large = (save_tokenizer(Path(folder), size) for size in (8_000, 150_000))
        result = {
            "speed": speed(stock, arguments.openenv_repo, small, turns, rounds),
            "vocabulary": vocabulary(stock, arguments.openenv_repo, large, many),
            "bytes": sizes(small),
        }
    print(json.dumps(result, indent=2) if arguments.json else text(result))


def speed(stock: str | None, repo: str | None, tokenizer: Path, turns: int, rounds: int) -> list[dict[str, Any]]:
    """Steps per second of 64 sessions, a row for each server and client."""
    ours = sys.executable
    systems: list[tuple[str, str, str, str]] = [("torchrl_chat", "our client, deltas", "ours", ours)]
    if stock:
        systems += [
            ("openenv, a tokenizer a session", "GenericEnvClient", "own", stock),
            (PEER, "GenericEnvClient", "shared", stock),
            ("openenv, one tokenizer, no deflate", "GenericEnvClient", "plain", stock),
            ("torchrl_chat", "GenericEnvClient", "ours", stock),
        ]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {system[:2]: [] for system in systems}
    for _ in range(rounds):
        for name, client, kind, python in systems:
            with server(kind, stock, repo, tokenizer) as (port, process):
                measure(python, client, port, 4, 5)  # warm
                before = cpu_seconds(process.pid)
                run = measure(python, client, port, 64, turns)
                run["server_cpu_ms"] = 1e3 * (cpu_seconds(process.pid) - before) / max(1, run["steps"])
                runs[name, client].append(run)
    rows = []
    for (name, client), found in runs.items():
        middle = {key: statistics.median(run[key] for run in found) for key in _SHOWN}
        rows.append({"server": name, "client": client, **middle, "failed": max(run["failed"] for run in found)})
    peer = next((row["steps_per_second"] for row in rows if row["server"] == PEER), None)
    for row in rows:
        row["times"] = row["steps_per_second"] / peer if peer else None
    return rows


def measure(python: str, client: str, port: int, sessions: int, turns: int) -> dict[str, Any]:
    """One run of the client script, of sessions at once."""
    kind = "stock" if client == "GenericEnvClient" else "ours"
    done = subprocess.run(
        [python, "-c", CLIENT, kind, *map(str, (port, sessions, turns, 100))],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def vocabulary(stock: str | None, repo: str | None, tokenizer: Path, sessions: int) -> list[dict[str, Any]]:
    """Failures and memory of many sessions with a large vocabulary."""
    rows = []
    for name, kind in [("torchrl_chat", "ours"), *([("openenv, a tokenizer a session", "own")] if stock else [])]:
        count = sessions if kind == "ours" else min(32, sessions)  # 256 tokenizers would need 37 GB
        with server(kind, stock, repo, tokenizer) as (port, process):
            hold(port, 1).wait()
            before = resident(process.pid)
            client = hold(port, count)
            assert client.stdout is not None
            failed = json.loads(client.stdout.readline())["failed"]
            after = resident(process.pid)
            client.communicate("\n", timeout=60)
        each = (after - before) / max(1, count - failed)
        rows.append({"server": name, "sessions": count, "failed": failed, "mb_per_session": each / 2**20})
    return rows


def hold(port: int, sessions: int) -> subprocess.Popen[str]:
    """A client with so many sessions of 5 turns, which it keeps until it is told to leave (one: at once)."""
    pipe = subprocess.PIPE if sessions > 1 else subprocess.DEVNULL
    command = [sys.executable, "-c", HOLD, str(port), str(sessions)]
    return subprocess.Popen(command, stdin=pipe, stdout=subprocess.PIPE, text=True, env=environment())


def sizes(tokenizer: Path) -> list[dict[str, Any]]:
    """Bytes of a reply at some turns, whole and as deltas."""
    from websockets.sync.client import connect

    found: dict[str, list[int]] = {"": [], "?delta=1": []}
    with server("ours", None, None, tokenizer) as (port, _):
        for query, bytes_of in found.items():
            with connect(f"ws://127.0.0.1:{port}/ws{query}", max_size=2**27) as ws:
                ws.send('{"type":"reset","data":{}}')
                ws.recv()
                for _turn in range(50):
                    ws.send(json.dumps({"type": "step", "data": {"tokens": list(range(1010, 1110))}}))
                    bytes_of.append(len(ws.recv()))
    return [
        {"turn": turn, "whole": found[""][turn - 1], "delta": found["?delta=1"][turn - 1]} for turn in (1, 10, 50)
    ]


@contextlib.contextmanager
def server(
    kind: str, stock: str | None, repo: str | None, tokenizer: Path
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python, script = (sys.executable, OURS) if kind == "ours" else (str(stock), STOCK)
    command = [python, "-c", script, str(repo), str(tokenizer), str(port), kind]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError(f"the server ({kind}) did not start: run its script by hand.") from None
                time.sleep(0.1)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


def stock_python(cache: Path) -> str:
    """The interpreter of an environment with OpenEnv; made once."""
    folder = cache / f"openenv-{VERSION}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing openenv {VERSION} into {folder} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        packages = [f"openenv=={VERSION}", "transformers==5.23.0"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return str(python)


def save_tokenizer(folder: Path, size: int) -> Path:
    """A tokenizer of ``size`` tokens with ChatML, and without a template for OpenEnv's server, which takes none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{i}" for i in range(size - len(special) - len(letters))]
    vocab = {token: i for i, token in enumerate([*special, *letters, *words])}
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
    target = folder / str(size)
    tokenizer.save_pretrained(target)
    return target


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used: it depends less than rates do on what else the machine does."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def times(row: dict[str, Any]) -> str:
    return "" if row["times"] is None else f"{row['times']:.1f}"


def text(result: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "64 sessions, 100 tokens a turn",
        "| server | client | steps/s | times | p50 ms | p99 ms | server CPU ms/step | client CPU ms/step | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['server']} | {r['client']} | {r['steps_per_second']:,.0f} | {times(r)} | {r['p50_ms']:.1f} | {r['p99_ms']:.1f} "
        f"| {r['server_cpu_ms']:.2f} | {r['client_cpu_ms']:.2f} | {r['failed']} |"
        for r in result["speed"]
    ]
    lines += ["", "150,000 tokens", "| server | sessions | failed | MB a session |", "|---|---|---|---|"]
    lines += [
        f"| {r['server']} | {r['sessions']} | {r['failed']} | {r['mb_per_session']:.2f} |"
        for r in result["vocabulary"]
    ]
    lines += ["", "bytes of a reply", "| turn | whole | delta |", "|---|---|---|"]
    lines += [f"| {r['turn']} | {r['whole']:,} | {r['delta']:,} |" for r in result["bytes"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
