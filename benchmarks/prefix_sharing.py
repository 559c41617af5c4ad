"""What it saves that sequences which begin alike go through a model as trees, and what the proof of a model costs.

Two batches that GRPO trains on: a **group**, eight answers to a question of GSM8K behind an eight-shot prompt; and a **branching**
conversation of eight turns, whose template strips the reasoning of earlier turns, so that each turn is a sequence of its own.
The answers are GSM8K's own solutions, played by a scripted policy: who wrote them changes nothing here. Two models: SmolLM2-135M
as it is, and one of Qwen2.5-0.5B's widths with random weights and a few layers, whose vocabulary is large and whose body is
not, so that what sharing cannot save (the logits of each trained token) weighs most.

``sequence_log_probs`` and ``policy_loss``, forward and backward, on the same sequences in three layouts: rows padded on the right,
packed rows (two of the longest sequence to a row), and trees.

- Time: the layouts in turn, medians; and the same in CPU time, for where others use the machine, too.
- Memory: the peak of resident memory above the loaded model, each layout in a process of its own, in which glibc gives back
  what is freed (``MALLOC_MMAP_THRESHOLD_``): it keeps it otherwise, and the figure says little.
- Equality: log-probs, and the norm of the difference of the whole gradient to that of the padded rows, over the norm of that.
- The proof: every check that sampling, scoring, packing and sharing ask for, once a model, beside the first and second
  training step on the group's tree, optimizer included.

    python ../shared/models/make_smollm2.py FOLDER
    python benchmarks/prefix_sharing.py --smollm2 FOLDER [--quick] [--json] [--models ...] [--batches ...] [--repeats 3]

GSM8K lies in the shared folder (``TORCHRL_CHAT_SHARED``, default ``../shared``). With the whole prompt the padded group is eight
rows of 1,047 tokens: give it a machine of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from tensordict import TensorDict
from torchrl.modules.llm.policies import LogProbs, Tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from torchrl_chat import ChatEnv, columns, training_view
from torchrl_chat.models.proof import prover_of
from torchrl_chat.training import policy_loss, sequence_log_probs

LAYOUTS = ("padded", "packed", "tree")
MOST = 1e-4
"""What gradients may differ by, relative to their norm: sums in another order."""
QWEN = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e6,
}  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(name: str, smollm2: str, layers: int | None) -> Any:
    """A model in float32, in ``eval()``."""
    transformers.logging.set_verbosity_error()  # it tells of layers that are left out on purpose
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    if name == "smollm2":
        config = AutoConfig.from_pretrained(smollm2)
        config.num_hidden_layers = layers or config.num_hidden_layers
        return AutoModelForCausalLM.from_pretrained(smollm2, config=config, dtype=torch.float32).eval()
    return AutoModelForCausalLM.from_config(Qwen2Config(**QWEN, num_hidden_layers=layers)).float().eval()


# ---------------------------------------------------------------------- batches
def gsm8k(split: str) -> list[tuple[str, str]]:
    """Questions and solutions, without the notes of the calculator in these."""
    path = Path(os.environ.get("TORCHRL_CHAT_SHARED", "../shared")) / f"data/gsm8k/{split}.jsonl"
    rows = map(json.loads, path.read_text().splitlines())
    return [(row["question"], re.sub("<<.*?>>", "", row["answer"])) for row in rows]


def played(env: ChatEnv, td: TensorDict, turns: list[list[str]], questions: list[str]) -> TensorDict:
    """The rows after each of them has said an answer a turn."""
    stop = env.template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for turn, answers in enumerate(turns):
        ids = [torch.tensor([*row, stop]) for row in env.template.codec.encode_continuation(answers)]
        scores = [torch.full((len(row),), -1.0) for row in ids]
        td["tokens"] = columns.ragged(Tokens, "response", ids, td.batch_size, None)
        td["log_probs"] = columns.ragged(LogProbs, "response", scores, td.batch_size, None)
        td = env.step_mdp(env.step(td))
        if turn < len(turns) - 1:
            td = env.append_messages(td, [questions[turn]] * len(answers))
    return td


def group(tokenizer: Any, shots: int) -> TensorDict:
    """A group of eight behind a prompt of so many examples; of 300 characters at most, as those of the usual prompt are."""
    examples = [(q, a) for q, a in gsm8k("train") if len(q + a) < 300][:shots]
    test = gsm8k("test")
    said = [
        {"role": role, "content": text}
        for pair in examples
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    env = ChatEnv(input_mode="tokens", tokenizer=tokenizer, batch_size=(8,))
    td = env.reset(TensorDict(batch_size=(8,), query=[[*said, {"role": "user", "content": test[0][0]}]] * 8))
    return played(env, td, [[answer for _, answer in test[:8]]], [])


def branching(tokenizer: Any, turns: int) -> TensorDict:
    """One conversation, a question and a reasoned answer a turn."""
    rows = gsm8k("test")[:turns]
    tokenizer.chat_template = CHATML
    env = ChatEnv(input_mode="tokens", tokenizer=tokenizer, batch_size=(1,), history_policy="template")
    answers = ["<think>\n{}\n</think>\n\n{}".format(*answer.split("\n#### ")) for _, answer in rows]
    td = env.reset(TensorDict(query=[rows[0][0]], batch_size=(1,)))
    return played(env, td, [[answer] for answer in answers], [question for question, _ in rows[1:]])


def views(finished: TensorDict) -> dict[str, TensorDict]:
    """The same sequences in each layout."""
    padded = training_view(finished, layout="padded", group=None)
    width = padded["tokens"].full.shape[1]
    made = {
        "padded": padded,
        "packed": training_view(finished, layout="packed", group=None, max_tokens=2 * width),
        "tree": training_view(finished, layout="tree", group=None),
    }
    fields = ("tokens", "masks", "position_ids", "sequence_ids", "parents", "ends")
    return {name: view.select(*fields, strict=False) for name, view in made.items()}


# -------------------------------------------------------------------- measuring
def step(model: Any, view: TensorDict, count: int) -> torch.Tensor:
    """Forward and backward, as in GRPO; the log-probs, sequence by sequence."""
    advantage = torch.randn(count, generator=torch.Generator().manual_seed(0))
    scores = sequence_log_probs(model, view)
    sequences = view.get("sequence_ids", None)
    old = scores.log_probs.detach()
    loss, _ = policy_loss(scores.log_probs, old, advantage, scores.mask, sequences=sequences)
    loss.backward()
    if sequences is None:
        return old[scores.mask]
    where = sequences[scores.mask] * scores.mask.numel() + view["position_ids"][scores.mask]
    return old[scores.mask][where.argsort()]


def peak(loaded: tuple[str, str, int | None], view: TensorDict, count: int) -> float:
    """MiB that this process takes at most for one step, above the loaded model."""
    warnings.filterwarnings("ignore")
    model = load(*loaded)
    prover = prover_of(model)  # done once a model, and no part of a step
    prover.scoring(), prover.packing(), prover.sharing()
    sum(float(weight.sum()) for weight in model.parameters())  # weights are read from the file where they are used
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step(model, view, count)
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """KiB. Not ``ru_maxrss``, in which a process starts with the peak of its parent."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def apart(function: Callable[..., float], *args: Any) -> float:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *args).result()


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def proof(model: Any, view: TensorDict, count: int) -> dict[str, float]:
    """Seconds of the proof, and of training steps behind it."""

    def prove() -> None:
        prover = prover_of(model)
        prover.sampling(), prover.scoring(), prover.packing(), prover.sharing()

    def train() -> None:
        step(model, view, count)
        optimizer.step()
        optimizer.zero_grad()

    weights = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    found = {"proof": seconds(prove), "first step": seconds(train)}
    found |= {"proof, again": seconds(prove), "second step": seconds(train)}
    with torch.no_grad():
        for weight, kept in zip(model.parameters(), weights, strict=True):
            weight.copy_(kept)
    return {**found, "proof / first step": found["proof"] / found["first step"]}


def compared(model: Any, laid: dict[str, TensorDict], count: int, repeats: int) -> dict[str, dict[str, float]]:
    """Tokens, seconds and differences of each layout."""
    forwarded: list[int] = []
    # The body's first layer: what the head sees is no pass over tokens.
    first = model.base_model.layers[0]
    hook = first.register_forward_pre_hook(lambda _module, args: forwarded.append(args[0].shape[:2].numel()))
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in laid}
    found: dict[str, dict[str, float]] = {}
    reference: dict[str, Any] = {}
    for repeat in range(repeats):
        for name, view in laid.items():
            forwarded.clear()
            start, start_cpu = time.perf_counter(), time.process_time()
            log_probs = step(model, view, count)
            spent[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
            if not repeat:
                gradient = [weight.grad.clone() for weight in model.parameters()]
                reference = reference or {"log_probs": log_probs, "gradient": gradient}
                found[name] = {
                    "tokens": sum(forwarded),
                    "log-probs off": float((log_probs - reference["log_probs"]).abs().max()),
                    "gradient off": off(gradient, reference["gradient"]),
                }
                if found[name]["gradient off"] > MOST:
                    raise RuntimeError(f"{name}: the gradient is {found[name]['gradient off']:.2g} off.")
                del gradient
            model.zero_grad(set_to_none=True)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what one step has left would stand beside what the next one takes
    hook.remove()
    for name, times in spent.items():
        found[name]["seconds"], found[name]["CPU seconds"] = map(statistics.median, zip(*times, strict=True))
    return found


def off(gradient: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """The norm of the difference over that of the reference."""

    def norm(parts: Any) -> float:
        return sum(float(part.double().square().sum()) for part in parts) ** 0.5

    return norm(a - b for a, b in zip(gradient, reference, strict=True)) / norm(reference)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Each model on each batch."""
    makers = {"group": (group, args.shots), "branching": (branching, args.turns)}
    made = {}
    for batch, (make, size) in makers.items():
        made[batch] = views(make(AutoTokenizer.from_pretrained(args.smollm2), size))
    layers = {"smollm2": args.smollm2_layers, "qwen2.5 widths": args.qwen_layers}
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "repeats": args.repeats, "models": {}}
    for name in args.models:
        loaded = (name, args.smollm2, layers[name])
        peaks = {
            (batch, layout): apart(peak, loaded, view, len(made[batch]["padded"]))
            for batch in args.batches
            for layout, view in made[batch].items()
        }
        model = load(*loaded)
        entry: dict[str, Any] = {
            "layers": model.config.num_hidden_layers,
            "proof": proof(model, made["group"]["tree"], len(made["group"]["padded"])),
            "batches": {},
        }
        for batch in args.batches:
            laid = made[batch]
            rows = compared(model, laid, len(laid["padded"]), args.repeats)
            for layout, row in rows.items():
                row["MiB"] = peaks[batch, layout]
            keys = ("tokens", "seconds", "CPU seconds", "MiB")
            entry["batches"][batch] = {
                "sequences": len(laid["padded"]),
                "longest": laid["padded"]["tokens"].full.shape[1],
                "trained": int(laid["padded"]["masks"].all_assistant_mask.sum()),
                "layouts": rows,
                "times less in trees": {
                    layout: {key: rows[layout][key] / rows["tree"][key] for key in keys} for layout in LAYOUTS[:2]
                },
            }
        result["models"][name] = entry
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, batches = ("smollm2", "qwen2.5 widths"), ("group", "branching")
    parser.add_argument("--smollm2", required=True, metavar="FOLDER", help="what make_smollm2.py made")
    parser.add_argument("--models", nargs="+", choices=names, help="which (default both; --quick: the first)")
    parser.add_argument("--batches", nargs="+", default=batches, choices=batches, help="which (default both)")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each layout (default 3)")
    parser.add_argument("--qwen-layers", type=int, default=12, help="of the one with Qwen's widths (default 12)")
    parser.add_argument("--quick", action="store_true", help="fewer layers, examples, turns and steps")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args()
    args.models = args.models or (names[:1] if args.quick else names)
    args.shots, args.turns, args.smollm2_layers = 8, 8, None
    if args.quick:
        args.shots, args.turns, args.smollm2_layers, args.qwen_layers, args.repeats = 2, 4, 4, 1, 1
    warnings.filterwarnings("ignore")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"  # of the processes that measure memory; ours has begun without
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['threads']} thread(s), float32, medians of {result['repeats']}; forward and backward")
    for name, entry in result["models"].items():
        print(f"\n{name}, {entry['layers']} layers")
        cost = entry["proof"]
        print(
            f"  the proof {cost['proof']:.2f} s, the first step on the group's tree {cost['first step']:.2f} s: "
            f"{cost['proof / first step']:.2f} of it; again {cost['proof, again'] * 1e3:.2f} ms beside {cost['second step']:.2f} s"
        )
        for batch, table in entry["batches"].items():
            print(
                f"  {batch}: {table['sequences']} sequences of up to {table['longest']} tokens, {table['trained']} trained\n"
                f"    {'':8s}{'tokens':>9s}{'s':>9s}{'CPU s':>9s}{'MiB':>9s}{'log-probs off':>16s}{'gradient off':>15s}"
            )
            for layout, row in table["layouts"].items():
                print(
                    f"    {layout:8s}{row['tokens']:9,d}{row['seconds']:9.2f}{row['CPU seconds']:9.2f}{row['MiB']:9,.0f}"
                    f"{row['log-probs off']:16.1e}{row['gradient off']:15.1e}"
                )
            for layout, ratio in table["times less in trees"].items():
                print(
                    f"    trees against {layout}: {ratio['tokens']:.2f} times fewer tokens, {ratio['seconds']:.2f} times faster "
                    f"({ratio['CPU seconds']:.2f} in CPU time), {ratio['MiB']:.2f} times less memory"
                )


if __name__ == "__main__":
    main()
