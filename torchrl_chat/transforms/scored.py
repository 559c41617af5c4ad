"""Which token sequences of a ledger are scored by a reference, and which of their tokens count in a turn."""

from __future__ import annotations

from typing import NamedTuple

import torch

from torchrl_chat.conversation import Transcript


class Scored(NamedTuple):
    """A token sequence with what is looked at in it."""

    row: int
    tokens: torch.Tensor  # int64 (T,)
    mask: torch.Tensor  # bool (T,), every sampled token
    turn: torch.Tensor  # bool (T,), those whose KL counts now
    log_probs: torch.Tensor  # float32 (T,), of the policy


def of_turn(row: int, before: Transcript, after: Transcript) -> list[Scored]:
    """What was sampled since ``before``: in the sequence that stood then, and in those begun since."""
    found = []
    for number, branch in enumerate(after.sequences[len(before.branches) :]):
        start = 0 if number else _shared(before.tokens, branch.tokens)
        turn = branch.mask.clone()
        turn[:start] = False
        found.append(Scored(row, branch.tokens, branch.mask, turn, branch.log_probs))
    return _cut(found)


def of_episode(row: int, after: Transcript) -> list[Scored]:
    """All that was sampled, in each sequence."""
    return _cut([Scored(row, b.tokens, b.mask, b.mask, b.log_probs) for b in after.sequences])


def _cut(sequences: list[Scored]) -> list[Scored]:
    """Those with sampled tokens to score, each up to the last of them, as ``("tokens", "full")`` of a policy."""
    found = []
    for row, *fields in sequences:
        sampled = fields[2].nonzero()
        if len(sampled):
            end = int(sampled[-1]) + 1
            found.append(Scored(row, *(field[:end] for field in fields)))
    return found


def _shared(first: torch.Tensor, second: torch.Tensor) -> int:
    """The length of the longest common prefix."""
    count = min(len(first), len(second))
    if first.data_ptr() == second.data_ptr():
        return count
    differs = (first[:count] != second[:count]).nonzero()
    return int(differs[0]) if len(differs) else count
