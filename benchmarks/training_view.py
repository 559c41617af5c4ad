"""What it costs to turn finished conversations into what a loss eats, and how much memory their log-probs take.

    python benchmarks/training_view.py [--rows 512] [--turns 4] [--json]

Reports the time of ``training_view`` in each layout, for the finished rows and for a whole batch of steps as torchrl's
``LLMCollector`` yields it; and, for a model with a vocabulary of 50,000, the memory that log-probs with gradients need
above the model's own, by ``sequence_log_probs`` and by the logits of every token.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack

from torchrl_chat import Transcript, columns
from torchrl_chat.training import sequence_log_probs, training_view

LAYOUTS = {
    "ragged": {},
    "padded": {"layout": "padded"},
    "packed": {"layout": "packed"},
    "packed, 8,192 a row": {"layout": "packed", "max_tokens": 8192},
}


def ledgers(rows: int, turns: int) -> list[list[Transcript]]:
    """Conversations with about 156 sampled tokens a turn, as they are after each turn."""
    draw = torch.Generator().manual_seed(0)
    after: list[list[Transcript]] = [[] for _ in range(turns)]
    for _ in range(rows):
        t = Transcript.start(range(26), ({"role": "user", "content": "?"},))
        for turn in range(turns):
            count = 136 + int(torch.randint(40, (), generator=draw))
            ids = torch.randint(500, (count,), generator=draw)
            scores = -torch.rand(count, generator=draw)
            t = t.sampled(ids, scores, {"role": "assistant", "content": "!"}, ended=True, close=[3])
            if turn < turns - 1:
                t = t.appended(range(26), [{"role": "user", "content": "?"}])
            after[turn].append(t)
    return after


def batch(transcripts: list[Transcript], done: bool) -> TensorDict:
    """The rows that a step wrote."""
    size = torch.Size([len(transcripts)])
    return TensorDict(
        {
            "transcript": columns.objects(transcripts, size, None),
            "query": columns.objects([f"question {i // 8}" for i in range(len(transcripts))], size, None),
            "answer": columns.objects(["42"] * len(transcripts), size, None),
            "reward": torch.zeros(*size, 1, 1),
            "done": torch.full((*size, 1), done),
        },
        batch_size=size,
    )


def milliseconds(call: Callable[[], object], repeats: int = 15) -> float:
    """The median of a few calls."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def memory(way: str) -> float:
    """MiB that one forward and backward pass takes, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--memory", way], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_memory(way: str) -> None:
    """Print the growth of this process's peak memory, MiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50_000, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    view = training_view(batch(ledgers(16, 1)[0], True), layout="padded")
    model(input_ids=view["tokens"].full[:1, :8]).logits.sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way == "ours":
        log_probs = sequence_log_probs(model, view, chunk=256).log_probs
    else:
        ids = view["tokens"].full
        logits = model(input_ids=ids, attention_mask=view["masks"].all_attention_mask.long()).logits
        log_probs = logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    log_probs.sum().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", choices=["ours", "all logits"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.memory)
        return
    after = ledgers(arguments.rows, arguments.turns)
    finished = batch(after[-1], True)
    steps: list[TensorDictBase] = []
    for turn, transcripts in enumerate(after):
        root = batch(transcripts, False).select("query", "answer", "done")
        steps.append(root.set("next", batch(transcripts, turn == arguments.turns - 1)))
    rollout = lazy_stack(steps, 1)
    result = {
        "tokens": sum(map(len, after[-1])),
        "milliseconds": {
            name: {
                "finished rows": milliseconds(lambda options=options: training_view(finished, **options)),
                "collector batch": milliseconds(lambda options=options: training_view(rollout, **options)),
            }
            for name, options in LAYOUTS.items()
        },
        "MiB": {way: memory(way) for way in ("ours", "all logits")},
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{arguments.rows} conversations, {arguments.turns} turns, {result['tokens']:,} tokens")
    print(f"{'layout':<22}{'finished rows':>16}{'collector batch':>18}")
    for name, times in result["milliseconds"].items():
        print(f"{name:<22}{times['finished rows']:>13.1f} ms{times['collector batch']:>15.1f} ms")
    print(
        "log-probs of 16 answers, forward and backward: "
        + ", ".join(f"{k} {v:,.0f} MiB" for k, v in result["MiB"].items())
    )


if __name__ == "__main__":
    main()
