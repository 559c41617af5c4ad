"""The rows of :class:`~torchrl_chat.openenv.OpenEnvChatEnv`: where their sessions stand, as columns, and what servers replied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torchrl.data import Bounded, Composite, NonTensor, Unbounded

from torchrl_chat import columns
from torchrl_chat.conversation import StopReason
from torchrl_chat.openenv.batch.pool import Reply
from torchrl_chat.openenv.client.errors import OpenEnvError
from torchrl_chat.seeds import SEED


@dataclass
class Row:
    """Where one row's session stands."""

    ticket: int = 0  # of the last observation; a TensorDict that carries another one is refused
    live: bool = False  # whether the episode goes on
    failure: str = ""  # why it does not, where it failed
    graded: bool = True  # whether its reward means something
    known: int = 0  # how many messages the server's conversation has, where it shows the whole of it
    episode: int = 0  # how many episodes were begun
    seed: int = 0
    query: str = ""  # what the conversation begins with
    stop: StopReason = StopReason.RUNNING
    observation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A server's reply, read."""

    observation: dict[str, Any]
    reward: float
    done: bool
    stop: StopReason


def row_specs(batch: torch.Size, device: torch.device | None, observation: bool) -> Composite:
    """The specs of those of :func:`row_columns` that a chat environment does not have anyway."""
    one = (*batch, 1)
    specs: dict[str, Any] = {
        "graded": Bounded(0, 1, shape=(*one, 1), dtype=torch.bool, device=device),
        "grade_failure": NonTensor(batch, device=device, example_data=""),
        "query": NonTensor(batch, device=device, example_data="a question"),
        SEED: Unbounded(batch, dtype=torch.int64, device=device),
        "ticket": Unbounded(one, dtype=torch.int64, device=device),
    }
    if observation:
        specs["observation"] = NonTensor(batch, device=device, example_data={})
    return Composite(specs, shape=batch, device=device)


def row_columns(rows: Sequence[Row], batch: torch.Size, device: torch.device | None) -> dict[str, Any]:
    """The columns that say where each row's session stands."""

    def integers(values: list[int], *tail: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device).reshape(*batch, *tail)

    def objects(values: list[Any]) -> Any:
        return columns.objects(values, batch, device)

    return {
        "stop_reason": integers([int(row.stop) for row in rows], 1),
        "env_failure": objects([row.failure for row in rows]),
        "graded": torch.tensor([row.graded for row in rows], device=device).reshape(*batch, 1, 1),
        "grade_failure": objects(["" if row.graded else row.failure for row in rows]),
        "query": objects([row.query for row in rows]),
        SEED: integers([row.seed for row in rows]),
        "ticket": integers([row.ticket for row in rows], 1),
        "observation": objects([row.observation for row in rows]),
    }


def end_columns(
    rows: Sequence[Row], rewards: Sequence[float], batch: torch.Size, device: torch.device | None
) -> dict[str, torch.Tensor]:
    """Reward, and whether and how each row's episode is over."""
    over = [not row.live for row in rows]
    natural = [end and row.stop == StopReason.ANSWERED for end, row in zip(over, rows, strict=True)]
    cut = [end and not by_itself for end, by_itself in zip(over, natural, strict=True)]
    flags = {"terminated": natural, "truncated": cut, "done": over}
    ends = {key: torch.tensor(values, device=device).reshape(*batch, 1) for key, values in flags.items()}
    reward = torch.tensor(list(rewards), dtype=torch.float32, device=device)
    return {**ends, "reward": reward.reshape(*batch, 1, 1)}


def read_reply(reply: Reply) -> Seen:
    """A server's reply.

    Raises:
        OpenEnvError: it is an error, or not what the protocol says.
    """
    if isinstance(reply, Exception):
        raise reply
    observation, reward, done = reply.get("observation"), reply.get("reward"), reply.get("done")
    number = 0.0 if reward is None else reward
    if not isinstance(observation, dict) or not isinstance(done, (bool, type(None))):
        raise OpenEnvError(f"the server's reply has no observation, or a strange 'done': {reply!r:.120}")
    if not isinstance(number, (bool, int, float)) or not math.isfinite(number):
        raise OpenEnvError(f"the server's reward is {reward!r:.60}: expected a number.")
    metadata = observation.get("metadata") or reply.get("metadata") or {}
    name = str(metadata.get("stop_reason", "")).upper() if isinstance(metadata, dict) else ""
    stop = StopReason.__members__.get(name, StopReason.ANSWERED) if done else StopReason.RUNNING
    return Seen(observation, float(number), bool(done), stop)
