"""Three ways to lay token sequences out: ragged rows, a padded rectangle, sequences packed one behind the other.

All of them start from one flat buffer of all tokens, sequence after sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from torchrl_chat import columns

Layout = Literal["ragged", "padded", "packed"]
Side = Literal["left", "right"]


class Flat(NamedTuple):
    """All sequences, one behind the other: S tokens in N sequences."""

    tokens: torch.Tensor  # int64 (S,)
    mask: torch.Tensor  # bool (S,)
    log_probs: torch.Tensor  # float32 (S,)
    lengths: list[int]  # N
    versions: torch.Tensor | None = None  # int64 (S,), where some policy said which weights sampled

    @classmethod
    def of(
        cls,
        tokens: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor],
        log_probs: Sequence[torch.Tensor],
        versions: Sequence[torch.Tensor] | None = None,
    ) -> Flat:
        """The same from one tensor a sequence."""
        return cls(
            torch.cat(tuple(tokens)),
            torch.cat(tuple(masks)),
            torch.cat(tuple(log_probs)),
            [*map(len, tokens)],
            None if versions is None else torch.cat(tuple(versions)),
        )

    def to(self, device: torch.device | None) -> Flat:
        """The same on another device."""
        if device is None:
            return self
        versions = None if self.versions is None else self.versions.to(device)
        return Flat(self.tokens.to(device), self.mask.to(device), self.log_probs.to(device), self.lengths, versions)


def ragged(flat: Flat, device: torch.device | None) -> dict[str, Any]:
    """``tokens``, ``masks`` and ``log_probs`` as lazy stacks of one row a sequence."""
    batch = torch.Size([len(flat.lengths)])

    def stacked(container: type | None, **fields: torch.Tensor) -> Any:
        # Rows of their own: a slice would take the whole buffer along, into a pickle say.
        split = [[row.clone() for row in field.split(flat.lengths)] for field in fields.values()]
        rows = [columns.row_td(dict(zip(fields, row, strict=True)), device) for row in zip(*split, strict=True)]
        stack = columns.stack_rows(rows, batch)
        return stack if container is None else columns.wrap(container, stack, *fields)

    versions = {} if flat.versions is None else {"weight_versions": stacked(None, full=flat.versions)}
    return versions | {
        "tokens": stacked(Tokens, full=flat.tokens),
        "masks": stacked(Masks, all_assistant_mask=flat.mask, all_attention_mask=torch.ones_like(flat.mask)),
        "log_probs": stacked(LogProbs, full=flat.log_probs),
    }


def padded(flat: Flat, device: torch.device | None, side: Side, pad_id: int, multiple: int) -> dict[str, Any]:
    """The same as rectangles (N, T), and ``position_ids``."""
    lengths = torch.tensor(flat.lengths, device=flat.tokens.device)
    width = _up(max(flat.lengths), multiple)
    places = torch.arange(width, device=lengths.device)
    starts = width - lengths[:, None] if side == "left" else torch.zeros_like(lengths)[:, None]
    attention = (places >= starts) & (places < starts + lengths[:, None])
    # The sequences lie in the buffer in the order in which a mask goes through a rectangle.
    fields = [_filled(attention, value, fill) for value, fill in _values(flat, pad_id)]
    return {
        **_dense(fields, attention, device),
        "position_ids": (places - starts).clamp(min=0) * attention,
    }


def packed(
    flat: Flat, device: torch.device | None, pad_id: int, multiple: int, max_tokens: int | None
) -> dict[str, Any]:
    """The same as rows (M, L) of several sequences, with what tells these apart."""
    lengths = flat.lengths
    if max_tokens is None:
        bins = [list(range(len(lengths)))]
    else:
        if (longest := max(lengths)) > max_tokens:
            raise ValueError(
                f"sequence {lengths.index(longest)} has {longest} tokens: more than max_tokens={max_tokens}."
            )
        bins = _first_fit(lengths, max_tokens)
    width = _up(max(sum(lengths[i] for i in row) for row in bins), multiple)
    order = [i for row in bins for i in row]
    if order != list(range(len(lengths))):
        flat = _reordered(flat, order)
    where = flat.tokens.device
    sizes = torch.tensor(flat.lengths, device=where)
    # Behind the last sequence of a row stand its padding tokens, a sequence of their own.
    used = torch.tensor([sum(lengths[i] for i in row) for row in bins], device=where)
    attention = torch.arange(width, device=where) < used[:, None]
    fields = [_filled(attention, value, fill) for value, fill in _values(flat, pad_id)]
    ends = sizes.cumsum(0)
    within = torch.arange(len(flat.tokens), device=where) - (ends - sizes).repeat_interleave(sizes)
    behind = (torch.arange(width, device=where) - used[:, None]).clamp(min=0)
    position_ids = behind.masked_scatter(attention, within)
    ids = torch.tensor(order, device=where).repeat_interleave(sizes)
    sequence_ids = _filled(attention, ids, -1)
    starts = (position_ids == 0).flatten().nonzero().flatten()
    total = torch.tensor([attention.numel()], device=where)
    return {
        **_dense(fields, attention, device),
        "position_ids": position_ids,
        "sequence_ids": sequence_ids,
        "cu_seqlens": torch.cat((starts, total)).to(torch.int32),
    }


def _values(flat: Flat, pad_id: int) -> list[tuple[torch.Tensor, Any]]:
    values: list[tuple[torch.Tensor, Any]] = [(flat.tokens, pad_id), (flat.mask, False), (flat.log_probs, 0.0)]
    return values if flat.versions is None else [*values, (flat.versions, -1)]


def _filled(where: torch.Tensor, values: torch.Tensor, fill: Any) -> torch.Tensor:
    return torch.full(where.shape, fill, dtype=values.dtype, device=values.device).masked_scatter_(where, values)


def _dense(fields: list[torch.Tensor], attention: torch.Tensor, device: torch.device | None) -> dict[str, Any]:
    tokens, mask, log_probs, *versions = fields
    batch = tokens.shape[:1]

    def container(cls: type, **leaves: torch.Tensor) -> Any:
        return columns.wrap(cls, TensorDict(leaves, batch_size=batch, device=device), *leaves)

    told: dict[str, Any] = {}
    if versions:
        told["weight_versions"] = TensorDict({"full": versions[0]}, batch_size=batch, device=device)
    return told | {
        "tokens": container(Tokens, full=tokens),
        "masks": container(Masks, all_assistant_mask=mask, all_attention_mask=attention),
        "log_probs": container(LogProbs, full=log_probs),
    }


def _reordered(flat: Flat, order: list[int]) -> Flat:
    def moved(values: torch.Tensor) -> torch.Tensor:
        pieces = values.split(flat.lengths)
        return torch.cat([pieces[i] for i in order])

    lengths = [flat.lengths[i] for i in order]
    versions = None if flat.versions is None else moved(flat.versions)
    return Flat(moved(flat.tokens), moved(flat.mask), moved(flat.log_probs), lengths, versions)


def _first_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Bins of at most ``size`` tokens, the longest sequences first (at most 11/9 of the best possible number, plus one)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for place, left in enumerate(room):
            if lengths[i] <= left:
                bins[place].append(i)
                room[place] -= lengths[i]
                break
        else:
            bins.append([i])
            room.append(size - lengths[i])
    return [sorted(row) for row in bins]


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
