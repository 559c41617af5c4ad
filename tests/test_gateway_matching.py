"""The rules by which an agent's history is recognised: each with what it makes equal, and what it does not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_chat.gateway.matching import RULES, difference, frozen_arguments, said

FUNCTION = {"name": "f", "arguments": '{"a": 1}'}
CALL = {"id": "x", "type": "function", "function": FUNCTION}
ANSWER = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def calling(arguments, **more) -> dict:
    return {**ANSWER, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": arguments}, **more}]}


def text(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


# Of each rule about messages: spellings that it makes the same, and one that stays another.
SAME = {
    "A1": (
        [
            {**ANSWER, "refusal": None, "annotations": None, "audio": None, "parsed": None},
            {"role": "assistant", "tool_calls": [CALL]},
            {**ANSWER, "content": ""},
        ],
        text(""),
    ),
    "A2": ([ANSWER, calling('{"a": 1}', index=0, provider_specific_fields={"b": 1})], calling('{"a": 2}')),
    "A3": (
        [calling('{"a": 100.0, "b": "é"}'), calling('{ "a":1e2,"b":"\\u00e9" }\n'), calling({"a": 100, "b": "é"})],
        calling('{"b": "é", "a": 100}'),
    ),
    "A4": (
        [text("one two"), text([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}])],
        text("one  two"),
    ),
    "A5": (
        [
            text("B", reasoning_content="A"),
            text("B", reasoning="A"),
            text("<think>A</think>B"),
            text("\nB", reasoning="A"),
        ],
        text("B", reasoning_content="C"),
    ),
    "A6": ([ANSWER, {**ANSWER, "content": ""}, {**ANSWER, "content": "\n\n"}], {**ANSWER, "content": "hm"}),
    "A7": (
        [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be brief.\n"}],
        {"role": "system", "content": "Be long."},
    ),
    "C1": (
        [text("B", reasoning_content="\nA\n"), text("B", reasoning_content="A")],
        text("B", reasoning_content="A A"),
    ),
}
ON_REQUESTS = {"A8", "A9", "A10", "B1", "B2", "B3", "B4", "B5"}  # tests/test_gateway_sessions.py


def test_every_rule_has_a_test():
    assert set(RULES) == SAME.keys() | ON_REQUESTS
    assert {name for name, rule in RULES.items() if rule.apply is not None} == SAME.keys()


@pytest.mark.parametrize("name", SAME)
def test_a_rule_makes_spellings_the_same_and_nothing_else_does(name):
    spellings, other = SAME[name]
    first, *others = map(said, spellings)
    assert all(each == first and each.key == first.key for each in others)
    assert said(other) != first
    without = [said(spelling, without={name}) for spelling in spellings]
    assert any(each != without[0] for each in without[1:]), "the rule is not needed"


@pytest.mark.parametrize("name", ["A5"])
def test_reasoning_that_is_dropped_is_still_the_answer(name):
    recorded = said(text("\n\nB", reasoning_content="A"))
    assert difference(said(text("B")), recorded) is None
    assert difference(said(text("\n\nB")), recorded) is None
    assert "reasoning" in difference(said(text("B", reasoning="other")), recorded)
    assert "none" in difference(said(text("B", reasoning="A")), said(text("B")))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=3), values, max_size=3)


@given(objects, st.booleans(), st.sampled_from([None, 1]))
def test_arguments_are_the_same_however_they_are_spelled(value, escaped, indent):
    spelled = json.dumps(value, ensure_ascii=escaped, indent=indent)
    assert frozen_arguments(spelled) == frozen_arguments(json.dumps(value)) == frozen_arguments(value)


@given(objects, objects)
def test_arguments_of_other_values_are_others(one, other):
    if json.dumps(one) != json.dumps(other) and one != other:
        assert frozen_arguments(one) != frozen_arguments(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", "true"),
        ("0", "false"),
        ("null", '"null"'),
        ("12345678901234567890123", "12345678901234567890124"),
        ("[1, 2]", '{"1": 2}'),
        ('{"a": {"b": 1}}', '{"a": ["b", 1]}'),
        ('"x"', "x"),
    ],
)
def test_values_that_look_alike_are_told_apart(one, other):
    assert frozen_arguments(f'{{"a": {one}}}') != frozen_arguments(f'{{"a": {other}}}')


def test_arguments_that_are_no_json_are_their_text():
    cut = '{"city":"Oslo","n":1.0'
    assert frozen_arguments(cut) == frozen_arguments(json.dumps({"INVALID_JSON": cut})) == cut
    assert frozen_arguments("[" * 100_000) == "[" * 100_000


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (text("hello there"), "character 6"),
        (text("hello world "), "blanks"),
        (text("hello world", tool_calls=[CALL]), "1 tool calls instead of 0"),
    ],
)
def test_an_edit_is_told_without_its_words(sent, words):
    found = difference(said(sent), said(text("hello world")))
    assert words in found
    assert "hello" not in found


def test_edited_calls_are_told_by_their_place():
    recorded = said({**ANSWER, "tool_calls": [CALL, CALL]})
    other = {"id": "x", "function": {"name": "g", "arguments": "{}"}}
    changed = {"id": "x", "function": {"name": "f", "arguments": '{"a": 2}'}}
    assert "call 1 names another" in difference(said({**ANSWER, "tool_calls": [CALL, other]}), recorded)
    assert "call 1 have other values" in difference(said({**ANSWER, "tool_calls": [CALL, changed]}), recorded)
