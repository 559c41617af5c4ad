"""Where dataset rows come from, and how they reach an environment one conversation at a time.

``load_rows`` opens a hub dataset, a local folder, files or an object; ``RowPrimer`` is torchrl's
``DataLoadingPrimer`` with its defects mended.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Composite, NonTensor, Unbounded
from torchrl.envs.llm.transforms import DataLoadingPrimer

from torchrl_chat import columns
from torchrl_chat.envs.episodes import DatasetEpisodes, DatasetError, Episodes, collate
from torchrl_chat.envs.jsonl import COMPRESSED, json_rows
from torchrl_chat.envs.rows import ArrowRows, ListRows, Rows
from torchrl_chat.pretrained import no_retries_without_hub
from torchrl_chat.seeds import EPISODE_KEYS, ROW

__all__ = ["DatasetError", "RowPrimer", "collate", "dataset_episodes", "load_rows"]

_FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}
_UTF8 = ("utf-8", "utf8", "utf-8-sig")


def load_rows(dataset: Any, name: str | None = None, split: str | Sequence[str] | None = None) -> Rows:
    """The rows of a dataset, their values as the source has them.

    JSON is read here, row by row from the file (:class:`~torchrl_chat.envs.jsonl.JSONRows`), also that of folders and of hub
    datasets; a list is taken as it is; Parquet files and ``datasets`` objects are Arrow
    (:class:`~torchrl_chat.envs.rows.ArrowRows` tells what that loses). CSV has no types: its values are strings.

    Args:
        dataset: a hub name (``"openai/gsm8k"``), a local folder (a dataset repository, a folder of data
            files, or one written by ``save_to_disk``), a JSON, JSONL (also ``.gz``, ``.bz2``, ``.xz``), Parquet or CSV file,
            a list of such files of one kind, a ``datasets.Dataset`` or ``DatasetDict``, or a list of dicts.
        name: the configuration, for datasets that have several.
        split: ``"train"``, ``"test"``, ...; the default is ``"train"`` where there is one. Of several names the first that there
            is, or that default.

    Raises:
        DatasetError: it does not exist, cannot be reached or read, or lacks the split.

    Example:
        >>> rows = load_rows([{"query": "2 + 2?", "answer": "4"}])
        >>> len(rows), rows[0]["answer"]
        (1, '4')
    """
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(dataset, Rows):
        rows = dataset
    elif isinstance(dataset, (Dataset, DatasetDict)):
        rows = ArrowRows(_of_split(dataset, split, "the dataset"))
    elif isinstance(dataset, (list, tuple)):
        files = bool(dataset) and all(isinstance(item, (str, os.PathLike)) for item in dataset)
        rows = _of_files([Path(item).expanduser() for item in dataset]) if files else ListRows(dataset)
    elif isinstance(dataset, (IterableDataset, IterableDatasetDict)):
        raise DatasetError(
            f"the dataset is a {type(dataset).__name__}, whose rows have no numbers, so that no state could be saved. Pass the "
            f"path of its JSONL files, which are read row by row, or DatasetChatEnv.from_dataloader(DataLoader(dataset))."
        )
    elif isinstance(dataset, (str, os.PathLike)):
        rows = _opened(dataset, name, split)
    else:
        raise DatasetError(
            f"the dataset is a {type(dataset).__name__}: expected a name, a path, a list of rows, or a datasets.Dataset; for a "
            f"dataloader there is from_dataloader."
        )
    if len(rows) == 0:
        raise DatasetError(f"the dataset {dataset!r:.200} has no rows in split {split!r}.")
    return rows


def _opened(dataset: str | os.PathLike[str], name: str | None, split: str | Sequence[str] | None) -> Rows:
    """The rows behind a path or a hub name."""
    from datasets import get_dataset_config_names, load_from_disk

    path = Path(os.fspath(dataset)).expanduser()
    if path.is_file():
        return _of_files([path])
    try:
        if path.is_dir():
            if any((path / marker).exists() for marker in ("state.json", "dataset_dict.json")):
                return ArrowRows(_of_split(load_from_disk(str(path)), split, repr(str(path))))
            # Plain data files have no configuration, whatever the hub's dataset has.
            if name is not None and get_dataset_config_names(str(path)) == ["default"]:
                name = None
            return _built(str(path), name, split)
        spelled = os.fspath(dataset)
        if spelled.startswith((".", "/", "~")) or _kind(Path(spelled)) is not None or spelled.count("/") > 1:
            raise DatasetError(f"no such dataset file or folder: {path}")
        with no_retries_without_hub():
            return _built(spelled, name, split)
    except DatasetError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        # datasets and huggingface_hub say "no network" in a dozen ways, all of them below OSError or ValueError.
        raise DatasetError(
            f"the dataset {os.fspath(dataset)!r} cannot be opened ({type(error).__name__}: {error}). Without a "
            f"network, pass the path of a local folder or of a JSONL or Parquet file."
        ) from error


def _of_files(paths: Sequence[Path]) -> Rows:
    """The rows of files of one kind, one behind the other; files are one split, whatever name is asked for."""
    from datasets import load_dataset

    for path in paths:
        if not path.is_file():
            raise DatasetError(f"no such dataset file or folder: {path}")
        if _kind(path) is None:
            raise DatasetError(f"{path} has the suffix {path.suffix!r}: expected one of {', '.join(_FORMATS)}.")
    kinds = sorted({str(_kind(path)) for path in paths})
    if len(kinds) > 1:
        raise DatasetError(f"the files are of several kinds, {', '.join(kinds)}: expected one.")
    if kinds == ["json"]:
        return json_rows(paths)
    files = list(map(str, paths))
    try:
        return ArrowRows(load_dataset(kinds[0], data_files=files, split="train", **_options(kinds[0], files)))
    except (OSError, ValueError, RuntimeError) as error:
        raise DatasetError(f"{', '.join(files)} cannot be read ({type(error).__name__}: {error}).") from error


def _built(source: str, config: str | None, split: str | Sequence[str] | None) -> Rows:
    """The rows of a folder or a hub dataset; ``datasets`` finds its files, and reads those that are no JSON."""
    from datasets import load_dataset, load_dataset_builder

    builder = load_dataset_builder(source, config)
    modules = [cls.__module__ for cls in type(builder).__mro__ if "packaged_modules" in cls.__module__]
    kind = modules[0].rpartition(".")[2] if modules else ""  # json, parquet, csv ...
    files = builder.config.data_files
    options: dict[str, Any] = {}
    if kind == "json" and files and builder.config.field is None and builder.config.encoding.lower() in _UTF8:
        found = [str(file) for file in _of_split(dict(files), split, repr(source))]
        if all(_kind(Path(file.partition("?")[0])) == "json" for file in found):
            return json_rows(_local(builder, found))
    elif kind == "csv" and files:
        options = _options(kind, _local(builder, [str(next(iter(files.values()))[0])]))
    return ArrowRows(_of_split(load_dataset(source, config, **options), split, repr(source)))


def _options(kind: str, files: Sequence[str]) -> dict[str, Any]:
    """What keeps ``datasets`` from guessing types: CSV has none, "007" and "NA" are texts."""
    from datasets import Features, Value

    if kind != "csv":
        return {}
    with open(files[0], newline="", encoding="utf-8-sig") as stream:
        header = next(csv.reader(stream), [])
    if not all(header) or len(set(header)) < len(header):
        return {}  # pandas makes names for those
    return {"features": Features({column: Value("string") for column in header}), "keep_default_na": False}


def _local(builder: Any, files: Sequence[str]) -> list[str]:
    """The files on this machine; ``datasets`` downloads those that are not, and unpacks them in its cache."""
    from datasets import DownloadConfig, DownloadManager

    if not any("://" in file for file in files):
        return list(files)
    settings = DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    manager = DownloadManager(dataset_name=builder.dataset_name, download_config=settings)
    return list(map(str, manager.download_and_extract(list(files))))


def _of_split(loaded: Any, split: str | Sequence[str] | None, of: str) -> Any:
    """One split of several, or all there is."""
    if not isinstance(loaded, Mapping):
        return loaded
    if split is not None and not isinstance(split, str):
        split = next((name for name in split if name in loaded), None)
    if split is None:
        split = "train" if "train" in loaded else str(next(iter(loaded)))
    if split not in loaded:
        raise DatasetError(f"{of} has no split {split!r}: it has {', '.join(map(str, loaded))}.")
    return loaded[split]


def _kind(path: Path) -> str | None:
    """What a file is, by its suffix; JSON may be compressed."""
    if path.suffix.lower() not in COMPRESSED:
        return _FORMATS.get(path.suffix.lower())
    return "json" if _FORMATS.get(Path(path.stem).suffix.lower()) == "json" else None


def dataset_episodes(
    dataset: Any,
    name: str | None = None,
    split: str | Sequence[str] | None = None,
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
        primers: the specs of the dataset's columns; inferred from the first row if ``None``. A row that lacks a column has
            ``None`` there.
        device: where tensor columns are put.

    Raises:
        ValueError: a column of the dataset has the name of one that the primer writes.
        DatasetError: at a reset: a row of a dataloader has a column that the first one lacks.
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
        example = self._example(episodes)
        if primers is None:
            specs = {
                key: Unbounded(shape=(*batch_size, *value.shape), dtype=value.dtype)
                if isinstance(value, torch.Tensor)
                else NonTensor(shape=batch_size, example_data=value)
                for key, value in example.items()
            }
            primers = Composite(specs, shape=batch_size)
        primers = primers.clone()
        self._names = tuple(dict.fromkeys([*example, *map(str, primers.keys())]))
        for key in EPISODE_KEYS:
            primers[key] = Unbounded(shape=batch_size, dtype=torch.int64, device=primers.device)
        super().__init__(
            dataloader=episodes, primers=primers, batch_size=batch_size, repeats=episodes.repeats, device=device
        )
        del self.endless_dataloader  # torchrl's own way to the rows, which no pickle takes

    def _example(self, episodes: Episodes) -> dict[str, Any]:
        """A row that has all the columns."""
        return episodes.example()

    def _begun(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows as the conversations that start from them see them."""
        return rows

    def reset_dataloader(self) -> RowPrimer:
        """Start from the first row again."""
        self.episodes.restart()
        return self

    def _load_from_dataloader(self, reset: torch.Tensor | None = None) -> TensorDictBase:
        count = 1 if reset is None else int(reset.sum())
        rows = self._begun([self.episodes.next() for _ in range(count)])
        loaded = self._columns(rows, torch.Size([count]), self.device)
        return loaded[0] if reset is None or reset.ndim == 0 else loaded

    def _reset_func(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        reset = tensordict.get("_reset", None)
        [count] = self.batch_size
        chosen = [True] * count if reset is None else reset.reshape(count, -1).any(-1).tolist()
        if not any(chosen):
            return tensordict_reset
        made = self.draw(chosen, tensordict_reset.device)
        for key in made.keys():
            tensordict_reset.set(key, made.get(key))
        return tensordict_reset

    def draw(self, wanted: Sequence[bool], device: torch.device | None = None) -> TensorDict:
        """The next rows of the dataset, as columns, batch size (B,); with one of them in the rows that want none.

        Args:
            wanted: which rows of the batch want one, at least one of them.
            device: where objects are put.
        """
        drawn = self._begun([self.episodes.next() for each in wanted if each])
        rows, filler = iter(drawn), drawn[0]  # torchrl keeps the other rows as they were
        return self._columns([next(rows) if each else filler for each in wanted], self.batch_size, device)

    def _columns(
        self, rows: Sequence[Mapping[str, Any]], batch: torch.Size, device: torch.device | None
    ) -> TensorDict:
        """Rows as columns: a tensor is made, and moved to its device, once for all of them."""
        td = TensorDict(batch_size=batch, device=device)
        for row in rows:
            if late := [key for key in row if key not in self._names]:
                raise DatasetError(
                    f"row {row[ROW]} of the dataloader has the column(s) {late}, which its first row lacks: an environment has the "
                    f"same columns in every row. Let the first row have them, None where there is nothing, or name them in "
                    f"primers=Composite(...)."
                )
        for key in self._names:
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
