"""The value head of PPO: what a state (the tokens so far) is expected to earn."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import nn

from torchrl_chat.models.passes import ModelError, padded_pass
from torchrl_chat.training.passing import dense_of, passing_of
from torchrl_chat.training.scoring import Scores, sequence_log_probs


class PolicyAndValue(nn.Module):
    """A language model with a value head: log-probs and values of the same tokens in one call.

    Args:
        model: a transformers causal language model with an output head, or a PEFT model of one.
        trunk: ``"shared"`` puts the head on the model's last hidden state, so that both losses train one network in one pass;
            ``"separate"`` gives it a copy of the model's trunk, for twice the memory and without interference. Of a PEFT
            model the copy has an adapter of its own, and that is what is trained of it.

    Example:
        >>> actor_critic = PolicyAndValue(model)
        >>> scores, values = actor_critic(training_view(finished, layout="padded"))
    """

    def __init__(self, model: Any, trunk: Literal["shared", "separate"] = "shared"):
        super().__init__()
        if trunk not in ("shared", "separate"):
            raise ValueError(f"trunk={trunk!r}: expected 'shared' or 'separate'.")
        self.model = model
        # What PEFT calls the base model is a wrapper around the whole of it, head and all.
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.trunk = copy.deepcopy(_trunk_of(plain)) if trunk == "separate" else None
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
            view: a padded training view of N sequences.
            scoring: options of :func:`~torchrl_chat.training.sequence_log_probs`, without ``max_tokens``.

        Returns:
            the scores, and float32 (N, T), 0 where the mask is false.

        Raises:
            ValueError: the view is not padded, or the rows would go through the model in several passes.
            ModelError: the model takes no padded rows.
        """
        if "position_ids" not in view.keys() or len(view.batch_size) != 1:
            raise ValueError("values need a padded view: training_view(..., layout='padded').")
        if scoring.get("max_tokens") is not None:
            raise ValueError("values need one pass: split the view with microbatches instead of max_tokens.")
        passing = passing_of(self.model, dense_of(view, next(self.model.parameters()).device))
        if passing.together != "padded" or passing.change is not None:
            raise ModelError(
                f"{type(self.model).__name__} takes not all of these rows together, and values need one pass."
            )
        seen: list[torch.Tensor] = []
        # The output head's first hook sees all hidden states, before scoring cuts them to those that it needs.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            scores = sequence_log_probs(self.model, view, **scoring)
        finally:
            hook.remove()
        mask = passing.dense.scored
        values = torch.zeros(mask.shape, device=mask.device)
        if not seen:
            return scores, torch.zeros(scores.mask.shape, device=mask.device)
        rows = mask.any(-1)  # the others did not go through the model
        hidden = seen[0]
        width = hidden.shape[1]
        if self.trunk is not None:
            dense = passing.dense.part(rows.nonzero().flatten(), width)
            hidden = padded_pass(self.trunk, dense.ids, dense.attention).last_hidden_state
        found = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()
        # Position t sees token t: it says what is expected before token t + 1.
        values[rows, 1:width] = found[:, :-1]
        return scores, torch.zeros(scores.mask.shape, device=mask.device).masked_scatter(scores.mask, values[mask])


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
