"""Files that are there as a whole or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file that takes the place of another once all of it is written and on the disk; after an error nothing has changed.

    Args:
        path: the file; where there is one already, its mode is kept.

    Example:
        >>> from pathlib import Path
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "numbers"
        >>> with replacing(target) as file:
        ...     _ = file.write(b"1 2 3")
        >>> target.read_text()
        '1 2 3'
    """
    target = Path(path)
    name = target.parent / f".{target.name}.{secrets.token_hex(6)}"
    # Opened, not made by tempfile, which gives it to its owner alone whatever the umask says.
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            if target.exists():
                os.fchmod(handle, stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    to_disk(target.parent)  # the new name, too


def to_disk(path: str | os.PathLike[str]) -> None:
    """See that what was written to a file, or the names in a folder, survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain_name(text: str) -> str:
    """A text as a part of a file's name.

    Example:
        >>> plain_name("reasoning-gym:chain_sum"), plain_name("data/rows.jsonl")
        ('reasoning-gym-chain_sum', 'data-rows.jsonl')
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
