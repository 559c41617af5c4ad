"""Activation checkpointing: layers keep their inputs only, and are computed once more for the gradient (arXiv:1604.06174).

transformers has this too, in ``train()`` only, where dropout is on as well, and a model then learns from other log-probs than
those it sampled with. Here it is there whenever gradients are asked for, whatever the mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from torchrl_chat.models.passes import ModelError


def recompute_activations(model: Any) -> int:
    """Have a model keep no activations inside its layers, in place.

    Args:
        model: a transformers model, or a PEFT model of one.

    Returns:
        how many layers are recomputed; those that already are count, too.

    Raises:
        ModelError: the architecture does not say what its layers are.

    Example:
        >>> from torchrl_chat.tiny import tiny_model
        >>> recompute_activations(tiny_model(64))
        2
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers that transformers would checkpoint: its activations cannot be recomputed."
        )
    for layer in layers:
        if not isinstance(layer, _Recomputed):
            # A class of its own, not a function in the object, so that copies of the model have it, and call themselves.
            layer.__class__ = type(type(layer).__name__, (_Recomputed, type(layer)), {})
    return len(layers)


class _Recomputed:
    """In front of a layer's class."""

    def forward(self, *args: Any, **given: Any) -> Any:
        own = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled() or given.get("use_cache"):
            return own(*args, **given)
        return checkpoint(own, *args, use_reentrant=False, **given)
