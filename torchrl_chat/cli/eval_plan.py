"""Which runs an evaluation of several models on several datasets is made of: one dataset, one model and one folder each."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Sequence
from pathlib import Path

from torchrl_chat.endpoint import shown_url
from torchrl_chat.evaluation.runs import tails


def single_runs(arguments: argparse.Namespace, folder: Path) -> list[argparse.Namespace]:
    """The settings of each run, ``out`` being its folder and ``label`` the model's name.

    Args:
        arguments: with lists under ``dataset``, ``model``, ``data`` and ``endpoint`` (or ``None`` under the last two).
        folder: of all of them: of one run the folder itself, of several MODEL/DATASET in there.

    Raises:
        ValueError: the lists do not fit one another.

    Example:
        >>> import argparse
        >>> from pathlib import Path
        >>> given = argparse.Namespace(dataset=["digits", "sums"], model=["a/x", "a/y"], data=None, endpoint=None)
        >>> [(one.dataset, one.model, str(one.out)) for one in single_runs(given, Path("runs"))][:2]
        [('digits', 'a/x', 'runs/x/digits'), ('sums', 'a/x', 'runs/x/sums')]
    """
    for name in ("dataset", "model"):
        values = getattr(arguments, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} {' '.join(values)}: one of them is there twice.")
    data = _data_of(arguments.dataset, arguments.data)
    models = _models(arguments.model, arguments.endpoint)
    labels = _labels(models)
    runs = []
    for (model, endpoint), label in zip(models, labels, strict=True):
        for dataset in arguments.dataset:
            one = copy.copy(arguments)
            one.dataset, one.data, one.model, one.endpoint, one.label = (
                dataset,
                data.get(dataset),
                model,
                endpoint,
                label,
            )
            one.out = (
                folder / _plain(label) / _plain(dataset) if len(models) * len(arguments.dataset) > 1 else folder
            )
            runs.append(one)
    return runs


def _data_of(datasets: Sequence[str], data: Sequence[str] | None) -> dict[str, str]:
    """The local copy of each dataset that has one."""
    found: dict[str, str] = {}
    for text in data or ():
        name, equals, path = text.partition("=")
        if not (equals and name in datasets):
            if len(datasets) > 1:
                raise ValueError(
                    f"--data {text}: of several datasets expected NAME=PATH, with NAME one of {', '.join(datasets)}."
                )
            name, path = datasets[0], text
        if name in found:
            raise ValueError(f"--data: {name} has two paths, {found[name]} and {path}.")
        found[name] = path
    return found


def _models(models: Sequence[str], endpoints: Sequence[str] | None) -> list[tuple[str, str | None]]:
    """Each model with its endpoint."""
    if endpoints is None:
        return [(model, None) for model in models]
    if len(endpoints) == 1:
        return [(model, endpoints[0]) for model in models]
    if len(models) == 1:
        return [(models[0], endpoint) for endpoint in endpoints]
    if len(models) != len(endpoints):
        raise ValueError(
            f"{len(models)} models and {len(endpoints)} endpoints: expected one endpoint for all, one for each model, or one model."
        )
    return list(zip(models, endpoints, strict=True))


def _labels(models: Sequence[tuple[str, str | None]]) -> list[str]:
    names = tails([model for model, _ in models])
    if len(set(names)) < len(models):  # one model at several endpoints
        hosts = [re.sub(r"^\w+://|/.*$", "", shown_url(endpoint) or "") for _, endpoint in models]
        names = [f"{name}@{host}" for name, host in zip(names, hosts, strict=True)]
    if len({_plain(name) for name in names}) < len(models):
        names = [f"{name}-{place}" for place, name in enumerate(names, 1)]
    return names


def _plain(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.@+-]+", "-", name).strip(".-") or "run"
