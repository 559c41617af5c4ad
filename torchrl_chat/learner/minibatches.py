"""Passes over a batch in random minibatches, gradients accumulated over as many tokens as fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from torchrl_chat import columns, ranks
from torchrl_chat.learner.sharding import is_sharded
from torchrl_chat.training.scoring import microbatches
from torchrl_chat.training.updates import take_step
from torchrl_chat.training.values import PolicyAndValue


@dataclass(frozen=True, slots=True)
class Counts:
    """What a minibatch holds, on all processes together: the denominators of its loss."""

    tokens: torch.Tensor
    """Trained tokens, float32 ()."""
    sequences: torch.Tensor
    """Sequences with a trained token, float32 (); at least 1."""
    updates: int = 0
    """Optimizer steps that were taken on the view before: 0 where the weights are those that sampled."""


LossOf = Callable[[TensorDictBase, Counts], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
"""What some rows of a minibatch cost, as their share of the whole of it, and what to log: ``loss_of(part, counts)``."""


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
    model: Any = None,
) -> dict[str, float]:
    """Some passes over the sequences of a view, an optimizer step a minibatch.

    With several processes (:mod:`torchrl_chat.ranks`) each has a view of its own, which may have no rows; a minibatch is made of
    an equal part of each, and a process that has nothing left goes through the model without anything to learn from, as
    often as the others do.

    Args:
        optimizer: of what is trained.
        view: a ragged or padded training view of N sequences, with whatever the loss reads.
        loss_of: given some rows and what the minibatch has in all, their loss and what to log. Its denominators are the
            minibatch's, so that the sum over all parts is the minibatch's loss.

    Keyword Args:
        minibatch: sequences an optimizer step, of all processes.
        max_tokens: tokens that go through the model at a time, padding included.
        epochs: passes over the view.
        needed: bool (N,), sequences whose loss has a gradient. The others do not go through the model, though they count in every
            denominator, and a minibatch without any takes no step. All that have a trained token, if ``None``.
        max_grad_norm, patience: see :func:`~torchrl_chat.training.take_step`.
        model: what is trained, if it lies in parts on several processes.

    Returns:
        what was logged, averaged (:func:`averaged`); ``"grad_norm"``, before clipping; ``"skipped"``, steps that were not taken
        since they were not finite; ``"idle"``, the share of minibatches in which nothing was to be learned; and
        ``"trained_tokens"``, sampled tokens that went through the model, in all passes. Of all processes.

    Raises:
        NotFiniteError: ``patience`` steps in a row were not finite.
        ValueError: the sequences of a minibatch cannot be parted equally over the processes; or there are several, and no
            sharded model.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy, play, training_view
        >>> from torchrl_chat.learner import make_adamw
        >>> from torchrl_chat.training import masked_mean, sequence_log_probs
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> policy = TransformersPolicy(model, tokenizer, max_new_tokens=4)
        >>> view = training_view(play(env, policy, max_turns=1), layout="padded")
        >>> def loss_of(part, counts):
        ...     scores = sequence_log_probs(model, part)
        ...     return -masked_mean(scores.log_probs, scores.mask, denominator=counts.tokens), {}
        >>> optimizer = make_adamw(model.parameters(), lr=1e-3)
        >>> learned = learn(optimizer, view, loss_of, minibatch=64, max_tokens=16384)
        >>> bool(learned["loss"] > 0)
        True
    """
    if ranks.count() > 1 and not is_sharded(model):
        raise ValueError(f"{ranks.count()} processes learn together: give model=shard(model).")
    if minibatch % ranks.count():
        raise ValueError(f"minibatch={minibatch}: expected a multiple of the {ranks.count()} processes.")
    logged: list[list[dict[str, Any]]] = []
    skipped = idle = count = updates = learned = 0
    for _ in range(epochs):
        order = torch.randperm(len(view)).split(minibatch // ranks.count()) if len(view) else ()
        for number in range(int(ranks.most(len(order)))):
            rows = order[number] if number < len(order) else torch.empty(0, dtype=torch.int64)
            whole, count = view[rows], count + 1
            sampled = _sampled(whole)
            parts = microbatches(whole, max_tokens, None if needed is None else needed.to(rows.device)[rows])
            passes = int(ranks.most(len(parts)))
            if not passes:
                idle += 1
                continue
            optimizer.zero_grad()
            tokens, sequences = ranks.total(torch.stack((sampled.sum(), (sampled > 0).sum())).float())
            counts = Counts(tokens, sequences.clamp(min=1), updates)
            measured = []
            for few in parts:
                loss, metrics = loss_of(whole[few], counts)
                loss.backward()
                measured.append({**metrics, "loss": loss.detach(), "weight": sampled[few].sum()})
                learned += int(sampled[few].sum())
            for _ in range(passes - len(parts)):
                _pass_in_step(model)
            losses = [metrics["loss"] for metrics in measured]
            step = take_step(optimizer, losses, max_grad_norm=max_grad_norm, patience=patience)
            if step:
                updates += 1
                norm = torch.tensor(step.grad_norm)
                logged.append([{**metrics, "grad_norm": norm} for metrics in measured])
            else:  # not finite: it says nothing of the others
                skipped += 1
    trained = float(ranks.total(torch.tensor(float(learned))))
    return averaged(_of_all(logged)) | {"skipped": skipped, "idle": idle / max(1, count), "trained_tokens": trained}


def _of_all(logged: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """What the microbatches of each minibatch measured, on all processes."""
    if ranks.count() == 1:
        return logged
    told = [
        [{name: torch.as_tensor(value).cpu() for name, value in each.items()} for each in few] for few in logged
    ]
    return [[each for few in parts for each in few] for parts in zip(*ranks.everywhere(told), strict=True)]


def _sampled(view: TensorDictBase) -> torch.Tensor:
    """Trained tokens of each sequence, int64 (N,)."""
    rows = columns.read_field(view.get("masks"), "all_assistant_mask", view.batch_size) or []
    return torch.stack([row.sum() for row in rows]).cpu() if rows else torch.zeros(0, dtype=torch.int64)


def _pass_in_step(model: Any) -> None:
    """A pass, forward and backward, that adds nothing to any gradient: the other processes are at one of theirs.

    What gathers weights does so in the order of theirs, values behind log-probs.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    if isinstance(model, PolicyAndValue):
        masks = TensorDict(all_attention_mask=ids == 0, all_assistant_mask=ids == 0, batch_size=1)
        view = TensorDict(
            tokens=TensorDict(full=ids, batch_size=1),
            masks=masks,
            position_ids=torch.arange(2, device=ids.device)[None],
            batch_size=1,
        )
        scores, values = model(view)
        told = torch.stack((scores.log_probs, values))
    else:
        told = model(input_ids=ids, use_cache=False).logits
    told.backward(torch.zeros_like(told))


def averaged(minibatches: Sequence[Sequence[Mapping[str, torch.Tensor]]]) -> dict[str, float]:
    """What the passes of a step measured, a number a name, to be logged.

    Args:
        minibatches: for each minibatch what its microbatches measured. ``"loss"`` is a microbatch's share of the minibatch's
            loss, so that it is the sum which is averaged; everything else is averaged over all microbatches, by their
            ``"weight"`` (their trained tokens, say) if they have one.

    Returns:
        nothing where no minibatch had anything to train on.

    Example:
        >>> import torch
        >>> averaged([[{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(2.0)}], [{"loss": torch.tensor(5.0)}]])
        {'loss': 4.0}
    """
    found = [few for few in minibatches if few]
    every = [metrics for few in found for metrics in few]
    if not every:
        return {}
    weights = torch.stack([torch.as_tensor(metrics.get("weight", 1.0)) for metrics in every]).double()
    result = {}
    for key in every[0]:
        if key in ("loss", "weight"):
            continue
        values = torch.stack([metrics[key] for metrics in every]).double().cpu()
        result[key] = float((weights * values).sum() / weights.sum())
    if "loss" in every[0]:
        sums = [torch.stack([metrics["loss"] for metrics in few]).sum() for few in found]
        result["loss"] = float(torch.stack(sums).mean())
    return result
