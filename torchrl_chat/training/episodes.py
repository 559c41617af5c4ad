"""Finished episodes, found in whatever torchrl hands over: the last step, a rollout, a collector's batch, several of them.

Rows are taken column by column, so that no step that is not the last of its episode is ever copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import LazyStackedTensorDict, NonTensorData, NonTensorStack, TensorDictBase, is_tensorclass
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from torchrl_chat import columns
from torchrl_chat.conversation import Transcript

# What the sequences of the view are made of, or what belongs to one step only.
_NOT_KEPT = {"tokens", "masks", "log_probs", "text", "history", "transcript", "next", "finish_reason", "_step"}


class _Part(NamedTuple):
    """Some rows of one dense TensorDict."""

    root: TensorDictBase
    following: TensorDictBase | None  # None: the root itself holds what a step wrote
    order: torch.Tensor  # where each row stands in the whole

    def source(self, key: str) -> Any:
        """The TensorDict that holds a column; what the step wrote goes before what it started from."""
        if self.following is not None and key in self.following.keys():
            return self.following
        return self.root

    def keys(self) -> set[str]:
        keys = {*self.root.keys(), *(() if self.following is None else self.following.keys())} - _NOT_KEPT
        # Columns of a step's tokens (reference log-probs, say) are not aligned with whole sequences.
        return {key for key in keys if not isinstance(self.source(key).get(key), (Tokens, Masks, LogProbs))}


class Episodes:
    """The rows that end an episode, in row-major order of the batch, batch after batch.

    Args:
        data: a TensorDict of any batch size. Where there is a ``"next"`` with transcripts, it holds steps, and those
            are taken that ended (``("next", "done")``), once each: torchrl repeats a finished row's last step in a
            rollout, or leaves the row as it is. Elsewhere every row is taken as it is. Or a sequence of such.

    Raises:
        KeyError: there is no ``"transcript"``, or there are steps without ``("next", "done")``.
        ValueError: no row ends an episode.
    """

    def __init__(self, data: TensorDictBase | Sequence[TensorDictBase]):
        batches = [data] if isinstance(data, TensorDictBase) else list(data)
        self._batches: list[_Batch] = []
        offset = 0
        for batch in batches:
            self._batches.append(_Batch(batch, offset))
            offset += batch.numel()
        ended = [(part, rows) for batch in self._batches for part, rows in batch.ended if rows]
        self._picks = [(part, [row for row, *_ in rows]) for part, rows in ended]
        found = [(place, transcript) for _, rows in ended for _, place, transcript in rows]
        if not found:
            raise ValueError(
                f"no row ends an episode: ('next', 'done') is false throughout the {offset} rows. Collect whole "
                "dialogues (LLMCollector(yield_completed_trajectories=True), say), or pass what 'next' holds."
            )
        self._permutation = sorted(range(len(found)), key=lambda i: found[i][0])
        self.places = [found[i][0] for i in self._permutation]
        self.transcripts = [found[i][1] for i in self._permutation]
        self.device = batches[0].device

    def keys(self) -> list[str]:
        """The columns that every batch has, but for the sequences."""
        first, *others = [part.keys() for part, _ in self._picks]
        return sorted(first.intersection(*others))

    def column(self, key: str, episodes: Sequence[int]) -> Any:
        """One column, a row for each of ``episodes``; a value may be asked for more than once."""
        chosen = [self._permutation[i] for i in episodes]
        if len(self._picks) == 1:
            [(part, rows)] = self._picks
            return _take(part.source(key), key, [rows[i] for i in chosen])
        pieces = [_take(part.source(key), key, rows) for part, rows in self._picks]
        first = pieces[0]
        if isinstance(first, (NonTensorStack, NonTensorData)):
            values = [value for piece in pieces for value in columns.read_objects(piece, piece.batch_size)]
            return columns.objects([values[i] for i in chosen], torch.Size([len(chosen)]), self.device)
        if isinstance(columns.bare(first), LazyStackedTensorDict):
            rows = [row for piece in pieces for row in columns.bare(piece).tensordicts]
            return _restacked(first, [rows[i] for i in chosen])
        if len({piece.shape[1:] for piece in pieces}) > 1:
            shapes = [tuple(piece.shape[1:]) for piece in pieces]
            raise ValueError(f"the batches disagree about the shape of {key!r} in one row: {shapes}.")
        return torch.cat(pieces)[torch.tensor(chosen)]

    def slots(self) -> tuple[list[int], int]:
        """The number of each episode among all that the data hold steps of, unfinished ones too; and how many these are."""
        numbers: list[int] = []
        for batch in self._batches:
            numbers += batch.slots(numbers[-1] + 1 if numbers else 0)
        return [numbers[place] for place in self.places], numbers[-1] + 1

    def turn_rewards(self) -> list[torch.Tensor]:
        """The rewards of each episode's turns, float32 (K,), as far as the batch holds them."""
        rewards: dict[int, torch.Tensor] = {}
        for batch in self._batches:
            rewards.update(batch.turn_rewards())
        return [rewards[place] for place in self.places]


class _Batch:
    """The rows of one batch by their place among all rows, counted from ``first``: steps, with time as the last dimension.

    Attributes:
        ended: of each part the rows that end an episode: their number, their place, the ledger.
    """

    def __init__(self, td: TensorDictBase, first: int):
        self.places = range(first, first + td.numel())
        self.times = td.batch_size[-1] if td.batch_size else 1
        order = torch.arange(first, first + td.numel()).reshape(td.batch_size)
        parts = list(_parts(td, order))
        self.steps = all(part.following is not None for part in parts)
        ended = [(part, _ended(part)) for part in parts]
        ledgers = {place: transcript for _, rows in ended for _, place, transcript in rows}
        repeated = {place for place, ledger in ledgers.items() if _same(ledger, self._before(ledgers, place))}
        self.ended = [(part, [row for row in rows if row[1] not in repeated]) for part, rows in ended]
        self._ends = ledgers.keys() - repeated

    def _before(self, ledgers: dict[int, Transcript], place: int) -> Transcript | None:
        """The ledger of the step before, if there is one."""
        return ledgers.get(place - 1) if self.steps and (place - self.places.start) % self.times else None

    def slots(self, begun: int) -> list[int]:
        """The number of the episode of each place, counted on from ``begun``."""
        ledgers: dict[int, Transcript] = {}
        for part, _ in self.ended:
            source = part.source("transcript")
            rows = columns.read_objects(source.get("transcript"), source.batch_size)
            ledgers.update(zip(part.order.tolist(), rows, strict=True))
        numbers = []
        for place in self.places:
            before = self._before(ledgers, place)
            on = before is not None and place - 1 not in self._ends and _goes_on(ledgers[place], before)
            begun += not (on or _same(ledgers[place], before))
            numbers.append(begun - 1)
        return numbers

    def turn_rewards(self) -> dict[int, torch.Tensor]:
        """The rewards of the turns of each episode, by the place where it ends."""
        first, count = self.places.start, len(self.places)
        reward, stepped = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
        for part, _ in self.ended:
            if part.following is None:
                raise ValueError("the rewards of the turns are asked for: pass the steps, with their 'next'.")
            value = part.following.get("reward", None)
            if value is None or value.numel() != len(part.order):
                raise ValueError("the rewards of the turns are asked for: expected one ('next', 'reward') a row.")
            reward[part.order - first] = value.reshape(-1).float().cpu()
            stepped[part.order - first] = _went(part)
        result, start = {}, 0
        for place in range(count):
            if place % self.times == 0:
                start = place
            if place + first in self._ends:
                turns = slice(start, place + 1)
                result[place + first] = reward[turns][stepped[turns]]
                start = place + 1
        return result


def _parts(td: TensorDictBase, order: torch.Tensor) -> Iterator[_Part]:
    """The dense TensorDicts in lazy stacks of them."""
    if isinstance(td, LazyStackedTensorDict):
        for i, inner in enumerate(td.tensordicts):
            yield from _parts(inner, order.select(td.stack_dim, i))
        return
    following = td.get("next", None)
    if following is None or "transcript" not in following.keys():
        following = None
        if "transcript" not in td.keys():
            raise KeyError(
                f"training_view needs 'transcript', the ledger; got the keys {sorted(map(str, td.keys()))}."
            )
    yield _Part(td, following, order.reshape(-1))


def _went(part: _Part) -> torch.Tensor:
    """Which rows were stepped at all: torchrl leaves finished ones as they are; bool (R,)."""
    went = torch.tensor(columns.stepped(part.root), dtype=torch.bool)
    before = part.root.get("done", None)
    return went if before is None else went & ~before.reshape(len(went), -1).any(-1).cpu()


def _ended(part: _Part) -> list[tuple[int, int, Transcript]]:
    """The rows that end an episode: their number, their place in the whole, the ledger."""
    if part.following is None:
        rows = list(range(len(part.order)))
    else:
        done = part.following.get("done", None)
        if done is None:
            raise KeyError("training_view takes the steps that end an episode: there is no ('next', 'done').")
        flags = done.reshape(len(part.order), -1).any(-1).cpu() & _went(part)
        rows = flags.nonzero().flatten().tolist()
    if not rows:
        return []
    source = part.source("transcript")
    transcripts = columns.read_objects(source.get("transcript"), source.batch_size)
    return [(row, place, transcripts[row]) for row, place in zip(rows, part.order[rows].tolist(), strict=True)]


def _same(transcript: Transcript, before: Transcript | None) -> bool:
    """Whether a step is the one before it once more, as a rollout repeats a finished row's until all have finished."""
    # Not equality: two conversations that happen to be alike lie on two tapes.
    return before is not None and (
        transcript is before
        or (len(transcript) == len(before) and transcript.tokens.data_ptr() == before.tokens.data_ptr())
    )


def _goes_on(transcript: Transcript, before: Transcript) -> bool:
    """Whether a step is a later one of the same conversation."""
    known = len(before.messages)
    return len(transcript.messages) > known and transcript.messages[:known] == before.messages


def _take(td: TensorDictBase, key: str, rows: list[int]) -> Any:
    """Some rows, by their row-major number, of one column."""
    column, batch = td.get(key), td.batch_size
    if isinstance(column, torch.Tensor):
        return column.reshape(batch.numel(), *column.shape[len(batch) :])[rows]
    if isinstance(column, (NonTensorStack, NonTensorData)):
        values = columns.read_objects(column, batch)
        return columns.objects([values[row] for row in rows], torch.Size([len(rows)]), td.device)
    inner = columns.bare(column)
    if isinstance(inner, LazyStackedTensorDict) or not batch:
        kept = columns.read_rows(inner, batch)
        return _restacked(column, [kept[row] for row in rows])
    return column.reshape(-1)[torch.tensor(rows)]


def _restacked(like: Any, rows: list[Any]) -> Any:
    """A lazy stack of these rows in the container of ``like``."""
    stack = columns.stack_rows([columns.bare(row) for row in rows], torch.Size([len(rows)]))
    return type(like)._from_tensordict(stack) if is_tensorclass(like) else stack
