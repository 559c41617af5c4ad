"""Passes over a batch in random minibatches, gradients accumulated over as many tokens as fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from torchrl_chat.training.scoring import microbatches
from torchrl_chat.training.updates import take_step

LossOf = Callable[[TensorDictBase, TensorDictBase], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
"""What some rows of a minibatch cost, as their share of the whole of it, and what to log: ``loss_of(part, whole)``."""


def learn(
    optimizer: torch.optim.Optimizer,
    view: TensorDictBase,
    loss_of: LossOf,
    *,
    minibatch: int,
    max_tokens: int,
    epochs: int = 1,
    needed: torch.Tensor | None = None,
    max_grad_norm: float | None = 1.0,
    patience: int = 5,
) -> dict[str, float]:
    """Some passes over the sequences of a view, an optimizer step a minibatch.

    Args:
        optimizer: of what is trained.
        view: a ragged or padded training view of N sequences, with whatever the loss reads.
        loss_of: given some rows and the minibatch that they are of, their loss and what to log. Its denominators are the
            minibatch's, so that the sum over all parts is the minibatch's loss.

    Keyword Args:
        minibatch: sequences an optimizer step.
        max_tokens: tokens that go through the model at a time, padding included.
        epochs: passes over the view.
        needed: bool (N,), sequences whose loss has a gradient. The others do not go through the model, though they count in every
            denominator, and a minibatch without any takes no step. All that have a trained token, if ``None``.
        max_grad_norm, patience: see :func:`~torchrl_chat.training.take_step`.

    Returns:
        what was logged, averaged (:func:`averaged`); ``"grad_norm"``, before clipping; ``"skipped"``, steps that were not taken
        since they were not finite, and ``"idle"``, the share of minibatches in which nothing was to be learned.

    Raises:
        NotFiniteError: ``patience`` steps in a row were not finite.

    Example:
        >>> def loss_of(part, whole):
        ...     scores = sequence_log_probs(model, part)
        ...     count = whole["masks"].all_assistant_mask.sum()
        ...     return -masked_mean(scores.log_probs, scores.mask, denominator=count), {}
        >>> learn(optimizer, view, loss_of, minibatch=64, max_tokens=16384)["loss"]  # doctest: +SKIP
    """
    logged: list[list[dict[str, Any]]] = []
    skipped = idle = count = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(view)).split(minibatch):
            whole, count = view[rows], count + 1
            parts = microbatches(whole, max_tokens, None if needed is None else needed.to(rows.device)[rows])
            if not parts:
                idle += 1
                continue
            optimizer.zero_grad()
            measured = []
            for few in parts:
                loss, metrics = loss_of(whole[few], whole)
                loss.backward()
                measured.append({**metrics, "loss": loss.detach()})
            losses = [metrics["loss"] for metrics in measured]
            if take_step(optimizer, losses, max_grad_norm=max_grad_norm, patience=patience):
                norm = torch.tensor(optimizer.param_groups[0]["grad_norm"])
                logged.append([{**metrics, "grad_norm": norm} for metrics in measured])
            else:  # not finite: it says nothing of the others
                skipped += 1
    return averaged(logged) | {"skipped": skipped, "idle": idle / max(1, count)}


def averaged(minibatches: Sequence[Sequence[Mapping[str, torch.Tensor]]]) -> dict[str, float]:
    """What the passes of a step measured, a number a name, to be logged.

    Args:
        minibatches: for each minibatch what its microbatches measured. ``"loss"`` is a microbatch's share of the minibatch's
            loss, so that it is the sum which is averaged; everything else is averaged over all microbatches.

    Returns:
        nothing where no minibatch had anything to train on.

    Example:
        >>> averaged([[{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(2.0)}], [{"loss": torch.tensor(5.0)}]])
        {'loss': 4.0}
    """
    found = [few for few in minibatches if few]
    every = [metrics for few in found for metrics in few]
    result = {key: float(torch.stack([metrics[key] for metrics in every]).mean()) for key in (every or [{}])[0]}
    if "loss" in result:
        sums = [torch.stack([metrics["loss"] for metrics in few]).sum() for few in found]
        result["loss"] = float(torch.stack(sums).mean())
    return result
