"""AdamW with states in 8 bits, in blocks of 256 with a scale each (arXiv:2110.02861), by torchao. Imported where it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torchao.optim import AdamW8bit as _AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from torchrl_chat.learner.sharding import part_of


class AdamW8bit(_AdamW8bit):
    """torchao's, with a compiled step of its own, and states that go into other parts than those in which they were written.

    A weight of less than 4,096 numbers, or of a number that no blocks of 256 make, has its states in float32.

    Args: AdamW's, and ``bf16_stochastic_round`` for weights in bfloat16, which are rounded up or down by chance (arXiv:2010.06192).
    """

    def step(self, closure: Any = None) -> Any:
        """Update the weights that have a gradient; the first time it compiles for each of their shapes."""
        # The compiler's cache on the disk takes the steps of torchao's optimizers for one another.
        config: Any = torch.compiler.config
        with config.patch(cache_key_tag=f"{config.cache_key_tag}adamw-8bit"):
            return super().step(closure)

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


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
