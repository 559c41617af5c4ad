"""``TransformersPolicy``: a transformers causal language model as a torchrl policy.

torchrl's ``TransformersWrapper`` (0.14.1) zeroes the log-prob of the first sampled token, ignores the
temperature in log-probs, deletes tokens that equal the padding token, and renders prompts on its own.
This policy reads the ledger's prompt ids and hands back exactly the ids that it sampled.

Law of this file: a log-prob is that of the sampled id under the distribution that it was sampled from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch.nn.utils.rnn import pad_sequence
from torchrl.modules.distributions.discrete import LLMMaskedCategorical

from torchrl_chat import columns
from torchrl_chat.conversation import Turn
from torchrl_chat.models.passes import whole_pass
from torchrl_chat.models.proof import prover_of
from torchrl_chat.models.ropes import groups_apart
from torchrl_chat.models.sampling import Told, default_stop_ids, generate
from torchrl_chat.policies.policy import Policy, Prompt
from torchrl_chat.policies.writing import IN_KEYS, OUT_KEYS, read_attention
from torchrl_chat.templates.backends import tokenizer_of
from torchrl_chat.templates.codec import codec_of


class TransformersPolicy(Policy):
    """Samples answers to the prompts of a :class:`~torchrl_chat.envs.ChatEnv`, in any of its input modes.

    Reads ``("tokens", "prompt")``, and the mask and log-probs that come with it. Only rows that are stepped (torchrl's
    ``"_step"`` is not false) and that may still sample (a budget's ``"tokens_left"``) go through the model; the others get
    an answer that enters no ledger. Writes, ragged over rows
    (P tokens of prompt, R sampled):

    - ``("tokens", "response")`` int64 (R,), ``("tokens", "full")`` int64 (P + R,);
    - ``("log_probs", "response")`` float32 (R,), ``("log_probs", "full")`` float32 (P + R,), 0 where not sampled;
    - ``("masks", "all_assistant_mask")``, true on sampled tokens, ``("masks", "all_attention_mask")``, bool (P + R,);
    - ``("text", "response")``, a string a row.

    :meth:`sample` does the same on values, without a TensorDict. It also answers torchrl's losses: :meth:`get_dist` gives the distribution over each token of
    ``("tokens", "full")``, so it is the ``actor_network`` of ``GRPOLoss``.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.

    Keyword Args:
        max_new_tokens: where an answer is cut.
        temperature: of the sampling distribution, and of all log-probs; 0 takes the likeliest token.
        stop_ids: ids that end an answer and belong to it. Defaults to the end-of-turn token of the tokenizer's
            own template, and the tokenizer's and the model's eos; give ``env.template.stop_ids`` where the
            environment uses another template.
        generator: the random state to sample with; torch's global one if ``None``.
        seeded: sample each row from its ``"episode_seed"``, int64 (\\*B,), and the position in its conversation, so that
            what a conversation samples does not depend on the rows beside it: see
            :class:`~torchrl_chat.models.sampling.GumbelNoise`. Rows of one seed and one prompt sample the same.

    Example:
        >>> from torchrl_chat import DatasetChatEnv
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> policy = TransformersPolicy(model, tokenizer, max_new_tokens=64)
        >>> rollout = env.rollout(1, policy)
    """

    tells = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        stop_ids: Iterable[int] | None = None,
        generator: torch.Generator | None = None,
        seeded: bool = False,
    ):
        super().__init__()
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: expected at least 1.")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}: expected 0 (greedy) or more.")
        if seeded and generator is not None:
            raise ValueError("seeded=True samples from each row's 'episode_seed': it takes no generator.")
        self.in_keys = [*IN_KEYS, "episode_seed"] if seeded else list(IN_KEYS)
        self.out_keys = list(OUT_KEYS)
        self.model = model
        self.tokenizer = tokenizer_of(tokenizer)
        self.codec = codec_of(self.tokenizer)
        self.max_new_tokens = max_new_tokens
        # Embeddings are often padded beyond the vocabulary; such an id means nothing and is never sampled.
        self.vocab_size = self.codec.vocab_size
        self.temperature = temperature
        self.generator = generator
        self.seeded = seeded
        eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.stop_ids = default_stop_ids(self.tokenizer, eos) if stop_ids is None else frozenset(stop_ids)

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return next(self.model.parameters()).device

    # ------------------------------------------------------------------ acting
    def _sample(self, prompts: Sequence[Prompt], told: Told | None = None) -> list[Turn]:
        limits = [self.max_new_tokens if prompt.limit is None else prompt.limit for prompt in prompts]
        seeds = [prompt.seed for prompt in prompts if prompt.seed is not None]
        return self._turns(prompts, *self.generate(self._ids(prompts), limits, seeds or None, told))

    def generate(
        self,
        prompts: Sequence[torch.Tensor],
        limits: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        told: Told | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Sample an answer to each prompt: :func:`~torchrl_chat.models.sampling.generate` with this policy's settings.

        Args:
            prompts: int64 ids, each of shape (P,).
            limits: how many tokens each row may sample at most, at least 1, below ``max_new_tokens``.
            seeds: a seed a row.
            told: is told of each token as it is sampled, and may end rows.

        Returns:
            the sampled ids, each int64 (R,), the stop id included, and their log-probs, each float32 (R,).
        """
        return generate(
            self.model,
            [row.to(self.device) for row in prompts],
            stop_ids=self.stop_ids,
            most=[min(limit, self.max_new_tokens) for limit in limits or [self.max_new_tokens] * len(prompts)],
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            seeds=seeds,
            generator=self.generator,
            told=told,
        )

    # ------------------------------------------------------------------ training
    def get_dist(self, tensordict: TensorDictBase, **_: Any) -> LLMMaskedCategorical:
        """The distribution over every token of ``("tokens", "full")``, masked to all sampled tokens.

        Rows are padded on the left to the longest, as torchrl's losses pad theirs: logits of shape (B, T, V),
        position t being the distribution of token t given those before it, and a mask of shape (B, T). Rows that are padded
        already, on either side, keep their layout: ``("masks", "all_attention_mask")`` tells which tokens are padding.

        Raises:
            KeyError: a column is not there.
            ValueError: the attention mask has another length than the sequence.
        """
        return self._dist(tensordict)

    _get_rlhf_dist = get_dist  # GRPOLoss(masking_strategy="rlhf"): every sampled token of the sequence

    def _get_sft_dist(self, tensordict: TensorDictBase, **_: Any) -> LLMMaskedCategorical:
        # GRPOLoss(masking_strategy="sft"): the response of this step only, so that an episode that is stored as
        # one row a turn trains each sampled token once.
        return self._dist(tensordict, response_only=True)

    def _dist(self, tensordict: TensorDictBase, response_only: bool = False) -> LLMMaskedCategorical:
        fulls = self._rows(tensordict, "tokens", "full")
        attention = read_attention(tensordict, fulls)
        logits, attended = token_logits(self.model, fulls, attention, self.vocab_size, self.temperature or 1.0)
        if response_only:
            counts = [len(row) for row in self._rows(tensordict, "tokens", "response")]
            from_end = attended.flip(-1).cumsum(-1).flip(-1)
            mask = attended & (from_end <= torch.tensor(counts, device=self.device)[:, None])
        else:
            rows = self._rows(tensordict, "masks", "all_assistant_mask")
            mask = pad_sequence(rows, batch_first=True, padding_side="left").bool()
        tail = (*tensordict.batch_size, *logits.shape[1:])
        return LLMMaskedCategorical(logits=logits.reshape(tail), mask=mask.reshape(tail[:-1]))

    def _rows(self, tensordict: TensorDictBase, container: str, key: str) -> list[torch.Tensor]:
        rows = columns.read_field(tensordict.get(container, None), key, tensordict.batch_size)
        if rows is None:
            raise KeyError(f"the loss needs ({container!r}, {key!r}), which this policy writes when it acts.")
        return [row.to(self.device) for row in rows]


def token_logits(
    model: Any, fulls: list[torch.Tensor], attention: list[torch.Tensor], vocab_size: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The distribution over every token of whole sequences, given those before it.

    Args:
        model: a transformers causal language model.
        fulls: int64 (T,) a row.
        attention: bool (T,) a row, false where a row has padding of its own, on whichever side.
        vocab_size: logits from this id on are cut off.
        temperature: what logits are divided by.

    Returns:
        logits, float32 (B, T, V), of rows that are padded on the left to the longest, 0 at the first position (the first
        token of a row is never sampled) and at padding; and which tokens are no padding, bool (B, T). Through the model they
        go as its proof allows.
    """
    device = next(model.parameters()).device
    real = [row.to(device).bool() for row in attention]
    rows = [row.to(device)[mask] for row, mask in zip(fulls, real, strict=True)]
    mask = pad_sequence(real, batch_first=True, padding_side="left")
    prover, lengths = prover_of(model), [len(row) for row in rows]
    prover.check_length(max(lengths, default=0))
    together = prover.scoring()
    groups, change = groups_apart(model, lengths, [0] * len(rows), together)
    places = mask.cumsum(-1) - 1
    source, parts, taken = torch.zeros_like(places), [], 0
    for group in groups:
        some = [rows[i] for i in group]
        found = whole_pass(model, some, padded=together == "padded").logits[..., :vocab_size]
        if change is not None and len(some[0]) > change.length:  # their beginnings were embedded otherwise
            begun = torch.stack([row[: change.length] for row in some])
            begun = model(input_ids=begun, use_cache=False).logits[..., :vocab_size]
            found = torch.cat((begun, found[:, change.length :]), 1)
        parts.append((found.float() / temperature).flatten(0, 1))
        # Logits at position t predict token t + 1.
        first = taken + found.shape[1] * torch.arange(len(group), device=device)
        source[group] = first[:, None] + (places[group] - 1).clamp(min=0)
        taken += len(parts[-1])
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    return flat[source].masked_fill_(~(mask & (places > 0))[..., None], 0.0), mask
