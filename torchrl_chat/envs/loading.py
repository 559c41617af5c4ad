"""Where dataset rows come from, and how they reach an environment one conversation at a time.

``load_rows`` opens a hub dataset, a local folder, a file or an object; ``RowPrimer`` is torchrl's
``DataLoadingPrimer`` with its defects mended.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase, is_tensor_collection
from torch.utils.data import DataLoader
from torchrl.data import Composite, NonTensor, Unbounded
from torchrl.envs.llm.transforms import DataLoadingPrimer

from torchrl_chat import columns

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}


class DatasetError(ValueError):
    """A dataset cannot be opened; the text names the path or the name, and what to do."""


def load_rows(dataset: Any, name: str | None = None, split: str | None = None) -> Dataset:
    """The rows of a dataset.

    Args:
        dataset: a hub name (``"openai/gsm8k"``), a local folder (a dataset repository, a folder of data
            files, or one written by ``save_to_disk``), a JSON, JSONL, Parquet or CSV file, a
            ``datasets.Dataset`` or ``DatasetDict``, or a list of dicts.
        name: the configuration, for datasets that have several.
        split: ``"train"``, ``"test"``, ...; the default is ``"train"`` where there is one.

    Raises:
        DatasetError: it does not exist, cannot be reached, or lacks the split.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    loaded: Any
    if isinstance(dataset, (Dataset, DatasetDict)):
        loaded = dataset
    elif isinstance(dataset, (list, tuple)):
        loaded = Dataset.from_list(list(dataset))
    else:
        path = Path(os.fspath(dataset)).expanduser()
        try:
            if path.is_file():
                kind = _FORMATS.get(path.suffix.lower())
                if kind is None:
                    raise DatasetError(
                        f"{path} has the suffix {path.suffix!r}: expected one of {', '.join(_FORMATS)}."
                    )
                # A file is one split, whatever name is asked for.
                return load_dataset(kind, data_files=str(path), split="train")
            if path.is_dir():
                saved = any((path / marker).exists() for marker in ("state.json", "dataset_dict.json"))
                loaded = load_from_disk(str(path)) if saved else load_dataset(str(path), _config(path, name))
            elif _looks_like_path(os.fspath(dataset)):
                raise DatasetError(f"no such dataset file or folder: {path}")
            else:
                loaded = load_dataset(os.fspath(dataset), name)
        except DatasetError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            # datasets and huggingface_hub say "no network" in a dozen ways, all of them below OSError or ValueError.
            raise DatasetError(
                f"the dataset {os.fspath(dataset)!r} cannot be opened ({type(error).__name__}: {error}). Without a "
                f"network, pass the path of a local folder or of a JSONL or Parquet file."
            ) from error
    if isinstance(loaded, Mapping):
        if split is None:
            split = "train" if "train" in loaded else next(iter(loaded))
        if split not in loaded:
            raise DatasetError(f"the dataset {dataset!r} has no split {split!r}: it has {', '.join(loaded)}.")
        loaded = loaded[split]
    if len(loaded) == 0:
        raise DatasetError(f"the dataset {dataset!r} has no rows in split {split!r}.")
    return loaded


def _config(folder: Path, name: str | None) -> str | None:
    """The configuration to ask a folder for: plain data files have none, whatever the hub's dataset has."""
    from datasets import get_dataset_config_names

    return None if name is None or get_dataset_config_names(str(folder)) == ["default"] else name


def _looks_like_path(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    return name.startswith((".", "/", "~")) or suffix in _FORMATS or name.count("/") > 1


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows to columns; ``"text"`` becomes ``"query"``, as in torchrl, whose containers own ``"text"``."""
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    if "text" in batch and "query" not in batch:
        batch["query"] = batch.pop("text")
    return batch


def renamed(rows: Sequence[Mapping[str, Any]], key: str, to: str) -> dict[str, list[Any]]:
    """:func:`collate` with one column under another name."""
    batch = collate(rows)
    if key in batch:
        batch[to] = batch.pop(key)
    return batch


def make_dataloader(
    dataset: Any,
    name: str | None,
    split: str | None,
    seed: int,
    batch_size_dl: int,
    shuffle: bool,
    collate_fn: Callable[[Any], Any] | None,
) -> DataLoader:
    """A ``DataLoader`` whose order depends on the seed alone."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    return DataLoader(
        load_rows(dataset, name, split),
        batch_size=batch_size_dl,
        shuffle=shuffle,
        collate_fn=collate_fn or collate,
        generator=generator,
    )


class RowPrimer(DataLoadingPrimer):
    """torchrl's ``DataLoadingPrimer``: a row of a dataset for every conversation that starts.

    What it mends of torchrl 0.14.1: batches that come as lists (torchrl's own default collate function
    makes them) are taken; ``group_repeats`` leaves the specs of its rows and of the environment in
    agreement; partial resets do not need a value to fill the other rows with; and it can be pickled.

    Keyword Args:
        dataloader: an iterable of batches: mappings of columns, lists of rows, or TensorDicts. It is
            started again when it ends.
        dataloader_factory: a callable that makes it, called again by :meth:`reset_dataloader`.
        batch_size: the environment's batch size, ``(B,)``.
        repeats: how often each row is used before the next one.
        primers: the specs of the columns; inferred from the first row if ``None``.
        device: where tensor columns are put.
    """

    def __init__(
        self,
        *,
        dataloader: Any = None,
        dataloader_factory: Callable[[], Any] | None = None,
        batch_size: torch.Size,
        repeats: int | None = None,
        primers: Composite | None = None,
        device: torch.device | None = None,
    ):
        self._waiting: list[dict[str, Any]] = []
        if primers is None:
            if dataloader_factory is not None:
                first, _ = _peek(dataloader_factory())  # a loader of its own: looking must not move the order
            else:
                first, dataloader = _peek(dataloader)
            primers = _specs(first, batch_size)
        super().__init__(
            dataloader=dataloader,
            dataloader_factory=dataloader_factory,
            primers=primers,
            batch_size=batch_size,
            repeats=repeats,
            device=device,
        )

    def reset_dataloader(self) -> RowPrimer:
        """Start from the first row again (of a new order, if the loader shuffles)."""
        self._waiting.clear()
        return super().reset_dataloader()

    def _load_from_dataloader(self, reset: torch.Tensor | None = None) -> TensorDictBase:
        count = 1 if reset is None else int(reset.sum())
        rows = [self._next_row() for _ in range(count)]
        device = self.device
        tds = [columns.row_td({k: _leaf(v, device) for k, v in row.items()}, device) for row in rows]
        return tds[0] if reset is None or reset.ndim == 0 else LazyStackedTensorDict(*tds, stack_dim=0)

    def _next_row(self) -> dict[str, Any]:
        if not self._waiting:
            rows = _rows(next(self.endless_dataloader))
            self._waiting = [row for row in rows for _ in range(max(1, self.repeats))][::-1]
        return self._waiting.pop()

    def _reset_func(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        reset = tensordict.get("_reset", None)
        chosen = (
            torch.ones(self.batch_size, dtype=torch.bool)
            if reset is None
            else reset.reshape(*self.batch_size, -1).any(-1)
        )
        if not chosen.any():
            return tensordict_reset
        loaded = self._load_from_dataloader(chosen).unbind(0)
        fresh, filler = iter(loaded), loaded[0]
        rows = [next(fresh) if wanted else filler for wanted in chosen.tolist()]
        for key in loaded[0].keys():
            values = [row._get_str(key, None) for row in rows]
            if isinstance(values[0], torch.Tensor) and len({v.shape for v in values}) == 1:
                tensordict_reset.set(key, torch.stack(values))
            else:
                data = [columns.read_objects(v, torch.Size([1]))[0] for v in values]
                tensordict_reset.set(key, columns.objects(data, self.batch_size, tensordict_reset.device))
        return tensordict_reset

    def __getstate__(self) -> dict[str, Any]:
        # An iterator cannot be pickled: the copy goes on with the rows fetched so far, then starts its loader anew.
        state = super().__getstate__()
        state.pop("endless_dataloader", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.endless_dataloader = self._endless_iter(self.dataloader)


def _rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of one batch of a loader."""
    if is_tensor_collection(batch):
        batch = batch if batch.batch_dims else batch.unsqueeze(0)
        return [
            {key: getattr(value, "data", value) if not isinstance(value, torch.Tensor) else value
             for key, value in row.items()}
            for row in batch.unbind(0)
        ]  # fmt: skip
    if isinstance(batch, Mapping):
        sizes = {len(column) for column in batch.values() if not isinstance(column, str)}
        if len(sizes) != 1:
            raise DatasetError(
                f"a batch of the dataloader has columns of lengths {sorted(sizes)}: expected one length for all of "
                f"{sorted(map(str, batch))}."
            )
        return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    if isinstance(batch, Sequence) and batch and all(isinstance(row, Mapping) for row in batch):
        return _rows(collate(batch))
    raise DatasetError(
        f"the dataloader gave a {type(batch).__name__}: expected a mapping of columns, a list of rows, or a TensorDict."
    )


def _peek(dataloader: Any) -> tuple[dict[str, Any], Any]:
    """The first row, and a loader that still gives it."""
    iterator = iter(dataloader)
    batch = next(iterator, None)
    if batch is None:
        raise DatasetError("the dataloader is empty.")
    return _rows(batch)[0], _Resumed(batch, iterator, dataloader)


class _Resumed:
    """A loader whose first epoch has been begun: its first batch is given again, then the rest."""

    def __init__(self, batch: Any, iterator: Iterator[Any], loader: Any):
        self._begun: tuple[Any, Iterator[Any]] | None = (batch, iterator)
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        begun, self._begun = self._begun, None
        if begun is not None:
            yield begun[0]
            yield from begun[1]
        else:
            yield from self.loader

    def __getstate__(self) -> dict[str, Any]:
        return {"_begun": None, "loader": self.loader}


def _leaf(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value if device is None else value.to(device)
    return columns.as_object(value, device)


def _specs(row: Mapping[str, Any], batch_size: torch.Size) -> Composite:
    leaves: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, torch.Tensor):
            leaves[key] = Unbounded(shape=(*batch_size, *value.shape), dtype=value.dtype)
        else:
            leaves[key] = NonTensor(shape=batch_size, example_data=value)
    return Composite(leaves, shape=batch_size)
