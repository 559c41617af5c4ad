"""What is read of a server's reply is what plain JSON has there, and what is none is told by its place."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_chat.replies import MalformedReply, converted, decoded

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
scores = st.floats(-100, 0, width=32) | st.integers(-9, 0) | st.none()
entries = st.fixed_dictionaries(
    {"logprob": scores.filter(lambda score: score is not None)},
    optional={"token": st.text(max_size=5), "bytes": anything, "top_logprobs": anything},
)


def dictionary(**fields):
    return st.fixed_dictionaries({}, optional=fields)


choices = dictionary(
    token_ids=st.none() | st.lists(st.integers(0, 200_000), max_size=5),
    logprobs=st.none()
    | dictionary(
        content=st.none() | st.lists(entries, max_size=5), token_logprobs=st.none() | st.lists(scores, max_size=5)
    ),
    finish_reason=st.none() | st.sampled_from(["stop", "length"]),
    text=st.none() | st.text(max_size=5),
    weight_versions=st.none()
    | st.lists(
        st.fixed_dictionaries(
            {"start": st.integers(0, 9), "version": st.integers(0, 9) | st.sampled_from(["7", "main"])}
        ),
        max_size=3,
    ),
    index=anything,
    prompt_logprobs=anything,
)
tokens = dictionary(
    prompt_tokens=st.none() | st.integers(0, 9), completion_tokens=st.none() | st.integers(0, 9), details=anything
)
whole = dictionary(
    choices=st.none() | st.lists(choices, max_size=2), usage=st.none() | tokens, error=anything, id=anything
)


@given(whole)
def test_as_much_as_is_read_is_what_plain_json_has(value):
    for reply in (decoded(json.dumps(value).encode()), converted(json.loads(json.dumps(value)))):
        assert reply.error == value.get("error")
        usage = value.get("usage")
        assert (reply.usage is None) == (usage is None)
        for name in ("prompt_tokens", "completion_tokens") if usage else ():
            assert getattr(reply.usage, name) == usage.get(name)
        for read, choice in zip(reply.choices or (), value.get("choices") or (), strict=True):
            for name in ("token_ids", "finish_reason", "text"):
                assert getattr(read, name) == choice.get(name)
            told = choice.get("logprobs") or {}
            expected = told.get("token_logprobs")
            if expected is None:
                expected = [entry["logprob"] for entry in told.get("content") or ()]
            assert read.log_probs == ([] if None in expected else expected)
            assert all(type(score) is float for score in read.log_probs)
            numbers = {str(n): n for n in range(10)}
            versions = [
                (each["start"], numbers.get(str(each["version"]))) for each in choice.get("weight_versions") or ()
            ]
            assert [*read.versions] == versions


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (
            {"choices": [{"token_ids": [1, "2"]}]},
            r"Expected `int`, got `str` - at `\$\.choices\[0\]\.token_ids\[1\]`",
        ),
        ({"choices": [{"token_ids": [1.5]}]}, r"Expected `int`.* - at `\$\.choices\[0\]\.token_ids\[0\]`"),
        (
            {"choices": [{"logprobs": {"content": [{"logprob": "x"}]}}]},
            r"`\$\.choices\[0\]\.logprobs\.content\[0\]\.logprob`",
        ),
        ({"choices": [{"logprobs": {"content": [{"token": "a"}]}}]}, "missing required field `logprob`"),
        ({"choices": {}}, r"Expected `array.*, got `object` - at `\$\.choices`"),
        ([], "Expected `object`, got `array`"),
    ],
)
@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": 7, "completion_tokens": 3}, None, "many", {"prompt_tokens": "x"}]
)
def test_what_is_malformed_is_told_by_its_place_and_its_cost_is_known(value, told, usage):
    if isinstance(value, dict):
        value = {**value, "usage": usage}
    for read in (lambda: decoded(json.dumps(value).encode()), lambda: converted(value)):
        with pytest.raises(MalformedReply, match=told) as malformed:
            read()
        cost = malformed.value.usage
        known = isinstance(value, dict) and isinstance(usage, dict) and "completion_tokens" in usage
        assert (cost and (cost.prompt_tokens, cost.completion_tokens)) == ((7, 3) if known else None)


def test_of_what_is_skipped_anything_may_be_there():
    raw = b'{"id": 1%b, "choices": [{"token_ids": [7], "x": [[[1e999]]]}]}' % (b"0" * 5000)
    [choice] = decoded(raw).choices
    assert choice.token_ids == [7]


@pytest.mark.parametrize("raw", [b"", b"no JSON", b'{"choices": [', b"\xff"])
def test_what_is_no_json_is_told(raw):
    with pytest.raises(MalformedReply, match="malformed: it is no JSON"):
        decoded(raw)
