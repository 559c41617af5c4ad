"""What every policy reads and writes: the ledger's prompts out of a TensorDict, and its answers into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from torchrl_chat import columns

IN_KEYS = [("tokens", "prompt")]
OUT_KEYS = [
    ("tokens", "response"),
    ("tokens", "full"),
    ("log_probs", "response"),
    ("log_probs", "full"),
    ("masks", "all_assistant_mask"),
    ("masks", "all_attention_mask"),
    ("text", "response"),
    "finish_reason",
]


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch, a value a row, in row-major order; P is the length of a row's prompt.

    Attributes:
        ids: int64 (P,), on the device of the TensorDict's tensors.
        masks: bool (P,), true on what the policy sampled in earlier turns.
        log_probs: float32 (P,), of what it sampled then; 0 elsewhere.
        limits: how many tokens the row may sample at most; ``None`` where no budget is kept.
        asked: the rows that are to be sampled: they are stepped, and may still sample.
    """

    ids: list[torch.Tensor]
    masks: list[torch.Tensor]
    log_probs: list[torch.Tensor]
    limits: list[int] | None
    asked: list[int]


def read_prompts(tensordict: TensorDictBase) -> Prompts:
    """The prompts that an environment wrote, in any of its input modes.

    Args:
        tensordict: an observation with ``("tokens", "prompt")``; mask and log-probs of earlier turns are taken along
            where they are there.

    Raises:
        KeyError: there is no ``("tokens", "prompt")``.
    """
    batch = tensordict.batch_size
    ids = columns.read_field(tensordict.get("tokens", None), "prompt", batch)
    if ids is None:
        raise KeyError(
            "the policy reads ('tokens', 'prompt'), which is not there: give the environment a tokenizer."
        )
    masks = columns.read_field(tensordict.get("masks", None), "all_assistant_mask", batch)
    log_probs = columns.read_field(tensordict.get("log_probs", None), "prompt", batch)
    left = tensordict.get("tokens_left", None)  # a budget's
    return Prompts(
        ids,
        masks or [torch.zeros_like(row, dtype=torch.bool) for row in ids],
        log_probs or [torch.zeros(row.shape, device=row.device) for row in ids],
        None if left is None else left.reshape(len(ids)).tolist(),
        [i for i, wanted in enumerate(asked(tensordict)) if wanted],
    )


def asked(tensordict: TensorDictBase) -> list[bool]:
    """Which rows are to be sampled: torchrl's ``"_step"`` is not false, and a budget's ``"tokens_left"`` not used up."""
    steps, left = columns.stepped(tensordict), tensordict.get("tokens_left", None)
    if left is None:
        return steps
    return [step and count > 0 for step, count in zip(steps, left.reshape(-1).tolist(), strict=True)]


def read_attention(tensordict: TensorDictBase, fulls: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Which of the ids of whole sequences are no padding, bool (T,) a row: ``("masks", "all_attention_mask")``.

    Where that is not there, ids are not guessed at: a row is as long as its sequence.

    Raises:
        ValueError: a row's mask has another length than its sequence.
    """
    found = columns.read_field(tensordict.get("masks", None), "all_attention_mask", tensordict.batch_size)
    rows = []
    for i, (full, mask) in enumerate(zip(fulls, found or [None] * len(fulls), strict=True)):
        if mask is None:
            mask = torch.ones_like(full, dtype=torch.bool)
        if mask.shape != full.shape:
            raise ValueError(
                f"row {i}: ('masks', 'all_attention_mask') is of {len(mask)} tokens and ('tokens', 'full') has {len(full)}: "
                f"they are not of one sequence. Write both, or leave the mask out where there is no padding."
            )
        rows.append(mask.bool())
    return rows


def read_seeds(tensordict: TensorDictBase) -> list[int]:
    """The seed of each row's conversation, from ``"episode_seed"``, int64 of shape (\\*B,) or (\\*B, 1).

    Raises:
        KeyError: there is no such column.
        ValueError: it has another shape, or another dtype.
    """
    column, batch = tensordict.get("episode_seed", None), tensordict.batch_size
    if column is None:
        raise KeyError(
            f"sampling with seeded=True reads 'episode_seed', int64 of shape {tuple(batch)}, which is not there: a "
            f"dataset environment writes it at reset; elsewhere put it into the TensorDict that is given to reset()."
        )
    if not isinstance(column, torch.Tensor) or column.dtype != torch.int64 or column.numel() != batch.numel():
        found = (
            f"{column.dtype} {tuple(column.shape)}" if isinstance(column, torch.Tensor) else type(column).__name__
        )
        raise ValueError(f"'episode_seed' is {found}: expected int64 of shape {tuple(batch)}.")
    return column.flatten().tolist()


def write_answers(
    tensordict: TensorDictBase,
    prompts: Prompts,
    responses: Sequence[torch.Tensor],
    scores: Sequence[torch.Tensor | None],
    texts: Sequence[str],
    finish_reasons: Sequence[str],
) -> TensorDictBase:
    """Write the answers of a batch, ragged over rows (P tokens of prompt, R sampled); :data:`OUT_KEYS` names the keys.

    What is written for a row that was not to be sampled (``prompts.asked``) is not under the assistant mask.

    Args:
        tensordict: the observation that ``prompts`` were read from; it is written to.
        prompts: its prompts.
        responses: the sampled ids, int64 (R,), on any device.
        scores: their log-probs, float32 (R,); ``None`` for a row whose log-probs are not known: its
            ``("log_probs", "response")`` and ``("log_probs", "full")`` are left out.
        texts: the decoded answers.
        finish_reasons: ``"stop"``, ``"length"`` ..., why each answer ended.

    Returns:
        The TensorDict itself.
    """
    batch, device = tensordict.batch_size, tensordict.device
    theirs = set(prompts.asked)
    tokens, log_probs, masks = [], [], []
    for i, (prompt, before, mask) in enumerate(zip(prompts.ids, prompts.log_probs, prompts.masks, strict=True)):
        row, score = responses[i].to(prompt.device), scores[i]
        full, its = torch.cat((prompt, row)), torch.full_like(row, i in theirs, dtype=torch.bool)
        tokens.append({"prompt": prompt, "response": row, "full": full})
        masks.append(
            {
                "all_assistant_mask": torch.cat((mask, its)),
                "all_attention_mask": torch.ones_like(full, dtype=torch.bool),
            }
        )
        log_probs.append({"prompt": before})
        if score is not None:
            score = score.to(before.device)
            log_probs[i] |= {"response": score, "full": torch.cat((before, score))}
    for key, cls, rows in (("tokens", Tokens, tokens), ("log_probs", LogProbs, log_probs), ("masks", Masks, masks)):
        tensordict.set(key, container(cls, rows, batch, device))
    written = columns.texts("response", texts, batch, device)
    if (text := tensordict.get("text", None)) is not None:
        text = columns.shallow(text)
        text.response = written.response
        written = text
    tensordict.set("text", written)
    tensordict.set("finish_reason", columns.objects(finish_reasons, batch, device))
    return tensordict


def container(
    cls: type, rows: Sequence[dict[str, Any]], batch_size: torch.Size, device: torch.device | None
) -> Any:
    """A container of torchrl (``Tokens``, ``Masks`` ...) from the fields of each row, in row-major order."""
    fields = dict.fromkeys(key for row in rows for key in row)
    return columns.wrap(cls, columns.stack_rows([columns.row_td(row, device) for row in rows], batch_size), *fields)
