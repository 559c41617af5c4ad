"""Commands as agents in a sandbox: their episodes are exact, they reach their own session alone, and what ends them leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from agents import Recorder, check_law, templates_of
from conftest import of_the_day, skip_without
from escapes import PRELUDE, descendants, run_as_nobody

from torchrl_chat.gateway import Gateway, SandboxedCommand, play_agents
from torchrl_chat.named import named
from torchrl_chat.sandbox import SandboxError
from torchrl_chat.sandbox.calls import Call

ROWS = [{"query": f"q{i}"} for i in range(3)]
# Its own packages, as a venv's user would show them.
PYTHON = [
    sys.prefix,
    *(path for path in sys.path if path.endswith("site-packages") and not path.startswith(sys.prefix)),
]
KINDS = ("namespaces", "bubblewrap")


def gateway_of(script, **more) -> Gateway:
    templates = templates_of()
    options = {"template": {"chat_template": templates.plain.renderer.source}, **more}
    return Gateway(Recorder(templates, script), templates.plain.tokenizer, **options)


def said(ask) -> str:
    return ask.messages[-1]["content"].removeprefix("q")


def ready(agent: SandboxedCommand) -> SandboxedCommand:
    """The agent; the test is skipped where there can be no sandbox."""
    try:
        agent.prepare()
    except SandboxError as error:
        skip_without("bwrap", f"no isolation here: {error}")
    return agent


SDK = """
import json, sys
from openai import DefaultHttpxClient, OpenAI
row, client = json.load(sys.stdin), OpenAI(http_client=DefaultHttpxClient(verify=False))
messages = [{"role": "user", "content": row["query"]}]
for turn in range(2):
    answer = client.chat.completions.create(model="m", messages=messages).choices[0].message
    messages += [answer, {"role": "user", "content": "q and then?"}]
"""
# It knows all that there is to know, and gets nowhere with it.
SPIES = """
import contextlib, io
told = io.StringIO()
stack = contextlib.ExitStack()
stack.enter_context(contextlib.redirect_stdout(told))
"""
SPIES += (
    PRELUDE
    + """
import urllib.error, urllib.request
with open('/tmp/notes', 'w') as file: file.write('mine')
body = json.dumps({"model": "m", "messages": messages[:1]}).encode()
def ask(url, key, data=body):
    request = urllib.request.Request(url, data, {"authorization": "Bearer " + key, "x-api-key": key})
    return urllib.request.urlopen(request, timeout=5).read()
door = os.environ["ANTHROPIC_BASE_URL"]
for key in row["keys"]:
    for path in ("/s/%s/v1/chat/completions" % row["other"], "/sessions", "/s/%s/finish" % row["other"], "/metrics", "/finish"):
        for url in (door, row["url"]):
            attempt((url, path), ask, url + path, key)
            attempt((url, path), ask, url + path, key, None)
    attempt("the gateway itself", ask, row["url"] + "/v1/chat/completions", key)
attempt("connect", socket.create_connection, ("127.0.0.1", int(row["url"].rpartition(":")[2])), 2)
for name in row["secrets"]: attempt(name, lambda: os.environ[name])
attempt("files", os.listdir, row["folder"])
attempt("writes", open, row["shown"] + "/x", "w")
attempt("the victim", os.kill, row["victim"], 0)
if "BREACH" in told.getvalue() or told.getvalue().count("refused:") < 47: sys.exit(told.getvalue())
"""
)


@pytest.mark.parametrize("kind", of_the_day(*KINDS))
def test_an_agent_of_the_sdk_is_exact_and_reaches_its_own_session_alone(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "canary")
    agent = SandboxedCommand(
        [sys.executable, "-c", SDK + SPIES], show=PYTHON, deadline=60, sandbox={"isolation": kind}
    )
    ready(agent)
    victim = subprocess.Popen(["/bin/sleep", "600"])
    kept: list = []
    try:
        with gateway_of(said, implicit=True, ended=kept.append) as gateway, gateway.session() as other:
            row = {
                "query": "q7",
                "other": other.name,
                "keys": [other.api_key, gateway.token],
                "url": gateway.url,
                "secrets": ["A_SECRET"],
                "folder": str(tmp_path),
                "shown": sys.prefix,
                "victim": victim.pid,
            }
            td = play_agents(agent, [row], gateway, on_error="fail")
            assert td["env_failure"] == [""]
            [session] = kept
            assert (session.turns, session.report["begins"]) == (2, 1)
            assert check_law(session) == 1
            assert other.report["answers"] == 0
            assert list(gateway.table.open) == [other.name]
            assert not gateway._doors
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
        agent.close()


# Without a library: what is looked at is how it ends.
ENDS = """
import json, os, sys, time, urllib.request
row = json.load(sys.stdin)
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": row["query"]}]}).encode()
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body)
def ask(): return urllib.request.urlopen(request).read()
ask()
if row["query"] == "q0": sys.exit("it broke")
if row["query"] == "q1": kept = [b"x" * (1 << 20) for _ in range(2000)]
for _ in range(3):
    if os.fork() == 0: os.setsid(); break
connected = urllib.request.urlopen(request)
time.sleep(600)
"""


def test_what_fails_or_is_killed_costs_its_own_episode_and_leaves_nothing():
    """An exit code, too much memory, too much time: with children that are connected, none of which is left."""
    agent = ready(SandboxedCommand(["python3", "-c", ENDS], deadline=60, memory=128 << 20))
    before = len(os.listdir("/proc/self/fd"))
    try:
        with gateway_of(said) as gateway:
            td = play_agents(agent, ROWS[:2], gateway, on_error="fail")
            failures = [*td["env_failure"]]
            failures += play_agents(agent, ROWS[2:], gateway, on_error="fail", seconds=2)["env_failure"]
            assert failures[0] == "AgentError: the command ended with the code 1: it broke"
            assert "MemoryError" in failures[1] or "memory" in failures[1]
            assert "more than 2 s" in failures[2]
            assert not gateway.table.open
            until = time.monotonic() + 30
            while (gateway._doors or _below(agent)) and time.monotonic() < until:
                time.sleep(0.05)
            assert not gateway._doors
            assert not _below(agent)
    finally:
        agent.close()
    until = time.monotonic() + 30
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < until:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= before


def _below(agent: SandboxedCommand) -> list[int]:
    """What runs below the warden but its inner half."""
    return descendants(agent.box.warden().process.pid)[1:]


def test_what_an_agent_leaves_in_its_workspace_is_what_it_is_graded_by():
    """Each episode has one of its own, filled with what its row needs."""

    def checks(session):
        return float((workspaces / session.name / "answer").read_text() == session.row["query"].upper())

    checks.grades = "session"
    code = "text = open('task').read()\nopen('answer', 'w').write(text.upper() if text != 'q2' else 'wrong')"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        workspaces = Path(folder) / "work"
        agent = SandboxedCommand(
            ["python3", "-S", "-c", code],
            workspaces=workspaces,
            fill=lambda row, folder: (folder / "task").write_text(row["query"]),
        )
        ready(agent)
        with gateway_of(said, reward=checks) as gateway:
            td = play_agents(agent, ROWS, gateway, repeats=2)
        agent.close()
        assert td["reward"].flatten().tolist() == [1.0] * 4 + [0.0] * 2
        assert len(os.listdir(workspaces)) == 6


def test_no_episode_is_played_where_there_can_be_no_sandbox(monkeypatch):
    def refused(settings):
        raise SandboxError("isolation='namespaces' cannot be had: say why")

    monkeypatch.setattr("torchrl_chat.sandbox.sandbox.Warden", refused)
    with gateway_of(said) as gateway:
        with pytest.raises(SandboxError, match="cannot be had"):
            play_agents(SandboxedCommand("python3 agent.py"), ROWS, gateway)
        assert not gateway.table._done


def test_an_episode_whose_sandbox_could_not_be_built_is_left_out(monkeypatch):
    """Not graded: its agent never played."""
    agent = ready(SandboxedCommand(["python3", "-c", "pass"]))
    monkeypatch.setattr(Call, "result", lambda self, session=False: (_ for _ in ()).throw(SandboxError("no room")))
    monkeypatch.setattr(agent, "prepare", lambda: None)
    with gateway_of(said) as gateway:
        td = play_agents(agent, ROWS[:1], gateway, on_error="score")
    assert td["env_failure"] == ["SandboxError: no room"]
    agent.close()


def test_what_makes_no_sense_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"'/nowhere/venv' does not exist"):
        SandboxedCommand("python agent.py", show=["/nowhere/venv"])
    with pytest.raises(ValueError, match="command is empty"):
        SandboxedCommand("")
    with pytest.raises(ValueError, match="no workspaces to be filled"):
        SandboxedCommand("true", fill=print)
    with pytest.raises(ValueError, match="isolation='none'"):
        SandboxedCommand("true", sandbox={"isolation": "none"})
    (tmp_path / "mine.py").write_text(
        "from torchrl_chat.gateway import SandboxedCommand\nagent = SandboxedCommand(['python3', 'agent.py'])\n"
    )
    assert named(f"{tmp_path / 'mine.py'}:agent").words == ["python3", "agent.py"]  # as --agent takes it


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="run by an ordinary user as it is")
def test_all_of_it_as_an_ordinary_user():
    said = run_as_nobody([__file__])
    assert int(said.split(" passed")[0].split()[-1]) >= 7, said
