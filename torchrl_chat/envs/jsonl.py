"""The rows of JSON Lines files, read by their number straight from the files, whatever their size.

Law of this file: a row is what ``json.loads`` reads in its line. (``datasets`` 5.2 reads JSON into Arrow, and on the way turns
strings that look like numbers, dates or JSON into those.)
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import lzma
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from torchrl_chat.envs.rows import DatasetError, ListRows, Rows

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""What opens a compressed file, by its suffix."""

_BUFFER = 1 << 20
_HASH = functools.partial(hashlib.blake2b, digest_size=16)
_BOM = b"\xef\xbb\xbf"
_SHOWN = 3  # broken lines that an error message names


def json_rows(paths: Sequence[str | os.PathLike[str]]) -> Rows:
    """The rows of JSON files: an object a line, or one array of objects a file (which is held in memory).

    Args:
        paths: the files, whose rows follow one another.

    Raises:
        DatasetError: a file cannot be read, or a line is no JSON object; the message names file and line.
    """
    files = [Path(path) for path in paths]
    lines = list(map(_is_lines, files))
    if all(lines):
        return JSONRows(files)
    whole = [JSONRows([path]) if by_line else _whole(path) for path, by_line in zip(files, lines, strict=True)]
    return ListRows([row for rows in whole for row in rows], ", ".join(map(str, files)))


class JSONRows(Rows):
    """The rows of JSON Lines files: UTF-8, an object a line; lines of white space are none.

    The files are read through once, at construction: every line is checked, and all columns are known. What is kept of them is
    eight bytes a row, where it begins; a row is read from its file when it is asked for. Compressed files (gzip, bzip2, xz),
    which have no way to the middle, are unpacked into a temporary file without a name.

    A file that is changed in place while it is used is read through again: appended lines do not matter, other changes are
    refused.

    Args:
        paths: the files, whose rows follow one another.

    Raises:
        DatasetError: a file cannot be read, or has lines that are no JSON objects: all are counted, the first are named.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("train.jsonl").write_text('{"answer": "007"}')
        >>> rows = JSONRows(["train.jsonl"])
        >>> rows[0]["answer"]
        '007'
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]):
        columns: dict[str, None] = {}
        broken: list[str] = []
        count = 0
        self._scratch: IO[bytes] | None = None  # all that was compressed
        self._files = [_File(Path(path)) for path in paths]
        for file in self._files:
            for problem in self._index(file, columns):
                count += 1
                broken += [problem] if count <= _SHOWN else []
        if broken:
            more = f"\n  and {count - _SHOWN} more" if count > _SHOWN else ""
            raise DatasetError(
                f"{count} line(s) cannot be read as rows:\n  "
                + "\n  ".join(broken)
                + more
                + "\nCorrect or delete them: a row "
                "is one JSON object in one line."
            )
        self.columns = tuple(columns)
        self._ends = list(itertools.accumulate(len(file.starts) for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def fingerprint(self) -> str:
        """A hash of the files' contents; their names and places have no part in it."""
        return _HASH(b"".join(file.digest for file in self._files)).hexdigest()

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of these numbers."""
        places = [(bisect_right(self._ends, number), number) for number in numbers]
        rows: dict[int, dict[str, Any]] = {}
        for index in dict.fromkeys(index for index, _ in places):
            file, first = self._files[index], self._ends[index] - len(self._files[index].starts)
            with self._opened(file) as (handle, base):
                for number in (number for at, number in places if at == index):
                    start, end = file.span(number - first)
                    row = json.loads(str(_bytes_at(handle, base + start, end - start), "utf-8"))
                    rows[number] = {key: row.get(key) for key in self.columns}
        return [rows[number] for number in numbers]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scratch": None}

    # ------------------------------------------------------------------ the files
    def _index(self, file: _File, columns: dict[str, None]) -> Iterator[str]:
        """Read a file through; what is wrong with its lines comes out one by one."""
        digest, position = _HASH(), 0
        with self._stream(file) as stream:
            for number, line in enumerate(stream, 1):
                digest.update(line)
                start, position = position, position + len(line)
                if number == 1 and line.startswith(_BOM):
                    start, line = len(_BOM), line[len(_BOM) :]
                if line.isspace() or not line:
                    continue
                try:
                    row = json.loads(str(line, "utf-8"))
                except (ValueError, RecursionError) as error:
                    yield f"{file.path}, line {number}: {_reason(error)}"
                    continue
                if isinstance(row, dict):
                    file.starts.append(start)
                    columns.update(dict.fromkeys(row))
                else:
                    yield f"{file.path}, line {number} is a {type(row).__name__}, not an object: {row!r:.60}"
        file.size, file.digest = position, digest.digest()

    @contextlib.contextmanager
    def _stream(self, file: _File) -> Iterator[IO[bytes]]:
        """The contents from the beginning on; a compressed file is unpacked for good."""
        unpack = COMPRESSED.get(file.path.suffix.lower())
        try:
            if unpack is None:
                with open(file.path, "rb", buffering=_BUFFER) as stream:
                    file.stamp = _stamp(stream.fileno())
                    yield stream
                return
            if self._scratch is None:
                self._scratch = tempfile.TemporaryFile()  # noqa: SIM115
            file.base = self._scratch.seek(0, os.SEEK_END)
            with unpack(file.path, "rb") as packed:
                while block := packed.read(_BUFFER):
                    self._scratch.write(block)
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise DatasetError(f"{file.path} cannot be read: {type(error).__name__}: {error}") from error
        self._scratch.seek(file.base)
        yield self._scratch

    @contextlib.contextmanager
    def _opened(self, file: _File) -> Iterator[tuple[int, int]]:
        """A descriptor to read the file's rows from, and where its contents begin there.

        Nothing stays open between two reads: datasets have more files than a process may open, and a fork shares positions.
        """
        if file.path.suffix.lower() in COMPRESSED:
            if self._scratch is None:  # after a pickle
                for packed in self._files:
                    if packed.path.suffix.lower() in COMPRESSED:
                        with self._stream(packed) as stream:
                            if hashlib.file_digest(stream, _HASH).digest() != packed.digest:  # type: ignore[arg-type]
                                raise _changed(packed)
            assert self._scratch is not None
            yield self._scratch.fileno(), file.base
            return
        try:
            handle = os.open(file.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DatasetError(f"{file.path} cannot be read any more: {error}") from error
        try:
            if _stamp(handle) != file.stamp:
                self._check_unchanged(file, handle)
            yield handle, 0
        finally:
            os.close(handle)

    def _check_unchanged(self, file: _File, handle: int) -> None:
        digest, position = _HASH(), 0
        while position < file.size and (block := _bytes_at(handle, position, min(_BUFFER, file.size - position))):
            digest.update(block)
            position += len(block)
        if digest.digest() != file.digest:
            raise _changed(file)
        file.stamp = _stamp(handle)


class _File:
    """One file: where its rows begin, and what its contents were."""

    def __init__(self, path: Path):
        self.path = path
        self.starts = array("q")
        self.size = 0
        self.base = 0  # of what was unpacked, in the temporary file
        self.digest = b""
        self.stamp: tuple[int, ...] = ()

    def span(self, row: int) -> tuple[int, int]:
        """Where a row begins, and where the next one does."""
        return self.starts[row], self.starts[row + 1] if row + 1 < len(self.starts) else self.size


def _stamp(handle: int) -> tuple[int, ...]:
    status = os.fstat(handle)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _bytes_at(handle: int, start: int, size: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(handle, size, start)
    os.lseek(handle, start, os.SEEK_SET)  # Windows, which has no fork to share the position with
    return os.read(handle, size)


def _changed(file: _File) -> DatasetError:
    return DatasetError(f"{file.path} was changed since it was opened: make the environment anew.")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    if isinstance(error, RecursionError):
        return "nested too deeply to be read"
    return f"no JSON ({error})"


# ---------------------------------------------------------------------- files that are no lines
def _is_lines(path: Path) -> bool:
    """Whether a file is none that holds one array, or one object over several lines."""
    unpack: Callable[..., Any] = COMPRESSED.get(path.suffix.lower(), open)
    try:
        with unpack(path, "rb") as stream:
            line = stream.readline(_BUFFER).removeprefix(_BOM)
            while line and line.isspace():
                line = stream.readline(_BUFFER)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DatasetError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    # `{` alone opens an object that is written over several lines; a line of JSON Lines that is cut is another matter.
    return not line.lstrip().startswith(b"[") and line.strip() != b"{"


def _whole(path: Path) -> list[Any]:
    """The rows of a file that is one JSON value."""
    unpack: Callable[..., Any] = COMPRESSED.get(path.suffix.lower(), open)
    expected = "expected an object a line, or one array of objects"
    try:
        with unpack(path, "rb") as stream:
            value = json.loads(str(stream.read().removeprefix(_BOM), "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: {_reason(error)}: {expected}.") from error
    if isinstance(value, dict):
        if not value or not all(isinstance(column, list) for column in value.values()):
            raise DatasetError(f"{path} is one JSON object over several lines: {expected}.")
        if len(sizes := {len(column) for column in value.values()}) != 1:
            raise DatasetError(
                f"{path} is one object of columns whose lengths differ, {sorted(sizes)}: {expected}."
            )
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value
