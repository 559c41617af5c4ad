"""Countdown: the reader of expressions against exact arithmetic, the verifier, the generated rows, hostile input."""

from __future__ import annotations

import itertools
import operator
import pickle
from fractions import Fraction

import pytest
from growth import assert_linear
from hypothesis import assume, given
from hypothesis import strategies as st

from torchrl_chat.rewards.countdown import CountdownVerifier, countdown_rows, read_expression

TASK = {"target": 24, "nums": [1, 2, 3, 4]}
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SPELLINGS = {
    "+": ["+", " + "],
    "-": ["-", "−", " - "],
    "*": ["*", "×", " \\times ", "\\cdot "],
    "/": ["/", " ÷ ", "\\div "],
}
TREES = st.recursive(
    st.integers(0, 10**12 - 1), lambda inner: st.tuples(st.sampled_from("+-*/"), inner, inner), max_leaves=12
)


def value_of(tree) -> Fraction | None:
    """The value of a tree, computed without any parsing."""
    if isinstance(tree, int):
        return Fraction(tree)
    left, right = value_of(tree[1]), value_of(tree[2])
    if left is None or right is None or (tree[0] == "/" and right == 0):
        return None
    return APPLY[tree[0]](left, right)


def leaves(tree) -> list[int]:
    return [tree] if isinstance(tree, int) else leaves(tree[1]) + leaves(tree[2])


def spell(tree, draw) -> str:
    """One of the ways to write a tree, every operation in brackets or as a fraction."""
    if isinstance(tree, int):
        return str(tree)
    sign, left, right = tree[0], spell(tree[1], draw), spell(tree[2], draw)
    if sign == "/" and draw(st.booleans()):
        return f"\\{draw(st.sampled_from(['frac', 'dfrac']))}{{{left}}}{{{right}}}"
    opening, closing = draw(st.sampled_from(["()", "[]", "{}", ("\\left(", "\\right)")]))
    return f"{opening}{left}{draw(st.sampled_from(SPELLINGS[sign]))}{right}{closing}"


class TestReader:
    @given(TREES, st.data())
    def test_random_trees_in_every_spelling(self, tree, data):
        text = spell(tree, data.draw)
        assume(len(text) <= 1000)
        expression = read_expression(text)
        assert expression.value == value_of(tree)
        assert list(expression.numbers) == leaves(tree)

    @given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(0, 99)), max_size=12), st.integers(0, 99))
    def test_precedence(self, rest, first):
        """Without brackets: sums of products from left to right, worked out by hand."""
        total, product = Fraction(0), Fraction(first)
        for sign, number in rest:
            if sign == "/" and number == 0:
                return
            if sign in "+-":
                total, product = total + product, Fraction(number if sign == "+" else -number)
            else:
                product = APPLY[sign](product, number)
        text = str(first) + "".join(f" {sign} {number}" for sign, number in rest)
        assert read_expression(text).value == total + product

    @given(st.text("0123456789+-*/(){}[]\\frac .×=e", max_size=60))
    def test_any_text_is_answered(self, text):
        expression = read_expression(text)
        assert expression is None or expression.numbers

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("-3", -3), ("--3", 3), ("-(3-5)", 2), ("2*-3", -6), ("+4", 4), ("5 - -2", 7), ("-2*-2", 4),
            ("\\frac{1+2}{3}*4", 4), ("\\frac12", None), ("\\frac{1}{0}", "zero"), ("1/(2-2)+5", "zero"), ("0/7", 0),
            ("7", 7), ("(((7)))", 7), ("2**3", None), ("7//2", None), ("2^3", None), ("2(3)", None), ("(2)(3)", None),
            ("2.5", None), ("1e3", None), ("3 4", None), ("(3", None), ("3)", None), ("(3]", None), ("", None), ("()", None),
            ("3+", None), ("*3", None), ("x", None), ("3 % 2", None), ("٣+1", None), ("\\timesx 3", None),
            ("__import__('os')", None), ("\\frac{1}2", None), ("9" * 13, None),
        ],
    )  # fmt: skip
    def test_cases(self, text, value):
        expression = read_expression(text)
        if value is None:
            assert expression is None
        else:
            assert expression.value == (None if value == "zero" else value)


class TestVerifier:
    @pytest.mark.parametrize(
        ("response", "score"),
        [
            ("<answer>(1 + 3) * (2 + 4)</answer>", 1), ("<answer> (1+3)*(2+4) = 24 </answer>", 1),
            ("<answer>(1+3)*(2+4) = 25</answer>", 0), ("<answer>$1 \\times 2 \\times 3 \\times 4$</answer>", 1),
            ("So \\boxed{4 \\div 1 \\times 2 \\times 3}.", 1), ("\\boxed{\\frac{4}{1} \\cdot (2 \\cdot 3) = 24}", 1),
            ("1*2*3*4", 1), ("`1*2*3*4`.", 1), ("\\(1*2*3*4\\)", 1), ("**1*2*3*4 = 24**", 1), ("$1*2*3*4$ = $24$", 1),
            ("<answer>1</answer> no, <answer>1*2*3*4</answer>", 1), ("<answer>1*2*3*4</answer> no, <answer>24</answer>", 0),
            ("<answer>24</answer>", 0), ("<answer>4*3*2</answer>", 0), ("<answer>4*3*2*1*1</answer>", 0),
            ("<answer>12*2</answer>", 0), ("<answer>3*4*2/1</answer>", 1), ("<answer>-(1*2*3*-4)</answer>", 1),
            ("<answer>3*8</answer>", 0), ("I think it is 1*2*3*4", 0), ("<answer>1*2*3*4", 0), ("", 0),
            ("<answer>1*2*3*4 = 12*2 = 24</answer>", 1), ("<answer>1*2*3*4 =</answer>", 0),
            ("(1 + 3) * (2 + 4) = 6*4 = 24", 1), ("<answer>24 = (1+3)*(2+4)</answer>", 1), ("\\boxed{24 = 6*4 = 1*2*3*4 = 24}", 1),
            ("(1 + 3) * (2 + 4) = 6*4 = 25", 0), ("25 = (1+3)*(2+4)", 0), ("24 = 24", 0), ("24 = 6*4", 0), ("24 = x = 1*2*3*4", 0),
            ("1*2*3*4 = 12*3 = 24", 0), ("= 1*2*3*4", 0),
        ],
    )  # fmt: skip
    def test_use_all(self, response, score):
        verdict = CountdownVerifier()(response, TASK)
        assert (verdict.score, verdict.correct) == (score, score == 1)

    def test_the_answer_of_a_chain_is_the_side_with_the_given_numbers(self):
        assert CountdownVerifier()("24 = 6 * 4 = (1+3)*(2+4)", TASK).answer == "(1+3)*(2+4)"
        assert CountdownVerifier()("24 = 6 * 4", TASK).answer == "6 * 4"
        assert CountdownVerifier()("24", {"target": 24, "nums": [24]}).correct

    def test_numbers_at_most_once(self):
        verify = CountdownVerifier(use_all=False)
        assert verify("4*3*2", TASK).correct
        assert not verify("4*3*2*1*1", TASK).correct  # 1 is there once
        assert not verify("24", TASK).correct

    @pytest.mark.parametrize("text", ["4*3*2", "1+2+3+4", "1/(2-2)", "24"])
    def test_format_reward_for_a_readable_expression_only(self, text):
        verify = CountdownVerifier(format_reward=0.1)
        verdict = verify(f"<answer>{text}</answer>", TASK)
        assert (verdict.score, verdict.answer, verdict.correct) == (0.1, text, False)
        assert verify(f"<answer>{text} and so on</answer>", TASK) == (0.0, None, False, {}, None)

    @pytest.mark.parametrize(
        ("reference", "names"),
        [
            (None, "mapping"), ("24", "mapping"), ({"target": 24}, "nums"), ({"nums": [1]}, "target"),
            ({"target": 2.5, "nums": [1]}, "whole"), ({"target": 1, "nums": ["1"]}, "whole"),
            ({"target": 1, "nums": "11"}, "nums"), ({"target": 1, "nums": []}, "nums"), ({"target": 1, "nums": [-1]}, "nums"),
        ],
    )  # fmt: skip
    def test_bad_references(self, reference, names):
        with pytest.raises(ValueError, match=names):
            CountdownVerifier()("1", reference)

    def test_numbers_is_another_name_and_pickles(self):
        verify = pickle.loads(pickle.dumps(CountdownVerifier(format_reward=0.5)))
        assert verify("2 - 1", {"target": 1, "numbers": (1, 2)}).score == 1.0

    @pytest.mark.parametrize(
        "response",
        [
            "10**2", "<answer>10**2</answer>", "9" * 999, "*".join(["999999999999"] * 76), "/".join(["99"] * 333),
            "<answer>" + "(" * 450 + "1" + ")" * 450 + "</answer>", "(" * 10**6, "-" * 999 + "1", "\\frac{" * 150,
            "1+" * 500_000, "<answer>" * 125_000, "\\boxed{" * 140_000, "\\boxed{" * 70_000 + "}" * 70_000, "{" * 10**6,
            "\\" * 10**6, "$" * 999 + "x", " " * 10**6, "<answer>" + "9" * 10**6 + "</answer>",
        ],
    )  # fmt: skip
    def test_hostile(self, response):
        assert CountdownVerifier()(response, TASK).score == 0.0
        assert_linear(lambda text: CountdownVerifier()(text, TASK), response)

    def test_depth_is_bounded_where_it_says(self):
        assert read_expression("(" * 50 + "1" + ")" * 50).value == 1
        assert read_expression("(" * 51 + "1" + ")" * 51) is None


class TestRows:
    def test_each_solution_scores_and_each_change_does_not(self):
        verify = CountdownVerifier()
        for row in countdown_rows(500, seed=3):
            assert verify(f"<answer>{row['solution']}</answer>", row).score == 1.0
            assert verify(f"<answer>{row['solution']} + 1</answer>", row).score == 0.0
            assert verify(row["solution"], {**row, "target": row["target"] + 1}).score == 0.0
            assert verify(row["solution"], {**row, "nums": [*row["nums"], 1]}).score == 0.0
            assert verify(row["solution"], {**row, "nums": row["nums"][1:]}).score == 0.0

    def test_rows_are_as_asked(self):
        rows = list(countdown_rows(300, 1, numbers=(2, 5), low=3, high=9, target=(20, 30)))
        assert {len(row["nums"]) for row in rows} == {2, 5}
        assert all(3 <= num <= 9 for row in rows for num in row["nums"])
        assert all(20 <= row["target"] <= 30 for row in rows)
        assert all(str(row["target"]) in row["query"] for row in rows)
        assert all(", ".join(map(str, row["nums"])) in row["query"] for row in rows)

    def test_small_problems_are_solved_by_search_too(self):
        """Two numbers: every expression there is, without the generator and the parser."""
        for row in countdown_rows(100, 5, numbers=(2,), target=(1, 500)):
            pairs = itertools.permutations(map(Fraction, row["nums"]))
            assert row["target"] in {f(a, b) for a, b in pairs for f in APPLY.values()}

    def test_deterministic_by_seed_and_index(self):
        rows = list(countdown_rows(50, seed=7))
        assert rows == list(countdown_rows(50, seed=7))
        assert rows[:10] == list(countdown_rows(10, seed=7))
        assert rows != list(countdown_rows(50, seed=8))
        assert len({row["query"] for row in rows}) == 50
        assert (rows[0]["target"], rows[0]["nums"]) == (37, [28, 32, 57, 40])  # the same on every machine

    @pytest.mark.parametrize(
        "settings",
        [
            {"numbers": ()},
            {"numbers": (1,)},
            {"low": 0},
            {"low": 9, "high": 8},
            {"target": (5, 4)},
            {"target": (0, 4)},
        ],
    )
    def test_bad_settings(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            countdown_rows(1, 0, **settings)

    def test_out_of_reach_is_said(self):
        with pytest.raises(ValueError, match="widen target"):
            next(countdown_rows(1, 0, numbers=(2,), low=1, high=2, target=(50, 60)))
