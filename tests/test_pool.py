"""The verifier pool under hostile grades, hostile parents and hostile luck."""

from __future__ import annotations

import asyncio
import gc
import itertools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import pytest
from conftest import forked

from torchrl_chat.rewards import MathVerifier, NumberVerifier, PoolError, VerifierPool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

DEADLINE = 1.5  # for grades that never end
AMPLE = 60.0  # for all others: what is at work on this machine must not make them late
TESTS = str(Path(__file__).parent)


# ---------------------------------------------------------------------- verifiers, imported by workers
def act(what, reference=None):
    """Do what the response says; an int is returned as it is."""
    return what if isinstance(what, int) else HOSTILE[what]()


def spin():
    while True:
        pass


def sleep_deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(3600)


def deep():
    return 1 + deep()


def fill(size):
    """Take more and more memory, as much as there is."""
    held = []
    while True:
        held.append(bytes(size))


def fork_twice():
    """A grade that forks, and returns in both processes."""
    os.fork()
    return -1


def fork_and_hang():
    for _ in range(2):
        if os.fork() == 0:
            if os.fork() == 0:
                os.setsid()
            time.sleep(3600)
    time.sleep(3600)


def leave_child_and_die():
    if os.fork() == 0:
        os.setsid()
        time.sleep(3600)
    os._exit(0)


def quit_code():
    sys.exit(3)


def interrupt():
    raise KeyboardInterrupt


class BadText(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def bad_text():
    raise BadText


class Unreadable:
    def __reduce__(self):
        return (int, ("not a number",))


class QuitsWhenRead:
    """A verdict that calls sys.exit in the process that reads it."""

    def __reduce__(self):
        return (sys.exit, (3,))


HOSTILE = {
    "spin": spin,
    "sleep": lambda: time.sleep(3600),
    "sleep deaf": sleep_deaf,
    "exit": lambda: os._exit(1),
    "abort": lambda: os.abort(),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "8 GB": lambda: bytearray(8 << 30),
    "list": lambda: fill(1 << 20),
    "100 MB": lambda: "x" * (100 << 20),
    "deep": deep,
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "in C": lambda: sum(itertools.repeat(0)),  # no bytecode in between, where Python would look for signals
    "lambda": lambda: lambda: 1,
    "generator": lambda: (x for x in ()),
    "unreadable": Unreadable,
    "sys.exit": quit_code,
    "sys.exit when read": QuitsWhenRead,
    "interrupt": interrupt,
    "bad text": bad_text,
    "fork twice": fork_twice,
    "fork and hang": fork_and_hang,
    "leave a child": leave_child_and_die,
}


def modules(*_):
    return sorted(sys.modules)


def length(response, reference):
    return len(response)


def pid_of(*_):
    return os.getpid()


async def later(response, reference):
    await asyncio.sleep(0.001)
    return float(response == reference)


def slowly(number):
    time.sleep(0.3 if number % 50 == 0 else 0.002)
    return number * 2


# ---------------------------------------------------------------------- what is left in the system
def alive_with(mark: str) -> list[int]:
    """Processes, other than this one and zombies, that were started under the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def soon(holds, within: float = 60.0) -> bool:
    """Whether something holds, now or after a while: what would never come by itself is waited for in vain."""
    end = time.monotonic() + within
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def gone(mark: str) -> bool:
    """Whether no process under the mark is left, or soon none. Those that hang sleep for an hour."""
    return soon(lambda: not alive_with(mark))


def seconds_of(pool: VerifierPool, calls: list) -> float:
    start = time.monotonic()
    pool.map(calls)
    return time.monotonic() - start


def memory(pid="self", key="Rss") -> int:
    """Bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(key)


@pytest.fixture
def mark(monkeypatch):
    """A mark in the environment of all that the test starts; nothing under it may outlive the test."""
    multiprocessing.resource_tracker.ensure_running()  # these two outlive their users, and that is as it should be
    multiprocessing.forkserver.ensure_running()
    mark = f"pool-test-{uuid.uuid4()}"
    monkeypatch.setenv("POOL_TEST_MARK", mark)
    yield mark
    gc.collect()
    left = [] if gone(mark) else alive_with(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture
def pool(mark):
    with VerifierPool(act, workers=2, deadline=DEADLINE) as pool:
        pool.map([(0,)])
        yield pool
    assert gone(mark)


def run_script(tmp_path, text, *args, **kwargs):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return subprocess.Popen([sys.executable, str(path), *args], stdout=subprocess.PIPE, text=True, **kwargs)


# ---------------------------------------------------------------------- hostile grades
KINDS = {
    "spin": "timeout",
    "sleep": "timeout",
    "sleep deaf": "timeout",
    "stop": "timeout",
    "fork and hang": "timeout",
    "exit": "crash",
    "abort": "crash",
    "kill": "crash",
    "8 GB": "memory",
    "list": "memory",
    "100 MB": "error: ValueError: the verdict has",
    "deep": "error: RecursionError",
    "segfault": "crash",
    "in C": "timeout",
    "lambda": "error",
    "generator": "error: TypeError",
    "unreadable": "error: the verdict cannot be read: ValueError",
    "sys.exit": "error: SystemExit: 3",
    "sys.exit when read": "error: the verdict cannot be read: SystemExit: 3",
    "interrupt": "error: KeyboardInterrupt",
    "bad text": ("error", "crash"),
    "leave a child": "timeout",  # the child holds the worker's socket
}


@pytest.mark.parametrize("what", KINDS)
def test_a_hostile_grade_costs_its_own_row(pool, mark, what):
    pool.deadline = DEADLINE if KINDS[what] == "timeout" else AMPLE
    outcomes = pool.map([(1,), (what,), (2,), (3,)])
    assert [o.value for o in outcomes] == [1, None, 2, 3]
    assert outcomes[1].failure.startswith(KINDS[what])
    assert [o.failure for o in outcomes[::2]] == [None, None]
    assert pool.failures == {outcomes[1].failure.partition(":")[0]: 1}
    assert pool.map([(7,), (8,)]) == [(7, None), (8, None)]


def test_a_grade_that_forks_answers_once(pool):
    calls = [("fork twice",) if i % 3 == 0 else (i,) for i in range(60)]
    outcomes = pool.map(calls)
    assert [o.value for o in outcomes] == [-1 if i % 3 == 0 else i for i in range(60)]


def test_hostile_rows_in_a_batch(pool, mark):
    pool.deadline = 8.0  # beside grades that hang, the others are to die of what they do, not of the time
    kinds = [kind for kind in KINDS if kind not in ("list", "100 MB")][:16]  # these two take their time
    assert sum(KINDS[k] == "timeout" for k in kinds) >= 5
    calls = [(kinds[i // 16],) if i % 16 == 5 else (i,) for i in range(256)]
    own, nursery = memory(key="Rss"), memory(pool.processes()[0])
    outcomes = pool.map(calls)
    for i, outcome in enumerate(outcomes):
        if i % 16 == 5:
            assert outcome.value is None
            assert outcome.failure.startswith(KINDS[kinds[i // 16]])
        else:
            assert outcome == (i, None)
    assert memory(key="Rss") - own < 60 << 20
    assert memory(pool.processes()[0]) - nursery < 20 << 20
    assert len(pool.processes()) <= 1 + pool.workers
    assert all(memory(pid) < 100 << 20 for pid in pool.processes())


def test_sixteen_that_hang_cost_what_one_costs(pool):
    """In a row, two at a time, they would cost eight times as much."""
    one = seconds_of(pool, [("sleep",) if i == 5 else (i,) for i in range(256)])
    calls = [("sleep",) if i % 16 == 5 else (i,) for i in range(256)]
    start = time.monotonic()
    outcomes = pool.map(calls)
    assert (time.monotonic() - start) / one < 4
    assert [o.value for o in outcomes] == [None if i % 16 == 5 else i for i in range(256)]
    assert pool.failures == {"timeout": 17}


@pytest.mark.by_day(2, place=1)
def test_more_hang_than_there_are_spare_workers(mark):
    with VerifierPool(act, workers=2, deadline=4 * DEADLINE, spare=2) as pool:
        outcomes = pool.map([("sleep",) if i < 5 else (i,) for i in range(16)])
        assert [o.value for o in outcomes] == [None if i < 5 else i for i in range(16)]
        assert pool.failures == {"timeout": 5}


def test_slow_rows_are_graded_all_the_same(mark):
    with VerifierPool(slowly, workers=2, deadline=AMPLE) as pool:
        assert [o.value for o in pool.map([(i,) for i in range(300)])] == [2 * i for i in range(300)]


@pytest.mark.parametrize("size", [1, 60_000, 300_000, 100 << 20], ids=str)
def test_long_responses(mark, size):
    rows = 1 if size > 1 << 20 else 40
    with VerifierPool(length, workers=2, deadline=AMPLE) as pool:
        outcomes = pool.map([("x" * (size + i), "") for i in range(rows)] + [("ab", "")])
        assert [o.value for o in outcomes] == [*(size + i for i in range(rows)), 2]


def test_a_call_too_long_for_a_worker(mark):
    with VerifierPool(length, workers=1, memory_limit=64 << 20) as pool:
        outcomes = pool.map([("x" * (100 << 20), ""), ("x" * (33 << 20), ""), ("ab", "")])
        assert [o.failure and o.failure[:7] for o in outcomes] == ["memory:", "memory:", None]
        assert outcomes[2].value == 2


def test_arguments_that_do_not_pickle(pool):
    outcomes = pool.map([(1,), (threading.Lock(),), (2,)])
    assert [o.value for o in outcomes] == [1, None, 2]
    assert outcomes[1].failure.startswith("error: the call cannot be pickled: TypeError")


class OrNever(MathVerifier):
    """Mathematics, and a grade that never ends where the answer says so: as a library's would on some answers."""

    def _compare(self, found, expected):
        while found is not None and found.text == "never":
            time.sleep(0.01)
        return super()._compare(found, expected)


def test_mathematics_beside_grades_that_never_end(mark):
    """Grades by Math-Verify are right, whatever those beside them do."""
    pytest.importorskip("math_verify")
    good = ("\\boxed{x^2+2x+1}", "(x+1)^2"), ("\\boxed{x^2+2x+2}", "(x+1)^2")
    with VerifierPool(OrNever(), workers=2, deadline=AMPLE) as pool:
        thread, box = batch_in_thread(pool.start(), [("\\boxed{never}", "(x+1)^2")] * 4)
        assert soon(lambda: sum(run.slow for run in pool._runs) >= 2)  # as many as there are workers
        assert [outcome.value.correct for outcome in pool.map(good)] == [True, False]
        assert thread.is_alive()
        pool.deadline = DEADLINE
        pool.close()  # or they would take their time
        thread.join(60)
        assert len(box) == 1


# ---------------------------------------------------------------------- what can be called
def test_a_verifier_that_cannot_be_loaded(mark):
    class Lost:
        def __call__(self, *_):
            return 1

        def __reduce__(self):
            return (__import__, ("no_such_module_of_mine",))

    with pytest.raises(PoolError, match="cannot be loaded.*ModuleNotFoundError.*no_such_module_of_mine"):
        VerifierPool(Lost()).map([(1,)])

    class Dies(Lost):
        def __reduce__(self):
            return (os._exit, (1,))

    with pytest.raises(PoolError, match="ended without a word"):
        VerifierPool(Dies()).map([(1,)])


@pytest.mark.parametrize("name", ["workers", "deadline", "memory_limit"])
def test_arguments_must_be_positive(name):
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            VerifierPool(act, **{name: value})
    with pytest.raises(ValueError, match="spare is -1"):
        VerifierPool(act, spare=-1)


def test_without_a_limit(mark):
    with VerifierPool(act, workers=1, deadline=float("inf"), memory_limit=None) as pool:
        assert pool.map([(1,), (2,)]) == [(1, None), (2, None)]
        assert pool.map([]) == []
    with VerifierPool(slowly, workers=1, deadline=float("inf")) as pool:
        assert pool.map([(50,)]) == [(100, None)]


def test_lambdas_and_closures(mark):
    number = 40
    with VerifierPool(lambda a, b: a + b + number, workers=1) as pool:
        assert pool.map([(1, 1)]) == [(42, None)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_coroutine_function(mark, workers):
    with VerifierPool(later, workers=workers) as pool:
        assert [o.value for o in pool.map([("a", "a"), ("a", "b")] * 20)] == [1.0, 0.0] * 20


def test_workers_are_light(mark):
    with VerifierPool(NumberVerifier(), workers=2) as pool:
        pool.start()
        sizes = [memory(pid, "Rss") for pid in pool.processes()]
    assert max(sizes) < 60 << 20
    with VerifierPool(modules, workers=1) as pool:  # this file's own imports come first
        found = set(pool.map([()])[0].value)
    assert not {"transformers", "tensordict", "torchrl"} & found


SCRIPT = """
import os, sys, time
import heavy_fake_module

OFFSET = 40

class Grade:
    def __call__(self, response, reference):
        return response + OFFSET

def grade(response, reference):
    if response == "hang":
        time.sleep(3600)
    return sorted(sys.modules) if response == "modules" else response + OFFSET

if __name__ == "__main__":
    from torchrl_chat.rewards import VerifierPool
    pool = VerifierPool(grade, workers=2, deadline=60.0)
    mode = sys.argv[1]
    if mode == "modules":
        with VerifierPool(Grade(), workers=1) as other:
            assert other.map([(2, "")])[0].value == 42
        found = pool.map([("modules", ""), (2, "")])
        assert found[1].value == 42, found
        heavy = {"heavy_fake_module", "torch", "transformers", "numpy"} & set(found[0].value)
        print("heavy:", sorted(heavy))
    elif mode == "exit":
        print(pool.map([(2, "")])[0].value)
    else:
        pool.start()
        print("ready", flush=True)
        pool.map([("hang", "")] * 8)
"""


@pytest.fixture
def heavy(tmp_path, monkeypatch, mark):
    (tmp_path / "heavy_fake_module.py").write_text("import time\ntime.sleep(0.2)\nLOADED = True\n")
    return tmp_path


def test_the_main_module_is_not_imported_in_workers(heavy):
    with run_script(heavy, SCRIPT, "modules") as process:
        assert process.communicate(timeout=120)[0] == "heavy: []\n"
        assert process.returncode == 0


def test_a_script_that_closes_nothing_ends(heavy, mark):
    with run_script(heavy, SCRIPT, "exit") as process:
        assert process.communicate(timeout=120)[0] == "42\n"
    assert gone(mark)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_parent_that_is_stopped_while_grades_hang(heavy, mark, signum):
    with run_script(heavy, SCRIPT, "hang", stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == "ready\n"
        assert soon(lambda: len(alive_with(mark)) >= 4)  # the script, the nursery, two workers
        process.send_signal(signum)
        process.wait(60)
        assert process.returncode != 0
        assert gone(mark)


# ---------------------------------------------------------------------- processes and threads
def test_eight_threads(pool):
    results = {}

    def use(thread):
        results[thread] = pool.map([(thread * 1000 + i,) for i in range(200)])

    threads = [threading.Thread(target=use, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == {t: [(t * 1000 + i, None) for i in range(200)] for t in range(8)}
    assert len(pool.processes()) <= 1 + pool.workers


def test_a_thread_gets_on_while_others_hang(pool):
    pool.deadline = 6.0
    hung = threading.Thread(target=pool.map, args=([("sleep",)] * 6,))
    hung.start()
    assert soon(lambda: len(pool._runs) >= 2)  # as many as there are workers
    assert pool.map([(i,) for i in range(100)]) == [(i, None) for i in range(100)]
    assert hung.is_alive()  # they did not wait for those that hang
    hung.join(60)
    assert pool.failures == {"timeout": 6}


def in_a_child(pool, queue, mark):
    os.environ["POOL_TEST_MARK"] = mark
    queue.put(pool.map([(i,) for i in range(50)] + [("exit",)]))


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
@pytest.mark.parametrize("daemon", [False, True], ids=["", "daemon"])
@pytest.mark.by_day(2)
def test_in_a_child_of_multiprocessing(pool, mark, method, daemon):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=in_a_child, args=(pool, queue, mark), daemon=daemon)
    child.start()
    try:
        outcomes = queue.get(timeout=120)
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()  # this process would wait for one that hangs before it ends
    assert [o.value for o in outcomes] == [*range(50), None]
    assert pool.map([(5,)]) == [(5, None)]


MAIN = """
import multiprocessing, sys
from torchrl_chat.rewards import VerifierPool

def grade(response, reference):
    return response + helper()

def helper():
    return 40

def child(queue):
    with VerifierPool(grade, workers=1) as pool:
        queue.put(pool.map([(2, "")])[0])

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,), daemon=True)
    process.start()
    print(tuple(queue.get(timeout=100)))
    process.join()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_function_of_main_in_a_child_of_multiprocessing(tmp_path, mark, method):
    with run_script(tmp_path, MAIN, method) as process:
        assert process.communicate(timeout=120)[0] == "(42, None)\n"


def test_after_a_fork(pool):
    before = pool.processes()

    def work():
        good = pool.map([(1,), ("exit",), (2,)])
        apart = not set(pool.processes()) & set(before)
        pool.close()
        return apart and [o.value for o in good] == [1, None, 2]

    assert forked(work) == 0
    assert pool.processes() == before
    assert pool.map([(3,)]) == [(3, None)]


def test_a_fork_while_a_thread_holds_the_locks(pool):
    with pool._start, pool._nursery.lock:  # as another thread might, at the moment of the fork
        assert forked(lambda: pool.map([(1,)]) == [(1, None)]) == 0
    assert pool.map([(3,)]) == [(3, None)]


def test_close_while_a_forked_copy_lives(mark):
    pool = VerifierPool(act, workers=1).start()
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    try:
        nursery = pool.processes()
        pool.close()
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # the copy, which sleeps, was not waited for
        assert not [p for p in nursery if Path(f"/proc/{p}/stat").exists() and p in alive_with(mark)]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_pickled_and_closed_pools_start_anew(pool):
    copy = pickle.loads(pickle.dumps(pool))
    with copy:
        assert copy.map([(1,), ("exit",)])[0] == (1, None)
        assert copy.deadline == pool.deadline
        assert not set(copy.processes()) & set(pool.processes())
    assert pool.failures == {}
    for _ in range(2):
        pool.close()
        pool.close()
        assert pool.processes() == []
        assert pool.map([(2,)]) == [(2, None)]


def test_a_pool_that_is_dropped(mark):
    pool = VerifierPool(act, workers=2).start()
    assert len(alive_with(mark)) == 3
    del pool
    gc.collect()
    assert gone(mark)


def test_closed_by_another_thread_during_a_batch(pool, mark):
    closer = threading.Timer(0.3, pool.close)
    closer.start()
    outcomes = pool.map([("sleep",) if i == 3 else (i,) for i in range(40)])
    closer.join()
    assert [o.value for o in outcomes] == [None if i == 3 else i for i in range(40)]


# ---------------------------------------------------------------------- killed from outside
def batch_in_thread(pool, calls):
    box = []

    def work():
        try:
            box.append(pool.map(calls))
        except PoolError as error:
            box.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, box


def test_the_nursery_is_killed_during_a_batch(mark):
    with VerifierPool(slowly, workers=2, deadline=AMPLE) as pool:
        first = pool.start().processes()[0]
        thread, box = batch_in_thread(pool, [(i,) for i in range(1, 600)])
        time.sleep(0.25)
        os.kill(first, signal.SIGKILL)
        thread.join(120)
        assert [o.value for o in box[0]] == [2 * i for i in range(1, 600)]
        assert pool.processes()[0] != first


def test_the_nursery_is_killed_between_batches(pool):
    os.kill(pool.processes()[0], signal.SIGKILL)
    assert pool.map([(i,) for i in range(20)]) == [(i, None) for i in range(20)]


def test_a_nursery_that_dies_again_and_again(mark, monkeypatch):
    with VerifierPool(act, workers=2) as pool:
        fork = type(pool.start()._nursery).fork

        def shot(nursery):
            nursery.process.kill()
            nursery.process.wait()
            return fork(nursery)

        pool.close()
        monkeypatch.setattr("torchrl_chat.rewards.worker.Nursery.fork", shot)
        with pytest.raises(PoolError, match="die as soon as they start"):
            pool.map([(1,)])


def is_running(pid: int) -> bool:
    """Whether a process is there, and more than what is left of one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_idle_workers_are_killed(mark):
    with VerifierPool(act, workers=8) as pool:
        workers = pool.start().processes()[1:]
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        while any(map(is_running, workers)):  # on a busy machine it takes a while to die
            time.sleep(0.01)
        assert pool.map([(i,) for i in range(64)]) == [(i, None) for i in range(64)]


def test_a_busy_worker_is_killed(mark):
    with VerifierPool(slowly, workers=1, deadline=AMPLE) as pool:
        victim = pool.start().processes()[1]
        thread, box = batch_in_thread(pool, [(i,) for i in range(1, 200)])
        time.sleep(0.1)
        os.kill(victim, signal.SIGKILL)
        thread.join(120)
        wrong = [(i, o) for i, o in enumerate(box[0], 1) if o.value != 2 * i]
        assert len(wrong) <= 1
        assert all(o.failure.startswith("crash") and o.value is None for _, o in wrong)


def test_workers_are_reused_and_replaced(mark, monkeypatch):
    monkeypatch.setattr("torchrl_chat.rewards.pool._CALLS", 50)
    with VerifierPool(pid_of, workers=1) as pool:
        assert len({pool.map([(0,)])[0].value for _ in range(20)}) == 1
        pids = [pool.map([(0,)])[0].value for _ in range(100)]
        assert 2 <= len(set(pids)) <= 4


def test_no_more_processes(mark, monkeypatch):
    with VerifierPool(act, workers=4, deadline=AMPLE) as pool:
        fork, made = type(pool.start()._nursery).fork, []
        pool.close()

        def scarce(nursery):
            if made:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            made.append(fork(nursery))
            return made[-1]

        monkeypatch.setattr("torchrl_chat.rewards.worker.Nursery.fork", scarce)
        assert pool.map([(i,) for i in range(50)]) == [(i, None) for i in range(50)]
        pool._nursery.idle.clear()
        with pytest.raises(PoolError, match="no worker process can be forked.*temporarily unavailable"):
            pool.map([(1,)])


@pytest.mark.services
@pytest.mark.xdist_group("ray")
def test_in_a_ray_actor(ray_cluster):
    import ray

    @ray.remote(num_cpus=1)
    class Actor:
        def __init__(self):
            self.pool = VerifierPool(NumberVerifier(), workers=1, deadline=5.0)

        def grade(self, calls):
            return [o.value.score for o in self.pool.map(calls)]

    assert ray.get(Actor.remote().grade.remote([("7", "7"), ("8", "7")]), timeout=60) == [1.0, 0.0]
