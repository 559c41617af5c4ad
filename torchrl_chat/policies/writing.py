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
        limits: how many tokens the row may sample at most, at least 1; ``None`` where no budget is kept.
    """

    ids: list[torch.Tensor]
    masks: list[torch.Tensor]
    log_probs: list[torch.Tensor]
    limits: list[int] | None

    def most(self, max_new_tokens: int) -> list[int]:
        """How many tokens each row may sample, where a policy cuts every answer at ``max_new_tokens``."""
        if self.limits is None:
            return [max_new_tokens] * len(self.ids)
        return [min(max_new_tokens, limit) for limit in self.limits]


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
        # Where nothing is left, the environment leaves the row as it is, whatever the policy writes.
        None if left is None else left.reshape(len(ids)).clamp(min=1).tolist(),
    )


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
    sampled = [row.to(prompt.device) for row, prompt in zip(responses, prompts.ids, strict=True)]
    scored = [
        None if row is None else row.to(before.device)
        for row, before in zip(scores, prompts.log_probs, strict=True)
    ]

    def column(cls: type, rows: list[dict[str, Any]]) -> Any:
        return container(cls, rows, batch, device)

    fulls = [torch.cat(pair) for pair in zip(prompts.ids, sampled, strict=True)]
    tensordict.set(
        "tokens",
        column(
            Tokens,
            [
                {"prompt": prompt, "response": row, "full": full}
                for prompt, row, full in zip(prompts.ids, sampled, fulls, strict=True)
            ],
        ),
    )
    tensordict.set(
        "log_probs",
        column(
            LogProbs,
            [
                {"prompt": before}
                if row is None
                else {"prompt": before, "response": row, "full": torch.cat((before, row))}
                for before, row in zip(prompts.log_probs, scored, strict=True)
            ],
        ),
    )
    tensordict.set(
        "masks",
        column(
            Masks,
            [
                {
                    "all_assistant_mask": torch.cat((mask, torch.ones_like(row, dtype=torch.bool))),
                    "all_attention_mask": torch.ones_like(full, dtype=torch.bool),
                }
                for mask, row, full in zip(prompts.masks, sampled, fulls, strict=True)
            ],
        ),
    )
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
