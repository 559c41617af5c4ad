"""Agents that talk to a session in the process, sampled answers they get, and the law on what comes out."""

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections import Counter
from typing import Any

import torch
from conftest import CALLS_TEMPLATE, bpe_tokenizer, while_of_one_template
from law_turns import vocab_of
from openai import DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI

from torchrl_chat.conversation import Turn
from torchrl_chat.gateway.calls import Asked, Call, Reply
from torchrl_chat.gateway.sessions import Session
from torchrl_chat.gateway.settings import Settings
from torchrl_chat.gateway.templates import Templates

TOOLS = (
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}},
    },
)
THINKING = (
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{%- if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m['content'] }}"
    "{%- for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@while_of_one_template
def templates_of(source: str = CALLS_TEMPLATE) -> Templates:
    return Templates(bpe_tokenizer.__wrapped__(), chat_template=source)


class Recorder:
    """An engine that says what a script says, in tokens that a tokenizer would not choose, and keeps what it was asked."""

    settings = frozenset({"temperature"})

    def __init__(self, templates: Templates, script: Any, seed: int = 0):
        self.template, self.script = templates.plain, script
        self.draw = random.Random(seed)
        self.asked: list[Any] = []
        self.sampled: list[tuple[list[int], list[int]]] = []

    async def sample(self, ask: Any) -> Turn:
        self.asked.append(ask)
        said = self.script(ask)
        if asyncio.iscoroutine(said):
            said = await said
        if isinstance(said, Exception):
            raise said
        ids = self.spelled(said) or self.spelled(".")
        if ask.limit is not None:
            ids = ids[: ask.limit]
        self.sampled.append((ask.ids.tolist(), ids))
        stop = ids[-1] in self.template.stop_ids
        return Turn(torch.tensor(ids), torch.full((len(ids),), -0.25), None, "stop" if stop else "length")

    def spelled(self, text: str) -> list[int]:
        vocab, tokenizer, ids = vocab_of(self.template.tokenizer), self.template.tokenizer, []
        special = set(tokenizer.all_special_ids)
        for token in self.template.codec.encode([text])[0]:
            piece = tokenizer.convert_ids_to_tokens(token)
            cuts = [k for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
            if cuts and token not in special and self.draw.random() < 0.3:
                k = self.draw.choice(cuts)
                ids += [vocab[piece[:k]], vocab[piece[k:]]]
            else:
                ids.append(token)
        return [*ids, *sorted(self.template.stop_ids)[:1]]

    async def aclose(self) -> None:
        """Nothing is held."""


def session_of(script: Any, source: str = CALLS_TEMPLATE, **more: Any) -> Session:
    """A session whose engine says what a script says: a list of texts, or a function of what it is asked."""
    templates = templates_of(source)
    left = None if callable(script) else iter(script)
    lines = script if left is None else lambda ask: next(left)
    seed = more.pop("seed", None)
    return Session("test", Recorder(templates, lines), templates, Settings(**more), seed=seed)


async def ask(session: Session, messages: list[dict], body: bytes | None = None, **more: Any) -> Reply:
    """The reply to a request, delivered."""
    more.setdefault("tools", TOOLS)
    call = Call(messages=tuple(messages), **more)
    # Two equal requests are two samples unless a test says that they are one.
    exchange = session.open(call, repr((id(call), messages)).encode() if body is None else body)
    reply = await exchange.reply()
    exchange.deliver()
    return reply


def run(test):
    """Run a test that is a coroutine."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        async def all_of_it():
            await asyncio.wait_for(test(*args, **kwargs), 60)

        asyncio.run(all_of_it())

    return wrapped


def kinds(session: Session) -> dict[str, int]:
    return {kind: session.report[kind] for kind in ("begins", "forks", "restarts") if session.report[kind]}


async def talk(session: Session, messages: list[dict], turns: int) -> list[dict]:
    """The history after some turns of a plain agent, which answers calls with a number."""
    messages = list(messages)
    for turn in range(turns):
        message = (await ask(session, messages)).choices[0].message
        messages.append(message)
        if turn < turns - 1:
            texts = [f"{turn}.{i}" for i in range(len(message.get("tool_calls", ())))]
            messages += result(message, *texts) if texts else [user(f"go on {turn}")]
    return messages


def client_of(session: Any, kind: Any = OpenAI, **more: Any) -> Any:
    """A client of the openai library for a session; without certificates, which take longer to load than an agent to talk."""
    http = DefaultHttpxClient if kind is OpenAI else DefaultAsyncHttpxClient
    return kind(base_url=session.base_url, api_key=session.api_key, http_client=http(verify=False), **more)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def result(message: dict, *texts: str) -> list[dict]:
    """The results of a message's calls."""
    calls = message["tool_calls"]
    return [
        {"role": "tool", "tool_call_id": call["id"], "content": text}
        for call, text in zip(calls, texts, strict=True)
    ]


def calling(*queries: str, said: str = "") -> str:
    """What a model says that calls the tool."""
    calls = [
        f'<tool_call>\n{{"name": "look",  "arguments": {json.dumps({"q": query})}}}\n</tool_call>'
        for query in queries
    ]
    return "\n".join([said, *calls] if said else calls)


def asked(**values: Any) -> Asked:
    return Asked({key: value for key, value in values.items() if key != "stop"}, tuple(values.get("stop", ())))


def runs(mask: torch.Tensor) -> list[tuple[int, int]]:
    """The stretches where a mask is true."""
    padded = torch.nn.functional.pad(mask.to(torch.int8), (1, 1))
    edges = torch.diff(padded)
    return list(
        zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True)
    )


def check_law(session: Session, lost: int = 0, log_prob: float | None = -0.25) -> int:
    """Every sampled id is trained once, behind the very ids that the policy read when it sampled it; how many sequences there are.

    Args:
        lost: how many answers nobody got.
        log_prob: of every sampled id; ``None``: not looked at here.
    """
    transcript, engine = session.transcript(), session.engine
    assert transcript is not None
    found: Counter[Any] = Counter()
    for branch in transcript.sequences:
        assert bool(branch.mask.any())
        assert not branch.log_probs[~branch.mask].any()
        for start, end in runs(branch.mask):
            found[tuple(branch.tokens[:start].tolist()), tuple(branch.tokens[start:end].tolist())] += 1
            assert log_prob is None or bool((branch.log_probs[start:end] == log_prob).all())
    sampled = Counter((tuple(prompt), tuple(ids)) for prompt, ids in engine.sampled)
    assert not found - sampled, "a sequence trains what was not sampled there"
    assert (sampled - found).total() == lost, "what was sampled is trained in no sequence"
    check_calls(session, transcript)
    return len(transcript.sequences)


def check_calls(session: Session, transcript: Any) -> None:
    """The tree in a rollout file has every answer: whom it continues, all that was said up to it, and where its ids stand."""
    calls, answers, said = session.tree.calls(), session.tree.answers, []
    if not calls:
        assert len(transcript.sequences) == 1
        assert all(answer.delivered for answer in answers)
        return
    for call, answer in zip(calls, answers, strict=True):
        before = call["parent"]
        assert (None if before is None else answers[before]) is answer.parent
        assert (call["kind"] in ("begins", "restarts")) == (before is None)
        known = [] if before is None else said[before]
        said.append(list(transcript.messages[: call["until"]]) if "until" in call else known + call["messages"])
        assert said[-1] == list(answer.transcript.messages)
        start, end = call["span"]
        assert (call["sequence"] is not None) == answer.delivered
        if call["sequence"] is not None:
            branch = transcript.sequences[call["sequence"]]
            assert branch.tokens[:end].tolist() == answer.transcript.tokens[:end].tolist()
            assert bool(branch.mask[start:end].all())
