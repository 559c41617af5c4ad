"""What ``torchrl-chat eval`` is asked for: the environment of ``--dataset``, and the policy of ``--model``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from torchrl_chat import gallery
from torchrl_chat.options import named_values
from torchrl_chat.pretrained import load_model, load_tokenizer, with_template

if TYPE_CHECKING:
    from torchrl_chat.envs import DatasetChatEnv

_GENERATED = 1000  # rows of a generated dataset, without --limit


def make_env(arguments: argparse.Namespace, policy: Any, count: int) -> DatasetChatEnv:
    """The environment of ``--dataset`` for a number of conversations, its rows in their own order; of the last split."""
    return gallery.make_env(
        arguments.dataset,
        data=arguments.data,
        split=arguments.split or (gallery.SPLITS.get(arguments.dataset) or (("test",),))[-1],
        size=arguments.limit or _GENERATED,
        reward=arguments.reward,
        settings=named_values(arguments.option),
        seed=arguments.seed,
        tokenizer=policy.tokenizer,
        input_mode=arguments.input_mode,
        num_envs=count,
        repeats=arguments.samples,
        shuffle=False,
    )


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
        made = gallery.tiny_tokenizer_for(arguments.dataset)
        tokenizer: Any = with_template(made, arguments.chat_template)
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
