"""A model whose weights, gradients and optimizer states lie in parts on several processes: FSDP2 (arXiv:2304.11277).

Each layer is a unit that is gathered when it is needed and parted again behind it; what is left (embeddings, the last norm, the
head) is one unit more, so that a head which is tied to the embeddings stays so. Gradients are summed over the processes, not
averaged: losses have the denominators of the whole minibatch (:mod:`~torchrl_chat.learner.minibatches`).

What has gradients is one pass at a time, of all processes together. Everything else goes through the gathered model
(:func:`gathered`), in which no process waits for another.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch

from torchrl_chat import ranks
from torchrl_chat.learner.fronts import Front, put_in_front
from torchrl_chat.models.passes import ModelError
from torchrl_chat.models.proof import same_model
from torchrl_chat.training.values import PolicyAndValue

T = TypeVar("T")


def shard(model: Any) -> Any:
    """Part a model over the processes, in place; in a run of one process it stays as it is.

    The model is tried before it is parted, and what was found holds afterwards: a few rows of the parted model are compared
    with those of the whole one. Optimizers are made of its parameters afterwards.

    Args:
        model: a transformers causal language model, or a PEFT model of one, with the same weights on all processes; or a
            :class:`~torchrl_chat.training.values.PolicyAndValue` of one.

    Returns:
        the model.

    Raises:
        ModelError: its rows do not go together, so that processes could not keep in step; it has no layers that are known
            here; or what it computes is something else when it is parted.

    Example:
        >>> from torchrl_chat.tiny import tiny_model
        >>> model = shard(tiny_model(64))
    """
    if ranks.count() == 1 or is_sharded(model):
        return model
    # Half a second, which runs of one process need not wait.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import register_fsdp_forward_method

    if isinstance(model, PolicyAndValue):
        shard(model.model)
        mesh = init_device_mesh(model.head.weight.device.type, (ranks.count(),))
        for name, part in model.value_parts().items():
            _part((*(_layers(part) if name == "trunk" else ()), part), mesh)
        return model
    with same_model(model, "in parts on several processes") as prover:
        if prover.scoring() != "padded":
            raise ModelError(
                f"{prover.proof.name} on several processes: its rows do not go through it together ({prover.tried('scoring')}), so that "
                "the processes would not keep in step. Train it in one."
            )
        mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.count(),))
        _part((*_layers(model), model), mesh)
        put_in_front(_Sharded, model)
        register_fsdp_forward_method(model, "as_one_pass")
    return model


def _part(units: Sequence[Any], mesh: Any) -> None:
    """Part modules over the processes, each as a unit but for what is in units before it."""
    from torch.distributed.fsdp import fully_shard

    for unit in units:
        # Of the outermost the default is to stay gathered, and to be trained with weights that are not its own any more.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # else gloo is asked for an operation that it has not


def is_sharded(module: Any) -> bool:
    """Whether a model, or a part of one, is one of :func:`shard`."""
    return isinstance(module, torch.nn.Module) and any(map(_is_unit, module.modules()))


def _is_unit(module: Any) -> bool:
    return hasattr(module, "unshard")


def _layers(model: Any) -> list[torch.nn.Module]:
    """The layers of a model: the modules that transformers would checkpoint, which are not within each other."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[torch.nn.Module] = [
        part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)
    ]
    inner = {id(part) for layer in found for part in layer.modules() if part is not layer}
    found = [layer for layer in found if id(layer) not in inner]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no layers that are known here: it cannot be parted over processes."
        )
    return found


class _Sharded(Front):
    """What is in front of the outermost unit."""

    _within = False

    def as_one_pass(self, compute: Callable[[], T]) -> T:
        """See :func:`~torchrl_chat.models.passes.as_one_pass`: FSDP gathers the unit before, and parts it again behind."""
        self._within = True
        try:
            return compute()
        finally:
            self._within = False

    # The module that this stands in front of has a forward, which a type checker cannot know.
    def __call__(self, *args: Any, **given: Any) -> Any:
        if self._within:  # the unit is gathered
            return self.forward(*args, **given)  # type: ignore[attr-defined]
        return super().__call__(*args, **given)  # type: ignore[misc]


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Inside, each process has the whole model, without gradients, and need not keep in step with the others.

    Args:
        model: a model of :func:`shard`; any other is left alone.
    """
    units = [part for part in model.modules() if _is_unit(part)]
    with _whole(units), torch.no_grad() if units else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def gathered_head(model: Any) -> Iterator[None]:
    """Inside, each process has the output head of a model that is not trained, with the embeddings, and whatever is in no layer.

    Other models learn meanwhile, from what this one says (:class:`~torchrl_chat.models.divergence.AllTokens`).

    Args:
        model: a model of :func:`shard`; any other is left alone.

    Raises:
        ValueError: some of its weights are trained.
    """
    if is_sharded(model) and any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            "the head of a model that is trained is gathered for each pass: only that of a frozen one stays so."
        )
    with _whole([model] if _is_unit(model) else []):
        yield


@contextlib.contextmanager
def _whole(units: Sequence[Any]) -> Iterator[None]:
    """Inside, units are not parted again when they were used."""
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def weights_of(model: Any, trained: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a model, all or those that are trained; of one in parts on the CPU of the first process, and on the others nothing."""
    if not is_sharded(model):
        return {name: w.detach() for name, w in model.named_parameters() if w.requires_grad or not trained}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))


def set_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a model the trained weights that some process wrote, in place; all processes have them whole.

    Args:
        model: a model, sharded or not.
        weights: by the names of the model's parameters; others are left alone, and so are buffers.

    Raises:
        KeyError: one that the model has is missing.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad or name in weights:
                weight.copy_(part_of(weights[name].to(weight.device, weight.dtype), weight))


def part_of(whole: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has of a weight of its shape, as one; all of it, if the weight lies nowhere else."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(weight, DTensor)
    return distribute_tensor(whole, mesh, weight.placements, src_data_rank=None)


def save_optimizer(path: str | os.PathLike[str], model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Write the state of an optimizer, each process its part, into a folder that they share; none where it has none yet."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    # To tell a state, torch makes one where there is none, by a step without gradients, which counts as Adam's first one.
    if not optimizer.state:
        return
    # A new optimizer whose weights have gradients is told to have no state.
    optimizer.zero_grad(set_to_none=True)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer), _WRITERS: torch.tensor(ranks.count())}
    dcp.save(state, checkpoint_id=os.fspath(path))


def load_optimizer(path: str | os.PathLike[str], model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that as many processes, or others, wrote with :func:`save_optimizer`.

    Raises:
        ValueError: it is that of another model.
    """
    optimizer.state.clear()
    if not os.path.exists(path):
        return
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    reader = dcp.FileSystemReader(os.fspath(path))
    written = {name.removeprefix(_STATE).rpartition(".")[0] for name in reader.read_metadata().state_dict_metadata}
    names = {weight: name for name, weight in model.named_parameters()}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if not {names[weight] for weight in weights} & written:
        raise ValueError(
            f"{os.fspath(path)} has no state for any weight that is trained: it is that of another model."
        )
    optimizer.zero_grad(set_to_none=True)
    if hasattr(optimizer, "set_whole_state") and _writers(reader) != ranks.count():
        for weight in weights:
            if names[weight] in written:
                optimizer.set_whole_state(weight, _whole_state(reader, names[weight], weight))
        return
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    # A weight that never had a gradient has no state.
    dcp.load(state, storage_reader=reader, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for weight in weights:
        if names[weight] not in written:
            optimizer.state.pop(weight, None)


_STATE = "optimizer.state."  # what names of a state begin with in such a folder
_WRITERS = "processes"  # how many wrote it


def _writers(reader: Any) -> int:
    import torch.distributed.checkpoint as dcp

    found = {_WRITERS: torch.tensor(0)}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return int(found[_WRITERS])


def _whole_state(reader: Any, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of a weight, whole, in float32: parts in 8 bits are in blocks, which cannot be cut elsewhere."""
    import torch.distributed.checkpoint as dcp

    found = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros(weight.shape),
        "exp_avg_sq": torch.zeros(weight.shape),
    }
    dcp.load({"optimizer": {"state": {name: found}}}, storage_reader=reader, no_dist=True)
    return found


def set_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give an optimizer of a model in parts the ``state_dict()`` of one of the same model as a whole."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if hasattr(optimizer, "set_whole_state"):
        optimizer.state.clear()
        for number, entries in state["state"].items():
            optimizer.set_whole_state(weights[number], entries)
        for group, stored in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in stored.items() if name not in ("params", "lr")})
        return
    optimizer.load_state_dict(
        {
            "state": {
                number: {
                    name: part_of(value, weights[number]) if value.shape == weights[number].shape else value
                    for name, value in entries.items()
                }
                for number, entries in state["state"].items()
            },
            "param_groups": state["param_groups"],
        }
    )
