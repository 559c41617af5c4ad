"""A training step of a causal language model on a training view: minibatches, adapters, recomputed activations.

It knows neither environments nor servers, and is what the recipes are made of.
"""

from torchrl_chat.learner.adapters import Reference, merged_weights, whole, with_lora
from torchrl_chat.learner.memory import bytes_per_token, free_memory, room_for
from torchrl_chat.learner.minibatches import Counts, averaged, learn
from torchrl_chat.learner.optimizers import OffloadedAdamW, make_adamw, set_rate
from torchrl_chat.learner.precision import compute_in
from torchrl_chat.learner.recomputing import recompute_activations
from torchrl_chat.learner.sharding import gathered, gathered_head, shard
from torchrl_chat.learner.streams import Streams

__all__ = [
    "Counts",
    "OffloadedAdamW",
    "Reference",
    "Streams",
    "averaged",
    "bytes_per_token",
    "compute_in",
    "free_memory",
    "gathered",
    "gathered_head",
    "learn",
    "make_adamw",
    "merged_weights",
    "recompute_activations",
    "room_for",
    "set_rate",
    "shard",
    "whole",
    "with_lora",
]
