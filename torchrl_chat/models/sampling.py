"""Batched sampling from a transformers model: exact ids, and log-probs under the distribution they were sampled from.

The random numbers of seeded sampling come from a counter, not from a state: each is a hash of (the row's seed, the
number of tokens in front of the sampled one, the candidate's id). What a row samples then depends neither on the rows
beside it nor on the order of calls (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from torchrl_chat.models.mode import evaluating
from torchrl_chat.models.passes import Decoding, Together
from torchrl_chat.models.proof import Prover, prover_of
from torchrl_chat.models.ropes import groups_apart
from torchrl_chat.templates import ChatTemplate, ChatTemplateError

Told = Callable[[Sequence[Sequence[int]]], Collection[int]]
"""Takes what each row has sampled so far, behind each token, and returns the rows that are to sample no more. The lists grow: who keeps
one copies it."""


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
    told: Told | None = None,
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
        told: is told of each token as it is sampled, and may end rows.

    Returns:
        the sampled ids, each int64 (R,), the stop id included, and their log-probs, each float32 (R,); NaN where the model's
        logits were not finite, which an environment refuses for that row.

    Raises:
        ModelError: the model does not compute what it computes for one row in any way that is known here; or its rope is
            another for each length, and a row may grow beyond the first.

    The model is in ``eval()`` meanwhile. Which rows go through it together, and whether it keeps a cache, is what
    :mod:`~torchrl_chat.models.proof` found right for it.

    Example:
        >>> import torch
        >>> from torchrl_chat.tiny import tiny_model
        >>> ids, log_probs = generate(tiny_model(64), [torch.tensor([5, 6])], stop_ids={2}, most=[8])
    """
    with evaluating(model):
        # What is no model of transformers, a function say, is asked as one that takes rows of any length together.
        provable = hasattr(model, "get_input_embeddings")
        together, cached = _together(prover_of(model), prompts, most) if provable else ("padded", True)
        ids: list[torch.Tensor] = [_NOTHING] * len(prompts)
        scores: list[torch.Tensor] = [_NOTHING] * len(prompts)
        lengths = [len(prompt) for prompt in prompts]
        so_far: list[list[int]] = [[] for _ in prompts]
        groups, change = groups_apart(model, lengths, most, together)
        for group in groups:
            rows = [prompts[i] for i in group]
            limits = [most[i] for i in group]
            noise = None
            if seeds is not None and temperature > 0:
                before = torch.tensor([lengths[i] for i in group])
                noise = GumbelNoise([seeds[i] for i in group], before, max(limits), rows[0].device)
            renewed = change.length if change is not None and len(group) == 1 else None
            run = Decoding(model, rows, padded=together == "padded", cached=cached, renewed=renewed)
            tell = None if told is None else functools.partial(_tell, told, so_far, group)
            sampled = _sampled(run, stop_ids, limits, vocab_size, temperature, noise, generator, tell)
            for i, row, row_scores in zip(group, *sampled, strict=True):
                ids[i], scores[i] = row, row_scores
    return ids, scores


_NOTHING = torch.empty(0)


def _tell(
    told: Told, so_far: Sequence[list[int]], group: Sequence[int], tokens: Sequence[int | None]
) -> list[bool]:
    """Tell of one token of each row of a group that still samples; which of its rows are to sample no more."""
    for i, token in zip(group, tokens, strict=True):
        if token is not None:
            so_far[i].append(token)
    ended = set(told(so_far))
    return [i in ended for i in group]


def _together(prover: Prover, prompts: Sequence[torch.Tensor], most: Sequence[int]) -> tuple[Together, bool]:
    prover.check_length(max((len(p) + m for p, m in zip(prompts, most, strict=True)), default=0))
    return prover.sampling()


def _sampled(
    run: Decoding,
    stop_ids: Collection[int],
    most: Sequence[int],
    vocab_size: int | None,
    temperature: float,
    noise: GumbelNoise | None,
    generator: torch.Generator | None,
    tell: Callable[[Sequence[int | None]], list[bool]] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Answers of rows that go through the model together, and their log-probs."""
    device = run.logits.device
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    limits = torch.tensor(list(most), device=device)
    alive, taken = torch.ones_like(limits, dtype=torch.bool), torch.zeros_like(limits)
    sampled: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    while True:
        log_probs = scaled_log_probs(run.logits[:, :vocab_size], temperature)
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
        if tell is not None:
            went = zip(token.tolist(), alive.tolist(), strict=True)
            ended = tell([each if goes else None for each, goes in went])
            if any(ended):
                alive = alive & ~torch.tensor(ended, device=device)
        alive = alive & ~torch.isin(token, stops) & (taken < limits)
        if not alive.any():
            break
        run.push(token)
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
