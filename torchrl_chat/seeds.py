"""Seeds of episodes: where whatever is random in a conversation comes from, so that nothing depends on the rows beside it.

A dataset environment writes a seed for every conversation when it starts (``"episode_seed"``, int64 of shape (\\*B,)). What
is drawn in a turn is drawn from that seed and the number of the turn: neither the layout of the batch, nor the number of
environments, nor what was drawn before has a part in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from torchrl_chat.conversation import Transcript

SEED, ROW, EPOCH, PLACE = EPISODE_KEYS = ("episode_seed", "episode_row", "episode_epoch", "episode_place")
"""The columns, int64 of shape (B,), that tell an episode from all others."""


def mixed(*parts: int | str) -> int:
    """One seed from several numbers and names: the same everywhere, below 2**63, and different for different parts.

    Example:
        >>> mixed(0, "order", 3) == mixed(0, "order", 3) != mixed(0, "order", 4)
        True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def episode_seed(seed: int, row: int, epoch: int, place: int) -> int:
    """The seed of one episode.

    Args:
        seed: the environment's.
        row: which row of the dataset it plays.
        epoch: in which pass over the dataset.
        place: which of the row's episodes it is, 0 to ``repeats - 1``.
    """
    return mixed(seed, "episode", row, epoch, place)


def turn_seeds(
    tensordict: TensorDictBase, transcripts: Sequence[Transcript], purpose: str
) -> list[int] | list[None]:
    """A seed for each row and the turn that it has reached; ``None`` where there are no episode seeds.

    Args:
        tensordict: the root of a step, with ``"episode_seed"`` or without it.
        transcripts: the ledgers behind the turn, one a row.
        purpose: what is drawn, so that two draws in one turn have nothing in common.
    """
    column = tensordict.get(SEED, None)
    if column is None:
        return [None] * len(transcripts)
    # Answers and branches only ever grow in number: no two turns of an episode have the same sum.
    turns = [len(transcript.spans) + len(transcript.branches) for transcript in transcripts]
    return [mixed(seed, purpose, turn) for seed, turn in zip(column.flatten().tolist(), turns, strict=True)]


def row_names(tensordict: TensorDictBase, count: int) -> list[str]:
    """What messages call each row: by its number in the dataset where that is known, else in the batch.

    Args:
        tensordict: with ``"episode_row"`` or without it.
        count: how many rows there are.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> row_names(TensorDict(episode_row=torch.tensor([7]), batch_size=(1,)), 1)
        ['dataset row 7']
    """
    column = tensordict.get(ROW, None)
    if column is None:
        return [f"row {i}" for i in range(count)]
    return [f"dataset row {number}" for number in column.flatten().tolist()]
