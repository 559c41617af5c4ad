"""Names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose public names live in its submodules.

    Args:
        package: the package's ``__name__``.
        homes: the submodule of each name.

    Example:
        >>> get, names = lazy("torchrl_chat", {"Verdict": "rewards"})
        >>> get("Verdict").__name__, names()
        ('Verdict', ['Verdict'])
    """

    def get(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home}"), name)

    return get, lambda: sorted(homes)
