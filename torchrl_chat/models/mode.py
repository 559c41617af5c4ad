"""The mode that a model is in while something is sampled from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside, a model is in ``eval()``; behind it, each of its modules is in the mode that it was in, also after an error.

    In ``train()`` a model samples from another distribution than the one that is trained: layers under gradient checkpointing
    give up their cache, so that each token is sampled after the one before it alone, and with dropout each token comes from a
    random part of the network.

    Args:
        model: a module; anything else is left alone.

    Example:
        >>> import torch
        >>> model = torch.nn.Dropout().train()
        >>> with evaluating(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    if not isinstance(model, torch.nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in modes):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:  # some may be frozen, and in another mode than the whole
            module.training = training
