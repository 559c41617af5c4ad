"""What users name on a command line: an object in a module or in a Python file of theirs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any


def is_name(text: str) -> bool:
    """Whether a text may name such an object."""
    module, colon, name = text.partition(":")
    return bool(colon and module and name.isidentifier())


def named(text: str) -> Any:
    """The object that a text names.

    Args:
        text: ``"package.module:Name"``, or ``"folder/file.py:Name"``. A module of the current folder is found too.

    Raises:
        ValueError: it is no such text, there is no such object, or its module cannot be imported.

    Example:
        >>> named("json:dumps")([1])
        '[1]'
    """
    if not is_name(text):
        raise ValueError(f"{text!r} names nothing: expected module:Name, or file.py:Name.")
    module, _, name = text.partition(":")
    try:
        found = _of_file(Path(module)) if module.endswith(".py") else _of_module(module)
        return getattr(found, name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ValueError(f"{text} cannot be loaded: {type(error).__name__}: {error}") from error


def _of_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        sys.path.append("")  # a console script does not look into the current folder
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove("")


def _of_file(path: Path) -> Any:
    # Under its own name, so that what it defines can be pickled here.
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    held = sys.modules.get(name)
    if held is not None and getattr(held, "__file__", None) == str(path.resolve()):
        return held
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path.resolve())
    if held is None:
        sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if sys.modules.get(name) is module:
            del sys.modules[name]
        raise
    return module
