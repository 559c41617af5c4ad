"""The value head of PPO: what a state (the tokens so far) is expected to earn."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import nn

from torchrl_chat.models.passes import ModelError, unwrapped
from torchrl_chat.training.passing import Dense, Passing
from torchrl_chat.training.scoring import Scores, sequence_log_probs


class PolicyAndValue(nn.Module):
    """A language model with a value head: log-probs and values of the same tokens in one call.

    Args:
        model: a transformers causal language model with an output head, or a PEFT model of one.
        trunk: ``"shared"`` puts the head on the model's last hidden state, so that both losses train one network in one pass;
            ``"separate"`` gives it a copy of the model's trunk, for twice the memory and without interference. Of a PEFT
            model the copy has an adapter of its own, and that is what is trained of it.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy, play, training_view
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> policy = TransformersPolicy(model, tokenizer, max_new_tokens=4)
        >>> actor_critic = PolicyAndValue(model)
        >>> scores, values = actor_critic(training_view(play(env, policy, max_turns=1), layout="padded"))
    """

    def __init__(self, model: Any, trunk: Literal["shared", "separate"] = "shared"):
        super().__init__()
        if trunk not in ("shared", "separate"):
            raise ValueError(f"trunk={trunk!r}: expected 'shared' or 'separate'.")
        self.model = model
        # What PEFT calls the base model is a wrapper around the whole of it, head and all.
        self.trunk = copy.deepcopy(_trunk_of(unwrapped(model))) if trunk == "separate" else None
        width = model.get_output_embeddings().in_features
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)  # no opinion at the start
        nn.init.zeros_(self.head.bias)
        self.head.to(next(model.parameters()).device)

    def value_parts(self) -> dict[str, nn.Module]:
        """The modules that are not the language model itself, by name: the head, and the trunk if it is separate."""
        return {name: module for name, module in self.named_children() if name != "model"}

    def forward(self, view: TensorDictBase, **scoring: Any) -> tuple[Scores, torch.Tensor]:
        """Log-probs of the trained tokens, and the value before each of them is sampled.

        Args:
            view: a training view in any layout.
            scoring: options of :func:`~torchrl_chat.training.sequence_log_probs`.

        Returns:
            the scores, and float32 of the same shape, (N, T) or (M, L), 0 where the mask is false.

        Raises:
            ModelError: the model does not compute of these rows what it computes of each alone.
        """
        scores = sequence_log_probs(self.model, view, critic=self._values, **scoring)
        assert scores.values is not None
        return scores, scores.values

    def _values(self, hidden: torch.Tensor, dense: Dense, passing: Passing, before: Any) -> torch.Tensor:
        if self.trunk is not None:
            hidden = passing.through(self.trunk, dense).last_hidden_state[before]
        values: torch.Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()
        return values


def _trunk_of(model: Any) -> nn.Module:
    """The model without its output head.

    Raises:
        ModelError: it does not say which part of it that is.
    """
    trunk, embeddings = model.base_model, model.get_input_embeddings()
    if trunk is model:  # its prefix is not what the part is called (Llama 4)
        parts = (part for part in model.children() if part is not embeddings)
        trunk = next((part for part in parts if any(module is embeddings for module in part.modules())), None)
    if trunk is None:
        raise ModelError(f"{type(model).__name__} does not say which part of it is the trunk: give trunk='shared'.")
    return trunk
