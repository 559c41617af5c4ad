"""Weights for tokens that another policy sampled than the one whose log-probs are trained.

An engine that samples and a model that learns compute the same weights with other kernels, in another precision, or some
updates apart. With m the sampler's probability of a token, which the ledger keeps, and p the learner's before its first update,
p / m is the weight that makes the sampled tokens stand for the learner's; bounded, since a few of them would outweigh all
others (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
"""

from __future__ import annotations

from typing import Literal

import torch

from torchrl_chat import ranks
from torchrl_chat.training.losses import numbered
from torchrl_chat.training.surrogates import Tokens


def importance_weights(
    log_probs: torch.Tensor,
    sampler_log_probs: torch.Tensor,
    mask: torch.Tensor,
    *,
    level: Literal["token", "sequence", "geometric"] = "token",
    beyond: Literal["truncate", "mask"] = "truncate",
    low: float = 0.0,
    high: float = 2.0,
    sequences: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A weight for each token, for ``weights=`` of :func:`policy_loss`.

    - Truncated (TIS): ``beyond="truncate"``, a weight is at most ``high``.
    - Masked (MIS): ``beyond="mask"``, a token (or sequence) with a larger one does not count.
    - IcePop's band (arXiv:2510.18855): ``beyond="mask", low=0.5, high=5.0``, by token.

    Args:
        log_probs: float (N, T), of the model that is trained, before its first update.
        sampler_log_probs: float (N, T), of what sampled.
        mask: bool (N, T), the sampled tokens.

    Keyword Args:
        level: whether a weight is that of a token, the product over the tokens of its sequence, or their geometric mean.
        beyond: what becomes of weights outside the bounds.
        low: the least weight.
        high: the greatest weight.
        sequences: as for :func:`policy_loss`.

    Returns:
        the weights, float (N, T) without gradient, 0 where the mask is false; and for logging ``"mismatch"`` and
        ``"mismatch_max"`` (mean and maximum of the absolute difference of log-probs), ``"mismatch_ess"`` (effective sample
        size a token), and ``"beyond"`` (the share of tokens with a weight outside the bounds). What is logged is that of the tokens
        of all processes (:mod:`torchrl_chat.ranks`), which call this together; some may have no rows.

    Raises:
        ValueError: the shapes disagree, or a setting is out of range.

    Example:
        >>> import torch
        >>> learner, sampler = torch.tensor([[0.0, -1.0]]), torch.tensor([[-1.0, -1.0]])
        >>> importance_weights(learner, sampler, torch.ones(1, 2).bool())[0]
        tensor([[2., 1.]])
    """
    if not log_probs.shape == sampler_log_probs.shape == mask.shape or mask.ndim != 2:
        shapes = [tuple(value.shape) for value in (log_probs, sampler_log_probs, mask)]
        raise ValueError(
            f"log-probs, the sampler's and the mask have the shapes {shapes}: expected one shape (N, T)."
        )
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"low={low}, high={high}: expected 0 <= low <= 1 <= high.")
    if level not in ("token", "sequence", "geometric") or beyond not in ("truncate", "mask"):
        raise ValueError(
            f"level={level!r}, beyond={beyond!r}: expected 'token', 'sequence' or 'geometric', and 'truncate' or 'mask'."
        )
    with torch.no_grad():
        own = torch.where(mask, log_probs - sampler_log_probs, 0.0)
        tokens = Tokens(log_probs, own, own, mask, numbered(mask, sequences))
        log_weight = own if level == "token" else tokens.mean(own)
        if level == "sequence":
            log_weight = log_weight * tokens.total(mask.to(own.dtype))
        weight = log_weight.exp()
        outside = (weight < low) | (weight > high)
        kept = torch.where(outside, 0.0, weight) if beyond == "mask" else weight.clamp(low, high)
        return torch.where(mask, kept, 0.0), _figures(own[mask], outside[mask])


def _figures(log_ratio: torch.Tensor, outside: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is logged of the sampled tokens of all processes, given this one's, (K,) each."""
    log_ratio, outside, kind, device = log_ratio.cpu().double(), outside.cpu(), log_ratio.dtype, log_ratio.device
    apart = log_ratio.abs()
    # The effective sample size is no mean: its parts are sums over all tokens, of numbers that do not overflow.
    top = ranks.most(float(log_ratio.max())) if len(log_ratio) else ranks.most(-torch.inf)
    ratio = (log_ratio - top).exp()
    parts = torch.stack((torch.ones_like(apart), apart, outside.double(), ratio, ratio.square()))
    count, total, beyond, one, two = ranks.total(parts.sum(-1)).unbind()
    most = ranks.most(float(apart.max()) if len(apart) else 0.0)
    found = {
        "mismatch": total / count.clamp(min=1),
        "mismatch_max": total.new_tensor(most),
        "mismatch_ess": one.square() / (two * count) if count else torch.ones_like(count),
        "beyond": beyond / count.clamp(min=1),
    }
    return {name: value.to(device, kind) for name, value in found.items()}
