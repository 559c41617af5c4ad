"""How many tokens go through a model at a time, by what its device has free: memory is bounded without being told to be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torchrl_chat.learner.recomputing import is_recomputed
from torchrl_chat.models.passes import float_type, unwrapped
from torchrl_chat.models.token_scores import CHUNK, CHUNK_ON_CPU

MOST = 16384
"""Tokens that are enough to keep a device busy: more of them at a time are not faster."""

_SHARE = 0.8  # of what is free; the rest is for allocators, and for whoever else is there


class Room(NamedTuple):
    """What fits on a device."""

    tokens: int
    per_token: int  # bytes
    free: int | None  # bytes, behind what gradients and the optimizer will take; None where it is not known

    def __str__(self) -> str:
        if self.free is None:
            return f"{self.tokens:,} tokens at a time: what is free is not known"
        return f"{self.tokens:,} tokens at a time: about {self.per_token / 2**20:.2f} MiB each, {max(0, self.free) / 2**30:.1f} GiB are free"


def bytes_per_token(model: Any) -> int:
    """What a token takes of memory in a pass with gradients, at most, through a decoder whose head is chunked.

    A layer of hidden size H with queries of Q, keys of K and a feed-forward network of I numbers a token keeps for its backward

    - in float32, what norms read and what they made of it: 4 (8 H + 2 Q + 2 K) bytes, for four norms of H and one each of queries and
      keys, as Gemma 3 has (Llama has two, and none), and some numbers a head;
    - in the dtype of computing, of e bytes: the inputs of its projections, queries, keys, values, the attention's output, and of the
      network both projections, the activation and the product: e (5 H + 2 Q + 2 K + 4 I) bytes.

    That is more than autograd keeps, and less than 1.75 times as much, for Llama, Qwen 3, Gemma 3, OLMo 2 and GPT-2 of transformers 5, in
    float32 and in bfloat16 (``tests/test_memory.py`` counts it). Recomputed layers keep their input, 4 H bytes, and one of them at a
    time the rest. Attention that keeps its scores (``eager``) takes more, by the length of a row; so does a head that cannot be chunked.

    Args:
        model: a transformers causal language model, or a PEFT model of one.

    Example:
        >>> from torchrl_chat.tiny import tiny_model
        >>> bytes_per_token(tiny_model(64, hidden=64)) < bytes_per_token(tiny_model(64, hidden=128))
        True
    """
    config = unwrapped(model).config.get_text_config()

    def told(name: str, otherwise: int) -> int:
        """Of a shape that differs by layer, the greatest."""
        value = getattr(config, name, None) or otherwise
        return value if isinstance(value, int) else max(map(int, value))

    hidden = told("hidden_size", model.get_input_embeddings().embedding_dim)
    heads = told("num_attention_heads", 1)
    head = told("head_dim", hidden // heads)
    queries, keys = heads * head, told("num_key_value_heads", heads) * head
    inner = told("intermediate_size", told("n_inner", 4 * hidden))
    inner = max(inner, told("num_experts_per_tok", 1) * told("moe_intermediate_size", inner))
    each = torch.finfo(float_type(model)).bits // 8
    layer = 4 * (8 * hidden + 2 * queries + 2 * keys + 3 * heads + 4)
    layer += each * (5 * hidden + 2 * queries + 2 * keys + 4 * inner)
    lists = (len(part) for part in model.modules() if isinstance(part, torch.nn.ModuleList))
    layers = told("num_hidden_layers", max(lists, default=1))
    kept = 4 * hidden * layers + layer if is_recomputed(model) else layers * layer
    return kept + 4 * 4 * hidden  # the states behind the layers, those that are scored, and their gradients


def room_for(
    module: torch.nn.Module, model: Any, *, free: int | None = None, least: int = 1, reserved: int = 0
) -> Room:
    """How many tokens may go through a model at a time, forward and backward.

    Args:
        module: all that goes through at a time, the model in it; a second network (a critic's) is counted by its weights.
        model: the model.

    Keyword Args:
        free: bytes; :func:`free_memory` of the model's device if ``None``.
        least: tokens there are in any case: what is asked for has to go through the model.
        reserved: bytes that somebody else will take.

    Returns:
        :data:`MOST` tokens at most, and where it is not known what is free. Gradients and AdamW's two states in float32 are
        counted as if none of them were there yet.
    """
    device = next(model.parameters()).device
    free = free_memory(device) if free is None else free
    sizes = [sum(weight.numel() for weight in each.parameters()) for each in (module, model)]
    per_token = bytes_per_token(model) * sizes[0] // sizes[1]
    if free is None:
        return Room(max(least, MOST), per_token, None)
    trained = sum(_own(weight).numel() for weight in module.parameters() if weight.requires_grad)
    left = free - 3 * 4 * trained - _of_head(model, device.type) - reserved
    return Room(max(least, min(MOST, int(_SHARE * left) // per_token)), per_token, left)


def _of_head(model: Any, device: str) -> int:
    """What the head takes however many tokens there are: two chunks of logits with what is made of each, since one is let go when the
    next is there, and gradients of its weights, its own and those through tied embeddings, before they are summed.
    """
    chunks = 8 * 4 * (CHUNK_ON_CPU if device == "cpu" else CHUNK)
    weight = model.get_output_embeddings().weight
    return chunks + (2 * 4 * weight.numel() if weight.requires_grad else 0)


def _own(weight: torch.Tensor) -> torch.Tensor:
    """What of a weight lies on this process."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device: of CUDA what the driver and torch's own cache have; of the CPU what the kernel calls
    available, within the limits of a container, divided by the processes that torchrun has started here. ``None`` if nobody says.

    Example:
        >>> import torch
        >>> free_memory(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    found = [bytes_ for bytes_ in (_available(), _of_container()) if bytes_ is not None]
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if found else None


def _available() -> int | None:
    """What Linux calls available; elsewhere half of what there is."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError):
        return None


def _of_container() -> int | None:
    """What a control group leaves, of version 2 or 1; its cache of files is given back where memory is asked for."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        folder = Path("/sys/fs/cgroup")
        try:
            most = int((folder / limit).read_text())  # "max" is none
            stat = dict(line.split()[:2] for line in (folder / cache).read_text().splitlines())
            files = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
            return max(0, most - int((folder / used).read_text()) + files)
        except (OSError, ValueError):
            continue
    return None
