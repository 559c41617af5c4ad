"""How the sequences of a training view go through a model: as they lie in it, or taken apart, as the model's proof allows."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch.nn.utils.rnn import pad_sequence

from torchrl_chat import columns
from torchrl_chat.models.head import Head
from torchrl_chat.models.passes import ModelError, Together, packed_pass, padded_pass, tree_pass
from torchrl_chat.models.proof import Prover, prover_of
from torchrl_chat.models.ropes import RopeChange, rope_change
from torchrl_chat.training.layouts import Forest
from torchrl_chat.training.trees import cost, rows_of_trees


class Dense(NamedTuple):
    """The rows of a view as rectangles."""

    ids: torch.Tensor
    mask: torch.Tensor
    attention: torch.Tensor
    position_ids: torch.Tensor
    sequence_ids: torch.Tensor | None  # only where a row has several sequences
    parents: torch.Tensor | None = None  # only where they share their beginnings, as are the ends
    ends: torch.Tensor | None = None

    def part(self, rows: torch.Tensor, width: int) -> Dense:
        """Some of the rows, cut."""
        return Dense(*(None if field is None else field[rows, :width] for field in self))  # type: ignore[arg-type]

    @property
    def scored(self) -> torch.Tensor:
        """The tokens to score: the first of a sequence has nothing before it, and is never scored."""
        return self.mask & (self.position_ids > 0)

    @property
    def begins_left(self) -> bool:
        """Whether every row is one sequence, with its padding on the right."""
        places = torch.arange(self.attention.shape[1], device=self.attention.device)
        return self.sequence_ids is None and bool(
            (self.attention == (places < self.attention.sum(-1)[:, None])).all()
        )

    def apart(self) -> Dense:
        """The same sequences in the same order, each in a row of its own, with its padding on the right."""
        if self.ends is not None:
            return self._paths(self.ends)
        starts = (self.position_ids[self.attention] == 0).nonzero().flatten()
        ends = torch.cat((starts[1:], self.attention.sum()[None]))
        places = torch.arange(int((ends - starts).max()), device=starts.device)
        attention = places < (ends - starts)[:, None]

        def moved(field: torch.Tensor) -> torch.Tensor:
            return field.new_zeros(attention.shape).masked_scatter(attention, field[self.attention])

        return Dense(moved(self.ids), moved(self.mask), attention, places * attention, None)

    def _paths(self, ends: torch.Tensor) -> Dense:
        """Trees as sequences: a row for each token that none follows, with those before it.

        A token is scored in the first of the sequences that it stands in, which keeps the order of those that are scored.
        """
        places = torch.arange(ends.shape[1], device=ends.device)
        last = self.attention & (ends == places + 1)
        rows, at = last.nonzero(as_tuple=True)
        path = self.attention[rows] & (places <= at[:, None]) & (at[:, None] < ends[rows])
        # The first last token behind a token is that of the first sequence that it stands in.
        number = torch.nn.functional.pad(last.long().cumsum(-1)[:, :-1], (1, 0))[rows]
        first = number == number.gather(1, at[:, None])
        attention = places < path.sum(-1)[:, None]
        width = int(path.sum(-1).max())

        def moved(field: torch.Tensor) -> torch.Tensor:
            return field.new_zeros(attention.shape).masked_scatter(attention, field[path])[:, :width]

        mask = self.mask[rows] & first
        return Dense(moved(self.ids[rows]), moved(mask), attention[:, :width], moved(self.position_ids[rows]), None)

    def split_at(self, length: int) -> Dense:
        """Each longer row twice: for the tokens that so many are enough for, and for those behind them."""
        longer = self.attention.sum(-1) > length
        copies = 1 + longer.long()
        rows = torch.arange(len(copies), device=copies.device).repeat_interleave(copies)
        first = torch.cat((rows[1:] == rows[:-1], rows.new_zeros(1, dtype=torch.bool)))[:, None]
        second = torch.cat((rows.new_zeros(1, dtype=torch.bool), rows[1:] == rows[:-1]))[:, None]
        places = torch.arange(self.ids.shape[1], device=rows.device)
        mask = self.mask[rows] & ~(first & (places > length)) & ~(second & (places <= length))
        attention = self.attention[rows] & ~(first & (places >= length))
        return Dense(self.ids[rows], mask, attention, self.position_ids[rows], None)


@dataclass(frozen=True)
class Passing:
    """How sequences go through a model."""

    dense: Dense
    """The sequences as they are laid out for it."""
    moved: bool
    """Whether the view has them elsewhere."""
    together: Together
    """Which rows go together."""
    packing: str | None
    """What tells packed sequences apart; ``None`` where none are packed."""
    change: RopeChange | None = None
    """Of the rope, where some rows are longer than that."""
    head: Head | None = None
    """The output head, if the model says what it is."""
    chunked: bool = False
    """Whether the head may see some states at a time."""
    order: torch.Tensor | None = None
    """Of each scored token, in the order in which they lie in ``dense``, its number in the view; ``None``: the same."""

    def through(self, model: Any, part: Dense) -> Any:
        """A model's output for some of the rows, which go together; or that of a part of it that takes what the whole takes."""
        if self.packing is not None and part.ends is not None:
            return tree_pass(model, part.ids, part.position_ids, part.ends, self.packing)
        if self.packing is not None:
            return packed_pass(model, part.ids, part.position_ids, self.packing)
        if self.together == "padded":
            return padded_pass(model, part.ids, part.attention)
        return model(input_ids=part.ids, use_cache=False)


def passing_of(model: Any, dense: Dense, share: bool = False, max_tokens: int | None = None) -> Passing:
    """How the sequences of a view go through a model, as its proof allows; packed ones are taken apart where it must be.

    Args:
        model: the model.
        dense: the rows of the view.
        share: what rows begin with alike goes through once, where the model can and it pays.
        max_tokens: how many tokens a row with such beginnings has at most.
    """
    prover = prover_of(model)
    head = None if model.get_output_embeddings() is None else Head(model)
    laid = _laid_out(model, prover, dense)
    if share and laid.packing is None and laid.change is None and laid.together == "padded":
        laid = _shared(laid, prover.sharing(), max_tokens)
    return replace(laid, head=head, chunked=head is not None and head.plain and prover.chunking())


_WORTH = 0.9  # of the cost of padded rows: with more, what is shared does not make up for the work of finding it


def _shared(laid: Passing, manner: str | None, max_tokens: int | None) -> Passing:
    """Rows as trees of what they begin with alike."""
    dense = laid.dense
    lengths = dense.attention.sum(-1).tolist()
    if manner is None or not all(lengths):
        return laid
    ids, trained = dense.ids[dense.attention], dense.scored[dense.attention]
    most = None if max_tokens is None else max(max_tokens, *lengths)
    # Rows are padded to the widest of them: some batches cost less as one row.
    ways = (rows_of_trees(ids.cpu().numpy(), trained.cpu().numpy(), lengths, m) for m in {most, most or len(ids)})
    costs = [(len(rows) * cost(max(len(row.source) for row in rows)), rows) for rows in ways]
    least, rows = min(costs, key=lambda each: each[0])
    if least > _WORTH * len(lengths) * cost(max(lengths)):
        return laid
    forest = Forest.of(rows, ids.device)
    numbers = torch.arange(len(lengths), device=ids.device).repeat_interleave(
        torch.tensor(lengths, device=ids.device)
    )
    trees = Dense(
        ids[forest.source].masked_fill(~forest.attention, 0),
        trained[forest.source] & forest.attention,
        forest.attention,
        forest.positions,
        numbers[forest.source].masked_fill(~forest.attention, -1),
        forest.parents,
        forest.ends,
    )
    order = (trained.cumsum(0) - 1)[forest.source[trees.scored]]
    return Passing(trees, True, "padded", manner, order=order)


def _laid_out(model: Any, prover: Prover, dense: Dense) -> Passing:
    change = rope_change(model)
    bounded = change is not None or prover.longest is not None
    longest = int(dense.position_ids[dense.attention].max()) + 1 if bounded else 0  # asks the device
    prover.check_length(longest)
    if change is not None and longest > change.length:
        if hasattr(model, "as_one_pass") and torch.is_grad_enabled():
            raise ModelError(
                f"{prover.proof.name} computes rows of more than {change.length} tokens in passes of their own, in which several processes "
                "would not keep in step: train it in one, or on shorter rows."
            )
        if not change.once and bool((dense.scored & (dense.position_ids > change.length)).any()):
            raise change.refused(prover.proof.name, longest)
        if prover.scoring() != "padded":
            raise ModelError(
                f"{prover.proof.name} takes no padded rows, and some have more than {change.length} tokens."
            )
        return Passing(dense.apart().split_at(change.length), True, "padded", None, change)
    if dense.sequence_ids is not None:
        if dense.ends is None and (packing := prover.packing()) is not None:
            return Passing(dense, False, packing.together, packing.manner)
        if dense.ends is not None and (sharing := prover.sharing()) is not None:
            return Passing(dense, False, "padded", sharing)
        if model not in _told:
            _told.add(model)
            what = "tell packed sequences apart" if dense.ends is None else "share what sequences begin with"
            warnings.warn(
                f"{prover.proof.name} cannot {what} ({prover.tried('packing' if dense.ends is None else 'sharing')}): they are "
                "taken apart, and scored as padded rows.",
                RuntimeWarning,
                stacklevel=3,
            )
    together = prover.scoring()
    moved = not dense.begins_left
    return Passing(dense.apart() if moved else dense, moved, together, None)


_told: weakref.WeakSet[Any] = weakref.WeakSet()


def dense_of(view: TensorDictBase, device: torch.device) -> Dense:
    """The rows of a view as rectangles, as they lie in it; ragged rows are padded on the right."""
    rectangular = "sequence_ids" in view.keys() or "position_ids" in view.keys()

    def rows(container: str, key: str) -> Any:
        value = view.get(container, None)
        if rectangular and value is not None:
            found = columns.bare(value).get(key, None)
        else:
            found = columns.read_field(value, key, view.batch_size)
        if found is None:
            raise KeyError(f"the view has no ({container!r}, {key!r}): make it with training_view.")
        if rectangular:
            return found.to(device)
        if not len(found):
            return torch.zeros(0, 0, dtype=torch.int64, device=device)
        return pad_sequence([row.to(device) for row in found], batch_first=True)

    ids = rows("tokens", "full")
    mask, attention = rows("masks", "all_assistant_mask").bool(), rows("masks", "all_attention_mask").bool()
    position_ids, sequence_ids = view.get("position_ids", None), view.get("sequence_ids", None)
    if position_ids is None:
        position_ids = (attention.cumsum(-1) - 1).clamp(min=0)
    if sequence_ids is not None:
        sequence_ids = sequence_ids.to(device)
    ids = ids.masked_fill(~attention, 0)  # whatever stands there, -100 say
    tree = (None if (field := view.get(key, None)) is None else field.to(device) for key in ("parents", "ends"))
    return Dense(ids, mask, attention, position_ids.to(device), sequence_ids, *tree)
