"""The training view: episodes as the token sequences that are trained on.

An episode is one sequence, unless its chat template rewrote the past and began branches (history policy
``"template"``): then it is several, and each sampled token is under the mask of exactly one of them. A branch in which
nothing was sampled (one that the last user message opened, say) is none of them, unless the episode has no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from torchrl_chat import columns
from torchrl_chat.conversation import Branch, Transcript
from torchrl_chat.training import layouts
from torchrl_chat.training.episodes import Episodes
from torchrl_chat.training.failures import failed_rows
from torchrl_chat.training.layouts import Flat, Layout, Side

# The view's own columns: those of the same name in the data are not kept (but may tell the groups).
_OWN = {
    "episode", "episode_digest", "episode_sequence", "group", "scored", "turn_reward", "position_ids", "sequence_ids",
    "cu_seqlens", "weight_versions", "parents", "ends",
}  # fmt: skip


def training_view(
    data: TensorDictBase | Sequence[TensorDictBase],
    *,
    layout: Layout = "ragged",
    group: str | int | None = "query",
    turns: bool = False,
    side: Side = "right",
    pad_id: int = 0,
    multiple_of: int = 1,
    max_tokens: int | None = None,
) -> TensorDict:
    """Every sequence of every finished episode, laid out for a loss.

    Args:
        data: rows that end an episode (what ``step`` wrote under ``"next"``, or that after ``step_mdp``), of any
            batch size, every one of which is taken; or steps with their ``"next"``, such as a rollout or a batch of
            torchrl's ``LLMCollector``, of which those are taken that ended (``("next", "done")``), in
            row-major order; or a sequence of either.

    Keyword Args:
        layout: see below.
        group: the column whose equal values make a group of GRPO; or the group's size, where the episodes of a group
            stand one behind the other, unfinished ones among them. Without that column (or with ``None``) there is no
            ``"group"``.
        turns: the reward of an episode is the sum over its turns, and that of each turn stands in
            ``"turn_reward"``. It needs steps, with time as the last dimension of the batch.
        side: where a padded layout has its padding.
        pad_id: the token id of padding.
        multiple_of: T and L below are multiples of it.
        max_tokens: how many tokens a row of a packed layout has at most, one row if ``None``; of a tree layout likewise, as
            many as the largest tree has if ``None``.

    Returns:
        E episodes in N >= E sequences, those of an episode in the order in which they were sampled, without those in which
        nothing was (but an episode without any sampled token has its last one). In every layout:

        - ``("tokens", "full")``: int64;
        - ``("masks", "all_assistant_mask")``: bool, true on the tokens that are trained;
        - ``("masks", "all_attention_mask")``: bool, false on padding;
        - ``("log_probs", "full")``: float32, 0 where the policy did not sample or reported none;
        - ``"episode"``: int64 (N,), the episode that a sequence comes from, and ``"group"``: int64 (N,), -1 where the
          episode failed;
        - ``"episode_digest"``: int64 (N,), a number made of all that the episode's sequences hold, which tells it from the
          episodes of other views; and ``"episode_sequence"``: int64 (N, 2), which of them the row is, from 0, and
          how many there are. They are for whoever finds rows of several views, in a replay buffer say;
        - ``"scored"``: bool (N,), whether the policy reported a log-prob for every token that it sampled;
        - every other column of the row (rewards, references), repeated for its sequences, but for what is of one step's
          tokens (reference log-probs: apply :class:`~torchrl_chat.transforms.kl.RetrieveLogProb` to the view) and for
          columns that have the name of one of the view's own;
        - ``("weight_versions", "full")``, where some policy said which weights sampled (see ``"weight_versions"`` of
          :class:`~torchrl_chat.ChatEnv`): int64, of the shape of the tokens, -1 where it is not known;
        - ``"turn_reward"`` if asked for: float32 (N, K), the rewards of the turns that a sequence holds, 0 behind them.

        ``"ragged"``: batch size (N,), the first four are lazy stacks of rows (T_i,), as torchrl's losses read them.
        ``"padded"``: batch size (N,), they are (N, T), and so is ``"position_ids"``.
        ``"packed"``: batch size (), they are (M, L), several sequences a row (M = 1 without ``max_tokens``), with
        ``"position_ids"`` int64 (M, L), which begin at 0 with each sequence; ``"sequence_ids"`` int64 (M, L), the
        sequence's number 0..N-1 by which the columns of length N are indexed, -1 on padding; and ``"cu_seqlens"``
        int32, where each sequence begins in the flattened rows, a row's padding being one of them, and their end.
        ``"tree"``: batch size (), as ``"packed"``, but what sequences begin with alike stands once: the prompt of a group, what
        was said before an episode's branches parted. A row has as many trees as fit. A token that is trained in two sequences stands twice. ``"position_ids"`` count the tokens before one in
        its sequences; ``"sequence_ids"`` name the sequence that a token is trained in, else one of those that it stands in;
        ``"parents"`` int64 (M, L) is the place of the token before it in its row, -1 for a first one; and ``"ends"`` int64
        (M, L) the place behind the last token that follows it.

    An episode that failed (see :func:`~torchrl_chat.training.failures.failed_rows`: no grade came, and
    :class:`~torchrl_chat.RewardTransform` masks it; or it ended with an error) moves nobody: the assistant mask of its sequences
    is false throughout, their reward is 0 and their group -1.

    Raises:
        KeyError: there is no ``"transcript"``.
        ValueError: no episode is finished; the episodes are no multiple of the group size; a sequence is
            longer than ``max_tokens``; ``turns`` without steps; or a setting is unknown.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy, play
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=2)
        >>> training_view(play(env, policy, max_turns=1))["episode"].tolist()
        [0, 1]
    """
    _check(layout, side, multiple_of, max_tokens)
    found = Episodes(data)
    branches = [_sampled(transcript) for transcript in found.transcripts]
    episodes = [i for i, sequences in enumerate(branches) for _ in sequences]
    every = [sequence for sequences in branches for sequence in sequences]
    kept = {key: found.column(key, episodes) for key in found.keys()}
    device, count = found.device, len(every)
    failed = failed_rows(kept, count)
    masks = [torch.zeros_like(s.mask) if bad else s.mask for s, bad in zip(every, failed, strict=True)]
    fields = {"mask": masks, "log_probs": [s.log_probs for s in every]}
    if any(s.versions for s in every):
        fields["versions"] = [s.token_versions for s in every]
    flat = Flat.of([s.tokens for s in every], **fields).to(device)
    if layout == "ragged":
        laid = layouts.ragged(flat, device)
    elif layout == "padded":
        laid = layouts.padded(flat, device, side, pad_id, multiple_of)
    else:
        lay = layouts.tree if layout == "tree" else layouts.packed
        laid = lay(flat, device, pad_id, multiple_of, max_tokens)
    batch = torch.Size([]) if layout in ("packed", "tree") else torch.Size([count])
    view = TensorDict({"episode": torch.tensor(episodes, device=device)}, batch_size=batch, device=device)
    digests = list(map(_digest, branches))
    places = [(number, len(sequences)) for sequences in branches for number in range(len(sequences))]
    view.set("episode_digest", torch.tensor([digests[i] for i in episodes], device=device))
    view.set("episode_sequence", torch.tensor(places, device=device))
    view.set("scored", torch.tensor([found.transcripts[i].scored for i in episodes], device=device))
    groups = _groups(kept, group, episodes, found)
    if groups is not None:
        alone = [-1 if bad else number for number, bad in zip(groups, failed, strict=True)]
        view.set("group", torch.tensor(alone, device=device))
    for key, value in kept.items():
        if key not in _OWN:
            view.set(key, value)
    for key, value in laid.items():
        view.set(key, value)
    if turns:
        rewards = found.turn_rewards()
        sums = torch.stack([reward.sum() for reward in rewards])[episodes].to(device)
        view.set("reward", sums.reshape(kept["reward"].shape))
        view.set("turn_reward", _turns([s.mask for s in every], episodes, rewards).to(device))
    lost = torch.tensor([i for i, bad in enumerate(failed) if bad], dtype=torch.int64, device=device)
    for key in ("reward", "turn_reward") if len(lost) else ():
        if key in view.keys():
            view.set(key, view.get(key).index_fill(0, lost, 0.0))
    return view


def _check(layout: str, side: str, multiple_of: int, max_tokens: int | None) -> None:
    if layout not in ("ragged", "padded", "packed", "tree"):
        raise ValueError(f"layout={layout!r}: expected 'ragged', 'padded', 'packed' or 'tree'.")
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r}: expected 'left' or 'right'.")
    if multiple_of < 1:
        raise ValueError(f"multiple_of={multiple_of}: expected at least 1.")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected at least 1.")


def _sampled(transcript: Transcript) -> list[Branch]:
    """The sequences in which the policy sampled something; the last one where it never did."""
    sequences = transcript.sequences
    return [sequence for sequence in sequences if bool(sequence.mask.any())] or [sequences[-1]]


def _digest(sequences: Sequence[Branch]) -> int:
    """The same for the same tokens, sampled alike; below 2**63."""
    digest = hashlib.blake2b(digest_size=8)
    for sequence in sequences:
        digest.update(len(sequence.tokens).to_bytes(8, "little"))
        for field in (sequence.tokens, sequence.mask, sequence.log_probs):
            digest.update(field.numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def _groups(
    kept: dict[str, Any], group: str | int | None, episodes: list[int], found: Episodes
) -> list[int] | None:
    """The number of each sequence's group, counted in the order in which the groups appear."""
    if isinstance(group, int):
        slots, total = found.slots()  # an unfinished episode keeps its place in its group
        if group < 1 or total % group:
            raise ValueError(
                f"there are {total} episodes, {len(slots)} of them finished: not a multiple of the group size {group}."
            )
        return [slots[episode] // group for episode in episodes]
    if group is None or group not in kept:
        return None
    column = kept[group]
    if isinstance(column, torch.Tensor):
        values: list[Any] = [tuple(row.flatten().tolist()) for row in column]
    else:
        values = [repr(value) for value in columns.read_objects(column, torch.Size([len(episodes)]))]
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def _turns(masks: list[torch.Tensor], episodes: list[int], rewards: list[torch.Tensor]) -> torch.Tensor:
    """The rewards of the turns whose tokens each sequence trains, (N, K)."""
    # A turn is a run of sampled tokens: the environment's words stand between two of them.
    counts = [int((mask & ~torch.nn.functional.pad(mask[:-1], (1, 0))).sum()) for mask in masks]
    found = [0] * len(rewards)
    for episode, count in zip(episodes, counts, strict=True):
        found[episode] += count
    for episode, (count, known) in enumerate(zip(found, rewards, strict=True)):
        if count != len(known):
            raise ValueError(
                f"episode {episode} has {count} turns with sampled tokens and {len(known)} rewards: its first steps are "
                "in an earlier batch, or a turn sampled nothing."
            )
    result = torch.zeros(len(masks), max(counts, default=0))
    for row, (values, count) in enumerate(zip(torch.cat(rewards).split(counts), counts, strict=True)):
        result[row, :count] = values
    return result
