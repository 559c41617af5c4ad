"""Every task by its name: one place makes it for training and evaluation, with its own settings, and says what it lacks."""

from __future__ import annotations

import json
import re

import pytest
from conftest import bpe_tokenizer, of_the_day
from run_books import example, jsonl
from torchrl.envs.utils import check_env_specs

from torchrl_chat import columns, gallery
from torchrl_chat.cli import main as cli
from torchrl_chat.envs import HumanEvalEnv, MMLUProEnv, RowsEnv
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer

GRADER = """
from torchrl_chat.rewards import grades

def brief(response, reference):
    return float(len(response) <= (3 if reference is None else int(reference)))

@grades("episode")
def long(episode):
    return float(episode.length > 3)

class Exactly:
    def __init__(self, length=8):
        self.length = length

    def __call__(self, response, reference):
        return float(len(response) == self.length)

nothing = None
"""
ROWS = {
    "gsm8k": {"question": "How much is 6 * 7?", "answer": "6 * 7 is 42. #### 42"},
    "math": {"problem": "What is 1/2 + 1/3?", "solution": "It is \\boxed{5/6}."},
    "countdown": {"query": "Make 7 of 3 and 4.", "target": 7, "nums": [3, 4]},
    "ifeval": {"prompt": "Greet me.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "rows.jsonl": {"prompt": "Be brief."},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a file of rows for each task, and a module with rewards, in which commands are given."""
    for name, row in ROWS.items():
        path = tmp_path / (name if "." in name else f"{name}.jsonl")
        path.write_text("".join(json.dumps({**row, "number": i}) + "\n" for i in range(4)))
    (tmp_path / "graders.py").write_text(GRADER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = {  # the words that name each task, here
    "gsm8k": "--data gsm8k.jsonl --option last_number=true format_reward=0.1",
    "math": "--data math.jsonl --option unmarked=true",
    "countdown": "--option numbers=[3] size=4",
    "ifeval": "--data ifeval.jsonl --option score=instruction_loose",
    "reasoning-gym:chain_sum": "--option max_terms=2 size=4 system_prompt=Add.",
    "rows.jsonl": "--reward graders.py:brief",
}
ALONE = "--steps 1 --prompts 2 --group_size 2 --eval 2 --show_every 0 --max_new_tokens 4 --seed 1"


@pytest.mark.parametrize("name", of_the_day(*WORDS, share=2))
def test_a_step_of_training(here, name):
    """The answers of every task are sampled, graded and learned from, by the words that eval takes, too."""
    words = ["--dataset", name, *WORDS[name].split(), *ALONE.split(), "--out", "run"]
    example("grpo").main(words)
    [step] = jsonl(here / "run" / "metrics.jsonl")
    assert step["ungraded"] == 0
    assert step["skipped"] == 0
    assert step["sampled_tokens"] > 0
    evaluation = ["eval", "--dataset", name, *WORDS[name].split(), "--limit", "1", "--max-new-tokens", "4"]
    assert cli.main([*evaluation, "--out", "eval"]) == 0


@pytest.mark.services
@pytest.mark.full
@pytest.mark.parametrize("script", ["ppo", "expert_iteration"])
@pytest.mark.parametrize("name", WORDS)
def test_the_other_scripts(here, name, script, monkeypatch):
    words = ["--dataset", name, *WORDS[name].split(), *ALONE.split(), "--out", "run"]
    monkeypatch.setattr("sys.argv", [script, *words])
    example(script).main()
    assert [step["ungraded"] for step in jsonl(here / "run" / "metrics.jsonl")] == [0]


def made(name, **given):
    return gallery.make_env(name, tokenizer=tiny_tokenizer(TEXT_ALPHABET), input_mode="text", num_envs=2, **given)


def rewards(env, texts):
    td = env.reset()
    td["text"].response = texts
    return env.step(td)["next", "reward"].flatten().tolist()


class TestRows:
    def test_what_grades(self, here):
        """A function, a class with settings, a level of its own, a verifier by name, a task by name."""
        texts = ["ab", "abcde"]
        assert rewards(made("rows.jsonl", reward="graders.py:brief"), texts) == [1.0, 0.0]
        assert rewards(made("rows.jsonl", reward="graders.py:Exactly", settings={"length": 5}), texts) == [0.0, 1.0]
        assert rewards(made("rows.jsonl", reward="graders:long"), texts) == [0.0, 1.0]
        assert rewards(made("gsm8k.jsonl", reward="gsm8k"), ["#### 42", "42"]) == [1.0, 0.0]
        assert (
            made("gsm8k.jsonl", reward="gsm8k").reset()["text"].prompt[0].count("<answer>")
        )  # its instruction, too
        for name in ("digits", "countdown"):  # instead of the task's own
            env = made(name, reward="graders.py:Exactly", settings={"length": 5, "system_prompt": "Say five."})
            assert "Say five." in env.reset()["text"].prompt[0]
            assert rewards(env, texts) == [0.0, 1.0]

    def test_columns_of_other_names(self, here):
        (here / "own.jsonl").write_text(
            json.dumps({"ask": "Be brief.", "most": 5, "answer": "of another question"}) + "\n"
        )
        keys = {"data_key": "ask", "reference_key": "most"}
        env = made("own.jsonl", reward="graders.py:brief", settings=keys)
        td = env.reset()
        assert (list(td["query"]), list(td["answer"])) == (["Be brief."] * 2, [5] * 2)
        assert rewards(env, ["abcde", "abcdef"]) == [1.0, 0.0]
        assert [verdict.score for verdict in env.score(["abcdef"])] == [0.0]
        for given, said in (
            ({}, "names its column"),
            (keys | {"reference_key": "least"}, "looked for least; it has"),
        ):
            with pytest.raises(KeyError, match=said):
                made("own.jsonl", reward="graders.py:brief", settings=given).reset()

    def test_columns_of_other_names_for_a_task_that_is_here(self, here):
        (here / "sums.jsonl").write_text(json.dumps({"ask": "6 * 7?", "gold": "#### 42", "answer": "no"}) + "\n")
        keys = {"data_key": "ask", "reference_key": "gold"}
        env = made("sums.jsonl", reward="gsm8k", settings={**keys, "last_number": True})
        assert list(env.reset()["query"]) == ["6 * 7?"] * 2
        assert rewards(env, ["It is 42", "43"]) == [1.0, 0.0]

    def test_a_subclass_s_columns_are_its_own(self):
        class Shouted(RowsEnv):
            @classmethod
            def columns_of(cls, rows):
                columns = super().columns_of(rows)
                return columns | {"query": [query.upper() for query in columns["query"]]}

            @classmethod
            def _reference_of(cls, row):
                return len(row["query"])

        rows = [{"ask": "hi there"}]
        options = {"verifier": lambda response, reference: 1.0, "tokenizer": bpe_tokenizer(), "input_mode": "text"}
        td = Shouted(dataset=rows, data_key="ask", **options).reset()
        assert (list(td["query"]), list(td["answer"])) == (["HI THERE"], [8])
        assert RowsEnv.columns_of([{"prompt": "x"}]) == {"query": ["x"], "answer": [None]}

    def test_an_empty_question_ends_its_row_alone(self):
        rows = [{"prompt": text, "gold": "x"} for text in ("a", None, "c", "d")]
        keys = {"data_key": "prompt", "reference_key": "gold"}
        for given in ({"reference_key": "gold"}, keys):
            env = RowsEnv(
                dataset=rows, verifier=lambda response, reference: 1.0, tokenizer=bpe_tokenizer(), input_mode="text",
                num_envs=4, shuffle=False, **given,
            )  # fmt: skip
            with pytest.warns(RuntimeWarning):
                td = env.reset()
            assert ["query" in why for why in columns.read_objects(td["env_failure"], td.batch_size)] == [
                k == 1 for k in range(4)
            ]

    def test_an_empty_question_is_none_whatever_is_written_around_it(self):
        choices = {"question": None, "options": ["1", "2"], "answer": "B", "answer_index": 1}
        assert MMLUProEnv.columns_of([choices])["query"] == [None]
        problem = {"prompt": None, "test": "def check(f): pass", "entry_point": "f"}
        assert HumanEvalEnv.columns_of([problem])["query"] == [None]

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            ("def one(response):\n    return 1.0\n", "one(response) cannot be called with (response, reference)"),
            ("class one:\n    def __call__(self, response):\n        return 1.0\n", "cannot be called with"),
        ],
    )
    def test_a_reward_that_cannot_be_called_is_refused_before_anything_is_loaded(self, here, code, said):
        (here / "wrong.py").write_text(code)
        with pytest.raises(ValueError, match=re.escape("reward='wrong.py:one': ")) as refused:
            gallery.check_name("rows.jsonl", reward="wrong.py:one")
        assert said in str(refused.value)

    def test_specs_are_what_comes(self, here):
        check_env_specs(made("rows.jsonl", reward="graders.py:brief"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--dataset rows.jsonl", "nothing that grades them: give a reward (--reward)"),
        ("--dataset nowhere.jsonl --reward exact", "'nowhere.jsonl': there is no such dataset file"),
        ("--dataset gsm8k --data ./nowhere.jsonl", "'./nowhere.jsonl': there is no such dataset file"),
        ("--dataset rows.jsonl --data gsm8k.jsonl --reward exact", "rows.jsonl holds the rows itself"),
        ("--dataset rows.jsonl --reward graders.py:missing", "graders.py:missing cannot be loaded"),
        ("--dataset rows.jsonl --reward nofile.py:brief", "there is no file nofile.py"),
        ("--dataset rows.jsonl --reward graders.py:nothing", "is a NoneType: expected a function"),
        ("--dataset rows.jsonl --reward best", "'best': expected file.py:function"),
        ("--dataset reasoning-gym:chain_sum --reward exact", "graded by its generator"),
        ("--dataset reasoning-gym:chain_sum --option max_words=3", "does not take {'max_words': 3"),
        ("--dataset gsm8k --option last_number", "--option last_number: expected NAME=VALUE"),
        ("--dataset digit", "there is no environment 'digit'"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_what_is_wrong_is_said_before_a_model_is_loaded(here, command, words, said, capsys, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("torchrl_chat.cli.eval.make_policy", loaded)
    monkeypatch.setattr("torchrl_chat.recipes.grpo.make_model", loaded)
    try:
        code = cli.main([command, *words.split()])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("gsm8k", {"settings": {"last_numbre": True}}, "GSM8KVerifier has no option 'last_numbre': it has"),
        ("rows.jsonl", {"reward": "graders.py:brief", "settings": {"most": 3}}, "does not take the settings most"),
        ("digits", {"settings": {"num_envs": 3}}, "num_envs is no setting of a task"),
        ("digits", {"settings": {"numbers": 3}}, "does not take the settings numbers"),
    ],
)
def test_settings_that_nobody_takes_are_named(here, name, given, said):
    with pytest.raises((ValueError, TypeError), match=said.replace("(", r"\(")):
        made(name, **given)


@pytest.mark.parametrize("name", ["gsm8k", "math", "ifeval"])
def test_a_task_without_its_rows_says_what_to_give(name, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no hub")

    monkeypatch.setattr("torchrl_chat.envs.loading._built", unreachable)
    with pytest.raises(ValueError, match="--data") as told:
        made(name)
    columns = {"gsm8k": "question, answer", "math": "problem, and answer", "ifeval": "instruction_id_list"}
    assert columns[name] in str(told.value)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_names_every_task_and_what_it_takes(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, about in gallery.ABOUT.items():
        assert f"{name} {about}" in shown
    assert "--reward" in shown
    assert "--option" in shown
