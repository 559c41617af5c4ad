"""AdamW (arXiv:1711.05101) for what is trained of a model, with its states in float32, in 8 bits, or on the CPU.

========================  ==========================  ===========================================================
kind                      bytes of state a weight     what it is
========================  ==========================  ===========================================================
``"adamw"``               8                           torch's, fused
``"adamw-8bit"``          about 2.1                   torchao's (arXiv:2110.02861); also for weights in bfloat16
``"adamw-offload"``       8, none of them on the GPU  :class:`OffloadedAdamW`
========================  ==========================  ===========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch

Kind = Literal["adamw", "adamw-8bit", "adamw-offload"]


def make_adamw(
    weights: Iterable[torch.Tensor],
    lr: float,
    kind: Kind = "adamw",
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """AdamW of a kind, for weights that are trained; :func:`set_rate` changes its learning rate.

    Args:
        weights: those of a model, behind :func:`~torchrl_chat.learner.shard`.
        lr: the learning rate.
        kind: see the module.

    Keyword Args:
        betas: of the two moments. A second one of 0.99 forgets the gradients of a hundred steps ago, of a policy that is no more.
        weight_decay: what is taken off a weight in each step, times the learning rate.

    Raises:
        ImportError: torchao is not installed.
        RuntimeError: there is no C++ compiler, and 8-bit states need one.
        ValueError: there is no such kind; or it is not for such weights.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = make_adamw([weight], lr=0.1)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 0.9000])
    """
    own = list(weights)
    given: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    if kind == "adamw-8bit":
        return _in_8_bits(own, given)
    if kind not in ("adamw", "adamw-offload"):
        raise ValueError(f"optimizer {kind!r}: expected adamw, adamw-8bit or adamw-offload.")
    if any(weight.dtype is torch.bfloat16 for weight in own):
        raise ValueError(
            f"optimizer {kind} with weights in bfloat16: updates at these learning rates are smaller than their rounding, and lost. "
            "Give it weights in float32, or adamw-8bit, which rounds up or down by chance."
        )
    if kind == "adamw":
        # On a CPU, too; and without the plain one's copies of what is updated.
        return torch.optim.AdamW(own, **given, fused=True)
    check_offload(own)
    return OffloadedAdamW(own, **given)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameters of an optimizer a learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao compiles it in, as long as it is the same tensor
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _in_8_bits(weights: list[torch.Tensor], given: dict[str, Any]) -> torch.optim.Optimizer:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        from torchrl_chat.learner.eight_bits import AdamW8bit
    except ImportError as error:
        raise ImportError("adamw-8bit needs torchao: pip install 'torchrl_chat[torchao]'.") from error
    if any(weight.dtype is torch.bfloat16 and hasattr(weight, "to_local") for weight in weights):
        raise ValueError(
            "adamw-8bit with weights in bfloat16 that lie in parts on several processes: their gradients would be summed in bfloat16, in "
            "which small ones are lost. Give it weights in float32 (--dtype bfloat16 computes in bfloat16), or train in one process."
        )
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "adamw-8bit compiles its step, and finds no C++ compiler: install g++ (or name another in the environment variable CXX), "
            "or give --optimizer adamw."
        ) from error
    return AdamW8bit(weights, **given, bf16_stochastic_round=True)


def check_offload(weights: Iterable[torch.Tensor]) -> None:
    """Refuse to offload states from where nothing is gained by it.

    Raises:
        ValueError: the weights are on the CPU; or they lie in parts on several processes.
    """
    for weight in weights:
        if weight.device.type == "cpu":
            raise ValueError(
                "adamw-offload keeps the optimizer's states on the CPU, where the weights are, too: give --optimizer adamw."
            )
        if hasattr(weight, "to_local"):
            raise ValueError(
                "adamw-offload is for one process: in several each has its part of the states. Give --optimizer adamw or adamw-8bit."
            )


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW whose states stay on the CPU, where the step is computed, a weight after the other.

    A step moves 12 bytes a float32 weight between the device and the CPU. (torchao's ``CPUOffloadOptimizer`` moves gradients while
    they are made, before anybody can clip them or leave out a step that is not finite; so it is not used here.)

    Args:
        weights: float32, of any device.
        lr, betas, eps, weight_decay: AdamW's.
    """

    def __init__(
        self,
        weights: Iterable[torch.Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(weights, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have a gradient."""
        if closure is not None:
            raise ValueError("OffloadedAdamW takes no closure: compute the loss before the step.")
        from torch.optim.adamw import adamw

        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                own, gradient = weight.to("cpu"), weight.grad.to("cpu")
                state = self.state[weight]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(own), torch.zeros_like(own)
                adamw(
                    [own],
                    [gradient],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [],
                    [state["step"]],
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                weight.copy_(own)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what ``state_dict()`` gave; torch's own would take it through the device's memory."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        if len(weights) != len(numbers):
            raise ValueError(f"the state is that of {len(numbers)} weights, and there are {len(weights)}.")
        self.state.clear()
        for weight, number in zip(weights, numbers, strict=True):
            if number in state_dict["state"]:
                entries = state_dict["state"][number]
                self.state[weight] = {name: value.to("cpu", copy=True) for name, value in entries.items()}
        for own, stored in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({name: value for name, value in stored.items() if name != "params"})
