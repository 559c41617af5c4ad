"""Sums over the sequences of an episode, wherever its rows are found: in a training view, or in a replay buffer's sample.

A sample may hold rows of several views, in each of which the numbers of episodes begin anew; the same row more than once; and
of an episode of several sequences only some.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

from torchrl_chat import columns
from torchrl_chat.seeds import EPISODE_KEYS

_IDENTITY = ("episode_digest", "episode", *EPISODE_KEYS)


def episode_totals(view: TensorDictBase, values: torch.Tensor) -> torch.Tensor:
    """The sum of a number over the sequences of each row's episode, each of them once.

    An episode is told by all of these columns that are there: ``"episode_digest"``, ``"episode"``, and those that a dataset
    environment writes (:data:`~torchrl_chat.seeds.EPISODE_KEYS`). Without ``"episode_digest"`` rows of different views may
    be taken for one episode.

    Args:
        view: a training view, ragged or padded, or rows of several.
        values: float (N,), the number of each row's own sequence.

    Returns:
        float (N,), the same for all rows of an episode.

    Raises:
        ValueError: the rows hold some of an episode's sequences only, by ``"episode_sequence"``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> view = TensorDict(episode=torch.tensor([0, 0]), episode_sequence=torch.tensor([[0, 2], [1, 2]]), batch_size=2)
        >>> episode_totals(view, torch.tensor([1.0, 4.0]))
        tensor([5., 5.])
    """
    names = [key for key in _IDENTITY if view.get(key, None) is not None]
    if not names:
        return values
    owners = list(zip(*(view.get(key).reshape(-1).tolist() for key in names), strict=True))
    numbers: list[Any]
    counts: list[int | None]
    if (places := view.get("episode_sequence", None)) is None:
        numbers, counts = _contents(view), [None] * len(owners)
    else:
        numbers, counts = places[:, 0].tolist(), places[:, 1].tolist()
    found: dict[Any, dict[Any, float]] = {}
    for owner, number, value in zip(owners, numbers, values.tolist(), strict=True):
        found.setdefault(owner, {})[number] = value
    for row, (owner, count) in enumerate(zip(owners, counts, strict=True)):
        if count is not None and len(found[owner]) != count:
            raise ValueError(
                f"row {row} is of an episode of {count} sequences, of which {len(found[owner])} are here: what it sums over "
                "them is not known. Sum when whole episodes are put into a replay buffer (on='extend') and not when rows of "
                "them are drawn, or draw all rows of an episode at once."
            )
    return torch.tensor([sum(found[owner].values()) for owner in owners])


def _contents(view: TensorDictBase) -> list[Any]:
    """What each row holds, without its padding: rows of one episode that hold the same are one sequence."""
    fields = [("tokens", "full"), ("masks", "all_assistant_mask"), ("masks", "all_attention_mask")]
    rows = (columns.read_field(view.get(container), key, view.batch_size) or [] for container, key in fields)
    return [
        (tuple(ids[real.bool()].tolist()), tuple(mask[real.bool()].tolist()))
        for ids, mask, real in zip(*rows, strict=True)
    ]
