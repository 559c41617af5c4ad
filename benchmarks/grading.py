"""What one grade costs, and what a grade that never ends costs the others.

    pip install 'torchrl_chat[math]' pebble && python benchmarks/grading.py [--quick] [--json]

Answers to problems like those of MATH are compared with their references. Five ways:

- ours: ``MathVerifier.quick`` in the caller's process; the rows that it leaves open go to a ``VerifierPool``, with the
  deadline in force.
- math-verify (on PyPI): ``verify(parse(reference), parse(response))`` in the caller's
  process, with its own time limits as shipped (an alarm signal, five seconds: main thread only).
- math-verify, no limit: the same with the limits off.
- fork a grade: a forked process for every grade, its verdict read from a pipe, killed at the deadline; as many at a
  time as there are cores.
- pebble (on PyPI): ``ProcessPool.map`` with the deadline as its timeout, one row a task, since
  its timeout is the task's. An optional peer: without it the column is empty.

Measured is each workload on one core (the process and its children are bound to it; "per core") and on all of them
("total"), in grades a second: the median of the repeats. The ratios are to math-verify as shipped, per core.

Then the hostile batch: 256 grades, of which 16 never return, all by the same function (math-verify without its limits,
and an endless loop where the answer says so), so that only the pools differ. Math-verify alone has no answer to
those: its alarm covers its own calls only. Last, memory and start-up of the workers, from /proc/PID/smaps_rollup:
all that is resident, the proportional share (PSS), and what is the worker's alone.

How it is kept fair: all systems get the same rows, made before the clock starts. No two rows of a run are alike, and
each repeat has new ones, so that nobody profits from a cache of answers. Half of the answers are wrong. Every
system is started and has graded some rows of every workload before the clock starts; start-up is measured by itself.
Repeats go round the systems, so that a noisy moment hits all of them. Verdicts are compared with math-verify's, and
where they differ, the table says so. In processes that are killed math-verify runs without its limits, which are
a cost that they do not need.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import logging
import os
import random
import select
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from math_verify import parse, verify

from torchrl_chat.rewards import GSM8KVerifier, MathVerifier, VerifierPool

Row = tuple[str, str]
SYSTEMS = ("ours", "math-verify", "math-verify, no limit", "fork a grade", "pebble")
HANG = "never"
ROWS, HOSTILE = 256, 16


# ---------------------------------------------------------------------- workloads
def solution(draw: random.Random, answer: str) -> str:
    """A response of about 60 words that ends with the boxed answer."""
    steps = [
        f"We know that $x_{{{draw.randint(1, 9)}}} = {draw.randint(2, 99)}$, so the next term follows from it.",
        "Both sides are divided by the same factor, which is not zero, and the terms are collected.",
        f"That leaves $\\frac{{{draw.randint(1, 9)}}}{{{draw.randint(2, 9)}}}$ of the whole, as {draw.randint(2, 99)} shows.",
        "Adding what was found before gives the result that the problem asks for.",
    ]
    draw.shuffle(steps)
    return " ".join(steps) + f" Therefore the answer is $\\boxed{{{answer}}}$."


def integers(draw: random.Random, right: bool) -> Row:
    number = draw.randint(-(10**6), 10**6)
    return str(number if right else number + draw.randint(1, 9)), str(number)


def rationals(draw: random.Random, right: bool) -> Row:
    above, below = draw.randint(1, 9999), draw.choice((2, 4, 5, 8, 16, 20, 25, 40))
    decimal = f"{above / below + (0 if right else 1):.6f}".rstrip("0").rstrip(".")
    spelled = (decimal, f"\\frac{{{above * 3 + (0 if right else 1)}}}{{{below * 3}}}")
    return draw.choice(spelled), draw.choice((f"\\frac{{{above}}}{{{below}}}", f"{above}/{below}"))


def surds(draw: random.Random, right: bool) -> Row:
    factor, root, below = draw.randint(2, 99), draw.choice((2, 3, 5, 6, 7, 10, 11, 13)), draw.randint(2, 99)
    wrong = 0 if right else draw.randint(1, 5)
    if draw.random() < 0.5:
        return f"\\sqrt{{{factor**2 * root + wrong}}}", f"{factor}\\sqrt{{{root}}}"
    return (
        f"\\frac{{{factor + wrong}\\sqrt{{{root}}}}}{{{below}}}",
        f"\\frac{{{factor}}}{{{below}}}\\sqrt{{{root}}}",
    )


def sums(draw: random.Random, right: bool) -> Row:
    a, b, root = draw.randint(1, 999), draw.randint(2, 99), draw.choice((2, 3, 5, 6, 7, 10))
    wrong = 0 if right else draw.randint(1, 5)
    return f"{a + wrong}+{b}\\sqrt{{{root}}}", f"\\sqrt{{{b * b * root}}}+{a}"


def mixed(draw: random.Random, right: bool) -> Row:
    """Tuples, vectors, intervals, sets, polynomials, equations, trigonometry, percentages."""
    a, b, c = (draw.randint(2, 99) for _ in range(3))
    d = c if right else c + draw.randint(1, 9)
    forms = [
        (f"\\left({a},\\frac{{{2 * b}}}{{{2 * d}}}\\right)", f"({a}, \\frac{{{b}}}{{{c}}})"),
        (
            f"\\begin{{pmatrix}}{a}\\\\{d}\\end{{pmatrix}}",
            f"\\begin{{pmatrix}} {a} \\\\ {c} \\end{{pmatrix}}",
        ),
        (f"[{-a}, {d}) \\cup ({d + a}, \\infty)", f"[-{a},{c})\\cup({c + a},\\infty)"),
        (f"\\{{{d}, {-a}, {b}\\}}", f"\\{{{b},{c},{-a}\\}}"),
        (f"{a}x^2+{b}x+{d}", f"{c}+{b}x+{a}x^{{2}}"),
        (f"(x+{a})(x+{d})", f"x^2+{a + c}x+{a * c}"),
        (f"y={a}x+{d}", f"y = {c} + {a}x"),
        (f"\\frac{{{a}\\pi}}{{{b}}}+{d}", f"{c}+{a}\\pi/{b}"),
        (f"{a}+{d}i", f"{c}i+{a}"),
        (f"\\frac{{x+{a}}}{{x-{d}}}", f"\\frac{{{a}+x}}{{-{c}+x}}"),
        (f"{d}^{{{b}}}", f"{c}^{b}" if b < 10 else f"{c}^{{{b}}}"),
        (f"{a}\\log({d})", f"{a} \\log {c}"),
    ]
    return draw.choice(forms)


WORKLOADS: dict[str, Callable[[random.Random, bool], Row]] = {
    "integers": integers,
    "decimals, fractions": rationals,
    "surds": surds,
    "sums of surds": sums,
    "mixed LaTeX": mixed,
}


def rows_of(workload: str, count: int, seed: int) -> list[Row]:
    """Rows that are all different, every other one right."""
    draw = random.Random(f"{workload} {seed}")
    seen: dict[Row, None] = {}
    while len(seen) < count:
        seen[WORKLOADS[workload](draw, len(seen) % 2 == 0)] = None
    return [(solution(draw, answer), reference) for answer, reference in seen]


# ---------------------------------------------------------------------- the systems
def limited(response: str, reference: str) -> bool:
    return verify(parse(f"${reference}$"), parse(response))


def unlimited(response: str, reference: str) -> bool:
    golden, answer = (parse(text, parsing_timeout=None) for text in (f"${reference}$", response))
    return verify(golden, answer, timeout_seconds=None)


class UnlimitedOrNever:
    """The hostile batch's grade, the same for all pools."""

    def warm(self) -> None:
        """Once before workers are forked; what the other pools fork from has been used as well."""
        quiet()
        self("$\\boxed{7}$", "7")

    def __call__(self, response: str, reference: str) -> bool:
        """Grade, or never return."""
        while response == HANG:
            pass
        return unlimited(response, reference)


def quiet() -> None:
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns that its limits are off; here that is on purpose


def run_forks(grade: Callable[..., bool], rows: Sequence[Row], deadline: float, cores: int) -> list[bool | None]:
    """A process a grade, ``cores`` at a time."""
    verdicts: list[bool | None] = [None] * len(rows)
    waiting = iter(range(len(rows)))
    running: dict[int, tuple[int, int, float]] = {}  # by its pipe: the row, the process, when it is late
    while True:
        while len(running) < cores and (row := next(waiting, None)) is not None:
            near, there = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    os.write(there, b"1" if grade(*rows[row]) else b"0")
                finally:
                    os._exit(0)
            os.close(there)
            running[near] = row, pid, time.monotonic() + deadline
        if not running:
            return verdicts
        first = min(late for _, _, late in running.values())
        for near in select.select([*running], [], [], max(0.0, first - time.monotonic()))[0]:
            row, pid, _ = running.pop(near)
            word = os.read(near, 1)
            verdicts[row] = None if not word else word == b"1"
            os.close(near)
            os.waitpid(pid, 0)
        for near, (_, pid, late) in list(running.items()):
            if time.monotonic() >= late:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                os.close(near)
                del running[near]


def run_pebble(pool: Any, grade: Callable[..., bool], rows: Sequence[Row], deadline: float) -> list[bool | None]:
    results = pool.map(grade, *zip(*rows, strict=True), chunksize=1, timeout=deadline).result()
    verdicts: list[bool | None] = []
    for _ in rows:
        try:
            verdicts.append(next(results))
        except TimeoutError:
            verdicts.append(None)
    return verdicts


def run_ours(verifier: MathVerifier, pool: VerifierPool, rows: Sequence[Row]) -> list[bool | None]:
    """What is easy here, the rest in the pool."""
    verdicts = [verifier.quick(*row) for row in rows]
    hard = [i for i, verdict in enumerate(verdicts) if verdict is None]
    for i, outcome in zip(hard, pool.map([rows[i] for i in hard]), strict=True):
        verdicts[i] = outcome.value
    return [None if verdict is None else verdict.correct for verdict in verdicts]


@contextlib.contextmanager
def systems(deadline: float) -> Iterator[dict[str, Callable[[Sequence[Row]], list[bool | None]]]]:
    """All that are installed, on the cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        verifier = MathVerifier()
        pool = stack.enter_context(VerifierPool(verifier, workers=cores, deadline=deadline)).start()
        found: dict[str, Callable[[Sequence[Row]], list[bool | None]]] = {
            "ours": lambda rows: run_ours(verifier, pool, rows),
            "math-verify": lambda rows: [limited(*row) for row in rows],
            "math-verify, no limit": lambda rows: [unlimited(*row) for row in rows],
            "fork a grade": lambda rows: run_forks(unlimited, rows, deadline, cores),
        }
        try:
            from pebble import ProcessPool
        except ImportError:
            pass
        else:
            peer = stack.enter_context(ProcessPool(max_workers=cores))
            found["pebble"] = lambda rows: run_pebble(peer, unlimited, rows, deadline)
        yield found


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Bind the process, and what it starts, to a single core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


# ---------------------------------------------------------------------- measuring
def measure(count: int, repeats: int, deadline: float, base: int) -> dict[str, dict[str, Any]]:
    """Grades a second of each system, and how often its verdict is not math-verify's, by workload."""
    spent: dict[str, dict[str, list[float]]] = {w: {} for w in WORKLOADS}
    apart: dict[str, dict[str, list[str]]] = {w: {} for w in WORKLOADS}
    with systems(deadline) as running:
        for workload in WORKLOADS:
            for run in running.values():
                run(rows_of(workload, 32, base - 1))
        gc.collect()
        gc.freeze()  # or every system pays for scanning the interpreter's own objects
        for repeat in range(repeats):
            for workload in WORKLOADS:
                rows = rows_of(workload, count, base + repeat)
                verdicts: dict[str, list[bool | None]] = {}
                for name, run in running.items():
                    gc.collect()
                    start = time.perf_counter()
                    verdicts[name] = run(rows)
                    spent[workload].setdefault(name, []).append((time.perf_counter() - start) / count)
                for name, found in verdicts.items():
                    apart[workload].setdefault(name, []).extend(
                        f"{row[0].rpartition('boxed')[2]} for {row[1]}: {mine}, math-verify {theirs}"
                        for row, mine, theirs in zip(rows, found, verdicts["math-verify"], strict=True)
                        if mine != theirs
                    )
        gc.unfreeze()
    return {
        workload: {
            name: {"rate": 1 / statistics.median(times), "apart": apart[workload][name]}
            for name, times in spent[workload].items()
        }
        for workload in WORKLOADS
    }


def hostile(deadline: float) -> dict[str, Any]:
    """Seconds until a batch with grades that never end is back, and whether the other rows are right."""
    rows = rows_of("integers", ROWS, -1)
    for i in range(HOSTILE):
        rows[i * (ROWS // HOSTILE) + 5] = (HANG, "1")
    expected = [None if row[0] == HANG else i % 2 == 0 for i, row in enumerate(rows)]
    cores, grade = len(os.sched_getaffinity(0)), UnlimitedOrNever()
    grade.warm()
    found = {}

    def clock(name: str, run: Callable[[], list[bool | None]]) -> None:
        start = time.perf_counter()
        verdicts = run()
        found[name] = {"seconds": time.perf_counter() - start, "right": verdicts == expected}

    with VerifierPool(grade, workers=cores, deadline=deadline) as pool:
        pool.start().map(rows_of("integers", 8, -2))
        clock("ours", lambda: [outcome.value for outcome in pool.map(rows)])
    clock("fork a grade", lambda: run_forks(grade, rows, deadline, cores))
    with contextlib.suppress(ImportError):
        from pebble import ProcessPool

        with ProcessPool(max_workers=cores) as peer:
            run_pebble(peer, grade, rows_of("integers", 8, -2), deadline)
            clock("pebble", lambda: run_pebble(peer, grade, rows, deadline))
    return found


def footprint(verifier: Any, row: Row, repeats: int) -> dict[str, float]:
    """Milliseconds and megabytes of a pool's processes: medians."""
    found: dict[str, list[float]] = {}

    def note(**figures: float) -> None:
        for key, value in figures.items():
            found.setdefault(key, []).append(value)

    for _ in range(repeats):
        with VerifierPool(verifier, workers=2) as pool:
            start = time.perf_counter()
            pool.map([row])
            first = time.perf_counter() - start
            start = time.perf_counter()
            pool.start()  # one worker is there: this is the second
            note(first_ms=first * 1e3, fork_ms=(time.perf_counter() - start) * 1e3)
            pool.map([row] * 64)
            nursery, *workers = pool.processes()
            for worker in workers:
                memory = resident(worker)
                private = memory["Private_Clean"] + memory["Private_Dirty"]
                note(worker_rss_mb=memory["Rss"], worker_pss_mb=memory["Pss"], worker_private_mb=private)
            note(nursery_rss_mb=resident(nursery)["Rss"])
    return {key: statistics.median(values) for key, values in found.items()}


def resident(pid: int) -> dict[str, float]:
    """Megabytes by kind."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        lines = [line.split() for line in file if line.endswith("kB\n")]
    return {words[0].rstrip(":"): int(words[1]) / 1000 * 1.024 for words in lines}


def criteria(
    per_core: dict[str, Any], batch: dict[str, Any], deadline: float, light: dict[str, float]
) -> dict[str, Any]:
    """What is promised, and what was measured."""

    def times(workload: str) -> float:
        return per_core[workload]["ours"]["rate"] / per_core[workload]["math-verify"]["rate"]

    surd = min(times("surds"), times("sums of surds"))
    late = batch["ours"]["seconds"] - deadline
    return {
        "integers, at least 10 times math-verify": (times("integers") >= 10, f"{times('integers'):.1f}"),
        "surds, at least 1 time": (surd >= 1, f"{surd:.2f} (the sums, or the products: the lower)"),
        "hostile batch, at most 1 s after the deadline": (
            late <= 1 and batch["ours"]["right"],
            f"{late:.2f} s after",
        ),
        "GSM8K worker, below 60 MB": (light["worker_rss_mb"] < 60, f"{light['worker_rss_mb']:.1f} MB"),
        "GSM8K pool, first grade within 150 ms": (light["first_ms"] < 150, f"{light['first_ms']:.0f} ms"),
    }


# ---------------------------------------------------------------------- output
def print_rates(title: str, table: dict[str, dict[str, Any]], ratios: bool) -> None:
    print(f"{title:22s}" + "".join(f"{name:>{max(14, len(name) + 2)}s}" for name in SYSTEMS))
    for workload, found in table.items():
        cells = []
        for name in SYSTEMS:
            width = max(14, len(name) + 2)
            if name not in found:
                cells.append(f"{'-':>{width}s}")
                continue
            ratio = found[name]["rate"] / found["math-verify"]["rate"]
            cells.append(f"{found[name]['rate']:,.0f}" + (f" {ratio:5.1f}x" if ratios else ""))
            cells[-1] = f"{cells[-1]:>{width}s}"
        print(f"{workload:22s}" + "".join(cells))
    print(flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and repetitions, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    quiet()
    count, repeats, deadline = (32, 2, 1.0) if args.quick else (128, 5, 3.0)
    cores = len(os.sched_getaffinity(0))
    with one_core():
        per_core = measure(count, repeats, 10.0, base=1)
    if not args.json:
        print_rates("grades/s, one core", per_core, ratios=True)
    total = measure(count, repeats, 10.0, base=1001)
    if not args.json:
        print_rates(f"grades/s, {cores} cores", total, ratios=False)
    batch = hostile(deadline)
    gsm8k = footprint(GSM8KVerifier(), ("#### 7", "#### 7"), repeats)
    grader = footprint(MathVerifier(), ("\\boxed{x+1}", "1+x"), repeats)
    promised = criteria(per_core, batch, deadline, gsm8k)
    if args.json:
        result = {
            "unit": "grades a second",
            "cores": cores,
            "math-verify": importlib.metadata.version("math-verify"),
            "pebble": version("pebble"),
            "per core": per_core,
            "total": total,
            "hostile": {"deadline": deadline, "rows": ROWS, "hanging": HOSTILE} | batch,
            "GSM8K workers": gsm8k,
            "MATH workers": grader,
            "criteria": {key: {"met": met, "measured": figure} for key, (met, figure) in promised.items()},
        }
        print(json.dumps(result))
        return
    print(f"{ROWS} grades, {HOSTILE} of which never return; deadline {deadline:g} s, {cores} cores:")
    for name in SYSTEMS:
        if name in batch:
            right = "the others right" if batch[name]["right"] else "THE OTHERS WRONG"
            print(f"  {name:22s}{batch[name]['seconds']:7.2f} s, {right}")
    print("\nWorkers:" + " " * 14 + "first grade   one more   resident    PSS   own   nursery")
    for name, f in (("GSM8K", gsm8k), ("MATH", grader)):
        print(
            f"  {name:19s}{f['first_ms']:8.0f} ms {f['fork_ms']:7.1f} ms {f['worker_rss_mb']:7.1f} MB"
            f"{f['worker_pss_mb']:7.1f}{f['worker_private_mb']:6.1f}{f['nursery_rss_mb']:7.1f} MB"
        )
    print(f"\nVerdicts that are not those of math-verify {importlib.metadata.version('math-verify')}:")
    for name in SYSTEMS:
        found = [
            text for table in (per_core, total) for w in table.values() if name in w for text in w[name]["apart"]
        ]
        if name in per_core["integers"] and name != "math-verify":
            print(f"  {name:22s}" + (f"{len(found)}, e.g. {found[0]}" if found else "none"))
    print(
        "\nCriteria: " + "; ".join(f"{k}: {'yes' if met else 'NO'}, {v}" for k, (met, v) in promised.items()) + "."
    )


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
