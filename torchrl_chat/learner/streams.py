"""What a trainer says of each token when it first learns from a sequence: the numbers behind a step's averages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDictBase

from torchrl_chat import columns, ranks
from torchrl_chat.learner.minibatches import Counts
from torchrl_chat.training.scoring import Scores


class _Part(NamedTuple):
    mask: torch.Tensor  # bool (N, T), what was sampled
    log_ratio: torch.Tensor  # float32 (N, T), NaN where nothing was scored
    entropy: torch.Tensor | None
    advantage: torch.Tensor | None


class Streams:
    """Keeps the ratio, the entropy and the advantage of every token of the sequences that went through a loss, of each sequence's first pass.

    The ratio is the probability of the token under the model that learns, divided by that with which it was sampled. In a
    step's first minibatch these are the same weights: what is not 1 there is the mismatch of two programs.

    Example:
        >>> streams = Streams()
        >>> def loss_of(part, counts):
        ...     scores = sequence_log_probs(model, part, entropy=True)
        ...     streams.add(part, scores, counts)
        ...     return -masked_mean(scores.log_probs, scores.mask, denominator=counts.tokens), {}
        >>> streams.of(0, 0) is None  # nothing was learned yet
        True
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        self._before: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, part: TensorDictBase, scores: Scores, counts: Counts) -> None:
        """Take what a pass said, but for sequences that went through one before.

        Args:
            part: N rows of a ragged or padded training view, with their ``"episode"`` and ``"episode_sequence"``; and their
                ``"advantage"``, a number a row or a token, where there is one.
            scores: of these rows, (N, T).
            counts: of their minibatch.
        """
        numbers = zip(part["episode"].tolist(), part["episode_sequence"][:, 0].tolist(), strict=True)
        new = [(key, row) for row, key in enumerate(numbers) if key not in self._places]
        if not new:
            return
        width = scores.mask.shape[1]
        sampled, before = (
            torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
            for rows in (
                columns.read_field(part.get("masks"), "all_assistant_mask", part.batch_size) or [],
                columns.read_field(part.get("log_probs"), "full", part.batch_size) or [],
            )
        )
        log_ratio = (scores.log_probs.detach() - before.to(scores.mask.device)).masked_fill(~scores.mask, torch.nan)
        for key, row in new:
            self._places[key] = len(self._parts), row
        advantage = part.get("advantage", None)
        if advantage is not None:
            advantage = advantage.detach().reshape(len(part), -1).to(scores.mask.device).expand_as(scores.mask)
        entropy = None if scores.entropy is None else scores.entropy.detach()
        self._parts.append(_Part(sampled, log_ratio, entropy, advantage))
        if not counts.updates:
            apart = log_ratio[scores.mask].abs()
            self._before.append((apart.sum(), apart.max() if len(apart) else apart.sum(), scores.mask.sum()))

    def of(self, episode: int, sequence: int) -> dict[str, list[float]] | None:
        """``"ratio"``, ``"entropy"`` (nats) and ``"advantage"`` of each sampled token of a sequence, in their order; ``None`` where it was
        not learned from.

        Args:
            episode: its number in the view.
            sequence: which of those of its episode in which something was sampled.
        """
        place = self._places.get((episode, sequence))
        if place is None:
            return None
        (mask, log_ratio, entropy, advantage), row = self._parts[place[0]], place[1]
        chosen = mask[row]
        told = {"ratio": log_ratio[row].exp()}
        if entropy is not None:
            told["entropy"] = entropy[row].masked_fill(log_ratio[row].isnan(), torch.nan)
        if advantage is not None:
            told["advantage"] = advantage[row].masked_fill(log_ratio[row].isnan(), torch.nan)
        return {name: values[chosen].tolist() for name, values in told.items()}

    def mismatch(self) -> dict[str, float]:
        """How far the learner's log-probs are from the sampler's under the same weights, of all processes, which call this together:
        ``"mismatch"``, the mean of the absolute differences, and ``"mismatch_max"``. Nothing where nothing was learned, or no
        weights were the sampler's.
        """
        apart = sum(float(total) for total, _, _ in self._before)
        tokens = sum(float(count) for _, _, count in self._before)
        apart, tokens = ranks.total(torch.tensor([apart, tokens], dtype=torch.float64)).tolist()
        most = ranks.most(max((float(most) for _, most, _ in self._before), default=0.0))
        return {"mismatch": apart / tokens, "mismatch_max": most} if tokens else {}
