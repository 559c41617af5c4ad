"""What a policy did in one row, as one value, and what can be wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchrl_chat.conversation.transcript import Versions

_ROUNDING = 1e-3  # how far above 0 a log-prob may be: the float32 rounding of logits that are as large as 1e4
Errors = dict[int, Exception]
"""What is wrong with single rows, by row."""


class ResponseError(ValueError):
    """A policy's response cannot enter the ledger; the text names the row, the key and the value."""


@dataclass(slots=True, eq=False)
class Turn:
    """What the policy did in one row: the ids that it sampled, or a text that is tokenized when it enters the ledger.

    Example:
        >>> import torch
        >>> turn = Turn(ids=torch.tensor([19, 2]), log_probs=torch.tensor([-0.5, -0.1]), finish_reason="stop")
    """

    ids: torch.Tensor | None = None
    """int64 (R,), on the CPU, what ended the turn included; ``None`` where the policy hands a text only."""
    log_probs: torch.Tensor | None = None
    """float32 (R,), on the CPU; ``None`` if the policy reports none."""
    text: str | None = None
    """What it said, special tokens spelled out; read where there are no ids."""
    finish_reason: str | None = None
    """Why it stopped, as engines say it: ``"stop"``, ``"length"`` ...; ``None`` if it does not say."""
    limit: int | None = None
    """How many tokens it might sample; what is beyond is cut, as if it had been stopped there."""
    versions: Versions = ()
    """Which weights sampled the ids: ``(start, version)``, each from its start to the next one's; empty if not known."""

    @classmethod
    def of(cls, ids: Sequence[int], finish_reason: str | None = None) -> Turn:
        """A turn of plain integers, which may be of any size.

        Raises:
            ResponseError: one of them is no id that any tokenizer has.
        """
        check_ids(ids, 2**31)
        # torch.tensor is slow with lists
        return cls(torch.from_numpy(np.array(ids, dtype=np.int64)), finish_reason=finish_reason)

    @property
    def may_sample(self) -> bool:
        """Whether anything might be sampled: a row without a token left stays as it is."""
        return self.limit is None or self.limit > 0

    @property
    def sampled(self) -> torch.Tensor:
        """The ids of a turn that has some."""
        assert self.ids is not None, "the turn is a text"
        return self.ids

    def cut(self) -> Turn:
        """The turn without what was sampled beyond its limit."""
        if self.limit is None or self.ids is None or len(self.ids) <= self.limit:
            return self
        return Turn(
            self.ids[: self.limit],
            None if self.log_probs is None else self.log_probs[: self.limit],
            self.text,
            "length",
            self.limit,
            tuple(span for span in self.versions if span[0] < self.limit),
        )


Arrays = dict[int, np.ndarray]
"""One array a row, by row."""


def check_turns(turns: Mapping[int, Turn], vocab_size: int, errors: Errors) -> tuple[Arrays, Arrays]:
    """Say which turns cannot enter a ledger: empty ones, ids that the tokenizer does not have, log-probs that are none.

    Args:
        turns: turns with ids, by row.
        vocab_size: how many ids there are.
        errors: takes what is wrong, by row.

    Returns:
        the ids, int64 (R,), and the log-probs of the rows that have some, float32 (R,): arrays, which ledgers take faster
        than tensors.
    """
    ids, flat = _arrays({i: turn.sampled for i, turn in turns.items()})
    log_probs, scores = _arrays({i: turn.log_probs for i, turn in turns.items() if turn.log_probs is not None})
    for i, row in ids.items():
        if not len(row) and turns[i].may_sample:
            errors[i] = ResponseError(
                f"row {i}: the response is empty. A policy that has nothing to say samples its end-of-turn token."
            )
    # As unsigned numbers, those below 0 are beyond all ids.
    if len(flat) and int(np.maximum.reduce(flat.astype(np.int64, copy=False).view(np.uint64))) >= vocab_size:
        for i, row in ids.items():
            if reason := _outside(row.tolist(), vocab_size):
                errors.setdefault(i, ResponseError(f"row {i}: {reason}"))
    if not _possible(scores) or any(len(row) != len(ids[i]) for i, row in log_probs.items()):
        places = [i for i in turns if i not in errors]
        reasons = bad_log_probs([log_probs.get(i) for i in places], [ids[i] for i in places])
        for i, reason in zip(places, reasons, strict=True):
            if reason is not None:
                errors[i] = ResponseError(f"row {i}: {reason}")
    return ids, log_probs


def _arrays(rows: dict[int, torch.Tensor]) -> tuple[Arrays, np.ndarray]:
    """Rows as arrays, and the one array that they are parts of."""
    if len(rows) == 1:
        [(i, row)] = rows.items()
        flat = row.numpy()
        return {i: flat}, flat
    flat, end = torch.cat(list(rows.values())).numpy() if rows else np.empty(0), 0
    return {i: flat[end : (end := end + row.numel())] for i, row in rows.items()}, flat


def _possible(log_probs: np.ndarray) -> bool:
    """Whether sampled tokens can have these log-probs."""
    # Both ends are NaN where one value is.
    return not len(log_probs) or bool(
        np.minimum.reduce(log_probs) > -np.inf and np.maximum.reduce(log_probs) <= _ROUNDING
    )


def check_ids(ids: Sequence[int], vocab_size: int, row: int = 0) -> None:
    """Refuse ids that the tokenizer does not have.

    Raises:
        ResponseError: naming the row and the first such id.
    """
    if reason := _outside(ids, vocab_size):
        raise ResponseError(f"row {row}: {reason}")


def _outside(ids: Sequence[int], vocab_size: int) -> str | None:
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return None
    position, value = next((k, value) for k, value in enumerate(ids) if not 0 <= value < vocab_size)
    return f"the response has id {value} at position {position}, outside the vocabulary of {vocab_size} tokens."


def bad_log_probs(
    log_probs: Sequence[torch.Tensor | np.ndarray | None], ids: Sequence[torch.Tensor | np.ndarray]
) -> list[str | None]:
    """What is wrong with the log-probs of each row.

    A sampled token had a probability above 0 and of at most 1. A log-prob that says something else (NaN, an infinity, above
    0) would be the ratio of a loss, and one of them makes every weight NaN.

    Args:
        log_probs: float (R,) each, on the CPU; ``None`` where the policy reported none.
        ids: the sampled ids, int64 (R,) each.

    Returns:
        for each row the reason, or ``None`` where nothing is wrong.

    Example:
        >>> import torch
        >>> bad_log_probs([torch.tensor([-0.5]), torch.tensor([float("nan")])], [torch.tensor([7])] * 2)[0] is None
        True
    """
    found: list[str | None] = [
        f"('log_probs', 'response') has {len(row)} values for {len(sampled)} sampled ids."
        if row is not None and len(row) != len(sampled)
        else None
        for row, sampled in zip(log_probs, ids, strict=True)
    ]
    rows = {i: np.asarray(row) for i, row in enumerate(log_probs) if row is not None and found[i] is None}
    for i, row in rows.items():
        if _possible(row):
            continue
        for place, value in enumerate(row.tolist()):
            if not -float("inf") < value <= _ROUNDING:
                found[i] = (
                    f"('log_probs', 'response') has {value:g} at position {place}, for the id {int(ids[i][place])}: the "
                    "log-prob of a sampled token is a finite number, and at most 0."
                )
                break
    return found


def by_row(
    work: Callable[[Sequence[int]], list[Any]], count: int, failed: Callable[[int, Exception], Any]
) -> list[Any]:
    """What a function returns for a batch; where it raises, for each row by itself.

    Args:
        work: takes the numbers of some rows, and returns as many results.
        count: how many rows there are.
        failed: is told of a row whose own call raises, and of the error; its result is ``None``.
    """
    try:
        return work(range(count))
    except Exception:  # whatever a template or a tokenizer stumbles over in one row, the others are not lost
        results: list[Any] = [None] * count
        for k in range(count):
            try:
                [results[k]] = work([k])
            except Exception as error:
                failed(k, error)
        return results
