"""What a model says of tokens, a few distributions at a time: log-probs, entropies, how far a teacher's distribution is.

The logits of a large vocabulary fill memory long before the model does: 4,096 tokens of 150,000 logits are 2.5 GB in float32, and
their gradient as much again. So the head sees a chunk of the hidden states at a time, forward and, once more, backward (Wijmans
et al. 2024, "Cut your losses in large-vocabulary language models", do the same in one kernel).

A loss that is a sum over tokens needs no second time: what its gradient is of a chunk is known as soon as the chunk's log-probs
are, while its logits are still there (Hsu et al. 2024, "Liger Kernel", do so for the cross entropy).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from torchrl_chat.models.divergence import Divergence, dot
from torchrl_chat.models.head import Head

# Numbers of a chunk: large enough for a matrix product to be worth its name, small beside a model's layers.
CHUNK_ON_CPU, CHUNK = 1 << 24, 1 << 26


_LEAST = -1e30  # the log-prob of what is impossible, which may be multiplied and stays a number


class TokenScores(NamedTuple):
    """What a model says of some tokens."""

    log_probs: torch.Tensor  # float32 (K,)
    entropy: torch.Tensor | None = None  # nats, of the distributions that the tokens come from
    divergence: torch.Tensor | None = None  # nats, between these and a teacher's
    loss: torch.Tensor | None = None  # what a loss of them is; the others have no gradient then


TokenLoss = Callable[[TokenScores, slice], torch.Tensor]
"""The sum of a loss over some of the tokens: it is told what the model says of these, and which they are."""


def token_scores(
    head: Head | None,
    states: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy: bool = False,
    divergence: Divergence | None = None,
    loss: TokenLoss | None = None,
    chunk: int | None = None,
) -> TokenScores:
    """Log-probs of tokens, and what is asked for of the distributions that they come from.

    Args:
        head: what makes logits of the states; ``None`` where they are logits.
        states: (K, H), or logits (K, V).
        targets: the tokens, int64 (K,).

    Keyword Args:
        temperature: what logits are divided by.
        vocab_size: logits from this id on are cut off.
        entropy: whether entropies are computed.
        divergence: from what the divergence of the distributions is taken, if from anything.
        loss: a loss that is a sum over the tokens. It is computed with them, and with it all gradients: the head makes its
            logits once instead of twice. Of what it depends on, only the model is given a gradient.
        chunk: how many distributions there are at a time; by the size of the vocabulary if ``None``.

    Returns:
        float32 (K,) each. Gradients go to the states and to the head's weights, also through what is shared with them.
    """
    how = _How(temperature, vocab_size, entropy, divergence, chunk, None if head is None else loss)
    weights = [] if head is None or not torch.is_grad_enabled() else head.weights
    if not torch.is_grad_enabled():  # what requires a gradient elsewhere is asked for none here
        states = states.detach()
    found, total = _Scored.apply(head, states, targets, how, *weights)
    scores = how.named(found)
    if loss is None:
        return scores
    if head is None:
        total, scores = loss(scores, slice(0, len(targets))), how.named(found.detach())
    return scores._replace(loss=total)


@dataclass(frozen=True, slots=True)
class _How:
    temperature: float
    vocab_size: int | None
    entropy: bool
    divergence: Divergence | None
    chunk: int | None
    loss: TokenLoss | None

    @property
    def count(self) -> int:
        """How many numbers a token has."""
        return 1 + self.entropy + (self.divergence is not None)

    def named(self, found: Any) -> TokenScores:
        """Of numbers (count, K), or as many (K,)."""
        entropy = found[1] if self.entropy else None
        return TokenScores(found[0], entropy, found[-1] if self.divergence is not None else None)

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Float32 (K, V), the only thing of that size that is made, if the temperature is 1."""
        some = logits[:, : self.vocab_size]
        warm = some if self.temperature == 1 else some.float() / self.temperature
        return warm.log_softmax(-1, dtype=torch.float32)

    def chunks(self, head: Head | None, states: torch.Tensor) -> Iterator[slice]:
        """The tokens, some at a time."""
        size = self.chunk
        if size is None:
            width = states.shape[1] if head is None else head.width
            size = max(16, (CHUNK_ON_CPU if states.device.type == "cpu" else CHUNK) // width)
        for start in range(0, len(states), size):
            yield slice(start, min(start + size, len(states)))

    def told(self, found: torch.Tensor, rows: slice) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """The loss of some tokens, and its gradient by each of their numbers (count, k), ``None`` where it knows nothing of it."""
        assert self.loss is not None
        with torch.enable_grad():
            leaves = [number.detach().requires_grad_() for number in found]
            value = self.loss(self.named(leaves), rows)
            of = (
                torch.autograd.grad(value, leaves, allow_unused=True)
                if value.requires_grad
                else [None] * len(leaves)
            )
        return value.detach(), list(of)


class _Chunk:
    """The distributions of some tokens, and their numbers, (count, k).

    With p the softmax of logits / temperature, the gradient of log p[i] is (e_i - p) / temperature; that of the entropy H is
    -p (log p + H) / temperature; those of divergences are said in :mod:`~torchrl_chat.models.divergence`. Whatever is (k, V) is as
    large as a layer's weights: one is made into the other in place where it can be.
    """

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor, how: _How, ratios: Any, rows: slice):
        self.how, self.targets, self.shape, self.dtype = how, targets, logits.shape, logits.dtype
        self.log_probs = how.log_probs(logits)
        numbers = [self.log_probs.gather(-1, targets[:, None]).squeeze(-1)]
        self.probs: Any = None
        self.ratio: Any = None
        if how.count > 1:
            # What is impossible (a logit of -inf) has no part in sums over p log p.
            self.log_probs.clamp_(min=_LEAST)
            self.probs = self.log_probs.exp()
        if how.entropy:
            numbers.append(-dot(self.probs, self.log_probs))
        if how.divergence is not None:
            self.ratio = ratios(self.log_probs, rows)
            numbers.append(how.divergence.total(self.log_probs, self.probs, self.ratio))
        self.found = torch.stack(numbers)

    def gradient(self, of: Sequence[torch.Tensor | None], keep: bool = False) -> torch.Tensor:
        """That of the logits (k, V), given that of the numbers, (k,) each; with ``keep`` it can be asked for again."""
        how, (of_scored, *others) = self.how, of
        if of_scored is None:
            of_scored = torch.zeros_like(self.found[0])
        of_entropy = others.pop(0) if how.entropy else None
        of_divergence = others.pop(0) if how.divergence is not None else None
        beside = None
        if how.divergence is not None and of_divergence is not None:
            beside = how.divergence.gradient(self.log_probs, self.probs, self.ratio, self.found[-1])
            beside.mul_(of_divergence[:, None])
        if of_entropy is not None:
            part = self.log_probs.clone() if keep else self.log_probs
            part.add_(self.found[1][:, None]).mul_(of_entropy[:, None]).add_(of_scored[:, None])
            part.mul_(self.probs).neg_()
        else:
            probs = self.probs
            if probs is None:
                probs = self.log_probs.exp() if keep else self.log_probs.exp_()
            part = probs * -of_scored[:, None] if keep else probs.mul_(-of_scored[:, None])
        if beside is not None:
            part.add_(beside)
        part.scatter_add_(1, self.targets[:, None], of_scored[:, None])
        if how.temperature != 1:
            part.div_(how.temperature)
        missing = self.shape[1] - part.shape[1]
        return (torch.nn.functional.pad(part, (0, missing)) if missing else part).to(self.dtype)


class _Scored(torch.autograd.Function):
    """The numbers of tokens, (count, K), and the sum of a loss over them.

    Autograd would keep several tensors (K, V) in float32; here the softmax is taken again for the gradient, chunk by chunk. Not so
    with a loss, whose gradients are kept instead; nor where the head is not trained (under a LoRA): what the states contribute
    to each number is kept then, (K, H).
    """

    @staticmethod
    def forward(
        ctx: Any, head: Head | None, states: torch.Tensor, targets: torch.Tensor, how: _How, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given, states = states, states.detach()  # grad is on below, for the head alone
        found = torch.empty(how.count, len(targets), device=states.device)
        total = found.new_zeros(())
        learned = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[4:])
        at_once, ahead = (
            learned and how.loss is not None,
            learned and how.loss is None and head is not None and not weights,
        )
        # Of the loss, or of each of the numbers, by the states.
        slopes = [torch.zeros_like(states) for _ in range(1 if at_once else how.count if ahead else 0)]
        sums = _sums(weights) if at_once else []

        def score(rows: slice, logits_of: Any, ratios: Any) -> torch.Tensor | None:
            logits, made = (states[rows], states) if logits_of is None else logits_of(states[rows])
            chunk = _Chunk(logits.detach(), targets[rows], how, ratios, rows)
            found[:, rows] = chunk.found
            one = torch.ones_like(chunk.found[0])
            outers = [[one if i == which else None for i in range(how.count)] for which in range(how.count)]
            value = None
            if how.loss is not None:
                value, of = how.told(chunk.found, rows)
                outers = [of]
            for which, slope in enumerate(slopes):
                assert head is not None
                more = which < len(slopes) - 1
                outer = chunk.gradient(outers[which], keep=more)
                of_made = torch.autograd.grad(logits, made, outer, retain_graph=more)[0].squeeze(0)
                slope[rows] = head.gradient(of_made, states[rows], sums)
            return value

        with _apart(head) as logits_of, _ratios(how) as ratios, torch.set_grad_enabled(bool(slopes)):
            for rows in how.chunks(head, states):  # what is made of a chunk is gone before the next
                if (value := score(rows, logits_of, ratios)) is not None:
                    total += value
        if how.loss is not None:
            ctx.mark_non_differentiable(found)
            ctx.save_for_backward(*slopes, *sums)
        else:
            ctx.mark_non_differentiable(total)
            ctx.save_for_backward(*slopes, *(() if slopes else (given, targets, *weights)))
        ctx.settings = head, how, len(slopes), [weight.dtype for weight in weights], states.dtype
        kind = states.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return found, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of: torch.Tensor, of_total: torch.Tensor) -> tuple[Any, ...]:
        head, how, count, kinds, kind_of_states = ctx.settings
        if how.loss is not None:
            slope, *sums = ctx.saved_tensors
            parts = (total.mul_(of_total).to(kind) for total, kind in zip(sums, kinds, strict=True))
            return None, slope.mul_(of_total.to(slope.dtype)), None, None, *parts
        if count:
            slopes = ctx.saved_tensors
            told = sum(one[:, None] * slope for one, slope in zip(of, slopes, strict=True))
            return None, told.to(kind_of_states), None, None
        states, targets, *weights = ctx.saved_tensors
        states = states.detach()
        gradient, sums = torch.zeros_like(states), _sums(weights)

        def score(rows: slice, logits_of: Any, ratios: Any) -> None:
            logits, made = (states[rows], states) if logits_of is None else logits_of(states[rows])
            outer = _Chunk(logits.detach(), targets[rows], how, ratios, rows).gradient([*of[:, rows]])
            if head is None:
                gradient[rows] = outer
                return
            of_made = torch.autograd.grad(logits, made, outer)[0].squeeze(0)
            gradient[rows] = head.gradient(of_made, states[rows], sums)

        with _apart(head) as logits_of, _ratios(how) as ratios, torch.enable_grad(), torch.autocast(*ctx.autocast):
            for rows in how.chunks(head, states):
                score(rows, logits_of, ratios)
        return None, gradient, None, None, *(s.to(w.dtype) for s, w in zip(sums, weights, strict=True))


def _sums(weights: Any) -> list[torch.Tensor]:
    """Sums over chunks: in float32, in which small parts are not lost."""
    return [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]


def _apart(head: Head | None) -> Any:
    return contextlib.nullcontext() if head is None else head.apart()


def _ratios(how: _How) -> Any:
    return contextlib.nullcontext() if how.divergence is None else how.divergence.ratios(how.log_probs)
