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


def begin(device: str | None = None, timeout: datetime.timedelta = TIMEOUT) -> int:
    """Have the processes that torchrun started find each other; once, and not at all where there is one.

    Args:
        device: ``"cpu"``, or ``"cuda"`` for one GPU a process, which then is the current one; by default what there is.
        timeout: see :data:`TIMEOUT`.

    Returns:
        how many there are.

    Raises:
        ValueError: there are more processes on this machine than GPUs.

    Example:
        >>> begin()
        1
    """
    if asked() == 1 or dist.is_initialized():
        return count()
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', local + 1)} processes here, and there are "
                f"{torch.cuda.device_count()} GPUs: start one for each (--nproc-per-node), or give --device cpu."
            )
        torch.cuda.set_device(local)
    # What is told as plain data goes between CPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timeout)
    return count()


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
