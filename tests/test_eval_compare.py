"""``torchrl-chat eval compare`` and ``rescore``: who is paired with whom, what is told, what is refused."""

from __future__ import annotations

import json
import random
import re

import pytest
from eval_runs import answers, episode, write_run
from hypothesis import given
from hypothesis import strategies as st

from torchrl_chat.cli.main import main
from torchrl_chat.evaluation.report import report
from torchrl_chat.evaluation.runs import paired, read_runs
from torchrl_chat.rollouts import read_rollouts

HOSTILE = "<script>document.title='hit'</script> & \ud83d"


def compare(*arguments):
    return main(["eval", "compare", *map(str, arguments)])


def told(capsys, *arguments):
    assert compare(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------------- pairs
class TestPairs:
    @given(
        st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=12),
        st.randoms(),
    )
    def test_of_what_both_have_in_any_order(self, tmp_path_factory, rows, luck):
        """Each row: whether each run has it, and whether each has it right. Orders and row numbers do not matter."""
        folder = tmp_path_factory.mktemp("runs")
        runs = []
        for side in (0, 1):
            there = [i for i, row in enumerate(rows) if row[side]]
            luck.shuffle(there)
            made = [
                episode(n, 0, rows[i][2 + side], query=f"question {i}", reference=str(i))
                for n, i in enumerate(there)
            ]
            runs.append(made)
        if not all(runs):
            return
        first, second = read_runs([write_run(folder / name, made) for name, made in zip("ab", runs, strict=True)])
        pairs = paired(first.tasks["made-up"], second.tasks["made-up"])
        both = [i for i, row in enumerate(rows) if row[0] and row[1]]
        assert {(a.query, b.query) for a, b in pairs.both} == {(f"question {i}",) * 2 for i in both}
        assert {(a.query, a.values[0], b.values[0]) for a, b in pairs.both} == {
            (f"question {i}", float(rows[i][2]), float(rows[i][3])) for i in both
        }
        assert {q.query for q in pairs.only_first} == {
            f"question {i}" for i, row in enumerate(rows) if row[0] and not row[1]
        }
        assert {q.query for q in pairs.only_second} == {
            f"question {i}" for i, row in enumerate(rows) if row[1] and not row[0]
        }
        assert (pairs.reworded, pairs.other_reference, pairs.repeated) == (0, 0, 0)

    def test_by_id_where_choices_were_shuffled(self, tmp_path, capsys):
        def run(name, seed):
            rows = []
            for row in range(6):
                texts = [f"{row} {word}" for word in ("right", "wrong", "odd")]
                random.Random(seed * 10 + row).shuffle(texts)
                reference = {"answer": "ABC"[texts.index(f"{row} right")], "choices": texts}
                rows.append(
                    episode(row, 0, True, query=f"{row}? {texts}", reference=reference, columns={"id": f"q{row}"})
                )
            return write_run(tmp_path / name, rows)

        made = told(capsys, run("a", 1), run("b", 2))
        assert made["comparisons"][0]["questions"] == 6
        assert made["comparisons"][0]["reworded"] >= 3
        assert any("paired by their id" in note for note in made["notes"])

    def test_one_id_of_two_questions_is_no_pair(self, tmp_path, capsys):
        a = write_run(tmp_path / "a", [episode(0, 0, True, query="2 + 2?", reference="4", columns={"id": 1})])
        b = write_run(tmp_path / "b", [episode(0, 0, True, query="3 + 3?", reference="6", columns={"id": 1})])
        [comparison] = told(capsys, a, b)["comparisons"]
        assert (comparison["questions"], comparison["only_first"], comparison["only_second"]) == (0, 1, 1)
        assert compare(a, b) == 0
        assert "There is no question that both have" in capsys.readouterr().out

    def test_rows_that_repeat_a_question_say_nothing_new(self, tmp_path, capsys):
        rows = [episode(row, 0, True, query="again?", reference="1") for row in range(5)]
        other = [
            episode(0, 0, False, query="again?", reference="1"),
            episode(1, 0, False, query="again?", reference="2"),
        ]
        made = told(capsys, write_run(tmp_path / "a", rows), write_run(tmp_path / "b", other))
        [comparison] = made["comparisons"]
        assert (comparison["questions"], comparison["repeated"], comparison["only_second"]) == (1, 4, 1)
        assert any("4 rows ask what an earlier row asks" in note for note in made["notes"])


# ---------------------------------------------------------------------- what it comes to
class TestCompare:
    def test_one_answer_each(self, tmp_path, capsys):
        first = [[1]] * 20 + [[0]] * 12 + [[1]] * 2 + [[0]] * 6
        second = [[1]] * 20 + [[1]] * 12 + [[0]] * 2 + [[0]] * 3
        a, b = answers(tmp_path / "small", first), answers(tmp_path / "large", second)
        assert compare(a, b) == 0
        text = capsys.readouterr().out
        assert "12 gained, 2 lost: McNemar's exact p 0.013" in text
        assert "large is better than small." in text
        assert "left out: 3 questions that only small has" in text
        [comparison] = told(capsys, a, b)["comparisons"]
        assert (comparison["questions"], comparison["gained"], comparison["lost"], comparison["decided"]) == (
            37,
            12,
            2,
            True,
        )
        assert comparison["difference"] == pytest.approx(10 / 37)
        assert comparison["left_out"]["first"] == ["question 37", "question 38", "question 39"]
        assert [e["question"] for e in comparison["examples"]["lost"]] == ["question 32", "question 33"]

    def test_several_answers_are_a_cluster(self, tmp_path, capsys):
        luck = random.Random(0)
        first = [[int(luck.random() < 0.4) for _ in range(4)] for _ in range(60)]
        second = [[int(luck.random() < 0.46) for _ in range(4)] for _ in range(60)]
        a, b = answers(tmp_path / "a", first), answers(tmp_path / "b", second)
        [comparison] = told(capsys, a, b)["comparisons"]
        assert (comparison["p"], comparison["answers"]) == (None, [4, 4])
        low, high = comparison["interval"]
        assert low < comparison["difference"] < high
        assert comparison["questions_needed"] > 60
        assert compare(a, b) == 0
        assert "60 questions in both, 4 answers each" in capsys.readouterr().out

    def test_slices_add_up(self, tmp_path, capsys):
        def run(name, rights):
            rows = [
                episode(i, 0, right, columns={"level": i % 3, "subject": "algebra"} if i < 28 else {})
                for i, right in enumerate(rights)
            ]
            return write_run(tmp_path / name, rows)

        a, b = run("a", [i % 2 == 0 for i in range(30)]), run("b", [i % 3 == 0 for i in range(30)])
        [comparison] = told(capsys, a, b, "--by", "level", "subject")["comparisons"]
        assert list(comparison["slices"]["level"]) == ["0", "1", "2", "(none)"]
        for slices in comparison["slices"].values():
            assert sum(s["questions"] for s in slices.values()) == 30
            assert sum(s["gained"] for s in slices.values()) == comparison["gained"]
        assert compare(a, b, "--by", "nothing") == 2
        assert "there are level, subject" in capsys.readouterr().err

    def test_tasks_and_models_of_folders(self, tmp_path, capsys):
        for model, share in (("x", 3), ("y", 2)):
            for task in ("t1", "t2"):
                answers(
                    tmp_path / model / task, [[int(i % share > 0)] for i in range(12)], dataset=task, model=model
                )
        answers(tmp_path / "x" / "t3", [[1]], dataset="t3", model="x")
        answers(
            tmp_path / "y" / "t1-exact", [[1]], dataset="t1", model="y", rescored={"run": "y/t1"}
        )  # no task of its own
        made = told(capsys, tmp_path)
        assert [run["name"] for run in made["runs"]] == ["x", "y"]
        assert [(c["task"], c["questions"]) for c in made["comparisons"]] == [("t1", 12), ("t2", 12), (None, 24)]
        assert any("only x has the task t3" in note for note in made["notes"])
        assert told(capsys, tmp_path / "x", tmp_path / "y")["comparisons"] == made["comparisons"]

    def test_rewards_and_their_parts(self, tmp_path, capsys):
        def run(name, gain):
            rows = [
                episode(i, 0, False, reward=i / 10 + gain, reward_parts={"format": gain * (i % 2)})
                for i in range(8)
            ]
            return write_run(tmp_path / name, rows)

        a, b = run("a", 0.0), run("b", 0.25)
        assert told(capsys, a, b, "--metric", "reward")["comparisons"][0]["difference"] == pytest.approx(0.25)
        assert told(capsys, a, b, "--metric", "format")["comparisons"][0]["difference"] == pytest.approx(0.125)
        assert compare(a, b, "--metric", "style") == 2
        assert "expected success, reward, format" in capsys.readouterr().err

    def test_what_a_reader_has_to_know(self, tmp_path, capsys):
        a = write_run(tmp_path / "a", [episode(i, 0, True) for i in range(4)], temperature=0.0)
        rows = [
            episode(0, 0, True),
            episode(1, 0, False, error="gone: x"),
            episode(2, 0, False, grade_failure="timeout: x"),
        ]
        b = write_run(tmp_path / "b", rows, temperature=1.0)
        (b / "summary.json").write_text('{"missing": 1}')
        notes = " ".join(told(capsys, a, b)["notes"])
        for words in (
            "b lacks 1 answers",
            "1 requests of b failed",
            "1 answers of b",
            "temperature 1.0, a with 0.0",
        ):
            assert words in notes

    def test_bad_input_is_one_line(self, tmp_path, capsys):
        run = answers(tmp_path / "a", [[1]])
        (tmp_path / "empty").mkdir()
        (tmp_path / "blank").mkdir()
        (tmp_path / "blank" / "rollouts.jsonl").touch()
        for arguments, message in (
            ([run], "give at least two"),
            ([run, tmp_path / "empty"], "there is no run of eval here"),
            ([run, tmp_path / "blank"], "has no episodes"),
            ([run, tmp_path / "none"], "there is no run of eval here"),
        ):
            assert compare(*arguments) == 2
            error = capsys.readouterr().err
            assert message in error
            assert "Traceback" not in error

    def test_a_page_of_one_file(self, tmp_path, capsys):
        rows = [episode(i, 0, i > 2, query=f"{HOSTILE} {i}", answer=HOSTILE) for i in range(6)]
        a = write_run(tmp_path / "<b>a", rows)
        b = write_run(tmp_path / "b", [{**row, "success": not row["success"]} for row in rows])
        assert compare(a, b, "--html", tmp_path / "pages" / "report.html") == 0
        page = (tmp_path / "pages" / "report.html").read_text()
        assert "&lt;script&gt;" in page
        assert "<script" not in page
        assert "<b>a" not in page
        assert not re.search(r"(?:src|href)=\"(?!#)|url\(|@import|https?:", page)


def test_a_run_of_its_own_training_is_a_curve(tmp_path):
    runs = [answers(tmp_path / f"step-{step:06d}", [[1]] * step + [[0]] * (9 - step)) for step in (2, 5, 9)]
    made = report(read_runs(runs))
    assert made["steps"] == [2, 5, 9]
    assert [c["difference"] for c in made["comparisons"]] == pytest.approx([3 / 9, 7 / 9])


# ---------------------------------------------------------------------- rescore
def said(folder, *texts):
    rows = [
        episode(row, 0, False, query=f"{row}?", reference=str(row), answer=text) for row, text in enumerate(texts)
    ]
    return write_run(folder, rows, dataset="gsm8k")


class TestRescore:
    def test_another_grader_of_the_package(self, tmp_path, capsys):
        run = said(tmp_path / "run", "it is 0", "it is #### 1", "no", "it is 3")
        assert main(["eval", "rescore", str(run), "--reward", "number"]) == 0
        text = capsys.readouterr().out
        assert "3 of 4 grades changed: 3 are right now, 0 wrong" in text
        assert "0.0, right now: it is 0" in text
        again = tmp_path / "run-number"
        assert [e["success"] for e in read_rollouts(again / "rollouts.jsonl")] == [True, True, False, True]
        assert [e["extracted"] for e in read_rollouts(again / "rollouts.jsonl")] == ["0", "1", None, "3"]
        assert json.loads((again / "summary.json").read_text())["accuracy"] == 0.75
        [comparison] = told(capsys, run, again)["comparisons"]
        assert (comparison["gained"], comparison["lost"]) == (3, 0)
        assert main(["eval", "rescore", str(run), "--reward", "number"]) == 2
        assert "holds a run already" in capsys.readouterr().err
        assert main(["eval", "--resume", str(again)]) == 2
        assert "were rescored" in capsys.readouterr().err

    def test_with_options(self, tmp_path, capsys):
        run = said(tmp_path / "run", "it is 0", "it is #### 1")
        for option, right in (("last_number=true", 2), ("last_number=false", 1)):
            out = tmp_path / option
            assert (
                main(
                    [
                        "eval",
                        "rescore",
                        str(run),
                        "--reward",
                        "gsm8k",
                        "--option",
                        option,
                        "--out",
                        str(out),
                        "--json",
                    ]
                )
                == 0
            )
            assert json.loads(capsys.readouterr().out)["changes"]["gained"] == right

    def test_a_grader_of_ones_own(self, tmp_path, capsys):
        (tmp_path / "own_grader.py").write_text(
            "def short(response, reference):\n    if response == 'bad':\n        raise ValueError('odd')\n    return float(len(response) < 4)\n"
        )
        run = said(tmp_path / "run", "yes", "bad", "much too long")
        assert main(["eval", "rescore", str(run), "--reward", f"{tmp_path}/own_grader.py:short"]) == 1
        found = list(read_rollouts(tmp_path / "run-own_grader.py-short" / "rollouts.jsonl"))
        assert [e["success"] for e in found] == [True, False, False]
        assert "odd" in found[1]["grade_failure"]  # and the others are graded

    @pytest.mark.parametrize(
        ("reward", "option", "message"),
        [
            ("nothing", None, "expected one of gsm8k"),
            ("no_module:name", None, "cannot be loaded"),
            ("number", "strict=1", "has no option 'strict'"),
            ("number", "strict", "expected NAME=VALUE"),
            ("json:dumps", "indent=1", "takes no --option"),
            ("json:__all__", None, "can be called"),
        ],
    )
    def test_what_is_no_grader(self, tmp_path, capsys, reward, option, message):
        run = said(tmp_path / "run", "0")
        extra = [] if option is None else ["--option", option]
        assert main(["eval", "rescore", str(run), "--reward", reward, *extra]) == 2
        assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
