"""What the processes of one training run tell each other: sums, decisions, plain data. With one process each is what was given.

``torchrun --nproc-per-node N script.py`` starts N processes, whose numbers from 0 on are called their ranks; :func:`begin` has
them find each other. All of them call the functions from :func:`total` on, in the same order.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)
"""How long one process waits for another, which may have longer conversations to sample, before it gives up."""


def asked() -> int:
    """How many processes torchrun was asked for; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def begin(asked_for: str | None = None, timeout: datetime.timedelta = TIMEOUT) -> int:
    """Have the processes that torchrun started find each other; once, and not at all where there is one.

    Args:
        asked_for: see :func:`device_of`; a GPU is the process's current one then.
        timeout: see :data:`TIMEOUT`.

    Returns:
        how many there are.

    Raises:
        ValueError: see :func:`device_of`.

    Example:
        >>> begin()
        1
    """
    if asked() == 1 or dist.is_initialized():
        return count()
    own = device(asked_for)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group(backend_of(own), timeout=timeout)
    return count()


def device(asked_for: str | None = None) -> torch.device:
    """The device of this process: what is asked for, or what there is; of several processes each has a GPU of its own.

    Raises:
        ValueError: see :func:`device_of`.

    Example:
        >>> device("cpu")
        device(type='cpu')
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local, beside = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    return device_of(asked_for, gpus, local, beside if asked() > 1 else None)


def device_of(asked_for: str | None, gpus: int, local: int = 0, beside: int | None = None) -> torch.device:
    """The device of a process on a machine.

    Args:
        asked_for: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; ``None``: a GPU if there is one.
        gpus: how many there are on the machine.
        local: which of the processes on the machine this is.
        beside: how many torchrun started there; ``None``: it started none.

    Raises:
        ValueError: there are more processes than GPUs; or they are to share one.

    Example:
        >>> device_of(None, gpus=8, local=3, beside=8)
        device(type='cuda', index=3)
    """
    found = torch.device(asked_for or ("cuda" if gpus else "cpu"))
    if beside is None or found.type != "cuda":
        return found
    if found.index is not None:
        raise ValueError(
            f"--device {asked_for}: each of the {beside} processes has a GPU of its own: give --device cuda."
        )
    if beside > gpus:
        raise ValueError(
            f"torchrun started {beside} processes here, and there are {gpus} GPUs: start one for each (--nproc-per-node), or give "
            "--device cpu."
        )
    return torch.device("cuda", local)


def backend_of(device: torch.device) -> str:
    """What processes with such devices talk through; plain data goes between CPUs.

    Example:
        >>> import torch
        >>> backend_of(torch.device("cuda", 1))
        'cpu:gloo,cuda:nccl'
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own() -> int:
    """The rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def leads() -> bool:
    """Whether this is the process that writes files and talks: the first."""
    return own() == 0


def total(numbers: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if count() == 1:
        return numbers
    summed = numbers.detach().clone()
    dist.all_reduce(summed)
    return summed


def most(number: float) -> float:
    """The greatest of a number over all processes."""
    return number if count() == 1 else max(everywhere(number))


def everywhere(value: T) -> list[T]:
    """What each process has, by its rank; plain data."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def of_the_first(value: T) -> T:
    """What the first process has; plain data."""
    if count() == 1:
        return value
    told: list[Any] = [value]
    dist.broadcast_object_list(told)
    return told[0]


def leave_if_alone(error: BaseException) -> None:
    """End this process with one sentence, if an error says that another one of the run has gone or stands still.

    Args:
        error: what a collective raised. torch has no class of its own for it, and each backend its own words.
    """
    if count() == 1 or not any(sign in str(error) for sign in ("gloo", "NCCL", "Connection reset")):
        return
    print(
        f"process {own()} of {count()} ends, since another has gone or stands still: start the run again with --resume, and it goes on "
        "from its last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # at a usual exit a group that lacks one is waited for


def together() -> None:
    """Wait for all processes."""
    if count() > 1:
        dist.barrier()


def agreed(act: Callable[[], T]) -> T | None:
    """Have the first process do something; an error of it is raised in all of them.

    Returns:
        what it gave, on the first process; ``None`` on the others.
    """
    result, error = None, None
    if leads():
        try:
            result = act()
        except Exception as raised:
            error = raised
    if (told := of_the_first(error)) is not None:
        raise error or told
    return result
