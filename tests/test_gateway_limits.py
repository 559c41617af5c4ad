"""What a session decides and its agent does not: settings, budgets, and how an episode ends."""

from __future__ import annotations

import asyncio

import pytest
from agents import THINKING, TOOLS, ask, asked, calling, check_law, run, session_of, talk, user

from torchrl_chat.conversation import Limits, StopReason
from torchrl_chat.gateway.calls import Call, Kind, Refusal
from torchrl_chat.gateway.sessions import Names
from torchrl_chat.gateway.settings import Settings


@run
async def test_settings_of_the_agent_are_not_looked_at_unless_they_are_allowed():
    session = session_of(["one two three"] * 3, sampling={"temperature": 0.7})
    values = asked(temperature=0.1, seed=3, max_tokens=4)
    reply = await ask(session, [user("hi")], asked=values)
    assert session.engine.asked[0].settings == {"temperature": 0.7}
    assert session.engine.asked[0].limit == 4
    assert reply.choices[0].finish == "length"
    assert any("seed, temperature" in finding for finding in session.findings)
    free = session_of(["one"], sampling={"temperature": 0.7}, allow=frozenset({"temperature"}))
    await ask(free, [user("hi")], asked=values)
    assert free.engine.asked[0].settings == {"temperature": 0.1}
    assert free.engine.asked[0].limit is None
    with pytest.raises(ValueError, match=r"sampling has \['top_k'\]"):
        session_of([], sampling={"top_k": 3})


@run
async def test_a_stop_string_ends_an_answer_and_stays_in_the_ledger():
    session = session_of(["Thought.\nObservation: I made this up", "done"])
    reply = await ask(session, [user("hi")], asked=asked(stop=("Observation:", "never")))
    choice = reply.choices[0]
    assert (choice.content, choice.finish, choice.stopped_by) == ("Thought.\n", "stop", "Observation:")
    text = session.templates.plain.codec.decode([session.transcript().tokens.tolist()])[0]
    assert "Observation:" in text
    assert "made" not in text
    session.engine.sampled[0] = (session.engine.sampled[0][0], session.tree.answers[0].transcript.tokens.tolist())
    await ask(session, [user("hi"), choice.message, user("Observation: 7")])
    assert len(session.transcript().sequences) == 1


@run
async def test_a_stop_string_in_the_reasoning_ends_the_answer_there():
    session = session_of(["<think>\nI think STOP and more\n</think>\n\nanswer"], THINKING)
    choice = (await ask(session, [user("hi")], asked=asked(stop=("STOP",)))).choices[0]
    assert (choice.stopped_by, choice.content) == ("STOP", "I think ") or choice.reasoning == "I think "
    assert "STOP" not in f"{choice.content}{choice.reasoning}"


@pytest.mark.parametrize(
    ("limits", "stop", "answers"),
    [
        (Limits(max_turns=2), StopReason.MAX_TURNS, 2),
        (Limits(max_tokens=30), StopReason.MAX_TOKENS, None),
        (Limits(max_tool_calls=1), StopReason.MAX_TOOL_CALLS, 3),
        (Limits(max_turn_tokens=3, end_on_cut=True), StopReason.MAX_TURN_TOKENS, 1),
    ],
    ids=["turns", "tokens", "calls", "cut"],
)
@run
async def test_a_budget_ends_the_session(limits, stop, answers):
    lines = {StopReason.MAX_TOOL_CALLS: [calling("a"), "b", calling("c"), "d"]}.get(stop, ["one word"] * 9)
    session = session_of(lines, limits=limits)
    messages: list[dict] = [user("hi")]
    with pytest.raises(Refusal) as refused:
        await talk(session, messages, 9)
    assert (refused.value.kind, refused.value.code) == (Kind.BUDGET, stop.word)
    assert session.stop is stop
    if answers is not None:
        assert session.turns == answers
    else:
        assert session.sampled == limits.max_tokens
    assert check_law(session) == 1


@run
async def test_parallel_requests_share_one_budget():
    session = session_of(["a long answer of many words"] * 4, limits=Limits(max_tokens=20))
    replies = await asyncio.gather(*(ask(session, [user(f"task {i}")]) for i in range(4)), return_exceptions=True)
    assert session.sampled == 20
    assert any(isinstance(reply, Refusal) for reply in replies)


@pytest.mark.parametrize(
    ("limits", "stop", "answers"),
    [
        (Limits(max_turns=2), "max_turns", 2),
        (Limits(max_tool_calls=1), "max_tool_calls", 2),
        (Limits(max_tokens=9), "max_tokens", None),
    ],
)
@run
async def test_neither_parallel_requests_nor_choices_pass_a_budget(limits, stop, answers):
    for n, requests in ((1, 4), (4, 1)):
        session = session_of([calling(f"{number}") for number in range(4)], limits=limits)
        asks = (ask(session, [user(f"task {number}")], n=n) for number in range(requests))
        replies = await asyncio.gather(*asks, return_exceptions=True)
        refused = [reply for reply in replies if isinstance(reply, Refusal)]
        assert all((each.kind, each.code) == (Kind.BUDGET, stop) for each in refused)
        assert session.stop.word == stop
        assert session.turns == sum(len(each.choices) for each in replies if each not in refused)
        assert answers in (None, session.turns)
        assert limits.max_tokens in (None, session.sampled)


@run
async def test_a_budget_that_is_used_up_while_a_prompt_is_written_is_told_as_one():
    session = session_of(["a long answer"] * 2, limits=Limits(max_tokens=4))
    write, ready = session._prompt, asyncio.Event()

    async def late(call):
        found = await write(call)
        if call.messages[0]["content"] == "late":
            await ready.wait()
        return found

    session._prompt = late
    waiting = session.open(Call(messages=(user("late"),), tools=TOOLS), b"late")
    await ask(session, [user("hi")])
    ready.set()
    with pytest.raises(Refusal) as refused:
        await waiting.reply()
    assert refused.value.code == "max_tokens"


@run
async def test_a_full_context_ends_its_sequence_and_not_the_session():
    session = session_of(["one", "two", "three"], limits=Limits(max_context=300))
    history = await talk(session, [user("hi")], 1)
    with pytest.raises(Refusal, match="no answer fits") as refused:
        await ask(session, [*history, user("many words " * 200)])
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    await ask(session, [user("a summary")])
    assert check_law(session) == 2


@run
async def test_a_finished_session_takes_nothing():
    session = session_of(["one", "two"])
    history = await talk(session, [user("hi")], 1)
    session.finish(1.0, parts={"exact": 1})
    session.finish(0.0)
    assert (session.reward, session.success, session.reward_parts) == (1.0, True, {"exact": 1.0})
    assert session.stop is StopReason.ANSWERED
    with pytest.raises(Refusal, match="finished"):
        await ask(session, [*history, user("go on")])
    with pytest.raises(ValueError, match="finite"):
        session_of([]).finish(float("nan"))


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ({"reward": 1.0, "parts": {"a": "x"}}, "parts"),
        ({"reward": 1.0, "parts": ["a"]}, "parts is a list"),
        ({"reward": 10**400}, "finite"),
        ({"reward": "much"}, "finite"),
        ({"failure": {"a": 1}}, "failure is a dict"),
        ({"success": "no"}, "success is 'no'"),
    ],
)
@run
async def test_an_end_that_cannot_be_leaves_a_session_as_it_was(end, words):
    session = session_of(["one"])
    with pytest.raises(ValueError, match=words):
        session.finish(**end)
    assert not session.finished
    await ask(session, [user("hi")])
    session.finish(0.5)
    assert (session.reward, session.reward_parts) == (0.5, {})


@run
async def test_a_session_that_is_graded_takes_nothing_and_one_that_is_finished_keeps_no_requests():
    ready = asyncio.Event()

    async def slow(ask):
        await ready.wait()
        return "late"

    session = session_of(lambda ask: "one" if len(ask.messages) == 1 else slow(ask))
    history = await talk(session, [user("hi")], 1)
    late = session.open(Call(messages=(*history, user("on")), tools=TOOLS), b"late")
    await late.prompt
    session.seal()
    ready.set()
    with pytest.raises(asyncio.CancelledError):
        await late.reply()
    with pytest.raises(Refusal, match="finished") as refused:
        await ask(session, [*history, user("on")])
    assert refused.value.kind is Kind.BUDGET
    assert session.turns == 1
    assert len(session._exchanges)
    session.finish(1.0)
    assert check_law(session, lost=len(session.engine.sampled) - 1) == 1
    assert not len(session._exchanges)
    assert not session.tree._recent


@run
async def test_what_a_template_refuses_is_told_and_costs_nothing():
    session = session_of(["one"], source="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(Refusal, match="roles must alternate") as refused:
        await ask(session, [user("hi")])
    assert refused.value.status == 400
    assert not session._exchanges


@run
async def test_kinds_of_turns_are_forgotten_before_they_are_too_many(monkeypatch):
    monkeypatch.setattr("torchrl_chat.gateway.templates._PROVED", 3)
    session = session_of(["one"] * 9)
    session.templates._proved.clear()  # of other tests: they share the template
    for number in range(9):
        await ask(session, [user("hi")] * (number + 1))
        assert len(session.templates._proved) <= 3
    assert check_law(session) == 9


@run
async def test_ids_of_calls_are_unique_over_sessions():
    names, seen = Names(), set()
    for _ in range(2):
        session = session_of([calling("a", "b")] * 2)
        session._names = names  # as those of one gateway
        for _ in range(2):
            message = (await ask(session, [user("hi")])).choices[0].message
            seen |= {call["id"] for call in message["tool_calls"]}
    assert len(seen) == 8


@run
async def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="history='drop'"):
        Settings(history="drop")
    session = session_of(["x"] * 20, max_choices=2)
    with pytest.raises(Refusal, match="'n' is 3"):
        await ask(session, [user("hi")], n=3)
    with pytest.raises(Refusal, match="response_format"):
        await ask(session, [user("hi")], asked=asked(response_format={"type": "json_object"}))
