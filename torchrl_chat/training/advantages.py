"""Advantages: of groups of episodes (GRPO, Dr. GRPO, RLOO), and of single tokens (GAE); what PPO makes of the latter."""

from __future__ import annotations

import math
from typing import Literal

import torch
from tensordict import TensorDictBase

from torchrl_chat import columns, ranks


def group_advantages(
    reward: torch.Tensor | TensorDictBase,
    group: torch.Tensor | None = None,
    *,
    episode: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    normalize: Literal["std", "mean", "batch"] | None = "std",
    leave_one_out: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """How much better each episode did than its group.

    The mean of the group's rewards is taken off: with ``normalize="std"`` the rest is divided by the group's
    standard deviation (GRPO, arXiv:2402.03300), with ``None`` not (Dr. GRPO, arXiv:2503.20783); with ``"mean"`` by the group's
    mean, so that questions count by how rarely they are answered, as in the likelihood of an answer (MaxRL,
    arXiv:2602.02710); with ``"batch"`` by the standard deviation over all groups of all processes (REINFORCE++ with a baseline,
    arXiv:2501.03262). With ``leave_one_out=True`` the mean is that of the other episodes of the group (RLOO,
    arXiv:2402.14740).

    Args:
        reward: a training view, which has all of what follows: its ``"reward"``, ``"group"``, ``"episode"``, and which of its
            sequences have a token to train. Or one number a row, float (N, ...), N numbers in all.
        group: int64 (N,), which rows belong together. A negative one says that the row belongs to nobody, as a training view
            does of an episode that failed (its grade, say): it gets 0, and has no say in what the others get.

    Keyword Args:
        episode: int64 (N,), the episode of each row, as in a training view: an episode of several sequences counts
            once. Each row is its own episode if ``None``.
        valid: bool (N, ...), rows that count; the others get 0. All of a group if ``None``.
        normalize: see above.
        leave_one_out: see above.
        eps: the least standard deviation and mean (sample standard deviation, as in torchrl's ``MCAdvantage``).

    Returns:
        The advantages, in the shape of ``reward``. 0 where a group has one valid episode: nothing compares with it.

    Raises:
        KeyError: the view has no reward or no group.
        TypeError: there is neither a view nor a group.
        ValueError: the shapes disagree, a valid reward is not finite, or is negative with ``normalize="mean"``.

    Example:
        >>> import torch
        >>> group_advantages(torch.tensor([1.0, 0.0, 5.0, 3.0]), torch.tensor([0, 0, 1, 1]), normalize=None)
        tensor([ 0.5000, -0.5000,  1.0000, -1.0000])
    """
    if isinstance(reward, TensorDictBase):
        reward, group, episode, valid = _of_view(reward, group, episode, valid)
    elif group is None:
        raise TypeError("group_advantages needs a training view, or rewards and their groups.")
    count = len(reward)
    if normalize not in ("std", "mean", "batch", None):
        raise ValueError(f"normalize={normalize!r}: expected 'std', 'mean', 'batch' or None.")
    for name, value in (("reward", reward), ("group", group), ("episode", episode), ("valid", valid)):
        if value is not None and value.numel() != count:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}: expected one value for {count} rows.")
    values = reward.reshape(count).float()
    belongs = group.reshape(count) >= 0
    counts = (belongs if valid is None else belongs & valid.reshape(count).to(belongs.device)).to(values)
    if bool((~values.isfinite() & (counts > 0)).any()):
        row = int((~values.isfinite() & (counts > 0)).nonzero()[0])
        raise ValueError(f"the reward of row {row} is {float(values[row])}: not finite.")
    values = torch.where(counts > 0, values, 0.0)
    if normalize == "mean" and bool((values < 0).any()):
        row = int((values < 0).nonzero()[0])
        raise ValueError(
            f"the reward of row {row} is {float(values[row])}: a group's mean divides rewards of at least 0."
        )
    weights = counts
    if episode is not None:  # an episode's first valid row stands for it
        numbers = episode.reshape(count)
        order = torch.arange(count, device=numbers.device).where(counts > 0, count)
        first = torch.full((int(numbers.max()) + 1 if count else 0,), count, device=numbers.device)
        first = first.scatter_reduce(0, numbers, order, "amin")
        weights = counts * (first[numbers] == order)
    names, index = group.reshape(count).unique(return_inverse=True)

    def total(of: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(names), device=of.device).index_add(0, index, of)[index]

    # From the lowest of the group, so that equal rewards are exactly 0: what rounding leaves of them would be divided by eps.
    least = torch.full((len(names),), torch.inf, device=values.device)
    least = least.scatter_reduce(0, index, values.where(weights > 0, torch.inf), "amin")[index]
    values = torch.where(counts > 0, values - least, 0.0)

    size = total(weights)
    means = total(weights * values) / size.clamp(min=1)
    centred = values - means
    variance = total(weights * centred**2) / (size - 1).clamp(min=1)
    if leave_one_out:
        centred = centred * size / (size - 1).clamp(min=1)
    if normalize == "std":
        centred = centred / variance.sqrt().clamp(min=eps)
    if normalize == "mean":
        centred = centred / (means + least.where(size > 0, 0.0)).clamp(min=eps)
    if normalize == "batch":
        compared = weights * (size > 1)
        squares, among = ranks.total(torch.stack(((compared * centred**2).sum(), compared.sum())))
        centred = centred / (squares / (among - 1).clamp(min=1)).sqrt().clamp(min=eps)
    return torch.where((size > 1) & (counts > 0), centred, 0.0).reshape(reward.shape)


def _of_view(
    view: TensorDictBase,
    group: torch.Tensor | None,
    episode: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What a training view says of its rows; what is given besides goes before it."""
    found = view.get("group", None) if group is None else group
    reward = view.get("reward", None)
    for name, value, how in (
        ("reward", reward, "a RewardTransform writes it"),
        ("group", found, "training_view(group=...)"),
    ):
        if value is None:
            raise KeyError(f"the view has no {name!r} ({how}): got the keys {sorted(map(str, view.keys()))}.")
    if valid is None:  # the sequences that have a token to train
        if (owners := view.get("sequence_ids", None)) is not None:
            valid = torch.zeros(len(reward), dtype=torch.bool, device=owners.device)
            valid[owners[view.get("masks").all_assistant_mask.bool()]] = True
        else:
            rows = columns.read_field(view.get("masks"), "all_assistant_mask", view.batch_size)
            valid = torch.tensor([bool(row.any()) for row in rows or ()], dtype=torch.bool)
        valid = valid.to(found.device)
    return reward, found, view.get("episode", None) if episode is None else episode, valid


def token_rewards(reward: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rewards on the tokens that earned them, for :func:`gae`.

    Args:
        reward: one number a row, on its last sampled token: (N,), (N, 1) or (N, 1, 1); or one a turn, each on the last
            sampled token of its turn: (N, K), K > 1, as ``"turn_reward"`` of a training view.
        mask: bool (N, T), the sampled tokens; a turn is a run of them.

    Returns:
        float32 (N, T).

    Raises:
        ValueError: the shapes disagree, or a reward has no token to stand on.

    Example:
        >>> import torch
        >>> token_rewards(torch.tensor([2.0]), torch.tensor([[False, True, True, False]]))
        tensor([[0., 0., 2., 0.]])
    """
    rewards = reward.reshape(len(reward), math.prod(reward.shape[1:])).float()  # of no rows, -1 would be anything
    if len(rewards) != len(mask):
        raise ValueError(f"rewards of {len(rewards)} rows, and a mask of {len(mask)}.")
    ends = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    if rewards.shape[1] == 1:
        last = ends & (ends.cumsum(-1) == ends.sum(-1, keepdim=True))
        turn = torch.zeros_like(mask, dtype=torch.int64)
    else:
        last, turn = ends, (ends.cumsum(-1) - 1).clamp(min=0)
    found = last.sum(-1)
    beyond = torch.arange(rewards.shape[1], device=rewards.device) >= found[:, None]
    if bool((beyond & (rewards != 0)).any()) or bool((found > rewards.shape[1]).any()):
        row = int(((beyond & (rewards != 0)).any(-1) | (found > rewards.shape[1])).nonzero()[0])
        raise ValueError(f"row {row} has {int(found[row])} turns to put {rewards.shape[1]} rewards on.")
    return torch.where(last, rewards.gather(1, turn.clamp(max=rewards.shape[1] - 1)), 0.0)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    *,
    sequences: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation over sampled tokens (Schulman et al. 2016, arXiv:1506.02438).

    One step is one sampled token: from the last token of a turn to the first of the next one is one step, whatever
    the environment wrote between them. Behind the last one the value is 0.

    Args:
        rewards: float (N, T), on sampled tokens (see :func:`token_rewards`).
        values: float (N, T), the value before each token is sampled.
        mask: bool (N, T), the sampled tokens.
        gamma: discount of a token.
        lam: the exponential weight of longer estimates, 0 to 1.

    Keyword Args:
        sequences: int64 (N, T), which sequence a token is of, where rows hold several (``"sequence_ids"`` of a packed
            view). One a row if ``None``.

    Returns:
        The advantages and the value targets (advantage + value), float32 (N, T), 0 where the mask is false.

    Raises:
        ValueError: the shapes disagree, or a reward stands on a token that was not sampled.

    Example:
        >>> import torch
        >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]])
        >>> gae(rewards, values, torch.tensor([[True, False, True]]), lam=1.0)[0]
        tensor([[0.5000, 0.0000, 0.7500]])
    """
    for name, value in (("rewards", rewards), ("values", values), ("sequences", sequences)):
        if value is not None and value.shape != mask.shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}, and the mask {tuple(mask.shape)}.")
    if bool((rewards[~mask] != 0).any()):
        row, place = (~mask & (rewards != 0)).nonzero()[0].tolist()
        raise ValueError(f"row {row} has a reward on token {place}, which was not sampled: see token_rewards.")
    advantages, targets = torch.zeros(mask.shape, device=mask.device), torch.zeros(mask.shape, device=mask.device)
    if not bool(mask.any()):
        return advantages, targets
    rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    owner = (rows if sequences is None else rows * (int(sequences.max()) + 2) + sequences)[mask]
    # The sampled tokens alone, a sequence a row: what the environment wrote takes no step.
    _, owner, counts = owner.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(owner), device=mask.device) - (counts.cumsum(0) - counts)[owner]
    shape = (len(counts), int(counts.max()))
    reward = torch.zeros(shape, device=mask.device).index_put((owner, place), rewards[mask].float())
    value = torch.zeros(shape, device=mask.device).index_put((owner, place), values[mask].float())
    following = torch.nn.functional.pad(value[:, 1:], (0, 1))
    delta = reward + gamma * following - value
    carried = torch.zeros(len(counts), device=mask.device)
    found = torch.zeros(shape, device=mask.device)
    for step in range(shape[1] - 1, -1, -1):
        # Behind the end of a shorter row delta is 0, and so is what is carried into it.
        carried = delta[:, step] + gamma * lam * carried
        found[:, step] = carried
    advantages = advantages.masked_scatter(mask, found[owner, place])
    return advantages, torch.where(mask, advantages + values.float(), 0.0)


def whitened(values: torch.Tensor, mask: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """Numbers of tokens, brought to mean 0 and standard deviation 1 over all that are under the mask.

    With several processes (:mod:`torchrl_chat.ranks`), which all call this, the mean and the deviation are of all together.

    Args:
        values: float (N, T), such as the advantages of :func:`gae`.
        mask: bool (N, T).
        eps: the least standard deviation (sample standard deviation).

    Returns:
        float (N, T), 0 where the mask is false. 0 throughout where it has one token: nothing compares with it. What is not
        finite stays what it is, and has no part in the mean and the deviation of the others.

    Example:
        >>> import torch
        >>> whitened(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[-0.7071,  0.7071,  0.0000]])
    """
    chosen = values[mask & values.isfinite()]
    count, summed = ranks.total(torch.stack((chosen.new_tensor(len(chosen)), chosen.sum())))
    mean = summed / count.clamp(min=1)
    deviation = (ranks.total((chosen - mean).square().sum()) / (count - 1).clamp(min=1)).sqrt()
    if count < 2:
        return torch.where(mask & ~values.isfinite(), values, 0.0)
    return torch.where(mask, (values - mean) / deviation.clamp(min=eps), 0.0)
