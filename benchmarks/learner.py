"""What a training step of GRPO takes, in memory and time, beside all logits at once, another build, torchrl and TRL.

Log-probs, GRPO's loss at the first update, its gradient and (but for the head's subjects) a step of AdamW, of the same model and
the same batch, in these ways:

- **ours**: ``sequence_log_probs`` with the loss beside the log-probs, what rows begin with alike shared, as the recipes do it;
- **checkpointing**: the same, with activations that are computed again;
- **two passes**: the loss behind the log-probs, for which the head makes its logits twice (heads only);
- **build**: another checkout of this project (``--build``), its defaults;
- **naive**: all logits of padded rows, ``log_softmax``, autograd;
- **torchrl**: its ``GRPOLoss`` over its ``TransformersWrapper``;
- **trl**, **trl plain**: ``GRPOTrainer.training_step`` as it is, and without checkpointing (``--trl``, a Python that has it);
- **body**: no head at all (heads only).

Subjects: **smollm2 head** and **qwen head**, a body of one narrow layer under heads of 49,152 x 576 and 151,936 x 896, on 8 rows of 512
tokens, three quarters of them answers; **smollm2**, SmolLM2-135M as it is (``--smollm2``), and **qwen**, 4 layers of the shape of
Qwen2.5-0.5B, on a group of answers to one prompt, of different lengths as answers are (``--equal``: all as long as the longest).

Each measurement is a process of its own, in which glibc gives back what is freed (``MALLOC_MMAP_THRESHOLD_``): the ways in turn,
``--repeats`` times, medians. MiB are the peak of resident memory above the loaded model, its gradients and the optimizer's
states; a model's proof is made before.

    python benchmarks/learner.py [--subjects ...] [--smollm2 FOLDER] [--build CHECKOUT] [--trl PYTHON] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

HEADS = ("ours", "two passes", "build", "naive", "body")
STEPS = ("ours", "checkpointing", "build", "naive", "torchrl", "trl", "trl plain")
SUBJECTS = {"smollm2 head": HEADS, "qwen head": HEADS, "smollm2": STEPS, "qwen": STEPS}
OF_THE_HEAD = ("smollm2 head", "qwen head")


# ------------------------------------------------------------------ in a process of its own
def load(subject: str, args: dict[str, Any]) -> Any:
    """A model, float32."""
    import transformers
    from transformers import AutoModelForCausalLM, Qwen2Config

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    if subject == "smollm2":
        return AutoModelForCausalLM.from_pretrained(args["smollm2"], dtype=torch.float32)
    small = subject == "smollm2 head"
    shape = (
        {"intermediate_size": 4864, "num_hidden_layers": 4}
        if subject == "qwen"
        else {"intermediate_size": 128, "num_hidden_layers": 1}
    )
    config = Qwen2Config(
        vocab_size=49_152 if small else args["vocabulary"], hidden_size=576 if small else 896, tie_word_embeddings=True,
        num_attention_heads=9 if small else 14, num_key_value_heads=3 if small else 2, **shape,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float()


def batch_of(
    subject: str, args: dict[str, Any], vocabulary: int
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The ids of a prompt, those of its answers, and the advantage of each answer."""
    draw = torch.Generator().manual_seed(0)
    length = args["length"]
    count = args["rows"] if subject in OF_THE_HEAD else args["group"]
    longest = length - length // 4
    # From a third of the longest on: evenly apart, and so without a lucky draw.
    least = longest if args["equal"] or subject in OF_THE_HEAD else longest // 3
    lengths = torch.linspace(longest, least, count).round().int().tolist()
    prompt = torch.randint(5, vocabulary, (length // 4,), generator=draw)
    return (
        prompt,
        [torch.randint(5, vocabulary, (n,), generator=draw) for n in lengths],
        torch.randn(count, generator=draw),
    )


def view_of(prompt: torch.Tensor, answers: list[torch.Tensor]) -> Any:
    """A padded training view."""
    from tensordict import TensorDict
    from torch.nn.utils.rnn import pad_sequence
    from torchrl.modules.llm.policies import Masks, Tokens

    rows = [torch.cat((prompt, answer)) for answer in answers]
    ids = pad_sequence(rows, batch_first=True)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    real = places < torch.tensor([len(row) for row in rows])[:, None]
    return TensorDict(
        tokens=Tokens(full=ids, batch_size=len(ids)),
        masks=Masks(
            all_assistant_mask=real & (places >= len(prompt)), all_attention_mask=real, batch_size=len(ids)
        ),
        position_ids=places * real,
        batch_size=len(ids),
    )


class Way:
    """How a step's gradient is found; it returns the sum of the log-probs of all answers."""

    def __init__(self, way: str, subject: str, model: Any, args: dict[str, Any]):
        self.way, self.model = way, model
        self.prompt, self.answers, self.advantage = batch_of(subject, args, model.config.vocab_size)
        self.run = {"trl": self.trl, "trl plain": self.trl, "body": self.body, "naive": self.naive,
                    "torchrl": self.torchrl, "build": self.behind, "two passes": self.behind}.get(way, self.ours)  # fmt: skip
        if way.startswith("trl"):
            self.trainer = self._trainer()
        elif way in ("ours", "checkpointing", "two passes"):
            from torchrl_chat.models.proof import prover_of

            if way == "checkpointing":
                from torchrl_chat.learner import recompute_activations

                recompute_activations(model)
            prover = prover_of(model)  # made once a model, and no part of a step
            prover.scoring(), prover.chunking(), prover.sharing()
        if way in ("ours", "checkpointing", "two passes", "build", "naive", "torchrl"):
            self.view = view_of(self.prompt, self.answers)
            self.mask = self.view["masks"].all_assistant_mask
            self.own = self.advantage[:, None].expand(self.mask.shape)

    def ours(self) -> float:
        """The loss beside the log-probs."""
        from torchrl_chat.training import policy_loss, sequence_log_probs, token_shares

        shares = token_shares(self.mask, "sequence").flatten()

        def loss(scores: Any, at: torch.Tensor) -> torch.Tensor:
            now = scores.log_probs[None]
            some, weights = torch.ones_like(now, dtype=torch.bool), shares[at][None]
            return policy_loss(
                now, now.detach(), self.own.flatten()[at][None], some, weights=weights, denominator=1.0
            )[0]

        scores = sequence_log_probs(self.model, self.view, entropy=True, share_prefixes=True, loss=loss)
        assert scores.loss is not None
        scores.loss.backward()
        return float(scores.log_probs.sum())

    def behind(self) -> float:
        """The loss behind the log-probs."""
        from torchrl_chat.training import sequence_log_probs

        return self._of(sequence_log_probs(self.model, self.view, entropy=True).log_probs)

    def naive(self) -> float:
        """All logits."""
        real = self.view["masks"].all_attention_mask
        ids = self.view["tokens"].full
        logits = self.model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[:, :-1].float()
        log_probs = torch.nn.functional.pad(logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0], (1, 0))
        del logits
        return self._of(log_probs)

    def _of(self, log_probs: torch.Tensor) -> float:
        from torchrl_chat.training import policy_loss

        policy_loss(log_probs, log_probs.detach(), self.own, self.mask, aggregation="sequence")[0].backward()
        return float(log_probs.detach()[self.mask].sum())

    def body(self) -> float:
        """No head."""
        output = self.model.base_model(input_ids=self.view_ids(), use_cache=False)
        output.last_hidden_state.square().mean().backward()
        return 0.0

    def view_ids(self) -> torch.Tensor:
        """Rows of one length."""
        return torch.stack([torch.cat((self.prompt, answer)) for answer in self.answers])

    def torchrl(self) -> float:
        """Its loss over its wrapper, which tokenizes nothing here."""
        from tensordict import TensorDict
        from torchrl.modules.llm import TransformersWrapper
        from torchrl.modules.llm.policies import LogProbs
        from torchrl.objectives.llm.grpo import GRPOLoss

        from torchrl_chat.tiny import tiny_tokenizer

        tokenizer = tiny_tokenizer()  # asked for its padding only
        wrapper = TransformersWrapper(
            self.model,
            tokenizer=tokenizer,
            generate=False,
            return_log_probs=True,
            input_mode="tokens",
            pad_output=True,
        )
        with torch.no_grad():  # the old log-probs are what the loss computes: the ratio is 1
            view = self.view.clone()
            view["log_probs"] = LogProbs(full=torch.zeros(self.mask.shape), batch_size=len(view))
        view["advantage"] = self.advantage.reshape(-1, 1, 1)
        seen: list[torch.Tensor] = []
        loss = GRPOLoss(
            wrapper, masking_strategy="rlhf", aggregation="prompt_mean", entropy_bonus=True, entropy_coeff=0.0
        )
        given = loss._log_weight

        def log_weight(*args: Any, **options: Any) -> Any:
            result = given(*args, **options)
            weight, *others = result
            now = weight + torch.zeros_like(weight)
            seen.append(now.detach())
            return (weight - weight.detach(), *others)

        loss._log_weight = log_weight
        output: TensorDict = loss(view)
        output.get("loss_objective").sum().backward()
        return float(seen[0][..., 0][self.mask].sum() if seen[0].ndim == 3 else seen[0][self.mask].sum())

    def _trainer(self) -> Any:
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        config = GRPOConfig(
            output_dir=tempfile.mkdtemp(), report_to=[], loss_type="grpo", beta=0.0, use_cpu=True, bf16=False,
            per_device_train_batch_size=len(self.answers), num_generations=len(self.answers), steps_per_generation=2,
            gradient_accumulation_steps=1, gradient_checkpointing=self.way == "trl", max_completion_length=8,
        )  # fmt: skip
        trainer = GRPOTrainer(
            self.model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * len(self.answers)}),
            processing_class=AutoTokenizer.from_pretrained(os.environ["TOKENIZER"]),
        )  # fmt: skip
        if config.gradient_checkpointing:  # as its training loop does before the first step
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=config.gradient_checkpointing_kwargs
            )
        ids = torch.nn.utils.rnn.pad_sequence(self.answers, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(answer) for answer in self.answers])[:, None]
        prompts = self.prompt.expand(len(self.answers), -1)
        batch = {
            "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": ids,
            "completion_mask": mask.long(), "advantages": self.advantage, "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        trainer._buffered_inputs, trainer._step = [batch] * 2, 1  # it samples when this is a multiple of 2
        trainer.current_gradient_accumulation_steps = 1
        given, self.seen = trainer._get_per_token_logps_and_entropies, list[float]()

        def watched(*args: Any, **options: Any) -> Any:
            result = given(*args, **options)
            self.seen.append(float((result[0].detach() * mask).sum()))
            return result

        trainer._get_per_token_logps_and_entropies = watched
        return trainer

    def trl(self) -> float:
        """Its training step."""
        self.trainer.training_step(self.model, None, None)
        return self.seen[0]


def resident(field: str) -> float:
    """MiB. Not ``ru_maxrss``, in which a process starts with the peak of its parent."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def measured(subject: str, way: str, args: dict[str, Any]) -> dict[str, float]:
    """One step of one way."""
    warnings.filterwarnings("ignore")
    model = load(subject, args).train()
    step = Way(way, subject, model, args)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = None
    if subject not in OF_THE_HEAD:
        optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()  # its states are there
        optimizer.zero_grad(set_to_none=True)
    sum(float(weight.sum()) for weight in weights)  # weights are read from the file where they are used
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start, cpu = time.perf_counter(), time.process_time()
    total = step.run()
    if optimizer is not None:
        optimizer.step()
    took = {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - cpu}
    peak = resident("VmHWM") - before
    found = [weight.grad for weight in weights if weight.grad is not None]
    size = 0 if subject in OF_THE_HEAD else sum(grad.numel() * 4 for grad in found) / 2**20
    norm = float(torch.stack([grad.norm() for grad in found]).norm())
    return {**took, "MiB": peak - size, "log-probs": total, "norm": norm}


# ------------------------------------------------------------------ beside each other
def child(subject: str, way: str, args: dict[str, Any]) -> dict[str, float]:
    """What a way measures, in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    python = sys.executable
    if way == "build":
        environment["PYTHONPATH"] = str(args["build"])
    if way.startswith("trl"):
        python = args["trl"]
        environment["TOKENIZER"] = str(args["smollm2"])
    asked = json.dumps({"subject": subject, "way": way, "args": args})
    done = subprocess.run(
        [python, __file__, "--child", asked], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{subject}, {way}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(subject: str, args: dict[str, Any], repeats: int) -> dict[str, dict[str, float]]:
    """Each way of a subject, in turn."""
    missing = {"build"} if not args["build"] else set()
    missing |= {"trl", "trl plain"} if not args["trl"] else set()
    ways = [way for way in SUBJECTS[subject] if way not in missing]
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            runs[way].append(child(subject, way, args))
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
        "--subjects", nargs="+", default=None, choices=SUBJECTS, help="default: all, smollm2 with --smollm2"
    )
    parser.add_argument(
        "--smollm2", metavar="FOLDER", help="what torchrl_chat.smollm2 makes; TRL takes its tokenizer"
    )
    parser.add_argument(
        "--build", metavar="CHECKOUT", help="another checkout of this project, with the same environment"
    )
    parser.add_argument("--trl", metavar="PYTHON", help="the Python of an environment with TRL and the same torch")
    parser.add_argument("--group", type=int, default=4, help="answers to the prompt of a whole step (default 4)")
    parser.add_argument("--equal", action="store_true", help="all answers of a whole step as long as the longest")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each way (default 3)")
    parser.add_argument(
        "--quick", action="store_true", help="heads on 2 rows, half of Qwen's vocabulary, one measurement"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        given = json.loads(asked.child)
        print(json.dumps(measured(given["subject"], given["way"], given["args"])))
        return
    args = {
        "vocabulary": 151_936, "rows": 8, "length": 512, "smollm2": asked.smollm2, "build": asked.build, "trl": asked.trl,
        "group": asked.group, "equal": asked.equal,
    }  # fmt: skip
    if asked.quick:
        args |= {"vocabulary": 75_000, "rows": 2}
        asked.repeats = 1
    there = [s for s in SUBJECTS if s in OF_THE_HEAD or (not asked.quick and (s != "smollm2" or asked.smollm2))]
    subjects = asked.subjects or there
    if not asked.smollm2 and ("smollm2" in subjects or asked.trl):
        parser.error("the subject 'smollm2' and --trl need --smollm2 FOLDER.")
    result = {subject: compared(subject, args, asked.repeats) for subject in subjects}
    if asked.json:
        print(json.dumps({"threads": torch.get_num_threads(), "repeats": asked.repeats, "subjects": result}))
        return
    print(f"{torch.get_num_threads()} thread(s), float32, medians of {asked.repeats}")
    for subject, table in result.items():
        print(
            f"\n{subject:16s}{'MiB':>9s}{'s':>9s}{'CPU s':>9s}" + ("" if "body" not in table else f"{'above':>9s}")
        )
        for way, row in table.items():
            above = f"{row['MiB'] - table['body']['MiB']:9,.0f}" if "body" in table else ""
            print(f"  {way:14s}{row['MiB']:9,.0f}{row['seconds']:9.2f}{row['CPU seconds']:9.2f}{above}")


if __name__ == "__main__":
    main()
