"""GSM8K: the reading of answers, the verifier, and all 8,792 real rows through the environment."""

from __future__ import annotations

import json
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from conftest import bpe_tokenizer, need_shared, of_the_day, respond
from growth import grows_linearly
from hypothesis import given
from hypothesis import strategies as st
from torchrl.envs.utils import check_env_specs

from torchrl_chat import GSM8KEnv, GSM8KVerifier, NumberVerifier
from torchrl_chat.rewards import extract_number, parse_number
from torchrl_chat.rewards.gsm8k import reference_number

ROWS = [
    {"question": "Tom has 40 clips and gets 2 more. How many has he?", "answer": "40 + 2 = <<40+2=42>>42\n#### 42"},
    {"question": "He owes 1,234 dollars. What is his balance?", "answer": "-1,234\n#### -1,234"},
]


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("42", "42"), ("-3", "-3"), ("−3", "-3"), ("1,234.50", "1234.5"), (".5", "0.5"), ("$5", "5"), ("-$5", "-5"),
            ("$-5", "-5"), ("€1,000", "1000"), ("42%", "42"), ("42.", "42"), ("\\$18", "18"), ("**7**", "7"),
            ("12,345,678", "12345678"), (" 10\n", "10"),
            ("", None), ("x", None), ("5-3", None), ("1/2", None), ("1,2,3", None), ("1 2", None), ("9" * 500, None), ("- 5", "-5"), ("− 5", "-5"), ("-" + "1" * 40, "-" + "1" * 40), ("-0", "0"),
        ],
    )  # fmt: skip
    def test_parse(self, text, value):
        assert parse_number(text) == (None if value is None else Decimal(value))

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("64 + 60 = 124, then 124 + 7 = 131. The answer is 131.", "131"),
            ("5-3", "3"), ("it is -3", "-3"), ("(-5)", "-5"), ("a1b", "1"), ("from 3 to $1,200 a month", "1200"),
            ("x = .5", "0.5"), ("none", None), ("1.5.", "1.5"),
            ("Answer:\n- 5", "5"), ("Answer - 5", "5"), ("- 5", "5"), ("x = - 5", "-5"), ("x =- 5", "-5"), ("(- 5)", "-5"), ("5 - 3", "3"),
            ("Answer: -5", "-5"), ("- -5", "-5"), ("- $5", "5"), ("1,2,345", "345"), ("111,111,1", "1"), ("of 1,234, or so", "1234"),
        ],
    )  # fmt: skip
    def test_extract(self, text, value):
        assert extract_number(text) == (None if value is None else Decimal(value))

    def test_public_vectors(self):
        """The cases of public graders about integers and GSM8K's own format."""
        path = need_shared("data/graders/extract_int.jsonl")
        cases = [json.loads(line) for line in path.read_text().splitlines()]
        wanted = ("_extract_final_int", "extract_gsm8k_final_answer", "extract_gsm8k_answer")
        cases = [case for case in cases if case["function"] in wanted]
        assert len(cases) == 6
        verify = GSM8KVerifier(last_number=True)
        for case in cases:
            assert verify.extract(case["text"])[0] == int(case["expected"]), case

    def test_number_verifier(self):
        assert NumberVerifier()("so 7", "7").score == 1.0
        assert NumberVerifier()("so 8", "7").score == 0.0
        assert NumberVerifier()("so", "7").answer is None
        assert NumberVerifier(surrounded=0.5)("7", 7).score == 1.0
        assert NumberVerifier(surrounded=0.5)("so 7", "#### 7") == (0.5, "7", False, {}, None)

    @pytest.mark.parametrize(
        ("reference", "value"),
        [
            (7, "7"), (-7, "-7"), ("7", "7"), (" 7.\n", "7"), ("so\n#### 1,234", "1234"), ([7], "7"), (("7",), "7"), ([7.5], "7.5"),
            (1e16, "10000000000000000"), (0.00001, "0.00001"), (0.1, "0.1"), (1e-7, "0.0000001"), (10**30, "1" + "0" * 30),
            (Decimal("1E+3"), "1000"), (np.float64(1e16), "10000000000000000"), (np.int64(7), "7"),
        ],
    )  # fmt: skip
    def test_references(self, reference, value):
        assert reference_number(reference) == Decimal(value)
        assert NumberVerifier()(f"it is {value}", reference) == (1.0, value, True, {}, None)
        assert NumberVerifier()(f"it is 1{value.lstrip('-')}", reference).score == 0.0

    @pytest.mark.parametrize(
        "reference",
        [
            "",
            "seven",
            "5 apples",
            "5/1",
            "#### seven",
            None,
            True,
            [],
            [1, 2],
            [[1]],
            float("nan"),
            float("inf"),
            {"a": 1},
        ],
    )
    def test_a_reference_without_a_number(self, reference):
        for verify in (NumberVerifier(), GSM8KVerifier()):
            with pytest.raises(ValueError, match="does not end with a number") as raised:
                verify("#### 7", reference)
            assert repr(reference) in str(raised.value)

    @given(st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False, width=32))
    def test_every_number_equals_itself_and_not_the_next(self, number):
        text = f"{Decimal(repr(number)):f}"
        assert NumberVerifier()(f"It is {text}.", number).correct
        with localcontext(prec=400):
            following = f"{Decimal(text) + 1:f}"
        assert not NumberVerifier()(f"It is {following}.", number).correct

    @pytest.mark.parametrize(
        "part",
        [
            "111,", "1,", "1", "1.", "1'111", "1'", "1\u202f111", "\\text{", "\\text{1}", "\\ ", "\\boxed 1 ", "- ", "-$", "$ ", "minus ", "is - 5 ", "####\n", "####  \n",
            "#### answer\n", "#### 1. ", "#### 1\n", "#### (((", "#### Total: 5\n", "#", "1 or ", " ", "**1", "_1", "(", "1½", "{,}", "<answer>1</answer>",
        ],
    )  # fmt: skip
    def test_time_is_linear(self, part):
        def grade(text: str) -> None:
            NumberVerifier()(text, 5)
            for response in (
                text,
                f"<answer>{text}</answer>",
                f"#### {text}",
                f"#### 1. {text}-",
                f"\\boxed{{{text[:150_000]}}}",
                f"<answer>{text[:900]}</answer>",
            ):
                GSM8KVerifier(last_number=True)(response, "#### 5")

        assert grows_linearly(grade, lambda size: part * (size // len(part)), 80_000)


class TestVerifier:
    reference = "It is 1,234.\n#### 1,234"

    @pytest.mark.parametrize(
        "response",
        [
            "#### 1234", "####1,234", "work\n#### $1,234.00\n", "\\boxed{1234}", "so \\boxed{\\$1,234}.", "\\fbox{1234}",
            "<answer>1234</answer>", "<answer> $1,234. </answer>", "<answer>1,234 apples</answer>",
            "<think>5</think> <answer>1234</answer>", "\\boxed{7} no, \\boxed{1234}", "#### 7\n#### 1234",
            "<answer>7</answer> wait <answer>1234</answer>", "#### 7, wait \\boxed{1234}", "\\boxed{{1234}}",
            "<answer>7 <answer>1234</answer>", "\\boxed{1{,}234}", "\\boxed{1\\,234}", "\\boxed{x = 1234}", "\\boxed{1234\\text{ m}}",
            "<answer>1234 (out of 2000)</answer>", "<answer>1234 m2</answer>", "#### 1234 dollars for 3 days",
            "<answer>Mary saw a total of 1,234 snakes.</answer>", "#### 1000 + 234 = 1234",
            "####\n1234", "#### \n1234", "####\r\n\n $1,234\n", "####\nThe answer is 1,234 apples.", "\\boxed{1234 \\text{ apples}}",
            "\\boxed{\\text{1234 apples}}", "\\boxed{1234\\mathrm{ km}}", "<answer>\n1234\n</answer>",
        ],
    )  # fmt: skip
    def test_right(self, response):
        verdict = GSM8KVerifier()(response, self.reference)
        assert verdict.score == 1.0
        assert verdict.correct
        assert Decimal(verdict.answer) == 1234

    @pytest.mark.parametrize(
        "response",
        [
            "", "1234", "the answer is 1234", "#### 1235", "\\boxed{1234", "<answer>1234", "\\boxed{1234} so #### 5",
            "#### -1234", "<answer></answer>", "#### \n12345", "####\n", "####\nso\n1234", "#### 12 34", "#### 12345", "#### 1234.5",
            "\\boxed{\\frac{1}{1234}}", "<answer>3/1234</answer>", "<answer>1 2 3 1234</answer>", "<answer>9-1234</answer>",
            *(f"#### 1234{more}" for more in (
                " or 5", " million", " thousand", "k", " K", " dozen", " plus 6", " times 6", " x 6", "x6", " and 1/2", " and a half",
                " \\text{ or } 6", "\\text{ million}", "\\text{k}", " apples or 6", " apples plus 6 pears", " apples + 6", " apples and 50 cents",
                "\\text{ apples or }6", " to 1300", " hundredths", " if 5", " more than 3", " (or 6) or 5",
            )),
            "<answer>minus 1234</answer>", "<answer>not 1234</answer>", "<answer>half of 1234</answer>",
            "<answer>It is 1,234 million.</answer>", "<answer>five or 1234</answer>", "#### 1234 " + "a" * 1000,
            "#### 1e1234", "<answer>2 * 1234</answer>", "#### 1234/2", "#### 1234^2",
        ],
    )  # fmt: skip
    def test_wrong_or_unmarked(self, response):
        verdict = GSM8KVerifier()(response, self.reference)
        assert verdict.score == 0.0
        assert not verdict.correct

    def test_options(self):
        assert GSM8KVerifier(last_number=True)("the answer is 1234.", self.reference).score == 1.0
        assert GSM8KVerifier(format_reward=0.1)("#### 5", self.reference).score == 0.1
        assert GSM8KVerifier(format_reward=0.1, last_number=True)("5", self.reference).score == 0.0

    def test_reference_without_a_number(self):
        with pytest.raises(ValueError, match="does not end with a number"):
            GSM8KVerifier()("#### 1", "#### one")


FORMATS = {
    "hashes": "{}\n#### {}",
    "boxed": "{}\nHence $\\boxed{{{}}}$.",
    "tags": "<think>{}</think><answer>{}</answer>",
    "last number": "{}\nThe answer is {}.",
}


@pytest.mark.parametrize("form", of_the_day(*FORMATS, share=2))
def test_every_row_in_every_format(form):
    """The gold answer is right; the next number, its negative, ten times it and a tenth of it more are wrong."""
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in need_shared(f"data/gsm8k/{split}.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 8792
    verify = GSM8KVerifier(last_number=form == "last number")
    for row in rows:
        solution, _, gold = row["answer"].rpartition("\n#### ")
        number = reference_number(row["answer"])
        for answer in (
            gold,
            str(number),
            f"{number:,}",
            f"${number}",
            f"{number}.0" if number == int(number) else gold,
        ):
            assert verify(FORMATS[form].format(solution, answer), row["answer"]).correct, (answer, row)
        for answer in (number + 1, -number - 1, number * 10 + 1, number + Decimal("0.1")):
            assert not verify(FORMATS[form].format(solution, answer), row["answer"]).correct, (answer, row)


class TestEnv:
    @pytest.mark.parametrize("rows", [1, 4])
    def test_check_env_specs(self, mode, rows):
        env = GSM8KEnv(dataset=ROWS, tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=rows, repeats=2)
        check_env_specs(env, break_when_any_done="both")

    def test_reward_shapes_and_done(self, mode):
        env = GSM8KEnv(
            dataset=ROWS, tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=2, shuffle=False, max_steps=3
        )
        td = env.step(respond(env, env.reset(), ["so \\boxed{42}.", "I do not know"]))["next"]
        assert td["reward"].shape == td["success"].shape == (2, 1, 1)
        assert td["reward"].dtype == torch.float32
        assert td["reward"].flatten().tolist() == [1.0, 0.0]
        assert td["success"].flatten().tolist() == [True, False]
        # An answer ends the dialogue; no answer leaves it open until max_steps.
        assert td["done"].flatten().tolist() == td["terminated"].flatten().tolist() == [True, False]
        assert td["truncated"].flatten().tolist() == [False, False]
        assert td["step_count"].flatten().tolist() == [1, 1]

    def test_truncated_after_max_steps(self, mode):
        env = GSM8KEnv(dataset=ROWS, tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=1)
        td = env.step(respond(env, env.reset(), ["I do not know"]))["next"]
        assert td["done"].all()
        assert td["truncated"].all()
        assert not td["terminated"].any()

    def test_without_rewards(self, mode):
        env = GSM8KEnv(dataset=ROWS, tokenizer=bpe_tokenizer(), input_mode=mode, compute_reward=False)
        assert "reward" not in env.step(respond(env, env.reset(), ["x"]))["next"].keys()

    def test_from_dataloader_grades(self, mode):
        batches = [{"query": ["2 + 2"], "answer": ["#### 4"]}]
        env = GSM8KEnv.from_dataloader(batches, tokenizer=bpe_tokenizer(), input_mode=mode)
        td = env.step(respond(env, env.reset(), ["#### 4"]))["next"]
        assert td["reward"].flatten().tolist() == [1.0]
        assert td["done"].all()

    def test_local_folder(self, mode, tmp_path):
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        env = GSM8KEnv(dataset=tmp_path, tokenizer=bpe_tokenizer(), input_mode=mode, shuffle=False)
        assert env.reset()["query"] == [ROWS[0]["question"]]

    def test_one_bad_reference_costs_its_row_only(self, mode):
        rows = [{"question": "a", "answer": "no number here"}, ROWS[0]]
        env = GSM8KEnv(dataset=rows, tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=2, shuffle=False)
        with pytest.warns(RuntimeWarning, match="row 0: .*does not end with a number"):
            td = env.step(respond(env, env.reset(), ["#### 42", "#### 42"]))
        assert td["next", "reward"].flatten().tolist() == [0.0, 1.0]

    @pytest.mark.parametrize("split", ["test", pytest.param("train", marks=pytest.mark.full)])
    @pytest.mark.by_day(3)
    def test_all_real_rows(self, mode, split):
        """The gold answer, as the policy's response, gets 1; the gold plus one gets 0."""
        path = need_shared(f"data/gsm8k/{split}.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        size = len(rows)
        env = GSM8KEnv(
            dataset=str(path),
            tokenizer=bpe_tokenizer(),
            input_mode=mode,
            num_envs=size,
            shuffle=False,
            batch_size_dl=size,
        )
        td = env.reset()
        assert td["answer"] == [row["answer"] for row in rows]
        assert env.step(respond(env, td, [row["answer"] for row in rows]))["next", "reward"].eq(1).all()
        raised = [
            row["answer"].rpartition("####")[0] + f"#### {reference_number(row['answer']) + 1:,}" for row in rows
        ]
        assert env.step(respond(env, td, raised))["next", "reward"].eq(0).all()
