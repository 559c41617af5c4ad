"""Sessions: requests matched to what was sampled, retries, budgets; whatever the dialect."""

from __future__ import annotations

import asyncio
import copy

import pytest
from agents import THINKING, TOOLS, ask, calling, check_law, kinds, result, run, session_of, system, talk, user

from torchrl_chat.gateway.calls import Call, Kind, Refusal

LINES = ["one", calling("a"), "two", calling("b", "c", said="both:"), "three", "four", "five", "six"]


@run
async def test_a_history_that_comes_back_is_one_sequence():
    session = session_of(LINES)
    await talk(session, [system("Be brief."), user("hi")], 6)
    assert check_law(session) == 1
    assert kinds(session) == {"begins": 1}
    [branch] = session.transcript().sequences
    assert len(branch.tokens) == len(session.engine.sampled[-1][0]) + len(session.engine.sampled[-1][1]) + 1


@run
async def test_a_turn_writes_its_own_tokens_only():
    session = session_of(lambda ask: f"answer {len(ask.messages)}")
    await talk(session, [user("hi")], 40)
    tapes = {id(answer.transcript.tape) for answer in session.tree.answers}
    # Buffers that grow by doubling; and the first answer's, whose end was proved first.
    assert len(tapes) <= 3 + (len(session.transcript()) // 256).bit_length()


@run
async def test_spellings_of_every_rule_are_continued():
    """A1 to A7 at once; each by itself is tested on messages."""
    session = session_of(LINES)
    history = await talk(session, [system("Be brief."), user("hi")], 4)
    spelled: list[dict] = [{"role": "developer", "content": "Be brief.\n"}]
    for message in history[1:]:
        again = {**message, "annotations": None, "name": None}
        if calls := message.get("tool_calls"):
            again["content"] = "\n" if not message["content"] else message["content"]
            again["tool_calls"] = [
                {
                    **call,
                    "index": i,
                    "function": {**call["function"], "arguments": call["function"]["arguments"] + " "},
                }
                for i, call in enumerate(calls)
            ]
        spelled.append(again)
    await ask(session, [*spelled, *result(history[-1], "x", "y")])
    assert check_law(session) == 1


@run
async def test_renamed_ids_of_calls_are_followed():
    """A8."""
    session = session_of([calling("a", "b"), "done", "more"])
    message = (await ask(session, [user("hi")])).choices[0].message
    told = result(message, "first", "second")
    renamed = {call["id"]: f"other{i}" for i, call in enumerate(message["tool_calls"])}
    message = {**message, "tool_calls": [{**call, "id": renamed[call["id"]]} for call in message["tool_calls"]]}
    told = [{**each, "tool_call_id": renamed[each["tool_call_id"]]} for each in told]
    answer = (await ask(session, [user("hi"), message, *told])).choices[0].message
    assert check_law(session) == 1
    assert session.transcript().messages[2]["tool_call_id"] == "call00000"
    await ask(session, [user("hi"), message, *told, answer, user("more")])
    assert check_law(session) == 1


@run
async def test_an_answer_can_be_named():
    """A9."""
    session = session_of(["one", "two", "three", "four"])
    first = await ask(session, [user("hi")], instructions="Be brief.")
    second = await ask(session, [user("more")], instructions="Be brief.", previous=first.name, tools=None)
    assert check_law(session) == 1
    await ask(session, [user("again")], instructions="Be long.", previous=second.name)
    assert check_law(session) == 2
    assert [m["content"] for m in session.transcript().messages[:4]] == ["Be long.", "hi", "one", "more"]
    with pytest.raises(Refusal, match="no answer of the name") as refused:
        await ask(session, [user("x")], previous="nothing")
    assert refused.value.kind is Kind.MISSING


@run
async def test_an_empty_final_answer_may_be_left_out():
    """A10."""
    session = session_of(["one", "", "two"])
    history = await talk(session, [user("hi")], 2)
    assert not history[-1]["content"]
    await ask(session, [*history[:-1], user("say something")])
    assert check_law(session) == 1


@run
async def test_an_answer_may_be_left_out_for_a_complaint():
    """B1."""
    session = session_of(["one", "bad", "two", "three"])
    history = await talk(session, [user("hi")], 2)
    again = [*history[:-1], user("that was no call")]
    answer = (await ask(session, again)).choices[0].message
    await ask(session, [*again, answer, user("good")])
    assert check_law(session) == 2
    assert kinds(session) == {"begins": 1, "forks": 1}
    assert any("(B1)" in finding for finding in session.findings)
    closed, going = session.transcript().sequences
    tokens = session.templates.plain.codec.decode([closed.tokens.tolist(), going.tokens.tolist()])
    assert "bad" in tokens[0]
    assert "bad" not in tokens[1]
    assert going.mask.sum() > closed.mask.sum()  # the first answer is trained where the episode went on


@run
async def test_results_and_words_may_come_together():
    """B3."""
    session = session_of([calling("a"), "two"])
    message = (await ask(session, [user("hi")])).choices[0].message
    await ask(session, [user("hi"), message, *result(message, "7"), user("and then?")])
    assert check_law(session) == 1


@pytest.mark.parametrize("what", ["system", "tools"])
@run
async def test_another_system_prompt_or_other_tools_begin_a_sequence(what):
    """B4."""
    session = session_of(LINES)
    history = await talk(session, [system("I am a."), user("hi")], 3)
    more: dict = {}
    if what == "system":
        history[0] = system("I am b.")
    else:
        more["tools"] = ()
    await ask(session, [*history, user("go on")], **more)
    assert check_law(session) == 2
    assert kinds(session) == {"begins": 1, "restarts": 1}
    assert ("(B4)" in session.findings[-1]) == (what == "tools")


@run
async def test_agents_within_an_agent_have_sequences_of_their_own():
    """B5."""
    session = session_of(lambda ask: f"answer to {ask.messages[-1]['content']}")
    main = await talk(session, [system("main"), user("hi")], 2)
    await asyncio.gather(*(talk(session, [system("sub"), user(f"task {i}")], 3) for i in range(3)))
    await ask(session, [*main, user("go on")])
    assert check_law(session) == 4
    assert session.transcript().messages[0]["content"] == "main"


@pytest.mark.parametrize("at", [1, 3])
@run
async def test_an_edit_forks_where_it_stands(at):
    session = session_of(LINES)
    history = await talk(session, [user("hi")], 4)
    edited = [*history[: at - 1], {**history[at - 1], "content": "something else"}]
    await ask(session, edited)
    assert check_law(session) == 2
    prompts = [prompt for prompt, _ in session.engine.sampled]
    common = next((i for i, (a, b) in enumerate(zip(prompts[-1], prompts[-2], strict=False)) if a != b), 0)
    assert common >= len(prompts[0]) or at == 1  # what stands before the edit is kept, id for id


@run
async def test_words_of_the_model_that_it_did_not_say_begin_a_sequence():
    session = session_of(LINES)
    history = await talk(session, [user("hi")], 3)
    edited = [*history[:-1], {**history[-1], "content": "I never said that"}, user("you did")]
    await ask(session, edited)
    assert check_law(session) == 2
    assert "not what was sampled there: its text differs from character" in session.findings[-1]
    assert "never" not in " ".join(session.findings)


def _handed_over(history):
    call = {"id": "t1", "type": "function", "function": {"name": "transfer", "arguments": "{}"}}
    moved = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    return [*history, *moved, {"role": "tool", "tool_call_id": "t1", "content": "you are b"}, user("go on")]


STRANGE = {
    "an edit": lambda history: [history[0], {**history[1], "content": "I said that"}, *history[2:], user("go on")],
    "a compaction": lambda history: [user("a summary"), *history[-3:], user("go on")],
    "a handoff": _handed_over,
    "an example": lambda history: [user("like this"), {"role": "assistant", "content": "so"}, user("hi")],
}


@pytest.mark.parametrize("what", STRANGE)
@run
async def test_words_that_were_not_sampled_begin_one_sequence_and_not_one_a_turn(what):
    session = session_of([f"answer {number}" for number in range(9)])
    history = await talk(session, [user("hi")], 3)
    again = await talk(session, STRANGE[what](history), 3)
    assert check_law(session) == 2
    assert kinds(session) == {"begins": 1, "restarts": 1}
    again = copy.deepcopy(again)
    for n, call in enumerate(each for message in again for each in message.get("tool_calls", ())):
        call["id"] = f"renamed{n}"  # as some frameworks do from one request to the next
        next(each for each in again if each["role"] == "tool")["tool_call_id"] = call["id"]
    await ask(session, [*again, user("more")])
    assert check_law(session) == 2


@run
async def test_words_that_were_not_sampled_are_told_apart_by_all_that_they_say():
    """By blanks, by reasoning, by which of two calls a result belongs to: who went on behind them saw just these."""

    def spoken(content="", ids=(), **more):
        calls = [{"id": i, "function": {"name": n, "arguments": "{}"}} for n, i in zip("fg", ids, strict=False)]
        return {"role": "assistant", "content": content, **({"tool_calls": calls} if ids else {}), **more}

    told = {"role": "tool", "tool_call_id": "a", "content": "7"}
    other = {"role": "tool", "tool_call_id": "b", "content": "8"}
    pairs = [
        ([spoken("so")], [spoken("so  ")]),
        ([spoken("so", reasoning_content="one")], [spoken("so", reasoning_content="two")]),
        ([spoken(ids="ab"), told, other], [spoken(ids="ba"), told, other]),
    ]
    for pair in pairs:
        session = session_of(lambda ask: "fine", THINKING)
        histories = [[user("hi"), *words, user("on")] for words in pair]
        for history in (*histories, *histories[::-1]):
            history += [(await ask(session, history)).choices[0].message, user("on")]
        assert check_law(session) == 2
        shown = [each.transcript.messages[: len(pair[0]) + 2] for each in session.tree.answers]
        assert shown[0] == shown[3] != shown[1] == shown[2]


# ---------------------------------------------------------------------- the same again
@run
async def test_equal_requests_are_two_samples_and_choices_are_siblings():
    session = session_of([f"answer {i}" for i in range(9)], seed=5)
    await asyncio.gather(ask(session, [user("hi")]), ask(session, [user("hi")]))
    reply = await ask(session, [user("hi")], n=3)
    assert len({choice.content for choice in reply.choices}) == 3
    seeds = [each.seed for each in session.engine.asked]
    assert len(set(seeds)) == 5
    assert seeds[0] == 5
    assert check_law(session) == 5
    for choice in reply.choices:  # each of them can be gone on from
        await ask(session, [user("hi"), choice.message, user("go on")])
    assert check_law(session) == 5


@run
async def test_of_equal_answers_the_one_is_meant_that_the_history_goes_on_from():
    """However it is spelled: what was sampled behind one of them tells which."""
    session = session_of(lambda ask: f"answer {len(ask.messages)}")
    histories = [[user("hi")], [user("hi")]]
    for turn in range(3):
        for history in histories:
            message = (await ask(session, [{**each, "name": f"x{turn}"} for each in history])).choices[0].message
            history += [message, user("go on")]
    assert check_law(session) == 2
    assert kinds(session) == {"begins": 1, "restarts": 1}


@run
async def test_of_equal_answers_a_remembered_request_may_have_meant_another():
    session = session_of(["same", "same", "one", "two", "three", "four"])
    histories = [[user("hi")], [user("hi")]]
    for _ in range(3):
        for history in histories:
            history += [(await ask(session, history)).choices[0].message, user("go on")]
    assert check_law(session) == 2
    assert kinds(session) == {"begins": 1, "restarts": 1}


@pytest.mark.parametrize("how", ["header", "key", "lost"])
@run
async def test_a_retry_gets_the_answer_of_the_first_try(how):
    """B2."""
    session = session_of(["one", "two"])
    more = {"key": "k"} if how == "key" else {}
    call = Call(messages=(user("hi"),), **more)
    first = session.open(call, b"body")
    reply = await first.reply()
    if how != "lost":
        first.deliver()
    again = session.open(Call(messages=(user("hi"),), retry=int(how == "header"), **more), b"body")
    assert await again.reply() is reply
    again.deliver()
    assert check_law(session) == 1
    if how == "key":
        with pytest.raises(Refusal, match="another request"):
            session.open(Call(messages=(user("other"),), key="k"), b"other")
    elif how == "lost":
        other = await session.open(call, b"body").reply()
        assert other.choices[0].content == "two"


@run
async def test_a_retry_of_a_try_that_failed_is_a_sample_of_its_own():
    """Its sibling with an equal body, of a parallel sub-agent say, keeps its answer for itself."""
    lines = iter(["one", ValueError("down"), "two"])
    session = session_of(lambda ask: next(lines))
    call = Call(messages=(user("hi"),))
    exchange = session.open(call, b"body")
    first = await exchange.reply()
    exchange.deliver()
    with pytest.raises(Refusal, match="down"):
        await session.open(call, b"body").reply()
    assert session.engine_failure
    again = session.open(Call(messages=(user("hi"),), retry=1), b"body")
    assert (await again.reply()).choices[0].content == "two"
    assert not session.engine_failure
    again.deliver()
    assert await session.open(Call(messages=(user("hi"),), retry=1), b"body").reply() is first
    assert check_law(session) == 2


@run
async def test_a_new_key_that_joins_a_lost_answer_is_its_key():
    session = session_of(["one", "two"])
    lost = session.open(Call(messages=(user("hi"),)), b"body")
    await lost.reply()
    for _ in range(2):
        again = session.open(Call(messages=(user("hi"),), key="k"), b"body")
        assert again is lost
        again.deliver()


@run
async def test_a_retry_joins_what_is_on_its_way():
    ready = asyncio.Event()

    async def slow(ask):
        await ready.wait()
        return "one"

    session = session_of(slow)
    first = session.open(Call(messages=(user("hi"),)), b"body")
    first.waiting += 1
    await asyncio.sleep(0)
    again = session.open(Call(messages=(user("hi"),), retry=1), b"body")
    assert again is first
    session.left(first)  # the first client gives up; the second waits
    again.waiting += 1
    ready.set()
    assert (await again.reply()).choices[0].content == "one"
    assert session.turns == 1


@run
async def test_nobody_waits_and_nothing_is_sampled():
    session = session_of(lambda ask: asyncio.sleep(60), patience=0.01)
    exchange = session.open(Call(messages=(user("hi"),)), b"body")
    exchange.waiting += 1
    await exchange.prompt
    session.left(exchange)
    with pytest.raises(asyncio.CancelledError):
        await exchange.reply()
    await asyncio.sleep(0.02)
    assert not session.flying
    assert session.transcript() is None
    assert not session._exchanges


@run
async def test_an_answer_that_nobody_got_is_not_trained():
    session = session_of(["one", "two"])
    history = await talk(session, [user("hi")], 1)
    await session.open(Call(messages=(*history, user("go on")), tools=TOOLS), b"body").reply()
    assert check_law(session, lost=1) == 1
    assert session.transcript().turns == 1


@run
async def test_an_engine_that_fails_costs_its_request_alone():
    lines = iter(["one", ValueError("out of memory"), "two"])
    session = session_of(lambda ask: next(lines), seed=3)
    history = await talk(session, [user("hi")], 1)
    with pytest.raises(Refusal, match="out of memory") as refused:
        await ask(session, [*history, user("go on")], b"body")
    assert refused.value.status == 500
    await ask(session, [*history, user("go on")], b"body", retry=1)
    assert check_law(session) == 1
    assert [each.seed for each in session.engine.asked] == [3, 3, 3]
