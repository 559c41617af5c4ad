"""What a call of the Python tool costs: fresh, in a session, and for 64 rows at once.

    python benchmarks/sandbox.py [--quick] [--json]

Peers:

- ours: ``Sandbox`` at its level ``namespaces``; ``run``, ``Session.run`` and ``run_many``.
- bubblewrap: ``Sandbox`` at its level ``bubblewrap``, where ``bwrap`` is installed.
- torchrl: what its ``PythonInterpreter`` transform runs for each row (``_execute_python_code``), fresh and with
  ``persistent=True``; no isolation. For a batch it takes one row after another, and so does this.
- gem: GEM's ``PythonCodeTool`` as shipped, no isolation. Optional: ``pip install --no-deps gem-llm regex``.
- python -c: ``subprocess.run`` of the interpreter, no isolation; for 64 rows from as many threads as there are cores.

Fairness: the same programs for all, each with other numbers, so that nothing can be kept; every answer is compared with the
right one; they define no functions, which torchrl's persistent interpreter could not run; all are started and have run three calls before the clock starts; repeats go round the systems, so that a
noisy moment hits all of them. Ours builds sandboxes ahead of need, as it does for users; in a row of calls without a
pause that hides some of the cost of a call but none of the rate, which ``rows`` shows. Latency is the median and the
90th percentile over single calls; ``rows`` is calls per second for batches of 64, the median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torchrl_chat.sandbox import Sandbox

ROWS = 64
Run = Callable[[str], str]


def program(number: int) -> tuple[str, str]:
    """A small program of the kind that models write, and what it prints."""
    code = (
        "import math\n"
        f"n = {number}\n"
        "total = n\n"
        "for d in range(1, math.isqrt(n) + 1):\n"
        "    if n % d == 0:\n"
        "        total += d\n"
        "print(total)\n"
    )
    return code, str(sum(d for d in range(1, int(number**0.5) + 1) if number % d == 0) + number)


class System:
    """One way to run programs."""

    def __init__(
        self, name: str, fresh: Run | None, kept: Run | None, rows: Callable[[list[str]], list[str]] | None
    ):
        self.name, self.fresh, self.kept, self.rows = name, fresh, kept, rows
        self.times: dict[str, list[float]] = {"fresh": [], "session": [], "rows": []}


def ours(name: str, box: Sandbox, cleanup: list[Callable[[], Any]]) -> System:
    box.start()
    session = box.session()
    cleanup += [session.reset, box.close]
    return System(
        name,
        lambda code: box.run(code).stdout,
        lambda code: session.run(code).stdout,
        lambda codes: [r.stdout for r in box.run_many(codes)],
    )


def systems(cleanup: list[Callable[[], Any]]) -> list[System]:
    found = [ours("ours", Sandbox(), cleanup)]
    if shutil.which("bwrap"):
        found.append(ours("bubblewrap", Sandbox("bubblewrap"), cleanup))
    try:
        from torchrl._utils import logger
        from torchrl.envs.llm.transforms.tools import PythonInterpreter

        logger.setLevel("ERROR")  # it logs every line
    except ImportError:
        pass
    else:
        fresh, kept = PythonInterpreter(), PythonInterpreter(persistent=True)
        kept._ensure_processes(1)
        cleanup.append(kept.close)
        found.append(
            System(
                "torchrl",
                lambda code: fresh._execute_python_code(code, 0)["stdout"],
                lambda code: kept._execute_python_code(code, 0)["stdout"],
                lambda codes: [fresh._execute_python_code(code, i)["stdout"] for i, code in enumerate(codes)],
            )
        )
    try:
        from gem.tools.python_code_tool import PythonCodeTool
    except ImportError:
        pass
    else:
        tool = PythonCodeTool()

        def gem(code: str) -> str:
            return tool.execute_action(f"<python>{code}</python>")[2].removeprefix("Code execution result: ")

        found.append(System("gem", gem, None, lambda codes: [gem(code) for code in codes]))

    def plain(code: str) -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    cleanup.append(pool.shutdown)
    found.append(System("python -c", plain, None, lambda codes: list(pool.map(plain, codes))))
    return found


def checked(system: System, got: list[str], expected: list[str]) -> None:
    if [text.strip() for text in got] != expected:
        raise SystemExit(f"{system.name} answered {got[:2]} instead of {expected[:2]}")


def measure(found: list[System], repeats: int, calls: int, batches: int) -> None:
    number = 10_000
    for repeat in range(-1, repeats):  # the first round only warms up
        for system in found:
            for kind, run in (("fresh", system.fresh), ("session", system.kept)):
                for _ in range(calls if repeat >= 0 else 3):
                    if run is not None:
                        number += 1
                        code, expected = program(number)
                        start = time.perf_counter()
                        got = run(code)
                        taken = time.perf_counter() - start
                        checked(system, [got], [expected])
                        if repeat >= 0:
                            system.times[kind].append(taken)
            if repeat >= 0 and system.rows is not None:
                for _ in range(batches):
                    rows = [program(number + i) for i in range(ROWS)]
                    number += ROWS
                    start = time.perf_counter()
                    answers = system.rows([code for code, _ in rows])
                    taken = time.perf_counter() - start
                    checked(system, answers, [expected for _, expected in rows])
                    system.times["rows"].append(ROWS / taken)


def summary(system: System) -> dict[str, float | None]:
    def at(values: list[float], part: float) -> float | None:
        return sorted(values)[int(part * (len(values) - 1))] * 1e3 if values else None

    times = system.times
    return {
        "fresh_ms": at(times["fresh"], 0.5),
        "fresh_p90_ms": at(times["fresh"], 0.9),
        "session_ms": at(times["session"], 0.5),
        "session_p90_ms": at(times["session"], 0.9),
        "rows_per_s": statistics.median(times["rows"]) if times["rows"] else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args()
    cleanup: list[Callable[[], Any]] = []
    try:
        found = systems(cleanup)
        repeats, calls = (2, 15) if options.quick else (5, 60)
        measure(found, repeats, calls, 1 if options.quick else 2)
    finally:
        for end in cleanup:
            end()
    result = {system.name: summary(system) for system in found}
    load = os.getloadavg()[0]
    if options.json:
        print(json.dumps({"cores": len(os.sched_getaffinity(0)), "load": load, "systems": result}))
        return
    print(f"{len(os.sched_getaffinity(0))} cores, load average {load:.1f}, rows: batches of {ROWS}\n")
    print(f"{'':<12}{'fresh ms':>10}{'p90':>8}{'session ms':>12}{'p90':>8}{'rows/s':>9}")
    for name, figures in result.items():
        cells = [f"{value:.2f}" if value is not None else "-" for value in figures.values()]
        print(f"{name:<12}{cells[0]:>10}{cells[1]:>8}{cells[2]:>12}{cells[3]:>8}{cells[4]:>9}")


if __name__ == "__main__":
    main()
