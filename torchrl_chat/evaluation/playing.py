"""Playing a dataset: every row exactly as often as asked, in order, into a rollout file that a killed run goes on with."""

from __future__ import annotations

import base64
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_chat.envs import DatasetChatEnv
from torchrl_chat.envs.episodes import DatasetEpisodes
from torchrl_chat.envs.rows import Rows
from torchrl_chat.files import replacing
from torchrl_chat.playing import play
from torchrl_chat.rollouts import as_line, episodes, plain, read_rollouts, write_lines

_SLICE = 200  # characters of a value that is written with an episode
# What the episode holds already, under these names or others.
_NO_SLICES = frozenset({"query", "question", "problem", "prompt", "reference", "answer", "solution"})


class DatasetRun:
    """Plays the episodes of a dataset's first epoch and appends them to a rollout file, a batch at a time.

    Episodes that the file holds already are not played again, but for those whose request failed. Each has a seed of its
    own, ``"episode_seed"``, so that a policy that samples from it answers alike, whatever the batch and wherever a run was
    ended. Which rows are played stands in ``dataset.json`` beside the file, generated ones as they are, so that a run goes on
    with the same. Iterate over it: it yields the episodes of each batch when they are in the file.

    Args:
        make_env: the environment for a number of conversations; a dataset environment with ``shuffle=False`` that makes its
            own dataloader, and with ``repeats``, how often each row is played.
        policy: it answers.
        path: the rollout file.

    Keyword Args:
        batch: how many conversations at once.
        limit: the first so many rows only.
        tokens: whether token sequences are written.
        max_turns: as for :func:`~torchrl_chat.playing.play`.
        metadata: what is written with every episode.

    Attributes:
        total: how many episodes the file has in the end.
        todo: the (row, place) pairs that it lacks, in order.

    Raises:
        ValueError: a number is not positive, the environment has no order of rows, or its rows are others than those that the
            file was begun with; when iterated over: every request of a batch failed, because the endpoint is gone or refuses.
    """

    def __init__(
        self,
        make_env: Callable[[int], DatasetChatEnv],
        policy: Any,
        path: Path,
        *,
        batch: int = 32,
        limit: int | None = None,
        tokens: bool = True,
        max_turns: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        for name, value in (("batch", batch), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1.")
        self.policy = policy
        self.path = path
        self.batch = batch
        self.tokens = tokens
        self.max_turns = max_turns
        self.metadata = metadata
        self._make = make_env
        self._env = make_env(batch)
        self._held = path.with_name("dataset.json")
        try:
            order = _order_of(self._env)
            self._rows = _as_before(order.dataset, self._held)
            rows = len(order.dataset) if limit is None else min(limit, len(order.dataset))
            known = finished(path)
        except BaseException:
            self.close()
            raise
        wanted = [(row, place) for row in range(rows) for place in range(order.repeats)]
        self.total = len(wanted)
        self.todo = [pair for pair in wanted if pair not in known]

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        if self._rows["fingerprint"] or self._rows["kept"]:
            _exchange(self._held, [json.dumps(self._rows).encode()])
        while self.todo:
            pairs = self.todo[: self.batch]
            played = self._play(pairs)
            write_lines(self.path, list(map(as_line, played)))
            self.todo = self.todo[len(pairs) :]
            yield played
            if all(episode["error"] for episode in played):
                raise ValueError(
                    f"all {len(played)} requests of a batch failed, the first with {played[0]['error']}. What was "
                    f"answered before is kept; the same command goes on with it."
                )

    def close(self) -> None:
        """End the environment's workers."""
        self._env.close()

    def _play(self, pairs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        if self._env.batch_size.numel() != len(pairs):  # the last ones
            self._env.close()
            self._env = self._make(len(pairs))
            _take(_order_of(self._env).dataset, self._rows)
        rows = _order_of(self._env).dataset
        self._env.primer.episodes = _Chosen(_order_of(self._env), pairs)
        begun = time.monotonic()
        finished = play(self._env, self.policy, max_turns=self.max_turns)
        seconds = round((time.monotonic() - begun) / len(pairs), 6)
        played = episodes(
            finished,
            getattr(self.policy, "tokenizer", None),
            tokens=self.tokens,
            ids=[f"{row}.{place}" for row, place in pairs],
            metadata={**(self.metadata or {}), "seconds": seconds},
        )
        return [_with_columns(episode, rows[row]) for (row, _), episode in zip(pairs, played, strict=True)]


class _Chosen:
    """Certain episodes of an order, one after the other."""

    def __init__(self, order: DatasetEpisodes, pairs: Iterable[tuple[int, int]]):
        self.order = order
        self.repeats = order.repeats
        self._pairs = iter(pairs)

    def next(self) -> dict[str, Any]:
        """The columns of the next episode."""
        row, place = next(self._pairs)
        self.order.drawn = row * self.repeats + place
        return self.order.next()


def _with_columns(episode: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The episode with the columns that a comparison may go by: an id, a subject, a level; neither the question nor long texts."""
    columns = {
        key: value
        for key, value in row.items()
        if key not in _NO_SLICES and isinstance(value, (bool, int, float, str)) and len(str(value)) <= _SLICE
    }
    last: dict[str, Any] = {
        key: episode.pop(key) for key in ("sequences", "metadata") if key in episode
    }  # long ones stay last
    return {**episode, "columns": plain(columns), **last}


def _order_of(env: DatasetChatEnv) -> DatasetEpisodes:
    order = getattr(env.primer, "episodes", None)
    if isinstance(order, _Chosen):
        return order.order
    if not isinstance(order, DatasetEpisodes) or order.shuffle or order.shard != (0, 1):
        raise ValueError(
            "evaluation takes the rows in their order: the environment must have dataset=..., shuffle=False, and no shard."
        )
    return order


def _as_before(rows: Rows, path: Path) -> dict[str, Any]:
    """Take the rows that an evaluation in this folder was begun with, and what is to be written of them.

    Raises:
        ValueError: they cannot be had, since their file was changed.
    """
    if path.exists():
        try:
            before = json.loads(path.read_text())
            _take(rows, before)
            other = before["rows"] == len(rows) and before["fingerprint"] not in (None, _fingerprint(rows))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, which holds what the evaluation was begun with, cannot be used ({error}): give another --out."
            ) from error
        if other:
            raise ValueError(
                f"{path.parent} holds an evaluation of other rows: the dataset was changed since. Give another --out, or the "
                f"dataset as it was."
            )
    kept = None if rows.kept is None else base64.b64encode(rows.kept).decode()
    return {"rows": len(rows), "fingerprint": _fingerprint(rows), "kept": kept}


def _fingerprint(rows: Rows) -> str | None:
    return rows.fingerprint if rows.kept is None else None


def _take(rows: Rows, before: Mapping[str, Any]) -> None:
    if before["kept"] is not None:
        rows.restore(base64.b64decode(before["kept"]))


def finished(path: Path) -> set[tuple[int, int]]:
    """The (row, place) pairs that a rollout file holds.

    Lines that are no episodes, and episodes without an answer, are taken out of the file: they are played again.
    """
    if not path.exists():
        return set()
    with warnings.catch_warnings(record=True) as broken:
        warnings.simplefilter("always")
        pairs = [pair for pair, _ in _usable(path)]
        count = sum(1 for _ in read_rollouts(path))
    if broken or count > len(pairs):
        _rewrite(path)
    return set(pairs)


def _usable(path: Path) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """The episodes that need not be played again, each once."""
    seen = set()
    for episode in read_rollouts(path):
        pair = (episode.get("row"), episode.get("place"))
        if not episode.get("error") and all(isinstance(part, int) for part in pair) and pair not in seen:
            seen.add(pair)
            yield pair, episode  # type: ignore[misc]


def _rewrite(path: Path) -> None:
    """The file with the usable episodes alone; exchanged as a whole, so that being killed here costs nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        _exchange(path, (as_line(episode) for _, episode in _usable(path)))


def _exchange(path: Path, parts: Iterable[bytes]) -> None:
    with replacing(path) as file:
        file.writelines(parts)
