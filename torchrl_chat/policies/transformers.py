"""``TransformersPolicy``: a transformers causal language model as a torchrl policy.

torchrl's ``TransformersWrapper`` (0.14.1) zeroes the log-prob of the first sampled token, ignores the
temperature in log-probs, deletes tokens that equal the padding token, and renders prompts on its own.
This policy reads the ledger's prompt ids and hands back exactly the ids that it sampled.

Law of this file: a log-prob is that of the sampled id under the distribution that it was sampled from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch.nn.utils.rnn import pad_sequence
from torchrl.modules.distributions.discrete import LLMMaskedCategorical
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from torchrl_chat import columns
from torchrl_chat.templates.backends import tokenizer_of
from torchrl_chat.templates.codec import codec_of


class TransformersPolicy(TensorDictModuleBase):
    """Samples answers to the prompts of a :class:`~torchrl_chat.envs.ChatEnv`, in any of its input modes.

    Reads ``("tokens", "prompt")``, and the mask and log-probs that come with it. Writes, ragged over rows
    (P tokens of prompt, R sampled):

    - ``("tokens", "response")`` int64 (R,), ``("tokens", "full")`` int64 (P + R,);
    - ``("log_probs", "response")`` float32 (R,), ``("log_probs", "full")`` float32 (P + R,), 0 where not sampled;
    - ``("masks", "all_assistant_mask")``, true on sampled tokens, ``("masks", "all_attention_mask")``, bool (P + R,);
    - ``("text", "response")``, a string a row.

    It also answers torchrl's losses: :meth:`get_dist` gives the distribution over each token of
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

    Example:
        >>> policy = TransformersPolicy(model, tokenizer, max_new_tokens=64)
        >>> rollout = env.rollout(1, policy)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        stop_ids: Iterable[int] | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: expected at least 1.")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}: expected 0 (greedy) or more.")
        self.in_keys = [("tokens", "prompt")]
        self.out_keys = [
            ("tokens", "response"),
            ("tokens", "full"),
            ("log_probs", "response"),
            ("log_probs", "full"),
            ("masks", "all_assistant_mask"),
            ("masks", "all_attention_mask"),
            ("text", "response"),
            "finish_reason",
        ]
        self.model = model
        self.tokenizer = tokenizer_of(tokenizer)
        self.codec = codec_of(self.tokenizer)
        self.max_new_tokens = max_new_tokens
        # Embeddings are often padded beyond the vocabulary; such an id means nothing and is never sampled.
        self.vocab_size = self.codec.vocab_size
        self.temperature = temperature
        self.generator = generator
        self.stop_ids = frozenset(_default_stops(model, tokenizer) if stop_ids is None else stop_ids)

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return next(self.model.parameters()).device

    # ------------------------------------------------------------------ acting
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Sample an answer to every row's prompt."""
        batch = tensordict.batch_size
        prompts = columns.read_field(tensordict.get("tokens", None), "prompt", batch)
        if prompts is None:
            raise KeyError(
                "the policy reads ('tokens', 'prompt'), which is not there: give the environment a tokenizer."
            )
        home = prompts[0].device
        left = tensordict.get("tokens_left", None)  # a budget's
        limits = None if left is None else left.reshape(len(prompts)).clamp(min=1).tolist()
        responses, scores = self.generate([prompt.to(self.device) for prompt in prompts], limits)
        responses = [row.to(home) for row in responses]
        scores = [row.to(home) for row in scores]
        known = columns.read_field(tensordict.get("masks", None), "all_assistant_mask", batch)
        carried = columns.read_field(tensordict.get("log_probs", None), "prompt", batch)
        masks = known or [torch.zeros_like(prompt, dtype=torch.bool) for prompt in prompts]
        before = carried or [torch.zeros(prompt.shape, device=home) for prompt in prompts]
        fulls = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]

        def container(cls: type, **fields: list[torch.Tensor]) -> Any:
            device = tensordict.device
            rows = [
                columns.row_td(dict(zip(fields, values, strict=True)), device)
                for values in zip(*fields.values(), strict=True)
            ]
            return columns.wrap(cls, columns.stack_rows(rows, batch), *fields)

        tensordict.set("tokens", container(Tokens, prompt=prompts, response=responses, full=fulls))
        tensordict.set(
            "log_probs",
            container(
                LogProbs,
                prompt=before,
                response=scores,
                full=[torch.cat(pair) for pair in zip(before, scores, strict=True)],
            ),
        )
        tensordict.set(
            "masks",
            container(
                Masks,
                all_assistant_mask=[
                    torch.cat((mask, torch.ones_like(row, dtype=torch.bool)))
                    for mask, row in zip(masks, responses, strict=True)
                ],
                all_attention_mask=[torch.ones_like(full, dtype=torch.bool) for full in fulls],
            ),
        )
        stopped = ["stop" if int(row[-1]) in self.stop_ids else "length" for row in responses]
        tensordict.set("finish_reason", columns.objects(stopped, batch, tensordict.device))
        texts = self.codec.decode([row.tolist() for row in responses])
        written = columns.texts("response", texts, batch, tensordict.device)
        if (text := tensordict.get("text", None)) is not None:
            text = columns.shallow(text)
            text.response = written.response
            written = text
        tensordict.set("text", written)
        return tensordict

    def generate(
        self, prompts: list[torch.Tensor], limits: list[int] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Sample an answer to each prompt.

        Args:
            prompts: int64 ids, each of shape (P,), on the model's device.
            limits: how many tokens each row may sample at most, below ``max_new_tokens``.

        Returns:
            the sampled ids, each int64 (R,), the stop id included, and their log-probs, each float32 (R,).
        """
        stops = torch.tensor(sorted(self.stop_ids), dtype=torch.int64, device=self.device)
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        attention = torch.arange(ids.shape[1], device=self.device) >= (ids.shape[1] - lengths)[:, None]
        position = lengths
        output = self.model(
            input_ids=ids,
            attention_mask=attention.long(),
            position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        sampled, scores = [], []
        alive = torch.ones(len(prompts), dtype=torch.bool, device=self.device)
        taken = torch.zeros_like(lengths)
        most = torch.full_like(lengths, self.max_new_tokens)
        if limits is not None:
            most = torch.minimum(most, torch.tensor(limits, device=self.device))
        while True:
            log_probs = self._log_probs(output.logits[:, -1, : self.vocab_size])
            token = self._sample(log_probs)
            sampled.append(token)
            scores.append(log_probs.gather(-1, token[:, None]).squeeze(-1))
            taken += alive
            alive = alive & ~torch.isin(token, stops) & (taken < most)
            if not alive.any():
                break
            attention = torch.cat((attention, torch.ones_like(alive)[:, None]), -1)
            output = self.model(
                input_ids=token[:, None],
                attention_mask=attention.long(),
                position_ids=position[:, None],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            position = position + 1
        counts = taken.tolist()
        rows, row_scores = torch.stack(sampled, 1), torch.stack(scores, 1)
        return (
            [row[:count].clone() for row, count in zip(rows, counts, strict=True)],
            [row[:count].clone() for row, count in zip(row_scores, counts, strict=True)],
        )

    def _log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probs of the sampling distribution, in float32; greedy decoding reports those at temperature 1."""
        return (logits.float() / (self.temperature or 1.0)).log_softmax(-1)

    def _sample(self, log_probs: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return log_probs.argmax(-1)
        return torch.multinomial(log_probs.exp(), 1, generator=self.generator).squeeze(-1)

    # ------------------------------------------------------------------ training
    def get_dist(self, tensordict: TensorDictBase, **_: Any) -> LLMMaskedCategorical:
        """The distribution over every token of ``("tokens", "full")``, masked to all sampled tokens.

        Rows are padded on the left to the longest, as torchrl's losses pad theirs: logits of shape (B, T, V),
        position t being the distribution of token t given those before it, and a mask of shape (B, T).
        """
        return self._dist(tensordict, columns_key="all_assistant_mask")

    _get_rlhf_dist = get_dist  # GRPOLoss(masking_strategy="rlhf"): every sampled token of the sequence

    def _get_sft_dist(self, tensordict: TensorDictBase, **_: Any) -> LLMMaskedCategorical:
        # GRPOLoss(masking_strategy="sft"): the response of this step only, so that an episode that is stored as
        # one row a turn trains each sampled token once.
        return self._dist(tensordict, columns_key=None)

    def _dist(self, tensordict: TensorDictBase, columns_key: str | None) -> LLMMaskedCategorical:
        batch = tensordict.batch_size
        fulls = self._rows(tensordict, "tokens", "full")
        ids = pad_sequence(fulls, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(full) for full in fulls], device=self.device)
        places = torch.arange(ids.shape[1], device=self.device)
        attention = places >= (ids.shape[1] - lengths)[:, None]
        logits = self.model(
            input_ids=ids,
            attention_mask=attention.long(),
            position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        ).logits[..., : self.vocab_size].float() / (self.temperature or 1.0)
        # Logits at position t predict token t + 1; the first token of a row is never sampled.
        logits = torch.cat((torch.zeros_like(logits[:, :1]), logits[:, :-1]), 1)
        if columns_key is None:
            counts = [len(row) for row in self._rows(tensordict, "tokens", "response")]
            responses = torch.tensor(counts, device=self.device)
            mask = places >= (ids.shape[1] - responses)[:, None]
        else:
            rows = self._rows(tensordict, "masks", columns_key)
            mask = pad_sequence(rows, batch_first=True, padding_side="left").bool()
        tail = (*batch, *logits.shape[1:])
        return LLMMaskedCategorical(logits=logits.reshape(tail), mask=mask.reshape(tail[:-1]))

    def _rows(self, tensordict: TensorDictBase, container: str, key: str) -> list[torch.Tensor]:
        rows = columns.read_field(tensordict.get(container, None), key, tensordict.batch_size)
        if rows is None:
            raise KeyError(f"the loss needs ({container!r}, {key!r}), which this policy writes when it acts.")
        return [row.to(self.device) for row in rows]


def _default_stops(model: Any, tokenizer: Any) -> set[int]:
    from torchrl_chat.templates import ChatTemplate, ChatTemplateError

    stops = {tokenizer.eos_token_id} - {None}
    try:
        stops |= ChatTemplate(tokenizer).stop_ids
    except ChatTemplateError:
        pass  # no template: the eos tokens are all there is to know
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops |= set(eos) if isinstance(eos, (list, tuple)) else {eos} - {None}
    if not stops:
        raise ValueError(
            "neither the tokenizer, its chat template nor the model names a token that ends an answer."
        )
    return stops
