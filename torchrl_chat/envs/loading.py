"""Where dataset rows come from, and how they reach an environment one conversation at a time.

``load_rows`` opens a hub dataset, a local folder, a file or an object; ``RowPrimer`` is torchrl's
``DataLoadingPrimer`` with its defects mended.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Composite, NonTensor, Unbounded
from torchrl.envs.llm.transforms import DataLoadingPrimer

from torchrl_chat import columns
from torchrl_chat.envs.episodes import DatasetEpisodes, DatasetError, Episodes, collate
from torchrl_chat.seeds import EPISODE_KEYS

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DatasetError", "RowPrimer", "collate", "dataset_episodes", "load_rows", "renamed"]

_FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}


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


def renamed(rows: Sequence[Mapping[str, Any]], key: str, to: str) -> dict[str, list[Any]]:
    """:func:`collate` with one column under another name."""
    batch = collate(rows)
    if key in batch:
        batch[to] = batch.pop(key)
    return batch


def dataset_episodes(
    dataset: Any,
    name: str | None = None,
    split: str | None = None,
    *,
    collate_fn: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> DatasetEpisodes:
    """The episodes of a dataset in any form; ``settings`` are those of :class:`DatasetEpisodes`."""
    return DatasetEpisodes(load_rows(dataset, name, split), collate_fn=collate_fn or collate, **settings)


class RowPrimer(DataLoadingPrimer):
    """torchrl's ``DataLoadingPrimer``: a row of a dataset for every conversation that starts.

    What it mends of torchrl 0.14.1: batches that come as lists (torchrl's own default collate function makes them) are
    taken; ``group_repeats`` leaves the specs of its rows and of the environment in agreement; partial resets do not need a
    value to fill the other rows with; it can be pickled; and it knows how far it is: in its ``state_dict``, and in the
    columns ``"episode_seed"``, ``"episode_row"``, ``"episode_epoch"`` and ``"episode_place"``, int64 of shape (B,).

    Args:
        episodes: what the conversations start from.

    Keyword Args:
        batch_size: the environment's batch size, ``(B,)``.
        primers: the specs of the dataset's columns; inferred from the first row if ``None``.
        device: where tensor columns are put.

    Raises:
        ValueError: a column of the dataset has the name of one that the primer writes.
    """

    def __init__(
        self,
        episodes: Episodes,
        *,
        batch_size: torch.Size,
        primers: Composite | None = None,
        device: torch.device | None = None,
    ):
        self.episodes = episodes
        primers = _specs(episodes.example(), batch_size) if primers is None else primers.clone()
        for key in EPISODE_KEYS:
            primers[key] = Unbounded(shape=batch_size, dtype=torch.int64, device=primers.device)
        super().__init__(
            dataloader=episodes, primers=primers, batch_size=batch_size, repeats=episodes.repeats, device=device
        )
        del self.endless_dataloader  # torchrl's own way to the rows, which no pickle takes

    def reset_dataloader(self) -> RowPrimer:
        """Start from the first row again."""
        self.episodes.restart()
        return self

    def _load_from_dataloader(self, reset: torch.Tensor | None = None) -> TensorDictBase:
        count = 1 if reset is None else int(reset.sum())
        loaded = self._columns([self.episodes.next() for _ in range(count)], torch.Size([count]), self.device)
        return loaded[0] if reset is None or reset.ndim == 0 else loaded

    def _reset_func(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        reset = tensordict.get("_reset", None)
        chosen = (
            torch.ones(self.batch_size, dtype=torch.bool)
            if reset is None
            else reset.reshape(*self.batch_size, -1).any(-1)
        ).tolist()
        if not any(chosen):
            return tensordict_reset
        loaded = [self.episodes.next() if wanted else None for wanted in chosen]
        filler = next(row for row in loaded if row is not None)  # torchrl keeps the other rows as they were
        made = self._columns([row or filler for row in loaded], self.batch_size, tensordict_reset.device)
        for key in made.keys():
            tensordict_reset.set(key, made.get(key))
        return tensordict_reset

    def _columns(
        self, rows: Sequence[Mapping[str, Any]], batch: torch.Size, device: torch.device | None
    ) -> TensorDict:
        """Rows as columns: a tensor is made, and moved to its device, once for all of them."""
        td = TensorDict(batch_size=batch, device=device)
        for key in rows[0]:
            values = [row.get(key) for row in rows]
            if key in EPISODE_KEYS:
                td.set(key, torch.tensor(values, dtype=torch.int64, device=self.device))
                continue
            tensors = [value for value in values if isinstance(value, torch.Tensor)]
            if len(tensors) == len(rows) and len({tensor.shape for tensor in tensors}) == 1:
                td.set(key, torch.stack(tensors).to(self.device))
            else:
                td.set(key, columns.objects(values, batch, device))
        return td

    def get_extra_state(self) -> dict[str, Any]:
        """Where the episodes are, in ``state_dict()``."""
        return self.episodes.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Go on from there.

        Raises:
            ValueError: it is the state of other episodes.
        """
        self.episodes.load_state_dict(state)


def _specs(row: Mapping[str, Any], batch_size: torch.Size) -> Composite:
    leaves: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, torch.Tensor):
            leaves[key] = Unbounded(shape=(*batch_size, *value.shape), dtype=value.dtype)
        else:
            leaves[key] = NonTensor(shape=batch_size, example_data=value)
    return Composite(leaves, shape=batch_size)
