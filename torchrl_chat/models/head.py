"""The output head of a model, apart from the rest: log-probs and entropies of tokens, a few distributions at a time.

The logits of a large vocabulary fill memory long before the model does: 4,096 tokens of 150,000 logits are 2.5 GB in float32, and
their gradient as much again. So a pass over a model stops in front of its head, and the head sees a chunk of the hidden
states at a time, forward and, once more, backward (Wijmans et al. 2024, "Cut your losses in large-vocabulary language models",
do the same in one kernel).

What a model does behind its head (soft caps, scales) stands in its own ``forward``, which is run for each chunk with the body
left out. Whether that is what the model computes is tried by :mod:`~torchrl_chat.models.proof`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from torchrl_chat.models.passes import unwrapped

# Numbers of a chunk: large enough for a matrix product to be worth its name, small beside a model's layers.
_CHUNK_ON_CPU, _CHUNK = 1 << 24, 1 << 26


class Head:
    """The output head of a model, and what the model does behind it.

    Args:
        model: a transformers causal language model, or a PEFT model of one.

    Raises:
        ValueError: the model does not say what its head is.
    """

    def __init__(self, model: Any):
        self._plain = unwrapped(model)
        self._layer = model.get_output_embeddings()
        if self._layer is None:
            raise ValueError(f"{type(self._plain).__name__} does not say what its head is.")
        # What is around the embeddings, from the outside.
        embeddings = self._plain.get_input_embeddings()
        found = (name for name, part in self._plain.named_modules() if part is embeddings)
        names = next(found, "").split(".")
        self._around = [self._plain.get_submodule(".".join(names[:n])) for n in range(1, len(names))]
        # What makes the hidden states: the part, the kind of its output, one of the states (H,).
        self._trunk: tuple[nn.Module, Any, torch.Tensor] | None = None

    @property
    def weights(self) -> list[nn.Parameter]:
        """Those of the head that are trained."""
        return [weight for weight in self._layer.parameters() if weight.requires_grad]

    @contextlib.contextmanager
    def held_back(self, where: Any, *, through: bool = False) -> Iterator[list[torch.Tensor]]:
        """Inside, a pass over the model stops in front of the head, but for one token.

        Args:
            where: an index into hidden states (B, T, H) that leaves (K, H).
            through: those go on to the head, as one row.

        Yields a list, which has those states behind the pass.
        """
        seen: list[torch.Tensor] = []

        def keep(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(args[0][where])
            return (seen[-1][None] if through else args[0][:1, :1], *args[1:])

        def look(part: nn.Module, _args: Any, output: Any) -> None:
            self._trunk = part, type(output), output[0][0, 0].detach().clone()

        # The trunk is the outermost of those that are called, which is the last to return.
        hooks = [
            self._layer.register_forward_pre_hook(keep),
            *(part.register_forward_hook(look) for part in self._around),
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def apart(self) -> Iterator[Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
        """Inside, the model is its head alone; for all threads, so that none may use it otherwise meanwhile.

        Yields a function of states (K, H), which gives what the model makes of them, (K, V), and what the head made of them,
        (1, K, V'), of which the first is a function: it is where the graph begins.

        Raises:
            ValueError: the head is no plain one; or the model does not say which part of it makes the hidden states, or did not
                go through it.
        """
        if not self.plain:
            raise ValueError(f"the head of {type(self._plain).__name__} is more than a matrix.")
        if self._trunk is None:
            raise ValueError(f"{type(self._plain).__name__} has no part of its own that makes the hidden states.")
        trunk, kind, state = self._trunk
        given: dict[str, torch.Tensor] = {}

        def instead(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (given["states"][None], *args[1:])

        def cut(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            given["made"] = output.detach().requires_grad_(torch.is_grad_enabled())
            return given["made"]

        def logits_of(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            given["states"] = states
            ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
            logits: torch.Tensor = self._plain(input_ids=ids, use_cache=False).logits
            return logits.squeeze(0), given["made"]

        hooks = [self._layer.register_forward_pre_hook(instead), self._layer.register_forward_hook(cut)]
        own = trunk.__dict__.get("forward")  # some libraries put one of theirs there
        trunk.forward = lambda *_args, **_given: _blank(kind, state, len(given["states"]))
        try:
            yield logits_of
        finally:
            del trunk.forward
            if own is not None:
                trunk.forward = own
            for hook in hooks:
                hook.remove()

    @property
    def width(self) -> int:
        """How many logits it makes."""
        return int(self._layer.weight.shape[0])

    @property
    def plain(self) -> bool:
        """Whether it is one matrix (and a bias) and nothing else: no adapter, which may have dropout, and no hooks of others."""
        layer = self._layer
        return (
            type(layer) is nn.Linear
            and "forward" not in layer.__dict__
            and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
        )

    def gradient(self, of_made: torch.Tensor, states: torch.Tensor, sums: list[torch.Tensor]) -> torch.Tensor:
        """What a gradient of the head's output (K, V) is of the states (K, H); what it is of :attr:`weights` is added to sums."""
        weight = self._layer.weight
        for total in sums:
            if total.ndim == 1:
                total.add_(of_made.sum(0, dtype=total.dtype))
            elif of_made.dtype == total.dtype:
                total.addmm_(of_made.t(), states.to(total.dtype))
            else:  # a product in half precision is what is fast; its sums over chunks lose nothing
                total.add_(of_made.t() @ states.to(of_made.dtype))
        return of_made @ weight.to(of_made.dtype)


def token_scores(
    head: Head | None,
    states: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy: bool = False,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of tokens, and entropies of the distributions that they come from.

    Args:
        head: what makes logits of the states; ``None`` where they are logits.
        states: (K, H), or logits (K, V).
        targets: the tokens, int64 (K,).

    Keyword Args:
        temperature: what logits are divided by.
        vocab_size: logits from this id on are cut off.
        entropy: whether entropies are computed; 0 otherwise.
        chunk: how many distributions there are at a time; by the size of the vocabulary if ``None``.

    Returns:
        float32 (K,) both. Gradients go to the states and to the head's weights, also through what is shared with them.
    """
    weights = [] if head is None else head.weights
    return _TokenScores.apply(head, states, targets, temperature, vocab_size, entropy, chunk, *weights)


class _TokenScores(torch.autograd.Function):
    """Log-probs and entropies, (K,) each.

    Autograd would keep several tensors (K, V) in float32; here the softmax is taken again for the gradient, chunk by chunk.
    With p the softmax of logits / temperature, the gradient of log p[i] is (e_i - p) / temperature, that of the entropy H
    is -p (log p + H) / temperature.

    Where the head is not trained (under a LoRA), what the states contribute to either is kept instead, (K, H) each, while the
    logits are there: the backward pass then asks for no logits at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: Head | None,
        states: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        vocab_size: int | None,
        entropy: bool,
        chunk: int | None,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scored = torch.empty(len(targets), device=states.device)
        uncertain = torch.zeros_like(scored)
        # The gradient of log-probs, and of entropies if there are any, by the states.
        ahead = head is not None and not weights and ctx.needs_input_grad[1]
        slopes = [torch.zeros_like(states) for _ in range(1 + entropy)] if ahead else []
        with contextlib.nullcontext() if head is None else head.apart() as logits_of, torch.set_grad_enabled(ahead):
            for rows in _chunks(head, states, chunk):
                logits, made = (states[rows], None) if logits_of is None else logits_of(states[rows])
                log_probs = _log_probs(logits.detach(), temperature, vocab_size)
                scored[rows] = log_probs.gather(-1, targets[rows, None]).squeeze(-1)
                if entropy:
                    uncertain[rows] = torch.special.entr(log_probs.exp()).sum(-1)
                for which, slope in enumerate(slopes):
                    assert head is not None
                    assert made is not None
                    last = which == len(slopes) - 1
                    one, zero = scored.new_ones(len(log_probs)), scored.new_zeros(len(log_probs))
                    parts = (zero, one, uncertain[rows]) if which else (one, None, None)
                    of = log_probs if last else log_probs.clone()
                    outer = _of_logits(of, targets[rows], parts, temperature, logits)
                    of_made = torch.autograd.grad(logits, made, outer, retain_graph=not last)[0].squeeze(0)
                    slope[rows] = head.gradient(of_made, states[rows], [])
        ctx.save_for_backward(states, targets, uncertain, *slopes, *weights)
        ctx.settings = head, temperature, vocab_size, entropy, chunk, len(slopes)
        kind = states.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return scored, uncertain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_scored: torch.Tensor, of_uncertain: torch.Tensor) -> tuple[Any, ...]:
        states, targets, uncertain, *rest = ctx.saved_tensors
        head, temperature, vocab_size, entropy, chunk, ahead = ctx.settings
        slopes, weights = rest[:ahead], rest[ahead:]
        if slopes:
            told = of_scored[:, None] * slopes[0] + (of_uncertain[:, None] * slopes[1] if entropy else 0)
            return None, told.to(states.dtype), None, None, None, None, None
        gradient = torch.zeros_like(states)
        # Sums over chunks: in float32, in which small parts are not lost.
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]

        def outer_of(logits: torch.Tensor, rows: slice) -> torch.Tensor:
            log_probs = _log_probs(logits, temperature, vocab_size)
            parts = of_scored[rows], of_uncertain[rows] if entropy else None, uncertain[rows] if entropy else None
            return _of_logits(log_probs, targets[rows], parts, temperature, logits)

        if head is None:
            for rows in _chunks(head, states, chunk):
                gradient[rows] = outer_of(states[rows], rows)
            return None, gradient, None, None, None, None, None
        kind, dtype, enabled = ctx.autocast
        with head.apart() as logits_of, torch.enable_grad(), torch.autocast(kind, dtype, enabled):
            for rows in _chunks(head, states, chunk):
                logits, made = logits_of(states[rows])
                of_made = torch.autograd.grad(logits, made, outer_of(logits.detach(), rows))[0].squeeze(0)
                gradient[rows] = head.gradient(of_made, states[rows], sums)
        return (
            None, gradient, None, None, None, None, None,
            *(total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True)),
        )  # fmt: skip


def _of_logits(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    temperature: float,
    logits: torch.Tensor,
) -> torch.Tensor:
    """The gradient of some logits (K, V), which is made of their log-probs in place: each of these is as large as a layer's weights.

    Args:
        parts: the gradients of the scored log-probs and of the entropies, and the entropies, (K,) each.
    """
    of_scored, of_uncertain, uncertain = parts
    part = log_probs
    if of_uncertain is not None and uncertain is not None:
        probs = part.exp()
        # What is impossible (a logit of -inf) has no part in either gradient.
        part.masked_fill_(probs == 0, 0.0)
        part.add_(uncertain[:, None]).mul_(of_uncertain[:, None]).add_(of_scored[:, None])
        part.mul_(probs).neg_()
    else:
        part.exp_().mul_(-of_scored[:, None])
    part.scatter_add_(1, targets[:, None], of_scored[:, None])
    part.div_(temperature)
    missing = logits.shape[1] - part.shape[1]
    return (torch.nn.functional.pad(part, (0, missing)) if missing else part).to(logits.dtype)


def _log_probs(logits: torch.Tensor, temperature: float, vocab_size: int | None) -> torch.Tensor:
    """Float32 (K, V), the only thing of that size that is made, if the temperature is 1."""
    some = logits[:, :vocab_size]
    return (some if temperature == 1 else some.float() / temperature).log_softmax(-1, dtype=torch.float32)


def _chunks(head: Head | None, states: torch.Tensor, chunk: int | None) -> Iterator[slice]:
    if chunk is None:
        width = states.shape[1] if head is None else head.width
        numbers = _CHUNK_ON_CPU if states.device.type == "cpu" else _CHUNK
        chunk = max(16, numbers // width)
    for start in range(0, len(states), chunk):
        yield slice(start, start + chunk)


def _blank(kind: Any, state: torch.Tensor, count: int) -> Any:
    """A trunk's output of some kind, for so many tokens of which nothing is known."""
    states = state.new_zeros(1, count, len(state))
    return (states,) if kind is tuple else kind(last_hidden_state=states)
