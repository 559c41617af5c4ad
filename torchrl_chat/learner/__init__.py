"""A training step of a causal language model on a training view: minibatches, adapters, recomputed activations.

It knows neither environments nor servers, and is what the recipes are made of.
"""

from torchrl_chat.learner.adapters import Reference, merged_state, whole, with_lora
from torchrl_chat.learner.memory import bytes_per_token, free_memory, room_for
from torchrl_chat.learner.minibatches import Counts, averaged, learn
from torchrl_chat.learner.precision import compute_in
from torchrl_chat.learner.recomputing import recompute_activations
from torchrl_chat.learner.sharding import gathered, shard
from torchrl_chat.learner.streams import Streams

__all__ = [
    "Counts",
    "Reference",
    "Streams",
    "averaged",
    "bytes_per_token",
    "compute_in",
    "free_memory",
    "gathered",
    "learn",
    "merged_state",
    "recompute_activations",
    "room_for",
    "shard",
    "whole",
    "with_lora",
]
