"""The law through ``ChatEnv`` for every development template: tools, reasoning, cut and empty turns, deep, in all modes.

What a policy would sample is cut out of the template's own rendering (``corpus_turns.py``), its tokens split as no
tokenizer would. What follows must be what that rendering goes on with. A refusal is right only where the rendering
raises or leaves a message out.
"""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch
from conftest import all_corpus, corpus_tokenizer, of_the_day
from corpus_turns import ASKED, REASONING, ROWS, Turn, adapted, calls, env_of, one_of_added, raw, refuses_calls, row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from law_turns import check as check_law
from law_turns import contents, sample
from tensordict import TensorDict
from torchrl.modules.llm.policies import LogProbs, Tokens

from torchrl_chat import BridgeError, ChatEnv, columns

pytestmark = pytest.mark.corpus

MODES = ("history", "text", "tokens")


@pytest.fixture(scope="session", params=all_corpus())
def name(request) -> str:
    """Every template in turn; all tests of one before the next, so that its tokenizer is loaded once."""
    return request.param


def ledgers_of(td) -> list:
    return columns.read_objects(td["transcript"], td.batch_size)


def play(env: ChatEnv, rows: list[tuple], twice: bool = False) -> list[list]:
    """Play conversations, checking the law at every turn; the ledgers after every step and every append."""
    td = env.reset(TensorDict(query=[list(start) for start, *_ in rows], batch_size=(len(rows),)))
    history, total = [], [0] * len(rows)
    for k in range(len(rows[0][1])):
        turns = [each[k] for _, each, *_ in rows]
        prompts = [r.clone() for r in columns.read_field(td["tokens"], "prompt", td.batch_size)]
        ids = [torch.tensor(each.ids) for each in turns]
        scores = [-torch.rand(len(i), generator=torch.Generator().manual_seed(k)) - 0.01 for i in ids]
        td["tokens"] = columns.ragged(Tokens, "response", ids, td.batch_size, None)
        td["log_probs"] = columns.ragged(LogProbs, "response", scores, td.batch_size, None)
        saved = td.clone() if twice else None
        td = env.step_mdp(env.step(td))
        check_law(td, prompts, ids, scores, total)
        history.append(ledgers_of(td))
        new = [each.new(ledger.messages[-1]) for each, ledger in zip(turns, history[-1], strict=True)]
        stepped, td = td, env.append_messages(td, new)
        check_law(td, prompts, ids, scores, total)
        total = [count + len(i) for count, i in zip(total, ids, strict=True)]
        history.append(ledgers_of(td))
        if twice:
            again = env.step_mdp(env.step(saved))
            assert all(map(same, ledgers_of(again), history[-2]))
            assert all(map(same, ledgers_of(env.append_messages(again, new)), history[-1]))
            assert all(map(same, ledgers_of(env.append_messages(stepped, new)), history[-1]))
    return history


def same(one, other) -> bool:
    """Whether two ledgers are equal (their text is kept in text mode only)."""
    return (
        one.messages == other.messages
        and (one.ended, one.closed, one.stop) == (other.ended, other.closed, other.stop)
        and one.tokens.tolist() == other.tokens.tolist()
        and one.mask.tolist() == other.mask.tolist()
        and one.log_probs.tolist() == other.log_probs.tolist()
    )


# ---------------------------------------------------------------------- the law
def playable(name: str) -> dict[str, tuple]:
    """The conversations that the template can have; one with calls may be refused where their ids differ."""
    rows = {which: found for which in ROWS if (found := row(name, which)) and found[2] is None}
    if refuses_calls(name):
        for which in [w for w in rows if "call" in w or w == "both"]:
            try:
                play(env_of(name, "tokens", 1), [rows[which]])
            except BridgeError:
                del rows[which]
    return rows


@pytest.mark.parametrize("other", of_the_day("history", "text"))
def test_the_law(name, other):
    """Every shape of conversation in one batch, in one mode as in another; each alone; each step twice."""
    rows = playable(name)
    assert {"plain", "cut"} & rows.keys()
    batch = list(rows.values())
    modes = ("tokens", other)
    played = {mode: play(env_of(name, mode, len(batch)), batch, twice=mode == "tokens") for mode in modes}
    for ours, theirs in zip(played["tokens"], played[other], strict=True):
        assert all(map(same, ours, theirs))
    for k, conversation in enumerate(batch):
        alone = play(env_of(name, "tokens", 1), [conversation])
        for ours, [theirs] in zip(played["tokens"], alone, strict=True):
            assert same(ours[k], theirs)
    for (which, conversation), k in zip(rows.items(), itertools.count()):
        check_messages(name, which, conversation, [ledgers[k] for ledgers in played["tokens"]])
        check_tails(name, conversation, [ledgers[k] for ledgers in played["tokens"]])


def check_messages(name, which, conversation, ledgers) -> None:
    """The answers in the ledger are the messages that the policy meant."""
    for each, ledger in zip(conversation[1], ledgers[::2], strict=True):
        message = ledger.messages[-1]
        assert ledger.ended == (each.stop is not None)
        meant = each.message.get("tool_calls", ())
        read = [call["function"] for call in message.get("tool_calls", ())]
        assert [(f["name"], f["arguments"]) for f in read] == [
            ("get_weather", city if isinstance(city := c["function"]["arguments"], dict) else json.loads(city))
            for c in meant
        ], (which, message)
        if REASONING & each.message.keys():
            assert "WHYQ7" in message["reasoning_content"]
            assert message["content"].strip() == each.message["content"]


def check_tails(name, conversation, ledgers) -> None:
    """What follows the sampled ids is what the template's own rendering goes on with."""
    import exactness

    tokenizer = corpus_tokenizer(name)
    encode = functools.partial(exactness.enc, tokenizer)
    for each, stepped, after in zip(conversation[1], ledgers[::2], ledgers[1::2], strict=True):
        *before, answer = map(functools.partial(adapted, name), stepped.messages)
        new = list(after.messages[len(stepped.messages) :])
        sentinel = {**answer, "content": "SENTQ7"}
        if answer.get("tool_calls"):
            *others, last = answer["tool_calls"]
            [changed] = calls(name, "SENTQ7", ids=(last.get("id", "abcdefgh0"),))
            sentinel = {**answer, "tool_calls": [*others, changed]}
        text = raw(name)([*before, sentinel, *new], True).rpartition("SENTQ7")[2]
        assert text, each.kind
        ids = after.tokens[after.spans[-1].end :].tolist()
        assert ids
        limit = text.index(new[0]["content"].strip())
        if each.stop is None:
            first = (
                exactness.first_special(tokenizer, text)[0]
                if exactness.first_special(tokenizer, text)
                else len(text)
            )
            front, rest = text[:first], encode(text[first:])
            options = [exactness.encode_continuation(tokenizer, front) + rest, encode("x" + front)[1:] + rest]
        else:
            ends = [0, *(m.end() for m in one_of_added(name).finditer(text, 0, limit))]
            stop = tokenizer.added_tokens_decoder[each.stop].content
            options = [encode(stop + text[end:])[1:] for end in ends]
        assert ids in options, (each.kind, tokenizer.decode(ids), text)


def test_what_the_template_refuses_is_refused(name):
    """Messages that the template raises at, or leaves out, are never appended in silence."""
    for which in ROWS:
        start, turns, refused = row(name, which) or ([], [], None)
        if refused is None:
            continue
        with pytest.raises(BridgeError):
            play(env_of(name, "tokens", 1), [(start, turns[: refused + 1])])
        play(env_of(name, "tokens", 1), [(start, turns[:refused])] if refused else [row(name, "plain")])


def cut_at(name: str, ends: list[int], reasons: list[str | None]) -> tuple[list, list[list[int]]]:
    """The first plain turn of a conversation, cut at these places: the ledgers, and what follows the sampled ids."""
    start, turns, _ = row(name, "plain")
    rows = [torch.tensor(turns[0].ids[:end]) for end in ends]
    env = env_of(name, "tokens", len(rows))
    td = env.reset(TensorDict(query=[list(start)] * len(rows), batch_size=(len(rows),)))
    td["tokens"] = columns.ragged(Tokens, "response", rows, td.batch_size, None)
    td["finish_reason"] = reasons
    stepped = env.step_mdp(env.step(td))
    tails = []
    for ledger, sampled in zip(
        ledgers_of(env.append_messages(stepped, turns[0].new({}) * len(rows))), rows, strict=True
    ):
        [span] = ledger.spans
        assert ledger.tokens[span.start : span.end].tolist() == sampled.tolist()
        assert int(ledger.mask.sum()) == len(sampled)
        tails.append(ledger.tokens[span.end :].tolist())
    return ledgers_of(stepped), tails


def said_until(name: str) -> int:
    """How many ids of the first plain turn come before the end of what it says."""
    ids, codec = row(name, "plain")[1][0].ids, env_of(name, "tokens", 1).template.codec
    return next(k for k in range(1, len(ids)) if "北京" in codec.decode([ids[:k]])[0])


def test_the_finish_reason_wins(name):
    """A stop token under "length" is text like any other; "stop" needs no stop token."""
    whole, said = len(row(name, "plain")[1][0].ids), said_until(name)
    ledgers, tails = cut_at(name, [whole, whole, said, said], ["stop", "length", "stop", "length"])
    assert [ledger.ended for ledger in ledgers] == [True, False, True, False]
    assert tails[1] == tails[2] == tails[3]
    assert tails[1][len(tails[1]) - len(tails[0]) :] == tails[0]


def test_a_turn_may_be_cut_anywhere(name):
    """Wherever a limit cuts an answer, in its header or its words, it has not ended and the template closes it."""
    ends = list(range(1, said_until(name) + 1))
    ledgers, tails = cut_at(name, ends, [None] * len(ends))
    assert [ledger.ended for ledger in ledgers] == [False] * len(ends)
    assert tails == [tails[-1]] * len(ends)


few = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
said_turns = st.tuples(contents, contents, st.booleans(), st.integers(0, 10**6))


@few
@given(talk=st.lists(st.lists(said_turns, min_size=4, max_size=4), min_size=2, max_size=2))
def test_the_law_for_any_text(name, talk):
    found = row(name, "plain")
    stop, tokenizer = found[1][0].stop, corpus_tokenizer(name)
    rows = []
    for each in talk:
        turns = [
            Turn("any", sample(tokenizer, stop, a, end, seed), stop if end else None, (q,))
            for q, a, end, seed in each
        ]
        rows.append(([ASKED], turns))
    played = [play(env_of(name, mode, 2), rows) for mode in MODES]
    for one, *others in zip(*played, strict=True):
        assert all(all(map(same, one, other)) for other in others)
