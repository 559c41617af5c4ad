"""On-policy distillation: a teacher says of each token that the student sampled how likely it finds it."""

from __future__ import annotations

import torch


def distillation_advantages(
    teacher_log_probs: torch.Tensor, log_probs: torch.Tensor, mask: torch.Tensor, *, least: float = -20.0
) -> torch.Tensor:
    """How much likelier the teacher finds each sampled token than the student does.

    As the advantage of a policy gradient on the student's own tokens its mean is the gradient of the reverse KL divergence from
    the teacher, token by token (Lu and Thinking Machines Lab 2025, "On-Policy Distillation"; Agarwal et al. 2023,
    arXiv:2306.13649; Gu et al. 2023, arXiv:2306.08543). What a token leads to later has no part in it.

    Args:
        teacher_log_probs: of the sampled tokens, float (N, T), at the temperature they were sampled with.
        log_probs: those they were sampled with, float (N, T), without gradient.
        mask: bool (N, T), the sampled tokens.

    Keyword Args:
        least: the least advantage: a teacher may hold a token for impossible.

    Returns:
        nats, float (N, T), 0 where the mask is false.

    Raises:
        ValueError: the shapes disagree, ``least`` is not negative, or a log-prob under the mask is no number.

    Example:
        >>> import torch
        >>> distillation_advantages(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.0]]), torch.tensor([[True, True]]))
        tensor([[ 1., -1.]])
    """
    if not teacher_log_probs.shape == log_probs.shape == mask.shape or mask.ndim != 2:
        shapes = [tuple(value.shape) for value in (teacher_log_probs, log_probs, mask)]
        raise ValueError(
            f"the teacher's log-probs, the student's and the mask have the shapes {shapes}: expected one shape (N, T)."
        )
    if not least < 0:
        raise ValueError(f"least={least}: expected a negative number.")
    apart = (teacher_log_probs - log_probs).detach()
    if bool((apart.isnan() & mask).any()):
        row, place = (apart.isnan() & mask).nonzero()[0].tolist()
        raise ValueError(f"a log-prob of token {place} of row {row} is no number.")
    return torch.where(mask, apart.clamp(min=least), 0.0)
