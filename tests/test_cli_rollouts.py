"""``grade`` and ``eval`` about answers that nobody marked or finished, the product's own rollout files, and files that must not be lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from torchrl_chat.cli.main import main
from torchrl_chat.evaluation.figures import Figures
from torchrl_chat.evaluation.summary import as_table
from torchrl_chat.rewards.tasks import TASKS

BARE = {"response": "it is 42", "answer": "42"}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rollout(said, reference="#### 4", **more):
    asked = {"role": "user", "content": "2 + 2?"}
    messages = [asked, *({"role": "assistant", "content": text} for text in said)]
    shared = {
        "version": 1,
        "id": "0.0",
        "stop": "answered",
        "error": None,
        "cut": False,
        "sampled_tokens": 3,
        "metadata": {},
    }
    return {**shared, "query": "2 + 2?", "reference": reference, "messages": messages, **more}


# ---------------------------------------------------------------------- answers without a mark
@pytest.mark.parametrize("task", [None, "math", "gsm8k"])
def test_the_option_that_reads_unmarked_answers_is_named_and_works(tmp_path, capsys, task):
    path = write(tmp_path / "a.jsonl", [BARE, {**BARE, "response": "it is 41"}])
    chosen = [
        "--deadline",
        "120",
        *([] if task is None else ["--task", task]),
    ]  # a worker of a busy machine starts late
    assert main(["grade", path, *chosen]) == 0
    out = capsys.readouterr().out
    option = {"gsm8k": "last_number"}.get(task, "unmarked")
    assert "0 of 2 right" in out
    assert f"--option {option}=true" in out
    assert main(["grade", path, *chosen, "--option", f"{option}=true"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 right" in out
    assert "--option" not in out


def test_it_is_named_beside_json_and_only_where_it_helps(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [BARE])
    main(["grade", path, "--json"])
    found = capsys.readouterr()
    assert json.loads(found.out)["unanswered"] == 1
    assert "--option unmarked=true" in found.err
    main(["grade", write(tmp_path / "b.jsonl", [{**BARE, "response": "\\boxed{41}"}])])
    assert "--option" not in capsys.readouterr().out


def test_every_option_that_is_named_is_one_of_the_verifier():
    named = {name: task.unmarked for name, task in TASKS.items() if task.unmarked}
    assert {"math", "gsm8k", "aime"} <= named.keys()
    for name, option in named.items():
        assert getattr(TASKS[name].make_verifier(**{option: True}), option) is True


# ---------------------------------------------------------------------- rollout files
def test_rollouts_are_graded_as_they_are(tmp_path, capsys):
    rows = [
        rollout(["#### 4"]),
        rollout(["hm", "#### 4"]),  # the last turn
        rollout(["#### 4", "no: #### 5"]),
        rollout(["I do not"], cut=True),
        rollout([], stop="error", error="gone: the server"),
        rollout([]),
    ]
    rows[1]["messages"].append({"role": "user", "content": "#### 9"})  # said behind it
    path, output = write(tmp_path / "rollouts.jsonl", rows), tmp_path / "graded.jsonl"
    assert main(["grade", path, "--task", "gsm8k", "--json", "--output", str(output)]) == 1
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rows"], summary["correct"], summary["unanswered"], summary["failures"]) == (
        6,
        2,
        1,
        {"error": 2},
    )
    graded = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["correct"] for row in graded] == [True, True, False, False, False, False]
    assert "gone: the server" in graded[4]["failure"]
    assert "no message of the assistant" in graded[5]["failure"]
    assert graded[0]["messages"] == rows[0]["messages"]


@pytest.mark.parametrize(
    ("dataset", "task"), [("gsm8k", "gsm8k"), ("digits", "number"), (None, "math"), ("math", "math")]
)
def test_the_task_is_that_of_the_rollouts(tmp_path, capsys, dataset, task):
    path = write(tmp_path / "r.jsonl", [rollout(["#### 4"], "4", metadata={"dataset": dataset} if dataset else {})])
    main(["grade", path, "--json"])
    assert json.loads(capsys.readouterr().out)["task"] == task
    main(["grade", path, "--json", "--task", "exact"])
    assert json.loads(capsys.readouterr().out)["task"] == "exact"


def test_rollouts_of_what_is_not_graded_here(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", [rollout(["4"], metadata={"dataset": "reasoning-gym:leg_counting"})])
    assert main(["grade", path]) == 2
    assert "'reasoning-gym:leg_counting', which no task here grades: give --task" in capsys.readouterr().err


def test_eval_and_grade_agree(tmp_path, capsys):
    """A tiny random model, its rollouts graded again: the same figures; what was cut is told from what marks nothing."""
    out = tmp_path / "run"
    assert (
        main(["eval", "--dataset", "digits", "--limit", "24", "--max-new-tokens", "2", "--out", str(out), "--json"])
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert sum(summary["unanswered"].values()) == 24 - summary["stops"].get("answered", 0)
    assert main(["grade", str(out / "rollouts.jsonl"), "--json"]) == 0
    graded = json.loads(capsys.readouterr().out)
    assert graded["task"] == "number"
    assert (graded["rows"], graded["accuracy"]) == (24, summary["accuracy"])
    assert graded["unanswered"] == sum(summary["unanswered"].values())


def test_cut_answers_are_told_from_answers_without_a_mark():
    def episode(row, **more):
        shared = {
            "success": False,
            "error": None,
            "reward": 0.0,
            "reward_parts": {},
            "sampled_tokens": 9,
            "turns": 1,
            "cut": False,
            "grade_failure": None,
            "stop": "truncated",
        }
        return {"row": row, **shared, **more}

    rows = [
        episode(0, success=True, stop="answered"), episode(1, stop="answered", cut=True), episode(2), episode(3), episode(4, cut=True), episode(5, cut=True, stop="max_turn_tokens"),
        episode(6, cut=True, stop="max_tokens"), episode(7, stop="error", error="gone: x"),
    ]  # fmt: skip
    summary = Figures.of(rows).summary()
    assert summary["unanswered"] == {"cut": 3, "unmarked": 2}
    table = as_table({**summary, "dataset": "gsm8k", "model": "m"})
    assert "3 were cut before they gave one: raise --max-new-tokens" in table
    assert "2 ended by themselves without marking one" in table
    assert "no answer" not in as_table({**Figures.of(rows[:2]).summary(), "dataset": "gsm8k", "model": "m"})


# ---------------------------------------------------------------------- the input is never overwritten
@pytest.mark.parametrize("name", ["a.jsonl", "./a.jsonl", "folder/../a.jsonl", "symbolic", "hard"])
def test_output_is_never_the_input(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    path = tmp_path / "a.jsonl"
    write(path, [BARE])
    (tmp_path / "symbolic").symlink_to("a.jsonl")
    os.link(path, tmp_path / "hard")
    before = path.read_bytes()
    assert main(["grade", "a.jsonl", "--output", name]) == 2
    assert (
        f"--output {os.path.normpath(name) if name.startswith('./') else name} is the file that is graded"
        in capsys.readouterr().err
    )
    assert path.read_bytes() == before
    assert main(["grade", "a.jsonl", "--output", "b.jsonl"]) == 0
    assert path.read_bytes() == before


def test_output_is_never_what_comes_by_standard_input(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [BARE])
    program = "import sys; from torchrl_chat.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "grade", "-", "--output", str(path)]
    with path.open() as file:
        done = subprocess.run(command, stdin=file, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is the file that is graded" in done.stderr
    assert json.loads(path.read_text()) == BARE
