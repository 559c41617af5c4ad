"""A policy's loss as a sum over tokens: a surrogate, and what is added to it of each token's distribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torchrl_chat.models.token_scores import TokenScores
from torchrl_chat.training.losses import KLKind, kl_estimate, masked_mean, policy_loss
from torchrl_chat.training.scoring import Loss, of_columns
from torchrl_chat.training.surrogates import BY_TOKEN, Surrogate

Columns = Mapping[str, torch.Tensor]
"""What a loss knows of each token, (N, T): ``"old"``, the log-prob that the ratio is to; ``"advantage"``; ``"share"``, its part of the
minibatch's loss (:func:`~torchrl_chat.training.token_shares`); perhaps ``"weights"`` of a correction, and ``"reference"``, another
model's log-prob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTerms:
    """The terms of a loss, each with its weight, and 0 where it is none of them.

    Args:
        surrogate, clip: see :func:`~torchrl_chat.training.policy_loss`.
        kl: the weight of an estimate of the divergence from the reference.
        kl_kind: which one, see :func:`~torchrl_chat.training.kl_estimate`.
        entropy: the weight of an entropy bonus.
        divergence: the weight of the divergence from a teacher, if the scores have one.

    Example:
        >>> import torch
        >>> from torchrl_chat.models.token_scores import TokenScores
        >>> mask = torch.tensor([[True, True, False]])
        >>> old = torch.tensor([[-1.0, -2.0, 0.0]])
        >>> own = {"old": old, "advantage": torch.ones(1, 3), "share": torch.full((1, 3), 0.5)}
        >>> loss, metrics = TokenTerms(clip=0.2, entropy=0.1)(TokenScores(old, entropy=-old), own, mask)
        >>> round(float(loss), 2), float(metrics["entropy"])
        (-1.15, 1.5)
    """

    surrogate: Surrogate = "ppo"
    clip: float | tuple[float, float] | None = None
    kl: float = 0.0
    kl_kind: KLKind = "k3"
    entropy: float = 0.0
    divergence: float = 0.0

    @property
    def by_token(self) -> bool:
        """Whether each token's loss says nothing of other tokens, so that it can be computed some tokens at a time."""
        return self.surrogate in BY_TOKEN

    def of(self, own: Columns) -> Loss:
        """The loss for ``loss=`` of :func:`~torchrl_chat.training.sequence_log_probs`."""
        return of_columns(lambda scores, some, mask: self(scores, some, mask)[0], dict(own))

    def __call__(
        self, scores: TokenScores, own: Columns, mask: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, a sum over the tokens under a mask (N, T), and what to log of them, means over these without gradients."""
        share = own["share"]
        loss, metrics = policy_loss(
            scores.log_probs,
            own["old"],
            own["advantage"],
            mask,
            surrogate=self.surrogate,
            clip=self.clip,
            weights=share * own["weights"] if "weights" in own else share,
            aggregation="token",
            denominator=1.0,
        )
        beside = {}
        if self.kl:
            beside["kl_reference"] = self.kl, kl_estimate(scores.log_probs, own["reference"], self.kl_kind)
        if scores.entropy is not None:
            beside["entropy"] = -self.entropy, scores.entropy
        if scores.divergence is not None:
            beside["kl_teacher"] = self.divergence, scores.divergence
        for name, (weight, values) in beside.items():
            metrics[name] = masked_mean(values.detach(), mask)
            if weight:
                loss = loss + weight * (torch.where(mask, values, 0.0) * share).sum()
        return loss, metrics
