"""The routes behind the page, and the commands ``play`` and ``view``."""

from __future__ import annotations

import signal
import subprocess
import sys

import httpx
import pytest
from web_pages import arguments_of, chat_app, live

from torchrl_chat.cli import play, view

pytestmark = pytest.mark.services


def test_the_ledger_route_tells_what_the_rollout_file_tells(chat):
    with httpx.Client(base_url=chat) as http:
        session = http.post("/reset", json={"keep": True}).json()["metadata"]["session_id"]
        assert http.get(f"/web/ledger?session_id={session}").json()["sequences"][0]["ids"] == []
        for action in ({"messages": [{"role": "user", "content": "Hi"}]}, {"text": "Yo"}):
            reply = http.post("/step", json={"session_id": session, "action": action}).json()
        [sequence] = http.get(f"/web/ledger?session_id={session}").json()["sequences"]
        assert sequence["ids"] == reply["observation"]["tokens"]
        [[start, end]] = sequence["sampled"]
        assert "".join(sequence["pieces"][start:end]) == "Yo"
        assert http.get("/web/ledger?session_id=x").status_code == 404
        assert http.get("/web/ledger").status_code == 404
        assert http.post(f"/web/answer?session_id={session}").json() == {
            "detail": "this server has no model that answers."
        }
        assert http.post("/close", json={"session_id": session}).status_code == 200


def test_a_model_that_fails_is_said():
    def failing(prompt):
        raise RuntimeError("out of memory")

    with live(chat_app(policy=failing)) as url, httpx.Client(base_url=url) as http:
        session = http.post("/reset", json={"keep": True}).json()["metadata"]["session_id"]
        assert http.post(f"/web/answer?session_id={session}").status_code == 409  # nobody has asked anything
        action = {"messages": [{"role": "user", "content": "Hi"}]}
        http.post("/step", json={"session_id": session, "action": action})
        answer = http.post(f"/web/answer?session_id={session}")
        assert (answer.status_code, answer.json()["detail"]) == (
            500,
            "the model has no answer: RuntimeError: out of memory",
        )


def test_files_are_sent_once(chat):
    first = httpx.get(f"{chat}/web/static/app.css")
    assert first.headers["content-type"] == "text/css; charset=utf-8"
    again = httpx.get(f"{chat}/web/static/app.css", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(f"{chat}/web", follow_redirects=True).url.path == "/web/"


def test_view_serves_this_machine_until_it_is_interrupted(rollouts):
    code = (
        "import argparse\nfrom torchrl_chat.cli import view\nparser = argparse.ArgumentParser()\n"
        "view.add_parser(parser.add_subparsers())\narguments = parser.parse_args()\n"
        "raise SystemExit(arguments.run(arguments))"
    )
    command = [sys.executable, "-c", code, "view", str(rollouts), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split()[0]
        here = httpx.get(address)
        elsewhere = httpx.get(address, headers={"host": "evil.example"})  # a name that leads here (DNS rebinding)
        process.send_signal(signal.SIGINT)  # before any assertion: leaving the block waits for the process
        assert process.wait(20) == 0
    assert (here.status_code, elsewhere.status_code) == (200, 400)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--env", "gsm8k", "--data", "NOWHERE"], "NOWHERE"),
        (["--env", "math", "--data", "NOWHERE"], "NOWHERE"),
        (["--env", "reasoning-gym:no_such_task"], "no_such_task"),
        (["--env", "countdown", "--chat-template", "RAISES"], "never"),
        (["--chat-template", "RAISES", "--system-prompt", "x"], "never"),
    ],
)
def test_a_dataset_or_a_template_that_is_wrong_is_said_at_the_start(tmp_path, arguments, said):
    template = tmp_path / "never.jinja"
    template.write_text("{{ raise_exception('never') }}")
    places = {"NOWHERE": str(tmp_path / "nowhere"), "RAISES": str(template)}
    with pytest.raises(Exception, match=places.get(said, said)):
        play.make_app(arguments_of(play, [places.get(a, a) for a in arguments]))


def test_play_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="there is no environment 'chess'"):
        play.make_app(arguments_of(play, ["--env", "chess"]))
    with pytest.raises(ValueError, match="no rollout file or folder"):
        play.make_app(arguments_of(play, ["--rollouts", str(tmp_path / "none")]))
    with pytest.raises(ValueError, match="no rollout file or folder"):
        view.run(arguments_of(view, [str(tmp_path / "none")]))
