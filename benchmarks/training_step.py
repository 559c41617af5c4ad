"""What of a GRPO step is not the model: environment, collector and data path, ours and torchrl's.

Both train the same tiny model on the same task, one turn a conversation, four conversations a question, one optimizer step
a batch, in one process, on the CPU or with ``--device cuda`` (model, environment and data) on a GPU:

- ours: ``DatasetChatEnv``, ``RewardTransform``, ``TransformersPolicy``, ``play``, ``training_view``, ``group_advantages``,
  ``sequence_log_probs``, ``policy_loss``;
- torchrl: its ``DatasetChatEnv``, a reward transform, ``TransformersWrapper``, ``LLMCollector``, a buffer with
  ``LazyStackStorage`` and ``MCAdvantage``, ``GRPOLoss``. Its wrapper does not report the log-probs that the loss needs
  (of torchrl 0.14.1), so a second one scores the sampled tokens.

Time in the model is the time inside ``generate``, inside the model's ``forward`` when it is trained or scores, in
``backward`` and in ``optimizer.step``. All else is overhead. Medians over the steps. The effective sample size of the one
update a batch must be 1 in both, or the data path has lost what was sampled.

    python benchmarks/training_step.py [--quick] [--json] [--rows 8 32 128 512] [--device cuda]
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from env_throughput import WORDS, train_tokenizer
from torchrl.collectors.llm import LLMCollector
from torchrl.data import Composite, LazyStackStorage, ReplayBuffer, Unbounded
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import StepCounter, Transform
from torchrl.envs.llm import DatasetChatEnv as TorchRLDatasetChatEnv
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm.grpo import GRPOLoss, MCAdvantage

from torchrl_chat import DatasetChatEnv, Grader, RewardTransform, TransformersPolicy, training_view
from torchrl_chat.playing import play
from torchrl_chat.tiny import tiny_model
from torchrl_chat.training import group_advantages, policy_loss, sequence_log_probs

GROUP = 4
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ModelClock:
    """The seconds that are spent in the model: of nested calls the outermost counts.

    A GPU works on after a call has returned: it is waited for before a call, for others' work, and after it.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._inside = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what is inside."""
        if self._inside:
            yield
            return
        self._wait()
        self._inside, start = True, time.perf_counter()
        try:
            yield
            self._wait()
        finally:
            self.seconds += time.perf_counter() - start
            self._inside = False

    def wrap(self, owner: Any, *names: str) -> None:
        """Time these methods of an object."""
        for name in names:
            method = getattr(owner, name)

            @functools.wraps(method)
            def timed(*args: Any, _method: Callable[..., Any] = method, **kwargs: Any) -> Any:
                with self.running():
                    return _method(*args, **kwargs)

            setattr(owner, name, timed)


def make_tokenizer() -> Any:
    """A small BPE with ChatML, as torchrl's wrapper needs it: its padding is another token than its end."""
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def dataset(count: int = 4096) -> list[dict[str, str]]:
    """Questions of a few words; an answer is right if it has the word."""
    words = sorted(set(WORDS))
    return [
        {"query": f"say {words[i % len(words)]} question {i}", "answer": words[i % len(words)]}
        for i in range(count)
    ]


def right(response: str, reference: str) -> float:
    """Whether the word is in the answer."""
    return float(reference in response)


def ours(
    tokenizer: Any, rows: int, length: int, device: torch.device
) -> tuple[ModelClock, Callable[[], dict[str, float]]]:
    """One step of ours, as a function."""
    clock, model = ModelClock(device), tiny_model(len(tokenizer)).to(device)
    env = DatasetChatEnv(
        dataset=dataset(),
        tokenizer=tokenizer,
        input_mode="history",
        num_envs=rows,
        repeats=GROUP,
        batch_size_dl=rows // GROUP,
        seed=0,
        device=device,
    )
    env = env.append_transform(StepCounter(max_steps=1))
    env = env.append_transform(RewardTransform(Grader(right)))
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    clock.wrap(policy, "generate")
    clock.wrap(model, "forward")
    clock.wrap(optimizer, "step")

    def step() -> dict[str, float]:
        spent, start = {}, time.perf_counter()
        finished = play(env, policy)
        spent["collect"] = time.perf_counter() - start
        view = training_view(finished, layout="padded")
        advantage = group_advantages(view)
        spent["data"] = time.perf_counter() - start - spent["collect"]
        scores = sequence_log_probs(model, view, vocab_size=policy.vocab_size)
        loss, metrics = policy_loss(scores.log_probs, view["log_probs"].full, advantage, scores.mask)
        spent["ess"] = float(metrics["ess"])
        with clock.running():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent["learn"] = time.perf_counter() - start - spent["collect"] - spent["data"]
        return spent

    return clock, step


class WordReward(Transform):
    """The same reward for torchrl's environment, in the shape that its loss needs."""

    def _step(self, tensordict: Any, next_tensordict: Any) -> Any:
        texts = tensordict["text"].get("response", as_list=True)
        scores = [right(text, answer) for text, answer in zip(texts, tensordict["answer"], strict=True)]
        return next_tensordict.set("reward", torch.tensor(scores, device=next_tensordict.device).view(-1, 1, 1))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """The shape that :meth:`_step` writes."""
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1, 1), device=reward_spec.device)
        return reward_spec


def torchrls(
    tokenizer: Any, rows: int, length: int, device: torch.device
) -> tuple[ModelClock, Callable[[], dict[str, float]]]:
    """One step of torchrl's stack, as a function."""
    clock, model = ModelClock(device), tiny_model(len(tokenizer)).to(device)
    data, size = dataset(), rows // GROUP
    batches = [
        {key: [row[key] for row in data[i : i + size]] for key in data[0]}
        for i in range(0, len(data) - size + 1, size)
    ]
    env = TorchRLDatasetChatEnv.from_dataloader(
        batches, repeats=GROUP, batch_size=rows, tokenizer=tokenizer, input_mode="history", device=device
    )
    env = env.append_transform(StepCounter(max_steps=1))
    env = env.append_transform(WordReward())
    sampling = {"max_new_tokens": length, "do_sample": True}
    policy = TransformersWrapper(
        model, tokenizer=tokenizer, input_mode="history", generate_kwargs=sampling, pad_output=False
    )
    scorer = TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=False)
    collector = iter(LLMCollector(env, policy=policy, dialog_turns_per_batch=rows, total_dialog_turns=-1))
    buffer = ReplayBuffer(
        storage=LazyStackStorage(rows),
        sampler=SamplerWithoutReplacement(),
        batch_size=rows,
        transform=MCAdvantage(grpo_size=GROUP),
    )
    loss_module = GRPOLoss(scorer, masking_strategy="sft", entropy_bonus=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    clock.wrap(model, "generate", "forward")
    clock.wrap(optimizer, "step")

    def step() -> dict[str, float]:
        spent, start = {}, time.perf_counter()
        batch = next(collector).reshape(-1)
        spent["collect"] = time.perf_counter() - start
        with torch.no_grad():
            scored = scorer(batch.select("tokens").copy())
        batch["log_probs"], batch["masks"] = scored["log_probs"], scored["masks"]
        buffer.empty()
        buffer.extend(batch)
        sample = buffer.sample()
        spent["data"] = time.perf_counter() - start - spent["collect"]
        output = loss_module(sample)
        spent["ess"] = float(output.ESS)
        loss = output.loss_objective
        with clock.running():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent["learn"] = time.perf_counter() - start - spent["collect"] - spent["data"]
        return spent

    return clock, step


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both systems at each size, their steps in turn."""
    tokenizer, device = make_tokenizer(), torch.device(args.device)
    table = []
    for rows in args.rows:
        systems = {
            name: make(tokenizer, rows, args.length, device)
            for name, make in (("ours", ours), ("torchrl", torchrls))
        }
        walls: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
        for repeat in range(args.steps + 1):
            for name, (clock, step) in systems.items():
                gc.collect()
                clock.seconds = 0.0
                start = time.perf_counter()
                spent = step()
                wall = time.perf_counter() - start
                if repeat:  # the first warms up
                    walls[name].append(
                        {"wall": wall, "model": clock.seconds, "overhead": wall - clock.seconds, **spent}
                    )
        row: dict[str, Any] = {"rows": rows}
        for name, found in walls.items():
            row[name] = {key: statistics.median(entry[key] for entry in found) for key in found[0]}
            if abs(row[name]["ess"] - 1) > 1e-3:
                raise RuntimeError(
                    f"{name}: the effective sample size is {row[name]['ess']} before the first update."
                )
            row[name]["share"] = row[name]["overhead"] / row[name]["wall"]
        row["ratio"] = row["ours"]["overhead"] / row["torchrl"]["overhead"]
        table.append(row)
    return {
        "length": args.length,
        "group": GROUP,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "steps": args.steps,
        "table": table,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128, 512], help="conversations a batch")
    parser.add_argument("--length", type=int, default=32, help="sampled tokens a conversation (default 32)")
    parser.add_argument("--steps", type=int, default=7, help="measured steps (default 7)")
    parser.add_argument("--device", default="cpu", help="of model, environments and data (default cpu)")
    parser.add_argument("--quick", action="store_true", help="three steps")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    if any(rows < GROUP or rows % GROUP for rows in args.rows):
        parser.error(f"--rows must be multiples of the group size, {GROUP}.")
    if args.quick:
        args.steps = 3
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{args.length} sampled tokens a conversation, groups of {GROUP}, {result['threads']} thread(s), "
        f"{result['device']}; ms a step\n"
    )
    print(
        f"{'':17s}{'wall':>9s}{'model':>9s}{'overhead':>10s}{'share':>8s}{'collect':>10s}{'data':>8s}{'learn':>8s}"
    )
    for row in result["table"]:
        for name in ("ours", "torchrl"):
            entry = row[name]
            numbers = {key: value * 1e3 for key, value in entry.items()}
            print(
                f"{row['rows']:5d}  {name:10s}{numbers['wall']:9.1f}{numbers['model']:9.1f}{numbers['overhead']:10.1f}"
                f"{entry['share']:8.0%}{numbers['collect']:10.1f}{numbers['data']:8.1f}{numbers['learn']:8.1f}"
            )
        print(f"       ours / torchrl, overhead: {row['ratio']:.3f}  (1/{1 / row['ratio']:.1f})")


if __name__ == "__main__":
    main()
