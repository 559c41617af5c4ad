"""A training step of a causal language model on a training view: minibatches, adapters, recomputed activations.

It knows neither environments nor servers, and is what the recipes are made of.
"""

from torchrl_chat.learner.adapters import Reference, merged_state, whole, with_lora
from torchrl_chat.learner.minibatches import averaged, learn
from torchrl_chat.learner.precision import compute_in
from torchrl_chat.learner.recomputing import recompute_activations

__all__ = [
    "Reference",
    "averaged",
    "compute_in",
    "learn",
    "merged_state",
    "recompute_activations",
    "whole",
    "with_lora",
]
