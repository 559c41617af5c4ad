"""Runs a training script, kills it at random points, resumes it until it is done, and once more whole; prints what was seen as JSON.

    python tests/recipe_kills.py SCRIPT KILLED WHOLE KILLS SEED [ARGUMENTS ...]

The libraries are loaded once; every attempt is a fork of this process, which becomes the parent of whatever an attempt
leaves behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def attempt(script: str, arguments: list[str], log: Path) -> int:
    """Start the script in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def children() -> list[str]:
    """The names of this process's children that are not over."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, parent = tail.split()[:2]
        if int(parent) == os.getpid() and state != "Z":
            found.append(head)
    return found


def kill_somewhere(pid: int, draw: random.Random, metrics: Path) -> bool:
    """Kill it some steps on, or before the first of them; whether it was killed before it ended."""
    begun, more, end = lines(metrics), draw.randrange(3), time.monotonic() + 300
    soon = time.monotonic() + draw.uniform(0, 1.0)  # where the first step is not waited for
    while lines(metrics) < begun + more or (not more and lines(metrics) == begun and time.monotonic() < soon):
        if os.waitpid(pid, os.WNOHANG)[0] or time.monotonic() > end:
            return False
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.25))  # within a step, or within the writing of a checkpoint
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def main() -> None:
    script, folder, whole, kills, seed, *arguments = sys.argv[1:]
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import torchrl_chat.playing
    import torchrl_chat.policies.transformers
    import torchrl_chat.recipes.grpo
    import torchrl_chat.recipes.run
    import torchrl_chat.recipes.tasks
    import torchrl_chat.transforms.reward  # noqa: F401

    with contextlib.suppress(ImportError):  # which vLLM's environment lacks
        import matplotlib.figure  # noqa: F401

    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    draw, killed, orphans = random.Random(int(seed)), [], []
    log, metrics = Path(f"{folder}.log"), Path(folder) / "metrics.jsonl"

    def begun(out: str) -> int:
        return attempt(script, [*arguments, "--out", out, "--resume"], log)

    while len(killed) < int(kills):
        if not kill_somewhere(begun(folder), draw, metrics):
            break
        checkpoints = sorted(path.name for path in (Path(folder) / "checkpoints").glob("*"))
        killed.append([lines(metrics), checkpoints])
        end = time.monotonic() + 60
        while children() and time.monotonic() < end:
            time.sleep(0.05)
        orphans += children()
    statuses = [os.waitstatus_to_exitcode(os.waitpid(begun(out), 0)[1]) for out in (folder, whole)]
    print(json.dumps({"killed": killed, "orphans": orphans, "statuses": statuses}))


if __name__ == "__main__":
    main()
