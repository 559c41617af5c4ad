"""The rows of a dataset, read by their number: what an order of episodes draws from.

Law of this file: a value is what its source holds. Every row has all columns of the dataset, ``None`` where the source has
nothing for it; below that nothing is added, left out or converted, but for what :class:`ArrowRows` tells.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import pickle
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from datasets import Dataset


class DatasetError(ValueError):
    """A dataset cannot be opened, or not be read on; the text names it, and says what to do."""


class Rows(Sequence[dict[str, Any]]):
    """Rows by number; what a source has to define is ``columns``, ``__len__`` and ``__getitems__``.

    Attributes:
        columns: the keys of every row, in the order in which the source names them first.
        source: what the rows are made from, where they are made, to be compared when a state is loaded.
    """

    columns: tuple[str, ...]
    source: Mapping[str, Any] | None = None

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of these numbers, from 0 on, in this order."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str | None:
        """The same for the same rows, another for others; ``None`` where that cannot be told."""
        return None

    @property
    def kept(self) -> bytes | None:
        """The rows themselves, for a state, where they cannot be had again in another process."""
        return None

    def restore(self, kept: bytes) -> None:
        """Take the rows of a state instead of those that are here.

        Raises:
            ValueError: they cannot be taken.
        """
        raise ValueError("the state holds rows that were generated, and this environment reads its rows elsewhere.")

    @overload
    def __getitem__(self, number: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, number: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, number: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(number, slice):
            return self.__getitems__(range(*number.indices(len(self))))
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no row {number}: there are {len(self)}.")
        return self.__getitems__([number % len(self)])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), 256):
            yield from self.__getitems__(range(start, min(start + 256, len(self))))


class ListRows(Rows):
    """The rows of a list of dicts: their own objects, unchanged.

    Args:
        rows: the dicts; they may differ in their keys, and a key in its type.
        of: what error messages call the list.

    Raises:
        DatasetError: one is no dict, or a key is no string; the message names the row.

    Example:
        >>> ListRows([{"query": "a"}, {"query": "b", "hint": "007"}])[0]
        {'query': 'a', 'hint': None}
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], of: str = "the list"):
        columns: dict[str, None] = {}
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DatasetError(
                    f"row {number} of {of} is a {type(row).__name__}, {row!r:.60}: expected a dict, such as "
                    '{"query": ..., "answer": ...}.'
                )
            columns.update(dict.fromkeys(row))
        if odd := [key for key in columns if not isinstance(key, str)]:
            raise DatasetError(f"{of} has rows with the key {odd[0]!r}: expected strings as keys.")
        self.columns = tuple(columns)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of these numbers."""
        return [{key: row.get(key) for key in self.columns} for row in (self._rows[number] for number in numbers)]

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """A hash of the rows as JSON; ``None`` where one holds what JSON has no form for."""
        digest = hashlib.blake2b(digest_size=16)
        try:
            for row in self._rows:
                digest.update(json.dumps(dict(row)).encode() + b"\n")
        except (TypeError, ValueError, RecursionError):
            return None
        return digest.hexdigest()


class GeneratedRows(ListRows):
    """Rows that were made here, and that another process may not make alike: a state takes them along.

    Args:
        rows: the dicts.
        source: what they were made from, without the seed.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], source: Mapping[str, Any]):
        super().__init__(rows, "the generated rows")
        self.source = dict(source)

    @functools.cached_property
    def kept(self) -> bytes:
        """The rows, pickled and compressed."""
        return zlib.compress(pickle.dumps(list(self._rows)))

    def restore(self, kept: bytes) -> None:
        """Take the rows of a state; those that it lacks stay what they are.

        Raises:
            ValueError: it holds no rows, or objects other than plain values.
        """
        if kept == self.__dict__.get("kept"):
            return
        try:
            rows = _PlainValues(io.BytesIO(zlib.decompress(kept))).load()
        except (zlib.error, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"the state has no rows that can be read: {error}") from error
        self.__dict__.pop("kept", None)
        self.__dict__.pop("fingerprint", None)
        self._rows = [*rows, *self._rows[len(rows) :]]


class _PlainValues(pickle.Unpickler):
    """Reads lists, dicts, numbers and texts; what a pickle could run by being read is refused."""

    _CLASSES = {
        *itertools.product(("numpy.core.multiarray", "numpy._core.multiarray"), ("scalar",)),
        ("numpy", "dtype"),
        *itertools.product(("datetime",), ("date", "datetime", "time", "timedelta", "timezone")),
        ("decimal", "Decimal"),
        ("fractions", "Fraction"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is no plain value.")
        return super().find_class(module, name)


class ArrowRows(Rows):
    """The rows of a ``datasets.Dataset``, with what Arrow has made of them told, and kept out of prompts.

    Arrow has one type for all rows of a column: dicts are padded with the keys that others have, their values null. A null
    that the data had cannot be told from such a one. In messages and tool schemas (dicts with ``"role"``, or with ``"type":
    "function"``, and what is inside them) keys whose value is null are left out, so that no template writes them; a message's
    ``"content"`` stays. Elsewhere they stay ``None``.

    Args:
        dataset: the dataset.

    Warns:
        UserWarning: dicts of a column have nulls, named by their place; or the dataset was read from JSON by ``datasets``,
            and a column has the types that come of converting strings.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.columns = tuple(dataset.column_names)
        self._nested = [name for name, feature in dataset.features.items() if _is_nested(feature)]
        self._tell()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of these numbers."""
        rows = self.dataset.__getitems__(list(numbers))
        for name in self._nested:
            for row in rows:
                row[name] = _unpadded(row[name])
        return rows

    def _tell(self) -> None:
        table = self.dataset.data
        chunks = [(name, chunk) for name in self._nested for chunk in table.column(name).chunks]
        places = list(dict.fromkeys(place for name, chunk in chunks for place in _nulls_in(chunk, name)))
        if places:
            warnings.warn(
                f"the dataset has nulls inside dicts: {_some(places)}. Arrow pads the dicts of a column with the keys of all "
                f"other rows, and a null of the data looks alike: in messages and tool schemas these keys are left out, "
                f"elsewhere they are None. A JSONL file or a list of rows keeps what was written.",
                stacklevel=2,
            )
        of_json = self.dataset.info.builder_name == "json"
        changed = [name for name, feature in self.dataset.features.items() if _may_be_converted(feature, of_json)]
        if changed:
            warnings.warn(
                f"the column(s) {_some(changed)} were read from JSON by the package datasets, which turns strings that look "
                f'like numbers, null, JSON or dates into those ("007" into 7). Pass the path of the JSONL file itself: its '
                f"values are then taken as they are.",
                stacklevel=2,
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:6]))
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"


def _inner(feature: Any) -> list[tuple[str, Any]]:
    """The features inside a feature, each with how its place is written."""
    if isinstance(feature, Mapping):
        return [(f".{key}", inner) for key, inner in feature.items()]
    if isinstance(feature, list):
        return [("[]", feature[0])]
    inner = getattr(feature, "feature", None)  # List, LargeList, Sequence
    return [] if inner is None else [("[]", inner)]


def _is_nested(feature: Any) -> bool:
    return isinstance(feature, Mapping) or any(_is_nested(inner) for _, inner in _inner(feature))


def _may_be_converted(feature: Any, of_json: bool) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    own = type(feature).__name__ == "Json" or (of_json and dtype.startswith(("timestamp", "date", "time")))
    return own or any(_may_be_converted(inner, of_json) for _, inner in _inner(feature))


def _nulls_in(array: Any, place: str) -> Iterator[str]:
    """Where dicts of a column have nulls, such as ``messages[].tool_calls``; only validity bits are read."""
    import pyarrow

    if pyarrow.types.is_struct(array.type):
        for index, child in enumerate(array.flatten()):  # where the dict itself is null, so are these
            inside = f"{place}.{array.type.field(index).name}"
            if child.null_count > array.null_count:
                yield inside
            yield from _nulls_in(child, inside)
    elif hasattr(array, "values") and not pyarrow.types.is_map(array.type):
        yield from _nulls_in(array.values, f"{place}[]")


def _unpadded(value: Any) -> Any:
    """Messages and tool schemas, alone or in a list, without the nulls inside them; anything else as it is."""
    if isinstance(value, list):
        return [_unpadded(item) for item in value]
    if isinstance(value, dict) and ("role" in value or value.get("type") == "function"):
        return _without_nulls(value, {"content"} if "role" in value else set())
    return value


def _without_nulls(value: Any, kept: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item, set()) for key, item in value.items() if item is not None or key in kept}
    return [_without_nulls(item, set()) for item in value] if isinstance(value, list) else value
