"""Saving a run, and going on with it: what there is beside the states of the environment, the policy and the optimizer.

The environment's ``state_dict()`` says which episodes come next. The conversations in flight are not in it: they travel in
the TensorDict that is stepped next, and are saved with it. Both together, saved between two steps, are all of a run's
data: an environment that loads the state, and steps the TensorDict, goes on as if nothing had happened.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import is_tensor_collection
from torchrl.envs import AsyncEnvPool

from torchrl_chat.files import replacing


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state to a file, as a whole or not at all: whoever is killed on the way leaves the file as it was.

    TensorDicts are written without the memory beside them: a column of prompts is a view of ledgers that have room for what
    comes, and ``torch.save`` writes what a view is a view of.

    Args:
        path: the file; it is replaced.
        state: what ``torch.save`` takes: state dicts, numbers, and TensorDicts that will be stepped.

    Example:
        >>> from torchrl_chat import DatasetChatEnv
        >>> from torchrl_chat import TransformersPolicy
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> td = env.reset()
        >>> save_state("run.pt", {"env": env.state_dict(), "td": td})
        >>> state = load_state("run.pt")
        >>> env.load_state_dict(state["env"])
        >>> td = env.step(policy(state["td"]))
    """
    with replacing(path) as file:
        torch.save({key: _compact(value) for key, value in state.items()}, file)


def load_state(path: str | os.PathLike[str], device: torch.device | str | None = None) -> dict[str, Any]:
    """Read what :func:`save_state` wrote.

    The file is a pickle, since ledgers and messages are Python objects: load only files that you trust.

    Args:
        path: the file.
        device: where tensors are put; where they were if ``None``.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return torch.load(path, map_location=device, weights_only=False)


def collector_state(collector: Any) -> dict[str, Any]:
    """The state of an ``LLMCollector``, its conversations in flight included.

    ``LLMCollector.state_dict()`` (torchrl 0.14.1) has the environment, the policy and the counts, but not the TensorDict
    that is stepped next: the episodes in it, begun and not finished, would be lost.

    Args:
        collector: between two batches.

    Returns:
        what :func:`load_collector_state` and :func:`save_state` take.

    Raises:
        TypeError: it collects from an ``AsyncEnvPool``, whose workers hold the conversations and give no state.
    """
    _check_synchronous(collector)
    queues = getattr(collector, "_yield_queues", None)
    return {
        "collector": collector.state_dict(),
        "next": collector._shuttle,
        "unfinished": None if queues is None else list(map(list, queues)),
        "finished": None if queues is None else list(collector._trajectory_queue),
    }


def load_collector_state(collector: Any, state: Mapping[str, Any]) -> None:
    """Let a new ``LLMCollector`` of the same arguments go on where another one was.

    Args:
        collector: one that has collected nothing yet.
        state: what :func:`collector_state` returned.

    Raises:
        TypeError: it collects from an ``AsyncEnvPool``.
        ValueError: the state is that of a collector of another number of conversations, or one of the two yields
            completed trajectories and the other does not.
    """
    _check_synchronous(collector)
    queues, following = getattr(collector, "_yield_queues", None), state["next"]
    if (queues is None) != (state["unfinished"] is None):
        raise ValueError("the state is that of a collector with another yield_completed_trajectories.")
    if following is not None and following.batch_size != collector.env.batch_size:
        raise ValueError(
            f"the state has conversations in flight in a batch of {tuple(following.batch_size)}, and the collector's "
            f"environment has {tuple(collector.env.batch_size)}."
        )
    collector.load_state_dict(state["collector"])
    collector._shuttle = following
    if queues is not None:
        collector._yield_queues = list(map(deque, state["unfinished"]))
        collector._trajectory_queue = deque(state["finished"])
        collector._result_numel = sum(trajectory.numel() for trajectory in state["finished"])


def _check_synchronous(collector: Any) -> None:
    if isinstance(collector.env, AsyncEnvPool):
        raise TypeError(
            "a collector over an AsyncEnvPool has no state: the pool's workers hold the conversations. Collect with a "
            "batched environment, or a SerialEnv or ParallelEnv."
        )


def _compact(value: Any) -> Any:
    """The value with TensorDicts whose tensors own their memory, in lists and dicts too."""
    if is_tensor_collection(value):
        return value.clone()
    if type(value) is list:
        return list(map(_compact, value))
    if type(value) is dict:
        return {key: _compact(item) for key, item in value.items()}
    return value
