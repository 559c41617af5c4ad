"""Attacks on the sandbox. Each must change and learn nothing outside, and the next call must work.

The world outside is looked at after each attack as well: files, listeners, a victim process, mounts, the host's name. Run by root, the suite
runs once more as an ordinary user.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from attacks import ATTACKS, ENDS
from conftest import of_the_day, skip_without
from escapes import PRELUDE, SECRET, World, descendants, isolated, run_as_nobody, state


@pytest.fixture(scope="module")
def world():
    with tempfile.TemporaryDirectory() as folder:
        there = World(Path(folder))
        yield there
        there.close()


@pytest.fixture(scope="module", params=["namespaces", "bubblewrap"])
def box(world, request):
    with isolated(request.param, deadline=20, memory=256 << 20, scratch=16 << 20) as box:
        yield box


@pytest.mark.parametrize("name", ATTACKS)
def test_contained(world, box, name):
    deadline = 1.5 if "timeout" in ENDS.get(name, ()) else None
    result = box.run(PRELUDE + world.names() + ATTACKS[name], deadline)
    shown = (name, result.status, result.text)
    assert "BREACH" not in result.text, shown
    assert SECRET not in result.text, shown
    assert world.look() == world.before, shown
    if name in ENDS:
        assert result.status in ENDS[name], shown
    after = box.run("import os; print(6 * 7, os.listdir('/tmp'), [p for p in os.listdir('/proc') if p.isdigit()])")
    assert (after.status, after.stdout) == ("ok", "42 [] ['2']\n"), shown
    assert world.look() == world.before, shown


def test_a_lock_is_refused_on_the_host_and_had_in_the_scratch_folder(box):
    """Told by the host's own lock, while the session is there."""
    ours = os.path.realpath(json.__file__)
    with box.session() as session:
        tried = session.run(
            "import fcntl, json\nf, own = open(json.__file__), open('own', 'w')\nfcntl.flock(own, fcntl.LOCK_EX)\n"
            "fcntl.lockf(own, fcntl.LOCK_EX)\ntry: fcntl.flock(f, fcntl.LOCK_SH)\nexcept OSError as e: print(e.errno)\njson.__file__"
        )
        assert (tried.stdout, tried.value) == (f"{errno.ENOLCK}\n", repr(ours)), tried
        with open(ours) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child = (
            "import os\nif os.fork() == 0:\n    try: fcntl.lockf(open('own', 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "    except OSError as e: print(e.errno, flush=True)\n    os._exit(0)\nos.wait() and None"
        )
        refused = session.run(child)
        assert refused.stdout == f"{errno.EAGAIN}\n", refused


@pytest.mark.parametrize("threads", [0, 2])
def test_databases_and_event_loops_work(box, threads):
    """What needs locks on files of the scratch folder, and a pair of sockets."""
    code = (
        f"import asyncio, sqlite3, threading, time\nfor _ in range({threads}): threading.Thread(target=time.sleep, args=(0.5,)).start()\n"
        "a, b = sqlite3.connect('x.db'), sqlite3.connect('x.db')\na.execute('create table t (x)'); a.execute('insert into t values (1)'); a.commit()\n"
        "async def f(): return b.execute('select x from t').fetchall()\nasyncio.run(f())"
    )
    assert box.run(code).value == "[(1,)]"


def test_a_machine_with_a_listener_of_its_own():
    """There can be no second one: what would have been asked is refused, and all else runs."""
    code = (
        "import os\nfrom torchrl_chat.sandbox import Sandbox, SandboxError, filters, kernel\n"
        "kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)\nkernel.set_filter(filters.refusing([]), listen=True)\n"
        "try:\n    with Sandbox() as box:\n"
        "        print(box.run(\"import fcntl; fcntl.flock(open('own', 'w'), fcntl.LOCK_EX)\").error.splitlines()[-1])\n"
        "        print(box.run('import socket; socket.socketpair()').error.splitlines()[-1], box.run('6 * 7').value)\n"
        "except SandboxError as error: print('no isolation here:', error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if "no isolation here" in ran.stdout:
        pytest.skip(ran.stdout)
    assert ran.stdout.splitlines() == [
        "OSError: [Errno 37] No locks available",
        "OSError: [Errno 24] Too many open files 42",
    ], ran


def test_there_are_enough_of_them():
    assert len(ATTACKS) >= 40


def test_the_traps_spring(world):
    """What the attacks reach for is there for a process without a sandbox; else they would prove nothing."""
    code = PRELUDE + world.names()
    for name in (
        "reads a file that everybody may read",
        "IPv4",
        "UNIX socket",
        "abstract UNIX socket",
        "UDP",
        "has /sys",
    ):
        ran = subprocess.run(
            [sys.executable, "-c", code + ATTACKS[name]], capture_output=True, text=True, timeout=60
        )
        assert "BREACH" in ran.stdout, (name, ran)
    world.hear_out()


def test_nobody_outlives_the_call(box):
    """A daemon is gone when the call returns: not one process is left below the warden but the idle sandboxes'."""
    code = ATTACKS["a daemon that outlives the call"]
    box.run(PRELUDE + "OUTSIDE = '/nowhere/x'\n" + code)
    box.close()
    end = time.monotonic() + 60
    while (left := descendants(os.getpid(), "warden")) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
    box.start()


def test_a_caller_that_is_killed_leaves_nothing():
    code = (
        "import os, time\nfrom torchrl_chat.sandbox import Sandbox\nbox = Sandbox().start()\n"
        "print(box.warden().process.pid, flush=True)\nbox.run('import time; time.sleep(100)', 100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as caller:
        line = caller.stdout.readline()
        if not line:
            skip_without("bwrap", f"no isolation here: {caller.stderr.read()[-500:]}")
        warden = int(line)
        below = []
        end = time.monotonic() + 60
        while len(below) < 3 and time.monotonic() < end:
            below = descendants(warden)
            time.sleep(0.05)
        assert len(below) >= 3
        caller.kill()
        caller.wait()
        alive = [warden, *below]
        while alive and time.monotonic() < end + 20:
            time.sleep(0.05)
            alive = [pid for pid in alive if state(pid) not in ("", "Z", "X")]
        assert not alive


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="run by an ordinary user as it is")
@pytest.mark.parametrize("kind", of_the_day("namespaces", "bubblewrap"))
def test_all_of_it_as_an_ordinary_user(kind):
    files = [str(Path(__file__).with_name(f"test_sandbox_{name}.py")) for name in ("escapes", "sums", "door")]
    said = run_as_nobody(files, "-k", f"{kind} and not contained_without")
    assert int(said.split(" passed")[0].split()[-1]) >= len(ATTACKS), said
