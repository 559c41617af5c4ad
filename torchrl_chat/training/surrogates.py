"""What a policy loss maximises, token by token: PPO's clipped ratio, and what has been put in its place.

Each takes the log of a token's ratio w = policy / old policy and its advantage A, and says what the token gains. Where a method
looks at whole sequences, a token gains what its sequence does, so that the mean over the tokens of a sequence is the
sequence's own gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Surrogate = Literal["ppo", "gspo", "cispo", "gmpo", "sapo", "reinforce"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a surrogate is told of the tokens of a batch; every field is (N, T)."""

    log_probs: torch.Tensor
    log_ratio: torch.Tensor
    """Policy to old policy, 0 outside the mask."""
    advantage: torch.Tensor
    mask: torch.Tensor
    sequence: torch.Tensor
    """int64, the number of the sequence that a token is of, from 0."""

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the tokens of each sequence under the mask, at each of them."""
        sums = values.new_zeros(int(self.sequence.max()) + 1 if self.sequence.numel() else 0)
        counted = torch.where(self.mask, values, 0.0).flatten()
        return sums.index_add(0, self.sequence.flatten(), counted)[self.sequence]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the tokens of each sequence under the mask, at each of them."""
        return self.total(values) / self.total(torch.ones_like(values)).clamp(min=1)


# A gain (N, T), and where a bound has the last word, bool (N, T).
Gain = tuple[torch.Tensor, torch.Tensor]


def ppo(tokens: Tokens, low: float, high: float) -> Gain:
    """min(w A, clip(w, 1 - low, 1 + high) A) (arXiv:1707.06347)."""
    return _clipped(tokens.log_ratio.exp(), tokens.advantage, low, high)


def gspo(tokens: Tokens, low: float, high: float) -> Gain:
    """The same of the geometric mean of a sequence's ratios (GSPO, arXiv:2507.18071).

    Its gradient reaches each token through the token's own log-prob (the paper's GSPO-token), which is the same where a sequence
    has one advantage, and lets tokens have their own.
    """
    # Whatever stands outside the mask has no number that a gradient could come back from.
    own = torch.where(tokens.mask, tokens.log_probs - tokens.log_probs.detach(), 0.0)
    return _clipped((tokens.mean(tokens.log_ratio).detach() + own).exp(), tokens.advantage, low, high)


def cispo(tokens: Tokens, low: float, high: float) -> Gain:
    """clip(w, 1 - low, 1 + high) A log(policy), the clipped ratio being a number: no token loses its gradient (arXiv:2506.13585)."""
    ratio = tokens.log_ratio.detach().exp()
    weight = ratio.clamp(1 - low, 1 + high)
    return weight * tokens.advantage * tokens.log_probs, weight != ratio


def gmpo(tokens: Tokens, low: float, high: float) -> Gain:
    """The geometric mean of a sequence's ratios, each clipped in its logarithm to [-low, high] where that is less (arXiv:2507.20673).

    As in :func:`gspo` its gradient reaches each token through its own ratio, so that tokens can have weights.
    """
    advantage = tokens.mean(tokens.advantage)
    bounded = tokens.log_ratio.clamp(-low, high)
    less, more = torch.minimum(tokens.log_ratio, bounded), torch.maximum(tokens.log_ratio, bounded)
    inside = torch.where(advantage >= 0, less, more)
    whole = tokens.mean(inside).detach().exp()
    return whole * advantage * (1 + inside - inside.detach()), inside != tokens.log_ratio


def sapo(tokens: Tokens, low: float, high: float) -> Gain:
    """4 / t sigmoid(t (w - 1)) A: a soft gate instead of a clip, with t = ``high`` for A > 0, else ``low`` (arXiv:2511.20347)."""
    slope = torch.where(tokens.advantage > 0, high, low)
    gate = torch.sigmoid(slope * (tokens.log_ratio.exp() - 1)) * 4 / slope
    return gate * tokens.advantage, torch.zeros_like(tokens.mask)


def reinforce(tokens: Tokens, low: float, high: float) -> Gain:
    """A log(policy): the policy gradient itself, of tokens that the policy has just sampled (Williams 1992)."""
    return tokens.advantage * tokens.log_probs, torch.zeros_like(tokens.mask)


def _clipped(ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> Gain:
    plain, clipped = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return torch.minimum(plain, clipped), clipped < plain


# The function, and its bounds where none are given: those of its paper. CISPO's has no lower one, and tunes the upper one; 5 is
# what ScaleRL (arXiv:2510.13786) and TRL take.
SURROGATES: dict[str, tuple[Callable[[Tokens, float, float], Gain], tuple[float, float]]] = {
    "ppo": (ppo, (0.2, 0.2)),
    "gspo": (gspo, (3e-4, 4e-4)),
    "cispo": (cispo, (1.0, 4.0)),
    "gmpo": (gmpo, (0.4, 0.4)),
    "sapo": (sapo, (1.05, 1.0)),
    "reinforce": (reinforce, (0.0, 0.0)),
}


BY_TOKEN = frozenset(SURROGATES) - {"gspo", "gmpo"}
"""The surrogates whose loss is a sum over tokens, each of which says nothing of the others."""


def bounds_of(surrogate: str, clip: float | tuple[float, float] | None) -> tuple[float, float]:
    """A surrogate's (low, high).

    Raises:
        ValueError: there is no such surrogate, or these are no bounds of it.
    """
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate={surrogate!r}: expected one of {', '.join(SURROGATES)}.")
    if clip is None:
        return SURROGATES[surrogate][1]
    low, high = (clip, clip) if isinstance(clip, (int, float)) else clip
    wrong: Any = None
    if surrogate == "reinforce":
        wrong = "'reinforce' has no ratio to clip"
    elif surrogate in ("ppo", "gspo", "cispo"):
        # Of CISPO's weight 1 means that there is no lower bound; of the others it would let no gradient through there.
        if not 0 <= low <= 1 or (low == 1 and surrogate != "cispo") or high < 0:
            wrong = "expected 0 <= low < 1 and high >= 0"
    elif surrogate == "sapo" and not (low > 0 and high > 0):
        wrong = "expected two numbers of more than 0"
    elif low < 0 or high < 0:
        wrong = "expected two numbers of at least 0"
    if wrong:
        raise ValueError(f"clip={(low, high)} for surrogate={surrogate!r}: {wrong}.")
    return low, high
