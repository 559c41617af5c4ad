"""What ``torchrl-chat eval`` is asked for: the environment of ``--dataset``, and the policy of ``--model``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_chat.envs import DatasetChatEnv

DATASETS = ("gsm8k", "math", "ifeval", "countdown", "digits", "reasoning-gym:TASK")

_GENERATED = 1000  # rows of a generated dataset, without --limit
_SPLITS = {"gsm8k": "test", "math": "test", "ifeval": "train", "countdown": "test"}  # IFEval has that one only


def make_env(arguments: argparse.Namespace, policy: Any, count: int) -> DatasetChatEnv:
    """The environment of ``--dataset`` for a number of conversations, its rows in their own order.

    Raises:
        ValueError: there is no such dataset, or it takes no ``--data``.
    """
    from torchrl.envs import StepCounter

    from torchrl_chat import envs
    from torchrl_chat.cli.tiny import last_digit_rows
    from torchrl_chat.rewards import NumberVerifier
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
    if kind == "reasoning-gym" and task:
        if arguments.data is not None:
            raise ValueError(f"--data is {arguments.data}: {arguments.dataset} makes its rows itself.")
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
    if kind not in ready:
        raise ValueError(f"--dataset is {arguments.dataset!r}: expected {', '.join(DATASETS)}.")
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

        return VLLMPolicy.from_pretrained(
            arguments.model, arguments.tokenizer, seeded=arguments.temperature > 0, **settings
        )
    return _transformers(arguments, settings)


def _transformers(arguments: argparse.Namespace, settings: dict[str, Any]) -> Any:
    import torch

    from torchrl_chat.cli import tiny
    from torchrl_chat.policies import TransformersPolicy

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.model == "tiny":
        alphabet = tiny.DIGIT_ALPHABET if arguments.dataset == "digits" else tiny.TEXT_ALPHABET
        tokenizer: Any = tiny.tiny_tokenizer(alphabet)
        model = tiny.tiny_model(len(tokenizer), seed=arguments.seed, context=8192)
    else:
        from transformers import AutoModelForCausalLM

        tokenizer = _tokenizer(arguments, arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    # Greedy answers need no seeds; with them, an answer does not depend on the rows beside it.
    return TransformersPolicy(model.to(device).eval(), tokenizer, seeded=arguments.temperature > 0, **settings)


def _tokenizer(arguments: argparse.Namespace, name: str | None = None) -> Any:
    """The tokenizer of ``--tokenizer``, else of that name; ``None`` where neither is given."""
    from transformers import AutoTokenizer

    name = arguments.tokenizer or name
    return None if name is None else AutoTokenizer.from_pretrained(name)


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
