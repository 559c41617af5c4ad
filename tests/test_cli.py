"""The command line: what it writes, how it ends, what it says of bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import need_shared
from run_books import documented_metrics

from torchrl_chat.cli.main import main
from torchrl_chat.recipes.watching import TOLD, of_the_run

QUICK = ["train", "--steps", "2", "--prompts", "2", "--group-size", "2", "--minibatch", "4", "--eval", "4"]


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["tokens", "text", "history"])
def test_train_writes_everything(tmp_path, capsys, mode):
    assert main([*QUICK, "--out", str(tmp_path), "--input-mode", mode]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints", "config.json", "curve.png", "evaluations.jsonl", "lock", "metrics.jsonl", "result.json",
        "rollouts.jsonl", "trained.jsonl",
    }  # fmt: skip
    metrics = jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1]
    named, shown = documented_metrics()
    assert set(TOLD) == shown <= metrics[0].keys() <= named
    line = capsys.readouterr()
    assert all(f", {name} " in line.err for name in shown)
    rollouts = jsonl(tmp_path / "rollouts.jsonl")
    assert len(rollouts) == 8
    assert [m["role"] for m in rollouts[0]["messages"]] == ["user", "assistant"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["steps"], config["input_mode"]) == (2, mode)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "sample, reward" in line.out
    assert f"files in {tmp_path}" in line.out


def test_checkpoint_is_a_model_to_go_on_with(tmp_path):
    assert main([*QUICK, "--out", str(tmp_path / "a")]) == 0
    model = tmp_path / "a" / "checkpoints" / "step-000002"
    again = [*QUICK, "--model", str(model), "--out", str(tmp_path / "b"), "--epochs", "1"]
    assert main([*again, "--lr", "1e-4", "--max-new-tokens", "2"]) == 0


def test_it_goes_on(tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    assert main([*QUICK, "--out", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    more = [word if word != "2" else "3" for word in QUICK[:3]] + QUICK[3:]
    assert main([*more, "--out", str(tmp_path), "--resume"]) == 0
    assert [row["step"] for row in jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_gsm8k_from_a_local_file(tmp_path):
    path = need_shared("data/gsm8k/test.jsonl")
    extra = ["--dataset", "gsm8k", "--data", str(path), "--max-new-tokens", "4"]
    assert main([*QUICK, *extra, "--out", str(tmp_path)]) == 0
    assert "####" in (tmp_path / "rollouts.jsonl").read_text()


def test_reasoning_gym(tmp_path):
    extra = ["--dataset", "reasoning-gym:chain_sum", "--max-new-tokens", "4"]
    assert main([*QUICK, *extra, "--out", str(tmp_path)]) == 0


def test_same_seed_same_run(tmp_path):
    for name in "ab":
        assert main([*QUICK, "--seed", "5", "--out", str(tmp_path / name)]) == 0
    first, second = (jsonl(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert [of_the_run(row) for row in first] == [of_the_run(row) for row in second]
    assert {"reward", "loss", "seconds", "seconds_sampling", "tokens_per_second", "memory"} <= first[0].keys()
    assert "seconds_sampling" not in of_the_run(first[0])


@pytest.mark.by_day(3, place=2)
def test_ctrl_c_keeps_what_there_is(tmp_path):
    command = [sys.executable, "-m", "torchrl_chat.cli.main", "train", "--steps", "100000", "--eval", "8"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.time() + 240
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err[-2000:]
    assert "interrupted behind" in err
    assert "Traceback" not in err
    steps = len(jsonl(metrics))
    assert (tmp_path / "checkpoints" / f"step-{steps:06}").is_dir()
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nothing"], "there is no environment 'nothing'"),
        (["--dataset", "gsm8k", "--data", "/no/such/file.jsonl"], "no such dataset file or folder"),
        (["--dataset", "reasoning-gym:nothing"], "no task 'nothing'"),
        (["--model", "/no/such/model"], "/no/such/model"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    try:
        code = main([*QUICK, *arguments, "--out", str(tmp_path)])
    except SystemExit as ended:  # a word of the command line, and not what it names
        code = ended.code
    [error] = capsys.readouterr().err.splitlines()
    assert code == 2
    assert message in error


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for word in ("--dataset", "gsm8k", "metrics.jsonl", "Ctrl-C", "default"):
        assert word in text
