"""Turns per second of the environments, beside torchrl's and beside the physical floor.

A scripted policy answers N conversations for a few turns with about 150 sampled tokens each, and a user
message follows every answer. One turn is ``step``, ``step_mdp`` and the new messages. The systems:

- ours in its three modes (exact ids, mask and log-probs in each);
- torchrl's ``ChatEnv`` in history mode, alone, and with its ``IncrementalTokenizer`` (re-rendering, as its
  wrappers hand it no tokens here; inexact either way);
- the floor: the tokenizer's ``encode_batch`` of the same new messages, its ``decode_batch`` of the same
  answers, and one concatenation of prompt, answer and messages a conversation. Nothing can be faster that
  keeps messages and tokens.

    python benchmarks/env_throughput.py [--quick] [--json] [--tokenizer FOLDER]
    python benchmarks/env_throughput.py --build FOLDER        # beside another checkout of this project
    python benchmarks/env_throughput.py --where               # what a turn is made of, in each mode

The second table is the cost of a turn from turn 1 to turn 64, ours. With ``--build`` the environments of two checkouts and the
floor run in processes of their own, in turn, five rounds; the medians are shown, and the turn 64 / turn 1 of history mode.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.envs.llm import ChatEnv as TorchRLChatEnv
from torchrl.envs.llm.transforms import IncrementalTokenizer
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Tokens

from torchrl_chat import columns
from torchrl_chat.envs import ChatEnv
from torchrl_chat.templates import ChatTemplate

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "the",
    "answer",
    "of",
    "this",
    "question",
    "is",
    "found",
    "by",
    "adding",
    "all",
    "numbers",
    "that",
    "we",
    "know",
    "so",
    "far",
    "and",
    "then",
    "we",
    "divide",
    "them",
    "because",
    "every",
    "person",
    "gets",
    "a",
    "fair",
    "share",
    "of",
    "what",
    "was",
    "bought",
    "in",
    "town",
    "on",
    "monday",
    "before",
    "noon",
    "twelve",
    "apples",
    "cost",
    "3.50",
    "dollars",
    "each,",
    "so",
    "12",
    "*",
    "3.50",
    "=",
    "42",
    "and",
    "therefore",
    "Natalia",
    "sold",
    "48",
    "clips",
    "to",
    "her",
    "friends",
    "in",
    "April",
]


def load_tokenizer(folder: str | None):
    """The tokenizer of a folder, with ChatML; by default Qwen2.5's from the shared corpus, or a trained one."""
    from transformers import AutoTokenizer

    shared = Path(os.environ.get("TORCHRL_CHAT_SHARED", "../shared")) / "corpus/tokenizers/qwen2.5"
    if folder or shared.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(folder or shared)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token = "<|im_end|>"
        name = folder or "qwen2.5 (151,643 tokens)"
    else:
        tokenizer, name = train_tokenizer(), "byte-level BPE trained on the spot"
    tokenizer.chat_template = CHATML
    return tokenizer, name


def train_tokenizer():
    """A small byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


class Script:
    """What is said: answers of about ``length`` tokens, user messages of about 26."""

    def __init__(self, tokenizer, rows: int, length: int, seed: int = 0):
        draw = random.Random(seed)

        def text(tokens: int) -> str:
            words: list[str] = []
            while len(tokenizer(" ".join(words))["input_ids"]) < tokens:
                words += draw.choices(WORDS, k=8)
            return " ".join(words)

        self.queries = [text(26) for _ in range(rows)]
        self.users = [text(26) for _ in range(rows)]
        self.answers = [text(draw.randint(length - 20, length + 20)) for _ in range(rows)]
        self.ids = [
            torch.tensor([*tokenizer(a, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
            for a in self.answers
        ]
        self.log_probs = [torch.full((len(ids),), -0.5) for ids in self.ids]
        self.texts = [answer + tokenizer.eos_token for answer in self.answers]


def run_ours(mode: str, tokenizer, script: Script, turns: int) -> list[float]:
    """Seconds of each turn."""
    rows = len(script.queries)
    env = ChatEnv(input_mode=mode, tokenizer=tokenizer, batch_size=(rows,))
    td = env.reset(TensorDict(query=list(script.queries), batch_size=(rows,)))
    return play(env, td, script, mode, turns)


def play(env: ChatEnv, td: TensorDictBase, script: Script, mode: str, turns: int) -> list[float]:
    """Seconds of each turn of conversations that have begun."""
    spent = []
    for _ in range(turns):
        td.set("tokens", columns.ragged(Tokens, "response", script.ids, td.batch_size, None))
        td.set("log_probs", columns.ragged(LogProbs, "response", script.log_probs, td.batch_size, None))
        start = time.perf_counter()
        td = env.append_messages(env.step_mdp(env.step(td)), script.users)
        columns.read_field(td.get(mode), "prompt", td.batch_size)  # as a policy does: columns may be made when read
        spent.append(time.perf_counter() - start)
    return spent


def run_torchrl(tokenizer, script: Script, turns: int, with_tokens: bool) -> list[float]:
    """Seconds of each turn of torchrl's environment in history mode."""
    rows = len(script.queries)
    env = TorchRLChatEnv(input_mode="history", tokenizer=tokenizer, batch_size=(rows,))
    incremental = IncrementalTokenizer(tokenizer, chat_template=CHATML) if with_tokens else None
    td = env.reset(TensorDict(query=list(script.queries), batch_size=(rows,)))
    spent = []
    for _ in range(turns):
        prompts = td["history"].prompt.unbind(0)
        fulls = [
            lazy_stack([*p.unbind(0), History(role="assistant", content=a)])
            for p, a in zip(prompts, script.answers, strict=True)
        ]
        td["history"] = ChatHistory._from_tensordict(TensorDict({"full": lazy_stack(fulls)}, batch_size=(rows,)))
        start = time.perf_counter()
        td = env.step_mdp(env.step(td))
        prompts = [
            lazy_stack([*p.unbind(0), History(role="user", content=u)])
            for p, u in zip(td["history"].prompt.unbind(0), script.users, strict=True)
        ]
        td["history"].prompt = lazy_stack(prompts)
        if incremental is not None:
            td = incremental._reset(td, td)  # tokens of the whole history, as on reset
        spent.append(time.perf_counter() - start)
    return spent


def run_floor(tokenizer, script: Script, turns: int) -> list[float]:
    """Seconds of each turn of the bare tokenizer and one concatenation."""
    backend = tokenizer.backend_tokenizer
    template = ChatTemplate(tokenizer)
    messages = [[{"role": "user", "content": q}] for q in script.queries]
    prompts = [torch.tensor(rendered.ids) for rendered in template.render_batch(messages)]
    said = [[*m, {"role": "assistant", "content": "4"}] for m in messages]
    new = [[{"role": "user", "content": u}] for u in script.users]
    follows = [follow.text for follow in template.follow_batch(said, new)]
    spent = []
    for _ in range(turns):
        start = time.perf_counter()
        texts = backend.decode_batch([row.tolist() for row in script.ids], skip_special_tokens=False)
        encoded = backend.encode_batch_fast(follows, add_special_tokens=False)
        prompts = [
            torch.cat((prompt, ids, torch.tensor(new.ids)))
            for prompt, ids, new in zip(prompts, script.ids, encoded, strict=True)
        ]
        spent.append(time.perf_counter() - start)
        del texts, encoded
    return spent


def measure(args: argparse.Namespace) -> dict:
    """All systems, in turn, several times; medians over the repetitions."""
    tokenizer, name = load_tokenizer(args.tokenizer)
    script = Script(tokenizer, args.rows, args.length)
    systems = {
        "floor": lambda: run_floor(tokenizer, script, args.turns),
        "ours, tokens": lambda: run_ours("tokens", tokenizer, script, args.turns),
        "ours, text": lambda: run_ours("text", tokenizer, script, args.turns),
        "ours, history": lambda: run_ours("history", tokenizer, script, args.turns),
    }
    slow = {
        "torchrl, history": lambda: run_torchrl(tokenizer, script, args.turns, False),
        "torchrl, history + IncrementalTokenizer": lambda: run_torchrl(tokenizer, script, args.turns, True),
    }
    gc.collect()
    gc.freeze()  # the interpreter's own objects; otherwise every system pays for scanning them
    spent: dict[str, list[float]] = {key: [] for key in (*systems, *slow)}
    for key in systems:
        systems[key]()  # warm up
    for repeat in range(args.repeats):
        for key, run in (systems | slow if repeat < args.slow_repeats else systems).items():
            gc.collect()  # no system pays for another's garbage; each pays for its own
            spent[key].append(sum(run()))
    turns = args.rows * args.turns
    rates = {key: turns / statistics.median(values) for key, values in spent.items()}
    growth = {}
    for mode in ("tokens", "text", "history"):
        runs = [run_ours(mode, tokenizer, script, 64) for _ in range(args.growth_repeats)]
        medians = [statistics.median(run[turn] for run in runs) for turn in range(64)]
        # A window of four turns at each end: the buffers double now and then.
        growth[mode] = {
            "turns 1-4, us": statistics.mean(medians[:4]) / args.rows * 1e6,
            "turns 61-64, us": statistics.mean(medians[-4:]) / args.rows * 1e6,
            "turn 64 / turn 1": statistics.mean(medians[-4:]) / statistics.mean(medians[:4]),
        }
    return {
        "tokenizer": name,
        "rows": args.rows,
        "turns": args.turns,
        "sampled tokens a turn": statistics.mean(len(ids) for ids in script.ids),
        "turns per second": rates,
        "times torchrl with tokens": {
            key: rate / rates["torchrl, history + IncrementalTokenizer"] for key, rate in rates.items()
        },
        "share of the floor": {key: rate / rates["floor"] for key, rate in rates.items()},
        "growth": growth,
    }


def stages() -> list[tuple[object, str, str]]:
    """What a turn is made of: the functions whose own time is a stage's, less that of stages within."""
    from torchrl_chat.conversation import transcript
    from torchrl_chat.envs import reading
    from torchrl_chat.templates.codec import TokenCodec

    return [
        (TokenCodec, "encode", "tokenizing what is new"),
        (TokenCodec, "decode", "decoding the answer"),
        (ChatTemplate, "parse_batch", "reading the answer as a message"),
        (ChatTemplate, "follow_batch", "the template's text of what is new"),
        (reading.Reader, "turns", "reading the policy's columns"),
        (transcript.Transcript, "sampled", "writing the ledger"),
        (transcript.Transcript, "appended", "writing the ledger"),
        (ChatEnv, "_observe", "making the columns of the observation"),
        (ChatEnv, "_step", "the rest of step"),
        (ChatEnv, "append_messages", "the rest of append_messages"),
        (ChatEnv, "step", "torchrl's step and step_mdp"),
        (ChatEnv, "step_mdp", "torchrl's step and step_mdp"),
    ]


def where(args: argparse.Namespace) -> dict:
    """Microseconds of a turn by stage, of each mode; the run with the least of several."""
    tokenizer, name = load_tokenizer(args.tokenizer)
    script = Script(tokenizer, args.rows, args.length)
    spent: dict[str, float] = {}
    inside = [0.0]  # seconds of the stages within, for each stage that is open

    def timed(function, stage: str):
        def run(*given, **named):
            inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                passed = time.perf_counter() - start
                spent[stage] = spent.get(stage, 0.0) + passed - inside.pop()
                inside[-1] += passed

        return run

    for owner, function, stage in stages():
        setattr(owner, function, timed(getattr(owner, function), stage))
    found = {}
    for mode in ("tokens", "text", "history"):
        runs = []
        for _ in range(args.repeats + 1):
            rows = len(script.queries)
            env = ChatEnv(input_mode=mode, tokenizer=tokenizer, batch_size=(rows,))
            td = env.reset(TensorDict(query=list(script.queries), batch_size=(rows,)))
            spent.clear()
            gc.collect()
            total = time.perf_counter()
            play(env, td, script, mode, args.turns)
            total = time.perf_counter() - total
            rest = total - sum(spent.values())
            runs.append({**spent, "what policy and benchmark do": rest})
        best = min(runs[1:], key=lambda run: sum(run.values()))
        found[mode] = {stage: value / rows / args.turns * 1e6 for stage, value in best.items()}
    return {"tokenizer": name, "rows": args.rows, "turns": args.turns, "us a turn": found}


class Build:
    """A process with one checkout's environments, which runs what it is asked for and says how long it took."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        given = ["--rows", str(args.rows), "--turns", str(args.turns), "--length", str(args.length), "--serve"]
        given += ["--tokenizer", args.tokenizer] if args.tokenizer else []
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        environment.setdefault("TORCHRL_CHAT_SHARED", "../shared")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *given],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.where = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit("a build's process has ended: see above")
        return line

    def seconds(self, system: str, turns: int) -> list[float]:
        """Seconds of each turn of a system: a mode, or ``floor``."""
        assert self.process.stdin is not None
        print(system, turns, file=self.process.stdin, flush=True)
        return json.loads(self._line())


def serve(args: argparse.Namespace) -> None:
    """Run what is asked for on stdin, a line a run: ``MODE TURNS``."""
    import torchrl_chat

    tokenizer, _ = load_tokenizer(args.tokenizer)
    script = Script(tokenizer, args.rows, args.length)
    run_ours("tokens", tokenizer, script, 2)
    gc.collect()
    gc.freeze()
    print(Path(torchrl_chat.__file__).parent.parent, flush=True)
    for line in sys.stdin:
        system, turns = line.split()
        gc.collect()
        run = run_floor if system == "floor" else functools.partial(run_ours, system)
        print(json.dumps(run(tokenizer, script, int(turns))), flush=True)


def compare(args: argparse.Namespace) -> dict:
    """Two builds and the floor, interleaved."""
    here, there = Build(Path(__file__).parents[1], args), Build(Path(args.build), args)
    if here.where == there.where:
        raise SystemExit(f"--build: {args.build} imports torchrl_chat from {there.where}, which is this checkout")
    modes = ("tokens", "text", "history")
    spent: dict[str, list[float]] = {}
    growth: dict[str, list[float]] = {}
    for _ in range(3 if args.quick else 5):
        spent.setdefault("floor", []).append(sum(here.seconds("floor", args.turns)))
        for mode in modes:
            for name, build in (("this", here), ("that", there)):
                spent.setdefault(f"{mode}, {name} build", []).append(sum(build.seconds(mode, args.turns)))
        for name, build in (("this", here), ("that", there)):
            run = build.seconds("history", 64)
            growth.setdefault(f"{name} build", []).append(statistics.mean(run[-4:]) / statistics.mean(run[:4]))
    turns = args.rows * args.turns
    rates = {key: turns / statistics.median(values) for key, values in spent.items()}
    return {
        "that build": there.where,
        "turns per second": rates,
        "share of the floor": {key: rate / rates["floor"] for key, rate in rates.items()},
        "times that build": {mode: rates[f"{mode}, this build"] / rates[f"{mode}, that build"] for mode in modes},
        "history, turn 64 / turn 1": {key: statistics.median(values) for key, values in growth.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="conversations (default 256)")
    parser.add_argument("--turns", type=int, default=4, help="turns of each (default 4)")
    parser.add_argument("--length", type=int, default=150, help="sampled tokens a turn (default 150)")
    parser.add_argument("--tokenizer", help="folder of a tokenizer")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--build", metavar="FOLDER", help="another checkout, to be measured in the same run")
    parser.add_argument("--where", action="store_true", help="what a turn is made of")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    if args.build:
        result = compare(args)
        print(json.dumps(result) if args.json else json.dumps(result, indent=2))
        return
    args.repeats, args.slow_repeats, args.growth_repeats = (5, 1, 2) if args.quick else (15, 3, 5)
    warnings.filterwarnings("ignore")
    if args.where:
        result = where(args)
        if args.json:
            print(json.dumps(result))
            return
        for mode, stages_of_mode in result["us a turn"].items():
            total = sum(stages_of_mode.values())
            print(f"\n{mode}: {total:.0f} us a turn and conversation")
            for stage, value in sorted(stages_of_mode.items(), key=lambda item: -item[1]):
                print(f"  {stage:38s} {value:6.1f} us {value / total:5.0%}")
        return
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{result['rows']} conversations, {result['turns']} turns, {result['sampled tokens a turn']:.0f} sampled "
        f"tokens a turn; tokenizer: {result['tokenizer']}\n"
    )
    print(f"{'system':42s} {'turns/s':>9s} {'us/turn':>9s} {'x torchrl':>10s} {'of floor':>9s}")
    for key, rate in result["turns per second"].items():
        print(
            f"{key:42s} {rate:9,.0f} {1e6 / rate:9.0f} {result['times torchrl with tokens'][key]:10.1f} "
            f"{result['share of the floor'][key]:9.0%}"
        )
    print(f"\n{'growth, ours':42s} {'turns 1-4':>12s} {'turns 61-64':>12s} {'ratio':>7s}")
    for mode, row in result["growth"].items():
        first, last, ratio = row.values()
        print(f"{mode:42s} {first:9.0f} us {last:9.0f} us {ratio:7.2f}")


if __name__ == "__main__":
    main()
