"""Packages that only some verifiers need, asked for before the first answer is graded."""

from __future__ import annotations

import importlib.util


def require(package: str, extra: str, what: str) -> None:
    """Say which extra is missing, without importing the package.

    Args:
        package: the name that is imported.
        extra: the extra of this package that brings it.
        what: what needs it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise ImportError(f"{what} needs the package {package}: pip install 'torchrl_chat[{extra}]'.")
