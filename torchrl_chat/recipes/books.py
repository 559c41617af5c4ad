"""The books of a run: the files of its folder that have a line a step, its settings, and what is made of them at the end.

Law of this file: a step counts when a checkpoint behind it is on the disk. A checkpoint knows how long the files were; what was
written behind that is cut off when the run is resumed, and files that are shorter are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torchrl_chat.files import replacing, to_disk
from torchrl_chat.recipes.settings import RunConfig

# What may be another when a run is resumed: none of it has a part in what is sampled and learned. (Where the learning rate
# falls towards the last step, --steps has: the rest of the run then follows the new number.)
_FREE = {
    "out", "resume", "checkpoint", "steps", "device", "vllm_memory", "save_every", "keep", "eval", "eval_every", "show_every", "rollouts",
    "logger", "merge", "checkpointing", "share_prefixes", "max_tokens",
}  # fmt: skip


class Books:
    """The files of a folder, which are written by one process.

    Args:
        folder: the run's.

    Attributes:
        files: ``"metrics"``, ``"trained"``, ``"evaluations"`` and ``"rollouts"``, a JSONL file each.

    Example:
        >>> books = Books("runs/one")
        >>> books.files["metrics"].name
        'metrics.jsonl'
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.files = {
            key: self.folder / f"{key}.jsonl" for key in ("metrics", "trained", "evaluations", "rollouts")
        }
        self._lock: TextIO | None = None

    def take(self) -> None:
        """Make the folder, and keep others from it until :meth:`close`.

        Raises:
            BlockingIOError: another process is at it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder / "lock")

    def close(self) -> None:
        """Let others at the folder."""
        if self._lock is not None:
            self._lock.close()

    # ------------------------------------------------------------------ before the first step
    def check_settings(self, config: RunConfig) -> None:
        """Refuse a run that was begun with others.

        Raises:
            FileExistsError: there is a run, which is not to be resumed.
            ValueError: it was begun with other settings; or they cannot be read.
        """
        written = self.folder / "config.json"
        if not written.exists():
            return
        if not config.resume:
            raise FileExistsError(f"{self.folder} holds a run: go on with --resume, or choose another --out.")
        settings = json.loads(json.dumps(dataclasses.asdict(config)))
        # A run that was begun before there was a setting had its default.
        begun = {field.name: field.default for field in dataclasses.fields(config)} | _settings(written)
        other = {key for key in settings if key not in _FREE and begun[key] != settings[key]}
        if other:
            changes = ", ".join(f"{key}={begun[key]!r}, now {settings[key]!r}" for key in sorted(other))
            raise ValueError(f"{self.folder} was begun with {changes}. Resume with the same settings.")

    def check(self, checkpoint: Path, sizes: Mapping[str, int]) -> None:
        """Refuse files that lack lines which were there when a checkpoint was written.

        Raises:
            ValueError: a file is too short; or a line of the evaluations cannot be read.
        """
        for key in ("metrics", "trained", "evaluations"):  # of rollouts some may have been deleted, for their size
            path, size = self.files[key], sizes[key]
            there = path.stat().st_size if path.exists() else 0
            if there < size:
                raise ValueError(
                    f"{path} has {there:,} bytes, and had {size:,} when {checkpoint.name} was written: lines are missing. Put the "
                    "file back, or begin anew with another --out."
                )
        path = self.files["evaluations"]
        written = path.read_bytes()[: sizes["evaluations"]] if path.exists() else b""
        for number, line in enumerate(written.splitlines(), 1):
            _evaluation(path, number, line)

    def begin(self, config: RunConfig, sizes: Mapping[str, int] | None) -> None:
        """Write down the settings, and cut off what is behind a checkpoint; all of it, where there is none."""
        with replacing(self.folder / "config.json") as file:
            file.write((json.dumps(dataclasses.asdict(config), indent=2) + "\n").encode())
        for key, path in self.files.items():
            path.touch()
            size = 0 if sizes is None else sizes[key]
            if path.stat().st_size > size:
                os.truncate(path, size)

    # ------------------------------------------------------------------ step by step
    def write(self, key: str, line: Mapping[str, Any]) -> None:
        """Add a line to a file."""
        from torchrl_chat.rollouts import plain

        with open(self.files[key], "a") as file:
            file.write(json.dumps(plain(line)) + "\n")  # a number that is not finite is null

    def sizes(self) -> dict[str, int]:
        """How long the files are, which are on the disk then."""
        for path in self.files.values():
            to_disk(path)
        return {key: path.stat().st_size for key, path in self.files.items()}

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of the evaluations.

        Raises:
            ValueError: one is damaged.
        """
        path = self.files["evaluations"]
        return [_evaluation(path, number, line) for number, line in enumerate(path.read_bytes().splitlines(), 1)]

    # ------------------------------------------------------------------ at the end
    def draw(self, title: str) -> None:
        """The learning curve as a picture, where matplotlib is installed."""
        from torchrl_chat.recipes.curve import draw_curve

        metrics = [json.loads(line) for line in self.files["metrics"].read_bytes().splitlines()]
        with contextlib.suppress(ImportError):  # a run can do without a picture
            draw_curve(self.folder / "curve.png", metrics, self.evaluations(), title)

    def conclude(self, step: int, skipped: int) -> dict[str, Any]:
        """Write the result of a run of so many steps, of which so many updates were left out, and tell it."""
        first, *others = self.evaluations()
        result = {
            "before": first["pass_rate"],
            "after": [first, *others][-1]["pass_rate"],
            "steps": step,
            "skipped": skipped,
        }
        (self.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        return result


def _settings(path: Path) -> dict[str, Any]:
    """The settings that a run was begun with."""
    try:
        begun = json.loads(path.read_bytes())
        if not isinstance(begun, dict):
            raise ValueError(f"it holds a {type(begun).__name__}, not settings by name")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): what the run was begun with cannot be compared. Put the file back; or, if you are sure "
            "that the settings are the same, delete it: it is written anew."
        ) from None
    return begun


def _evaluation(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """A line of evaluations.jsonl."""
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or not all(
            isinstance(entry[key], (int, float)) for key in ("step", "pass_rate")
        ):
            raise ValueError("its 'step' and 'pass_rate' are not numbers")
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path}, line {number} is damaged ({error!r}): the result of the run is made of it. Put the file back, or begin anew "
            "with another --out."
        ) from None
    return entry


def _locked(path: Path, patience: float = 5.0) -> TextIO:
    """Hold a file as long as it is open, so that two processes do not write one run."""
    file = open(path, "w")  # noqa: SIM115
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > end:
                file.close()
                raise BlockingIOError(f"another process is at the run in {path.parent}.") from None
            time.sleep(0.1)  # a process that was killed is not gone at once
