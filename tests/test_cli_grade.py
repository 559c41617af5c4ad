"""``torchrl-chat grade``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from torchrl_chat.cli.grade import wilson
from torchrl_chat.cli.main import main

ROWS = [
    {"question": "2 + 2?", "reference": "4", "response": "\\boxed{4}"},
    {"question": "2 + 2?", "answer": "#### 4", "response": {"role": "assistant", "content": "#### 5"}},
    {"question": "half?", "answer": "\\frac{1}{2}", "response": [{"role": "assistant", "content": "\\boxed{0.5}"}]},
    {"question": "2 + 2?", "reference": "4", "response": "no idea"},
]


def write(folder: Path, rows: list) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_accuracy(tmp_path, capsys):
    assert main(["grade", write(tmp_path, ROWS)]) == 0
    out = capsys.readouterr().out
    assert "2 of 4 right: accuracy 0.5000 (95 % interval 0.1500 to 0.8500)" in out
    assert "1 without an answer" in out
    assert "row 2: wrong, 0: 5 for #### 4" in out
    assert "row 4: wrong, 0: no answer for 4" in out
    assert "row 1" not in out


def test_rows_that_cannot_be_graded_cost_themselves(tmp_path, capsys):
    output = tmp_path / "graded.jsonl"
    rows = [*ROWS, "{nonsense", "[1]", {"reference": "4"}, {"response": "4"}, {"reference": "4", "response": 4}]
    assert main(["grade", write(tmp_path, rows), "--json", "--output", str(output)]) == 1
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == 9
    assert summary["correct"] == 2
    assert summary["failures"] == {"error": 5}
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["correct"] for row in written] == [True, False, True, False, *[False] * 5]
    assert written[0]["extracted"] == "4"
    assert written[0]["question"] == "2 + 2?"
    assert "line 5 is not JSON" in written[4]["failure"]
    assert "no response under 'response'" in written[6]["failure"]
    assert "'math' has no reference" in written[7]["failure"]


def test_half_a_surrogate_pair_does_not_end_the_run(tmp_path, capsys):
    output = tmp_path / "graded.jsonl"
    row = '{"reference": "4", "response": "\\\\boxed{5\\ud83d}", "note": "\\ude00 \u00e9"}'
    assert main(["grade", write(tmp_path, [row, ROWS[0]]), "--task", "gsm8k", "--output", str(output)]) == 0
    assert "1 of 2 right" in capsys.readouterr().out
    assert (
        main(
            ["grade", write(tmp_path, [row, ROWS[0]]), "--task", "exact", "--show", "all", "--output", str(output)]
        )
        == 0
    )
    assert "\\ud83d" in capsys.readouterr().out
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert written[0]["response"] == written[0]["extracted"] == "\\boxed{5\ud83d}"
    assert written[0]["note"] == "\ude00 \u00e9"


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (["\\boxed{4}"], "is no conversation"),
        ([], "is no conversation"),
        ([{"role": "assistant", "content": "5"}, "\\boxed{4}"], "is no conversation"),
        ([{"role": "user", "content": "\\boxed{4}"}], "is not the assistant's"),
        (
            [{"role": "assistant", "content": "5"}, {"role": "user", "content": "\\boxed{4}"}],
            "is not the assistant's",
        ),
        ([{"content": "\\boxed{4}"}], "is not the assistant's"),
        ([{"role": "assistant"}], "no response under"),
    ],
)
def test_a_list_has_to_be_a_conversation_that_the_assistant_ends(tmp_path, capsys, response, reason):
    assert main(["grade", write(tmp_path, [{"reference": "4", "response": response}, ROWS[0]])]) == 1
    out = capsys.readouterr().out
    assert reason in out
    assert "1 of 2 right" in out


def test_tasks_and_options(tmp_path, capsys):
    row = {"answer": "#### 4", "response": "it is 4", "other": "#### 5"}
    path = write(tmp_path, [row])
    arguments = ["grade", path, "--task", "gsm8k", "--json"]
    main(arguments)
    assert json.loads(capsys.readouterr().out)["unanswered"] == 1
    main([*arguments, "--option", "last_number=true"])
    assert json.loads(capsys.readouterr().out)["correct"] == 1
    main([*arguments, "--response-key", "other", "--option", "format_reward=0.25"])
    assert json.loads(capsys.readouterr().out)["mean_score"] == 0.25
    main([*arguments, "--response-key", "other", "--reference-key", "other"])
    assert json.loads(capsys.readouterr().out)["correct"] == 1
    ifeval = {"prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "response": "well"}
    main(["grade", write(tmp_path, [ifeval]), "--task", "ifeval", "--json"])
    assert json.loads(capsys.readouterr().out)["parts"]["instruction_loose"] == 1.0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--option", "lst_number=true"], "no option 'lst_number'"),
        (["--option", "last_number"], "expected NAME=VALUE"),
    ],
)
def test_bad_arguments(tmp_path, capsys, extra, message):
    assert main(["grade", write(tmp_path, ROWS), "--task", "gsm8k", *extra]) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_grade(tmp_path, capsys):
    assert main(["grade", write(tmp_path, [])]) == 2
    assert "has no rows" in capsys.readouterr().err
    assert main(["grade", str(tmp_path / "gone.jsonl")]) == 2
    assert "gone.jsonl" in capsys.readouterr().err


def test_starts_without_torch(tmp_path):
    program = (
        "import sys; from torchrl_chat.cli.main import main; "
        f"code = main(['grade', {write(tmp_path, ROWS[:2])!r}, '--task', 'gsm8k']); "
        "sys.exit(3 if {'torch', 'transformers', 'torchrl'} & sys.modules.keys() else code)"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


def test_wilson():
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    low, high = wilson(81, 263)  # the example of Newcombe 1998, table I
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
