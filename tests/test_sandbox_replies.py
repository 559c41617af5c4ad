"""What a call says of itself is checked by the caller: what was said, how much of it, and whether anything ran at all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat.rewards import CodeVerifier, Episode, Grader
from torchrl_chat.rewards.code import RunResult
from torchrl_chat.sandbox import Result, Sandbox, SandboxError, calls, wire
from torchrl_chat.tools.python import PythonTool
from torchrl_chat.tools.results import ToolError

# The frames above the code hold the token and the socket: what it sends passes for its own result.
FORGE = """
import json, struct, sys
def forge(**reply):
    frame = sys._getframe()
    while frame.f_code.co_name != "serve": frame = frame.f_back
    data = json.dumps({"status": "ok", "exit": 0, "error": "", "value": None, **reply, **frame.f_locals["token"]}).encode()
    frame.f_locals["channel"].sendall(struct.pack("!I", len(data)) + data)
"""


@pytest.fixture(scope="module", params=["namespaces", "bubblewrap"])
def box(request):
    box = Sandbox(request.param, deadline=20, memory=32 << 20, scratch=4 << 20, output=1000, allow_shell=True)
    try:
        box.start()
    except SandboxError as error:
        pytest.skip(f"no isolation here: {error}")
    yield box
    box.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("x" * 5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
STATUS = st.sampled_from(["ok", "error", "exit", "not_run", "timeout", "memory", "OK", ""])


@given(
    st.fixed_dictionaries(
        {"token": st.just("t") | JSON},
        optional={"status": STATUS | JSON, "exit": st.integers() | JSON, "value": JSON, "error": st.text() | JSON},
    ),
    st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_a_reply_is_in_its_bounds_or_none(message, begun):
    reply = calls._checked(message, "t", 1000, begun)
    if reply is None:
        return
    assert message["token"] == "t"
    assert (reply["status"] == "not_run") is not begun
    assert reply["status"] in ("ok", "error", "exit", "not_run")
    assert (reply["status"] == "ok") == (reply["exit"] == 0) or reply["status"] == "not_run"
    assert type(reply["exit"]) is int
    assert reply["status"] == "not_run" or 0 <= reply["exit"] <= 255
    for text in (reply["value"] or "", reply["error"]):
        assert len(text) < 1000 + 100
        text.encode()


@given(st.text(max_size=400), st.integers(1, 300))
def test_what_was_cut_is_not_cut_again(text, limit):
    once = wire.cut(text, limit)
    assert wire.cut(once, limit) == once
    assert len(once) <= limit + 64


@pytest.mark.parametrize(
    "reply", ["value='y' * 20000", "value='y' * 20000, status='error', exit=1, error='z' * 20000"]
)
def test_a_value_is_cut_by_the_caller(box, reply):
    for run in (box.run, box.session().run):
        result = run(f"{FORGE}forge({reply})")
        assert len(result.value or "") < 1200
        assert len(result.error) < 1200
        assert (result.value is None) == (result.status != "ok")
        assert "characters left out" in (result.value or result.error)


@pytest.mark.parametrize(
    "reply",
    ["exit=256", "exit=-1", "exit=10**400", "exit=True", "exit=0.0", "exit=None", "exit=3", "status='error'",
     "status='timeout'", "status=['ok']", "status='not_run', exit=1", "value=5", "value=['x']", "error=None"],
)  # fmt: skip
def test_a_reply_that_makes_no_sense_is_none(box, reply):
    """In a fresh sandbox the true one follows; in a session the channel is broken, and with it the session."""
    result = box.run(f"{FORGE}forge({reply})\n'true'")
    assert (result.status, result.value, result.exit_status) == ("ok", "'true'", 0)
    with box.session() as session:
        result = session.run(f"{FORGE}forge({reply})\n'true'")
        assert (result.status, result.value, result.state_lost) == ("crash", None, True)


def test_the_exit_status_is_that_of_a_shell(box):
    assert box.shell("kill -9 $$").exit_status == 137
    assert box.shell("exit 3").exit_status == 3
    assert box.run("import sys; sys.exit(-1)").exit_status == 255
    assert box.run("import os; os._exit(7)").exit_status == 7


# ------------------------------------------------------------------ calls that never ran
def test_an_input_that_does_not_fit_is_no_success(box):
    result = box.run("print('ran')", stdin="x" * (5 << 20))
    assert (result.status, result.ok, result.ran, result.stdout) == ("not_run", False, False, "")
    assert "It was not run: OSError" in result.error
    assert result.text == result.error
    assert box.run("input()", stdin="x\n").ran


def test_a_full_disk_is_no_success(box):
    """The scratch folder is full, so that no input can be stored; the session itself goes on."""
    with box.session() as session:
        filled = session.run("f = open('a', 'wb', 0)\nwhile True: f.write(bytes(1 << 12))")
        assert "OSError" in filled.error
        result = session.run("print('ran')", stdin="text" * 2000)
        assert (result.status, result.stdout, result.state_lost) == ("not_run", "", False)
        assert session.run("import os; os.truncate('a', 0); 1").value == "1"
        assert session.run("input()", stdin="text").value == "'text'"


def test_code_that_does_not_fit_is_no_success(box):
    long = "x = '" + "x" * (40 << 20) + "'\nprint('ran')"
    result = box.run(long)
    assert (result.status, result.ok, result.stdout) == ("not_run", False, "")
    with box.session() as session:
        session.run("x = 1")
        lost = session.run(long)
        assert (lost.status, lost.state_lost) == ("not_run", True)
        assert "started anew" in session.run("1").notice
    assert box.shell("true " + "x" * (200 << 10)).status == "not_run"  # longer than an argument may be


def test_an_interpreter_that_was_broken_before_is_no_success(box):
    with box.session() as session:
        session.run("import os\ndef no(*_): raise OSError('no')\nos.dup2 = no")
        assert session.run("print('ran')").status == "not_run"


def test_leaving_early_is_leaving(box):
    assert box.run("import os; os._exit(0)").status == "ok"
    assert box.run("1", stdin="x").status == "ok"


def test_one_that_cannot_be_built_does_not_lose_the_others(box, monkeypatch):
    take, made = box.warden().take, []

    def gone(ahead=0):
        process = take(ahead)
        made.append(process)
        if len(made) == 2:
            box.warden().kill(process)
        return process

    monkeypatch.setattr(box.warden(), "take", gone)
    results = box.run_many(["1", "2", "3"])
    assert [result.value for result in results] in (["1", None, "3"], ["1", "2", "3"])
    # Killed while it is made or while it runs, which takes as long as the other: or it has run by then.
    assert results[1].value == "2" or results[1].status in ("not_run", "crash")


def test_what_never_ran_has_no_grade():
    """It is a failed grade, not a wrong answer, whoever runs it."""
    tests = {"test_list": ["assert f(1) == 1"]}
    pairs = {"inputs": ["1"], "outputs": ["1"]}
    for result in (Result("not_run", error="no room"), RunResult(False, "", "no room", ran=False)):
        verifier = CodeVerifier(lambda program, deadline, result=result: result)
        for reference in (tests, pairs):
            verdict = verifier.grade("def f(x): return x", reference)
            assert (verdict.score, verdict.correct) == (0.0, False)
            assert "not run" in verdict.failure
            assert "no room" in verdict.failure
        with Grader(verifier) as grader, pytest.warns(RuntimeWarning, match="no room"):
            assert "no room" in grader.grade([Episode.of("def f(x): return x", tests)])[0].failure
    wrong = CodeVerifier(lambda program, deadline: RunResult(False, "", "stopped"))
    assert wrong.grade("def f(x): return x", tests).failure is None


def test_a_model_is_told(box):
    tool = PythonTool(box)
    with pytest.raises(ToolError, match="It was not run"):
        tool.call({"code": "x = '" + "x" * (40 << 20) + "'"})
