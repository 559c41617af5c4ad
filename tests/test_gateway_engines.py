"""What samples behind a gateway, and what comes out of it: policies in batches, servers that take ids, rows, rewards, rollout files."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import warnings

import httpx
import pytest
import torch
from agents import Recorder, calling, check_law, client_of, templates_of
from endpoint_server import serving

from torchrl_chat import ChatTemplate, TransformersPolicy, training_view
from torchrl_chat.conversation import Limits, StopReason, Transcript, Turn
from torchrl_chat.gateway import Gateway, PolicyEngine, RemoteEngine, Rewarder, ScriptedEngine, Settings, episodes
from torchrl_chat.gateway.engines import Ask
from torchrl_chat.policies import Policy
from torchrl_chat.rewards import NumberVerifier, Verdict, grades
from torchrl_chat.rollouts import read_rollouts, write_rollouts
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
from torchrl_chat.training import sequence_log_probs


def chat(session, messages: list[dict], **more) -> dict:
    client = client_of(session)
    return (
        client.chat.completions.create(model="m", messages=messages, **more)
        .choices[0]
        .message.model_dump(exclude_none=True)
    )


class Batches(Policy):
    """A policy that says its stop token, and keeps what it was asked together."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.stop_ids = tokenizer, frozenset({tokenizer.eos_token_id})
        self.asked: list[list] = []
        self.hold = threading.Event()
        self.hold.set()

    def _sample(self, prompts):
        self.hold.wait(20)
        self.asked.append([(prompt.ids.tolist(), prompt.limit, prompt.seed) for prompt in prompts])
        return [
            ValueError("bad row")
            if prompt.ids[-1] == 0
            else Turn(torch.tensor([5, min(self.stop_ids)]), torch.tensor([-0.5, -0.1]), "x", "stop")
            for prompt in prompts
        ]


def test_what_waits_is_sampled_together_and_a_bad_row_fails_alone():
    policy = Batches(tiny_tokenizer())
    engine = PolicyEngine(policy, gather=0.0, version=3)

    async def all_of_it():
        policy.hold.clear()
        first = asyncio.ensure_future(engine.sample(Ask(torch.tensor([9]), limit=4)))
        await asyncio.sleep(0)
        while engine._waiting:
            await asyncio.sleep(0.001)
        others = [
            asyncio.ensure_future(engine.sample(Ask(torch.tensor([i]), seed=s)))
            for i, s in ((0, None), (1, None), (2, 7), (3, 8), (4, None))
        ]
        await asyncio.sleep(0.01)
        others[-1].cancel()
        policy.hold.set()
        found = await asyncio.gather(first, *others, return_exceptions=True)
        await engine.aclose()
        return found

    found = asyncio.run(all_of_it())
    assert policy.asked == [
        [([9], 4, None)],
        [([2], None, 7), ([3], None, 8)],
        [([0], None, None), ([1], None, None)],
    ]
    assert str(found[1]) == "bad row"
    assert found[0].versions == found[2].versions == ((0, 3),)
    assert isinstance(found[-1], asyncio.CancelledError)
    assert engine.batches == {1: 1, 2: 2}


def test_a_prompt_is_a_ledger_or_ids():
    messages = [{"role": "user", "content": "hi"}]
    ledger = Transcript.start([7, 8, 9], messages)
    whole, bare = Ask(ledger), Ask(torch.tensor([7, 8, 9]))
    assert whole.ids.tolist() == bare.ids.tolist() == whole.id_array.tolist() == bare.id_array.tolist() == [7, 8, 9]
    assert (whole.ledger, [*whole.messages]) == (ledger, messages)
    assert (bare.ledger, [*bare.messages]) == (None, [])


def test_weights_change_between_batches_and_spans_tell_which():
    policy = Batches(tiny_tokenizer())
    with Gateway(PolicyEngine(policy, version=1)) as gateway, gateway.session() as session:
        message = chat(session, [{"role": "user", "content": "hi"}])
        with gateway.engine.updating():
            pass
        chat(session, [{"role": "user", "content": "hi"}, message, {"role": "user", "content": "on"}])
        session.finish(1.0)
        [branch] = session.transcript.sequences
        assert branch.token_versions[branch.mask].tolist() == [1, 1, 2, 2]
        view = training_view(session.episodes(), layout="padded")
        assert view["weight_versions", "full"][0][branch.mask].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("continuous", [False, True])
def test_weights_do_not_change_while_anything_is_sampled(continuous):
    policy = Batches(tiny_tokenizer())
    engine = PolicyEngine(policy, gather=0.0, version=1, continuous=continuous)
    changed = threading.Event()

    def change():
        with engine.updating():
            changed.set()

    async def all_of_it():
        policy.hold.clear()
        first = asyncio.ensure_future(engine.sample(Ask(torch.tensor([9]))))
        while not engine._sampling:
            await asyncio.sleep(0.001)
        thread = threading.Thread(target=change)
        thread.start()
        while not engine._changing:
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(engine.sample(Ask(torch.tensor([8]))))
        await asyncio.sleep(0.01)
        assert not changed.is_set()
        policy.hold.set()
        found = await asyncio.gather(first, second)
        await asyncio.to_thread(thread.join)
        await engine.aclose()
        return found

    assert [turn.versions for turn in asyncio.run(all_of_it())] == [((0, 1),), ((0, 2),)]


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda prompts: None, "NoneType"),
        (lambda prompts: [], "0 turns for 1 prompts"),
        (lambda prompts: [None], "a NoneType: expected a Turn"),
        (lambda prompts: sys.exit(1), "SystemExit"),
    ],
)
def test_a_policy_that_returns_no_turns_fails_its_requests_and_nothing_hangs(returned, words, continuous):
    policy = Batches(tiny_tokenizer())
    sample, policy.sample = policy.sample, lambda prompts, errors: returned(prompts)
    engine = PolicyEngine(policy, gather=0.0, version=1, continuous=continuous)

    async def all_of_it():
        with pytest.raises(Exception, match=words):
            await asyncio.wait_for(engine.sample(Ask(torch.tensor([9]))), 20)
        policy.sample = sample
        assert (await asyncio.wait_for(engine.sample(Ask(torch.tensor([9]))), 20)).text == "x"
        await engine.aclose()

    asyncio.run(all_of_it())


@pytest.fixture(scope="module")
def policy():
    tokenizer = tiny_tokenizer()
    return TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=6)


def test_a_model_behind_the_gateway_is_exact(policy):
    """Log-probs of the ledger are those of one forward pass; every id is trained once, in the columns of an environment."""
    rows = [{"query": f"last({i},7)=", "answer": str(i)} for i in range(3)]
    with Gateway(policy, reward=NumberVerifier(), limits=Limits(max_turns=3)) as gateway:

        def play(row):
            session = gateway.session(row=row)
            messages = [{"role": "user", "content": row["query"]}]
            for turn in range(3):
                message = chat(session, messages)
                messages += [{"content": "", **message}, {"role": "user", "content": f"last({turn})"}]
            session.finish()
            return session

        sessions = [play(row) for row in rows]
        td = gateway.episodes(sessions)
    assert td["query"] == [row["query"] for row in rows]
    assert td["stop_reason"].flatten().tolist() == [StopReason.MAX_TURNS] * 3
    assert td["reward"].shape == (3, 1, 1)
    assert td["graded"].all()
    view = training_view(td, group="query")
    assert view["group"].tolist() == [0, 1, 2]
    assert len(view) == 3
    found = sequence_log_probs(policy.model, view)
    padded = training_view(td, layout="padded")
    mask = padded["masks", "all_assistant_mask"]
    assert mask.any(-1).all()
    torch.testing.assert_close(found.log_probs[mask], padded["log_probs", "full"][mask], atol=1e-4, rtol=0)


def test_a_seed_gives_the_same_answers_again(policy):
    def played():
        with Gateway(policy) as gateway, gateway.session(seed=11) as session:
            first = chat(session, [{"role": "user", "content": "last(1)="}])
            chat(
                session,
                [
                    {"role": "user", "content": "last(1)="},
                    {"content": "", **first},
                    {"role": "user", "content": "2"},
                ],
            )
            return session.transcript.tokens.tolist()

    assert played() == played()


# ---------------------------------------------------------------------- a server that takes ids
def of_ids(body, number):
    """As vLLM answers, with ids: what it was given, turned round."""
    generate = "token_ids" in body
    prompt = body["token_ids"] if generate else body["prompt"]
    ids = [*prompt[-2:][::-1], 2]
    if generate:
        content = [{"token_id": i, "logprob": -0.25} for i in ids]
        choice = {"index": 0, "token_ids": ids, "finish_reason": "stop", "logprobs": {"content": content}}
        choice["weight_versions"] = [
            {"version": "4", "start": 0, "end": 1},
            {"version": "step-5", "start": 1, "end": 3},
        ]
        return 200, json.dumps({"request_id": "x", "choices": [choice]}).encode()
    choice = {"index": 0, "text": "?", "token_ids": ids, "finish_reason": "stop"}
    choice["logprobs"] = {
        "token_logprobs": [-0.25] * 3,
        "tokens": ["?"] * 3,
        "text_offset": [0] * 3,
        "top_logprobs": None,
    }
    whole = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
    return 200, json.dumps(whole).encode()


def test_what_a_server_read_and_wrote_is_counted_whatever_is_wrong_with_its_reply():
    def broken(body, number):
        status, raw = of_ids(body, number)
        whole = json.loads(raw)
        del whole["choices"][0]["logprobs"]["content"][0]["logprob"]
        return status, json.dumps({**whole, "usage": {"prompt_tokens": 7, "completion_tokens": 3}}).encode()

    with serving() as server:
        server.script = broken
        engine = RemoteEngine("m", server.url, "k", retries=0)
        with Gateway(engine, tiny_tokenizer()) as gateway, gateway.session() as session:
            with pytest.raises(Exception, match="the engine failed"):
                chat(session, [{"role": "user", "content": "last(1)="}])
            usage = engine.usage
            assert usage.calls == usage.failed > 0  # the agent's library tries again
            assert (usage.prompt_tokens, usage.completion_tokens) == (7 * usage.calls, 3 * usage.calls)


@pytest.mark.parametrize("api", ["generate", "completions"])
def test_a_server_gets_the_very_ids_and_gives_some(api):
    with serving() as server:
        server.script = of_ids
        engine = RemoteEngine("m", server.url, "k", api=api, stop_ids={2}, extra={"top_p": 0.9})
        settings = Settings(sampling={"temperature": 0.5, "top_k": 3})
        with Gateway(engine, tiny_tokenizer(), settings=settings) as gateway, gateway.session(seed=5) as session:
            first = chat(session, [{"role": "user", "content": "last(1)="}], max_tokens=9)
            chat(
                session,
                [
                    {"role": "user", "content": "last(1)="},
                    {"content": "", **first},
                    {"role": "user", "content": "2"},
                ],
            )
            [branch] = session.transcript.sequences
        one, two = server.requests
        asked = one["sampling_params"] if api == "generate" else one
        assert (asked["temperature"], asked["top_k"], asked["top_p"], asked["seed"]) == (0.5, 3, 0.9, 5)
        assert (asked["max_tokens"], asked["stop_token_ids"]) == (9, [2])
        prompts = [body.get("token_ids") or body["prompt"] for body in (one, two)]
        assert prompts[1] == branch.tokens[: len(prompts[1])].tolist()
        assert branch.tokens[len(prompts[0]) :][:3].tolist() == [*prompts[0][-2:][::-1], 2]
        assert bool((branch.log_probs[branch.mask] == -0.25).all())
        if api == "generate":
            assert branch.token_versions[branch.mask].tolist() == [4, -1, -1] * 2
    with pytest.raises(ValueError, match="api='chat'"):
        RemoteEngine("m", api="chat")


@pytest.mark.parametrize(
    "reply", [(500, b"{}"), (200, b"{}"), (404, b'{"error": "no route"}')], ids=["500", "empty", "404"]
)
def test_a_server_that_fails_is_an_error_of_the_dialect(reply):
    with serving() as server:
        server.script = lambda body, number: reply
        engine = RemoteEngine("m", server.url, "sk-hidden-key", retries=0)
        with Gateway(engine, tiny_tokenizer()) as gateway, gateway.session() as session:
            told = httpx.post(
                f"{session.base_url}/chat/completions",
                json={"messages": [{"role": "user", "content": "1"}]},
                headers={"authorization": f"Bearer {session.api_key}"},
            )
    assert told.status_code == 500
    assert told.json()["error"]["type"] == "server_error"
    assert "sk-hidden-key" not in told.text


# ---------------------------------------------------------------------- rows
def scripted(lines, **more) -> Gateway:
    templates = templates_of()
    left = iter(lines)
    return Gateway(
        Recorder(templates, lambda ask: next(left)),
        templates.plain.tokenizer,
        template={"chat_template": templates.plain.renderer.source},
        **more,
    )


def test_sequences_of_a_session_are_rows_of_its_episode(tmp_path):
    with scripted(["one", "aside", "two"], reward=NumberVerifier()) as gateway:
        session = gateway.session(row={"query": "q", "answer": "2", "level": 3}, group="g", seed=1)
        message = chat(session, [{"role": "user", "content": "hi"}])
        chat(session, [{"role": "user", "content": "another agent"}])
        chat(session, [{"role": "user", "content": "hi"}, message, {"role": "user", "content": "on"}])
        empty = gateway.session(row={"query": "q", "answer": "3"})
        with pytest.raises(ValueError, match="not finished"):
            session.episodes()
        session.finish(0.5, parts={"exact": 1.0}, success=True)
        empty.finish()
        assert check_law(session.session) == 2
        td = gateway.episodes([session, empty])
        tokenizer = gateway.templates.plain.tokenizer
    assert td["reward"].flatten().tolist() == [0.5, 0.0]
    assert td["level"] == [3, None]
    assert "nothing was sampled" in td["env_failure"][1]
    assert td["reward_parts", "exact"].flatten().tolist() == [1.0, 0.0]
    view = training_view(td)
    assert view["episode"].tolist() == [0, 0, 1]
    assert view["group"].tolist() == [0, 0, -1]
    assert not view[2]["masks", "all_assistant_mask"].any()
    write_rollouts(tmp_path / "r.jsonl", td, tokenizer)
    first, second = read_rollouts(tmp_path / "r.jsonl")
    assert (first["reward"], first["stop"], first["turns"], len(first["sequences"])) == (0.5, "answered", 3, 2)
    assert second["stop"] == "error"
    with pytest.raises(ValueError, match="no session"):
        episodes([])


def test_verifiers_grade_the_final_answer_or_the_whole_session():
    @grades("episode")
    def by_row(episode):
        return float(episode.row["level"] == 3 and episode.message["content"] == "7")

    def by_session(session):
        calls = sum(len(answer.said.calls) for answer in session.tree.answers)
        return Verdict(float(calls), None, True, {"calls": float(calls)})

    by_session.grades = "session"

    def broken(session):
        raise RuntimeError("no grade")

    broken.grades = "session"
    row = {"query": "q", "answer": "7", "level": 3}
    expected = [
        (NumberVerifier(), 1.0),
        (by_row, 1.0),
        (by_session, 0.0),
        (Rewarder(broken, on_failure="mask"), 0.0),
    ]
    for reward, score in expected:
        with scripted(["7"], reward=reward) as gateway:
            session = gateway.session(row=row)
            chat(session, [{"role": "user", "content": "hi"}])
            headers = {"authorization": f"Bearer {gateway.token}"}
            httpx.post(f"{gateway.url}/s/{session.name}/finish", headers=headers, timeout=30)
            td = gateway.episodes(gateway.take())
        assert td["reward"].item() == score
        assert td["graded"].item() == (not isinstance(reward, Rewarder))
    assert "no grade" in td["grade_failure"][0]
    with scripted(["7"], reward=NumberVerifier()) as gateway:
        session, url = gateway.session(row={"query": "q"}), gateway.url
        with pytest.raises(KeyError, match="has no 'answer'"):
            session.finish()
        headers = {"authorization": f"Bearer {gateway.token}"}
        told = httpx.post(f"{url}/s/{session.name}/finish", headers=headers, timeout=30)
        assert told.status_code == 400
        assert "has no 'answer'" in told.json()["error"]["message"]
        told = httpx.post(f"{url}/s/{session.name}/finish", json={"reward": 1}, headers=headers, timeout=30)
        assert told.json()["reward"] == 1.0


def test_a_session_that_is_left_is_finished_as_failed():
    with scripted([calling("a")] * 2) as gateway:
        session = gateway.session()

        def killed():
            with session:
                chat(session, [{"role": "user", "content": "hi"}])
                raise RuntimeError("the agent was killed")

        with pytest.raises(RuntimeError, match="killed"):
            killed()
        open_one = gateway.session()
    assert session.session.failure == "RuntimeError: the agent was killed"
    td = episodes([session.session, open_one.session])
    assert td["stop_reason"].flatten().tolist() == [StopReason.ERROR] * 2
    assert (training_view(td)["group"] == -1).all()


def test_an_end_that_is_told_may_fail_and_what_is_told_is_not_kept():
    told = []

    def ended(session):
        told.append(session.name)
        raise RuntimeError("the disk is full")

    with scripted(["7"], ended=ended) as gateway:
        names = [gateway.session().name for _ in range(3)]
        gateway.run(lambda: gateway.table.finish(gateway.table.open[names[0]]))
        assert not gateway.take()
    assert told == names


def test_an_engine_needs_a_tokenizer():
    class Mute:
        settings: frozenset[str] = frozenset()

        async def sample(self, ask):
            raise AssertionError("nobody asks")

        async def aclose(self):
            pass

    with pytest.raises(ValueError, match="a Mute has no tokenizer"):
        Gateway(Mute())
    tokenizer = tiny_tokenizer()
    assert Gateway(ScriptedEngine(["x"], tokenizer)).templates.plain.tokenizer is tokenizer
    with pytest.raises(ValueError, match="has no tokenizer"):  # a template's options would be lost
        Gateway(ScriptedEngine(["x"], ChatTemplate(tokenizer, chat_template="plain")))


@pytest.mark.parametrize("writes", [True, False])
def test_an_agent_whose_tools_the_template_does_not_write_is_told(writes, caplog):
    """Once a session and a set of tools, whatever else is found; in the log once, without names."""

    def tool(name):
        return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}

    engine = ScriptedEngine(["7"] * 22, tiny_tokenizer(TEXT_ALPHABET, tools=writes))
    with warnings.catch_warnings(), Gateway(engine) as gateway:
        warnings.simplefilter("error")
        session = gateway.session()
        for turn in range(20):  # each a sequence of its own, which is a finding, too
            chat(session, [{"role": "user", "content": f"{turn}?"}], tools=[tool("now")])
        chat(session, [{"role": "user", "content": "?"}], tools=[tool("then")])
        told = [text for text in session.report["findings"] if "no answer is read as a call" in text]
        assert ["now" in text for text in told] == ([] if writes else [True, False])
        assert len(session.report["findings"]) > 10
        chat(gateway.session(), [{"role": "user", "content": "?"}], tools=[tool("now")])
    logged = [record.getMessage() for record in caplog.records if "does not write the tools" in record.getMessage()]
    assert len(logged) == 1 - writes
    assert "now" not in "".join(logged)


def test_a_script_that_is_at_its_end_says_so():
    engine = ScriptedEngine(["7"], tiny_tokenizer())
    ask = Ask(torch.tensor([1]))
    assert asyncio.run(engine.sample(ask)).text == "7"
    with pytest.raises(IndexError, match="has 1 texts, and was asked for one more"):
        asyncio.run(engine.sample(ask))
