"""A small model of the same architecture: every kind of layer once, and short stretches where layers look at stretches.

What only long rows show of a model (a window that slides, chunks, states that are compressed block by block) takes rows of
thousands of tokens, and more memory than there is. On a small copy it takes fifty. Nothing here knows an architecture: a
config's numbers are recognised by what transformers' configs call them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torchrl_chat.models.passes import unwrapped

VOCABULARY = 96
STRETCH = 8
"""Tokens of a window, a chunk or a block."""
_HIDDEN, _HEADS, _HEAD, _GROUPS, _INNER, _RANK = 64, 4, 16, 2, 96, 16
_MOST_LAYERS = 8

_STRETCHES = (
    r"(index|indexer)_?topk$|budget$",
    r"(sliding|attention|local|keep)_?(attention_)?window|^window_size$|^sliding_window_size$|^local_attention$",
    r"chunk_?(size|length)$|^(index_)?block_size$",
)
# The first that matches a number's name says what becomes of it; what matches none stays as it is.
_NUMBERS: tuple[tuple[str, int], ...] = (
    (r"(^|_)vocab(ulary)?_size(_|$)", VOCABULARY),
    (r"ngram_vocab", 5 * VOCABULARY),
    # how many
    (r"(key_value|kv|linear_num_key|query_groups|num_query)_?(heads|groups)?(_per_layer)?$|^kv_n_heads$", _GROUPS),
    (r"index(er)?_(n_|num_)?heads$", 16),  # of two, the sums of what each finds tie
    (r"(^|_)(num_|n_)?(attention_|value_)?heads$|^n_head$|heads_per_layer$", _HEADS),
    (r"^(moe_)?(num|n)_(local_|routed_)?experts$|zero_expert_num", 4),
    (r"experts_per_tok(en)?$|^(moe_)?top_?k$|^moe_k$|top_k_experts", 2),
    (r"^(n|topk|num_expert)_group$|^topk_group$|mamba_n_?groups|^n_groups$", 1),
    (r"topk_blocks$", 2),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|max_window_layers|interleave.*step$", 1),
    # how far
    *((pattern, STRETCH) for pattern in _STRETCHES),
    (r"^compress_ratio$", 4),
    (r"(period|interval|pattern|every_n.*|_group_size)$", 2),
    (r"offset$", 1),
    # how wide
    (r"qk_rope_head_dim", _HEAD // 2),
    (r"qk_head_dim", _HEAD + _HEAD // 2),
    (r"rotary_dim", _HEAD // 2),
    (r"(mamba_)?d_state$|(ssm_)?state_size$|laurel_rank|gated_norm_rank|adapter_rank", _GROUPS * 4),
    (r"_rank$", _RANK),
    (
        r"head_?dim$|head_size$|^d_head$|^mamba_d_head$|^kv_channels$|dim_head|d_rel|hidden_size_per_layer|ple_embed",
        _HEAD,
    ),
    (r"mamba_d_ssm", 2 * _HIDDEN),
    (r"(moe|expert|shared).*(intermediate|ffn_hidden)", 32),
    (
        r"(intermediate|ffn|inner|feed_forward|mlp).*(size|dim)|^(d_?ff|dim_ff|d_inner|n_inner|dff)$|intermediate_size",
        _INNER,
    ),
    (r"router_hidden", 32),
    (
        r"^(hidden_size|n_embd|d_model|(word_)?emb(edding)?(_proj)?_(dim|size)|dim_model|lru_width|attention_hidden_size)$",
        _HIDDEN,
    ),
    (r"(input|output)_embedding_size", _HIDDEN),
)
_LAYERS = re.compile(r"^(num_(hidden_)?(layers|blocks)|n_layers?|(num_)?(en|de)coder_layers|depth)$")
_PLACES = re.compile(
    r"position_?s?(_embeddings)?$|^n_(positions|ctx)$|max_seq_len|context_length|model_max_length|rel_extent"
)
_MOST_PLACES = 512  # more than any row here has
_TOKEN = re.compile(r"token_(id|index)s?$")


def small_config(config: Any) -> Any:
    """A config of the same class with small numbers, and a layer of every kind that the config has.

    Args:
        config: a config of transformers.

    Raises:
        Exception: whatever the class raises on numbers that do not go together.
    """
    return type(config).from_dict(_smaller(config.to_dict()))


def least_stretch(config: Any) -> int | None:
    """Tokens of the shortest window, chunk or block that a config names; ``None`` where it names none.

    Args:
        config: a config of transformers.
    """
    return min(_stretches(config.to_dict()), default=None)


def _stretches(fields: Mapping[Any, Any]) -> Iterator[int]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _stretches(value)
        elif type(value) is int and value > 0 and any(re.search(pattern, str(key)) for pattern in _STRETCHES):
            yield value


def small_copy(model: Any, seed: int = 0) -> Any:
    """A random model of the same class in float32 on the CPU, in ``eval()``, with a config made small.

    Args:
        model: a model of transformers, or a PEFT model of one.
        seed: of the weights.

    Raises:
        Exception: whatever the class raises on numbers that do not go together.
    """
    config = small_config(model.config)
    if model.config._attn_implementation == "eager":
        config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        copy = plain_class(model)(config).float().eval()
        widen(copy)
    return copy


def plain_class(model: Any) -> Any:
    """The class that a model had before anybody put one in front of it, or a model around it."""
    # FSDP and mixed precision give a module a class of its own, made of the model's and of one that is no module by itself.
    made = (cls for cls in type(unwrapped(model)).__mro__ if issubclass(cls, torch.nn.Module))
    return next(cls for cls in made if not (cls.__name__.startswith("FSDP") or hasattr(cls, "computes_in")))


def _smaller(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """The fields of a config, and of those inside it, made small."""
    fields = {key: value for key, value in given.items() if key not in ("dtype", "torch_dtype")}
    counts = [value for key, value in fields.items() if _LAYERS.match(str(key)) and isinstance(value, int)]
    count = max(counts, default=0)
    kept = _kept_layers(fields, count)
    for key, value in fields.items():
        name = str(key)
        if isinstance(value, Mapping):
            if "model_type" in value:
                fields[key] = _smaller(value)
            elif name == "rope_parameters":
                fields[key] = _narrower(value)
            elif name == "compress_rates":
                fields[key] = {kind: min(rate, STRETCH) for kind, rate in value.items()}
            elif name == "per_layer_config":
                own = {place: value[f"{layer:02}"] for place, layer in enumerate(kept) if f"{layer:02}" in value}
                fields[key] = {f"{place:02}": _smaller(entry) for place, entry in own.items()}
        elif isinstance(value, list):
            fields[key] = _of_layers(name, value, kept, count)
        elif name == "num_kv_shared_layers":
            fields[key] = sum(layer >= count - value for layer in kept)
        elif isinstance(value, int) and not isinstance(value, bool):
            fields[key] = _number(name, value, len(kept))
        elif isinstance(value, float) and re.search("drop|jitter", name):
            fields[key] = 0.0
    if "tie_word_embeddings" in fields:
        fields["tie_word_embeddings"] = False  # with random weights a tied head says the last token again
    return fields | _agreed(given, fields)


def _agreed(given: Mapping[Any, Any], fields: Mapping[Any, Any]) -> dict[Any, Any]:
    """Numbers that follow from others in the config that was given, made to follow from the small ones."""
    made: dict[Any, Any] = {}
    if given.get("kv_lora_rank"):  # keys and values are made of one latent: all heads have their own
        if "num_key_value_heads" in given:
            made["num_key_value_heads"] = fields.get("num_attention_heads", _HEADS)
        rope, nope = fields.get("qk_rope_head_dim") or 0, fields.get("qk_nope_head_dim") or 0
        if given.get("head_dim") is not None:
            made["head_dim"] = rope if given["head_dim"] == given.get("qk_rope_head_dim") else rope + nope
    for heads, size, expand in _STATES:
        if all(isinstance(given.get(name), int) for name in (heads, expand)) and size in given:
            made[heads] = fields["hidden_size"] * fields[expand] // _HEAD
            made[size] = _HEAD
    for name, value in given.items():  # two numbers that make another one, by sum or by product
        if isinstance(value, list) and len(value) == 2 and all(type(entry) is int for entry in value):
            if sum(value) == given.get("hidden_size"):
                made[name] = [_HIDDEN // 2, _HIDDEN // 2]
            elif math.prod(value) == given.get("max_position_embeddings"):
                made[name] = [_MOST_PLACES // 32, 32]
    if "attention_head_dim" in given and "attention_hidden_size" in given:
        made["attention_hidden_size"] = 2 * _HIDDEN
        made["attention_head_dim"] = 2 * _HIDDEN // fields["num_attention_heads"]
    return made


# Of layers that carry a state: how many heads, how wide each is, and how much wider all of them are than the rest.
_STATES = (
    ("num_heads", "head_dim", "expand"),
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
)


def _number(name: str, value: int, layers: int) -> int:
    if _TOKEN.search(name):
        return min(value, VOCABULARY - 1)
    if _LAYERS.match(name):
        return min(value, layers)
    if _PLACES.search(name):
        return _MOST_PLACES
    for pattern, small in _NUMBERS:
        if re.search(pattern, name):
            return min(value, small) if value > 0 else value
    return value


def _kept_layers(fields: Mapping[Any, Any], count: int) -> list[int]:
    """Which layers stay: the first of each kind, by all lists that have an entry a layer."""
    lists = [value for value in fields.values() if isinstance(value, list) and len(value) == count > 0]
    own, shared = fields.get("per_layer_config") or {}, fields.get("num_kv_shared_layers") or 0
    if not lists and not own:
        return list(range(min(count, 4)))
    kinds: dict[str, int] = {}
    for layer in range(count):
        kind = [values[layer] for values in lists], own.get(f"{layer:02}"), layer >= count - shared
        kinds.setdefault(repr(kind), layer)
    kept = sorted(kinds.values())[:_MOST_LAYERS]
    return kept if len(kept) > 1 else list(range(min(count, 2)))


def _of_layers(name: str, value: list[Any], kept: list[int], count: int) -> list[Any]:
    if len(value) == count > 0:
        return [_small_entry(name, value[layer]) for layer in kept]
    if re.search(r"layers?(_ids|_idxs)?$|_idxs$", name) and all(type(entry) is int for entry in value):
        return [place for place, layer in enumerate(kept) if layer in value]
    if _TOKEN.search(name):
        return [min(entry, VOCABULARY - 1) for entry in value if isinstance(entry, int)]
    return value


def _small_entry(name: str, entry: Any) -> Any:
    return _number(name, entry, 0) if type(entry) is int and entry > 1 else entry


def _narrower(rope: Mapping[str, Any]) -> dict[str, Any]:
    """A rope for narrow heads."""
    if rope and all(isinstance(value, Mapping) or value is None for value in rope.values()):
        return {kind: None if value is None else _narrower(value) for kind, value in rope.items()}
    changed: dict[str, Any] = {n: rope[n][: _HEAD // 2] for n in ("short_factor", "long_factor") if n in rope}
    if "original_max_position_embeddings" in rope:
        changed["original_max_position_embeddings"] = _MOST_PLACES
    return {**rope, **changed}


@torch.no_grad()
def widen(model: Any) -> None:
    """Weights so wide that what stands before a token matters: as they are initialised, every distribution is nearly uniform."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for parameter in model.parameters():
        if id(parameter) in embeddings:
            parameter.normal_(std=0.5)
        elif parameter.ndim in (2, 3):
            parameter.normal_(std=1.3 / math.sqrt(parameter.shape[-1]))
        elif not bool(parameter.isfinite().all()):
            parameter.normal_(std=0.2)
        else:  # what is one number everywhere makes ties
            parameter.add_(0.1 * torch.randn_like(parameter))
