"""How many sequences an episode of eight turns becomes: our gateway beside OpenEnv's graph of captured calls.

    python benchmarks/drift.py [--quick] [--json] [--openenv PYTHON] [--templates NAME ...]

A plain agent sends its whole history with each request. What a policy samples differs from what a template and a tokenizer
would write for it, in ways that a capture which renders each request anew cannot follow:

- ``0 %``, ``2 %``, ``10 %``: plain user turns; of that share of the words of the sampled answers (20 words each) the tokens are
  not those that the tokenizer would choose (the text is the same);
- ``thinking``: answers with reasoning, which templates leave out of earlier turns (the agent sends it back whole);
- ``calls``: seven tool calls, one after the other, and an answer; the arguments are spaced unlike the template's;
- ``compaction``: plain turns without any such word; in the middle the agent puts a summary in place of its history.

Ours is a session of the gateway, in this process; its engine samples what the episode says. OpenEnv's is ``RolloutGraph`` of
``openenv`` 0.10, in the Python that ``--openenv`` names (default: the one that ``make peers`` makes), on the very same requests and
sampled ids: its prompts are the requests as the tokenizer's own ``apply_chat_template`` renders them, as an engine behind its capture
server does. It gets the template's own form of everything (arguments as objects, ids of calls of nine letters) and all reasoning.

The table shows sequences, ours / OpenEnv's, and how many times the tokens OpenEnv's sequences have of ours. "-" is what a template
cannot say (no tools, no reasoning), or where its calls have no JSON that could be spaced otherwise. Real tokenizers and templates come
from the shared corpus (``TORCHRL_CHAT_SHARED``, default ``../shared``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchrl_chat.conversation import Turn
from torchrl_chat.gateway.calls import Call
from torchrl_chat.gateway.sessions import Session
from torchrl_chat.gateway.templates import Templates

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TORCHRL_CHAT_SHARED", ROOT.parent / "shared"))
TEMPLATES = (
    "lc_Qwen-Qwen2.5-7B-Instruct",
    "lc_Qwen-Qwen3-0.6B",
    "lc_meta-llama-Llama-3.1-8B-Instruct",
    "lc_mistralai-Mistral-Nemo-Instruct-2407",
    "lc_microsoft-Phi-3.5-mini-instruct",
    "lc_google-gemma-2-2b-it",
    "lc_GLM-4.6",
    "lc_Kimi-K2-Instruct",
    "lc_deepseek-ai-DeepSeek-V3.1",
    "trl_lfm2",
)
EPISODES = ("0 %", "2 %", "10 %", "thinking", "calls", "compaction")
TURNS = 8
TEXT = (
    "the answer of this question is found by adding all numbers that we know so far and then dividing them because every "
    "person gets an equal share of whatever was bought yesterday afternoon before everybody finally travelled northwards"
)
WORDS = TEXT.split()
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather of a city.", "parameters": PARAMETERS},
}
GRAPH = """
import json, sys
from openenv.core.harness.capture.graph import RolloutGraph, TurnNode
found = []
for episode in json.load(sys.stdin):
    graph = RolloutGraph()
    for i, (prompt, sampled) in enumerate(episode):
        graph.add_turn(TurnNode(str(i), prompt, sampled, [-0.5] * len(sampled)))
    sequences = graph.sequences()
    found.append({"sequences": len(sequences), "tokens": sum(len(s.input_ids) for s in sequences)})
print(json.dumps(found))
"""


def load(name: str) -> Any:
    """A tokenizer of the corpus, with its template."""
    sys.path.insert(0, str(SHARED / "corpus"))
    try:
        import corpus
    finally:
        sys.path.pop(0)
    return corpus.load(name)


@dataclass
class Episode:
    """What happened: the requests and what was sampled for them."""

    ours: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[list[dict], list[dict], list[int]]] = field(default_factory=list)
    """Messages, tools, sampled ids."""
    session: Session | None = None


class Policy:
    """Says the next text of a list, in tokens of its own.

    Args:
        template: the template, for its tokenizer and its stop tokens.
        share: of the words, those whose tokens are not the tokenizer's choice.
        seed: of which they are.
    """

    settings: frozenset[str] = frozenset()

    def __init__(self, template: Any, share: float, seed: str):
        self.template, self.share, self.draw = template, share, random.Random(seed)
        self.stop = stop_of(template)
        self.tokenizer = template.tokenizer
        self.vocab = self.tokenizer.get_vocab()
        self.special = set(self.tokenizer.all_special_ids)
        self.text = ""
        self.sampled: list[tuple[list[int], list[int]]] = []

    async def sample(self, ask: Any) -> Turn:
        """The text that was put here."""
        [canonical] = self.template.codec.encode_continuation([self.text], [int(ask.ids[-1])])
        ids: list[int] = []
        for token in canonical:
            ids += self.split(token) if self.draw.random() < self.share else [token]
        assert self.template.codec.decode([ids]) == self.template.codec.decode([canonical])
        ids += self.stop
        self.sampled.append((ask.ids.tolist(), ids))
        return Turn(torch.tensor(ids), torch.full((len(ids),), -0.5), None, "stop")

    def split(self, token: int) -> list[int]:
        """The same text in two tokens, where there are such."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        cuts = [k for k in range(1, len(piece)) if piece[:k] in self.vocab and piece[k:] in self.vocab]
        if token in self.special or not cuts or not any(map(str.isalpha, piece)):
            return [token]
        k = self.draw.choice(cuts)
        return [self.vocab[piece[:k]], self.vocab[piece[k:]]]

    async def aclose(self) -> None:
        """Nothing is held."""


def stop_of(template: Any) -> list[int]:
    """The token with which a model ends an answer: the one that the template writes behind it, if it is one that ends."""
    asked, mark = {"role": "user", "content": "Q"}, "MARKQ7"
    messages = [asked, {"role": "assistant", "content": mark}, asked]
    text = template.tokenizer.apply_chat_template(messages, tokenize=False)
    [behind] = template.codec.encode([text[text.index(mark) + len(mark) :]])
    stops = [int(token) for token in behind[:2] if int(token) in template.stop_ids]
    return stops[:1] or sorted(template.stop_ids)[:1]


def words(draw: random.Random, count: int) -> str:
    """So many words."""
    return " ".join(draw.choice(WORDS) for _ in range(count))


def called(template: Any, tokenizer: Any, arguments: dict) -> str | None:
    """How this model writes a call, its arguments spaced otherwise; ``None`` where that cannot be said."""
    asked = [{"role": "user", "content": "Q"}]
    call = {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        prompt, whole = (
            tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False, add_generation_prompt=last)
            for messages, last in ((asked, True), ([*asked, answer], False))
        )
    except Exception:
        return None
    stops = [tokenizer.convert_ids_to_tokens(token) for token in template.stop_ids]
    if not whole.startswith(prompt):
        return None
    body = re.split("|".join(map(re.escape, stops)), whole[len(prompt) :])[0] if stops else whole[len(prompt) :]
    for form in ({}, {"separators": (",", ":")}):
        written = json.dumps(arguments, **form)
        if written in body:
            spaced = ", " if form else ",  "
            return body.replace(written, json.dumps(arguments, separators=(spaced, ":  ")))
    return None


async def play(name: str, tokenizer: Any, templates: Templates, kind: str, seed: int = 0) -> Episode | None:
    """An episode at a session of ours; ``None`` where the template has no such thing."""
    draw, tools = random.Random(f"{name} {kind} {seed}"), ([TOOL] if kind == "calls" else [])
    template = templates.of(templates.key(tools), tools)
    share = float(kind.removesuffix(" %")) / 100 if kind.endswith("%") else 0.0
    policy = Policy(template, share, f"{name} {kind} {seed}")
    pairs = [] if template.parser is None else template.parser.pairs
    if kind == "thinking" and not pairs:
        return None
    session, episode = Session("drift", policy, templates), Episode()
    history: list[dict] = []

    async def ask(text: str) -> dict:
        policy.text = text
        call = Call(messages=tuple(history), tools=tuple(tools))
        exchange = session.open(call, repr((len(episode.requests), history)).encode())
        message = (await exchange.reply()).choices[0].message
        exchange.deliver()
        episode.requests.append((list(history), tools, policy.sampled[-1][1]))
        history.append(message)
        return message

    for turn in range(TURNS):
        if kind == "calls" and turn:
            ident = history[-1]["tool_calls"][0]["id"]
            history.append({"role": "tool", "tool_call_id": ident, "content": words(draw, 20)})
        elif kind == "compaction" and turn == TURNS // 2:
            history[:] = [{"role": "user", "content": f"What was said so far, in short: {words(draw, 12)}"}]
        else:
            history.append({"role": "user", "content": words(draw, 25)})
        if kind == "thinking":
            [begun] = template.render_batch([history])
            opened = template.codec.decode([begun.ids])[0].rstrip().endswith(pairs[0].open.strip())
            head = "" if opened else pairs[0].open.strip() + "\n"
            told = f"{head}{words(draw, 40)}\n{pairs[0].close.strip()}\n\n{words(draw, 20)}"
            if not (await ask(told)).get("reasoning_content"):
                return None
        elif kind == "calls" and turn < TURNS - 1:
            arguments = {"city": words(draw, 2), "days": draw.randrange(9)}
            text = called(template, tokenizer, arguments)
            if text is None:
                return None
            message = await ask(text)
            if len(message.get("tool_calls") or ()) != 1:
                return None
        else:
            await ask(words(draw, 20))
    ledger = session.transcript()
    assert ledger is not None
    episode.session = session
    episode.ours = {
        "sequences": len(ledger.sequences),
        "tokens": sum(len(branch.tokens) for branch in ledger.sequences),
        "sampled": sum(int(branch.mask.sum()) for branch in ledger.sequences),
    }
    return episode


def as_template(messages: Sequence[dict]) -> list[dict]:
    """Messages in the form that templates read: arguments as objects, ids of nine letters."""
    names: dict[str, str] = {}
    found = []
    for message in messages:
        plain = {key: value for key, value in message.items() if value is not None}
        plain.setdefault("content", "")
        if calls := message.get("tool_calls"):
            for call in calls:
                names[call["id"]] = f"call{len(names):05d}"
            plain["tool_calls"] = [
                {
                    "id": names[call["id"]],
                    "type": "function",
                    "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])},
                }
                for call in calls
            ]
        if message["role"] == "tool":
            plain |= {"tool_call_id": names[message["tool_call_id"]], "name": "weather"}
        found.append(plain)
    return found


def rendered(tokenizer: Any, episode: Episode) -> list[tuple[list[int], list[int]]]:
    """The same calls as a capture server sees them: prompts rendered anew, and what was sampled."""
    return [
        (
            tokenizer.apply_chat_template(
                as_template(messages),
                tools=tools or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            ),
            sampled,
        )
        for messages, tools, sampled in episode.requests
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three templates")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--templates", nargs="+", default=list(TEMPLATES), metavar="NAME")
    parser.add_argument("--openenv", type=Path, default=ROOT / ".openenv/010/bin/python", metavar="PYTHON")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    if not (SHARED / "corpus").exists():
        sys.exit(f"there is no corpus below {SHARED}: set TORCHRL_CHAT_SHARED.")
    if not given.openenv.exists():
        print(f"{given.openenv} is not there ('make peers' makes it): only ours is counted.", file=sys.stderr)
    rows: dict[str, dict[str, Any]] = {}
    for name in given.templates[: 3 if given.quick else None]:
        tokenizer = load(name)
        templates = Templates(tokenizer)
        played = {kind: asyncio.run(play(name, tokenizer, templates, kind)) for kind in EPISODES}
        there = {kind: episode for kind, episode in played.items() if episode is not None}
        rows[name] = {kind: {"ours": episode.ours, "openenv": None} for kind, episode in there.items()}
        if given.openenv.exists():
            material = json.dumps([rendered(tokenizer, episode) for episode in there.values()])
            run = subprocess.run(
                [given.openenv, "-c", GRAPH], input=material, capture_output=True, text=True, check=True
            )
            for kind, theirs in zip(there, json.loads(run.stdout), strict=True):
                rows[name][kind]["openenv"] = theirs
        if not given.json:
            show(name, rows[name], first=len(rows) == 1)
    if given.json:
        print(json.dumps({"turns": TURNS, "templates": rows}))


def show(name: str, row: dict[str, Any], first: bool) -> None:
    if first:
        print(f"{'sequences, ours / OpenEnv (tokens)':42}" + "".join(f"{kind:>16}" for kind in EPISODES))
    cells = []
    for kind in EPISODES:
        if kind not in row:
            cells.append("-")
            continue
        ours, theirs = row[kind]["ours"], row[kind]["openenv"]
        cells.append(
            f"{ours['sequences']}"
            if theirs is None
            else f"{ours['sequences']} / {theirs['sequences']} ({theirs['tokens'] / ours['tokens']:.1f}x)"
        )
    print(f"{name:42}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
