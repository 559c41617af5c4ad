"""What processes of a sandbox take together is counted, however it hides; and between its calls a session stands still."""

from __future__ import annotations

import time

import pytest
from escapes import ARM, PRELUDE, isolated

_EXIT = 93 if ARM else 60  # the system call that ends one thread
HIDES = f"""
def hide(size):
    # A process whose first thread ends; another one takes the memory.
    def work():
        time.sleep(0.1)
        x = b'x' * size
        time.sleep(30)
    threading.Thread(target=work).start()
    libc.syscall({_EXIT}, 0)
"""
_UNREADABLE = f"""
import shutil
shutil.copy(os.path.realpath(sys.executable), 'p'); os.chmod('p', 0o111)
code = '''
import ctypes, threading, time
def work():
    time.sleep(0.1); x = b'x' * (45 << 20); time.sleep(30)
threading.Thread(target=work).start(); ctypes.CDLL(None).syscall({_EXIT}, 0)
'''
for _ in range(6): subprocess.Popen(['./p', '-I', '-S', '-c', code], env={{'PYTHONHOME': sys.base_prefix}})
"""

# Each takes more than a sandbox of 64 MiB may (with what interpreters bring along, 112), and at most 0.4 GB.
HOARDS = {
    "first threads that have ended": "for _ in range(6):\n    if os.fork() == 0: hide(50 << 20)\n",
    "first threads that have ended, in daemons": "for _ in range(6):\n    if os.fork() == 0:\n        os.setsid()\n"
    "        if os.fork(): os._exit(0)\n        hide(50 << 20)\n",
    "first threads that ended when the memory was there": "for _ in range(6):\n    if os.fork() == 0:\n        x = b'x' * (50 << 20)\n"
    f"        threading.Thread(target=time.sleep, args=(30,)).start(); libc.syscall({_EXIT}, 0)\n",
    "all but the last of many threads have ended": "threading.stack_size(1 << 18)\nfor _ in range(6):\n    if os.fork() == 0:\n"
    f"        for _ in range(3): threading.Thread(target=lambda: (time.sleep(0.1), libc.syscall({_EXIT}, 0))).start()\n        hide(45 << 20)\n",
    "first threads that have ended, in programs that nobody may read": _UNREADABLE,
    "the first thread of the interpreter itself": "threading.Thread(target=lambda: (time.sleep(0.1), [os.fork() or hide(45 << 20) for _ in range(6)],"
    f" time.sleep(30))).start()\nlibc.syscall({_EXIT}, 0)\n",
    "names like the kernel's own words": "for i in range(6):\n    if os.fork() == 0:\n"
    "        for name in (b'\\nVmRSS:\\t0 kB', b'x) Z 1 1 1 1'): libc.prctl(15, name)\n        hide(50 << 20)\n",
    "processes that take turns": "for i in range(6):\n    if os.fork() == 0:\n        time.sleep(0.1 * i)\n        while True:\n"
    "            x = b'x' * (50 << 20); time.sleep(0.5); del x; time.sleep(0.01)\n",
    "page tables of pages that are all the same": "libc.mmap.restype = ctypes.c_void_p\n"
    "libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]\n"
    "for i in range(14000):\n    ctypes.c_char.from_address(libc.mmap((1 << 40) + (i << 30), 4096, 1, 0x100022, -1, 0)).value\n",
    "mappings": "import mmap\nfor _ in range(9):\n    if os.fork() == 0:\n"
    "        m = [mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=1 + i % 2) for i in range(14000)]; time.sleep(30)\n",
}

WAKES = f"""
CREATE, SET, CLONE = {(107, 110, 220) if ARM else (222, 223, 56)}
def count():
    # Counts for as long as it runs, in a file, so that a later call can read it.
    if threading.current_thread() is threading.main_thread(): signal.signal(signal.SIGHUP, signal.SIG_IGN)
    fd, n = os.open('/tmp/count', os.O_RDWR | os.O_CREAT), 0
    while True:
        n += 1; os.pwrite(fd, b'%020d' % n, 0); time.sleep(0.001)
def counted():
    try: return int(lines('/tmp/count') or 0)
    except OSError: return 0
def dying(prepare, size=120 << 20):
    # A parent with so much memory that it is still on its way out when everything else is stopped, and its child.
    r, w = os.pipe()
    if os.fork() == 0:
        prepare()
        x = b'x' * size
        os.read(r, 1); os._exit(0)
    while not counted(): time.sleep(0.01)
    time.sleep(0.3)
    os.write(w, b'x')
"""
# What shall go on between two calls of a session.
SLEEPERS = {
    "a thread": "threading.Thread(target=count, daemon=True).start()",
    "an alarm": "signal.signal(signal.SIGALRM, lambda *_: None)\n"
    "if os.fork() == 0: signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05); count()",
    "a POSIX timer": "if os.fork() == 0:\n    box = ctypes.create_string_buffer(8)\n"
    "    event = (ctypes.c_int * 16)(0, 0, signal.SIGCONT, 0)\n    libc.syscall(CREATE, 1, event, box)\n"
    "    spec = (ctypes.c_long * 4)(0, 20000000, 0, 20000000)\n    libc.syscall(SET, ctypes.c_int.from_buffer(box), 0, spec, None)\n    count()",
    "a signal when the caller reads": "import fcntl\nif os.fork() == 0:\n"
    "    try: fcntl.fcntl(1, 8, os.getpid()); fcntl.fcntl(1, 10, int(signal.SIGCONT)); fcntl.fcntl(1, 4, 0x2000)\n"
    "    except OSError: pass\n    count()\ntime.sleep(0.2)\nprint('x' * 60000)",
    "an orphaned process group": "def prepare():\n    if os.fork() == 0: os.setpgid(0, 0); count()\ndying(prepare)",
    "a parent's death": "def prepare():\n    if os.fork() == 0: libc.prctl(1, int(signal.SIGCONT)); count()\ndying(prepare)",
    "a child's death": "r, w = os.pipe()\nif os.fork() == 0:\n"
    "    if libc.syscall(CLONE, int(signal.SIGCONT), 0, 0, 0, 0) == 0:\n        x = b'x' * (120 << 20); os.read(r, 1); os._exit(0)\n    count()\n"
    "while not counted(): time.sleep(0.01)\ntime.sleep(0.3)\nos.write(w, b'x')",
    "processes that continue each other": "for _ in range(4):\n    if os.fork() == 0:\n        while True:\n"
    "            try: os.kill(-1, signal.SIGCONT)\n            except OSError: pass\nif os.fork() == 0: count()\ntime.sleep(0.3)",
    "processes that continue each other by name": "for _ in range(4):\n    if os.fork() == 0:\n        time.sleep(0.1)\n"
    "        others = [int(p) for p in os.listdir('/proc') if p.isdigit() and int(p) not in (1, os.getpid())]\n        while True:\n"
    "            for p in others:\n                try: os.kill(p, signal.SIGCONT)\n                except OSError: pass\n"
    "if os.fork() == 0: count()\ntime.sleep(0.3)",
    "a parent that waits for a program to start": "if os.fork() == 0: count()\nif os.fork() == 0:\n"
    "    while True: subprocess.run([sys.executable, '-c', ''])\ntime.sleep(0.2)",
}


@pytest.fixture(scope="module", params=["namespaces", "bubblewrap"])
def box(request):
    with isolated(request.param, deadline=20, memory=256 << 20, scratch=16 << 20) as box:
        yield box


@pytest.fixture(scope="module", params=["namespaces", "bubblewrap"])
def small(request):
    """One with little memory, so that an attack needs little to take more."""
    with isolated(request.param, deadline=20, memory=64 << 20, scratch=32 << 20) as box:
        yield box


def test_there_are_enough_of_them():
    assert len(HOARDS) + len(SLEEPERS) >= 20


@pytest.mark.parametrize("name", HOARDS)
def test_memory_that_hides_is_counted(small, name):
    result = small.run(PRELUDE + HIDES + HOARDS[name] + "time.sleep(8)\nprint('BREACH')")
    assert result.status == "memory", (name, result)
    assert small.run("6 * 7").value == "42"


@pytest.fixture(scope="module")
def slept(box):
    """Of each sleeper: the first call, and one after a pause in which all of them should have stood still."""
    code = "\nwhile not counted(): time.sleep(0.01)\ncounted()"
    sessions = {name: box.session() for name in SLEEPERS}
    first = {name: sessions[name].run(PRELUDE + WAKES + SLEEPERS[name] + code) for name in SLEEPERS}
    time.sleep(1.0)
    then = {}
    for name, session in sessions.items():
        then[name] = session.run("before = counted(); time.sleep(0.5); before, counted() - before")
        session.reset()
    return {name: (first[name], then[name]) for name in SLEEPERS}


@pytest.mark.parametrize("name", SLEEPERS)
def test_a_session_stands_still(slept, name):
    """Whatever tries to go on between two calls gets a fraction of what it gets in a call, or ends the session."""
    first, then = slept[name]
    assert first.status == "ok", first
    if then.notice:
        assert "started anew" in then.notice
        return
    assert then.status == "ok", then
    before, running = map(int, then.value.strip("()").split(","))
    assert running > 0, "what should go on is not there"
    assert before - int(first.value) < running, (first, then)  # at least twice the time, less than once the work


def test_memory_is_counted_between_the_calls(small):
    """Processes that will not stand still, and take memory meanwhile, are ended, or have come to rest below the limit."""
    code = """
for _ in range(5):
    if os.fork() == 0:
        x = []
        while True:
            try: os.kill(-1, signal.SIGCONT)
            except OSError: pass
            if len(x) < 40 and os.path.exists('/tmp/go'): x.append(b'x' * (1 << 20))
time.sleep(0.5)
open('/tmp/go', 'w').close()
"""
    held = """
import os
total = 0
for pid in filter(str.isdigit, os.listdir('/proc')):
    try: total += int(open(f'/proc/{pid}/statm').read().split()[1]) - int(open(f'/proc/{pid}/statm').read().split()[2])
    except OSError: pass
total * 4096
"""
    with small.session() as session:
        assert session.run(PRELUDE + code).status == "ok"
        time.sleep(2)
        after = session.run(held)
        assert after.status == "memory" or int(after.value) < (64 + 48 + 16) << 20, after
