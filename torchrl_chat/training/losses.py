"""The loss of a policy, token by token, and estimators of the KL divergence."""

from __future__ import annotations

import math
from typing import Literal

import torch

from torchrl_chat.training.surrogates import SURROGATES, Surrogate, Tokens, bounds_of

Aggregation = Literal["token", "sequence", "constant"]
KLKind = Literal["k1", "k2", "k3"]


def kl_estimate(log_probs: torch.Tensor, reference_log_probs: torch.Tensor, kind: KLKind = "k3") -> torch.Tensor:
    """Estimates KL(policy || reference) from tokens that the policy sampled (http://joschu.net/blog/kl-approx.html).

    With r = reference probability / policy probability of the token:

    - ``"k1"``: -log r. Unbiased, of high variance, negative for half of the tokens.
    - ``"k2"``: (log r)^2 / 2. Biased, never negative.
    - ``"k3"``: r - 1 - log r. Unbiased, never negative.

    That is said of the values. The gradient of a loss is another matter: that of ``"k1"`` has mean 0, that of ``"k2"`` is
    the gradient of the KL on average, that of ``"k3"`` is not.

    Args:
        log_probs: of the sampled tokens under the policy, of any shape.
        reference_log_probs: of the same tokens under the reference, of that shape.
        kind: the estimator.

    Returns:
        the estimate of each token, of that shape.

    Example:
        >>> import torch
        >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-3.0]), "k1")
        tensor([2.])
    """
    if log_probs.shape != reference_log_probs.shape:
        raise ValueError(
            f"log-probs of the shape {tuple(log_probs.shape)} have no KL with {tuple(reference_log_probs.shape)}."
        )
    log_ratio = reference_log_probs - log_probs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        return log_ratio.expm1() - log_ratio
    raise ValueError(f"kind={kind!r}: expected 'k1', 'k2' or 'k3'.")


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    *,
    surrogate: Surrogate = "ppo",
    clip: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    weights: torch.Tensor | None = None,
    aggregation: Aggregation = "token",
    constant: float | None = None,
    denominator: float | torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate of PPO (arXiv:1707.06347) or one of its relatives, token by token.

    With the ratio w = exp(log_probs - old_log_probs) of a token and its advantage A, a token's loss is
    -min(w A, clip(w, 1 - low, 1 + high) A); the others are :mod:`~torchrl_chat.training.surrogates`'.

    Args:
        log_probs: float (N, T), under the model that is trained.
        old_log_probs: float (N, T), under the policy that sampled.
        advantage: one a token, (N, T) or (N, T, 1); or one a row, (N,), (N, 1) or (N, 1, 1); or, with ``sequences``, one a
            sequence, indexed by it.
        mask: bool (N, T), the tokens that count.

    Keyword Args:
        surrogate: ``"ppo"``, ``"gspo"`` (the ratio of a sequence, arXiv:2507.18071), ``"cispo"`` (arXiv:2506.13585), ``"gmpo"``
            (arXiv:2507.20673), ``"sapo"`` (arXiv:2511.20347) or ``"reinforce"`` (no ratio).
        clip: how far the ratio may go; a pair is (low, high), DAPO's clip-higher being (0.2, 0.28)
            (arXiv:2503.14476). That of the surrogate's paper if ``None``: (0.2, 0.2) for ``"ppo"``, (3e-4, 4e-4) for
            ``"gspo"``, (1, 4) for ``"cispo"``, which is no lower bound and an upper one of 5, (0.4, 0.4) in logarithms for
            ``"gmpo"``; for ``"sapo"`` the slopes of its gates, 1.05 where the advantage is negative, and 1.
        dual_clip: where the advantage is negative, a token's loss is at most ``-dual_clip * A`` (arXiv:1912.09729), > 1; for
            ``"ppo"``.
        weights: float (N, T), what each token's loss is multiplied by (:func:`importance_weights`).
        aggregation: ``"token"`` takes the mean over all tokens (DAPO), ``"sequence"`` the mean over the sequences of
            the mean over their tokens (GRPO, arXiv:2402.03300), ``"constant"`` the sum over tokens divided by ``constant``
            times the number of sequences (Dr. GRPO, arXiv:2503.20783). Sequences without tokens under the mask, such as
            those of an episode that failed, do not count.
        constant: for ``"constant"``, the longest response there may be.
        denominator: what is divided by instead of the number of tokens (``"token"``) or of sequences (the others):
            that of the whole batch, where it is split and gradients are accumulated.
        sequences: int64 (N, T), which sequence a token is of, where rows hold several (``"sequence_ids"`` of a packed
            view); or (N,), to make one of several rows (``"episode"``). One a row if ``None``.

    Returns:
        the loss, a scalar; and for logging, without gradients: ``"ratio"`` (mean), ``"ratio_p01"`` and ``"ratio_p99"``
        (percentiles), ``"clip_fraction"`` (of tokens
        where a bound has the last word), ``"kl"`` (k3 against the old policy), ``"ess"`` (effective sample size a
        token, 1 where all ratios are equal).

    Raises:
        ValueError: the shapes disagree, or a setting is out of range.

    Example:
        >>> import torch
        >>> loss, metrics = policy_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2).bool())
        >>> loss
        tensor(-1.)
    """
    low, high = bounds_of(surrogate, clip)
    if not log_probs.shape == old_log_probs.shape == mask.shape or mask.ndim != 2:
        shapes = [tuple(value.shape) for value in (log_probs, old_log_probs, mask)]
        raise ValueError(f"log-probs, old log-probs and mask have the shapes {shapes}: expected one shape (N, T).")
    if dual_clip is not None and (dual_clip <= 1 or surrogate != "ppo"):
        raise ValueError(f"dual_clip={dual_clip} for {surrogate!r}: expected more than 1, and 'ppo'.")
    if weights is not None and weights.shape != mask.shape:
        raise ValueError(f"weights have the shape {tuple(weights.shape)}, and the mask {tuple(mask.shape)}.")
    own = _per_token(advantage, mask, sequences)
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0.0)
    tokens = Tokens(log_probs, log_ratio, own, mask, numbered(mask, sequences))
    gain, bounded = SURROGATES[surrogate][0](tokens, low, high)
    if dual_clip is not None:
        gain = torch.where(own < 0, torch.maximum(gain, dual_clip * own), gain)
    if weights is not None:
        gain = gain * weights
    loss = masked_mean(-gain, mask, aggregation, constant=constant, denominator=denominator, sequences=sequences)
    with torch.no_grad():
        count, chosen, ratio = mask.sum().clamp(min=1), log_ratio[mask], log_ratio.exp()
        ess = (2 * chosen.logsumexp(0) - (2 * chosen).logsumexp(0)).exp() / count
        metrics = {
            "ratio": (ratio * mask).sum() / count,
            "ratio_p01": _percentile(chosen, 0.01),
            "ratio_p99": _percentile(chosen, 0.99),
            "clip_fraction": (bounded & mask).sum() / count,
            "kl": ((ratio - 1 - log_ratio) * mask).sum() / count,
            "ess": ess if len(chosen) else torch.ones_like(ess),
        }
    return loss, metrics


def _percentile(log_ratio: torch.Tensor, share: float) -> torch.Tensor:
    """The ratio that so large a share of tokens has at most; 1 where there is none."""
    if not len(log_ratio):
        return log_ratio.new_ones(())
    return log_ratio.kthvalue(max(1, math.ceil(share * len(log_ratio)))).values.exp()


def masked_mean(
    values: torch.Tensor,
    mask: torch.Tensor,
    aggregation: Aggregation = "token",
    *,
    constant: float | None = None,
    denominator: float | torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
) -> torch.Tensor:
    """A number for each token as one number, the way :func:`policy_loss` does it: for a KL or an entropy term.

    Example:
        >>> import torch
        >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
        tensor(3.)
    """
    if values.shape != mask.shape or mask.ndim != 2:
        shapes = [tuple(values.shape), tuple(mask.shape)]
        raise ValueError(f"values and mask have the shapes {shapes}: expected one shape (N, T).")
    shares = token_shares(mask, aggregation, constant=constant, denominator=denominator, sequences=sequences)
    return (torch.where(mask, values, 0.0) * shares).sum()


def token_shares(
    mask: torch.Tensor,
    aggregation: Aggregation = "token",
    *,
    constant: float | None = None,
    denominator: float | torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each token's number is multiplied by in :func:`masked_mean`, float32 (N, T), 0 where the mask is false.

    With these a loss is a sum over tokens, which can be taken some at a time (``loss=`` of
    :func:`~torchrl_chat.training.sequence_log_probs`).

    Example:
        >>> import torch
        >>> token_shares(torch.tensor([[True, True], [True, False]]), "sequence")
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]])
    """
    if aggregation not in ("token", "sequence", "constant"):
        raise ValueError(f"aggregation={aggregation!r}: expected 'token', 'sequence' or 'constant'.")
    if (aggregation == "constant") != (constant is not None):
        raise ValueError(
            f"aggregation={aggregation!r} with constant={constant}: 'constant' needs one, others none."
        )
    if constant is not None and constant <= 0:
        raise ValueError(f"constant={constant}: expected more than 0.")
    counted = mask.float()
    if aggregation == "token":
        return counted / (mask.sum().clamp(min=1) if denominator is None else denominator)
    index = numbered(mask, sequences)
    tokens = counted.new_zeros(int(index.max()) + 1 if index.numel() else 0)
    tokens = tokens.index_add(0, index.flatten(), counted.flatten())
    count = (tokens > 0).sum().clamp(min=1) if denominator is None else denominator
    length = tokens.clamp(min=1)[index] if constant is None else constant
    return counted / (length * count)


def numbered(mask: torch.Tensor, sequences: torch.Tensor | None) -> torch.Tensor:
    """The sequence that each token is of, int64 (N, T): one a row, or as :func:`policy_loss` is told; 0 for padding."""
    if sequences is None:
        return torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    whole = sequences if sequences.shape == mask.shape else sequences.reshape(-1, 1).expand_as(mask)
    return whole.clamp(min=0)


def _per_token(advantage: torch.Tensor, mask: torch.Tensor, sequences: torch.Tensor | None) -> torch.Tensor:
    if advantage.shape in (mask.shape, (*mask.shape, 1)):
        return advantage.reshape(mask.shape)
    rows = advantage.reshape(-1)
    if sequences is not None and sequences.shape == mask.shape:
        if int(sequences.max()) < len(rows) == advantage.shape[0]:
            return rows[sequences.clamp(min=0)]  # padding has -1, and is under no mask
    elif len(rows) == len(mask) == advantage.shape[0]:
        return rows[:, None].expand_as(mask)
    raise ValueError(
        f"the advantage has the shape {tuple(advantage.shape)}: expected one a token, {tuple(mask.shape)}, or one a sequence."
    )
