"""``torchrl-chat eval`` on several tasks with several models, the checkpoints of a training run, and tasks of local files."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest
from conftest import bpe_tokenizer, need_shared, respond
from hypothesis import given
from hypothesis import strategies as st

from torchrl_chat.cli.eval_plan import single_runs
from torchrl_chat.cli.main import main
from torchrl_chat.envs import AIMEEnv, DatasetError, GPQAEnv, HumanEvalEnv, MATH500Env, MMLUProEnv
from torchrl_chat.rewards import MultipleChoice
from torchrl_chat.rollouts import read_rollouts
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.services


def plan(dataset, model, data=None, endpoint=None):
    return single_runs(argparse.Namespace(dataset=dataset, model=model, data=data, endpoint=endpoint), Path("out"))


class TestPlan:
    NAMES = st.lists(
        st.sampled_from(["a", "b/c", "d/c", "e:f", "g h", "../x"]), min_size=1, max_size=4, unique=True
    )

    @given(NAMES, NAMES)
    def test_every_model_on_every_task_in_a_folder_of_its_own(self, datasets, models):
        runs = plan(datasets, models)
        assert {(run.dataset, run.model) for run in runs} == {(d, m) for d in datasets for m in models}
        assert len({run.out for run in runs}) == len(runs)
        assert all(Path("out") in (run.out, *run.out.parents) and ".." not in run.out.parts for run in runs)

    def test_data_and_endpoints(self):
        [one] = plan(["a"], ["m"], ["x=y.jsonl"])
        assert one.data == "x=y.jsonl"
        first, second = plan(["a", "b"], ["m"], ["b=y.jsonl"])
        assert (first.data, second.data) == (None, "y.jsonl")
        assert [(r.model, r.endpoint) for r in plan(["a"], ["m", "n"], None, ["u"])] == [("m", "u"), ("n", "u")]
        assert [(r.model, r.endpoint) for r in plan(["a"], ["m", "n"], None, ["u", "v"])] == [
            ("m", "u"),
            ("n", "v"),
        ]
        labels = [r.label for r in plan(["a"], ["m"], None, ["http://x:1/v1", "http://y:1/v1"])]
        assert labels == ["m@x:1", "m@y:1"]

    @pytest.mark.parametrize(
        ("lists", "message"),
        [
            ({"dataset": ["a", "a"], "model": ["m"]}, "there twice"),
            ({"dataset": ["a", "b"], "model": ["m"], "data": ["x.jsonl"]}, "NAME=PATH"),
            ({"dataset": ["a"], "model": ["m"], "data": ["a=x", "a=y"]}, "two paths"),
            ({"dataset": ["a"], "model": ["m", "n", "o"], "endpoint": ["u", "v"]}, "3 models and 2 endpoints"),
        ],
    )
    def test_lists_that_do_not_fit(self, lists, message):
        with pytest.raises(ValueError, match=message):
            plan(**lists)


def test_one_command_one_table(tmp_path, capsys):
    text = tiny_tokenizer(TEXT_ALPHABET)
    for seed in (1, 2):
        tiny_model(len(text), seed=seed, context=512).save_pretrained(tmp_path / f"m{seed}")
        text.save_pretrained(tmp_path / f"m{seed}")
    models = [str(tmp_path / "m1"), str(tmp_path / "none"), str(tmp_path / "m2")]
    command = ["--task", "digits", "sums", "--limit", "6", "--samples", "2", "--max-new-tokens", "2"]
    out = tmp_path / "out"
    assert (
        main(["eval", *command, "--model", *models, "--out", str(out)]) == 1
    )  # the one that is not there costs itself only
    streams = capsys.readouterr()
    assert "none" in streams.err
    for word in ("pass@2", "maj@2", "digits  m1", "sums    m2", "seconds"):
        assert word in streams.out
    before = {path: path.read_bytes() for path in out.glob("*/*/rollouts.jsonl")}
    assert {str(path.parent.relative_to(out)) for path in before} == {
        f"{m}/{d}" for m in ("m1", "m2") for d in ("digits", "sums")
    }
    assert main(["eval", "--resume", str(out), "--json"]) == 1
    assert {path: path.read_bytes() for path in before} == before  # nothing is played twice
    made = json.loads(capsys.readouterr().out)
    assert [(c["second"], c["task"], c["questions"]) for c in made["comparisons"]] == [
        ("m2", "digits", 6),
        ("m2", "sums", 6),
        ("m2", None, 12),
    ]
    cost = made["runs"][0]["tasks"]["digits"]["cost"]
    episodes = list(read_rollouts(out / "m1" / "digits" / "rollouts.jsonl"))
    assert cost["sampled_tokens"] == sum(e["sampled_tokens"] for e in episodes)
    assert cost["seconds"] == pytest.approx(sum(e["metadata"]["seconds"] for e in episodes), abs=1e-3)
    assert main(["eval", *command, "--model", models[1], "--out", str(tmp_path / "no")]) == 2


def test_checkpoints_as_a_curve(tmp_path, capsys):
    training = ["train", "--steps", "2", "--prompts", "2", "--group-size", "2", "--minibatch", "4", "--eval", "4"]
    assert main([*training, "--save-every", "1", "--keep", "9", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    curve = ["eval", "curve", str(tmp_path / "run"), "--limit", "8", "--json"]
    assert main([*curve, "--every", "2", "--html", str(tmp_path / "curve.html")]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [0, 2]
    assert main(curve) == 0  # goes on with the one that is missing
    streams = capsys.readouterr()
    assert json.loads(streams.out)["steps"] == [0, 1, 2]
    assert streams.err.count("going on: 8 of 8") == 2
    assert (
        json.loads((tmp_path / "run" / "eval-digits" / "step-000002" / "digits" / "config.json").read_text())[
            "max_new_tokens"
        ]
        == 1
    )
    assert main(["eval", "curve", str(tmp_path)]) == 2
    assert "has no checkpoints" in capsys.readouterr().err


# ---------------------------------------------------------------------- tasks of local files
ROWS = {
    "aime": {"id": "made-up-1", "problem": "What is 6 times 7?", "answer": "042", "year": 2031},
    "math-500": {"problem": "Halve 3.", "answer": "\\frac{3}{2}", "subject": "Algebra", "level": 1},
    "gpqa": {
        "Record ID": "r1",
        "Question": "Which is prime?",
        "Correct Answer": "23\n",
        "Incorrect Answer 1": "21",
        "Incorrect Answer 2": "25",
        "Incorrect Answer 3": "27",
        "Subdomain": "Numbers",
    },
    "mmlu-pro": {
        "question_id": 7,
        "question": "1 + 1?",
        "options": ["1", "2", "3"],
        "answer": "B",
        "answer_index": 1,
        "category": "math",
    },
    "humaneval": {
        "task_id": "made-up/0",
        "prompt": 'def square(x):\n    """The square."""\n',
        "entry_point": "square",
        "test": "def check(candidate):\n    assert candidate(3) == 9\n",
        "canonical_solution": "    return x * x\n",
    },
}
KINDS = {
    "aime": (AIMEEnv, lambda reference: "\\boxed{42}", "\\boxed{41}"),
    "math-500": (MATH500Env, lambda reference: "\\boxed{1.5}", "\\boxed{2}"),
    "gpqa": (GPQAEnv, lambda reference: f"The answer is ({reference['answer']}).", "I cannot tell."),
    "mmlu-pro": (MMLUProEnv, lambda reference: "The answer is (B).", "The answer is (A)."),
    "humaneval": (
        HumanEvalEnv,
        lambda reference: "```python\ndef square(x):\n    return x * x\n```",
        "```python\ndef square(x):\n    return x\n```",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_local_task_grades_its_rows(name):
    kind, right, wrong = KINDS[name]
    env = kind(dataset=[ROWS[name]], tokenizer=bpe_tokenizer(), input_mode="text", num_envs=2, seed=3)
    td = env.reset()
    texts = [right(td["answer"][0]), wrong]
    done = env.step(respond(env, td, texts))["next"]
    assert done["success"].flatten().tolist() == [True, False]
    assert done["done"].all() or name in ("gpqa",)
    env.close()


@pytest.mark.parametrize("name", KINDS)
def test_by_name_from_a_file(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n")
    command = ["eval", "--task", name, "--data", str(path), "--max-new-tokens", "2", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    [episode] = read_rollouts(tmp_path / "run" / "rollouts.jsonl")
    named = {
        "aime": "id",
        "math-500": "subject",
        "gpqa": "Subdomain",
        "mmlu-pro": "category",
        "humaneval": "task_id",
    }[name]
    assert episode["columns"][named] == ROWS[name][named]  # what a comparison may go by


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_file_is_told_what_to_hold(tmp_path, capsys, name):
    for arguments in ([], ["--data", str(tmp_path / "none.jsonl")]):
        assert main(["eval", "--task", name, *arguments]) == 2
        error = capsys.readouterr().err
        assert f"{name} needs" in error
        assert "a JSONL file whose rows have" in error
    with pytest.raises(DatasetError, match="needs dataset="):
        KINDS[name][0](tokenizer=bpe_tokenizer())


class TestChoices:
    @given(
        st.lists(st.text("abc xyz", min_size=1), min_size=2, max_size=10, unique_by=str.strip),
        st.integers(0, 99),
        st.data(),
    )
    def test_in_any_order_the_right_one_stays_right(self, texts, seed, data):
        right = data.draw(st.integers(0, len(texts) - 1))
        letter = MultipleChoice().letters[right]
        forms = [
            {"choices": texts, "answer": right},
            {"options": texts, "answer": letter},
            {"options": texts, "answer_index": right},
        ]
        row = {"question": "which?", **data.draw(st.sampled_from(forms))}
        env = GPQAEnv(dataset=[row], tokenizer=bpe_tokenizer(), input_mode="text", seed=seed)
        td = env.reset()
        reference = td["answer"][0]
        assert reference["choices"]["ABCDEFGHIJ".index(reference["answer"])] == texts[right].strip()
        assert sorted(reference["choices"]) == sorted(text.strip() for text in texts)
        assert f"{reference['answer']}. {texts[right].strip()}" in td["query"][0]

    def test_the_order_is_the_seeds_and_the_questions(self):
        rows = [{"question": f"{i}?", "choices": list("pqrstu"), "answer": 0} for i in range(20)]

        def orders(seed, **options):
            columns = GPQAEnv(dataset=rows, tokenizer=bpe_tokenizer(), seed=seed, **options).primer.episodes
            return [tuple(columns.next()["answer"]["choices"]) for _ in range(20)]

        same = {"shuffle": False}
        assert orders(1, **same) == orders(1, **same) != orders(2, **same)
        assert sorted(orders(1)) == sorted(orders(1, **same))  # in whatever order the rows come
        assert len(set(orders(1, **same))) > 10
        assert set(orders(1, shuffle_choices=False)) == {tuple("pqrstu")}

    def test_a_row_without_a_right_choice_costs_itself(self):
        rows = [
            {"question": "a?", "choices": ["x", "y"], "answer": "z"},
            {"question": "b?", "choices": ["x", "y"], "answer": "y"},
        ]
        env = MMLUProEnv(dataset=rows, tokenizer=bpe_tokenizer(), input_mode="text", num_envs=2, shuffle=False)
        with pytest.warns(RuntimeWarning, match="names no choice"):
            done = env.step(respond(env, env.reset(), ["B", "B"]))["next"]
        assert done["success"].flatten().tolist() == [False, True]

    def test_rows_without_choices_are_named(self):
        with pytest.raises(KeyError, match="has no choices: expected a JSONL file.*it has question, answer"):
            GPQAEnv(dataset=[{"question": "a?", "answer": "b"}], tokenizer=bpe_tokenizer())


@pytest.mark.full
def test_the_solutions_of_humaneval_pass():
    rows = [json.loads(line) for line in need_shared("data/humaneval/HumanEval.jsonl").read_text().splitlines()]
    rows = random.Random(0).sample(rows, 40)
    env = HumanEvalEnv(dataset=rows, tokenizer=bpe_tokenizer(), workers=2)
    said = [f"```python\n{row['prompt']}{row['canonical_solution']}```" for row in rows]
    assert all(verdict.correct for verdict in env.score(said))
    env.close()
