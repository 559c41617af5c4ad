"""Policies: thin adapters that keep the ids and log-probs of what a model samples."""

from torchrl_chat.policies.transformers import TransformersPolicy

__all__ = ["TransformersPolicy"]
