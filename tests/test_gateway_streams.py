"""Answers told while they are sampled, by a policy or by a server of ids, in every dialect; and nothing sampled for who has left."""

from __future__ import annotations

import json
import threading
import time

import httpx
import pytest
import torch
from endpoint_server import serving

from torchrl_chat import TransformersPolicy
from torchrl_chat.conversation import Turn
from torchrl_chat.gateway import Gateway, PolicyEngine, RemoteEngine, Settings
from torchrl_chat.policies import Policy
from torchrl_chat.templates import ChatTemplate
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer(TEXT_ALPHABET)
CODEC = ChatTemplate(TOKENIZER).codec
DIALECTS = ("chat/completions", "responses", "messages")


def body(dialect: str, text: str, stream: bool = True) -> dict:
    messages = [{"role": "user", "content": text}]
    return {"model": "m", "stream": stream, ("input" if dialect == "responses" else "messages"): messages}


def headers(session) -> dict:
    return {"authorization": f"Bearer {session.api_key}"}


def delta(event: dict) -> str:
    """What an event of a stream adds to the content, in whatever dialect."""
    if "choices" in event:
        return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    if event.get("type") == "response.output_text.delta":
        return event["delta"]
    if event.get("type") == "content_block_delta":
        return event["delta"].get("text", "")
    return ""


def deltas(session, dialect: str, text: str):
    """The content of an answer, as it comes."""
    asked = body(dialect, text)
    with httpx.stream(
        "POST", f"{session.base_url}/{dialect}", json=asked, headers=headers(session), timeout=60
    ) as r:
        assert r.status_code == 200
        for line in r.iter_lines():
            if line.startswith("data: {") and (more := delta(json.loads(line[6:]))):
                yield more


def said(session) -> str:
    return session.session.tree.answers[-1].transcript.messages[-1]["content"]


class Typist(Policy):
    """Types the last question back as often as its number says, a token at a time."""

    tells = True

    def __init__(self):
        super().__init__()
        self.tokenizer, self.stop_ids = TOKENIZER, frozenset({TOKENIZER.eos_token_id})
        self.typed, self.busy, self.sizes = 0, threading.Event(), []

    def _sample(self, prompts, told=None):
        self.busy.set()
        self.sizes.append(len(prompts))
        ids = []
        for prompt in prompts:
            word, _, times = prompt.messages[-1]["content"].partition(" ")
            ids.append([*CODEC.encode([word + " "])[0] * int(times), min(self.stop_ids)])
        ended, count = set(), [0] * len(prompts)
        while going := [i for i in range(len(ids)) if i not in ended and count[i] < len(ids[i])]:
            for i in going:
                count[i] += 1
            self.typed += len(going)
            ended |= set(told([row[:k] for row, k in zip(ids, count, strict=True)]))
            time.sleep(0.001)
        self.busy.clear()
        return [
            Turn(torch.tensor(row[:k]), torch.full((k,), -0.5), None, "stop")
            for row, k in zip(ids, count, strict=True)
        ]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_policy_tells_of_its_tokens_in_every_dialect(dialect):
    policy = Typist()
    with Gateway(policy) as gateway, gateway.session() as session:
        found, early = [], 0
        for piece in deltas(session, dialect, "word 60"):
            early += policy.busy.is_set()
            found.append(piece)
        assert "".join(found) == said(session) == "word " * 60
        assert early > 2  # told while it was still typing
        session.finish(1.0)
        assert session.transcript.mask.sum() == 301


def test_a_model_streams_what_it_answers():
    """Random weights: whatever comes, tokens of no meaning among it."""
    model = tiny_model(len(TOKENIZER), hidden=16)
    never = len(TOKENIZER)  # ends it
    policy = TransformersPolicy(model, TOKENIZER, max_new_tokens=90, seeded=True, stop_ids=[never])
    with Gateway(PolicyEngine(policy)) as gateway:
        gateway.engine._pause = 0.0
        with gateway.session(seed=1) as session:
            found = list(deltas(session, "messages", "hi"))
            assert len(found) > 2
            assert "".join(found) == said(session)
            ids = session.session.tree.answers[-1].transcript.tokens
        with gateway.session(seed=1) as session:
            httpx.post(f"{session.base_url}/messages", json=body("messages", "hi", False), headers=headers(session))
            assert session.session.tree.answers[-1].transcript.tokens.tolist() == ids.tolist()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_nothing_is_sampled_for_a_client_that_has_left(dialect):
    policy = Typist()
    settings = Settings(patience=0.01)
    engine = PolicyEngine(policy, gather=0.1)
    with Gateway(engine, settings=settings) as gateway, gateway.session() as session, gateway.session() as other:
        whole: list = []
        stays = threading.Thread(target=lambda: whole.extend(deltas(other, dialect, "stay 30")))
        stays.start()
        pieces = deltas(session, dialect, "leave 5000")
        next(pieces)
        pieces.close()
        stays.join(30)
        waited = time.monotonic()
        while policy.busy.is_set() and time.monotonic() - waited < 30:
            time.sleep(0.01)
        assert not policy.busy.is_set()
        assert policy.typed < 20_000  # of 30,000
        assert "".join(whole) == "stay " * 30
        assert not session.session.turns
        assert session.session.report["given up"] == 1


# ---------------------------------------------------------------------- a server of ids
def chunks(api: str, ids: list[int], pause: float = 0.0, end: bool = True):
    """What vLLM 0.32 streams."""
    usage = {"prompt_tokens": 3, "completion_tokens": len(ids), "total_tokens": 3 + len(ids)}
    for start in range(0, len(ids), 3):
        some, last = ids[start : start + 3], start + 3 >= len(ids)
        scores = [-token / 64 for token in some]
        shown = (
            {"token_logprobs": scores} if api == "completions" else {"content": [{"logprob": s} for s in scores]}
        )
        choice = {"index": 0, "text": "", "token_ids": some, "logprobs": shown, "finish_reason": None}
        if last and end:
            choice |= {"finish_reason": "stop", "weight_versions": [{"start": 0, "version": "7"}]}
        yield {
            "id": "1",
            "object": "text_completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": None,
        }
        time.sleep(pause)
    yield {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [], "usage": usage}
    yield b"[DONE]"


def remote(server, api: str) -> RemoteEngine:
    return RemoteEngine("m", server.url, "k", api=api, stop_ids={2}, retries=0)


@pytest.mark.parametrize("api", ["generate", "completions"])
def test_what_a_server_streams_is_told_and_entered(api):
    ids = [*CODEC.encode(["word " * 30])[0], 2]
    with serving() as server:
        server.script = lambda body, number: chunks(api, ids)
        engine = remote(server, api)
        with Gateway(engine, TOKENIZER) as gateway, gateway.session() as session:
            found = list(deltas(session, "chat/completions", "hi"))
            assert len(found) > 3
            assert "".join(found) == said(session)
            ledger = session.session.tree.answers[-1].transcript
            assert ledger.tokens[ledger.mask].tolist() == ids
            assert torch.allclose(ledger.log_probs[ledger.mask], -torch.tensor(ids) / 64)
            [branch] = session.transcript.sequences
            assert (api == "completions") or set(branch.token_versions[branch.mask].tolist()) == {7}
            assert server.requests[0]["stream"] is True
            assert engine.usage.completion_tokens == len(ids)
            # Whole, where nobody reads along.
            server.script = lambda body, number: (500, b"{}")
            httpx.post(f"{session.base_url}/messages", json=body("messages", "ho", False), headers=headers(session))
            assert "stream" not in server.requests[-1]


@pytest.mark.parametrize("api", ["generate", "completions"])
def test_a_server_is_left_by_whoever_is_left(api):
    ids = [*CODEC.encode(["word " * 400])[0], 2]
    with serving() as server:
        server.script = lambda body, number: chunks(api, ids, 0.01)
        settings = Settings(patience=0.01)
        with Gateway(remote(server, api), TOKENIZER, settings=settings) as gateway, gateway.session() as session:
            pieces = deltas(session, "messages", "hi")
            next(pieces)
            pieces.close()
            waited = time.monotonic()
            while not server.left and time.monotonic() - waited < 20:
                time.sleep(0.01)
            assert server.left == 1


@pytest.mark.parametrize("api", ["generate", "completions"])
def test_a_stream_that_breaks_off_is_an_error_and_no_answer(api):
    ids = CODEC.encode(["word " * 30])[0]
    broken = iter(
        [chunks(api, ids, end=False), iter([*chunks(api, ids, end=False)][:4]), iter([{"error": "lost"}])]
    )
    with serving() as server:
        server.script = lambda body, number: next(broken)
        with Gateway(remote(server, api), TOKENIZER) as gateway, gateway.session() as session:
            for _ in range(3):
                told = httpx.post(
                    f"{session.base_url}/chat/completions",
                    json=body("chat/completions", "hi"),
                    headers=headers(session),
                )
                assert "the engine failed" in told.text
            assert not session.session.turns
    assert len(server.requests) == 3


def test_a_server_that_does_not_stream_is_one_event():
    ids = [*CODEC.encode(["word " * 20])[0], 2]
    with serving() as server:
        whole = {"choices": [{"token_ids": ids, "finish_reason": "stop", "logprobs": None}]}
        server.script = lambda body, number: (200, json.dumps(whole).encode())
        with Gateway(remote(server, "generate"), TOKENIZER) as gateway, gateway.session() as session:
            assert "".join(deltas(session, "responses", "hi")) == said(session) == "word " * 20
