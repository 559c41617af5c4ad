"""The small scoring functions: matching, choices, form, length, repetition, and code against unit tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import time

import pytest
from conftest import need_shared
from growth import assert_linear, cpu_seconds
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat.rewards.code import CodeVerifier, RunResult, assemble, extract_code
from torchrl_chat.rewards.compose import Gate, WeightedSum
from torchrl_chat.rewards.formatting import FormatVerifier
from torchrl_chat.rewards.grader import Grader
from torchrl_chat.rewards.gsm8k import GSM8KVerifier
from torchrl_chat.rewards.judge import LLMJudge
from torchrl_chat.rewards.matching import ExactMatch, MultipleChoice, RegexMatch, last_marked, marked
from torchrl_chat.rewards.numbers import NumberVerifier
from torchrl_chat.rewards.shaping import (
    CosineLength,
    LengthPenalty,
    OverlongPenalty,
    RepetitionPenalty,
    repeated_share,
)
from torchrl_chat.rewards.verdict import Episode, Verdict, grades, level_of
from torchrl_chat.templates.parsing import AnswerParser


class TestMarks:
    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("\\boxed{a}", ["a"]), ("\\fbox {a{b}c}", ["a{b}c"]), ("\\boxed{\\}}", ["\\}"]), ("\\boxed{a", []),
            ("\\boxed{\\boxed{a}}", ["\\boxed{a}", "a"]), ("<answer>a</answer><ANSWER> b </ANSWER>", ["a", "b"]),
            ("<answer>a<answer>b</answer>", ["b"]), ("<answer>a", []), ("a</answer>", []), ("", []),
            ("<answer>\\boxed{a}</answer>", ["\\boxed{a}", "a"]), ("\\boxed{a}<answer>b", ["a"]),
        ],
    )  # fmt: skip
    def test_marked(self, text, found):
        assert marked(text) == found
        assert last_marked(text) == (found[-1] if found else None)

    @given(st.text("ab{}\\", max_size=30).filter(lambda t: "\\" not in t))
    def test_balanced_text_comes_back(self, text):
        depth, lowest = 0, 0
        for char in text:
            depth += {"{": 1, "}": -1}.get(char, 0)
            lowest = min(lowest, depth)
        if depth == 0 and lowest == 0:
            assert last_marked(f"x \\boxed{{{text}}} }}") == text


class TestExactMatch:
    @pytest.mark.parametrize(
        ("options", "response", "reference", "right"),
        [
            ({}, "Paris", "paris", True), ({}, " the\n Hague ", "The Hague", True), ({}, "Paris.", "Paris", False),
            ({"ignore_case": False}, "Paris", "paris", False), ({"ignore_space": False}, "a  b", "a b", False),
            ({"ignore_punctuation": True}, "«Paris»!", "paris", True), ({}, "b", ["a", "b"], True), ({}, "c", ["a"], False),
            ({}, "42", 42, True), ({}, "e\u0301", "\u00e9", True), ({}, "STRASSE", "straße", True), ({}, "", "x", False),
            ({"marked": True}, "It is \\boxed{Rome}.", "rome", True), ({"marked": True}, "Rome", "rome", False),
        ],
    )  # fmt: skip
    def test_cases(self, options, response, reference, right):
        verdict = ExactMatch(**options)(response, reference)
        assert (verdict.score, verdict.correct) == (float(right), right)

    @given(st.text(max_size=40))
    def test_a_text_equals_itself_and_normalising_again_changes_nothing(self, text):
        for verify in (ExactMatch(), ExactMatch(ignore_punctuation=True), ExactMatch(False, False)):
            if not verify.normalise(text).strip():
                with pytest.raises(ValueError, match="is blank"):
                    verify(text, text)
            else:
                assert verify(text, text).correct
            assert verify.normalise(verify.normalise(text)) == verify.normalise(text)

    @pytest.mark.parametrize("reference", [None, [], [None], {"a": 1}])
    def test_bad_reference(self, reference):
        with pytest.raises(ValueError, match="is no text"):
            ExactMatch()("a", reference)

    @pytest.mark.parametrize("reference", ["", " \n", ["a", ""]])
    def test_blank_reference(self, reference):
        with pytest.raises(ValueError, match="is blank"):
            ExactMatch(ignore_space=False)("", reference)
        with pytest.raises(ValueError, match="is blank"):
            ExactMatch(ignore_punctuation=True)("?", "!")


class TestRegexMatch:
    def test_found_full_and_group(self):
        assert RegexMatch(r"\d+")("a 7", None) == (1.0, "7", True, {}, None)
        assert RegexMatch(r"\d+", full=True)("a 7", None).score == 0.0
        assert RegexMatch(r"\d+", full=True)("77", None).score == 1.0
        assert RegexMatch(r"x")("", None).answer is None
        verify = RegexMatch(r"is (?P<what>\w+)|was", group="what")
        assert verify("it is red, it is Blue, it was", "blue").correct  # the last match that has the group
        assert not verify("it is red", "blue").correct
        assert not RegexMatch("(a)b", group=1, compare=ExactMatch(ignore_case=False))("ab", "A").correct

    def test_isolated_and_picklable(self):
        verify = pickle.loads(pickle.dumps(RegexMatch("a+b")))
        assert verify.isolate
        assert verify("aab", None).correct

    @pytest.mark.parametrize(
        ("wrong", "names"),
        [({"pattern": "("}, "pattern"), ({"pattern": "(a)", "group": 2}, "group"), ({"pattern": "a", "group": "b"}, "group")],
    )  # fmt: skip
    def test_bad_patterns(self, wrong, names):
        with pytest.raises(ValueError, match=names):
            RegexMatch(**wrong)


class TestMultipleChoice:
    @pytest.mark.parametrize(
        ("response", "letter"),
        [
            ("\\boxed{B}", "B"), ("\\boxed{\\text{B}}", "B"), ("\\boxed{(b)}", "B"), ("\\boxed{\\textbf{(B) } 12}", "B"),
            ("\\boxed{B. Paris}", "B"), ("<answer>(C)</answer>", "C"), ("<answer> C. </answer>", "C"),
            ("<answer>\\boxed{C}</answer>", "C"), ("The answer is (B).", "B"), ("The answer is B", "B"),
            ("the correct answer is: **(B)**", "B"), ("**Answer:** B", "B"), ("Answer: b", "B"), ("ANSWER: B\n", "B"),
            ("Correct option: C) 12", "C"), ("The best choice is option D, because A is heavier.", "D"),
            ("Final Answer: The answer is \\(\\mathbf{B}\\).", "B"), ("The answer is B because A car is heavy.", "B"),
            ("The answer is A, because of gravity.", "A"), ("Answer:\nC", "C"), ("The answer is 'D'.", "D"),
            ("B", "B"), ("B.", "B"), ("(B)", "B"), ("**B**", "B"), ("b", "B"), ("B) Paris", "B"), ("$B$", "B"),
            ("A man went home.\nSo, after all:\n\nC", "C"), ("B. Paris\n\nIt is the capital of France.", "B"),
            ("The answer is A at first sight. Hence \\boxed{D}", "D"),
            ("I first thought the answer is B. The final answer is C.", "C"),
            # not claimed, or claimed several times
            ("A car has four wheels.", None), ("The answer is A car.", None), ("The answer is a mystery.", None), ("", None),
            ("The answer is not B.", None), ("I think so.", None), ("Both A and B are right.", None),
            ("The answer is A or B.", None), ("The answer is either A or B.", None), ("The answer is (A) and (C).", None),
            ("Answer: A, B, C, D", None), ("\\boxed{A, B}", None), ("\\boxed{A}\\boxed{B}", None), ("A/B", None),
            ("<answer>A B</answer>", None), ("<answer>A and B</answer>", None), ("A) one\nB) two\nC) three", None),
            ("The answer is A. The answer is B.", None), ("ABCD", None), ("A\nB", None), ("A) one B) two", None),
            ("It's a trap", None), ("The answer is Berlin.", None), ("I", "I"), ("The answer is I don't know", None),
            ("The answer is D'Artagnan", None),
        ],
    )  # fmt: skip
    def test_extract(self, response, letter):
        assert MultipleChoice().extract(response) == letter

    def test_a_model_that_corrects_itself(self):
        verify = MultipleChoice(several="last")
        assert verify.extract("The answer is A. Wait: the answer is B.") == "B"
        assert verify.extract("The answer is A. Or the answer is B or C.") is None

    @pytest.mark.parametrize(
        "wrap", ["\\boxed{%s}", "<answer>(%s)</answer>", "The answer is (%s)", "Answer: %s", "%s", "%s."]
    )
    @given(
        letter=st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), other=st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    )
    def test_every_letter_in_every_form(self, wrap, letter, other):
        assert MultipleChoice()(wrap % letter, other).correct is (letter == other)

    @pytest.mark.parametrize(
        ("reference", "letter"),
        [
            ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), (1, "B"), (0, "A"), ({"answer": 1}, "B"),
            ({"answer": "Paris", "choices": ["Rome", "Paris"]}, "B"), ({"answer": "B", "choices": ["Rome", "Paris"]}, "B"),
            ({"answer": 1, "choices": ["x", "y"]}, "B"),
        ],
    )  # fmt: skip
    def test_references(self, reference, letter):
        assert MultipleChoice().expected(reference, ["Rome", "Paris"]) == letter
        assert MultipleChoice()(f"Answer: {letter}", reference).correct

    @pytest.mark.parametrize(
        "reference",
        [None, "", "BB", "Paris", -1, 26, True, 1.0, {"answer": None}, {"answer": 2, "choices": ["x", "y"]},
         {"answer": "C", "choices": ["x", "y"]}, {"answer": "x", "choices": ["x", "x"]}, {"answer": "A", "choices": "xy"},
         {"answer": "A", "choices": [1]}, {"answer": "A", "choices": ["x"] * 27}],
    )  # fmt: skip
    def test_bad_references(self, reference):
        with pytest.raises(ValueError, match=r"reference|letters"):
            MultipleChoice()("A", reference)

    @pytest.mark.parametrize(
        "response",
        ["Paris", "paris.", "\\boxed{Paris}", "<answer>Paris</answer>", "The answer is Paris.", "Answer: B) Paris"],
    )
    def test_the_text_of_a_choice(self, response):
        verify, reference = MultipleChoice(), {"answer": "Paris", "choices": ["Rome", "Paris", "A"]}
        assert verify(response, reference) == (1.0, "B", True, {}, None)
        assert not verify("Rome", reference).correct
        assert not verify("Answer: E", reference).correct

    @pytest.mark.parametrize(
        "wrap", ["\\boxed{%s}", "<answer>%s</answer>", "The answer is (%s).", "Answer: %s", "%s", "%s."]
    )
    @pytest.mark.parametrize("reference", ["B", 1, "b"])
    def test_choices_whose_texts_are_letters(self, wrap, reference):
        """Blood types: a letter is the letter of the choice, in the reference and in the response."""
        verify, reference = MultipleChoice(), {"answer": reference, "choices": ["O", "A", "B", "AB"]}
        assert [verify(wrap % letter, reference).correct for letter in "ABCD"] == [False, True, False, False]
        assert verify(wrap % "O", reference).answer == "A"  # no letter of these four: the text

    def test_letters(self):
        assert MultipleChoice("1234")("The answer is (3)", "3").correct
        assert MultipleChoice("ABCD").extract("The answer is X.") is None
        for letters in ("", "AA", "Aa", "A."):
            with pytest.raises(ValueError, match="letters"):
                MultipleChoice(letters)
        with pytest.raises(ValueError, match="several"):
            MultipleChoice(several="first")


class TestFormat:
    GOOD = "<think>\nhm\n</think>\n\n<answer>4</answer>"

    @pytest.mark.parametrize(
        ("text", "strict", "soft"),
        [
            (GOOD, 1, 1), ("<think>a</think><answer>b</answer>", 1, 1), (f"  {GOOD}\n", 1, 1),
            (f"Well. {GOOD}", 0, 1), (f"{GOOD} bye", 0, 1), ("<think>a</think> so <answer>b</answer>", 0, 1),
            ("<answer>b</answer><think>a</think>", 0, 0.5), ("<think>a<answer>b</answer>", 0, 0.75),
            ("<think>a</think>", 0, 0.25), ("<think>a", 0, 0.25), ("<think>a</think>b", 0, 0.5), ("<answer>b</answer>", 0, 0.5),
            ("<think></think><answer>b</answer>", 0, 0.75), ("</think><answer>b</answer>", 0, 0.75),
            ("<think>a</think><answer> </answer>", 0, 0.75), ("<think>a</think><answer>b", 0, 0.75), ("", 0, 0), ("b", 0, 0),
            (GOOD + GOOD, 0, 0), ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 0.5),
            ("<think>a <think>b</think><answer>c</answer>", 0, 0.75), ("<think>a</think><think>b</think><answer>c</answer>", 0, 0.5),
        ],
    )  # fmt: skip
    def test_text_and_parsed_message_grade_alike(self, text, strict, soft):
        parsed = AnswerParser("{{ '<think>' }}{{ '</think>' }}").parse(text).message()
        assert text.lstrip().startswith(("<think>", "</think>")) == ("reasoning_content" in parsed)
        for message in ({"role": "assistant", "content": text}, parsed):
            verdict = FormatVerifier()(message, None)
            assert (verdict.score, verdict.correct) == (strict, strict == 1)
            verdict = FormatVerifier(soft=True)(message)
            assert (verdict.score, verdict.correct) == (soft, strict == 1)

    @settings(max_examples=500, deadline=None)
    @given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "x", "\n", " "]), max_size=9))
    def test_any_text_grades_like_its_parsed_message(self, parts):
        text = "".join(parts)
        for opened in (False, True):
            parsed = AnswerParser("{{ '<think>' }}{{ '</think>' }}").parse(text, opened).message()
            message = {"role": "assistant", "content": text}
            for soft in (False, True):
                verify = FormatVerifier(soft=soft, opened=opened)
                assert verify(message)[0::2] == verify(parsed)[0::2]
                assert verify(message).correct <= (verify(message).score == 1.0)

    def test_answer(self):
        assert FormatVerifier()({"content": self.GOOD}).answer == "4"
        assert FormatVerifier()({"content": "no"}).answer is None
        assert FormatVerifier()({"content": "<answer>1</answer>, no: <answer> 2 </answer>"}).answer == "2"

    def test_other_tags_and_levels(self):
        verify = FormatVerifier(tags=("plan", "code", "out"), reasoning="plan")
        assert level_of(verify) == "message"
        assert verify({"content": "<code>c</code><out>o</out>", "reasoning_content": "p"}) == (
            1.0,
            "o",
            True,
            {},
            None,
        )
        assert FormatVerifier(tags=("answer",))({"content": "<answer>1</answer>"}).correct

    def test_pattern(self):
        verify = pickle.loads(pickle.dumps(FormatVerifier(pattern=r"(?s)<think>.*</think>\s*(?P<answer>\d+)")))
        assert verify.isolate
        assert not FormatVerifier().isolate
        assert verify({"content": "7", "reasoning_content": "hm"}) == (1.0, "7", True, {}, None)
        assert verify({"content": "7"}) == (0.0, None, False, {}, None)

    @pytest.mark.parametrize(
        "wrong", [{"tags": ("think",)}, {"tags": ()}, {"tags": ("a", "a")}, {"tags": "think"}, {"tags": ("<a>",)}, {"pattern": "("},
                     {"pattern": "a", "soft": True}]
    )  # fmt: skip
    def test_bad_settings(self, wrong):
        with pytest.raises(ValueError, match=r"tags|pattern"):
            FormatVerifier(**wrong)


def at(length: int | None, text: str = "it is 7", **more) -> Episode:
    return Episode.of(text, "7", length=length, **more)


@grades("text")
async def slow_verifier(response, reference):
    await asyncio.sleep(0)
    return 1.0 if reference in response else 0.0


class TestLength:
    def test_dapo_equation_13(self):
        """The three branches, written out again as in the paper, at every length."""
        longest, cache = 40, 16
        penalty = OverlongPenalty(max_length=longest, cache=cache)
        for y in range(60):
            if y <= longest - cache:
                expected = 0.0
            elif y <= longest:
                expected = ((longest - cache) - y) / cache
            else:
                expected = -1.0
            assert penalty(at(y)).score == pytest.approx(expected)
        assert OverlongPenalty(40, 16, weight=0.5)(at(99)).score == -0.5
        assert penalty(at(5, truncated=True)).score == 0.0  # the equation asks for the length alone

    def test_linear(self):
        penalty = LengthPenalty(full=30, free=10, penalty=-2)
        assert [penalty(at(n)).score for n in (0, 10, 20, 30, 99)] == [0, 0, -1, -2, -2]

    def test_cosine(self):
        """The paper's values at both ends and in the middle; between them the half cosine, monotone."""
        verify = CosineLength(NumberVerifier(), max_length=1000)
        right = [verify(at(n)).score for n in range(0, 1000, 10)]
        wrong = [verify(at(n, "it is 8")).score for n in range(0, 1000, 10)]
        assert (right[0], wrong[0]) == (2.0, -10.0)
        assert (right[50], wrong[50]) == (pytest.approx(1.5), pytest.approx(-5.0))
        assert right[25] == pytest.approx(1 + (1 + math.cos(math.pi / 4)) / 2)
        assert right == sorted(right, reverse=True)
        assert wrong == sorted(wrong)
        assert min(right) > max(wrong)
        verdict = verify(at(10))
        assert (verdict.answer, verdict.correct, verdict.parts) == ("7", True, {"verifier": 1.0})

    def test_cosine_exceeded(self):
        verify = CosineLength(NumberVerifier(), max_length=100, exceeded=-3.0)
        assert [verify(at(n)).score for n in (99, 100, 500)] == [pytest.approx(1.0, abs=1e-3), -3.0, -3.0]
        assert verify(at(10, truncated=True)).score == -3.0
        assert verify(at(100)).correct  # the answer is right, the score is of its length

    def test_cosine_takes_any_verifier(self):
        assert asyncio.run(CosineLength(slow_verifier, 100)(at(0))).score == 2.0
        message = CosineLength(FormatVerifier(), 100)(at(0, TestFormat.GOOD))
        assert (message.score, message.answer) == (2.0, "4")
        assert CosineLength(RegexMatch("a"), 100).isolate
        assert not CosineLength(GSM8KVerifier(), 100).isolate
        judge = LLMJudge("m", base_url="http://localhost:1/v1", deadline=77.0, samples=2, temperature=1.0)
        assert CosineLength(judge, 100).deadline == 77.0
        assert CosineLength(judge, 100).components == ("verifier", "samples")
        assert CosineLength(GSM8KVerifier(), 100).deadline is None
        assert CosineLength(GSM8KVerifier(), 100).components == ("verifier",)
        both = CosineLength(WeightedSum({"a": NumberVerifier(), "b": Gate(NumberVerifier(), RegexMatch("a"))}), 100)
        assert both.isolate
        assert both.components == ("verifier", *both.verifier.components)
        assert set(both(at(5, "7")).parts) == set(both.components)
        assert CosineLength(WeightedSum({"a": judge, "b": judge}), 100).deadline == 154.0
        assert not CosineLength(WeightedSum({"a": NumberVerifier()}), 100).isolate
        rubric = CosineLength(lambda action, observation: float(action.content == observation.reference), 100)
        assert rubric(at(0, "7")).score == 2.0
        failed = Verdict(0.0, None, False, failure="timeout: 5 s")
        assert CosineLength(lambda response, reference: failed, 100)(at(0)) == failed

    @pytest.mark.parametrize(
        "scorer", [LengthPenalty(10), OverlongPenalty(10, 5), CosineLength(NumberVerifier(), 10)]
    )
    def test_length_must_be_known(self, scorer):
        assert level_of(scorer) == "episode"
        assert pickle.loads(pickle.dumps(scorer)) == scorer
        with pytest.raises(ValueError, match=r"length is None.*length=\.\.\."):
            scorer(at(None))

    @pytest.mark.parametrize(
        "make",
        [
            lambda: LengthPenalty(5, 5), lambda: LengthPenalty(5, -1), lambda: LengthPenalty(5, penalty=1),
            lambda: OverlongPenalty(5, 6), lambda: OverlongPenalty(5, 0), lambda: OverlongPenalty(5, 5, -1),
            lambda: CosineLength(NumberVerifier(), 0), lambda: CosineLength(grades("group")(lambda group: []), 5),
            lambda: RepetitionPenalty(0), lambda: RepetitionPenalty(3, 1.0),
        ],
    )  # fmt: skip
    def test_bad_settings(self, make):
        with pytest.raises(ValueError, match=r"expected|groups"):
            make()


class TestRepetition:
    @given(st.lists(st.sampled_from("ab"), max_size=40), st.integers(1, 9))
    def test_share_against_the_definition(self, units, size):
        grams = [tuple(units[i : i + size]) for i in range(len(units) - size + 1)]
        expected = sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams) if grams else 0.0
        assert repeated_share(units, size) == pytest.approx(expected)

    def test_parts_are_announced(self):
        penalty = RepetitionPenalty(2)
        assert tuple(penalty(Episode.of("a b a b")).parts) == penalty.components

    def test_texts(self):
        score = lambda text, size=3: RepetitionPenalty(size)(Episode.of(text)).score  # noqa: E731
        assert score("all these words here are different from one another") == 0.0
        assert score("Hm, wait. " * 100) < -0.95
        assert score("!" * 5000) < -0.9  # a model that has collapsed
        assert score("哈" * 100) < -0.9
        assert score("a" * 5000) < -0.9
        assert score("x\n" + "-" * 20 + "\ny") == 0.0  # a rule
        assert score("") == 0.0
        thinking = {"role": "assistant", "content": "7", "reasoning_content": "so so so so so so so so"}
        assert score(thinking) < -0.5

    def test_long_ngrams_cost_little_more(self):
        text = "the cat sat on the mat " * 40_000
        cost = {}
        for size in (2, 40, 1000):
            assert RepetitionPenalty(size)(Episode.of(text)).score < -0.9
            cost[size] = cpu_seconds(lambda size=size: RepetitionPenalty(size)(Episode.of(text)))
        assert max(cost[40], cost[1000]) < 10 * cost[2]  # measured: three times


def subprocess_runner(program: str, deadline: float) -> RunResult:
    """No sandbox: for the tests' own programs."""
    command = [sys.executable, "-I", "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        return RunResult(False, (error.stdout or b"").decode(), f"stopped after {deadline} s")
    return RunResult(done.returncode == 0, done.stdout, done.stderr)


def human_eval() -> list[dict]:
    return [json.loads(line) for line in need_shared("data/humaneval/HumanEval.jsonl").read_text().splitlines()]


class TestCode:
    @pytest.mark.parametrize(
        ("response", "code"),
        [
            ("x = 1", "x = 1"), ("    return 1", "    return 1"), ("```python\na\n```", "a\n"), ("```\na\n```", "a\n"),
            ("```py\na\n```\nor\n```Python3\nb\n```\n", "b\n"), ("```python\na\n```\n```\nout\n```", "a\n"),
            ("```python\na\n```\n```json\n{}\n```", "a\n"), ("```python\na", "a"), ("~~~python\na\n~~~", "a\n"),
            ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"), ("- so:\n  ```python\n  if a:\n    b\n  ```", "if a:\n  b\n"),
            ("``` python title=x\na\n```", "a\n"), ("use `x` and ```y``` so", "use `x` and ```y``` so"), ("```python\n```", ""),
        ],
    )  # fmt: skip
    def test_extract(self, response, code):
        assert extract_code(response) == code

    def test_no_runner_no_grade(self):
        with pytest.raises(TypeError, match="sandbox"):
            CodeVerifier()
        with pytest.raises(ValueError, match="deadline"):
            CodeVerifier(subprocess_runner, deadline=0)
        with pytest.raises(TypeError, match="RunResult"):
            CodeVerifier(lambda program, deadline: True).grade("x", {"test_list": ["assert x"]})
        assert pickle.loads(pickle.dumps(CodeVerifier(subprocess_runner))).runner is subprocess_runner

    @pytest.mark.parametrize(
        "reference",
        [None, "assert True", {}, {"inputs": ["1"]}, {"test_list": []}, {"test_list": "assert x"}, {"test_list": [1]},
         {"inputs": ["1"], "outputs": []}, {"inputs": ["1", "2"], "outputs": ["1"]}, {"test": "", "entry_point": "a b"}],
    )  # fmt: skip
    def test_bad_references(self, reference):
        with pytest.raises(ValueError, match=r"reference"):
            CodeVerifier(subprocess_runner).grade("x", reference)

    def test_human_eval_programs_all_compile(self):
        """All 164 rows, the solution as a continuation and as a whole function after the prompt."""
        rows = human_eval()
        assert len(rows) == 164
        for row in rows:
            whole = row["prompt"] + row["canonical_solution"]
            for code, count in ((row["canonical_solution"], 1), (whole, 2)):
                sources, [test] = assemble(code, row)
                assert len(sources) == count
                for source in (*sources, test):
                    compile(source, "x", "exec")

    @pytest.mark.parametrize("index", [0, 2, 10, 32, 38, 50, 64, 115, 163])  # 10, 32, 38, 50: helpers in the prompt
    def test_human_eval(self, index):
        row = human_eval()[index]
        verify = CodeVerifier(subprocess_runner)
        whole = f"Here:\n```python\n{row['prompt']}{row['canonical_solution']}```\nDone."
        stub = f"```python\n{row['prompt']}    return None\n```"
        assert verify.grade(whole, row) == (1.0, extract_code(whole), True, {"tests_passed": 1.0}, None)
        assert verify.grade(row["canonical_solution"], row).correct
        assert verify.grade(stub, row)[0::2] == (0.0, False, None)

    def test_helpers_and_imports_of_the_prompt_are_there_for_a_whole_function(self):
        row = human_eval()[32]  # the prompt defines poly and imports math
        body = row["canonical_solution"]
        code = f"def find_zero(xs):\n{body}"
        assert "def poly" not in code
        assert CodeVerifier(subprocess_runner).grade(f"```python\n{code}```", row).correct

    MBPP = {
        "test_list": ["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9"],
        "test_setup_code": "import math",
    }

    @pytest.mark.parametrize(
        ("code", "share"),
        [
            ("def f(x): return x * x", 1.0), ("def f(x): return math.prod([x, x])", 1.0), ("def f(x): return 1", 1 / 3),
            ("def f(x): return x * x if x != 2 else 1 / 0", 2 / 3), ("def f(x", 0.0), ("", 0.0), ("def g(x): pass", 0.0),
            ("import sys; sys.exit(0)", 0.0), ("import os; os._exit(0)", 0.0), ("def f(x): raise SystemExit(0)", 0.0),
            ("def f(x):\n    while x > 2: pass\n    return x * x", 2 / 3), ("print('ok')\ndef f(x): return 0", 0.0),
            ("from __future__ import annotations\nfrom dataclasses import dataclass, KW_ONLY\n@dataclass\nclass A:\n    _: KW_ONLY\n"
             "    x: int\ndef f(x): return A(x=x).x ** 2", 1.0),
        ],
    )  # fmt: skip
    @pytest.mark.by_day(2)
    def test_asserts(self, code, share):
        whole = CodeVerifier(subprocess_runner, deadline=3.0).grade(code, self.MBPP)
        part = CodeVerifier(subprocess_runner, partial=True, deadline=3.0).grade(code, self.MBPP)
        assert (whole.score, whole.correct) == (float(share == 1.0), share == 1.0)
        assert (part.score, part.correct) == (pytest.approx(share), share == 1.0)
        assert part.parts == {"tests_passed": part.score}

    PAIRS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}

    @pytest.mark.parametrize(
        ("code", "share"),
        [
            ("a, b = map(int, input().split())\nprint(a + b)", 1.0), ("print(3)", 0.5), ("print(1 / 0)", 0.0),
            ("import sys\nprint(sum(map(int, sys.stdin.read().split())), ' ')", 1.0),
            ("import sys\nprint(sum(map(int, sys.stdin.buffer.readline().split())))", 1.0),
            ("print(sum(map(int, open(0).read().split())))", 1.0),
            ("def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()", 1.0),
            ("print(3)\nprint(7)", 0.0), ("print(3); raise SystemExit(1)", 0.0), ("import time; time.sleep(10**6)", 0.0),
        ],
    )  # fmt: skip
    def test_input_and_output(self, code, share):
        part = CodeVerifier(subprocess_runner, partial=True, deadline=2.0).grade(
            f"```python\n{code}\n```", self.PAIRS
        )
        assert (part.score, part.correct) == (share, share == 1.0)

    def test_rows_run_at_once_and_failures_are_their_own(self):
        together = threading.Barrier(2)  # passed only by two at once

        def runner(program, deadline):
            if "crash" in program:
                raise RuntimeError("the sandbox is gone")
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(30)
                met.append(program)
                together.abort()
            return subprocess_runner(program, deadline)

        met: list[str] = []
        count = 2 * (os.cpu_count() or 2)
        rows = [Episode.of("def f(x): return x * x", self.MBPP)] * count
        rows += [Episode.of("crash", self.MBPP), Episode.of("x", {}), Episode.of("def f(x): pass", self.MBPP)]
        with Grader(CodeVerifier(runner, deadline=60)) as grader, pytest.warns(RuntimeWarning, match="2 of"):
            verdicts = grader.grade(rows)
        assert met
        assert [verdict.correct for verdict in verdicts] == [True] * count + [False] * 3
        assert "the sandbox is gone" in verdicts[-3].failure
        assert "no tests of a known kind" in verdicts[-2].failure
        assert verdicts[-1] == (0.0, "def f(x): pass", False, {"tests_passed": 0.0}, None)
        assert CodeVerifier(runner).components == ("tests_passed",)

    def test_waiting_for_others_is_not_time_of_ones_own(self):
        def runner(program, deadline):
            assert deadline <= 0.4
            time.sleep(deadline)
            return RunResult(False, "", "stopped")

        count = 5 * 2 * (os.cpu_count() or 2)  # five times what runs at once: 2 s, with a deadline of 0.5 s
        with Grader(CodeVerifier(runner, deadline=0.5)) as grader:
            verdicts = grader.grade([Episode.of("x", self.MBPP)] * count)
        assert [verdict.failure for verdict in verdicts] == [None] * count

    @pytest.mark.parametrize(
        "hack",
        [
            "import __main__; print(vars(__main__))", "import sys; print(sys._getframe(1).f_globals, sys._getframe(1).f_locals)",
            "import __main__; print(__main__.word, 0); print(getattr(__main__, 'key', 0), 0)",
            "import sys\nf = sys._getframe()\nwhile f:\n    print(f.f_globals, f.f_locals)\n    for v in {**f.f_globals, **f.f_locals}.values():\n"
            "        for i in range(3): print(v, i); print(str(v) + ' ' + str(i)); print(v)\n    f = f.f_back",
        ],
    )  # fmt: skip
    def test_the_key_stands_in_no_variable(self, hack):
        seen = []

        def runner(program, deadline):
            seen.append((program, subprocess_runner(program, deadline)))
            return seen[-1][1]

        assert CodeVerifier(runner, partial=True).grade(hack, self.MBPP).score == 0.0
        [(program, result)] = seen
        key = re.search(r"blake2b\(key=(b.*), digest_size", program)[1]
        assert key not in result.output

    def test_all_or_nothing_stops_at_the_first_failure(self):
        programs = []

        def runner(program, deadline):
            programs.append((program, deadline))
            return RunResult(True, "0", "")

        assert CodeVerifier(runner, deadline=7.0).grade("print(0)", self.PAIRS).score == 0.0
        assert len(programs) == 1
        assert 0 < programs[0][1] <= 7.0


N = 1_000_000
HOSTILE = {
    "boxes": "\\boxed{" * (N // 7),
    "nested boxes": "\\boxed{" * (N // 14) + "}" * (N // 14),
    "open tags": "<answer>" * (N // 8),
    "phrases": "The answer is A, " * (N // 17),
    "letters": "A\n" * (N // 2),
    "fences": "```\n" * (N // 4),
    "fence and blanks": "```" + " " * N + "`",
    "backticks": "`" * N,
    "backslashes": "\\" * N,
    "blanks": " " * N,
    "think": "<think>" * (N // 7),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.by_day(3)
def test_a_megabyte_of_anything_is_linear(text):

    def work(text: str) -> None:
        MultipleChoice()(text, "A")
        MultipleChoice()(text, {"answer": 0, "choices": ["x", "y"]})
        ExactMatch(marked=True, ignore_punctuation=True)(text, "A")
        FormatVerifier(soft=True)({"content": text})
        RepetitionPenalty()(Episode.of(text))
        extract_code(text)

    assert_linear(work, text)
