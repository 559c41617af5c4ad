"""Ways to lay token sequences out: ragged rows, a padded rectangle, packed one behind the other, trees of what begins alike.

All of them start from one flat buffer of all tokens, sequence after sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from torchrl_chat import columns
from torchrl_chat.training.trees import Row, first_fit, rows_of_trees

Layout = Literal["ragged", "padded", "packed", "tree"]
Side = Literal["left", "right"]

_FILLS = {"mask": False, "log_probs": 0.0, "versions": -1}


class Flat(NamedTuple):
    """All sequences, one behind the other: S tokens in N sequences."""

    fields: dict[str, torch.Tensor]
    """``"tokens"`` int64 (S,), ``"mask"`` bool (S,), ``"log_probs"`` float32 (S,); ``"versions"`` int64 (S,), where some
    policy said which weights sampled."""
    lengths: list[int]  # N

    @classmethod
    def of(cls, tokens: Sequence[torch.Tensor], **fields: Sequence[torch.Tensor]) -> Flat:
        """The same from one tensor a sequence."""
        flat = {name: torch.cat(tuple(rows)) for name, rows in {"tokens": tokens, **fields}.items()}
        return cls(flat, [*map(len, tokens)])

    def to(self, device: torch.device | None) -> Flat:
        """The same on another device."""
        if device is None:
            return self
        return self._replace(fields={name: field.to(device) for name, field in self.fields.items()})


def ragged(flat: Flat, device: torch.device | None) -> dict[str, Any]:
    """``tokens``, ``masks`` and ``log_probs`` as lazy stacks of one row a sequence."""
    batch = torch.Size([len(flat.lengths)])
    # Rows of their own: a slice would take the whole buffer along, into a pickle say.
    split = {name: [row.clone() for row in field.split(flat.lengths)] for name, field in flat.fields.items()}

    def stacked(leaves: dict[str, list[torch.Tensor]]) -> Any:
        rows = zip(*leaves.values(), strict=True)
        return columns.stack_rows(
            [columns.row_td(dict(zip(leaves, row, strict=True)), device) for row in rows], batch
        )

    return _contained(split, list(map(torch.ones_like, split["mask"])), stacked)


def padded(flat: Flat, device: torch.device | None, side: Side, pad_id: int, multiple: int) -> dict[str, Any]:
    """The same as rectangles (N, T), and ``position_ids``."""
    lengths = torch.tensor(flat.lengths, device=flat.fields["tokens"].device)
    width = _up(max(flat.lengths), multiple)
    places = torch.arange(width, device=lengths.device)
    starts = width - lengths[:, None] if side == "left" else torch.zeros_like(lengths)[:, None]
    attention = (places >= starts) & (places < starts + lengths[:, None])
    return {
        **_rectangles(flat.fields, attention, device, pad_id),
        "position_ids": (places - starts).clamp(min=0) * attention,
    }


def packed(
    flat: Flat, device: torch.device | None, pad_id: int, multiple: int, max_tokens: int | None
) -> dict[str, Any]:
    """The same as rows (M, L) of several sequences, with what tells these apart."""
    fields, lengths = flat
    if max_tokens is None:
        bins = [list(range(len(lengths)))]
    else:
        if (longest := max(lengths)) > max_tokens:
            raise ValueError(
                f"sequence {lengths.index(longest)} has {longest} tokens: more than max_tokens={max_tokens}."
            )
        bins = first_fit(lengths, max_tokens)
    width = _up(max(sum(lengths[i] for i in row) for row in bins), multiple)
    order = [i for row in bins for i in row]
    if order != sorted(order):
        pieces = {name: field.split(lengths) for name, field in fields.items()}
        fields = {name: torch.cat([split[i] for i in order]) for name, split in pieces.items()}
    where = fields["tokens"].device
    sizes = torch.tensor([lengths[i] for i in order], device=where)
    # Behind the last sequence of a row stand its padding tokens, a sequence of their own.
    used = torch.tensor([sum(lengths[i] for i in row) for row in bins], device=where)
    attention = torch.arange(width, device=where) < used[:, None]
    ends = sizes.cumsum(0)
    within = torch.arange(len(fields["tokens"]), device=where) - (ends - sizes).repeat_interleave(sizes)
    behind = (torch.arange(width, device=where) - used[:, None]).clamp(min=0)
    position_ids = behind.masked_scatter(attention, within)
    ids = torch.tensor(order, device=where).repeat_interleave(sizes)
    starts = (position_ids == 0).flatten().nonzero().flatten()
    total = torch.tensor([attention.numel()], device=where)
    return {
        **_rectangles(fields, attention, device, pad_id),
        "position_ids": position_ids,
        "sequence_ids": _filled(attention, ids, -1),
        "cu_seqlens": torch.cat((starts, total)).to(torch.int32),
    }


def tree(
    flat: Flat, device: torch.device | None, pad_id: int, multiple: int, max_tokens: int | None
) -> dict[str, Any]:
    """The same as rows (M, L) of trees, with what tells the sequences apart."""
    fields, lengths = flat
    where = fields["tokens"].device
    rows = rows_of_trees(fields["tokens"].cpu().numpy(), fields["mask"].cpu().numpy(), lengths, max_tokens)
    laid = Forest.of(rows, where, multiple)
    source = laid.source[laid.attention]
    numbers = torch.arange(len(lengths), device=where).repeat_interleave(torch.tensor(lengths, device=where))
    return {
        **_rectangles({name: field[source] for name, field in fields.items()}, laid.attention, device, pad_id),
        "position_ids": laid.positions,
        "sequence_ids": _filled(laid.attention, numbers[source], -1),
        "parents": laid.parents,
        "ends": laid.ends,
    }


class Forest(NamedTuple):
    """Rows of trees as rectangles (M, L)."""

    attention: torch.Tensor
    """bool, false on padding."""
    source: torch.Tensor
    """int64, where each token stands in the buffer of all sequences; 0 on padding, as are the positions."""
    positions: torch.Tensor
    parents: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device, multiple: int = 1) -> Forest:
        """The rows, each as wide as the widest."""
        lengths = torch.tensor([len(row.source) for row in rows], device=device)
        places = torch.arange(_up(int(lengths.max()), multiple), device=device)
        attention = places < lengths[:, None]
        source, positions, parents, ends = (
            torch.from_numpy(np.concatenate(parts)).to(device) for parts in zip(*rows, strict=True)
        )
        alone = (places + 1).expand(attention.shape)  # padding is seen by itself only
        return cls(
            attention,
            _filled(attention, source, 0),
            _filled(attention, positions, 0),
            _filled(attention, parents, -1),
            alone.masked_scatter(attention, ends),
        )


def _rectangles(
    fields: dict[str, torch.Tensor], attention: torch.Tensor, device: torch.device | None, pad_id: int
) -> dict[str, Any]:
    # The sequences lie in the buffer in the order in which a mask goes through a rectangle.
    dense = {name: _filled(attention, field, _FILLS.get(name, pad_id)) for name, field in fields.items()}
    batch = attention.shape[:1]
    return _contained(dense, attention, lambda leaves: TensorDict(leaves, batch_size=batch, device=device))


def _filled(where: torch.Tensor, values: torch.Tensor, fill: Any) -> torch.Tensor:
    return torch.full(where.shape, fill, dtype=values.dtype, device=values.device).masked_scatter_(where, values)


def _contained(fields: dict[str, Any], attention: Any, make: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The fields in the containers that torchrl's losses read; ``make`` makes a TensorDict of some."""

    def container(cls: type, **leaves: Any) -> Any:
        return columns.wrap(cls, make(leaves), *leaves)

    laid = {
        "tokens": container(Tokens, full=fields["tokens"]),
        "masks": container(Masks, all_assistant_mask=fields["mask"], all_attention_mask=attention),
        "log_probs": container(LogProbs, full=fields["log_probs"]),
    }
    return laid | ({"weight_versions": make({"full": fields["versions"]})} if "versions" in fields else {})


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
