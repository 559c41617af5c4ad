"""The command line refuses bad values where they are parsed, before anything is loaded, and ends quietly."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import bpe_tokenizer

from torchrl_chat import pretrained
from torchrl_chat.cli import main as cli
from torchrl_chat.cli.eval_plan import single_runs
from torchrl_chat.gallery import check_name

BAD = [
    "serve --port 99999",
    "serve --port -1",
    "serve --max-sessions 0",
    "serve --idle-seconds 0",
    "serve --max-turns 0",
    "serve --ping-seconds nan",
    "play --port 65536",
    "play --max-new-tokens 0",
    "play --temperature -1",
    "view --port x runs",
    "eval --device foo",
    "eval --device cuda:99",
    "eval --samples 0",
    "eval --limit -3",
    "eval --batch 0",
    "eval --temperature inf",
    "eval --max_new_tokens 0",
    "grade --deadline 0 FILE",
    "grade --workers 0 FILE",
]


@pytest.mark.parametrize("line", BAD)
def test_bad_values_are_refused_at_parsing(line, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.make_parser().parse_args(line.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    option = next(word for word in line.split() if word.startswith("--")).replace("_", "-")
    assert f"argument {option}:" in said


@pytest.mark.parametrize("option", ["--max-new-tokens", "--max_new_tokens"])
@pytest.mark.parametrize("joined", [True, False])
def test_both_spellings_of_an_option_are_taken(option, joined):
    words = [f"{option}=7"] if joined else [option, "7"]
    arguments = cli.make_parser().parse_args(["eval", *words, "--input_mode", "text"])
    assert (arguments.max_new_tokens, arguments.input_mode) == (7, "text")


def test_a_value_that_looks_like_an_option_is_left_alone():
    arguments = cli.make_parser().parse_args(["play", "--system-prompt=--be_brief"])
    assert arguments.system_prompt == "--be_brief"


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("torchrl-chat 0.")


# ---------------------------------------------------------------------- names
@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no/such/folder", "a/b/c", "nowhere/"])
def test_a_folder_that_does_not_exist_is_not_asked_of_the_hub(name, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(pretrained, "_hub_is_there", asked)
    for load in (pretrained.load_tokenizer, pretrained.load_model):
        with pytest.raises(ValueError, match="there is no folder"):
            load(name)


def test_a_name_that_is_nowhere_is_said_at_once_without_a_network(monkeypatch):
    monkeypatch.setattr(pretrained, "_hub_is_there", lambda: False)
    with pytest.raises(ValueError, match="hub cannot be reached"):
        pretrained.load_model("somebody/no-such-model")


def test_what_a_folder_holds(tmp_path):
    bpe_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert len(pretrained.load_tokenizer(str(tmp_path / "tokenizer"))) == len(bpe_tokenizer())
    with pytest.raises(ValueError, match="holds no model"):
        pretrained.load_model(str(tmp_path / "tokenizer"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        pretrained.load_tokenizer(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset", "gsm9k"], "gsm9k"),
        (["--dataset", "reasoning-gym"], "reasoning-gym"),
        (["--dataset", "reasoning-gym:no_such_task"], "no_such_task"),
        (["--dataset", "gsm8k", "--data", "./nowhere.jsonl"], "no such dataset file"),
        (["--dataset", "reasoning-gym:chain_sum", "--data", "x"], "makes its rows itself"),
    ],
)
def test_eval_checks_names_before_it_loads_a_model(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("torchrl_chat.cli.eval.make_policy", loaded)
    assert cli.main(["eval", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_that_are_right_pass(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n')
    for words in (["--dataset", "gsm8k"], ["--dataset", "gsm8k", "--data", str(tmp_path / "rows.jsonl")]):
        [one] = single_runs(cli.make_parser().parse_args(["eval", *words]), tmp_path)
        check_name(one.dataset, one.data)


# ---------------------------------------------------------------------- what is not installed
BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from torchrl_chat.cli.main import main
sys.exit(main({words!r}))
"""


@pytest.mark.parametrize(
    ("words", "blocked", "extra"),
    [
        (["grade", "FILE"], ["math_verify", "latex2sympy2_extended"], "math"),
        (["grade", "FILE", "--task", "ifeval"], ["py3langid"], "ifeval"),
        (["view", "."], ["starlette", "uvicorn", "websockets"], "serve"),
        (["serve"], ["pydantic", "pydantic_core"], "serve"),
        (["play"], ["uvicorn", "h11"], "serve"),
        (["eval", "--dataset", "reasoning-gym:chain_sum"], ["reasoning_gym"], "reasoning-gym"),
        (
            ["eval", "--backend", "endpoint", "--model", "m", "--endpoint", "http://127.0.0.1:9/v1"],
            ["openai"],
            "openai",
        ),
    ],
)
@pytest.mark.by_day(3)
def test_a_missing_extra_is_named(words, blocked, extra, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"response": "1", "answer": "1"}\n')
    words = [str(tmp_path / "rows.jsonl") if word == "FILE" else word for word in words]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=blocked, words=words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode != 0
    assert f"torchrl_chat[{extra}]" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------- quiet ends
def test_ctrl_c_while_libraries_are_imported_is_silent(tmp_path):
    code = (
        "import os, signal, sys\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from torchrl_chat.cli.main import main\n"
        "sys.exit(main(['eval', '--device', 'cpu']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_closed_pipe_is_silent(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"response": "#### 1", "answer": "#### 1"}\n' * 3)
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "torchrl_chat.cli.main", "grade", str(rows), "--task", "gsm8k", "--json"]
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def test_play_says_that_it_loads_a_model(monkeypatch, capsys):
    def load(name, **_):
        assert f"loading {name}" in capsys.readouterr().err
        raise ValueError("seen")

    monkeypatch.setattr(pretrained, "load_tokenizer", load)
    assert cli.main(["play", "--model", "somebody/a-model", "--no-browser"]) == 2
