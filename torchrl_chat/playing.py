"""Play a batch of conversations to their end: what evaluation does, and whoever wants finished episodes only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import EnvBase

from torchrl_chat import columns

_MAX_TURNS = 64
_OWN = {"next", "_step", "_reset", "done", "terminated", "truncated", "reward"}


@torch.no_grad()
def play(
    env: EnvBase,
    policy: Callable[[TensorDictBase], TensorDictBase],
    tensordict: TensorDictBase | None = None,
    *,
    max_turns: int | None = None,
) -> TensorDictBase:
    """Play every conversation of a batch to its end, each row once.

    A row that is done stays as it is while the others go on: it is not stepped (torchrl's ``"_step"``), so that no tool
    is called and nothing graded for it. A policy that clears ``"_step"`` for a row, as
    :class:`~torchrl_chat.policies.endpoint.EndpointPolicy` does where a request fails, ends it.

    Args:
        env: the environment; or what plays whole episodes by itself (``play_episodes(policy, tensordict)``), as
            :class:`~torchrl_chat.gateway.AgentEnv` does.
        policy: it may leave out rows whose ``"_step"`` is false.
        tensordict: what ``env.reset()`` returned; ``None`` resets here.

    Keyword Args:
        max_turns: after so many turns a conversation that has not ended is left as it is; 64 if ``None``, with a warning then.

    Returns:
        The finished rows, of the environment's batch size: for each row what its last step wrote under ``"next"`` and,
        beside it, the other columns of the root (``"query"``, ``"answer"``, ``"finish_reason"`` ...). A row
        that was never stepped has the columns of the root, and of the others what a step writes for such rows.

        But for ``"reward"`` and ``("reward_parts", ...)``: these are the episode's return, the sum over the turns in
        which the row was stepped (0 if there was none). ``"success"`` and ``"graded"`` are those of the last step.

    Raises:
        ValueError: ``max_turns`` is not positive, or the rewards of two turns have different shapes.

    Warns:
        RuntimeWarning: conversations have not ended, and ``max_turns`` was not given: perhaps nothing in the environment ends them.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy
        >>> from torchrl_chat.transforms import EndOfDialogue
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> finished = play(env.append_transform(EndOfDialogue()), policy)
        >>> [[message["role"] for message in transcript.messages] for transcript in finished["transcript"]]
        [['user', 'assistant']]
    """
    told = max_turns is not None
    max_turns = _MAX_TURNS if max_turns is None else max_turns
    if max_turns < 1:
        raise ValueError(f"max_turns is {max_turns}: expected at least 1.")
    if hasattr(type(env), "play_episodes"):  # not of an environment in it, which would leave out its transforms
        return env.play_episodes(policy, tensordict)
    td = env.reset() if tensordict is None else tensordict
    batch = env.batch_size
    live = torch.ones(batch, dtype=torch.bool)
    finished: TensorDictBase | None = None
    returns: dict[NestedKey, torch.Tensor] = {}
    for turn in range(max_turns):
        if not live.all():
            td.set("_step", live.clone())
        td = policy(td)
        wanted = td.get("_step", None)
        asked = live
        stepped = live if wanted is None else wanted.reshape(batch).cpu() & live
        if not stepped.any():  # a step of no row would write nothing
            last = td.exclude("_step")
            return last if finished is None else _paid(_where(asked, last, finished), returns)
        td = env.step(td)
        _add_rewards(returns, td["next"], stepped)
        last = finished_rows(td)
        finished = last if finished is None else _where(asked, last, finished)
        done = td["next", "done"].reshape(*batch, -1).any(-1).cpu()
        live = stepped & ~done
        if turn == max_turns - 1 and live.any() and not told:
            warnings.warn(
                f"{int(live.sum())} of {live.numel()} conversations have not ended after {max_turns} turns: does anything in the environment end them? "
                "An answer that is graded does (RewardTransform), one that nobody replies to (EndOfDialogue), a limit (Budget, "
                "StepCounter); or say play(..., max_turns=...).",
                RuntimeWarning,
                stacklevel=3,  # torch.no_grad is between
            )
        if not live.any() or turn == max_turns - 1:
            break
        td = env.step_mdp(td)
    assert finished is not None
    return _paid(finished, returns)


def finished_rows(tensordict: TensorDictBase) -> TensorDictBase:
    """What a step wrote, with the columns of the root that stay: queries, references, why the policy stopped.

    Args:
        tensordict: the result of ``env.step``, or the last step of a rollout; rows without ``"next"`` stay as they are.
    """
    following = tensordict.get("next", None)
    if following is None:
        return tensordict
    rows = following.copy()
    for key in tensordict.keys():
        if key not in _OWN and rows.get(key, None) is None:
            rows.set(key, tensordict.get(key))
    return rows


def _add_rewards(returns: dict[NestedKey, torch.Tensor], following: TensorDictBase, stepped: torch.Tensor) -> None:
    """Add what a step paid the rows that it was for, as a whole and in each component."""
    keys: list[NestedKey] = [
        "reward",
        *(("reward_parts", name) for name in following.get("reward_parts", {}).keys()),
    ]
    for key in keys:
        paid = following.get(key, None)
        if paid is None:
            continue
        went = stepped.to(paid.device).reshape(*stepped.shape, *[1] * (paid.ndim - stepped.ndim))
        paid = torch.where(went, paid, torch.zeros_like(paid))
        if key not in returns:
            returns[key] = paid
        elif returns[key].shape == paid.shape:
            returns[key] = returns[key] + paid
        else:
            raise ValueError(
                f"{key!r} has the shape {tuple(returns[key].shape)} in one turn and {tuple(paid.shape)} in another: "
                "expected one reward a row, to sum over the turns."
            )


def _paid(rows: TensorDictBase, returns: dict[NestedKey, torch.Tensor]) -> TensorDictBase:
    """The rows with the sums over their turns in the place of what the last step paid."""
    rows = columns.shallow(rows)
    for key, total in returns.items():
        rows.set(key, total)
    return rows


def _where(chosen: torch.Tensor, new: TensorDictBase, old: TensorDictBase) -> TensorDictBase:
    """The new rows where chosen, the old elsewhere; a column that the new rows lack stays as it is."""
    if chosen.all() and set(old.keys()) <= set(new.keys()):
        return new
    shared = [key for key in new.keys() if old.get(key, None) is not None]
    mask = chosen if new.device is None else chosen.to(new.device)
    rows = columns.shallow(old)
    mixed: Any = torch.where(mask, new.select(*shared), old.select(*shared))
    for key in shared:
        rows.set(key, mixed.get(key))
    return rows
