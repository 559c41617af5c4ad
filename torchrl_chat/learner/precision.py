"""Mixed precision: a model computes in bfloat16, and its weights and their optimizer's states stay float32 (arXiv:1710.03740).

An update at the learning rates of reinforcement learning is smaller than the spacing of bfloat16 around most weights: in
bfloat16 it would be lost.
"""

from __future__ import annotations

from typing import Any

import torch

from torchrl_chat.learner.fronts import Front, put_in_front
from torchrl_chat.models.passes import unwrapped


def compute_in(model: Any, dtype: torch.dtype) -> Any:
    """Have a model compute in another precision than that of its weights, in place, wherever it is called from.

    What samples and what is scored then go through the same arithmetic, and log-probs are those of either.

    Args:
        model: a transformers model with float32 weights, or a PEFT model of one.
        dtype: ``torch.bfloat16``; ``torch.float32`` leaves the model as it is.

    Returns:
        the model.

    Raises:
        ValueError: it is another dtype, for which gradients would have to be scaled; or the weights are not float32.

    Example:
        >>> import torch
        >>> from torchrl_chat.tiny import tiny_model
        >>> compute_in(tiny_model(64), torch.bfloat16)(torch.tensor([[3, 4]])).logits.dtype
        torch.bfloat16
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: expected torch.bfloat16, or torch.float32.")
    kinds = {weight.dtype for weight in model.parameters() if weight.dtype.is_floating_point}
    if kinds - {torch.float32}:
        raise ValueError(
            f"the weights are {', '.join(map(str, kinds))}: expected torch.float32, which learns small updates."
        )
    if dtype is torch.bfloat16:
        put_in_front(_InBfloat16, unwrapped(model))
    return model


class _InBfloat16(Front):
    computes_in = torch.bfloat16
    """What :func:`~torchrl_chat.models.passes.float_type` says of it."""

    # The module that this stands in front of has parameters and a forward, which a type checker cannot know.
    def forward(self, *args: Any, **given: Any) -> Any:
        device = next(self.parameters()).device.type  # type: ignore[attr-defined]
        with torch.autocast(device, torch.bfloat16):
            return super().forward(*args, **given)  # type: ignore[misc]
