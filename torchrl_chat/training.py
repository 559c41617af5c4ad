"""The training view: episodes as the token sequences that are trained on.

An episode is one sequence, unless its chat template rewrote the past and began branches (history policy
``"template"``): then it is several, and each sampled token is under the mask of exactly one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from torchrl_chat import columns

_SEQUENCES = {"tokens", "masks", "log_probs", "text", "history", "transcript", "next"}


def training_view(tensordict: TensorDictBase) -> TensorDict:
    """Every sequence of every episode, as one row each.

    Args:
        tensordict: rows that end an episode (what ``step`` wrote under ``"next"``, or that after
            ``step_mdp``), with a ``"transcript"`` each; of any batch size, B rows in all.

    Returns:
        A TensorDict of batch size ``(N,)``, ``N >= B``, the sequences of an episode in the order in which they
        were sampled:

        - ``("tokens", "full")``: int64 (T,), ragged;
        - ``("masks", "all_assistant_mask")`` and ``("masks", "all_attention_mask")``: bool (T,);
        - ``("log_probs", "full")``: float32 (T,), 0 where the policy did not sample or reported none;
        - ``"episode"``: int64 (), the row that the sequence comes from;
        - and every other column of the row (rewards, references), repeated for its sequences.

    Where a row's grade failed and :class:`~torchrl_chat.RewardTransform` masks it (``"graded"`` is false, with a
    reason under ``"grade_failure"``), the assistant mask of its sequences is false throughout.

    Raises:
        KeyError: there is no ``"transcript"``.

    Example:
        >>> env = ChatEnv(tokenizer=tokenizer, input_mode="tokens")
        >>> td = env.rollout(2, policy)[..., -1]["next"]
        >>> training_view(td)["episode"].tolist()
        [0]
    """
    column = tensordict.get("transcript", None)
    if column is None:
        raise KeyError(
            f"training_view needs 'transcript', the ledger; got the keys {sorted(map(str, tensordict.keys()))}."
        )
    flat = tensordict.reshape(-1) if tensordict.batch_dims != 1 else tensordict
    transcripts = columns.read_objects(flat.get("transcript"), flat.batch_size)
    rows = [(i, sequence) for i, transcript in enumerate(transcripts) for sequence in transcript.sequences]
    ungraded = _ungraded(flat)
    batch, device = torch.Size([len(rows)]), tensordict.device
    episodes = torch.tensor([i for i, _ in rows], dtype=torch.int64, device=device)
    view = TensorDict({"episode": episodes}, batch_size=batch, device=device)

    def column_of(container: type, **fields: list[torch.Tensor]) -> Any:
        moved = {key: _on(values, device) for key, values in fields.items()}
        tds = [
            columns.row_td(dict(zip(moved, row, strict=True)), device) for row in zip(*moved.values(), strict=True)
        ]
        return columns.wrap(container, columns.stack_rows(tds, batch), *moved)

    masks = [torch.zeros_like(sequence.mask) if i in ungraded else sequence.mask for i, sequence in rows]
    view["tokens"] = column_of(Tokens, full=[sequence.tokens for _, sequence in rows])
    view["masks"] = column_of(Masks, all_assistant_mask=masks, all_attention_mask=list(map(torch.ones_like, masks)))
    view["log_probs"] = column_of(LogProbs, full=[sequence.log_probs for _, sequence in rows])
    for key in flat.keys():
        if key not in _SEQUENCES:
            view[key] = flat.get(key)[episodes]
    return view


def _ungraded(flat: TensorDictBase) -> set[int]:
    """The rows that are left out of training because their grade failed."""
    graded, reasons = flat.get("graded", None), flat.get("grade_failure", None)
    if graded is None or reasons is None:
        return set()
    failed = columns.read_objects(reasons, flat.batch_size)
    return {i for i, fine in enumerate(graded.flatten().tolist()) if not fine and failed[i]}


def _on(values: list[torch.Tensor], device: torch.device | None) -> list[torch.Tensor]:
    return values if device is None else [value.to(device) for value in values]
