"""Which episode comes next: the order of a dataset, and the cursor in it.

The order is one endless sequence of episodes, drawn one by one: epoch after epoch, row after row, each row ``repeats``
times. How many conversations a batch has is not in it, so that environments of any size play the same episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from tensordict import is_tensor_collection

from torchrl_chat.envs.rows import DatasetError, Rows
from torchrl_chat.seeds import EPISODE_KEYS, episode_seed, mixed


class Episodes(Protocol):
    """An endless sequence of episodes, each a row of a dataset and what tells the episode from others."""

    repeats: int

    def next(self) -> dict[str, Any]:
        """The columns of the next episode, those of :data:`~torchrl_chat.seeds.EPISODE_KEYS` among them."""

    def example(self) -> dict[str, Any]:
        """The columns of some episode, to be looked at only."""

    def restart(self) -> None:
        """Begin with the first episode again."""

    def reseed(self, seed: int) -> None:
        """Take another seed."""

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence is."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sequence of the same episodes was."""


class DatasetEpisodes:
    """The episodes of a dataset whose rows can be read by their number.

    Row ``g`` of the endless order is row ``g % N`` of epoch ``g // N``; with ``shuffle`` each epoch has an order of its own,
    which depends on the seed and the epoch alone. Shard i of n takes the rows i, i + n, i + 2n ... of the endless order,
    each with all its repeats: n shards that have taken k rows each have together taken the first n * k rows of an
    undivided dataset, none of them twice. The cursor is one number, so that a state takes no time to load; torchdata's
    ``StatefulDataLoader`` is not used because it runs through the epoch to get there, and because (0.11.0, without worker
    processes) the epochs after a resumed one come in another order than without the interruption.

    Args:
        dataset: the rows, see :mod:`torchrl_chat.envs.rows`.

    Keyword Args:
        seed: of the order, and of the episodes' own seeds.
        shuffle: whether epochs are shuffled.
        repeats: how many episodes each row is used for.
        shard: which part of the order, ``(index, count)``.
        batch_size: how many rows are read at a time.
        collate_fn: those rows to columns, a value for each of them.

    Raises:
        ValueError: there is no such shard.
    """

    def __init__(
        self,
        dataset: Rows,
        *,
        seed: int,
        shuffle: bool = True,
        repeats: int = 1,
        shard: tuple[int, int] = (0, 1),
        batch_size: int = 1,
        collate_fn: Callable[[Any], Any],
    ):
        index, count = shard
        if not 0 <= index < count:
            raise ValueError(f"shard is {tuple(shard)}: expected (index, count) with 0 <= index < count.")
        if batch_size < 1:
            raise ValueError(f"batch_size_dl is {batch_size}: expected a positive number.")
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self.repeats = repeats
        self.shard = (index, count)
        self.batch_size = batch_size
        self.collate_fn = collate_fn
        self.drawn = 0
        self._order: tuple[tuple[int, int], torch.Tensor] | None = None  # of one (seed, epoch)
        self._block: tuple[int, list[dict[str, Any]]] | None = None  # rows read, and the number of the first

    def next(self) -> dict[str, Any]:
        """The columns of the next episode."""
        turn, place = divmod(self.drawn, self.repeats)
        epoch, row = self._row(turn)
        episode = told(self._columns(turn), self.seed, row, epoch, place)
        self.drawn += 1
        return episode

    def example(self) -> dict[str, Any]:
        """The columns of the dataset's first row: the same for all seeds and shards, whose specs then agree."""
        rows = list(range(min(self.batch_size, len(self.dataset))))
        return told(self._read(rows)[0], self.seed, 0, 0, 0)

    def restart(self) -> None:
        """Begin with the first episode again."""
        self.drawn = 0

    def reseed(self, seed: int) -> None:
        """Begin with the first episode of another seed."""
        self.seed, self.drawn, self._block = seed, 0, None

    def _row(self, turn: int) -> tuple[int, int]:
        """The epoch and the row of the dataset that this shard takes as its ``turn``-th."""
        index, count = self.shard
        epoch, position = divmod(turn * count + index, len(self.dataset))
        if not self.shuffle:
            return epoch, position
        if self._order is None or self._order[0] != (self.seed, epoch):
            generator = torch.Generator().manual_seed(mixed(self.seed, "order", epoch))
            self._order = (self.seed, epoch), torch.randperm(len(self.dataset), generator=generator)
        return epoch, int(self._order[1][position])

    def _columns(self, turn: int) -> dict[str, Any]:
        start = turn - turn % self.batch_size
        if self._block is None or self._block[0] != start:
            self._block = start, self._read([self._row(start + i)[1] for i in range(self.batch_size)])
        return self._block[1][turn - start]

    def _read(self, rows: list[int]) -> list[dict[str, Any]]:
        read = rows_of(self.collate_fn(self.dataset.__getitems__(rows)))
        if len(read) != len(rows):
            raise DatasetError(
                f"collate_fn made {len(read)} rows of {len(rows)}: an episode is known by its row of the dataset, so there "
                f"must be one for each. Filter the dataset itself."
            )
        return read

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence is: ``"episode"`` is the cursor, the others tell whose it is.

        Rows that were generated are part of it (``"kept"``); of others, a hash of their contents (``"fingerprint"``), where
        there is one.
        """
        state = {"kind": "dataset", "seed": self.seed, "episode": self.drawn, **self._identity()}
        if self.dataset.kept is not None:
            return {**state, "kept": self.dataset.kept}
        return {**state, "fingerprint": self.dataset.fingerprint}

    def _identity(self) -> dict[str, Any]:
        made = {} if self.dataset.source is None else {"source": dict(self.dataset.source)}
        return made | {
            "rows": len(self.dataset),
            "repeats": self.repeats,
            "shuffle": self.shuffle,
            "shard": list(self.shard),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sequence of the same episodes was; the seed comes with it, and so do generated rows.

        A state of a shard of another number of shards is taken for that of all of them: where each of n has taken k rows, this
        one goes on behind n * k rows of the whole order.

        Raises:
            ValueError: it was a sequence of others, or of rows that have been changed since; or that many rows cannot have been
                taken by as many shards as there are now, each the same number.
        """
        drawn: Any = state.get("episode")
        if (there := state.get("shard")) and there[1] != self.shard[1]:
            drawn, rest = self._drawn_of(state["episode"], there[1])
            if rest:
                raise ValueError(
                    f"the state is that of {there[1]} shards with {state['episode']} episodes each, which {self.shard[1]} shards cannot "
                    "have played, each the same number of rows: load it into another number of shards."
                )
            state = {**state, "shard": list(self.shard)}
        check_same(state, {"kind": "dataset", **self._identity()})
        if (kept := state.get("kept")) is not None:
            self.dataset.restore(kept)
        elif self.dataset.kept is not None:
            raise ValueError("the state has no rows, and those that were generated here may be others: begin anew.")
        else:
            here, there = self.dataset.fingerprint, state.get("fingerprint")
            if here is not None and there is not None and here != there:
                raise ValueError(
                    "the dataset has as many rows as when the state was saved, and others: give it the file or the list that "
                    "the state was saved with, or begin anew."
                )
        self.reseed(state["seed"])
        self.drawn = drawn

    def _drawn_of(self, drawn: int, count: int) -> tuple[int, int]:
        """What this shard has drawn where each of so many others has drawn so much; and what is left over."""
        rows, rest = divmod(drawn, self.repeats)
        own, over = divmod(rows * count, self.shard[1])
        return own * self.repeats, rest or over

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order": None, "_block": None}


def told(columns: Mapping[str, Any], seed: int, row: int, epoch: int, place: int) -> dict[str, Any]:
    """The columns of a row with those that tell the episode from others.

    Raises:
        DatasetError: the dataset has a column of such a name itself.
    """
    if clash := sorted(columns.keys() & set(EPISODE_KEYS)):
        raise DatasetError(
            f"the dataset has the column(s) {clash}, which are entries of the environment itself: rename them with a "
            f"collate_fn."
        )
    numbers = (episode_seed(seed, row, epoch, place), row, epoch, place)
    return {**columns, **dict(zip(EPISODE_KEYS, numbers, strict=True))}


def check_same(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a state that is not of the expected episodes.

    Raises:
        ValueError: with what differs.
    """
    wrong = {key: state.get(key) for key, value in expected.items() if state.get(key) != value}
    if wrong:
        raise ValueError(
            f"the state is that of another sequence of episodes: it has {wrong}, where this environment has "
            f"{ {key: expected[key] for key in wrong} }. Load it into an environment of the same dataset and settings."
        )


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """The rows of one batch of a loader.

    Raises:
        DatasetError: it is none of the known forms, or its columns differ in length.
    """
    if is_tensor_collection(batch):
        batch = batch if batch.batch_dims else batch.unsqueeze(0)
        return [
            {key: getattr(value, "data", value) if not isinstance(value, torch.Tensor) else value
             for key, value in row.items()}
            for row in batch.unbind(0)
        ]  # fmt: skip
    if isinstance(batch, Mapping):
        for key, column in batch.items():
            if isinstance(column, str) or not hasattr(column, "__len__") or getattr(column, "shape", None) == ():
                raise DatasetError(
                    f"a batch of the dataloader has {column!r:.60} in column {key!r}: expected a list, or a tensor, with a value "
                    f"for each row."
                )
        sizes = {len(column) for column in batch.values()}
        if len(sizes) != 1:
            raise DatasetError(
                f"a batch of the dataloader has columns of lengths {sorted(sizes)}: expected one length for all of "
                f"{sorted(map(str, batch))}."
            )
        return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    if isinstance(batch, Sequence) and batch and all(isinstance(row, Mapping) for row in batch):
        return rows_of(collate(batch))
    raise DatasetError(
        f"the dataloader gave a {type(batch).__name__}: expected a mapping of columns, a list of rows, or a TensorDict."
    )


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows to columns, ``None`` where a row lacks one; ``"text"`` becomes ``"query"``, as in torchrl, which owns ``"text"``.

    Example:
        >>> collate([{"query": "a"}, {"query": "b", "hint": 1}])
        {'query': ['a', 'b'], 'hint': [None, 1]}
    """
    batch = {key: [row.get(key) for row in rows] for key in {key: None for row in rows for key in row}}
    if "text" in batch and "query" not in batch:
        batch["query"] = batch.pop("text")
    return batch
