"""What the output head of a training step takes, in memory and time, when it sees some hidden states at a time.

``sequence_log_probs`` and ``policy_loss``, forward and backward, in ways that differ in the head only:

- **chunks**: ours, the logits of a chunk of the scored tokens at a time, forward and once more for the gradient;
- **scored**: all logits of the scored tokens at once, the softmax in chunks (what scoring does where chunks are not right);
- **build**: another checkout of this project (``--build``), its defaults;
- **naive**: all logits of all tokens, ``log_softmax`` in float32, autograd;
- **body**: no head at all, which is what none can do without.

Two subjects: **head**, a body of one narrow layer under the head of Qwen2.5-0.5B (151,936 x 896) on 8 rows of 512 tokens, three
quarters of them scored; and **step**, SmolLM2-135M as it is on 2 rows of 512 (``--smollm2``), there also with activations that
are recomputed (**checkpointing**).

Each measurement is a process of its own, in which glibc gives back what is freed (``MALLOC_MMAP_THRESHOLD_``): the ways in turn,
``--repeats`` times, medians. Memory is the peak of resident memory in a step above the loaded model, its proof made; the
gradients of all weights are in it. Behind it stands what is above the body's.

    python benchmarks/learner.py [--subjects head step] [--smollm2 FOLDER] [--build CHECKOUT] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

HEADS = ("chunks", "scored", "build", "naive", "body")
WAYS = {"head": HEADS, "step": ("checkpointing", *HEADS)}


# ------------------------------------------------------------------ in a process of its own
def load(subject: str, args: dict[str, Any]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A model, ids (B, T), and which of them are scored."""
    import transformers
    from transformers import AutoModelForCausalLM, Qwen2Config

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    if subject == "head":
        config = Qwen2Config(
            vocab_size=args["vocabulary"], hidden_size=896, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        model, rows = AutoModelForCausalLM.from_config(config).float().eval(), args["rows"]
    else:
        model, rows = AutoModelForCausalLM.from_pretrained(args["smollm2"], dtype=torch.float32).eval(), 2
    ids = torch.randint(5, model.config.vocab_size, (rows, args["length"]))
    return model, ids, (torch.arange(args["length"]) >= args["length"] // 4).expand(rows, -1)


def step(way: str, model: Any, ids: torch.Tensor, scored: torch.Tensor) -> float:
    """One pass and its gradient; the sum of the log-probs."""
    from torchrl_chat.training import policy_loss, sequence_log_probs

    advantage = torch.ones(len(ids))
    if way == "body":
        model.base_model(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()
        return 0.0
    if way == "naive":
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        log_probs = torch.nn.functional.pad(logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0], (1, 0))
        del logits
    else:
        log_probs = sequence_log_probs(model, view_of(ids, scored)).log_probs
    loss, _ = policy_loss(log_probs, log_probs.detach(), advantage, scored)
    loss.backward()
    return float(log_probs.detach()[scored].sum())


def view_of(ids: torch.Tensor, scored: torch.Tensor) -> Any:
    """A padded training view without padding."""
    from tensordict import TensorDict
    from torchrl.modules.llm.policies import Masks, Tokens

    real = torch.ones_like(scored)
    return TensorDict(
        tokens=Tokens(full=ids, batch_size=len(ids)),
        masks=Masks(all_assistant_mask=scored, all_attention_mask=real, batch_size=len(ids)),
        position_ids=torch.arange(ids.shape[1]).expand_as(ids),
        batch_size=len(ids),
    )


def resident(field: str) -> float:
    """MiB. Not ``ru_maxrss``, in which a process starts with the peak of its parent."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def measured(subject: str, way: str, args: dict[str, Any]) -> dict[str, float]:
    """One step of one way."""
    warnings.filterwarnings("ignore")
    model, ids, scored = load(subject, args)
    if way == "checkpointing":
        from torchrl_chat.learner import recompute_activations

        recompute_activations(model)
    if way in ("chunks", "checkpointing", "scored"):
        from torchrl_chat.models.proof import Prover, prover_of

        if way == "scored":
            Prover.chunking = lambda self: False
        prover = prover_of(model)  # made once a model, and no part of a step
        prover.scoring(), prover.chunking()
    sum(float(weight.sum()) for weight in model.parameters())  # weights are read from the file where they are used
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start, cpu = time.perf_counter(), time.process_time()
    total = step(way, model, ids, scored)
    took = {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - cpu}
    weights = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return {
        **took,
        "MiB": resident("VmHWM") - before,
        "log-probs": total,
        "norm": float(torch.stack([weight.norm() for weight in weights]).norm()),
    }


# ------------------------------------------------------------------ beside each other
def child(subject: str, way: str, args: dict[str, Any], build: str | None) -> dict[str, float]:
    """What a way measures, in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    if way == "build":
        environment["PYTHONPATH"] = str(build)
    asked = json.dumps({"subject": subject, "way": way, "args": args})
    done = subprocess.run(
        [sys.executable, __file__, "--child", asked], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{subject}, {way}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(subject: str, args: dict[str, Any], repeats: int, build: str | None) -> dict[str, dict[str, float]]:
    """Each way of a subject, in turn."""
    ways = [way for way in WAYS[subject] if way != "build" or build]
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            runs[way].append(child(subject, way, args, build))
    found = {
        way: {key: statistics.median(run[key] for run in several) for key in several[0]}
        for way, several in runs.items()
    }
    for way, row in found.items():
        for key in ("log-probs", "norm"):
            if way != "body" and abs(row[key] - found["naive"][key]) > 1e-3 * abs(found["naive"][key]):
                raise RuntimeError(
                    f"{subject}, {way}: {key} is {row[key]}, and {found['naive'][key]} of all logits."
                )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--subjects", nargs="+", default=None, choices=WAYS, help="default: head, and step with --smollm2"
    )
    parser.add_argument("--smollm2", metavar="FOLDER", help="what ../shared/models/make_smollm2.py made")
    parser.add_argument(
        "--build", metavar="CHECKOUT", help="another checkout of this project, with the same environment"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each way (default 3)")
    parser.add_argument(
        "--quick", action="store_true", help="less than half of the vocabulary, 2 rows, one measurement; no step"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        given = json.loads(asked.child)
        print(json.dumps(measured(given["subject"], given["way"], given["args"])))
        return
    args = {"vocabulary": 151_936, "rows": 8, "length": 512, "smollm2": asked.smollm2}
    if asked.quick:
        args |= {"vocabulary": 60_000, "rows": 2}
        asked.repeats = 1
    subjects = asked.subjects or (["head", "step"] if asked.smollm2 and not asked.quick else ["head"])
    if "step" in subjects and not asked.smollm2:
        parser.error("the subject 'step' needs --smollm2 FOLDER.")
    result = {subject: compared(subject, args, asked.repeats, asked.build) for subject in subjects}
    if asked.json:
        print(json.dumps({"threads": torch.get_num_threads(), "repeats": asked.repeats, "subjects": result}))
        return
    print(f"{torch.get_num_threads()} thread(s), float32, medians of {asked.repeats}; forward and backward")
    for subject, table in result.items():
        print(f"\n{subject:16s}{'MiB':>9s}{'above':>9s}{'s':>9s}{'CPU s':>9s}")
        for way, row in table.items():
            above = row["MiB"] - table["body"]["MiB"]
            print(f"  {way:14s}{row['MiB']:9,.0f}{above:9,.0f}{row['seconds']:9.2f}{row['CPU seconds']:9.2f}")


if __name__ == "__main__":
    main()
