"""Batched sampling from a transformers model: exact ids, and log-probs under the distribution they were sampled from.

The random numbers of seeded sampling come from a counter, not from a state: each is a hash of (the row's seed, the
number of tokens in front of the sampled one, the candidate's id). What a row samples then depends neither on the rows
beside it nor on the order of calls (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from torchrl_chat.templates import ChatTemplate, ChatTemplateError


def default_stop_ids(tokenizer: Any, eos: int | Sequence[int] | None = None) -> frozenset[int]:
    """The ids that end an answer: of the tokenizer's own template, and the tokenizer's and the model's eos.

    Args:
        tokenizer: a Hugging Face tokenizer.
        eos: ``eos_token_id`` of the model's generation config, if it has one.

    Raises:
        ValueError: none of them names such an id.
    """
    stops = {tokenizer.eos_token_id} - {None}
    try:
        stops |= ChatTemplate(tokenizer).stop_ids
    except ChatTemplateError:
        pass  # no template: the eos tokens are all there is to know
    stops |= {eos} - {None} if eos is None or isinstance(eos, int) else set(eos)
    if not stops:
        raise ValueError(
            "neither the tokenizer, its chat template nor the model names a token that ends an answer."
        )
    return frozenset(stops)


def left_padded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids, int64 (T,) each, as one batch (B, T) padded on the left, and its attention mask, bool (B, T)."""
    ids = pad_sequence(list(rows), batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return ids, torch.arange(ids.shape[1], device=ids.device) >= (ids.shape[1] - lengths)[:, None]


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[torch.Tensor],
    *,
    stop_ids: Collection[int],
    most: Sequence[int],
    vocab_size: int | None = None,
    temperature: float = 1.0,
    seeds: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sample an answer to each prompt.

    Args:
        model: a transformers causal language model.
        prompts: int64 ids, each of shape (P,), on the model's device.
        stop_ids: ids that end an answer, and belong to it.
        most: how many tokens each row may sample.
        vocab_size: only ids below it are sampled (embeddings are often padded beyond the vocabulary).
        temperature: of the sampling distribution; 0 takes the likeliest token.
        seeds: a seed a row, for sampling that does not depend on the other rows.
        generator: the random state where there are no seeds; torch's global one if ``None``.

    Returns:
        the sampled ids, each int64 (R,), the stop id included, and their log-probs, each float32 (R,); NaN where the model's
        logits were not finite, which an environment refuses for that row.

    Example:
        >>> ids, log_probs = generate(model, [torch.tensor([5, 6])], stop_ids={2}, most=[8])
    """
    ids, attention = left_padded(prompts)
    device = ids.device
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    limits = torch.tensor(list(most), device=device)
    position = attention.sum(-1)
    noise = None if seeds is None or temperature == 0 else GumbelNoise(seeds, position, max(most), device)
    output = model(
        input_ids=ids,
        attention_mask=attention.long(),
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    sampled: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    taken = torch.zeros_like(position)
    while True:
        log_probs = scaled_log_probs(output.logits[:, -1, :vocab_size], temperature)
        if temperature == 0:
            token = log_probs.argmax(-1)
        elif noise is not None:
            token = (log_probs + noise.at(len(sampled), log_probs.shape[-1])).argmax(-1)
        else:
            # A row that the model has no number for would fail all of them; its log-probs tell of it afterwards.
            chances = log_probs.exp().nan_to_num(1.0)
            token = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
        sampled.append(token)
        scores.append(log_probs.gather(-1, token[:, None]).squeeze(-1))
        taken += alive
        alive = alive & ~torch.isin(token, stops) & (taken < limits)
        if not alive.any():
            break
        attention = torch.cat((attention, torch.ones_like(alive)[:, None]), -1)
        output = model(
            input_ids=token[:, None],
            attention_mask=attention.long(),
            position_ids=position[:, None],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        position = position + 1
    rows, row_scores, counts = torch.stack(sampled, 1), torch.stack(scores, 1), taken.tolist()
    return (
        [row[:count].clone() for row, count in zip(rows, counts, strict=True)],
        [row[:count].clone() for row, count in zip(row_scores, counts, strict=True)],
    )


def scaled_log_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs of the sampling distribution, in float32; greedy decoding reports those at temperature 1."""
    return (logits.float() / (temperature or 1.0)).log_softmax(-1)


class GumbelNoise:
    """Standard Gumbel noise for each row, sampled position and candidate, from the row's seed alone.

    The argmax of log-probs plus Gumbel noise is a sample of the distribution (Gumbel 1954; Maddison et al. 2014). Log-probs
    that differ by up to d (other padding, other kernels) give another token with a probability of at most 2 d, however
    large the vocabulary: with d about 1e-6 in float32, two tokens in a million; with bfloat16, one in a hundred or so.

    Args:
        seeds: a seed a row; any integers.
        lengths: the tokens in front of the first sampled one, int64 (B,).
        count: how many positions are sampled at most.
        device: where the noise is wanted.
    """

    def __init__(self, seeds: Sequence[int], lengths: torch.Tensor, count: int, device: torch.device):
        positions = lengths.cpu().numpy()[:, None] + np.arange(count)[None]
        rows = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)[:, None]
        keys = _mixed64(_mixed64(rows) + positions.astype(np.uint64))
        self._keys = torch.from_numpy(keys.view(np.int32).reshape(*keys.shape, 2)).to(device)

    def at(self, step: int, vocab_size: int) -> torch.Tensor:
        """The noise of the ``step``-th sampled token, float32 (B, vocab_size)."""
        keys = self._keys[:, step]
        candidates = torch.arange(vocab_size, dtype=torch.int32, device=keys.device)
        # On the CPU in pieces that stay in the cache, and too small for torch to wake its threads for each.
        piece = _PIECE if keys.device.type == "cpu" else vocab_size * len(keys)
        parts, rows = candidates.split(piece), keys.split(max(1, piece // vocab_size))
        uniform = torch.cat([torch.cat([_uniform(part, row) for part in parts], -1) for row in rows])
        return uniform.neg_().log1p_().neg_().log_().neg_()


_PIECE = 1 << 14


def _uniform(candidates: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), float32 (B, candidates), from the rows' keys, int32 (B, 2)."""
    bits = _mixed32(_mixed32(candidates + keys[:, 0, None]) ^ keys[:, 1, None])
    # Unsigned 32 bits as floats: the upper tail of the noise, which decides, comes from the small values, and floats
    # are dense there.
    unsigned = (bits >> 1 & 0x7FFFFFFF).float() * 2 + (bits & 1).float()
    return ((unsigned + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def stream_seed(seed: int, position: int) -> int:
    """A seed below 2**63 for the random numbers of one turn, from the conversation's and the length of its prompt."""
    key = _mixed64(_mixed64(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)) + np.uint64(position))
    return int(key[0]) >> 1


def _mixed64(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele et al. 2014): a bijection of 64 bits, every input bit felt by all."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mixed32(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32 bits of the same kind (Wellons' ``lowbias32``), on int32, which wraps around."""
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)
