"""GSM8K: the reading of answers, the verifier, and all 8,792 real rows through the environment."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
import torch
from conftest import bpe_tokenizer, need_shared
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs
from torchrl.modules.llm.policies import Tokens

from torchrl_chat import GSM8KEnv, GSM8KVerifier, NumberVerifier, columns
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
            ("", None), ("x", None), ("5-3", None), ("1/2", None), ("1,2,3", None), ("1 2", None), ("9" * 500, None),
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
            "#### -1234", "<answer></answer>", "#### \n1234", "#### 12 34", "#### 12345", "#### 1234.5",
            "\\boxed{\\frac{1}{1234}}", "<answer>3/1234</answer>", "<answer>1 2 3 1234</answer>", "<answer>9-1234</answer>",
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


@pytest.mark.parametrize("form", FORMATS)
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


def respond(env: GSM8KEnv, td: TensorDict, texts: list[str]) -> TensorDict:
    """Write the responses in the form of the environment's input mode."""
    td, batch = td.copy(), env.batch_size
    mode, stop = env.base_env.input_mode, env.base_env.tokenizer.eos_token
    if mode == "text":
        td["text"] = columns.texts("response", [t + stop for t in texts], batch, None)
    elif mode == "history":
        rows = [columns.history_messages([{"role": "assistant", "content": t}]) for t in texts]
        td["history"] = columns.histories("response", rows, batch, None)
    else:
        ids = [torch.tensor(i) for i in env.base_env.template.codec.encode([t + stop for t in texts])]
        td["tokens"] = columns.ragged(Tokens, "response", ids, batch, None)
    return td


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

    @pytest.mark.parametrize("split", ["train", "test"])
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
