"""The episodes of a dataloader of anybody's, and how far it has been read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from torchrl_chat.envs.episodes import DatasetError, check_same, rows_of, told


class LoaderEpisodes:
    """The episodes of a dataloader: an iterable of batches, started again when it ends.

    A row is known by the place at which the loader gives it in its epoch: ``"episode_row"`` counts from 0 in each epoch.
    What a state needs, to be loaded, depends on the loader:

    - with ``state_dict`` and ``load_state_dict`` (torchdata's ``StatefulDataLoader``), the loader is asked for its state
      before each batch, and the rows of that batch that are used already are skipped;
    - otherwise the rows of the epoch are counted off. The loader then has to give the same rows in the same order again:
      lists and unshuffled loaders do, as do shuffled ``DataLoader`` objects with a ``generator``. An iterator can be read
      only once: a state is loaded into one of which nothing has been drawn.

    The state of the loader's ``generator`` is kept in both cases. (torchdata 0.11.0 does not keep it: the epochs after a
    resumed one come in another order than without the interruption.)

    Args:
        loader: the iterable; batches are mappings of columns, lists of rows, or TensorDicts.

    Keyword Args:
        seed: of the episodes' seeds; the order of the rows is the loader's own affair.
        repeats: how many episodes each row is used for.
    """

    def __init__(self, loader: Any, *, seed: int, repeats: int = 1):
        self.loader = loader
        self.seed = seed
        self.repeats = repeats
        self._rewind(0, 0)
        self._start = self._before = self._mark()

    def _rewind(self, epoch: int, first: int) -> None:
        self.epoch = epoch
        self._first = first  # the place in the epoch of the batch's first row
        self._rows: list[dict[str, Any]] = []
        self._used = 0  # how many rows of the batch are done with
        self._place = 0  # of the next episode
        self._iterator: Iterator[Any] | None = None
        self._generator_states: list[torch.Tensor] | None = None  # to be set once the next iterator is there

    def next(self) -> dict[str, Any]:
        """The columns of the next episode."""
        episode = self.example()
        self._place += 1
        if self._place == self.repeats:
            self._place, self._used = 0, self._used + 1
        return episode

    def example(self) -> dict[str, Any]:
        """The same, to be looked at only.

        Raises:
            DatasetError: the loader is empty, or an iterator at its end.
        """
        if self._used == len(self._rows):
            self._read()
        return told(self._rows[self._used], self.seed, self._first + self._used, self.epoch, self._place)

    def reseed(self, seed: int) -> None:
        """Take another seed for the next episodes; the loader keeps its own order, and goes on."""
        self.seed = seed

    def restart(self) -> None:
        """Begin with the first row again, in the same order if the loader can do that.

        Raises:
            DatasetError: the loader is an iterator that has been begun.
        """
        if not self._fresh:
            self._recall(0, 0, self._start)

    # ------------------------------------------------------------------ the loader
    def _read(self) -> None:
        for _ in range(2):  # one that was at the end of its epoch gives nothing at first
            if self._iterator is None:
                if not self._stateful:
                    self._before = self._mark()
                self._iterator = iter(self.loader)
                self._set_generators(self._generator_states)
                self._generator_states = None
            while True:
                mark = self._mark() if self._stateful else self._before
                batch = next(self._iterator, None)
                if batch is None:
                    break
                if rows := rows_of(batch):
                    self._first += len(self._rows)
                    self._rows, self._used, self._before = rows, 0, mark
                    return
            over = self._first + len(self._rows) > 0
            self._rewind(self.epoch + over, 0)
        raise DatasetError(
            "the dataloader is an iterator, and at its end: it can be read only once."
            if self._once
            else "the dataloader is empty."
        )

    @property
    def _once(self) -> bool:
        return isinstance(self.loader, Iterator)

    @property
    def _stateful(self) -> bool:
        return hasattr(self.loader, "state_dict") and hasattr(self.loader, "load_state_dict")

    @property
    def _fresh(self) -> bool:
        return self.epoch == self._first == self._used == self._place == 0

    def _mark(self) -> dict[str, Any]:
        """What puts the loader back where it is now."""
        states = [generator.get_state() for generator in _generators(self.loader)]
        return {"generators": states} | ({"loader": self.loader.state_dict()} if self._stateful else {})

    def _set_generators(self, states: list[torch.Tensor] | None) -> None:
        for generator, state in zip(_generators(self.loader), states or (), strict=False):
            generator.set_state(state)

    def _recall(self, epoch: int, first: int, mark: Mapping[str, Any]) -> None:
        """Put the loader back; ``first`` is the place in the epoch of the row that it gives next."""
        if self._once:
            raise DatasetError(
                "the dataloader is an iterator that has been begun, and can be read only once: make the environment anew."
            )
        self._rewind(epoch, first)
        self._before = dict(mark)
        if self._stateful:
            self.loader.load_state_dict(mark["loader"])
            self._generator_states = mark["generators"]
        else:
            self._set_generators(mark["generators"])

    # ------------------------------------------------------------------ the state
    def state_dict(self) -> dict[str, Any]:
        """Where the sequence is: the epoch, the row in it, the place of the next episode, and what the loader needs.

        Raises:
            DatasetError: the loader shuffles by torch's global generator, so that no state could be loaded.
        """
        if not self._fresh and not self._stateful and (sampler := _unseeded(self.loader)):
            raise DatasetError(
                f"the dataloader's {sampler} draws from torch's global generator: its order cannot be had again, so there "
                f"is no state to save. Pass it generator=torch.Generator()."
            )
        return {
            "kind": "dataloader",
            "seed": self.seed,
            "repeats": self.repeats,
            "epoch": self.epoch,
            "row": self._first + self._used,
            "place": self._place,
            "batch": self._first,
            "mark": self._before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sequence of the same loader was; the seed comes with it.

        Raises:
            ValueError: it was a sequence of others.
            DatasetError: the loader cannot get there.
        """
        check_same(state, {"kind": "dataloader", "repeats": self.repeats})
        mark, row = state["mark"], state["row"]
        if self._stateful != ("loader" in mark):
            raise ValueError(
                "the state is that of a loader with a state_dict, and this is one without, or the reverse."
            )
        self.seed = state["seed"]
        if not (self._once and self._fresh):
            self._recall(state["epoch"], state["batch"] if self._stateful else 0, mark)
        while self._first + len(self._rows) < row and self.epoch == state["epoch"]:
            self._read()
        if self.epoch != state["epoch"]:
            raise DatasetError(
                f"the dataloader ends before row {row} of epoch {state['epoch']}, which the state had reached: it gives other "
                f"rows now."
            )
        self._used, self._place = row - self._first, state["place"]

    def __getstate__(self) -> dict[str, Any]:
        if self._once:
            return self.__dict__
        loader = self.loader
        if isinstance(loader, DataLoader) and loader._iterator is not None:  # which no pickle takes
            loader = copy.copy(loader)
            loader._iterator = None
        return {"loader": loader, "start": self._start, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "state" not in state:
            self.__dict__.update(state)
            return
        self.loader, self._start = state["loader"], state["start"]
        self.seed, self.repeats = state["state"]["seed"], state["state"]["repeats"]
        self._rewind(0, 0)
        self.load_state_dict(state["state"])


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that the order of a ``DataLoader`` comes from."""
    found: list[torch.Generator] = []
    for holder in (loader, *_samplers(loader)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is known for known in found):
            found.append(generator)
    return found


def _samplers(loader: Any) -> list[Any]:
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return [getattr(loader, "sampler", None), inner]


def _unseeded(loader: Any) -> str | None:
    """The name of the sampler that draws from torch's global generator, if there is one."""
    random = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    for sampler in _samplers(loader):
        if isinstance(sampler, random) and sampler.generator is None:
            return type(sampler).__name__
    return None
