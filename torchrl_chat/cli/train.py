"""``torchrl-chat train``: GRPO from a dataset to a learning curve."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_chat.options import TEMPLATE_HELP, device, number, whole
from torchrl_chat.pretrained import load_model, load_tokenizer, with_template

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torchrl.envs import EnvBase

    from torchrl_chat.cli.grpo import GRPOConfig, StepMetrics
    from torchrl_chat.policies import TransformersPolicy

DESCRIPTION = """\
Train a language model by GRPO on a dataset with verifiable answers.

With no arguments a tiny model learns, from random weights, to name the last of two digits: a few minutes on
two CPU cores, nothing is downloaded. The real thing, on a machine with a GPU:

  torchrl-chat train --dataset gsm8k --model Qwen/Qwen2.5-0.5B-Instruct

Written to the output folder: config.json, metrics.jsonl (one line a step), curve.png, samples.jsonl
(graded conversations, before training and then after it: torchrl-chat view FOLDER shows them) and checkpoint/
(model and tokenizer). Ctrl-C ends the run and keeps what there is; weights that are no numbers are never written."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Defaults for one kind of model."""

    steps: int
    prompts: int
    group_size: int
    epochs: int
    minibatch: int
    lr: float
    final_lr_share: float
    entropy: float
    max_new_tokens: int


TINY = Preset(
    steps=120,
    prompts=8,
    group_size=16,
    epochs=2,
    minibatch=64,
    lr=1e-3,
    final_lr_share=0.1,
    entropy=0.02,
    max_new_tokens=1,
)
FULL = Preset(
    steps=500,
    prompts=8,
    group_size=8,
    epochs=1,
    minibatch=16,
    lr=1e-6,
    final_lr_share=1.0,
    entropy=0.0,
    max_new_tokens=512,
)


def add_parser(commands: Any) -> None:
    """Add ``train`` to the commands."""
    parser = commands.add_parser(
        "train",
        help="train a model by GRPO",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    task = parser.add_argument_group("task and model")
    task.add_argument(
        "--dataset",
        default="digits",
        metavar="NAME",
        help="digits (default: say the last of two digits), gsm8k, or reasoning-gym:TASK",
    )
    task.add_argument("--data", metavar="PATH", help="a local copy of the dataset: a folder or a JSONL file")
    task.add_argument(
        "--model",
        default="tiny",
        metavar="NAME",
        help="tiny (default), or the name or folder of a transformers causal language model",
    )
    task.add_argument("--chat-template", metavar="FILE_OR_NAME", help=TEMPLATE_HELP)
    task.add_argument("--input-mode", choices=("tokens", "text", "history"), default="tokens")
    task.add_argument("--device", type=device, help="default: cuda where there is one, else cpu")
    learning = parser.add_argument_group("learning (defaults: tiny / any other model)")

    def setting(flag: str, name: str, kind: Callable[[str], Any], text: str) -> None:
        tiny, full = getattr(TINY, name), getattr(FULL, name)
        learning.add_argument(flag, dest=name, type=kind, metavar="N", help=f"{text} (default {tiny:g} / {full:g})")

    setting("--steps", "steps", whole(1), "batches to collect and learn from")
    setting("--prompts", "prompts", whole(1), "questions a batch")
    setting("--group-size", "group_size", whole(2), "answers to each question")
    setting("--epochs", "epochs", whole(1), "passes over each batch")
    setting("--minibatch", "minibatch", whole(1), "conversations an optimizer step")
    setting("--lr", "lr", number(above=0), "learning rate at the start")
    setting("--final-lr-share", "final_lr_share", number(0, 1), "share of it at the end")
    setting("--entropy", "entropy", number(0), "coefficient of the entropy bonus")
    setting("--max-new-tokens", "max_new_tokens", whole(1), "where an answer is cut")
    learning.add_argument("--temperature", type=number(above=0), default=1.0, help="of sampling (default 1.0)")
    learning.add_argument("--seed", type=int, default=0, help="of weights, data and sampling (default 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/DATASET-TIME")
    output.add_argument(
        "--eval", type=whole(1), default=256, metavar="N", help="conversations graded before and after"
    )
    output.add_argument("--no-checkpoint", action="store_true", help="do not save the model")


def run(arguments: argparse.Namespace) -> int:
    """Train, report, and say where the files are."""
    try:
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'torchrl_chat[train]'.") from error
    import torch
    import transformers

    from torchrl_chat.cli.grpo import evaluate, grpo, pass_rate
    from torchrl_chat.recipes.progress import Progress
    from torchrl_chat.rollouts import plain

    transformers.utils.logging.disable_progress_bar()  # of weights that are read and written
    torch.manual_seed(arguments.seed)
    config = grpo_config(arguments)
    policy = make_policy(arguments)
    env = make_env(arguments, policy, seed=arguments.seed)
    judge = make_env(arguments, policy, seed=arguments.seed + 10_000)
    folder = (
        arguments.out or Path("runs") / f"{arguments.dataset.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "run"}
    (folder / "config.json").write_text(json.dumps(settings | dataclasses.asdict(config), indent=2) + "\n")

    history: list[StepMetrics] = []
    before = after = float("nan")
    graded: list[TensorDictBase] = []
    samples = folder / "samples.jsonl"
    interrupted = False
    try:
        graded = evaluate(judge, policy, arguments.eval)
        before = pass_rate(graded)
        write_samples(samples, graded, policy.tokenizer, 0)
        print(f"pass rate before training: {before:.3f}")
        with (folder / "metrics.jsonl").open("w") as log, Progress("train", config.steps) as progress:
            for metrics in grpo(env, policy, config):
                history.append(metrics)
                log.write(json.dumps(plain(dataclasses.asdict(metrics))) + "\n")
                log.flush()
                progress.add({"reward": metrics.reward, "pass rate": metrics.pass_rate})
    except KeyboardInterrupt:
        interrupted = True
        print(f"interrupted after {len(history)} of {config.steps} steps; keeping what there is")
    # What cannot be had again comes first: a second Ctrl-C only costs the last evaluation.
    if not arguments.no_checkpoint:
        save_checkpoint(folder / "checkpoint", policy)
    draw_curve(folder / "curve.png", history, before, after)
    try:
        graded = evaluate(judge, policy, arguments.eval)
        after = pass_rate(graded)
        write_samples(samples, graded, policy.tokenizer, len(history))
    except KeyboardInterrupt:
        interrupted = True
    draw_curve(folder / "curve.png", history, before, after)
    show_samples(graded)
    if skipped := sum(metrics.skipped for metrics in history):
        print(f"{skipped} optimizer steps were left out: their loss or gradients were not finite")
    print(f"pass rate after training: {after:.3f} (before: {before:.3f}); files in {folder}/")
    return 130 if interrupted else 0


def grpo_config(arguments: argparse.Namespace) -> GRPOConfig:
    """The settings of the loop: what was asked for, and the preset of the model for the rest."""
    from torchrl_chat.cli.grpo import GRPOConfig

    preset = TINY if arguments.model == "tiny" else FULL
    for field in dataclasses.fields(preset):
        if getattr(arguments, field.name) is None:
            setattr(arguments, field.name, getattr(preset, field.name))
    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    return GRPOConfig(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})


def make_policy(arguments: argparse.Namespace) -> TransformersPolicy:
    """The model and its tokenizer, as a policy."""
    import torch

    from torchrl_chat import tiny
    from torchrl_chat.policies import TransformersPolicy

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.model == "tiny":
        alphabet = tiny.DIGIT_ALPHABET if arguments.dataset == "digits" else tiny.TEXT_ALPHABET
        tokenizer: Any = with_template(tiny.tiny_tokenizer(alphabet), arguments.chat_template)
        model = tiny.tiny_model(len(tokenizer), seed=arguments.seed, context=4096)
    else:
        tokenizer = load_tokenizer(arguments.model, arguments.chat_template)
        # In bfloat16 an update at these learning rates is smaller than the weights' own rounding.
        model = load_model(arguments.model, dtype=torch.float32)
    return TransformersPolicy(
        model.to(device).eval(),
        tokenizer,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
    )


def make_env(arguments: argparse.Namespace, policy: TransformersPolicy, seed: int) -> EnvBase:
    """The environment of ``--dataset``, its batch made of whole groups."""
    from torchrl.envs import StepCounter

    from torchrl_chat.envs import DatasetChatEnv, GSM8KEnv, ReasoningGymEnv
    from torchrl_chat.rewards import NumberVerifier
    from torchrl_chat.tiny import last_digit_rows
    from torchrl_chat.transforms import RewardTransform

    shared: dict[str, Any] = {
        "tokenizer": policy.tokenizer,
        "input_mode": arguments.input_mode,
        "num_envs": arguments.prompts,
        "repeats": arguments.group_size,
        "group_repeats": True,
        "seed": seed,
    }
    kind, _, task = arguments.dataset.partition(":")
    if kind == "gsm8k":
        return GSM8KEnv(dataset=arguments.data or "openai/gsm8k", **shared)
    if kind == "reasoning-gym" and task:
        return ReasoningGymEnv(task, **shared)
    if kind != "digits":
        raise ValueError(f"--dataset is {arguments.dataset!r}: expected digits, gsm8k or reasoning-gym:TASK.")
    env = DatasetChatEnv(dataset=arguments.data or last_digit_rows(seed=seed), **shared)
    env = env.append_transform(StepCounter(max_steps=1))
    env = env.append_transform(RewardTransform(NumberVerifier()))
    return env


def save_checkpoint(path: Path, policy: TransformersPolicy) -> None:
    """Write model and tokenizer, in the place of those of an earlier run; as a whole or not at all."""
    from torchrl_chat.recipes.checkpoints import save_model

    fresh = path.with_name(f".{path.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed here
    save_model(fresh, policy.model, policy.tokenizer)
    shutil.rmtree(path, ignore_errors=True)
    fresh.rename(path)


def write_samples(path: Path, graded: Sequence[TensorDictBase], tokenizer: Any, step: int) -> None:
    """A rollout file (docs/rollouts.md), an episode a line, in the place of the one that was there."""
    from torchrl_chat.rollouts import write_rollouts

    for i, batch in enumerate(graded):
        write_rollouts(path, batch, tokenizer, append=i > 0, metadata={"policy": "train", "step": step})


def show_samples(graded: Sequence[TensorDictBase]) -> None:
    """A few conversations, each from another question, for the terminal."""
    from torchrl_chat.rollouts import episodes

    found = [episode for batch in graded for episode in episodes(batch, tokens=False)]
    questions = {str(episode["messages"][:-1]): episode for episode in found}
    print("\nsample conversations:")
    for episode in list(questions.values())[:6]:
        turns = " | ".join(f"{m['role']}: {str(m['content'])[:200]!r}" for m in episode["messages"])
        print(f"  [{'right' if episode['success'] else 'wrong'}, reward {episode['reward']:g}] {turns}")


def draw_curve(path: Path, history: list[StepMetrics], before: float, after: float) -> None:
    """The learning curve as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    steps = [metrics.step for metrics in history]
    axis.plot(steps, [metrics.pass_rate for metrics in history], linewidth=1, label="pass rate of the batch")
    end = steps[-1] if steps else 0
    axis.plot([0, end], [before, after], "o", label="evaluation before and after")
    axis.set(xlabel="step", ylabel="pass rate", ylim=(-0.02, 1.02), title="GRPO")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
