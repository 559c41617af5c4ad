"""An optimizer step that is not taken where it would make the weights something else than numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchrl_chat import ranks

BAD_STEPS = (
    "not_finite_in_a_row"  # in the optimizer's first group, so that its state_dict carries the count over a restart
)


class NotFiniteError(ArithmeticError):
    """Losses, gradients or weights that are NaN or infinite; the text says where, and what to look at."""


@dataclass(frozen=True, slots=True)
class Step:
    """What became of an optimizer step; true if it was taken."""

    taken: bool
    grad_norm: float
    """The norm of all gradients together, before they were clipped; NaN or infinite where the step was not taken for it."""

    def __bool__(self) -> bool:
        return self.taken


def take_step(
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor | float | Iterable[torch.Tensor | float],
    *,
    max_grad_norm: float | None = None,
    patience: int = 5,
) -> Step:
    """Clip the gradients and let the optimizer take its step, if the loss and the norm of the gradients are finite.

    One NaN in a gradient makes every weight NaN through the clipping alone, and the optimizer keeps it in its state for ever. So
    such a step is left out, by all processes of a run (:mod:`torchrl_chat.ranks`) if one of them cannot take it: weights and optimizer stay bit for bit what they were, but for the gradients, which are cleared.
    How often that happened in a row stands in the optimizer's first parameter group, and so in its ``state_dict()``.

    Args:
        optimizer: its parameters have their gradients; those without one are left alone.
        loss: that of the step, or those of its microbatches.

    Keyword Args:
        max_grad_norm: gradients are clipped to this norm; not at all if ``None``.
        patience: the so many-th such step in a row is an error.

    Returns:
        whether the step was taken, and the norm of the gradients.

    Raises:
        NotFiniteError: ``patience`` steps in a row were not finite.
        ValueError: ``patience`` or ``max_grad_norm`` is not positive.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> loss = (weight * torch.tensor([1.0, float("nan")])).sum()
        >>> loss.backward()
        >>> take_step(optimizer, loss, max_grad_norm=1.0), weight.tolist()
        (Step(taken=False, grad_norm=nan), [1.0, 1.0])
    """
    if patience < 1:
        raise ValueError(f"patience={patience}: expected at least 1 step.")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={max_grad_norm}: expected more than 0, or None.")
    losses = [loss] if isinstance(loss, (torch.Tensor, float, int)) else list(loss)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # With an infinite norm the clipping does nothing but measure.
    norm = nn.utils.clip_grad_norm_(parameters, torch.inf if max_grad_norm is None else max_grad_norm)
    if hasattr(norm, "full_tensor"):  # of gradients that lie in parts on several processes
        norm = norm.full_tensor()
    # One transfer from the device for all of them.
    told = [torch.as_tensor(value).detach().float().reshape(()).to(norm.device) for value in losses]
    group = optimizer.param_groups[0]
    size, *numbers = torch.stack((norm.float().reshape(()), *told)).tolist()
    if not ranks.most(not all(map(math.isfinite, (size, *numbers)))):
        group[BAD_STEPS] = 0
        optimizer.step()
        return Step(True, size)
    group[BAD_STEPS] = group.get(BAD_STEPS, 0) + 1
    optimizer.zero_grad(set_to_none=True)
    if group[BAD_STEPS] >= patience:
        raise NotFiniteError(
            f"{group[BAD_STEPS]} optimizer steps in a row were not finite, the last with the loss {sum(numbers)} and the "
            f"gradient norm {size}; none of them was taken. Look at the rewards and log-probs of the last batch, at the "
            "learning rate, and at the precision of the model."
        )
    return Step(False, size)


def not_finite(tensors: Mapping[Any, Any]) -> str | None:
    """The name of the first floating-point tensor that holds a NaN or an infinity, or ``None``.

    Args:
        tensors: tensors by name, of any shape and dtype; mappings and sequences of such are gone through, and whatever else
            there is (numbers, strings) is left alone.

    Example:
        >>> import torch
        >>> not_finite({"head": torch.zeros(3), "body": {"weight": torch.tensor([1.0, float("inf")])}})
        'body.weight'
    """
    for name, value in tensors.items():
        if hasattr(value, "__tensor_flatten__"):  # made of others, as one in 8 bits is
            value = {part: getattr(value, part) for part in value.__tensor_flatten__()[0]}
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and not bool(value.isfinite().all()):
                return str(name)
            continue
        inner: Any = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if isinstance(inner, Mapping) and (found := not_finite(inner)) is not None:
            return f"{name}.{found}"
    return None
