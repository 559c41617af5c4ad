"""What ``torchrl-chat eval`` is asked for: the environment of ``--dataset``, and the policy of ``--model``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_chat.pretrained import load_model, load_tokenizer, with_template

if TYPE_CHECKING:
    from torchrl_chat.envs import DatasetChatEnv

DATASETS = ("gsm8k", "math", "ifeval", "countdown", "digits", "reasoning-gym:TASK")

_GENERATED = 1000  # rows of a generated dataset, without --limit
_SPLITS = {"gsm8k": "test", "math": "test", "ifeval": "train", "countdown": "test"}  # IFEval has that one only


def check_dataset(arguments: argparse.Namespace) -> None:
    """Say that a dataset's name or path is wrong before a model is loaded.

    Raises:
        ValueError: there is no such dataset or path, or the dataset takes no ``--data``.
    """
    kind, _, task = arguments.dataset.partition(":")
    known = {name.partition(":")[0] for name in DATASETS}
    if kind not in known or bool(task) != (kind == "reasoning-gym"):
        raise ValueError(f"--dataset is {arguments.dataset!r}: expected {', '.join(DATASETS)}.")
    if task:
        from torchrl_chat.rewards.reasoning_gym import load_task

        load_task(task, {"size": 1, "seed": 0})  # names the tasks that there are
        if arguments.data is not None:
            raise ValueError(f"--data is {arguments.data}: {arguments.dataset} makes its rows itself.")
    data = arguments.data
    looks_local = data is not None and (
        data.startswith((".", "/", "~")) or Path(data).suffix or data.count("/") > 1
    )
    if looks_local and not Path(data).expanduser().exists():
        raise ValueError(f"--data {data}: there is no such dataset file or folder.")


def make_env(arguments: argparse.Namespace, policy: Any, count: int) -> DatasetChatEnv:
    """The environment of ``--dataset`` for a number of conversations, its rows in their own order.

    :func:`check_dataset` has said what is wrong with the arguments.
    """
    from torchrl.envs import StepCounter

    from torchrl_chat import envs
    from torchrl_chat.rewards import NumberVerifier
    from torchrl_chat.tiny import last_digit_rows
    from torchrl_chat.transforms import RewardTransform

    shared: dict[str, Any] = {
        "tokenizer": policy.tokenizer,
        "input_mode": arguments.input_mode,
        "num_envs": count,
        "repeats": arguments.samples,
        "shuffle": False,
        "seed": arguments.seed,
    }
    kind, _, task = arguments.dataset.partition(":")
    size = arguments.limit or _GENERATED
    if kind == "reasoning-gym":
        return envs.ReasoningGymEnv(task, size=size, **shared)
    if arguments.data is not None:
        shared["dataset"] = arguments.data
    if kind == "digits":
        shared.setdefault("dataset", last_digit_rows(size, seed=arguments.seed))
        env = envs.DatasetChatEnv(**shared)
        env = env.append_transform(StepCounter(max_steps=1))
        env = env.append_transform(RewardTransform(NumberVerifier()))
        return env
    if kind == "countdown" and arguments.data is None:
        shared["size"] = size
    ready = {
        "gsm8k": envs.GSM8KEnv,
        "math": envs.MATHEnv,
        "ifeval": envs.IFEvalEnv,
        "countdown": envs.CountdownEnv,
    }
    return ready[kind](split=arguments.split or _SPLITS[kind], **shared)


def make_policy(arguments: argparse.Namespace) -> Any:
    """The model of ``--model`` behind ``--backend``.

    Raises:
        ValueError: the arguments do not fit one another.
        ImportError: a library is missing.
    """
    settings = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    if arguments.backend == "endpoint":
        return _endpoint(arguments, settings)
    if arguments.backend == "vllm":
        from torchrl_chat.policies import VLLMPolicy

        tokenizer = arguments.tokenizer
        if arguments.chat_template is not None:
            tokenizer = _tokenizer(arguments, arguments.model)
        return VLLMPolicy.from_pretrained(arguments.model, tokenizer, seeded=arguments.temperature > 0, **settings)
    return _transformers(arguments, settings)


def _transformers(arguments: argparse.Namespace, settings: dict[str, Any]) -> Any:
    import torch

    from torchrl_chat import tiny
    from torchrl_chat.policies import TransformersPolicy

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.model == "tiny":
        alphabet = tiny.DIGIT_ALPHABET if arguments.dataset == "digits" else tiny.TEXT_ALPHABET
        tokenizer: Any = with_template(tiny.tiny_tokenizer(alphabet), arguments.chat_template)
        model = tiny.tiny_model(len(tokenizer), seed=arguments.seed, context=8192)
    else:
        tokenizer = _tokenizer(arguments, arguments.model)
        model = load_model(arguments.model, dtype="auto")
    # Greedy answers need no seeds; with them, an answer does not depend on the rows beside it.
    return TransformersPolicy(model.to(device).eval(), tokenizer, seeded=arguments.temperature > 0, **settings)


def _tokenizer(arguments: argparse.Namespace, name: str | None = None) -> Any:
    """The tokenizer of ``--tokenizer``, else of that name; ``None`` where neither is given."""
    name = arguments.tokenizer or name
    return None if name is None else load_tokenizer(name, arguments.chat_template)


def _endpoint(arguments: argparse.Namespace, settings: dict[str, Any]) -> Any:
    from torchrl_chat.policies.endpoint import EndpointPolicy

    tokenizer = _tokenizer(arguments)
    if tokenizer is None and arguments.input_mode != "history":
        raise ValueError(
            f"--input-mode {arguments.input_mode} needs a tokenizer: pass --tokenizer, or --input-mode history."
        )
    return EndpointPolicy(
        arguments.model,
        arguments.endpoint,
        api=arguments.api,
        tokenizer=tokenizer,
        concurrency=arguments.batch,
        **settings,
    )
