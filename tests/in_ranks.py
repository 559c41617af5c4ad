"""Functions in several processes that know each other, as torchrun starts them; without its fifteen seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch


def in_ranks(count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> list[Any]:
    """What a function of a test module gives in each of so many processes, by rank.

    Raises:
        AssertionError: one of them raised, or was not done in time; with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    told = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_run, args=(rank, count, port, told, function, arguments), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(told.get(timeout=timeout) for _ in processes)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    errors = [f"rank {rank}: {error}" for rank, (error, _) in sorted(found.items()) if error is not None]
    assert not errors, "\n".join(errors)
    return [found[rank][1] for rank in range(count)]


def _run(rank: int, count: int, port: int, told: Any, function: Callable[..., Any], arguments: tuple) -> None:
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    try:
        result = None, function(*arguments)
    except BaseException:
        result = traceback.format_exc(), None
    told.put((rank, result))
    told.close()
    told.join_thread()
    os._exit(0)  # a group in which one has failed is waited for at a usual exit
