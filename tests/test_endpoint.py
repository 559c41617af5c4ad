"""``EndpointPolicy`` over real HTTP: what is sent, what is taken, and what a failed request costs."""

from __future__ import annotations

import json
import pickle
import threading
import time
from typing import Any

import pytest
import torch
from conftest import corpus_tokenizer, stop_of
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from torchrl_chat import (
    Budget,
    ChatEnv,
    ChatTemplate,
    DatasetChatEnv,
    NumberVerifier,
    RewardTransform,
    UserSimulator,
    columns,
)
from torchrl_chat.playing import play
from torchrl_chat.policies import Prompt
from torchrl_chat.policies.endpoint import EndpointPolicy, as_sent
from torchrl_chat.rollouts import episodes

pytestmark = pytest.mark.services


def env_of(mode: str, count: int, tokenizer: Any = None, turns: int = 1, **kwargs) -> DatasetChatEnv:
    """Questions that name their row; numbers end a conversation, or ``turns`` answers."""
    dataset = [{"query": f"question {i}", "answer": str(i)} for i in range(count)]
    env = DatasetChatEnv(
        dataset=dataset, tokenizer=tokenizer, input_mode=mode, num_envs=count, shuffle=False, **kwargs
    )
    env = env.append_transform(RewardTransform(NumberVerifier()))
    if turns > 1:
        env = env.append_transform(UserSimulator(lambda messages: "again", turns=99))
    return env.append_transform(Budget(max_turns=turns))


def row_of(body: dict[str, Any]) -> int:
    """Which row a chat request is for."""
    return int(next(m["content"] for m in body["messages"] if m["role"] == "user").split()[-1])


def reply(status: int = 200, **choice: Any) -> tuple[int, bytes]:
    """A completion of either API, with whatever a server puts into its choice."""
    top = {key: choice.pop(key) for key in ("prompt_token_ids",) if key in choice and "message" in choice}
    whole = {"id": "1", "object": "x", "created": 1, "model": "m", "choices": [{"index": 0, **choice}], **top}
    return status, json.dumps(whole).encode()


def ledgers(td) -> list[Any]:
    return columns.read_objects(td["transcript"], td.batch_size)


@pytest.fixture
def policy_of(endpoint):
    """Policies at the test's endpoint, closed at its end."""
    made = []

    def make(**kwargs) -> EndpointPolicy:
        made.append(EndpointPolicy("m", endpoint.url, **{"retries": 0, **kwargs}))
        return made[-1]

    yield make
    for policy in made:
        policy.close()


class TestChat:
    def test_all_modes_alike(self, mode, endpoint, policy_of, tokenizer):
        endpoint.script = lambda body, number: f"It is {row_of(body)} é."
        env = env_of(mode, 3, tokenizer)
        finished = play(env, policy_of(tokenizer=tokenizer, temperature=0.5, max_new_tokens=9, extra={"seed": 3}))
        for i, ledger in enumerate(ledgers(finished)):
            assert ledger.messages[-1] == {"role": "assistant", "content": f"It is {i} é."}
            assert tokenizer.decode(ledger.tokens[ledger.mask]) == f"It is {i} é."  # the stop token was not sampled
            assert ledger.ended
            assert not ledger.scored
        [body] = [body for body in endpoint.requests if row_of(body) == 1]
        assert body == {
            "model": "m",
            "messages": [{"role": "user", "content": "question 1"}],
            "temperature": 0.5,
            "max_tokens": 9,
            "seed": 3,
        }

    def test_seeds(self, endpoint, policy_of, tokenizer):
        endpoint.script = lambda body, number: "hm"
        policy = policy_of(tokenizer=tokenizer, seeded=True)
        sent = []
        for order in ([0, 1], [1, 0]):
            endpoint.requests.clear()
            env = env_of("tokens", 2, tokenizer, turns=2, seed=4)
            td = env.reset()
            play(env, policy, torch.stack([td[i] for i in order]) if order[0] else td)
            sent.append({(row_of(body), len(body["messages"])): body["seed"] for body in endpoint.requests})
        assert sent[0] == sent[1]  # whatever stands beside the row
        assert len(set(sent[0].values())) == 4  # and each turn has its own

    def test_without_any_tokenizer(self, endpoint, policy_of):
        endpoint.script = lambda body, number: f"{row_of(body)}" if row_of(body) else None
        rows = list(episodes(play(env_of("history", 3), policy_of())))
        assert [row["success"] for row in rows] == [False, True, True]
        assert [row["error"] for row in rows] == ["ValueError: the endpoint returned no text", None, None]
        assert rows[1]["messages"][-1]["content"] == "1"

    @pytest.mark.parametrize("mode", ["text", "history"])
    def test_the_environment_s_tokenizer_is_enough(self, mode, endpoint, policy_of, tokenizer):
        endpoint.script = lambda body, number: f"{row_of(body)}"
        finished = play(env_of(mode, 2, tokenizer), policy_of())
        assert finished["success"].all()
        assert [tokenizer.decode(t.tokens[t.mask]) for t in ledgers(finished)] == ["0", "1"]

    def test_tokens_mode_needs_it(self, policy_of, tokenizer):
        with pytest.raises(KeyError, match="tokenizer"):
            play(env_of("tokens", 2, tokenizer), policy_of())

    def test_turns(self, mode, endpoint, policy_of, tokenizer):
        endpoint.script = lambda body, number: (
            str(row_of(body)) if len(body["messages"]) >= 2 * row_of(body) else "hm"
        )
        finished = play(env_of(mode, 4, tokenizer, turns=9), policy_of(tokenizer=tokenizer))
        assert finished["success"].all()
        assert [len(t.spans) for t in ledgers(finished)] == [1, 2, 3, 4]
        # Rows that were done are not asked for again: that costs money.
        assert len(endpoint.requests) == sum(len(t.spans) for t in ledgers(finished))

    def test_rows_at_once_within_the_limit(self, endpoint, policy_of, tokenizer):
        four = threading.Barrier(4, timeout=120)

        def script(body, number):
            four.wait()  # for three others that are asked meanwhile
            return "1"

        endpoint.script = script
        play(env_of("tokens", 12, tokenizer), policy_of(tokenizer=tokenizer, concurrency=4))
        assert (endpoint.most, four.broken) == (4, False)

    def test_an_empty_answer_and_a_cut_one(self, endpoint, policy_of, tokenizer):
        choices = [("", "stop"), ("", "length"), ("the answ", "length")]

        def script(body, number):
            text, reason = choices[row_of(body)]
            return reply(message={"role": "assistant", "content": text}, finish_reason=reason)

        endpoint.script = script
        rows = list(episodes(play(env_of("tokens", 3, tokenizer), policy_of(tokenizer=tokenizer)), tokenizer))
        assert [row["sampled_tokens"] > 0 for row in rows] == [True, False, True]
        assert rows[0]["messages"][-1]["content"] == ""
        assert "no text" in rows[1]["error"]
        assert [row["cut"] for row in rows] == [False, False, True]

    def test_a_budget_cuts(self, endpoint, policy_of, tokenizer):
        env = DatasetChatEnv(
            dataset=[{"query": "question 0"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1
        )
        env = env.append_transform(Budget(max_tokens=5, max_turns=1))
        play(env, policy_of(tokenizer=tokenizer, max_new_tokens=50))
        assert endpoint.requests[0]["max_tokens"] == 5

    def test_a_full_context_is_not_asked_for(self, mode, endpoint, policy_of, tokenizer):
        dataset = [{"query": "question 0" + " and so on" * 30 * i} for i in range(2)]
        env = DatasetChatEnv(dataset=dataset, tokenizer=tokenizer, input_mode=mode, num_envs=2, shuffle=False)
        env = env.append_transform(Budget(max_context=80, max_turns=1))
        rows = list(episodes(play(env, policy_of(tokenizer=tokenizer if mode == "tokens" else None))))
        assert [row["stop"] for row in rows] == ["max_turns", "context_full"]
        assert [row["error"] for row in rows] == [None, None]
        assert len(endpoint.requests) == 1


class TestSample:
    def test_turns_of_values(self, endpoint, policy_of, tokenizer):
        """What the face writes, without a TensorDict: a refused request is its row's error only."""
        endpoint.script = lambda body, number: (400, b"{}") if row_of(body) == 1 else f"It is {row_of(body)}."
        policy, errors = policy_of(tokenizer=tokenizer, temperature=0.5), {}
        td = env_of("tokens", 3, tokenizer).reset()
        held = ledgers(td)
        turns = policy.sample([Prompt(t.tokens, t.messages, limit=9, seed=i) for i, t in enumerate(held)], errors)
        assert list(errors) == [1]
        assert (endpoint.requests[0]["max_tokens"], {body["seed"] for body in endpoint.requests}) == (9, {0, 1, 2})
        written = columns.read_field(policy(td)["tokens"], "response", td.batch_size)
        for i in (0, 2):
            assert turns[i].text == f"It is {i}."
            assert turns[i].ids.tolist() == written[i].tolist()
        messages = [list(t.messages) for t in held]
        with pytest.raises(Exception, match="400"):
            policy.sample(messages)
        [turn] = policy.sample(messages[:1])  # a text: nobody said behind which ids it comes
        assert (turn.ids, turn.text, turn.finish_reason) == (None, "It is 0.", "stop")
        with pytest.raises(ValueError, match="ids only"):
            policy.sample([[5, 6]])
        assert (policy.usage.calls, policy.usage.failed) == (10, 3)


class TestExactIds:
    def test_completions_carry_the_ledger(self, mode, endpoint, policy_of, tokenizer):
        # Ids that the tokenizer would not make of their text: it has "the" and "th" in one.
        stop = stop_of(ChatTemplate(tokenizer))
        pool = tokenizer.convert_tokens_to_ids(["t", "h", "e", "Ġ", "a"])
        sampled: list[tuple[list[int], list[int]]] = []

        def script(body, number):
            ids = [*pool[: 2 + number % 3], stop]
            sampled.append((body["prompt"], ids))
            scores = {"token_logprobs": [-0.125 * i for i in range(len(ids))]}
            return reply(text="ignored", finish_reason="stop", token_ids=ids, prompt_token_ids=body["prompt"],
                         logprobs=scores)  # fmt: skip

        endpoint.script = script
        env = env_of(mode, 2, tokenizer, turns=3)
        policy = policy_of(tokenizer=tokenizer, api="completions", log_probs=True)
        finished = play(env, policy)
        assert all(body["return_token_ids"] is True and body["logprobs"] == 1 for body in endpoint.requests)
        assert len(sampled) == 6
        for ledger in ledgers(finished):
            whole = ledger.tokens.tolist()
            mine = [(prompt, ids) for prompt, ids in sampled if whole[: len(prompt)] == prompt]
            assert len(mine) == 3
            for (prompt, ids), span in zip(sorted(mine, key=lambda pair: len(pair[0])), ledger.spans, strict=True):
                assert (span.start, span.end) == (len(prompt), len(prompt) + len(ids))
                assert whole[span.start : span.end] == ids
                assert ledger.log_probs[span.start : span.end].tolist() == [-0.125 * i for i in range(len(ids))]
            assert ledger.scored
        assert not finished["prompt_differs"].any()

    def test_a_chat_server_with_another_prompt_is_noticed(self, endpoint, policy_of, tokenizer):
        stop = stop_of(ChatTemplate(tokenizer))
        template = ChatTemplate(tokenizer)

        def script(body, number):
            prompt = template.render(body["messages"])
            told = [*prompt, 7] if row_of(body) else prompt
            message = {"role": "assistant", "content": "1"}
            return reply(message=message, finish_reason="stop", token_ids=[20, stop], prompt_token_ids=told)

        endpoint.script = script
        finished = play(env_of("tokens", 2, tokenizer), policy_of(tokenizer=tokenizer, token_ids=True))
        assert endpoint.requests[0]["return_token_ids"] is True
        assert [t.tokens[t.mask].tolist() for t in ledgers(finished)] == [[20, stop]] * 2
        assert finished["prompt_differs"].tolist() == [False, True]

    def test_log_probs_of_another_number_are_left(self, endpoint, policy_of, tokenizer):
        def script(body, number):
            content = [{"token": "x", "logprob": -1.0, "top_logprobs": []}] * (2 - row_of(body))
            message = {"role": "assistant", "content": "12"}
            return reply(message=message, finish_reason="length", token_ids=[20, 21], logprobs={"content": content})

        endpoint.script = script
        finished = play(env_of("tokens", 2, tokenizer), policy_of(tokenizer=tokenizer, log_probs=True))
        first, second = ledgers(finished)
        assert first.log_probs[first.mask].tolist() == [-1.0, -1.0]
        assert (first.scored, second.scored) == (True, False)
        assert second.tokens[second.mask].tolist() == [20, 21]

    def test_ids_of_another_model(self, endpoint, policy_of, tokenizer):
        endpoint.script = lambda body, number: reply(text="x", finish_reason="stop", token_ids=[999_999])
        rows = list(
            episodes(play(env_of("tokens", 1, tokenizer), policy_of(tokenizer=tokenizer, api="completions")))
        )
        assert "not its model's" in rows[0]["error"]


class TestFailures:
    def test_they_cost_their_row(self, mode, endpoint, policy_of, tokenizer):
        def script(body, number):
            row = row_of(body)
            if row == 2:
                time.sleep(5)
            return {
                1: (400, b'{"error": {"message": "too rude"}}'),
                3: (200, b"<html>"),
                4: (200, b'{"choices": []}'),
            }.get(row, str(row))

        endpoint.script = script
        finished = play(env_of(mode, 6, tokenizer), policy_of(tokenizer=tokenizer, deadline=1.5))
        rows = list(episodes(finished, tokenizer))
        assert [row["stop"] for row in rows] == ["answered", "error", "error", "error", "error", "answered"]
        assert "too rude" in rows[1]["error"]
        assert rows[2]["error"] == "TimeoutError: no reply within 1.5 s, with all tries"
        assert "no choice" in rows[4]["error"]
        assert [row["success"] for row in rows] == [True, False, False, False, False, True]
        for ledger, row in zip(ledgers(finished), rows, strict=True):
            # Nothing that no policy sampled is in the ledger.
            assert bool(ledger.mask.any()) == (row["error"] is None)
            assert (len(ledger.messages) == 1) == (row["error"] is not None)

    @pytest.mark.parametrize(("status", "tries"), [(429, 3), (503, 3), (400, 1), (401, 1)])
    def test_what_is_tried_again(self, endpoint, policy_of, tokenizer, status, tries):
        endpoint.script = lambda body, number: (status, b"{}") if number < 3 else "0"
        policy = policy_of(tokenizer=tokenizer, retries=4)
        [row] = episodes(play(env_of("tokens", 1, tokenizer), policy))
        assert len(endpoint.requests) == tries
        assert (row["error"] is None) == (tries > 1)

    def test_no_server(self, tokenizer):
        policy = EndpointPolicy("m", "http://127.0.0.1:9/v1", tokenizer=tokenizer, retries=0)
        rows = list(episodes(play(env_of("tokens", 2, tokenizer), policy)))
        policy.close()
        assert all(row["error"].startswith("APIConnectionError") for row in rows)

    def test_in_a_rollout_of_torchrl(self, endpoint, policy_of, tokenizer):
        endpoint.script = lambda body, number: (400, b"{}") if row_of(body) else "0"
        env = ChatEnv(tokenizer=tokenizer, input_mode="tokens", batch_size=(2,))
        td = env.reset(TensorDict(query=["question 0", "question 1"], batch_size=(2,)))
        stepped = env.step(policy_of(tokenizer=tokenizer)(td))["next"]
        first, second = ledgers(stepped)
        assert (len(first.messages), len(second.messages)) == (2, 1)


class TestTools:
    TOOL = {
        "type": "function",
        "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
    }

    @pytest.mark.corpus
    def test_a_parsed_call_is_written_as_the_template_does(self, endpoint, policy_of):
        tokenizer = corpus_tokenizer("lc_Qwen-Qwen2.5-7B-Instruct")
        call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}

        def script(body, number):
            assert body["tools"] == [self.TOOL]
            return reply(
                message={"role": "assistant", "content": None, "tool_calls": [call]}, finish_reason="tool_calls"
            )

        endpoint.script = script
        env = env_of("tokens", 1, tokenizer, template_kwargs={"tools": [self.TOOL]})
        [ledger] = ledgers(play(env, policy_of(tokenizer=tokenizer, tools=[self.TOOL])))
        assert ledger.messages[-1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
        text = tokenizer.decode(ledger.tokens[ledger.mask])
        assert text == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'

    def test_without_a_tokenizer_it_fails(self, endpoint, policy_of):
        call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        endpoint.script = lambda body, number: reply(message=message, finish_reason="tool_calls")
        [row] = episodes(play(env_of("history", 1), policy_of(tools=[self.TOOL])))
        assert "takes a tokenizer" in row["error"]

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.booleans())
    def test_every_call_has_an_id_that_its_result_names(self, counts, named):
        messages: list[dict[str, Any]] = [{"role": "user", "content": "?", "extra": 1}]
        for turn, count in enumerate(counts):
            calls = [
                {"function": {"name": "f", "arguments": {"i": i}}, **({"id": f"{turn}-{i}"} if named else {})}
                for i in range(count)
            ]
            messages.append({"role": "assistant", "content": None if calls else "x", "tool_calls": calls})
            messages += [{"role": "tool", "content": "r"} for _ in range(count)]
        sent = as_sent(messages)
        assert json.loads(json.dumps(sent)) == sent
        calls = [call["id"] for m in sent for call in m.get("tool_calls") or ()]
        results = [m["tool_call_id"] for m in sent if m["role"] == "tool"]
        assert calls == results
        assert len(set(calls)) == len(calls)
        assert "extra" not in sent[0]


class TestMaking:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"concurrency": 0}, "concurrency=0"),
            ({"timeout": 0}, "timeout=0"),
            ({"deadline": -1}, "deadline=-1"),
            ({"retries": -1}, "retries=-1"),
            ({"extra": {"n": 2}}, r"\['n'\]"),
            ({"api": "responses"}, "api='responses'"),
            ({"api": "completions"}, "tokenizer"),
            ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ],
    )
    def test_bad_options(self, kwargs, match):
        with pytest.raises(ValueError, match=match):
            EndpointPolicy("m", "http://127.0.0.1:1/v1", **kwargs)

    def test_no_key(self, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        with pytest.raises(ValueError, match="EndpointPolicy.*cannot connect"):
            EndpointPolicy("m")

    def test_a_key_that_is_gone_is_no_row_s_error(self, monkeypatch):
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        monkeypatch.setenv("OPENAI_API_KEY", "some-key")
        policy = EndpointPolicy("m")
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(ValueError, match="EndpointPolicy.*cannot connect"):
            policy.sample([[{"role": "user", "content": "x"}]], {})
        policy.close()

    def test_without_the_library(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(ImportError, match=r"torchrl_chat\[openai\]"):
            EndpointPolicy("m", "http://127.0.0.1:1/v1")

    def test_a_copy_asks_too(self, endpoint, policy_of, tokenizer):
        endpoint.script = lambda body, number: "0"
        policy = policy_of(tokenizer=tokenizer)
        env = env_of("tokens", 1, tokenizer)
        assert play(env, policy)["success"].all()
        copy = pickle.loads(pickle.dumps(policy))
        assert play(env, copy)["success"].all()
        copy.close()
        policy.close()
        assert play(env, policy)["success"].all()  # closed, it connects anew
