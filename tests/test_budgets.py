"""Budgets: every limit alone and together, in all input modes; no episode exceeds one by a token."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from conftest import bpe_tokenizer, corpus_tokenizer
from tensordict import TensorDict
from torchrl.envs import StepCounter
from torchrl.envs.utils import check_env_specs
from torchrl.modules.llm.policies import Tokens

from torchrl_chat import ChatEnv, DatasetChatEnv, RewardTransform, columns
from torchrl_chat.rewards import Verdict
from torchrl_chat.transforms import AddThinkingPrompt, Budget, StopReason
from torchrl_chat.transforms import budgets as module


def env_of(mode: str, rows: int, tokenizer=None, **limits):
    env = ChatEnv(tokenizer=tokenizer or bpe_tokenizer(), input_mode=mode, batch_size=(rows,))
    return env.append_transform(Budget(**limits))


def ids_of(env, text: str, count: int, ended: bool) -> list[int]:
    """As many ids as asked for, the last of them the stop token if the answer ends by itself."""
    codec = env.base_env.template.codec
    ids = (codec.encode([text * count])[0])[:count]
    return [*ids[:-1], env.base_env.tokenizer.eos_token_id] if ended else ids


def answer(env, td, rows: list[tuple[int, bool]]):
    """Step with answers of these lengths, in the form of the environment's mode."""
    td, batch = td.copy(), env.batch_size
    ids = [ids_of(env, "the answer is 42 ", count, ended) for count, ended in rows]
    mode = env.base_env.input_mode
    if mode == "text":
        td["text"] = columns.texts("response", env.base_env.template.codec.decode(ids), batch, None)
    if mode == "history":
        texts = [t.removesuffix("<|im_end|>") for t in env.base_env.template.codec.decode(ids)]
        entries = [columns.history_messages([{"role": "assistant", "content": t}]) for t in texts]
        td["history"] = columns.histories("response", entries, batch, None)
    td["tokens"] = columns.ragged(Tokens, "response", list(map(torch.tensor, ids)), batch, None)
    return env.step(td)


def reasons(td) -> list[StopReason]:
    return [StopReason(value) for value in td["stop_reason"].flatten().tolist()]


def ledgers(td):
    return columns.read_objects(td["transcript"], td.batch_size)


def on(env, td, texts):
    """The next root, with a user's message where the row goes on."""
    td = env.step_mdp(td)
    return env.base_env.append_messages(td, texts)


R = StopReason


class TestEachAlone:
    @pytest.mark.parametrize(
        ("limits", "turns", "expected"),
        [
            ({"max_turns": 2}, [(4, True)] * 2, [R.RUNNING, R.MAX_TURNS]),
            ({"max_turn_tokens": 6}, [(5, True), (9, False), (6, True)], [R.RUNNING] * 3),
            ({"max_turn_tokens": 6, "end_on_cut": True}, [(6, True), (9, False)], [R.RUNNING, R.MAX_TURN_TOKENS]),
            ({"max_tokens": 10}, [(4, True), (5, True), (1, True)], [R.RUNNING, R.RUNNING, R.MAX_TOKENS]),
            ({"max_tokens": 10}, [(4, True), (50, False)], [R.RUNNING, R.MAX_TOKENS]),
            ({"max_context": 60}, [(99, False)], [R.CONTEXT_FULL]),
            ({"max_context": 1}, [(4, True)], [R.CONTEXT_FULL]),
        ],
    )
    def test_table(self, mode, limits, turns, expected):
        env = env_of(mode, 1, **limits)
        td = env.reset(TensorDict(query=["2 + 2?"], batch_size=(1,)))
        seen = []
        for turn in turns:
            td = answer(env, td, [turn])
            seen += reasons(td["next"])
            assert td["next", "done"].item() == td["next", "truncated"].item() == (seen[-1] is not R.RUNNING)
            if seen[-1] is not R.RUNNING:
                break
            td = env.base_env.append_messages(env.step_mdp(td), ["and?"])
        assert seen == expected

    def test_time(self, monkeypatch, mode):
        now = [1000.0]
        monkeypatch.setattr(module.time, "time", lambda: now[0])
        env = env_of(mode, 1, max_seconds=5.0)
        td = env.reset(TensorDict(query=["2 + 2?"], batch_size=(1,)))
        now[0] += 4.9
        td = answer(env, td, [(4, True)])
        assert reasons(td["next"]) == [R.RUNNING]
        now[0] += 0.1
        assert reasons(answer(env, on(env, td, ["and?"]), [(4, True)])["next"]) == [R.MAX_TIME]

    def test_tool_calls(self):
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        tokenizer = corpus_tokenizer("lc_Qwen-Qwen2.5-7B-Instruct")
        env = ChatEnv(
            tokenizer=tokenizer, input_mode="text", batch_size=(1,), template_kwargs={"tools": [tool]}
        ).append_transform(Budget(max_tool_calls=2))
        td = env.reset(TensorDict(query=["go"], batch_size=(1,)))
        call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
        seen, left = [], [td["calls_left"].item()]
        for _ in range(3):
            td = td.copy()
            td["text"] = columns.texts("response", [call], env.batch_size, None)
            td = env.step(td)
            seen += reasons(td["next"])
            left.append(td["next", "calls_left"].item())
            if seen[-1] is R.RUNNING:
                result = {"role": "tool", "content": "x", "name": "f"}
                td = on(env, td, [[result]])
        assert seen == [R.RUNNING, R.RUNNING, R.MAX_TOOL_CALLS]
        assert left == [2, 1, 0, 0]


class TestRows:
    def test_a_prompt_that_is_too_long_costs_its_row_only(self, mode):
        env = env_of(mode, 3, max_context=40)
        td = env.reset(TensorDict(query=["2 + 2?", "word " * 60, "3 + 3?"], batch_size=(3,)))
        assert reasons(td) == [R.RUNNING, R.CONTEXT_FULL, R.RUNNING]
        assert td["tokens_left"].flatten().tolist()[1] == 0
        before = ledgers(td)
        following = answer(env, td, [(4, True)] * 3)["next"]
        assert reasons(following) == [R.RUNNING, R.CONTEXT_FULL, R.RUNNING]
        assert following["truncated"].flatten().tolist() == [False, True, False]
        assert len(ledgers(following)[1]) == len(before[1])
        assert ledgers(following)[0].num_sampled == 4

    def test_an_answer_that_ends_the_dialogue_wins(self):
        env = env_of("tokens", 2, max_turns=1)
        rows = [{"query": "a", "answer": "x"}] * 2
        env = DatasetChatEnv(dataset=rows, tokenizer=bpe_tokenizer(), input_mode="tokens", num_envs=2)
        env = env.append_transform(
            RewardTransform(lambda r, _: Verdict(1.0, r if len(r) > 20 else None, True))
        ).append_transform(Budget(max_turns=1))
        following = answer(env, env.reset(), [(12, True), (2, True)])["next"]
        assert reasons(following) == [R.ANSWERED, R.MAX_TURNS]
        assert following["terminated"].flatten().tolist() == [True, False]
        assert following["truncated"].flatten().tolist() == [False, True]
        assert following["done"].all()

    def test_what_others_truncate_is_said_too(self):
        env = ChatEnv(tokenizer=bpe_tokenizer(), input_mode="tokens", batch_size=(1,))
        env = env.append_transform(StepCounter(max_steps=1)).append_transform(Budget(max_turns=5))
        td = env.reset(TensorDict(query=["a"], batch_size=(1,)))
        assert reasons(answer(env, td, [(3, True)])["next"]) == [R.TRUNCATED]

    def test_the_cut_is_that_of_a_policy_s_own_limit(self, mode):
        """Sampling beyond the budget leaves the ledger as if the policy had stopped there."""
        env = env_of(mode, 2, max_turn_tokens=5)
        td = env.reset(TensorDict(query=["2 + 2?"] * 2, batch_size=(2,)))
        over, exact = ledgers(answer(env, td, [(9, False), (5, False)])["next"])
        assert over.tokens.tolist() == exact.tokens.tolist()
        assert over.mask.tolist() == exact.mask.tolist()
        assert over.ended is exact.ended is False
        assert over.messages == exact.messages


@pytest.mark.parametrize("seed", range(6))
def test_no_episode_exceeds_a_budget_by_one_token(mode, seed):
    """Random limits, random answers from a policy that does not care for them."""
    draw = random.Random(seed)
    limits = {
        "max_turns": draw.choice([None, 3, 6]),
        "max_turn_tokens": draw.choice([None, 7, 15]),
        "max_tokens": draw.choice([None, 21, 40]),
        "max_context": draw.choice([90, 130]),
    }
    rows = 8
    env = env_of(mode, rows, **limits)
    queries = ["word " * draw.choice([1, 10, 100]) for _ in range(rows)]
    td = env.reset(TensorDict(query=queries, batch_size=(rows,)))
    too_long = [reason is R.CONTEXT_FULL for reason in reasons(td)]
    ended: dict[int, StopReason] = {}
    for _ in range(12):
        left = [env.transform.limits.tokens_left(ledger, env.base_env.template) for ledger in ledgers(td)]
        too_long = [before or count == 0 for before, count in zip(too_long, left, strict=True)]
        before = [ledger.num_sampled for ledger in ledgers(td)]
        stepped = answer(env, td, [(draw.choice([1, 3, 8, 30]), draw.random() < 0.5) for _ in range(rows)])
        following = stepped["next"]
        for i, (ledger, reason) in enumerate(zip(ledgers(following), reasons(following), strict=True)):
            if i in ended:
                continue
            assert ledger.num_sampled - before[i] <= left[i]
            assert len(ledger.spans) <= (limits["max_turns"] or 99)
            assert all(s.end - s.start <= (limits["max_turn_tokens"] or 999) for s in ledger.spans)
            assert ledger.num_sampled <= (limits["max_tokens"] or 999)
            assert len(ledger) <= limits["max_context"] or too_long[i]
            if reason is not R.RUNNING:
                ended[i] = reason
        if len(ended) == rows:
            break
        # What a user says may fill the context: the row's next step then samples nothing and ends it.
        says = [None if i in ended else "and so on" for i in range(rows)]
        td = env.base_env.append_messages(env.step_mdp(stepped), says)
    assert len(ended) == rows
    assert sum(Counter(ended.values()).values()) == rows
    assert set(ended.values()) <= {R.MAX_TURNS, R.MAX_TOKENS, R.CONTEXT_FULL}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("budgets", "turns", "reason"),
    [
        ([{"max_tokens": 10}, {"max_turns": 9}], [10], R.MAX_TOKENS),
        ([{"max_tokens": 10}, {"max_turn_tokens": 4}], [4, 4, 2], R.MAX_TOKENS),
        ([{"max_turn_tokens": 4}, {"max_turns": 2}], [4, 4], R.MAX_TURNS),
    ],
)
def test_several_budgets_hold_together(mode, order, budgets, turns, reason):
    env = ChatEnv(tokenizer=bpe_tokenizer(), input_mode=mode, batch_size=(1,))
    for limits in budgets[::order]:
        env = env.append_transform(Budget(**limits))
    td = env.reset(TensorDict(query=["hi"], batch_size=(1,)))
    for i, count in enumerate(turns):
        assert td["tokens_left"].item() == count
        stepped = answer(env, td, [(20, False)])
        td = env.step_mdp(stepped)
        assert ledgers(td)[0].total_sampled == sum(turns[: i + 1])
        assert td["done"].item() == (i == len(turns) - 1)
        td = env.base_env.append_messages(td, ["more"])
    assert reasons(stepped["next"]) == [reason]


def test_a_second_budget_knows_a_prompt_that_is_too_long_for_the_first(mode):
    env = env_of(mode, 1, max_context=3).append_transform(Budget(max_turns=2))
    td = env.reset(TensorDict(query=["hi"], batch_size=(1,)))
    assert (reasons(td), td["tokens_left"].item()) == ([R.CONTEXT_FULL], 0)
    stepped = answer(env, td, [(5, True)])["next"]
    assert (reasons(stepped), ledgers(stepped)[0].total_sampled) == ([R.CONTEXT_FULL], 0)


def test_check_env_specs(mode):
    env = DatasetChatEnv(dataset=[{"query": "a"}], tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=2)
    env = env.append_transform(
        Budget(max_turns=2, max_turn_tokens=9, max_context=200, max_tool_calls=1, max_seconds=99)
    )
    check_env_specs(env, break_when_any_done="both")


@pytest.mark.parametrize(
    ("limits", "match"),
    [({}, "no limit"), ({"max_turns": 0}, "max_turns is 0"), ({"max_tokens": -1}, "max_tokens is -1")],
)
def test_bad_limits(limits, match):
    with pytest.raises(ValueError, match=match):
        Budget(**limits)


def test_the_policy_keeps_to_what_is_left():
    from torchrl_chat import TransformersPolicy
    from torchrl_chat.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=12)
    env = ChatEnv(tokenizer=tokenizer, input_mode="tokens", batch_size=(4,)).append_transform(Budget(max_tokens=5))
    td = policy(env.reset(TensorDict(query=["1", "2", "3", "4"], batch_size=(4,))))
    counts = [len(row) for row in columns.read_field(td["tokens"], "response", td.batch_size)]
    assert max(counts) <= 5
    assert all(r in ("stop", "length") for r in td["finish_reason"])
    env.step(td)


class TestAnswersWrittenAnew:
    """An edited answer stays one message: its turns are counted all the same."""

    def env(self, mode, most=9, **limits):
        env = ChatEnv(tokenizer=bpe_tokenizer(), input_mode=mode, batch_size=(1,))
        again = AddThinkingPrompt(lambda row: ledgers(row.unsqueeze(0))[0].turns <= most, prompt="But wait.")
        env = env.append_transform(again)
        return env.append_transform(Budget(**limits))

    @pytest.mark.parametrize("turns", [1, 3])
    def test_turns(self, mode, turns):
        env = self.env(mode, max_turns=turns)
        td = env.reset(TensorDict(query=["2 + 2?"], batch_size=(1,)))
        for turn in range(1, turns + 1):
            td = answer(env, td, [(5, True)])
            assert reasons(td["next"]) == [R.MAX_TURNS if turn == turns else R.RUNNING]
            assert ledgers(td["next"])[0].turns == turn
            td = env.step_mdp(td)

    def test_a_cut_is_seen_in_what_was_sampled_last(self, mode):
        env = self.env(mode, most=1, max_turn_tokens=6, end_on_cut=True)
        td = env.reset(TensorDict(query=["2 + 2?"], batch_size=(1,)))
        td = answer(env, td, [(5, True)])
        assert reasons(td["next"]) == [R.RUNNING]
        td = answer(env, env.step_mdp(td), [(9, False)])
        assert reasons(td["next"]) == [R.MAX_TURN_TOKENS]


@pytest.mark.parametrize("limit", ["max_tokens", "max_turn_tokens", "max_context"])
def test_without_a_tokenizer_tokens_cannot_be_limited(limit):
    env = ChatEnv(input_mode="history", batch_size=(1,)).append_transform(Budget(max_turns=2, **{limit: 3}))
    with pytest.raises(TypeError, match=f"{limit} count tokens"):
        env.reset(TensorDict(query=["2 + 2?"], batch_size=(1,)))
