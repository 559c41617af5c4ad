"""How far a model's distribution of a token is from a teacher's: all of it, or the teacher's likeliest tokens and the rest.

Both are told by r, the log of how much likelier than the teacher the model finds a token (or, of the tokens that are no likely
ones of the teacher, all of these together). With p the model's probabilities and q = p exp(-r) the teacher's,

- the reverse divergence D = KL(p || q) is the sum of p r, with the gradient p (r - D) by the logits;
- the forward divergence KL(q || p) is that of -q r, with the gradient p - q.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from torchrl_chat.models.head import Head

Direction = Literal["reverse", "forward"]

# The log of a model's ratio to the teacher, (k, V), given its log-probs (k, V) of some of the tokens.
Ratios = Callable[[torch.Tensor, slice], torch.Tensor]

_LEAST = -100.0  # the log-prob of what is impossible


@dataclass(frozen=True, slots=True)
class AllTokens:
    """A teacher's distribution as it is: it is made where it is needed, as the model's is.

    Args:
        head: the teacher's.
        states: its hidden states before the tokens, (K, H).
    """

    head: Head
    states: torch.Tensor

    def some(self, order: torch.Tensor) -> AllTokens:
        """Of some tokens, by their numbers."""
        return AllTokens(self.head, self.states[order])

    @contextlib.contextmanager
    def ratios(self, softmax: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Ratios]:
        """Inside, the teacher is its head alone."""
        with self.head.apart() as logits_of:

            def of(log_probs: torch.Tensor, rows: slice) -> torch.Tensor:
                with torch.no_grad():
                    own = softmax(logits_of(self.states[rows])[0])
                if own.shape != log_probs.shape:
                    raise ValueError(
                        f"the teacher's vocabulary has {own.shape[1]} tokens, the model's {log_probs.shape[1]}: give vocab_size=..., "
                        "the number of those that both have."
                    )
                return log_probs.clamp(min=_LEAST).sub_(own.clamp_(min=_LEAST))

            yield of


@dataclass(frozen=True, slots=True)
class LikeliestTokens:
    """What a teacher says of the tokens that it finds likeliest, as servers tell it; all others are one.

    Args:
        ids: int64 (K, N), different ones in each row.
        log_probs: of these, float (K, N).
    """

    ids: torch.Tensor
    log_probs: torch.Tensor

    def __post_init__(self) -> None:
        if self.ids.shape != self.log_probs.shape or self.ids.ndim != 2:
            raise ValueError(
                f"ids and log-probs have the shapes {tuple(self.ids.shape)} and {tuple(self.log_probs.shape)}: expected one shape (K, N)."
            )

    def some(self, order: torch.Tensor) -> LikeliestTokens:
        """Of some tokens, by their numbers."""
        return LikeliestTokens(self.ids[order], self.log_probs[order])

    @contextlib.contextmanager
    def ratios(self, softmax: Any) -> Iterator[Ratios]:
        """They are at hand."""

        def of(log_probs: torch.Tensor, rows: slice) -> torch.Tensor:
            ids, own = self.ids[rows], self.log_probs[rows].float().clamp(min=_LEAST)
            some = log_probs.gather(1, ids).clamp(min=_LEAST)
            rest = (_rest(some) - _rest(own))[:, None].expand_as(log_probs)
            return rest.scatter(1, ids, some - own)

        yield of


def _rest(log_probs: torch.Tensor) -> torch.Tensor:
    """The log-prob of all others, which no rounding makes impossible."""
    return (1 - log_probs.exp().sum(-1)).clamp(min=1e-7).log()


@dataclass(frozen=True, slots=True)
class Divergence:
    """What is taken of two distributions."""

    teacher: AllTokens | LikeliestTokens
    direction: Direction = "reverse"

    def __post_init__(self) -> None:
        if self.direction not in ("reverse", "forward"):
            raise ValueError(f"direction={self.direction!r}: expected 'reverse' or 'forward'.")

    def ratios(self, softmax: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """A context that yields :data:`Ratios`."""
        return self.teacher.ratios(softmax)

    def total(self, log_probs: torch.Tensor, probs: Any, ratio: torch.Tensor) -> torch.Tensor:
        """Nats, (k,)."""
        return dot(probs, ratio) if self.direction == "reverse" else -dot(_teachers(log_probs, ratio), ratio)

    def gradient(self, log_probs: torch.Tensor, probs: Any, ratio: Any, total: torch.Tensor) -> torch.Tensor:
        """Of each token's by its logits, (k, V)."""
        if self.direction == "reverse":
            return (ratio - total[:, None]).mul_(probs)
        return _teachers(log_probs, ratio).neg_().add_(probs)


def dot(one: Any, other: torch.Tensor) -> torch.Tensor:
    """The sums of products over the last dimension, (k,), float32 whatever autocast says, without a product of that size."""
    with torch.autocast(other.device.type, enabled=False):
        return torch.bmm(one[:, None, :], other[:, :, None]).flatten()


def _teachers(log_probs: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Its probabilities; of tokens that are none of its likely ones in the proportions that the model gives them."""
    return log_probs.clamp(min=_LEAST).sub_(ratio).exp_()
