"""The sandbox as a user meets it: results, limits, sessions, many at once, and refusal where isolation is missing."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
from conftest import forked, skip_without
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat.rewards import CodeVerifier
from torchrl_chat.sandbox import Result, Sandbox, SandboxError


@pytest.fixture(scope="module", params=["namespaces", "bubblewrap"])
def box(request):
    box = Sandbox(request.param, deadline=20, memory=256 << 20, allow_shell=True)
    try:
        box.start()
    except SandboxError as error:
        skip_without("bwrap", f"no isolation here: {error}")
    yield box
    box.close()


# ------------------------------------------------------------------ one call
@pytest.mark.parametrize(
    ("code", "status", "stdout", "value"),
    [
        ("print(1 + 1)", "ok", "2\n", None),
        ("1 + 1", "ok", "", "2"),
        ("print('a'); 'b'", "ok", "a\n", "'b'"),
        ("None", "ok", "", None),
        ("", "ok", "", None),
        ("x = 5\nif x:\n    print(x)", "ok", "5\n", None),
        ("def f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nf(10)", "ok", "", "55"),
        ("[(y := 3), y]", "ok", "", "[3, 3]"),
        ("if __name__ == '__main__': print('main')", "ok", "main\n", None),
        ("import sys; sys.exit()", "ok", "", None),
        ("import sys; sys.exit(0)", "ok", "", None),
        ("import sys; print('x'); sys.exit(3)", "exit", "x\n", None),
        ("import os; os._exit(0)", "ok", "", None),
        ("import os; os._exit(4)", "exit", "", None),
        ("1 / 0", "error", "", None),
        ("x = (", "error", "", None),
        ("raise KeyboardInterrupt", "error", "", None),
        ("'\\0'", "ok", "", "'\\x00'"),
        ("\0", "error", "", None),
        ("'\ud800'", "error", "", None),
        ("print(chr(0xd800))", "ok", "\\ud800\n", None),
        ("print('é漢😀')", "ok", "é漢😀\n", None),
        ("import os; os.write(1, b'\\xff\\n')", "ok", "\ufffd\n", "2"),
        ("import os; os.system('echo from a child')", "ok", "from a child\n", "0"),
        ("import ctypes; l = ctypes.CDLL(None); l.puts(b'from C'); l.fflush(None)", "ok", "from C\n", "0"),
        (
            "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.05), print('late'))).start()",
            "ok",
            "late\n",
            None,
        ),
        ("import atexit; atexit.register(print, 'bye') and None", "ok", "bye\n", None),
        (
            "import os\nif os.fork() == 0: print('child')\nelse: os.wait(); print('parent')",
            "ok",
            "child\nparent\n",
            None,
        ),
        ("import asyncio\nasync def f(): return 7\nasyncio.run(f())", "ok", "", "7"),
        ("import multiprocessing as m\nwith m.Pool(2) as p: print(p.map(abs, [-1, -2]))", "ok", "[1, 2]\n", None),
        (
            "import sys, subprocess; subprocess.check_output([sys.executable, '-c', 'print(5)'])",
            "ok",
            "",
            "b'5\\n'",
        ),
        ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'abc'))", "ok", "3\n", None),
        ("import shutil\nopen('a', 'w').close(); shutil.copy2('a', 'b')", "ok", "", "'b'"),
        (
            "import dataclasses, pickle\n@dataclasses.dataclass\nclass A: x: int\npickle.loads(pickle.dumps(A(1)))",
            "ok",
            "",
            "A(x=1)",
        ),
    ],
)
def test_programs(box, code, status, stdout, value):
    result = box.run(code)
    assert (result.status, result.stdout, result.value) == (status, stdout, value), result
    assert result.ok == (status == "ok")
    assert bool(result.error) == (status != "ok")


def test_a_traceback_shows_the_users_frames_only(box):
    error = box.run("def f():\n    return 1 / 0\n\nprint('before')\nf()").error
    assert error.startswith('Traceback (most recent call last):\n  File "main.py", line 5, in <module>\n    f()')
    assert "return 1 / 0" in error
    assert error.endswith("ZeroDivisionError: division by zero")
    assert "torchrl_chat" not in error
    error = box.run("x = 1\ny = (2\n").error
    assert error.startswith('  File "main.py", line 2')
    assert "torchrl_chat" not in error


def test_exceptions_that_fight_back(box):
    assert box.run("class E(Exception):\n    def __str__(self): raise self\nraise E").status == "error"
    assert "RecursionError" in box.run("def f(): f()\nf()").error
    result = box.run("class R:\n    def __repr__(self): 1 / 0\nR()")
    assert result.status == "error"
    assert "ZeroDivisionError" in result.error
    long = box.run("raise ValueError('x' * 10**6 + 'end')")
    assert len(long.error) < 70_000
    assert long.error.endswith("end")


def test_input(box):
    asked = box.run("name = input('your name? ')")
    assert asked.status == "error"
    assert "EOFError: there is no input here" in asked.error
    assert "torchrl_chat" not in asked.error
    assert box.run("input() + input()", stdin="a\nb\n").value == "'ab'"
    assert box.run("import os; os.read(0, 10)", stdin="abc").value == "b'abc'"
    assert box.run("import sys; sys.stdin.read()").value == "''"
    assert box.run("input()", stdin="").error.endswith("EOFError: EOF when reading a line")


def test_every_call_is_fresh(box):
    first = box.run("import json, os\njson.x = 1; open('left', 'w').close(); os.environ['A'] = 'b'; y = 2")
    assert first.ok
    after = box.run(
        "import json, os\nprint(hasattr(json, 'x'), os.listdir('.'), 'A' in os.environ, 'y' in globals())"
    )
    assert after.stdout == "False [] False False\n"
    numbers = {box.run("import random; print(random.random())").stdout for _ in range(3)}
    assert len(numbers) == 3


@given(st.text(st.characters(codec="utf-8"), max_size=200))
@settings(max_examples=25, deadline=None)
def test_any_text_comes_back_as_it_was(box, text):
    result = box.run(f"import sys; sys.stdout.write({text!r}) and None; {text!r}")
    assert (result.stdout, result.value) == (text, repr(text))


# ------------------------------------------------------------------ limits
def test_a_deadline(box):
    result = box.run("print('before')\nwhile True: pass", 0.5)
    assert (result.status, result.stdout) == ("timeout", "before\n")
    assert result.error == "Timeout: it was stopped after 0.5 seconds."
    assert result.seconds >= 0.5


def test_output_is_cut(box):
    result = box.run("print('x' * 10**6)")
    assert (result.status, result.truncated, result.stdout) == ("ok", True, "x" * (64 << 10))
    assert "left out" in result.text
    assert not box.run("print('x')").truncated
    value = box.run("'x' * 10**6").value
    assert len(value) < 70_000
    assert "left out" in value


def test_memory(box):
    assert box.run("x = bytearray(1 << 30)").error.endswith("MemoryError")
    assert box.run("x = bytearray(100 << 20)").ok


def test_processor_time(box):
    with Sandbox(cpu=0.5, deadline=30) as small:
        code = "import os\nfor _ in range(3): os.fork()\nwhile True: pass"
        result = small.run(code)
    assert result.status == "cpu", result


def test_processor_time_of_children_that_nobody_waits_for():
    code = (
        "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True:\n"
        "    if os.fork() == 0:\n        end = time.process_time() + 0.2\n"
        "        while time.process_time() < end: pass\n        os._exit(0)\n"
        "    try: os.wait()\n    except ChildProcessError: pass\n"
    )
    with Sandbox(cpu=1.0, deadline=20) as small:
        result = small.run(code)
    assert result.status == "cpu", result
    assert result.seconds < 10


def test_files_and_scratch(box):
    with Sandbox(files=32, scratch=1 << 20) as small:
        assert "Too many open files" in small.run("x = [open('/dev/null') for _ in range(100)]").error
        big = small.run("f = open('a', 'wb', 0)\nfor _ in range(20): f.write(bytes(1 << 16))")
        assert "OSError" in big.error
        assert small.run("open('a', 'wb').write(bytes(1 << 19))").ok


# ------------------------------------------------------------------ sessions
def test_a_session_keeps_its_variables(box):
    with box.session() as session:
        session.run("x = 1\ndef double(n): return 2 * n")
        session.run("def four(n): return double(double(n))")
        assert session.run("four(x)").value == "4"
        failed = session.run("x = 10\n1 / 0")
        assert failed.status == "error"
        assert 'File "cell_4.py", line 2' in failed.error
        assert session.run("import sys; x += 1; sys.exit(2)").status == "exit"
        assert session.run("x").value == "11"
        session.run("open('file', 'w').write('kept')")
        assert session.shell("cat file").stdout == "kept"
        assert session.run("import sys; sys.stdout.close()").ok
        assert session.run("print('still here')").stdout == "still here\n"
        assert session.run("import os; os.close(1)").ok
        assert session.run("print('and here')").stdout == "and here\n"
        session.reset()
        again = session.run("x")
        assert again.error.endswith("NameError: name 'x' is not defined")
        assert not again.notice


def test_a_frame_of_an_earlier_call(box):
    with box.session() as session:
        session.run("def f(n):\n    return 1 / n")
        error = session.run("f(0)").error
    assert 'File "cell_2.py", line 1, in <module>\n    f(0)' in error
    assert 'File "cell_1.py", line 2, in f\n    return 1 / n' in error


@pytest.mark.parametrize(
    ("code", "status"),
    [("while True: pass", "timeout"), ("import os; os.abort()", "crash"), ("import os; os._exit(1)", "exit")],
)
def test_a_session_that_is_lost_says_so(box, code, status):
    with box.session() as session:
        session.run("x = 1")
        lost = session.run(code, 1.0)
        assert (lost.status, lost.state_lost) == (status, True)
        assert lost.error.endswith("The session's variables are lost.")
        after = session.run("'x' in globals()")
        assert after.value == "False"
        assert "started anew" in after.notice
        assert after.text.startswith(after.notice)
        assert not session.run("1").notice


def test_how_it_ended_is_never_lost(box):
    """The keeper's last word is read even where it left something unread itself."""
    for _ in range(30):
        with box.session() as session:
            session.run("x = 1")
            assert session.run("import os; os._exit(1)").exit_status == 1


def test_a_made_up_reply_passes_for_none_to_a_later_call(box):
    forged = (
        "import json, os, struct, time\n"
        "data = json.dumps({'status': 'ok', 'exit': 0, 'error': '', 'value': 'forged'}).encode()\n"
        "for fd in range(3, 20):\n"
        "    try: os.write(fd, struct.pack('!I', len(data)) + data)\n"
        "    except OSError: pass\n"
        "1 / 0"
    )
    assert "ZeroDivisionError" in box.run(forged).error
    with box.session() as session:
        session.run("x = 1")
        lost = session.run(forged)
        assert (lost.status, lost.value, lost.state_lost) == ("crash", None, True)
        after = session.run("'x' in globals()")
        assert (after.value, "started anew" in after.notice) == ("False", True)
        assert session.run("3").value == "3"


def test_a_session_stands_still_between_calls(box):
    count = "import threading, time\nn = 0\ndef go():\n    global n\n    while True: n += 1; time.sleep(0.001)\n"
    with box.session() as session:
        session.run(count + "threading.Thread(target=go, daemon=True).start()")
        before = int(session.run("n").value)
        time.sleep(0.5)
        assert int(session.run("n").value) - before < 250
        moved = int(session.run("time.sleep(0.2); n").value)
        assert moved > before + 20


def test_what_forks_as_soon_as_the_last_call_has_ended_is_not_left_standing(box):
    """That everything is to stop may be heard of when the next call runs already: one of 15 such children never ran."""
    for _ in range(80):
        with box.session() as session:
            session.run("import os")
            forked = session.run("child = os.fork()\nchild or os._exit(7)\nos.waitstatus_to_exitcode(os.wait()[1])")
            assert forked.value == "7", forked


def test_sessions_are_apart(box):
    with box.session() as a, box.session() as b:
        a.run("x = 'a'; open('f', 'w').write('a')")
        b.run("x = 'b'")
        assert a.run("x").value == "'a'"
        assert b.run("import os; x, os.listdir()").value == "('b', [])"


# ------------------------------------------------------------------ many
def test_many_side_by_side(box):
    codes = [f"print({i} * {i})" if i % 4 else f"raise SystemExit({i} % 3)" for i in range(40)]
    results = box.run_many(codes)
    assert [r.stdout for r in results] == [f"{i * i}\n" if i % 4 else "" for i in range(40)]
    assert [r.exit_status for r in results] == [0 if i % 4 else i % 3 for i in range(40)]
    assert box.run_many([]) == []


def test_rows_that_hang_delay_the_others_little(box):
    hang = "import time; print(time.time(), flush=True)\nwhile True: pass"
    results = box.run_many([hang] * 6 + ["print(1)"] * 20, 3.0)
    assert [r.status for r in results] == ["timeout"] * 6 + ["ok"] * 20
    begun = sorted(float(r.stdout) for r in results[:6])
    assert any(later - earlier < 3.0 for earlier, later in itertools.pairwise(begun))  # each ran for three seconds


def test_threads_may_share_it(box):
    found: dict[int, str] = {}

    def work(i: int) -> None:
        found[i] = box.run(f"print({i})").stdout

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"{i}\n" for i in range(8)}


def test_no_descriptors_leak(box):
    box.run("1")  # from here on, as many sandboxes as ever are ahead of need
    before = len(os.listdir("/proc/self/fd"))
    box.run_many(["print(1)"] * 10 + ["import os; os.abort()"])
    with box.session() as session:
        session.run("1")
        session.run("while True: pass", 0.2)
    box.run("1")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_dropped_session_leaves_nothing_open(box):
    def drop():
        session = box.session()
        session.run("1")

    drop()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        drop()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_it_starts_anew(box):
    with Sandbox() as own:
        assert own.run("1").value == "1"
        process = own.warden().process  # asked again when it is dead, the sandbox would start another one
        process.kill()
        process.wait()
        assert own.run("2").value == "2"
        session = own.session()
        session.run("x = 1")
        own.close()
        after = session.run("'x' in globals()")
        assert after.value == "False"
        assert "started anew" in after.notice


def test_pickling_and_forking(box):
    with Sandbox() as own:
        own.run("1")
        with pickle.loads(pickle.dumps(own)) as copy:
            assert copy.run("2").value == "2"

        def work():
            ok = own.run("3").value == "3"
            own.close()
            return ok

        assert forked(work) == 0
        assert own.run("4").value == "4"


# ------------------------------------------------------------------ shell, packages, verifier
def test_shell(box):
    assert box.shell("echo a; echo b >&2").stdout == "a\n"
    assert box.shell("cat", stdin="text").stdout == "text"
    failed = box.shell("exit 3")
    assert (failed.status, failed.exit_status) == ("exit", 3)
    assert box.shell("sleep 60", 0.3).status == "timeout"
    with Sandbox() as none:
        with pytest.raises(SandboxError, match="allow_shell=True"):
            none.shell("ls")
        assert not none.run("import subprocess; subprocess.run('ls')").ok


@pytest.fixture
def elsewhere():
    """A folder that anybody may read, not under /tmp, which is the sandbox's own."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("first", ["inner", "outer"])
def test_a_folder_is_shown_whole_whatever_of_it_was_shown_before(box, elsewhere, first):
    """As /usr/bin is, whose python is shown anyway where it runs the sandbox."""
    folder = elsewhere / "own"
    (folder / "deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c"):
        (folder / name).write_text(name)
    paths = [folder / "deep", folder][:: 1 if first == "inner" else -1]
    with Sandbox(box.settings.isolation, packages=paths) as own:
        found = own.run(f"import os; print(sorted(os.listdir({str(folder)!r})), os.listdir({str(elsewhere)!r}))")
        assert found.stdout == "['a', 'b', 'deep'] ['own']\n"
        assert own.run(f"print(open({str(folder / 'deep/c')!r}).read())").stdout == "deep/c\n"
        assert not own.run(f"open({str(folder / 'a')!r}, 'w')").ok


def test_packages_on_request(box, tmp_path):
    (tmp_path / "mine.py").write_text("value = 42\n")
    tmp_path.chmod(0o755)
    assert "ModuleNotFoundError" in box.run("import mine").error
    with Sandbox(packages=[tmp_path], preload=["mine"]) as own:
        assert own.run("import mine; mine.value").value == "42"
        assert "mine.py'" in own.run(f"open({str(tmp_path / 'mine.py')!r}, 'w')").error
    with pytest.raises(SandboxError, match="no_such_module"):
        Sandbox(preload=["no_such_module"]).start()
    with pytest.raises(ValueError, match="not a folder"):
        Sandbox(packages=["/no/such/folder"])


def test_it_runs_the_code_verifier(box):
    verifier = CodeVerifier(box.run)
    tests = {"test_list": ["assert f(2) == 4", "assert f(3) == 9"]}
    assert verifier.grade("def f(x): return x * x", tests).score == 1.0
    assert verifier.grade("def f(x): return x + x", tests).score == 0.0
    pairs = {"inputs": ["3\n", "4\n"], "outputs": ["9", "16"]}
    assert verifier.grade("print(int(input()) ** 2)", pairs).score == 1.0


# ------------------------------------------------------------------ failing closed
REFUSED = """
import sys
import tempfile
from torchrl_chat.sandbox import Sandbox, SandboxError, filters, kernel
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
kernel.set_filter(filters.refusing({calls!r}, {error}))
try:
    with Sandbox() as box:
        print("RAN", box.run("print(1)").stdout, box.isolation["Landlock"])
except SandboxError as error:
    print("REFUSED", error)
"""


@pytest.mark.parametrize(
    ("calls", "named"),
    [
        (["unshare"], "namespace"),
        (["mount"], "root file system"),
        (["pivot_root"], "root file system"),
        (["mount_setattr"], "root file system"),
        (["capset"], "no new privileges"),
    ],
)
def test_what_is_missing_is_an_error_that_names_it(calls, named):
    """On a kernel that refuses one system call, nothing is run."""
    pytest.importorskip("fcntl")
    if not sys.platform.startswith("linux"):
        pytest.skip("the refusing kernel is made with seccomp")
    code = REFUSED.format(calls=calls, error=1)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.startswith("REFUSED"), ran
    assert named in ran.stdout or "namespace" in ran.stdout
    assert "RAN" not in ran.stdout


def test_without_landlock_it_says_so(box):
    code = REFUSED.format(calls=["landlock_create_ruleset"], error=38)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.startswith("RAN 1\n absent"), ran


def test_a_missing_bubblewrap_is_named():
    """Asked for by name, it is never replaced by something else."""
    code = (
        "import torchrl_chat.sandbox.bubblewrap as b; b.PROGRAM = 'no-such-bwrap'\n"
        "from torchrl_chat.sandbox.settings import Settings\nb.Builder(Settings('bubblewrap'))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "bubblewrap: no program 'no-such-bwrap' is installed" in ran.stderr
    assert "apt install bubblewrap" in ran.stderr


def test_no_isolation_must_be_asked_for_and_warns():
    with pytest.warns(RuntimeWarning, match="isolation='none'"):
        box = Sandbox("none", deadline=20)
    with box:
        assert box.isolation.level == "none"
        assert box.isolation["network"] == "NOT isolated"
        assert box.run("print(1 + 1)").stdout == "2\n"
        assert box.run("while True: pass", 0.5).status == "timeout"
        with box.session() as session:
            session.run("x = 3")
            assert session.run("x").value == "3"
            assert session.run("import os; os.abort()").status == "crash"
            assert "started anew" in session.run("1").notice
        warden = box.warden().process.pid
    end = time.monotonic() + 60
    while (left := _group(warden)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def _group(session: int) -> list[int]:
    """Processes of a warden that are its children, or that nobody looks after any more."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline") as line, open(f"/proc/{name}/stat") as stat:
                if "sandbox.warden" in line.read() and stat.read().rpartition(")")[2].split()[1] in (
                    "1",
                    str(session),
                ):
                    found.append(int(name))
        except OSError:
            continue
    return found


def test_the_default_is_isolated(box):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Sandbox().settings.isolation == "namespaces"
    text = str(box.isolation)
    for mechanism in (
        "user",
        "capabilities",
        "files",
        "processes",
        "network",
        "system calls",
        "Landlock",
        "memory",
    ):
        assert f"  {mechanism} " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"isolation": "docker"}, "isolation='docker'"),
        ({"deadline": 0}, "deadline=0"),
        ({"memory": -1}, "memory=-1"),
        ({"files": 3}, "files=3"),
        ({"workers": 0}, "workers=0"),
        ({"preload": "json"}, "not a text"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sandbox(**arguments)


def test_wrong_code_types(box):
    with pytest.raises(TypeError, match="expected the code as a text"):
        box.run(5)
    with pytest.raises(ValueError, match="deadline=-1"):
        box.run("1", -1)


def test_it_knows_neither_torch_nor_chat():
    code = (
        "import sys; from torchrl_chat.sandbox import Sandbox, Result\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'torchrl', 'transformers', 'tensordict', 'numpy')"
        " or m.startswith('torchrl_chat.') and not m.startswith(('torchrl_chat.sandbox', 'torchrl_chat._lazy', 'torchrl_chat.processes'))]\nprint(bad)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "[]\n", ran


def test_text_of_a_result():
    result = Result("error", stdout="a\n", stderr="b", value=None, error="E", truncated=True, notice="N")
    assert result.text == "N\na\nb\n[the output was too long: the rest was left out]\nE"


def test_a_sandbox_that_died_unused_is_not_handed_out():
    """Made ahead of need, they are the first to go where the machine runs out of memory."""
    with Sandbox(ahead=2) as small:
        small.run("")
        warden = small.warden()
        for process in list(warden._idle):
            warden.kill(process)
        end = time.monotonic() + 60
        while any(process.unused() for process in warden._idle) and time.monotonic() < end:
            time.sleep(0.01)
        assert [small.run("6 * 7").value for _ in range(3)] == ["42"] * 3
