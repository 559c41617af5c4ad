"""What the processes of a sandbox use, as the kernel tells it: memory and processor time, of all of them together."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

_HERTZ = os.sysconf("SC_CLK_TCK")
_PAGE = resource.getpagesize()
_MAPPINGS = 65530  # that a process may have, as kernels are set up
_MAPPING = 1 << 10  # bytes that a mapping counts: the kernel keeps 0.2 to 0.9 KiB, by what was done with it
_ROUNDS = 8  # mappings are counted once in so many looks
_SIZES = ("VmRSS:", "VmSwap:", "VmPTE:", "HugetlbPages:")  # none of them is part of another

# What reading about a process raises that has just ended. Anything else ends the keeper, and the sandbox with it: limits
# that cannot be looked after do not hold.
ENDED = (FileNotFoundError, ProcessLookupError, ValueError, IndexError)


class Processes:
    """The sandbox's processes, the keeper's own left out.

    Args:
        proc: a descriptor of a /proc that hides none of them.
    """

    def __init__(self, proc: int) -> None:
        self._proc = proc

    def names(self) -> list[str]:
        """Their numbers, as names."""
        return [name for name in os.listdir(self._proc) if name.isdigit() and name != "1"]

    def read(self, name: str, file: str) -> str:
        """A file of one of them."""
        return "".join(self.parts(name, file, -1))

    def parts(self, name: str, file: str, size: int = 1 << 20) -> Iterator[str]:
        """A long file of one of them, in parts of so many characters."""
        with open(f"{name}/{file}", opener=self._open) as opened:
            while part := opened.read(size):
                yield part

    def tasks(self, name: str) -> list[str]:
        """The threads of one of them; each may be asked for by its own name."""
        folder = self._open(f"{name}/task", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return os.listdir(folder)
        finally:
            os.close(folder)

    def status(self, name: str) -> dict[str, str]:
        """What the kernel's ``status`` says, by its words."""
        words = (line.split(None, 2) for line in self.read(name, "status").splitlines())
        return {word[0]: word[1] for word in words if len(word) > 1}

    def threads(self, name: str) -> int:
        """How many threads the process of a thread has."""
        return int(self.status(name)["Threads:"])

    def alone(self, task: str) -> bool:
        """Whether a thread's process is the only one."""
        return self.names() == [self.status(task)["Tgid:"]]

    def stopped(self) -> bool:
        """Whether none of their threads runs, or will when what it waits for has come."""
        for name in self.names():
            with contextlib.suppress(*ENDED):
                for task in self.tasks(name):
                    with contextlib.suppress(*ENDED):
                        # "D" is a parent in vfork, whose child is there already and has stopped.
                        if self.read(task, "stat").rpartition(")")[2].split()[0] in "RS":
                            return False
        return True

    def device(self, name: str, fd: int) -> int:
        """The file system that an open file lies on."""
        return os.stat(f"{name}/fd/{fd}", dir_fd=self._proc).st_dev

    def _open(self, path: str, flags: int) -> int:
        return os.open(path, flags, dir_fd=self._proc)


class Clock:
    """Processor time of all processes of the sandbox, those that have ended among them.

    A parent's own figures have the time of the children that it waited for. Of children that nobody waits for they have
    none: their last figures are kept here. Those that were never seen, because they lived for less than a tick, are missed.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._last: dict[str, int] = {}
        self._ended = 0

    def seconds(self) -> float:
        """So far."""
        waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
        own, all_told, last = 0, 0, {}
        for name in self._processes.names():
            with contextlib.suppress(*ENDED):
                times = list(map(int, self._processes.read(name, "stat").rpartition(")")[2].split()[11:15]))
                last[name] = times[0] + times[1]
                own += last[name]
                all_told += sum(times)
        for name, ticks in self._last.items():
            if last.get(name, -1) < ticks:  # it has ended, or its number belongs to another one now
                self._ended += ticks
        self._last = last
        seen = (own + self._ended) / _HERTZ
        return max(waited_for.ru_utime + waited_for.ru_stime + all_told / _HERTZ, seen)


class Memory:
    """Memory of all processes of the sandbox, and what the kernel keeps for their mappings.

    Counted are the pages in memory (those that several share once, where that can be read), those that were swapped out,
    page tables, and mappings. A process whose first thread has ended says nothing of its memory; its other threads do.

    Args:
        processes: the processes.
        limit: bytes that they may have.
    """

    def __init__(self, processes: Processes, limit: int) -> None:
        self._processes = processes
        self._limit = limit
        self._mappings = 0
        self._looks = 0

    def exceeded(self) -> bool:
        """Whether they have more than that."""
        seen: dict[str, dict[str, str]] = {}
        for name in self._processes.names():
            with contextlib.suppress(*ENDED):
                seen.update([self._seen(name)])
        if self._looks % _ROUNDS == 0 or self._mappings > self._limit:
            self._mappings = sum(self._mapped(task, sizes) for task, sizes in seen.items()) * _MAPPING
        self._looks += 1
        if sum(_all_told(sizes) for sizes in seen.values()) + self._mappings <= self._limit:
            return False
        return sum(self._share(task, sizes) for task, sizes in seen.items()) + self._mappings > self._limit

    def _seen(self, name: str) -> tuple[str, dict[str, str]]:
        """A thread of a process that still has the memory, and what the kernel says of it.

        Raises:
            ProcessLookupError: all of them have ended.
        """
        status = self._processes.status(name)
        if "VmRSS:" in status:
            return name, status
        for task in self._processes.tasks(name):
            with contextlib.suppress(*ENDED):
                status = self._processes.status(task)
                if "VmRSS:" in status:
                    return task, status
        raise ProcessLookupError(name)

    def _mapped(self, task: str, status: dict[str, str]) -> int:
        """How many mappings it has; where that cannot be read, how many there is room for."""
        count = 0
        try:
            for part in self._processes.parts(task, "maps"):
                count += part.count("\n")
                if count * _MAPPING > self._limit:
                    break
        except PermissionError:
            return min(_MAPPINGS, (int(status["VmSize:"]) << 10) // _PAGE)
        except ENDED:
            pass
        return count

    def _share(self, task: str, status: dict[str, str]) -> int:
        """Its part of the memory that it has, in bytes: all of it, where it does not let that be read."""
        shared = {}
        try:
            for line in self._processes.read(task, "smaps_rollup").splitlines()[1:]:
                word, size, *_ = line.split()
                shared[word] = int(size) << 10
            return shared["Pss:"] + shared.get("SwapPss:", 0) + _all_told(status, ("VmPTE:", "HugetlbPages:"))
        except (PermissionError, KeyError, *ENDED):
            return _all_told(status)


def _all_told(status: dict[str, str], words: tuple[str, ...] = _SIZES) -> int:
    """The sum of some sizes, in bytes."""
    return sum(int(status.get(word, "0")) << 10 for word in words)
