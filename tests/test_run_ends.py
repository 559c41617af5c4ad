"""How a training run ends and goes on: Ctrl-C, checkpoints and books that were damaged, settings that mean nothing."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_books import ROOT, SCRIPTS, example, jsonl, words

from torchrl_chat.cli.main import main
from torchrl_chat.recipes import checkpoints as saving
from torchrl_chat.recipes.checkpoints import DamagedCheckpoint
from torchrl_chat.recipes.interrupts import Interrupted, Interrupts, launch
from torchrl_chat.recipes.progress import Progress
from torchrl_chat.recipes.run import Run
from torchrl_chat.recipes.settings import RunConfig, parse
from torchrl_chat.recipes.tasks import ask, make_env, make_model, make_policy


def run_of(folder: Path, **options) -> Run:
    """A run of a small model whose steps move one weight."""
    settings = RunConfig(**{"out": str(folder), "steps": 6, "save_every": 2, "keep": 3, "eval": 2, **options})
    model, tokenizer = make_model(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Run(settings, "test", model=model, tokenizer=tokenizer, state={"optimizer": optimizer})


def evaluation(count: list[int] | None = None):
    """Two conversations, finished."""
    if count is not None:
        count.append(1)
    settings = RunConfig()
    model, tokenizer = make_model(settings)
    policy, _ = make_policy(settings, model, tokenizer)
    return ask(make_env(settings, tokenizer, 2, 1, 0), policy, settings)


def go(run: Run, evaluate=evaluation, at: int | None = None, times: int = 1) -> list[int]:
    """Take the steps that are left; Ctrl-C is pressed in the middle of the step ``at``."""
    taken = []
    try:
        for step in run.steps(evaluate):
            weight = next(run.model.parameters())
            weight.grad = torch.full_like(weight, 0.1 + step)
            if step == at:
                press(times)
            run.state["optimizer"].step()
            run.log({"loss": float(weight.detach().sum())})
            taken.append(step)
    finally:
        run.close()
    return taken


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to: checkpoints of the steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    go(run_of(folder))
    return folder


@pytest.fixture
def damaged(whole, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(folder)], check=True)
    return folder


def flip(path: Path) -> None:
    """One bit of a file is another; its length is the same."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "another bit": flip,
    "missing": Path.unlink,
}


class TestDamagedCheckpoints:
    @pytest.mark.parametrize("how", DAMAGES)
    @pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "config.json", "files.json"])
    def test_the_last_is_named_and_the_one_before_offered(self, damaged, name, how):
        path = damaged / "checkpoints" / "step-000006"
        DAMAGES[how](path / name)
        before = {file: file.read_bytes() for file in damaged.rglob("*.jsonl")}
        if name == "files.json" and how == "missing":  # as one from before there was that file: it is whole
            assert go(run_of(damaged, resume=True)) == []
            return
        with pytest.raises(
            DamagedCheckpoint,
            match=r"step-000006 is damaged: .*\n?.*The one of step 4 is whole: give --checkpoint 4",
        ):
            run_of(damaged, resume=True)
        assert {file: file.read_bytes() for file in damaged.rglob("*.jsonl")} == before  # nothing was cut off

    def test_told_so_the_run_goes_on_from_the_one_before(self, damaged, whole):
        flip(damaged / "checkpoints" / "step-000006" / "model.safetensors")
        run = run_of(damaged, resume=True, checkpoint=4)
        assert (run.resumed, run.step) == (True, 4)
        assert go(run) == [4, 5]
        ends = [saving.checkpoints(folder / "checkpoints")[-1] / "model.safetensors" for folder in (damaged, whole)]
        assert ends[0].read_bytes() == ends[1].read_bytes()
        told = [
            [(row["step"], row["loss"]) for row in jsonl(folder / "metrics.jsonl")] for folder in (damaged, whole)
        ]
        assert told[0] == told[1]
        assert (damaged / "checkpoints" / "step-000006.aside").is_dir()  # nothing is deleted
        assert go(run_of(damaged, resume=True)) == []

    def test_one_without_the_list_of_its_files_is_read_as_far_as_it_can_be(self, damaged):
        for path in saving.checkpoints(damaged / "checkpoints"):
            (path / "files.json").unlink()
        assert go(run_of(damaged, resume=True)) == []
        for name in ("state.pt", "model.safetensors"):
            DAMAGES["cut"](damaged / "checkpoints" / "step-000006" / name)
            with pytest.raises(DamagedCheckpoint, match="step-000006 is damaged: .*The one of step 4"):
                run_of(damaged, resume=True)

    def test_where_none_is_whole(self, damaged):
        for path in saving.checkpoints(damaged / "checkpoints"):
            DAMAGES["cut"](path / "state.pt")
        with pytest.raises(DamagedCheckpoint, match="No other one is whole: begin anew, with another --out"):
            run_of(damaged, resume=True)

    def test_weights_that_are_no_numbers_are_not_gone_on_from(self, damaged):
        from safetensors.torch import load_file, save_file

        path = damaged / "checkpoints" / "step-000006"
        weights = load_file(path / "model.safetensors")
        next(iter(weights.values())).view(-1)[0] = float("nan")
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "files.json").unlink()
        with pytest.raises(DamagedCheckpoint, match=r"its weight .* holds a NaN.*The one of step 4"):
            run_of(damaged, resume=True)

    def test_a_checkpoint_that_is_not_there(self, damaged):
        with pytest.raises(ValueError, match="has no checkpoint of step 3: there are 2, 4, 6"):
            run_of(damaged, resume=True, checkpoint=3)


class TestDamagedBooks:
    @pytest.mark.parametrize("content", [b"", b'{"steps": 6, "out', b"[1, 2]", b"\xff\xfe"])
    def test_settings(self, damaged, content):
        (damaged / "config.json").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"config\.json is damaged .*Put the file back; or, if you are sure .* delete it"
        ):
            run_of(damaged, resume=True)
        (damaged / "config.json").unlink()
        assert go(run_of(damaged, resume=True)) == []

    @pytest.mark.parametrize("name", ["evaluations", "metrics", "trained"])
    @pytest.mark.parametrize("how", ["empty", "cut", "missing"])
    def test_lines_that_are_missing(self, damaged, name, how):
        DAMAGES[how](damaged / f"{name}.jsonl")
        with pytest.raises(
            ValueError, match=rf"{name}\.jsonl has \d+ bytes, and had \d+ when step-000006 was written"
        ):
            run_of(damaged, resume=True)

    @pytest.mark.parametrize(
        "line", ["x" * 60, '{"step": 0, "pass_rate": "high", "conversations": 2' + " " * 10 + "}"]
    )
    def test_an_evaluation_that_is_none(self, damaged, line):
        path = damaged / "evaluations.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([line.ljust(len(lines[0])), *lines[1:]]) + "\n")
        with pytest.raises(ValueError, match=r"evaluations\.jsonl, line 1 is damaged"):
            run_of(damaged, resume=True)

    def test_rollouts_may_be_deleted_for_their_size(self, damaged):
        (damaged / "rollouts.jsonl").unlink()
        assert go(run_of(damaged, resume=True)) == []


def press(times: int = 1) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


class TestCtrlC:
    def test_within_a_step_it_ends_behind_it_and_goes_on_as_if_nothing_had_been(self, tmp_path, whole, capsys):
        with pytest.raises(SystemExit) as end:
            go(run_of(tmp_path), at=2)
        assert end.value.code == 130
        assert [row["step"] for row in jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2]
        assert "interrupted behind 3 of 6 steps" in capsys.readouterr().err
        assert saving.checkpoints(tmp_path / "checkpoints")[-1].name == "step-000003"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert go(run_of(tmp_path, resume=True)) == [3, 4, 5]
        ends = [
            saving.checkpoints(folder / "checkpoints")[-1] / "model.safetensors" for folder in (tmp_path, whole)
        ]
        assert ends[0].read_bytes() == ends[1].read_bytes()

    @pytest.mark.parametrize("number", [1, 2, 3], ids=["before", "between", "behind"])
    def test_within_an_evaluation_it_ends_at_once_and_the_evaluation_is_made_up_for(self, tmp_path, number):
        asked: list[int] = []

        def evaluate():
            asked.append(1)
            if len(asked) == number:
                press()
            return evaluation()

        with pytest.raises(SystemExit) as end:
            go(run_of(tmp_path, eval_every=3), evaluate=evaluate)
        assert end.value.code == 130
        steps = 3 * (number - 1)
        assert saving.checkpoints(tmp_path / "checkpoints")[-1].name == f"step-{steps:06d}"
        assert not (tmp_path / "result.json").exists()
        assert go(run_of(tmp_path, eval_every=3, resume=True)) == list(range(steps, 6))
        assert [entry["step"] for entry in jsonl(tmp_path / "evaluations.jsonl")] == [0, 3, 6]
        assert json.loads((tmp_path / "result.json").read_text())["steps"] == 6

    def test_twice_ends_at_once(self, tmp_path):
        with pytest.raises(KeyboardInterrupt) as end:
            go(run_of(tmp_path), at=3, times=2)
        assert not isinstance(end.value, Interrupted)
        assert saving.checkpoints(tmp_path / "checkpoints")[-1].name == "step-000002"

    def test_where_it_is_ignored_it_stays_so(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with Interrupts("") as interrupts:
                press()
            assert not interrupts.asked
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)

    def test_before_the_first_step_there_is_a_line(self, capsys):
        with pytest.raises(SystemExit) as end:
            launch(press)
        assert end.value.code == 130
        assert capsys.readouterr().err == "interrupted\n"

    @pytest.mark.parametrize("name", SCRIPTS)
    @pytest.mark.by_day(2)
    def test_every_script(self, tmp_path, monkeypatch, capsys, name):
        """A checkpoint behind the step in which it was pressed; --resume goes on."""
        module, played = example(name), []
        play = module.play

        def pressed(*arguments, **options):
            played.append(1)
            if len(played) == 3:
                press()
            return play(*arguments, **options)

        monkeypatch.setattr(module, "play", pressed)
        given = words(name, "--save_every", "100", "--out", str(tmp_path))
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as end:
            module.main()
        assert end.value.code == 130
        assert "interrupted behind 3 of 4 steps, with a checkpoint" in capsys.readouterr().err
        last = saving.checkpoints(tmp_path / "checkpoints")[-1]
        assert last.name == "step-000003"
        assert saving.load_state(last)["sizes"]["metrics"] == (tmp_path / "metrics.jsonl").stat().st_size
        monkeypatch.setattr(sys, "argv", [*given, "--resume"])
        module.main()
        assert [row["step"] for row in jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]

    @pytest.mark.by_day(2, place=1)
    def test_as_from_a_terminal(self, tmp_path):
        """A process that is sent the signal ends with the code of an interrupted one, and without a traceback."""
        command = [sys.executable, str(ROOT / "examples" / "grpo.py"), *words("grpo", "--steps", "100000")[1:]]
        command += ["--save_every", "100000", "--out", str(tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        metrics, end = tmp_path / "metrics.jsonl", time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= 2:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 130, told[-2000:]
        assert "Traceback" not in told
        steps = len(jsonl(metrics))
        assert f"interrupted behind {steps} of 100000 steps, with a checkpoint" in told
        assert saving.checkpoints(tmp_path / "checkpoints")[-1].name == f"step-{steps:06d}"


class TestSettings:
    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ("--steps -1", "--steps is -1: expected at least 1"),
            ("--prompts 0", "--prompts is 0: expected at least 1"),
            ("--lr -1", "--lr is -1.0: expected more than 0"),
            ("--lr nan", "--lr is nan: expected a finite number"),
            ("--max-grad-norm 0", "--max-grad-norm is 0.0: expected more than 0"),
            ("--final_lr_share -0.5", "--final-lr-share is -0.5: expected at least 0"),
            ("--vllm-memory 1.5", "--vllm-memory is 1.5: expected at most 1"),
            ("--temperature inf", "--temperature is inf: expected a finite number"),
            ("--device foo", "--device: 'foo' is no device of this machine"),
            ("--resume", "--resume goes on with the run in a folder: give it with --out"),
            ("--checkpoint 4 --out x", "--checkpoint 4 says from where a run goes on: give --resume"),
        ],
    )
    def test_what_means_nothing_is_refused_when_it_is_read(self, given, named, capsys):
        with pytest.raises(SystemExit) as end:
            parse(RunConfig, None, arguments=given.split())
        assert end.value.code == 2
        assert named in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("name", "given", "named"),
        [
            ("grpo", "--group_size 1", "--group-size is 1: expected at least 2"),
            ("python_tool", "--group-size 1", "--group-size is 1: expected at least 2"),
            ("grpo", "--clip 1", "clip=(1.0, 0.2) for surrogate='ppo': expected 0 <= low < 1"),
            ("grpo", "--kl -1", "--kl is -1.0: expected at least 0"),
            ("ppo", "--gamma 1.1", "--gamma is 1.1: expected at most 1"),
            ("ppo", "--lam -0.1", "--lam is -0.1: expected at least 0"),
            ("expert_iteration", "--most -1", "--most is -1: expected at least 0"),
        ],
    )
    def test_of_one_script(self, name, given, named, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", [name, *given.split()])
        with pytest.raises(SystemExit) as end:
            example(name).main()
        assert end.value.code == 2
        assert named in capsys.readouterr().err

    def test_both_spellings(self):
        for word in ("--max-new-tokens", "--max_new_tokens"):
            assert parse(RunConfig, None, arguments=[word, "5", "--save-every", "3"]).max_new_tokens == 5

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ("--steps -1", "--steps is -1: expected at least 1"),
            ("--prompts 0", "--prompts is 0: expected at least 1"),
            ("--group-size 1", "--group-size is 1: expected at least 2"),
            ("--group_size 1", "--group-size is 1: expected at least 2"),
            ("--lr -1", "--lr is -1.0: expected more than 0"),
            ("--lr fast", "argument --lr: invalid float value: 'fast'"),
            ("--lr nan", "--lr is nan: expected a finite number"),
            ("--entropy -1", "--entropy is -1.0: expected at least 0"),
            ("--final-lr-share 2", "--final-lr-share is 2.0: expected at most 1"),
            ("--temperature 0", "--temperature is 0.0: expected more than 0"),
            ("--eval 0", "--eval is 0: expected at least 1"),
            ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
            ("--max_new_tokens 0", "--max-new-tokens is 0: expected at least 1"),
            ("--device foo", "--device: 'foo' is no device of this machine"),
            ("--nothing", "unrecognized arguments: --nothing"),
        ],
    )
    def test_of_the_command(self, given, named, capsys):
        with pytest.raises(SystemExit) as end:
            main(["train", *given.split()])
        assert end.value.code == 2
        assert named in capsys.readouterr().err

    def test_help_shows_one_spelling(self, capsys):
        with pytest.raises(SystemExit):
            main(["train", "--help"])
        shown = capsys.readouterr().out
        assert "--max-new-tokens" in shown
        assert "--max_new_tokens" not in shown

    @pytest.mark.parametrize("path", sorted(p.relative_to(ROOT) for p in ROOT.glob("examples/*.py")), ids=str)
    def test_every_example_answers_help(self, path, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", [path.name, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        told = capsys.readouterr()
        assert end.value.code == 0
        # Environments are played by the command, and agents trained.
        assert told.out.startswith((f"usage: {path.name}", "usage: torchrl-chat play", "usage: torchrl-chat train"))
        assert not told.err


class TestProgress:
    def test_lines_where_there_is_no_terminal(self, capsys):
        with Progress("grpo", 4, done=1, every=1000) as progress:
            for step in range(3):
                progress.add({"reward": step / 4})
        first, last = capsys.readouterr().err.splitlines()
        assert first.startswith("grpo: step 2 of 4, reward 0; 0:00:00 so far, 0:00:0")
        assert last.startswith("grpo: step 4 of 4, reward 0.5; ")
        assert last.endswith("0:00:00 to go")

    def test_a_bar_where_there_is_one(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        with Progress("grpo", 2) as progress:
            progress.add({"reward": 0.25})
        assert "\r" in capsys.readouterr().err


@pytest.mark.by_day(3)
def test_train_is_seen_by_the_viewer_and_says_nothing_of_others(tmp_path):
    """What a user sees without a terminal: lines of ours only. And ``view runs/`` opens the run's conversations."""
    pytest.importorskip("starlette", reason="needs the extra: torchrl_chat[serve]")
    from starlette.testclient import TestClient

    from torchrl_chat.rollouts import read_rollouts
    from torchrl_chat.viewer import viewer_app

    command = [
        sys.executable,
        "-m",
        "torchrl_chat.cli.main",
        "train",
        "--steps",
        "2",
        "--prompts",
        "2",
        "--eval",
        "6",
    ]
    done = subprocess.run(
        [*command, "--group_size", "4", "--minibatch", "4", "--out", str(tmp_path / "runs" / "one")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    assert len(told) == 2
    assert all(line.startswith("grpo: step ") for line in told)
    assert "shards" not in done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr
    go(run_of(tmp_path / "runs" / "two"))  # the books of a recipe, which holds no conversation here
    with TestClient(viewer_app(tmp_path / "runs"), base_url="http://localhost") as http:
        files = [file["name"] for file in http.get("/web/files").json()["files"]]
        assert files == ["one/rollouts.jsonl"]
        lines = http.get(f"/web/files/{files[0]}").text.splitlines()
    shown = [json.loads(line) for line in lines]
    assert len(shown) == 16
    assert shown == list(read_rollouts(tmp_path / "runs" / "one" / "rollouts.jsonl", on_error="raise"))
    assert [episode["metadata"]["step"] for episode in shown] == [0] * 8 + [1] * 8
    assert all(episode["sequences"][0]["log_probs"] for episode in shown)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("config.json", "", "config.json is damaged"),
        ("config.json", '{"dataset": "dig', "config.json is damaged"),
        ("config.json", "[]", "config.json is damaged"),
    ],
)
@pytest.mark.parametrize("how", ["--out", "--resume"])
def test_the_books_of_an_evaluation_are_read_before_a_model_is(
    tmp_path, capsys, monkeypatch, name, content, named, how
):
    (tmp_path / name).write_text(content)
    monkeypatch.setattr(
        "torchrl_chat.cli.eval.make_policy", lambda arguments: pytest.fail("the model was loaded first")
    )
    assert main(["eval", "--dataset", "digits", "--limit", "2", how, str(tmp_path)]) == 2
    assert named in capsys.readouterr().err
