"""The output head of a model, apart from the rest, so that it can be shown some hidden states at a time.

A pass over the model stops in front of its head. What a model does behind its head (soft caps, scales) stands in its own
``forward``, which is run for each chunk of the states with the body left out. Whether that is what the model computes is tried
by :mod:`~torchrl_chat.models.proof`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from torchrl_chat.models.passes import unwrapped


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
            return logits.squeeze(0), given.pop("made")

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

    @torch.no_grad()  # whatever the grad mode around it: a graph would keep every chunk
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


def _blank(kind: Any, state: torch.Tensor, count: int) -> Any:
    """A trunk's output of some kind, for so many tokens of which nothing is known."""
    states = state.new_zeros(1, count, len(state))
    return (states,) if kind is tuple else kind(last_hidden_state=states)
