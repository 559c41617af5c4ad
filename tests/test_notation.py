"""MATH's answers in the many notations for one thing: equal both ways round; what differs, or cannot be read, is never right."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat.rewards.marked import boxes, find_marked
from torchrl_chat.rewards.math import MathVerifier
from torchrl_chat.rewards.notation import alone, plain

VERIFY = MathVerifier(unmarked=False)


@pytest.fixture(scope="module", autouse=True)
def library():
    pytest.importorskip("math_verify", reason="needs the extra: torchrl_chat[math]")


def right(answer: str, reference: str) -> bool:
    verdict = VERIFY(f"Hence $\\boxed{{{answer}}}$.", reference)
    quick = VERIFY.quick(f"Hence $\\boxed{{{answer}}}$.", reference)
    assert quick is None or quick == verdict == VERIFY.compare(f"Hence $\\boxed{{{answer}}}$.", reference)
    return verdict.correct


SAME = [
    ("\\emptyset", "\\varnothing"), ("\\emptyset", "∅"), ("\\varnothing", "\\{\\}"), ("\\{1,2\\}", "\\lbrace 2,1 \\rbrace"), ("x \\neq 5", "x \\not= 5"),
    ("\\frac12", "½"), ("\\frac{11}{4}", "2¾"), ("2\\frac12", "2 1/2"), ("2\\frac12", "2½"), ("6", "2·3"), ("x^4", "x⁴"), ("x^{-1}", "x⁻¹"), ("x^{10}", "x¹⁰"), ("x_1", "x₁"), ("\\sqrt{2+x}", "√(2+x)"),
    ("\\sqrt[3]{2}", "∛2"), ("\\sqrt{2}", "√2"), ("1500", "1.5e3"), ("1.5\\times10^{-3}", "1.5e-3"),
    ("e^2", "\\mathrm{e}^2"), ("1-\\frac1e", "1-\\frac{1}{\\text{e}}"), ("\\ln 2", "\\log_{e} 2"), ("\\ln 2", "\\operatorname{ln} 2"), ("3+4i", "3+4\\mathrm{i}"), ("\\arctan 2", "\\operatorname{arctan} 2"),
    ("\\log_{10} 2", "\\lg 2"), ("\\cos x", "\\text{cos} x"), ("\\sin \\mathrm{e}", "\\sin e"),
    ("1011_2", "1011_{\\text{two}}"), ("1011_2", "1011_{\\mathrm{two}}"), ("1011_2", "1011_{two}"), ("1011_2", "(1011)_2"), ("1011_2", "1011_{(2)}"), ("1011_2", "1011 \\text{ base } 2"), ("1011_2", "1011 base two"),
    ("1011_2", "1011_{\\text{base 2}}"), ("1011_2", "\\text{1011}_2"), ("1011_2", "1011₂"), ("A3_{16}", "a3_{16}"), ("A3_{16}", "\\mathrm{A3}_{\\text{sixteen}}"), ("0.101_2", "0.101_{\\text{two}}"),
    ("5:30", "5{:}30"), ("5:30", "5\\!:\\!30"), ("5:30", "05:30"), ("5:30\\text{ p.m.}", "5:30 PM"), ("5:30\\text{ p.m.}", "17:30"), ("5:30\\text{ p.m.}", "5:30"), ("12:10\\text{ a.m.}", "0:10"), ("3:2", "3{:}2"),
    ("\\sin 30^\\circ", "\\frac12"), ("\\cos(60°)", "0.5"), ("\\tan 45^{\\circ}", "1"), ("\\sin30^\\circ", "\\sin\\frac{\\pi}{6}"), ("90^\\circ", "\\frac{\\pi}{2}"), ("90^\\circ", "90"), ("90^\\circ", "90\\degree"),
    ("90^\\circ", "90 degrees"), ("\\sin(x+30^\\circ)", "\\sin(30^\\circ+x)"),
    ("5", "€5"), ("5", "5¢"), ("5", "\\text{\\$}5"), ("5", "USD 5"), ("5", "5\\$"), ("-5", "\\text{minus }5"), ("-5", "negative 5"), ("-5", "{-}5"), ("-5", "-\\text{5}"), ("-5", "−5"),
    ("5", "\\textcolor{blue}{5}"), ("5", "\\underline{5}"), ("5", "\\boldsymbol{5}"), ("5", "5 \\frac{\\text{km}}{\\text{h}}"), ("5", "5 red balls"), ("5", "5 cm²"), ("5", "5\\,cm"), ("5", "5 m/s"), ("5", "5 \\checkmark"),
    ("50\\%", "50"), ("50\\%", "0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two"), SAME)
def test_one_thing_in_two_notations(one, two):
    assert right(one, two)
    assert right(two, one)


APART = [
    ("\\emptyset", "0"), ("\\emptyset", "\\{0\\}"), ("\\varnothing", "\\phi"), ("2½", "1"), ("2 1/2", "\\frac{21}{2}"), ("x⁴", "x_4"), ("x^{12}", "x¹"), ("e^2", "\\mathrm{c}^2"), ("5\\mathrm{e}", "5"), ("5\\text{i}", "5"),
    ("1.5e3", "1.5"), ("1011_2", "1011_{\\text{three}}"), ("1011_2", "1011_{three}"), ("1011_2", "1011_b"), ("1011_2", "1011"), ("1011 base 2", "1011"), ("0.101_2", "0.101_3"), ("0.101_2", "0.101"), ("A3_{16}", "A4_{16}"),
    ("5:30", "5:31"), ("5:30", "5"), ("10:30", "11:30"), ("1:20", "2:40"), ("5:30\\text{ p.m.}", "5:30\\text{ a.m.}"), ("5:30\\text{ p.m.}", "16:30"), ("3:2", "2:3"),
    ("\\sin 1^\\circ", "\\sin 1"), ("\\sin(1^\\circ)", "\\sin(1)"), ("\\tan 30^\\circ", "\\tan 30"), ("\\cos(x+30^\\circ)", "\\cos(x+30)"), ("\\cos(x+30)^\\circ", "\\cos(x+30)"), ("90^\\circ", "\\pi"), ("90", "\\frac{\\pi}{2}"),
    ("\\neq 5", "5"), ("\\geq 5", "5"), ("5\\text{ squared}", "5"), ("5\\text{ below zero}", "5"), ("5\\text{k}", "5"), ("5\\text{x}", "5"), ("5 dozen", "5"), ("5 million", "5"), ("5 red or 6 blue", "5"), ("5 sin", "5"),
    ("minus 5", "5"), ("\\text{negative 5}", "5"), ("not 5", "5"), ("6 \\frac{\\text{km}}{\\text{h}}", "5"), ("5 pi", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two"), APART)
def test_two_things(one, two):
    assert not right(one, two)
    if not one.startswith(
        ("\\neq", "\\geq", "5", "6", "not")
    ):  # as a reference, these may be read in more than one way
        assert not right(two, one)


def digits(number: int, base: int) -> str:
    found = ""
    while number:
        number, last = divmod(number, base)
        found = "0123456789ABCDEF"[last] + found
    return found


def test_numbers_without_a_digit_of_ten():
    """Letters with a base are a number in every form; who says another base, or none, has not said the same."""
    forms = [
        "BAD_{16}",
        "(BAD)_{16}",
        "\\text{BAD}_{sixteen}",
        "BAD_{\\text{sixteen}}",
        "BAD\\text{ base 16}",
        "BAD_{(16)}",
    ]
    for one in forms:
        assert all(right(one, other) for other in forms)
        assert not any(right(one, other) for other in ("BED_{16}", "BAD_{15}", "(BAD)_{15}", "BAD", "2989"))


WORDS = {2: "two", 3: "three", 5: "five", 8: "eight", 12: "twelve", 16: "sixteen"}


@settings(max_examples=100, deadline=None)
@given(st.integers(40, 10**6), st.sampled_from(list(WORDS)), st.data())
def test_numbers_in_a_base(number, base, data):
    def forms(said: str, word: str, base: int) -> list[str]:
        return [f"{said}_{{{base}}}", f"{said}_{{\\text{{{word}}}}}", f"({said})_{{{base}}}", f"{said}\\text{{ base {base}}}", f"\\text{{{said}}}_{{{word}}}"]  # fmt: skip

    said, other = digits(number, base), data.draw(st.sampled_from([b for b in WORDS if b != base]))
    surely_a_number = any(c.isdigit() for c in said)
    reference, answer = (data.draw(st.sampled_from(forms(said, WORDS[base], base))) for _ in "ab")
    assert right(answer, reference)
    if surely_a_number:
        assert not right(data.draw(st.sampled_from(forms(said, WORDS[other], other))), reference)
        assert not right(data.draw(st.sampled_from(forms(digits(number + 1, base), WORDS[base], base))), reference)
        assert not right(said, reference)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 23), st.integers(0, 59), st.integers(1, 59), st.data())
def test_times_of_day(hour, minute, later, data):
    half, twelve = "am" if hour < 12 else "pm", hour % 12 or 12

    def forms(minute: int) -> list[str]:
        return [f"{hour}:{minute:02}", f"{hour:02}{{:}}{minute:02}", f"{twelve}:{minute:02}\\text{{ {half[0]}.m.}}", f"{twelve}:{minute:02} {half.upper()}"]  # fmt: skip

    reference = data.draw(st.sampled_from(forms(minute)))
    assert right(data.draw(st.sampled_from(forms(minute))), reference)
    assert not right(data.draw(st.sampled_from(forms((minute + later) % 60))), reference)
    assert (
        not right(f"{twelve}:{minute:02}\\text{{ {'p' if half == 'am' else 'a'}.m.}}", reference)
        or half[0] not in reference
    )


@settings(max_examples=6, deadline=None)  # SymPy takes its time
@given(st.integers(1, 359), st.sampled_from(["sin", "cos"]), st.data())
def test_degrees_are_degrees(angle, name, data):
    forms = [
        f"\\{name} {angle}^\\circ",
        f"\\{name}({angle}°)",
        f"\\{name}{angle}^{{\\circ}}",
        f"\\{name} \\frac{{{Fraction(angle, 180).numerator}\\pi}}{{{Fraction(angle, 180).denominator}}}",
    ]
    reference = data.draw(st.sampled_from(forms))
    assert right(data.draw(st.sampled_from(forms)), reference)
    assert not right(f"\\{name} {angle}", reference)
    assert not right(f"\\{name} {angle + 1 + (angle % 90 == 0)}^\\circ", reference) or name == "cos"


# --- Boxes without braces, boxes that are one answer, marks that cannot be read ---------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed 2", "2"), ("so $\\boxed 12$.", "12"), ("\\boxed2.", "2"), ("\\boxed -5", "-5"), ("\\boxed \\frac{1}{2}, as", "\\frac{1}{2}"), ("$\\boxed\\frac12$", "\\frac12"), ("\\boxed\\text{(C)}", "\\text{(C)}"),
        ("\\boxed \\sqrt 2", "\\sqrt 2"), ("$\\boxed x$", "x"), ("$\\boxed (1, 2)$", "(1, 2)"), ("\\boxed 12\\%", "12\\%"), ("\\fbox 7", "7"), ("\\boxed{x = \\boxed 5}", "5"), ("\\boxed{1}, not \\boxed 2", "2"),
    ],
)  # fmt: skip
def test_boxes_without_braces(text, content):
    found = boxes(text)[-1]
    assert found.content == content
    assert text[found.start :].startswith(("\\boxed", "\\fbox"))
    assert text[: found.end].endswith(content)
    assert find_marked(text).text == content


@pytest.mark.parametrize(
    "text",
    [
        "use \\boxed for it",
        "\\boxed a number",
        "\\boxed",
        "\\boxed 2 + 3",
        "$\\boxed x - 1$",
        "\\boxed = 5",
        "\\boxedx 5",
    ],
)
def test_no_box(text):
    assert boxes(text) == []


@settings(max_examples=80, deadline=None)
@given(
    st.integers(-999, 999),
    st.sampled_from(
        ["\\boxed {}", "$\\boxed {}$", "As $x = 3$, it is $\\boxed {}$.", "There are 17, so \\boxed {}."]
    ),
    st.integers(1, 99),
)
def test_a_box_without_braces_is_an_answer_and_a_reference(number, form, more):
    text = form.format(number)
    assert VERIFY(text, str(number)).correct
    assert VERIFY(f"\\boxed{{{number}}}", text).correct
    for other in {number + more, -number, 3, 17} - {number}:
        assert not VERIFY(text, str(other)).correct
        assert not VERIFY(f"\\boxed{{{other}}}", text).correct


BROKEN = ["\\boxed{@", "\\boxed{\\frac{@}{7}", "\\boxed", "\\boxed{", "\\fbox{@", "\\boxed @ + 1", "\\boxed @x - y", "<answer>@", "\\boxed{3} or \\boxed{@", "\\boxed{}", "\\boxed{ }", "<answer></answer>"]  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    st.integers(4, 99),
    st.sampled_from(BROKEN),
    st.sampled_from(["As $x = 3$ we find ", "Of 3 ways, ", "It is $y$, so ", "Answer: 3. Or rather "]),
    st.sampled_from(["3", "y", "1", "7", "\\frac{1}{3}", "x", "0", ""]),
)
def test_a_reference_that_cannot_be_read_makes_nothing_right(number, form, before, answer):
    reference = before + form.replace("@", str(number))
    for call in (VERIFY, VERIFY.quick, VERIFY.compare):
        with pytest.raises(ValueError, match="cannot be read|never closes|blank"):
            call(f"\\boxed{{{answer}}}", reference)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So \\boxed{3}. Therefore, $\\boxed{4}$", "4"), ("\\boxed{5}, thus, \\boxed{4}", "4"), ("First \\boxed{3}, and simplifying, \\boxed{4}", "4"), ("\\boxed{3} by the first rule. Adding, \\boxed{4}", "4"),
        ("**Step 1** \\boxed{3}\n\n**Step 2**, \\boxed{4}", "4"), ("\\boxed{3},\n\nhence \\boxed{4}", "4"), ("\\boxed{5}, wait, let me recompute: \\boxed{4}", "4"), ("\\boxed{5}; no: \\boxed{4}", "4"),
        ("\\boxed{3} and $\\boxed{4}$", "3, 4"), ("$x=\\boxed{3}$, $y=\\boxed{4}$", "3, 4"), ("\\boxed{3} red balls and \\boxed{4} blue ones", "3, 4"), ("\\boxed{3},\\quad\\boxed{4}", "3, 4"),
        ("\\boxed{\\frac12} or \\boxed{0.5}", "\\frac12"), ("\\boxed{18\\text{ cm}} or \\boxed{18}", "18"), ("$\\boxed{4}$, that is, $\\boxed{4}$", "4"),
    ],
)  # fmt: skip
def test_which_boxes_are_one_answer(text, answer):
    assert VERIFY(text, answer).correct
    for other in {"3", "4", "5", "3, 4", "18, 19"} - {answer}:
        assert not VERIFY(text, other).correct, other


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{5}\n#### Check", "5"), ("\\boxed{5}\n\n#### Step 2", "5"), ("#### Final Answer\n\n$5$", "5"), ("### The Final Answer:\n5", "5"), ("\\boxed{4}\n#### 5", "5"), ("#### Evelyn", "\\text{Evelyn}"),
        ("the answer is minus 5.", "-5"), ("The answer is - 5", "-5"), ("Answer: 5:30", "5:30"),
    ],
)  # fmt: skip
def test_headings_and_phrases(text, answer):
    assert VERIFY(text, answer).correct


# --- The notation itself ----------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["\\text{", "\\mathrm{", "}", "{", "_", "^", "e", "two", "2", "²", "₂", "½", "√", "(", ")", ":", "°", "\\circ", "\\sin", "−", "$", " ", "\\frac", "base "]), max_size=12).map("".join))  # fmt: skip
def test_a_second_time_changes_nothing_and_nothing_raises(text):
    once = plain(text)
    assert plain(once) == once or "\\sin" in text or "\\text" in text or "\\mathrm" in text
    assert isinstance(alone(once), str)


@pytest.mark.parametrize(
    "text",
    [
        "x+1",
        "\\frac{1}{2}",
        "(1,2)",
        "\\text{Evelyn}",
        "5\\text{ cm}",
        "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
        "x_1",
        "a_{n}",
        "\\overline{AB}",
        "f(x)=2x",
        "3:2",
        "\\pi",
        "e^{i\\pi}",
    ],
)
def test_what_needs_no_change_is_left_alone(text):
    assert alone(plain(text)) == text
