"""The rollout files of a folder: which there are, and which of the files beside them the page may read.

A folder of runs holds much that ends in ``.jsonl`` and is none: metrics, evaluations, lists of what was trained. What a file is
stands in its first line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

BESIDE = ("metrics.jsonl", "evaluations.jsonl")
"""The files of a run that its curves are drawn from."""
_FIRST_LINE = 1 << 20  # bytes of a file's first line that are read to see what it holds
_MOST = 1000  # files that are listed


class RolloutFiles:
    """What of a disk the viewer shows.

    Args:
        place: a folder of rollout files (``*.jsonl``, in subfolders too), or one such file.

    Raises:
        ValueError: there is no such folder or file.

    Example:
        >>> from pathlib import Path
        >>> for name, line in (("rollouts", '{"version": 1, "messages": []}'), ("metrics", '{"step": 0}')):
        ...     _ = Path(f"{name}.jsonl").write_text(line)
        >>> [(file["name"], file["beside"]) for file in RolloutFiles(".").listed()["files"]]
        [('rollouts.jsonl', ['metrics.jsonl'])]
    """

    def __init__(self, place: str | os.PathLike[str]):
        path = Path(place).resolve()
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"there is no rollout file or folder {os.fspath(place)}.")
        self._only = None if path.is_dir() else path
        self._root = path if path.is_dir() else path.parent
        self._known: dict[Path, tuple[tuple[int, int, int], bool]] = {}

    @property
    def name(self) -> str:
        """The folder's or the file's own name, without the folders around it: others may read it."""
        return (self._only or self._root).name or "/"

    def listed(self) -> dict[str, Any]:
        """The rollout files, newest first.

        Returns:
            ``"files"``: of each its ``"name"`` below the folder, its ``"size"`` in bytes, when it was ``"modified"`` (seconds since
            1970) and the names of the files ``"beside"`` it that curves are drawn from; ``"left_out"``: how many more there are;
            ``"others"``: how many files with the same ending hold no episodes.
        """
        found: list[dict[str, Any]] = []
        others = 0
        known = {}
        for path in [self._only] if self._only is not None else self._root.rglob("*.jsonl"):
            name = path.relative_to(self._root)
            try:
                if self.path(name.as_posix()) is None:
                    continue
                stat = path.stat()
                state = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                before = self._known.get(path)
                holds = before[1] if before is not None and before[0] == state else _holds_episodes(path)
            except OSError:
                continue  # it was deleted meanwhile
            known[path] = (state, holds)
            if not holds and self._only is None:
                others += 1
                continue
            beside = [name.with_name(other).as_posix() for other in BESIDE]
            beside = [other for other in beside if self.path(other) is not None]
            entry = {"name": name.as_posix(), "size": stat.st_size, "modified": stat.st_mtime, "beside": beside}
            found.append(entry)
        self._known = known
        found.sort(key=lambda entry: -entry["modified"])
        return {"files": found[:_MOST], "left_out": max(0, len(found) - _MOST), "others": others}

    def path(self, name: str) -> Path | None:
        """The file of that name; ``None`` where the page may not open it: links out of the folder are not followed."""
        try:
            path = (self._root / name).resolve()
            if self._only is not None:
                shown = path == self._only or (path.parent == self._root and path.name in BESIDE)
            else:
                shown = path.suffix == ".jsonl"
            return path if shown and path.is_relative_to(self._root) and path.is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            return None


def _holds_episodes(path: Path) -> bool:
    """Whether a file is one of rollouts, by its first line: an object with messages."""
    with path.open("rb") as file:
        first = file.readline(_FIRST_LINE)
    try:
        line = json.loads(first)
    except ValueError:  # longer than what was read, or being written
        return first.startswith(b'{"version":') or (first.startswith(b"{") and b'"messages":' in first)
    return isinstance(line, dict) and "messages" in line
