"""Policies: thin adapters that keep the ids and log-probs of what a model samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.policies.endpoint import EndpointPolicy
    from torchrl_chat.policies.policy import Policy, Prompt
    from torchrl_chat.policies.transformers import TransformersPolicy
    from torchrl_chat.policies.vllm import VLLMPolicy
    from torchrl_chat.policies.wrappers import ExactTransformersWrapper, ExactVLLMWrapper

_HOMES = {
    "EndpointPolicy": "endpoint",
    "ExactTransformersWrapper": "wrappers",
    "ExactVLLMWrapper": "wrappers",
    "Policy": "policy",
    "Prompt": "policy",
    "TransformersPolicy": "transformers",
    "VLLMPolicy": "vllm",
}

__all__ = [
    "EndpointPolicy",
    "ExactTransformersWrapper",
    "ExactVLLMWrapper",
    "Policy",
    "Prompt",
    "TransformersPolicy",
    "VLLMPolicy",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
