"""GSM8K's answers as instruct models write them: every way to write a number is read, its neighbours are wrong, headings are no answers."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat import GSM8KVerifier, NumberVerifier

MARKS = {"hashes": "so\n#### {}", "box": "so $\\boxed{{{}}}$.", "tag": "<answer>{}</answer>"}

# "#" stands for the number as it is, "@" for the number with thousands separators, both without their sign.
BARE = [
    "#", "@", "#.", "**#**", "__@__", "`#`", "*#* eggs", '"#"', "(#)", "\\(#\\)", "\\[#\\]", "$#$", "= #", "x = #", "≈ #", "~#", "\\approx #",
    "# eggs", "@ eggs.", "**#** eggs", "**@ eggs**", "# km/h", "# miles/hour", "#/month", "# m²", "# cm^2", "# square feet", "#%", "# \\%", "# percent",
    "#°", "#^\\circ", "#^{\\circ}\\text{C}", "# (in all)", "She has # eggs left.", "The answer is **@**.", "**Answer:** #", "Total: @ dollars", "about #",
    "# \\text{ eggs}", "#~\\text{eggs}", "\\text{# eggs}", "#\\,\\mathrm{km}", "\\textbf{#}", "\\mathbf{@}", "{\\bf #}", "\\underline{#}", "\\color{red}{#}",
    "\\boldsymbol{#}", "\\displaystyle #", "\\left(#\\right)", "# \\frac{\\text{km}}{\\text{h}}", "<b>#</b>", "0 + # = #", "0 + # → @", "at least #",
]  # fmt: skip
CURRENCY = ["$@", "\\$@", "$ @", "**$@**", "US$@", "C$@", "€@", "£ @", "₹@", "Rs. @", "Rs.@", "USD @", "@ USD", "@€", "@¢", "$@$", "\\$@\\text{ per month}", "\\text{\\$}@",
            "\\textdollar @", "\\pounds @", "\\mathbf{\\$@}", "$@ per day", "It costs \\$@ in total.", "$@/month"]  # fmt: skip
MINUS = ["-#", "−#", "–#", "- #", "− @", "minus #", "Minus #", "negative @", "-$@", "$-#", "-\\$#", "\\$-@", "$ - #", "{-}#", "-\\,#", "-\\text{#}", "\\text{-}#", "\\text{minus }#",
         "-# degrees", "**-#**", "**- #**", "x = -#", "x = - @", "The balance is - #.", "The balance is minus @ dollars", "Answer: - #", "Answer: minus #", "It is a negative #.", "(-#)",
         "\\(- #\\)", "-US$#", "−€@"]  # fmt: skip
GROUPS = [",", "{,}", "\\,", ",\\!", "'", "’", "\u00a0", "\u202f", "\u2009", " ", "_", "\\;"]
# What stands around it makes another number of it, or several, or none.
CHANGED = [
    "#½", "# ½", "#²", "#\\pi", "# \\pi", "\\sqrt{#}", "√#", "#!", "x^{#}", "x_{#}", "\\log #", "\\overline{#}", "#:30", "#-9999", "#–9999", "#/2", "2/#", "\\frac{#}{2}", "\\frac{1}{#}",
    "# 1/2", "# and a half", "#k", "# K", "# mil", "# million", "# lakh", "# dozen", "#\\text{ million}", "±#", "\\pm #", "+/-#", "> #", "< #", "\\neq #", "x ≠ #", "x != #", "more than #",
    "less than #", "not #", "#+", "# + x", "#x", "# × 10", "#e3", "2e#", "# or 5", "5 or #", "#, 5", "# 5", "#^2", "#^{2}", "#**2", "2 ** #", "#·2", "#÷2", "half of #", "# hundredths",
    "# below zero", "# degrees below zero", "# squared", "# times 2", "# to 9999", "0#.5", "#\\cdot 2",
]  # fmt: skip

numbers = st.one_of(st.integers(11, 99), st.integers(1000, 9999), st.integers(10**4, 10**9), st.integers(1, 10**6).map(lambda n: Decimal(n) / 4)).map(Decimal)  # fmt: skip


def written(form: str, number: Decimal) -> str:
    plain, grouped = f"{abs(number):f}", f"{abs(number):,f}"
    return form.replace("#", plain).replace("@", grouped)


def correct(text: str, mark: str, number: Decimal) -> bool:
    return GSM8KVerifier()(MARKS[mark].format(text), f"worked out\n#### {number:,f}").correct


def neighbours(number: Decimal) -> list[Decimal]:
    return [
        number + 1,
        number - 1,
        -number,
        number * 10,
        number / 10,
        number + Decimal("0.5"),
        number * 1000,
        abs(number) % 1000,
    ]


@pytest.mark.parametrize("mark", MARKS)
@settings(max_examples=150, deadline=None)
@given(number=numbers, form=st.sampled_from(BARE + CURRENCY))
def test_a_number_is_right_and_its_neighbours_are_wrong(mark, number, form):
    text = written(form, number)
    assert correct(text, mark, number), text
    for other in neighbours(number):
        assert other == number or not correct(text, mark, other), (text, other)


@pytest.mark.parametrize("mark", MARKS)
@settings(max_examples=100, deadline=None)
@given(number=numbers, form=st.sampled_from(MINUS))
def test_a_sign_however_it_is_written(mark, number, form):
    text = written(form, number)
    assert correct(text, mark, -number), text
    for other in neighbours(-number):
        assert other == -number or not correct(text, mark, other), (text, other)


@pytest.mark.parametrize("mark", MARKS)
@settings(max_examples=100, deadline=None)
@given(
    number=st.integers(1000, 10**9),
    gap=st.sampled_from(GROUPS),
    around=st.sampled_from(["{}", "{} eggs", "${}", "**{}**", "-{}", "{}.50"]),
)
def test_thousands_however_they_are_grouped(mark, number, gap, around):
    text = around.format(f"{number:,}".replace(",", gap))
    value = Decimal(number) * (-1 if around.startswith("-") else 1) + (
        Decimal("0.5") if around.endswith("50") else 0
    )
    assert correct(text, mark, value), text
    for other in neighbours(value):
        assert other == value or not correct(text, mark, other), (text, other)


@pytest.mark.parametrize("mark", MARKS)
@settings(max_examples=150, deadline=None)
@given(number=st.integers(11, 9999).map(Decimal), form=st.sampled_from(CHANGED))
def test_what_changes_a_number_is_not_read_over(mark, number, form):
    text = written(form, number)
    assert not correct(text, mark, number), text


@pytest.mark.parametrize("text", ["12,34,567", "$12,34,567", "12,34,567.00 rupees"])
def test_indian_groups(text):
    assert GSM8KVerifier()(f"#### {text}", "#### 1234567").correct
    assert not GSM8KVerifier()(f"#### {text}", "#### 567").correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{18}\n\n#### Verification\nAll steps hold for 7 days.", 18), ("#### 18\n\n#### Check\nBoth sides are 9.", 18), ("<answer>18</answer>\n#### Notes\nNone.", 18),
        ("\\boxed{18}\n#### 2. Verify\nfine", 18), ("\\boxed{18}\n#### Step 3: 9 + 8 = 17", 18), ("\\boxed{18}\n#### Check with 3 days\nfine", 18),
        ("\\boxed{18}\n#### Verify the answer\n16 - 3 = 13", 18), ("#### Cost of 5 apples\nA good question.", None), ("#### 1. Understand the problem\nThere are ducks.", None),
        ("#### Step 1\n9 + 9 = 18\n\n#### Final Answer\n18", 18), ("#### Final Answer:\n\n**$18**", 18), ("#### Final Answer:\n\nShe has 18 eggs.", 18), ("#### Answer\n\nThe total is:\n\n18", 18),
        ("#### Step 4: Final Answer\n18 eggs", 18), ("#### 4. **Final Answer**\n\n$18", 18), ("#### **Final Answer:** 18\n\nAsk me 3 more!", 18), ("#### Final Answer\n<answer>18</answer>", 18),
        ("#### Final Answer\n$$\\boxed{18}$$", 18), ("#### Total: 18", 18), ("#### Total: 18\nGood.", 18), ("#### She has 18 eggs", 18), ("#### 18\n\n#### 20", 20), ("####\n18 eggs", 18),
        ("\\boxed{18} <answer>the farm</answer>", 18), ("\\boxed{17}\n#### eighteen", None), ("\\boxed{18} <answer>unknown</answer>", None), ("\\boxed{18}\n#### none", None), ("\\boxed{18}, no: $\\boxed{6\\pi}$", None),
        ("##### 18", None), ("### 18", None), ("$\\boxed 18$", 18), ("\\boxed18.", 18), ("It is in \\boxed form, 18.", None),
    ],
)  # fmt: skip
def test_headings_and_marks_without_a_number(text, answer):
    found, marked = GSM8KVerifier().extract(text)
    assert found == answer
    assert marked or answer is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is minus 5.", "-5"), ("The answer is - 5.", "-5"), ("It drops to - 5 degrees.", "-5"), ("The total is –5", "-5"), ("a negative 5", "-5"), ("Answer: - 5", "-5"),
        ("the answer is -\\$5.", "-5"), ("is **- 5**", "-5"), ("is $-5$", "-5"), ("is \\(- 5\\)", "-5"), ("equals − 5", "-5"), ("It is cold. Minus 5 degrees", "-5"), ("x = − 5", "-5"),
        ("Answer - 5", "5"), ("- 5", "5"), ("Answer:\n- 5", "5"), ("It is\n- 5 eggs", "5"), ("10 minus 5", "5"), ("x minus 5", "5"), ("8 − 5", "5"), ("8 - 5", "5"), ("3–5", "5"), ("n − 5", "5"),
        ("The answer is 2½", None), ("The answer is 1/2.", None), ("The answer is 5 million.", None), ("1e5", None), ("2^5", None), ("2^{5}", None), ("so 5K", None), ("√5", None),
        ("5 and that is it", "5"), ("5 or so", "5"), ("5 kg", "5"), ("No.5", "5"), ("Rs.18", "18"), ("US$18", "18"), ("1\u202f234", "1234"), ("1'234 francs", "1234"),
    ],
)  # fmt: skip
def test_the_last_number_of_running_text(text, answer):
    assert NumberVerifier()(text, "7").answer == answer
    assert GSM8KVerifier(last_number=True)(text, "#### 7").answer == answer
