"""Code graded by tests that the answer cannot reach: answers that try to pass without being right, and right ones that must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
from conftest import need_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat.rewards import CodeVerifier, exam
from torchrl_chat.rewards.code import RunResult
from torchrl_chat.sandbox import Sandbox, SandboxError


@pytest.fixture(scope="module")
def box():
    box = Sandbox(deadline=20)
    try:
        box.start()
    except SandboxError as error:
        pytest.skip(f"no isolation here: {error}")
    yield box
    box.close()


def plain(program: str, deadline: float) -> RunResult:
    """No sandbox: for the tests' own programs."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )
    return RunResult(done.returncode == 0, done.stdout, done.stderr)


@pytest.fixture(params=["plain", "sandbox"])
def runner(request):
    return plain if request.param == "plain" else request.getfixturevalue("box").run


SQUARE = {
    "test_list": ["assert f(2) == 4", "assert abs(f(3) - 9) < 1e-6", "assert len([f(4)]) == 1 and f(4) == 16"]
}
CHECK = {
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert abs(candidate(3) - 9.0) < 1e-6\n    assert candidate(4) == 16\n",
    "entry_point": "f",
    "prompt": 'def f(x):\n    """The square."""\n',
}
LIAR = """
class Liar:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __sub__(self, other): return 0.0
    __rsub__ = __add__ = __radd__ = __mul__ = __abs__ = __round__ = __float__ = lambda self, *_: 0.0
    def __hash__(self): return 0
    __index__ = __int__ = lambda self: 0
"""
HACKS = {
    "an object that equals everything": LIAR + "def f(x): return Liar()",
    "a number that equals everything": LIAR.replace("class Liar", "class Liar(int)") + "def f(x): return Liar()",
    "a float that equals everything": LIAR.replace("class Liar", "class Liar(float)") + "def f(x): return Liar()",
    "an object that says it is a number": LIAR
    + "Liar.__class__ = property(lambda self: int)\ndef f(x): return Liar()",
    "leaves early": "import os, sys\nsys.stdout.flush()\nos._exit(0)",
    "leaves when it is called": "import os\ndef f(x): os._exit(0)",
    "raises SystemExit": "def f(x): raise SystemExit(0)",
    "leaves at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit",
    "replaces the builtins": "import builtins\nbuiltins.AssertionError = builtins.abs = builtins.len = lambda *_: 0\n"
    "builtins.compile = lambda *_: 'pass'\nbuiltins.exec = lambda *_: None\ndef f(x): return 0",
    "names of the builtins": "abs = lambda *_: 0\nlen = lambda *_: 1\nint = float = bool = lambda *_: True\nAssertionError = ValueError\ndef f(x): return 0",
    "replaces what the program uses": "import sys, types, hashlib, json, os, operator\nfor m in (types, hashlib, json, operator):\n"
    "    for n in dir(m):\n        if not n.startswith('__'):\n            try: setattr(m, n, lambda *_, **__: True)\n            except Exception: pass\ndef f(x): return 0",
    "replaces the program": "import __main__, sys\nfor n in list(vars(__main__)):\n    if not n.startswith('__'): setattr(__main__, n, lambda *_, **__: None)\n"
    "f = lambda x: 0",
    "changes the operations": "import sys\nframe = sys._getframe()\nwhile frame:\n    for v in list(frame.f_globals.values()):\n"
    "        if isinstance(v, dict) and 'eq' in v:\n            for k in v: v[k] = lambda *_: True\n    frame = frame.f_back\ndef f(x): return 0",
    "a check of its own": "def check(candidate): pass\ndef f(x): return 0",
    "traces": "import sys\nsys.settrace(lambda *_: None); sys.setprofile(lambda *_: None)\ndef f(x): return 0",
    "writes to every descriptor": "import os\nfor fd in range(1, 30):\n    try: os.write(fd, b'\\0\\0\\0\\x02{}' * 5)\n    except OSError: pass\ndef f(x): return 0",
    "closes every descriptor": "import os\nos.closerange(0, 30)\ndef f(x): return 0",
    "a reply that names the judge's own": "import os, json\ndef f(x):\n    for fd in range(3, 30):\n"
    "        d = json.dumps({'nodes': [['n', 'exec']], 'roots': [0]}).encode()\n"
    "        try: os.write(fd, len(d).to_bytes(4, 'big') + d)\n        except OSError: pass",
    "replies that make no sense": "import os, json, sys\nn = [0]\ndef f(x):\n    n[0] += 1\n    for fd in range(3, 30):\n"
    "        for m in ([], {}, {'nodes': 5}, {'nodes': [['l', [0]]], 'roots': [9]}, {'nodes': [['t', [0]]], 'roots': [0]}, {'error': 5}, {'op': 'getattr', 'nodes': [], 'roots': []}):\n"
    "            d = json.dumps(m).encode()\n            try: os.write(fd, len(d).to_bytes(4, 'big') + d)\n            except OSError: pass",
    "kills its parent": "import os, signal\ndef f(x): os.kill(os.getppid(), signal.SIGKILL)",
    "ends the judge from a child": "import os, signal, time\nif os.fork() == 0:\n    time.sleep(0.05); os.kill(os.getppid(), signal.SIGTERM); os._exit(0)\ndef f(x): return 0",
    "an iterator without end": "def f(x):\n    while True: yield x * x",
    "a text like the answer": "def f(x): return str(x * x)",
    "prints to the outside": "import os\ndef f(x):\n    for pid in (os.getppid(), 1):\n        try: open(f'/proc/{pid}/fd/1', 'w').write('\\n' + '0' * 32 + '\\n')\n        except OSError: pass\n    return 0",
}


@pytest.mark.parametrize("reference", [SQUARE, CHECK], ids=["asserts", "check"])
@pytest.mark.parametrize("name", HACKS)
def test_no_answer_passes_without_being_right(runner, name, reference):
    verdict = CodeVerifier(runner, partial=True).grade(f"```python\n{HACKS[name]}\n```", reference)
    assert (verdict.score, verdict.correct) == (0.0, False), verdict


@pytest.mark.parametrize("reference", [SQUARE, CHECK], ids=["asserts", "check"])
@pytest.mark.parametrize(
    "code",
    ["def f(x): return x * x", "def f(x): return x ** 2.0", "class S:\n    def __call__(self, x): return x * x\nf = S()",
     "f = lambda x: x * x", "from functools import lru_cache\n@lru_cache\ndef f(x): return x * x",
     "class N(int): pass\ndef f(x): return N(x * x)", "from fractions import Fraction\ndef f(x): return Fraction(x) ** 2",
     "from decimal import Decimal\ndef f(x): return int(Decimal(x) ** 2)", "print('hello')\ndef f(x): print(x); return x * x",
     "def f(x): return sum(x for _ in range(x))", "abs = None\ndef f(x): return x * x"],
)  # fmt: skip
def test_right_answers_pass(runner, code, reference):
    assert CodeVerifier(runner).grade(f"```python\n{code}\n```", reference).correct


def test_an_answer_cannot_look_at_the_tests(box):
    """Not in the process that has them, nor in its own. The secret has no digits: any six stand in some address."""
    code = (
        "import gc, os, sys\ndef look():\n    seen = [repr(o) for o in gc.get_objects() if isinstance(o, (str, bytes, list, dict))]\n"
        "    for pid in ('self', os.getppid()):\n        for file in ('cmdline', 'environ', 'mem', 'maps'):\n"
        "            try: seen.append(open(f'/proc/{pid}/{file}', 'rb').read(1 << 20).decode('latin1'))\n            except OSError: pass\n"
        "        try: seen.append(str(os.listdir(f'/proc/{pid}/fd')) if pid != 'self' else '')\n        except OSError: pass\n"
        "    return any('walrus' + 'tusk' in s for s in seen if 'walrus\\' + ' not in s)\n"
        "def parent():\n    try: return open(f'/proc/{os.getppid()}/mem', 'rb') is not None\n    except OSError: return False\n"
    )
    tests = ["assert look() is False  # walrustusk", "assert parent() is False"]
    verdict = CodeVerifier(box.run, partial=True).grade(f"```python\n{code}\n```", {"test_list": tests})
    if box.isolation["Landlock"].startswith("absent"):
        assert verdict.score >= 0.5
    else:
        assert verdict.correct


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
    | st.complex_numbers(allow_nan=False) | st.decimals(allow_nan=False) | st.fractions() | st.dates() | st.datetimes().map(lambda at: at.replace(fold=0)) | st.timedeltas(),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
) | st.sets(st.integers() | st.tuples(st.text(max_size=3), st.integers())) | st.frozensets(st.text(max_size=3))  # fmt: skip


@pytest.fixture(scope="module")
def peers():
    """The two ends, in one process."""
    (inside, write), (read, outside) = os.pipe(), os.pipe()
    judge = exam.Peer(read, write, True, {})
    answer = exam.Peer(inside, outside, False, {})

    def serve() -> None:
        while True:
            try:
                answer.answer(answer.receive())
            except exam.AnswerError:
                return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield judge, answer
    os.close(write)
    thread.join(10)


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_values_come_back_as_they_were(peers, value):
    judge, answer = peers
    answer._mine[:] = [lambda x: (x, type(x).__name__)]
    back, kind = judge.ask("call", exam.Remote(judge, 0), (value,), {})
    assert repr(back) == repr(value) or (back == value and isinstance(value, (set, frozenset)))
    assert kind == type(value).__name__


def test_what_stands_in_a_value_twice(peers):
    judge, answer = peers
    answer._mine[:] = [lambda x: (x, x, x[0] is x[1])]
    inner = [1]
    a, b, same = judge.ask("call", exam.Remote(judge, 0), ([inner, inner],), {})
    assert a is b
    assert same is True
    assert a[0] is a[1]
    loop: list = []
    loop.append(loop)
    answer._mine[:] = [lambda x: x]
    assert judge.ask("call", exam.Remote(judge, 0), (loop,), {}) is loop
    assert loop[0] is loop


USES = {
    "changes a list in place": ("def f(xs): xs.sort(); xs[0] = [0]", ["x = [3, 1]\nf(x)\nassert x == [[0], 3]"]),
    "returns what it was given": ("def f(xs): xs.append(1); return xs", ["x = []\nassert f(x) is x and x == [1]"]),
    "changes what lies deep": ("def f(d): d['a'][0].add(2); d['b'] = 1", ["d = {'a': [{1}]}\nf(d)\nassert d == {'a': [{1, 2}], 'b': 1}"]),
    "takes a function": ("def f(g, xs): return [g(x) for x in xs]", ["assert f(lambda x: x + 1, [1, 2]) == [2, 3]", "assert f(str, [1]) == ['1']"]),
    "takes an iterator": ("def f(xs): return sum(xs)", ["assert f(x for x in [1, 2]) == 3"]),
    "gives a function": ("def f(n): return lambda x: x + n", ["assert f(2)(3) == 5"]),
    "gives a generator": ("def f(n):\n    yield from range(n)", ["assert list(f(3)) == [0, 1, 2]", "assert next(f(1)) == 0"]),
    "gives a dictionary's keys": ("def f(d): return d.keys()", ["assert list(f({1: 2})) == [1]", "assert 1 in f({1: 2})", "assert len(f({})) == 0"]),
    "raises": ("class E(ValueError): pass\ndef f(x): raise E('no')", ["try: f(1)\nexcept ValueError as e: assert str(e) == 'no'\nelse: assert False"]),
    "has classes": ("class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return self.x == o.x\n    def __add__(self, o): return P(self.x + o.x)\n"
                    "def f(ps): return max(p.x for p in ps)",
                    ["assert f([P(1), P(5)]) == 5", "assert P(1) + P(2) == P(3)", "assert isinstance(P(1), P)", "p = P(1)\np.x = 4\nassert f([p]) == 4"]),
    "is a coroutine": ("async def f(x): return x + 1", ["import asyncio\nassert asyncio.run(f(1)) == 2"]),
    "keeps state": ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", ["assert f() == 1", "assert f() == 2 and n == 1", "assert n == 2"]),
    "a builtin's name": ("def sum(a, b): return a * b", ["assert sum(3, 4) == 12"]),
    "big numbers": ("def f(n): return 7 ** n", ["assert f(9000) == 7 ** 9000", "assert f(-1) == 7 ** -1"]),
    "dict subclasses": ("from collections import Counter, defaultdict, namedtuple\ndef f(x): return Counter(x)\ndef g(): return namedtuple('A', 'x y')(1, 2)",
                        ["assert f('aab') == {'a': 2, 'b': 1}", "assert g() == (1, 2)"]),
    "modules without import": ("import math\ndef f(x): return x / 3", ["assert math.isclose(f(1), 1 / 3)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_what_tests_do_with_an_answer(name):
    code, tests = USES[name]
    seen = []

    def runner(program, deadline):
        seen.append(plain(program, deadline))
        return seen[-1]

    verdict = CodeVerifier(runner, partial=True).grade(f"```python\n{code}\n```", {"test_list": tests})
    assert verdict.score == 1.0, (verdict, seen[-1].error)


def test_classes_and_values_of_the_set_up():
    """What the reference defines is there on both sides, and an object of it is remade from its attributes."""
    setup = (
        "class Node:\n    def __init__(self, value, next=None): self.value, self.next = value, next\n"
        "    def values(self): return [self.value] + (self.next.values() if self.next else [])"
    )
    reference = {"test_setup_code": setup, "test_list": ["assert f(Node(1, Node(2))).values() == [2, 1]"]}
    good = "def f(n):\n    before = None\n    while n: n.next, before, n = before, n, n.next\n    return before"
    assert CodeVerifier(plain).grade(good, reference).correct
    hack = "class Node:\n    def __init__(self, *_): pass\n    def values(self): return [2, 1]\ndef f(n): return n"
    assert not CodeVerifier(plain).grade(hack, reference).correct
    late = {"test_setup_code": "root = Node(5)", "test_list": ["assert f(root) == 5"]}
    assert (
        CodeVerifier(plain)
        .grade("class Node:\n    def __init__(self, x): self.x = x\ndef f(n): return n.x", late)
        .correct
    )


def test_an_answer_that_hangs_keeps_what_passed(box):
    code = "def f(x):\n    while x > 2: pass\n    return x * x"
    verdict = CodeVerifier(box.run, partial=True, deadline=2.0).grade(code, SQUARE)
    assert verdict.score == pytest.approx(1 / 3)


def test_a_share_that_is_made_up_is_none():
    """Codes for all tests, of a program that did not end well, or none for all, of one that did."""

    def runner(program, deadline):
        result = plain(program, deadline)
        return RunResult(not result.ok, result.output, result.error)

    assert CodeVerifier(runner, partial=True).grade("def f(x): return x * x", SQUARE).score == 0.0
    assert CodeVerifier(runner, partial=True).grade("def f(x): return 4", SQUARE).score == 0.0


def test_without_a_process_for_the_answer_there_is_no_grade():
    with Sandbox(processes=1) as box:
        try:
            box.start()
        except SandboxError as error:
            pytest.skip(f"no isolation here: {error}")
        verdict = CodeVerifier(box.run).grade("def f(x): return x * x", SQUARE)
    assert "no process for the answer" in verdict.failure


def test_all_of_human_eval():
    """The solutions pass, and a function that gives nothing passes none."""
    path = need_shared("data/humaneval/HumanEval.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    verify = CodeVerifier(plain, deadline=30)
    for row in rows[::12]:
        assert verify.grade(f"```python\n{row['prompt']}{row['canonical_solution']}```", row).correct, row[
            "task_id"
        ]
