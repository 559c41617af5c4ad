"""Activation checkpointing: layers keep their inputs only, and are computed once more for the gradient (arXiv:1604.06174).

transformers has this too, in ``train()`` only, where dropout is on as well, and a model then learns from other log-probs than
those it sampled with. Here it is there whenever gradients are asked for, whatever the mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from torchrl_chat.learner.fronts import Front, put_in_front
from torchrl_chat.models.passes import ModelError


def recompute_activations(model: Any) -> int:
    """Have a model keep no activations inside its layers, in place, in passes that have gradients and keep no cache.

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
        put_in_front(_Recomputed, layer)
    return len(layers)


# A layer that writes what the next tokens go on from would do so twice.
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params", "state")


class _Recomputed(Front):
    # The layer that this stands in front of has a forward, which a type checker cannot know.
    def forward(self, *args: Any, **given: Any) -> Any:
        from transformers import Cache

        own = super().forward  # type: ignore[misc]
        cached = any(given.get(name) is not None for name in _CACHES) or any(isinstance(arg, Cache) for arg in args)
        if cached or given.get("use_cache") or not torch.is_grad_enabled():
            return own(*args, **given)
        return checkpoint(own, *args, use_reentrant=False, **given)


def is_recomputed(model: Any) -> bool:
    """Whether a model's layers keep no activations, by :func:`recompute_activations`."""
    return any(isinstance(part, _Recomputed) for part in model.modules())
