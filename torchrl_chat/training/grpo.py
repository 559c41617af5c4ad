"""torchrl's GRPO parts, mended where an episode that failed, or another training step, would have a say in a group."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.objectives.llm.grpo import GRPOLoss, MCAdvantage

from torchrl_chat import columns
from torchrl_chat.seeds import EPOCH, ROW, SEED
from torchrl_chat.training.failures import failed_rows

_GROUP = "_group"


class ExactMCAdvantage(MCAdvantage):
    """torchrl's ``MCAdvantage`` for episodes that may fail and groups that may stay incomplete.

    Two defects of torchrl 0.14.1 are mended:

    - An episode that failed (see :func:`~torchrl_chat.training.failures.failed_rows`) counts as one of the group, with the
      reward 0: it is trained as a wrong answer, and pulls the others' baseline. Here it completes its group, but is not
      written, and the advantages are those of the others; one that is left alone has the advantage 0, and of a group that failed
      as a whole nothing is written.
    - Groups are told by the query alone. What an incomplete group left in the queue is mixed with the answers to the same
      question from a later pass over the data, sampled by another policy, and these leave as many behind. Here a group is one
      row of the dataset in one epoch, which a dataset environment writes beside the query; what stays incomplete stays in the
      queue (``queued_trajectories``, ``clear_queues()``) and meets nobody else.

    Args:
        grpo_size: episodes a group.
        prompt_key: a column whose equal values make a group, as in torchrl; ``None`` for what is said above.
        rewards_key, advantage_key, done_key, verbose: as in torchrl.
        **options: as in torchrl (``trajectory_return``, ``keep_return_bounds``, ...).

    Raises:
        KeyError: when written to: there are no columns that tell the group.

    Example:
        >>> from torchrl.data import LazyStackStorage, ReplayBuffer
        >>> buffer = ReplayBuffer(storage=LazyStackStorage(64), transform=ExactMCAdvantage(grpo_size=8))
    """

    def __init__(
        self,
        grpo_size: int,
        prompt_key: NestedKey | None = None,
        rewards_key: NestedKey = ("next", "reward"),
        advantage_key: NestedKey = "advantage",
        done_key: NestedKey = ("next", "done"),
        verbose: bool = False,
        **options: Any,
    ):
        super().__init__(grpo_size, prompt_key or _GROUP, rewards_key, advantage_key, done_key, verbose, **options)
        self._told_by_row = prompt_key is None

    def _inv_call_single(self, tensordict: TensorDictBase) -> TensorDictBase | None:
        if self._told_by_row:
            tensordict = tensordict.copy()
            tensordict.set(_GROUP, _group_of(tensordict).expand(len(tensordict), -1))
        written = super()._inv_call_single(tensordict)
        if written is not None and self._told_by_row:
            written = written.exclude(_GROUP)
        if written is None or self.trajectory_return is not None:
            return written
        return self._of_the_others(written)

    def _of_the_others(self, group: TensorDictBase) -> TensorDictBase | None:
        """The steps of a complete group without the episodes that failed."""
        ends = group.get(self.done_key).reshape(len(group), -1).any(-1).nonzero().flatten().tolist()
        starts = [0, *(end + 1 for end in ends[:-1])]
        failed = failed_rows(group[torch.tensor(ends)].get("next"), len(ends))
        if not any(failed):
            return group
        spans = zip(starts, ends, failed, strict=True)
        kept = [step for start, end, bad in spans if not bad for step in range(start, end + 1)]
        if not kept:
            self.written_groups -= 1
            self.dropped_groups += 1
            return None
        group = group[torch.tensor(kept)]
        rewards = group.get(self.rewards_key, as_nested_tensor=True)
        values = rewards.values() if rewards.is_nested else rewards
        group.set(self.advantage_key, (rewards - values.mean()) / _deviation(values))
        return group

    def _trajectory_advantage(self, trajs: list[TensorDictBase]) -> TensorDictBase | None:
        good = [traj for traj in trajs if not failed_rows(traj[-1:].get("next"), 1)[0]]
        if len(good) == len(trajs) or len(good) >= self.grpo_size:
            return super()._trajectory_advantage(good)
        if not good or len(trajs) < self.candidate_group_size:
            return None  # more candidates may come
        returns = self._trajectory_returns([traj.get(self.rewards_key) for traj in good])
        low, high = self.keep_return_bounds or (-torch.inf, torch.inf)
        if not low < float(returns.mean()) < high:
            return None
        for traj, advantage in zip(good, (returns - returns.mean()) / _deviation(returns), strict=True):
            traj.set(self.advantage_key, advantage.expand(traj.get(self.rewards_key).shape).clone())
        return self._cat_tensordicts(good, -1)


class ExactGRPOLoss(GRPOLoss):
    """torchrl's ``GRPOLoss``, in which sequences without a trained token do not count.

    In torchrl 0.14.1 ``aggregation="prompt_mean"`` takes such a row (an episode that could not be graded, in a training view)
    for one whose loss is 0, which makes the gradient of the others smaller. Everything else is torchrl's.

    Example:
        >>> from torchrl_chat import ExactTransformersWrapper
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> policy = ExactTransformersWrapper(model, tokenizer=tokenizer, generate=False)
        >>> loss_module = ExactGRPOLoss(policy, masking_strategy="rlhf", aggregation="prompt_mean")
    """

    def _aggregate_loss_value(
        self, value: torch.Tensor, mask: torch.Tensor, tensordict: TensorDictBase | None = None
    ) -> torch.Tensor:
        counted = mask.any(-1)
        if self.aggregation == "prompt_mean" and self.reduction != "none" and bool(counted.any()):
            value, mask = value[counted], mask[counted]
        return super()._aggregate_loss_value(value, mask, tensordict)


def _group_of(trajectory: TensorDictBase) -> torch.Tensor:
    """What the answers to one question in one epoch share, int64 (3,)."""
    first = trajectory[0]
    numbers = [first.get(key, None) for key in (EPOCH, ROW)]
    if all(number is None for number in numbers) and (seed := first.get(SEED, None)) is not None:
        # An environment over a server: the rows of a group share their seed. (In one over a dataset no two episodes do.)
        numbers = [-1, seed]
    if any(number is None for number in numbers):
        raise KeyError(
            f"ExactMCAdvantage tells groups by {EPOCH!r} and {ROW!r}, which a dataset environment writes, or by {SEED!r}; the "
            f"steps have the keys {sorted(map(str, first.keys()))}. Pass prompt_key=..., a column whose equal values make a group."
        )
    query = first.get("query", None)
    spelled = "" if query is None else repr(columns.read_objects(query, torch.Size([]))[0])
    digest = hashlib.blake2b(spelled.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return torch.tensor([*map(int, numbers), int.from_bytes(digest, "little") >> 1])


def _deviation(values: torch.Tensor) -> torch.Tensor:
    """The sample standard deviation as torchrl's ``MCAdvantage`` takes it; of one value, which nothing compares with, 1."""
    return values.std().clamp_min(1e-6) if values.numel() > 1 else values.new_ones(())
