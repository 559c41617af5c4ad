"""LoRA (arXiv:2106.09685): a model that is trained through a few small matrices, and the whole model that they make."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch

from torchrl_chat import ranks
from torchrl_chat.learner.sharding import gathered, is_sharded
from torchrl_chat.models.passes import ModelError, unwrapped
from torchrl_chat.models.small import plain_class


def is_adapted(model: Any) -> bool:
    """Whether a model is a PEFT model, whose base is not trained."""
    return callable(getattr(model, "disable_adapter", None))


def is_quantized(model: Any) -> bool:
    """Whether weights of a model have few bits, as its checkpoint or its load gave them: they cannot be trained, an adapter on them can."""
    return bool(getattr(unwrapped(model), "is_quantized", False))


def with_lora(model: Any, rank: int, alpha: int = 32, targets: str = "all-linear") -> Any:
    """A PEFT model around a model, whose weights are frozen.

    Without dropout, which would have it sample from another distribution than the one that is trained.

    Args:
        model: a transformers causal language model.
        rank: of the matrices.
        alpha: what they are scaled by, divided by the rank; 32 after Schulman et al. 2025, "LoRA Without Regret".
        targets: ``"all-linear"`` for every linear layer but the head; or names of layers, with commas.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model has no such layers; or one is the head, or the embeddings, and these are one matrix.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'torchrl_chat[peft]'.") from error
    names: Any = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
    tied = (
        model.get_output_embeddings() is not None
        and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    adapted = get_peft_model(model, config).eval()
    ends = {
        type(part).__module__.startswith("peft")
        for part in (adapted.get_output_embeddings(), adapted.get_input_embeddings())
    }
    if tied and True in ends:
        raise ValueError(
            f"lora targets {targets!r}: the head and the embeddings of {type(model).__name__} are one matrix, which an adapter of either "
            "would part: name other layers."
        )
    return adapted


def read_adapter(path: str | os.PathLike[str], model: Any) -> dict[str, torch.Tensor]:
    """The weights of an adapter in a folder, by name.

    Raises:
        ValueError: they are not those of the model's adapter.
    """
    from peft import get_peft_model_state_dict, load_peft_weights

    found: dict[str, torch.Tensor] = load_peft_weights(os.fspath(path), device="cpu")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    apart = {name for name in own.keys() | found.keys() if name not in own or name not in found}
    apart |= {name for name in own.keys() & found.keys() if own[name].shape != found[name].shape}
    if apart:
        raise ValueError(f"the adapter in it is another one: {', '.join(sorted(apart)[:3])} ...")
    return found


def named_adapter(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of an adapter by the names that the model itself has for them."""
    adapter = model.active_adapter
    short = {
        name.replace(f".{adapter}.", ".").removesuffix(f".{adapter}"): name for name, _ in model.named_parameters()
    }
    return {short[name]: weight for name, weight in weights.items()}


def set_adapter(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give a model the weights of its adapter, in place."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, weights)


def merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model under the names that they have without adapters, one after the other; those with an adapter merged.

    Nothing is added to the base and taken off again, which would leave some rounding in it each time; and there is one merged
    matrix at a time. One that has two names (a head that is the embeddings) comes once.

    Args:
        model: a transformers model, or a PEFT model of one; where some of its LoRA layers are not of linear layers (fused experts), a
            copy of it is merged. Of one in parts on several processes inside :func:`~torchrl_chat.learner.gathered`.

    Example:
        >>> from torchrl_chat.tiny import tiny_model
        >>> next(merged_weights(tiny_model(64)))[0]
        'model.embed_tokens.weight'
    """
    if not is_adapted(model):
        yield from _plain_weights(model)
        return
    from peft.tuners.lora import Linear, LoraLayer

    base = model.get_base_model()
    layers: dict[str, Any] = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    if not all(type(layer) is Linear for layer in layers.values()):
        if any(hasattr(weight, "to_local") for weight in model.parameters()):
            raise ModelError(
                "an adapter of other layers than linear ones cannot be merged while it lies in parts on several processes: choose "
                "--lora-targets among the linear layers, or train in one process."
            )
        yield from _plain_weights(whole(model))
        return
    for name, tensor in _plain_weights(base):
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if plain.endswith(".weight") and (layer := layers.get(plain.removesuffix(".weight"))) is not None:
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    tensor = tensor + layer.get_delta_weight(adapter).detach().to(tensor.dtype)
        yield plain, tensor


def _plain_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What a ``state_dict`` would have, each tensor once; a gathered model would part itself again for that."""
    for name, weight in model.named_parameters():
        yield name, weight.detach()
    for prefix, part in model.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer


def whole(model: Any) -> Any:
    """The model without adapters: itself, or a copy in which they are merged.

    Of a model in parts on several processes, which all call this, the copy is on the CPU of the first one; the others get ``None``.
    """
    if is_sharded(model):
        with gathered(model):
            # Copies: what is gathered is freed behind this, also on a CPU.
            weights = {n: w.to("cpu", copy=True) for n, w in merged_weights(model)} if ranks.leads() else None
        if weights is None:
            return None
        config = copy.deepcopy(unwrapped(model).config)
        return plain_class(model).from_pretrained(None, config=config, state_dict=weights).eval()
    return copy.deepcopy(model).merge_and_unload() if is_adapted(model) else model


class Reference:
    """The model as it was before the first step: a copy, or the model itself without its adapter.

    Args:
        model: a copy that nobody trains, or a PEFT model.
    """

    def __init__(self, model: Any):
        self.model = model

    @contextlib.contextmanager
    def scoring(self) -> Iterator[Any]:
        """Inside, without gradients, the model that is scored with.

        Example:
            >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy, play, training_view
            >>> from torchrl_chat.training import sequence_log_probs
            >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
            >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
            >>> model = tiny_model(len(tokenizer))
            >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
            >>> policy = TransformersPolicy(model, tokenizer, max_new_tokens=4)
            >>> view = training_view(play(env, policy, max_turns=1), layout="padded")
            >>> reference = Reference(model)
            >>> with reference.scoring() as model:
            ...     view["reference"] = sequence_log_probs(model, view).log_probs
        """
        off = self.model.disable_adapter() if is_adapted(self.model) else contextlib.nullcontext()
        with torch.no_grad(), off:
            yield self.model
