"""AdamW with states in 8 bits, in blocks of 256 with a scale each (arXiv:2110.02861), on torchao's. Imported where it is asked for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torchao.optim import AdamW8bit as _AdamW8bit
from torchao.optim.quant_utils import _fp32_to_bf16_sr
from torchao.optim.subclass_8bit import OptimState8bit

from torchrl_chat.learner.sharding import part_of


class AdamW8bit(_AdamW8bit):
    """torchao's states, and a step that is never larger than AdamW's can be.

    A second moment that is small beside others of its block is 0 in 8 bits, and the first one, divided by it, is a step thousands of
    times as large as the learning rate: at the embedding of a token that the last batch had and this one has not, say. So what is
    divided is bounded, by what no gradients whatever can make of exact moments.

    A weight of less than 4,096 numbers, or of a number that no blocks of 256 make, has its states in float32. The states of one in
    parts on several processes go on in parts of another number.

    Args: AdamW's, and ``bf16_stochastic_round`` for weights in bfloat16, which are rounded up or down by chance (arXiv:2010.06192).
    """

    # torchao's own has a decorator that leaves it without types.
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the weights that have a gradient; the first time it compiles for each of their shapes.

        Of weights in parts on several processes each updates its own, without a word to the others: no number of a step depends on
        another one, and blocks are made of parts.
        """
        if closure is not None:
            raise ValueError("AdamW8bit takes no closure: compute the loss before the step.")
        with _compiling():
            for group in self.param_groups:
                beta1, beta2 = group["betas"]
                settings = (group["lr"], beta1, beta2, group["weight_decay"], group["eps"], _bound(beta1, beta2))
                for weight in group["params"]:
                    if weight.grad is None:
                        continue
                    state = self.state[weight]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        state["exp_avg"] = self._new_buffer(weight, True)
                        state["exp_avg_sq"] = self._new_buffer(weight, False)
                    state["step"] += 1
                    by_chance = self.bf16_stochastic_round and weight.dtype is torch.bfloat16
                    part, moments = _local(weight.detach()), (_local(state["exp_avg"]), _local(state["exp_avg_sq"]))
                    if part.numel():  # of a small weight there may be no part for all
                        _compiled(part, _local(weight.grad), state["step"], *moments, *settings, by_chance)

    def set_whole_state(self, weight: torch.Tensor, entries: Mapping[str, torch.Tensor]) -> None:
        """Give a weight its state, in 8 bits, or the part of it that this process has of the weight.

        Args:
            weight: one that is trained.
            entries: ``"step"``; ``"exp_avg"`` and ``"exp_avg_sq"``, float32, or torchao's, of the whole weight's shape.
        """
        state = self.state[weight]
        state["step"] = entries["step"].clone()
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            whole = entries[name]
            plain = whole.dequantize() if isinstance(whole, OptimState8bit) else whole
            held = state[name] = self._new_buffer(weight, signed)
            _local(held).copy_(_local(part_of(plain.to(weight.device), weight)))


def _bound(beta1: float, beta2: float) -> float:
    """How many learning rates a step of Adam is at most, whatever the gradients: by Cauchy and Schwarz."""
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2)) if beta1**2 < beta2 else math.inf


def _update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    step: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    bound: float,
    by_chance: bool,
) -> None:
    gradient, updated = gradient.float(), weight.float()
    first = exp_avg.float().lerp(gradient, 1 - beta1)
    second = exp_avg_sq.float().lerp(gradient.square(), 1 - beta2)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    change = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
    updated = updated * (1 - lr * weight_decay) - lr * change.clamp(-bound, bound)
    weight.copy_(_fp32_to_bf16_sr(updated) if by_chance else updated)


_compiled = torch.compile(_update, fullgraph=True, dynamic=False)


@contextlib.contextmanager
def _compiling() -> Any:
    """Inside, there may be as many shapes as a model has, and the cache on the disk tells this step from others.

    It takes those of torchao's optimizers for one another.
    """
    config: Any = torch.compiler.config
    dynamo: Any = torch._dynamo.config
    with (
        config.patch(cache_key_tag=f"{config.cache_key_tag}adamw-8bit"),
        dynamo.patch(recompile_limit=100_000, accumulated_recompile_limit=100_000),
    ):
        yield


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
