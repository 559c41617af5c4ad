"""torchrl's own LLM wrappers, generating from the ledger's ids: for code that is written for those wrappers.

The defects named in the docstrings are those of torchrl 0.14.1. Where the parent is right, it does the work.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch.nn.utils.rnn import pad_sequence
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from torchrl.modules.llm.policies import LogProbs
from transformers import GenerationConfig

from torchrl_chat.policies.transformers import token_logits
from torchrl_chat.policies.vllm import check_log_probs_mode, sampled, sampling_params, vocabulary_bias
from torchrl_chat.policies.wrapping import LedgerWrapper, Sampled
from torchrl_chat.policies.writing import container, read_attention
from torchrl_chat.sampling import left_padded


class ExactTransformersWrapper(LedgerWrapper, TransformersWrapper):
    """torchrl's ``TransformersWrapper`` on the ledger's ids, for ``generate`` true and false and all input modes.

    What of torchrl 0.14.1 it mends, and what by:

    - the first sampled token's log-prob is 0; log-probs ignore the temperature: log-probs are those of the scores that
      ``model.generate`` sampled from, and ``generate=False`` and ``get_dist`` divide by the same temperature;
    - no ``("log_probs", "full")`` from ``generate=True``: it is written, 0 where not sampled, earlier turns included;
    - rows that are padded with ``<none>`` messages, or have unequal numbers of messages or tokens, lose their answers or
      crash, ``prefer_tokens`` or not: messages are not read;
    - tokens equal to the padding or eos token are deleted: an answer ends at its first stop id, and sequences have no
      padding;
    - ``generate=False`` tokenizes histories again, to other ids: it scores ``("tokens", "full")`` in every mode;
    - torchrl's own chat templates in place of the tokenizer's: none is used here.

    Refused, since they cannot be mended here: ``pad_output``, packing (``pad_model_input=False``, not causal), ``num_samples``
    and ``batching``, sampling that the loss cannot see (``top_k``, ``top_p``, penalties, beams ...), and settings that are
    not known. The model's own generation config is not read, but for its ``eos_token_id``: whatever it asks for is
    switched off.

    Rows that are not stepped, or may sample nothing more, are left out, as by :class:`~torchrl_chat.TransformersPolicy`;
    and where there is a ``("masks", "all_attention_mask")``, it tells where sequences are padded.

    Args:
        model: a transformers causal language model.

    Keyword Args:
        options: as of ``TransformersWrapper``; ``tokenizer`` is needed. ``generate_kwargs`` takes ``max_new_tokens`` (20, or
            what a budget leaves), ``do_sample`` (false, but with a ``temperature``), ``temperature`` (1), ``eos_token_id``
            (by default what ends an answer for :class:`~torchrl_chat.TransformersPolicy`).

    Raises:
        ValueError: an option is refused.

    Example:
        >>> policy = ExactTransformersWrapper(
        ...     model, tokenizer=tokenizer, generate_kwargs={"max_new_tokens": 64, "do_sample": True}
        ... )
        >>> loss = GRPOLoss(policy.get_new_version(generate=False), masking_strategy="sft")
    """

    def __init__(self, model: Any, **options: Any):
        super().__init__(model, **options)
        given = self._options["generate_kwargs"]
        greedy = not given.get("do_sample")
        beyond = list(range(self.codec.vocab_size, self.model.config.vocab_size))
        self.generate_kwargs = {
            "max_new_tokens": given.get("max_tokens", given.get("max_new_tokens")),
            "do_sample": not greedy,
            **(
                {} if greedy else {"temperature": self.temperature, "top_k": 0}
            ),  # top_k is 50 where nothing is said
            "eos_token_id": sorted(self.stop_ids),
            "pad_token_id": min(self.stop_ids),  # what stands behind an answer is cut off
            "suppress_tokens": beyond or None,
            "output_scores": True,
            "return_dict_in_generate": True,
        }

    def _model_eos(self) -> Any:
        return getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)

    def _sampled(self, prompts: list[torch.Tensor], most: int | None) -> Sampled:
        device = next(self.model.parameters()).device
        ids, attention = left_padded([prompt.to(device) for prompt in prompts])
        lengths = [length for length in (most, self.generate_kwargs["max_new_tokens"]) if length is not None]
        settings = _Settings(**{**self.generate_kwargs, "max_new_tokens": min(lengths, default=20)})
        output = self.model.generate(input_ids=ids, attention_mask=attention.long(), generation_config=settings)
        answers = output["sequences"][:, ids.shape[1] :]
        scores = torch.stack([step.float().log_softmax(-1) for step in output["scores"]], 1)
        scores = scores.gather(-1, answers[..., None]).squeeze(-1).cpu()
        rows = []
        for row in answers.tolist():
            end = next((i for i, token in enumerate(row) if token in self.stop_ids), len(row) - 1)
            rows.append(row[: end + 1])
        return rows, [row_scores[: len(row)] for row, row_scores in zip(rows, scores, strict=True)]

    def _scored(self, tensordict: TensorDictBase, logits_only: bool) -> TensorDictBase:
        fulls = self._whole(tensordict)
        attention = read_attention(tensordict, fulls)
        logits, attended = token_logits(self.model, fulls, attention, self.codec.vocab_size, self.temperature)

        def unpadded(rows: torch.Tensor) -> list[torch.Tensor]:
            return [row[len(row) - len(full) :].to(full.device) for row, full in zip(rows, fulls, strict=True)]

        batch, device = tensordict.batch_size, tensordict.device
        masks = self._masks(tensordict, attention)
        written = TensorDict({self.masks_key: masks}, batch_size=batch, device=device)
        if logits_only or "logits" in self.out_keys:  # a distribution, which torchrl pads anew, row by row
            written = written.to_lazystack(0)
            for row, values in zip(written.tensordicts, unpadded(logits), strict=True):
                row.set("logits", values)
            return written
        ids = pad_sequence([row.to(logits.device) for row in fulls], batch_first=True, padding_side="left")
        scores = logits.log_softmax(-1).gather(-1, ids.masked_fill(~attended, 0)[..., None]).squeeze(-1)
        # As torchrl has it: 0 for the first token of a row, in front of which there is nothing.
        scores = scores.masked_fill(~(attended & attended.roll(1, -1)), 0.0)
        scores[:, 0] = 0.0
        rows = [{"full": row} for row in unpadded(scores)]
        return written.set(self.log_probs_key, container(LogProbs, rows, batch, device))

    def _get_dist_with_assistant_mask(self, tensordict: TensorDictBase, *args: Any, **options: Any) -> Any:
        # torchrl writes what it got into the TensorDict, which fails for ragged columns of a dense one.
        rows = tensordict.select("tokens", "masks", strict=False).to_lazystack(0)
        return super()._get_dist_with_assistant_mask(rows, *args, **options)


class _Settings(GenerationConfig):
    """The settings of one call. ``generate`` fills in what is not given from the model's own, which is not meant here."""

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As ``GenerationConfig.update``, but for the model's settings: those alone come with custom entries."""
        if allow_custom_entries:
            return {}
        unused: dict[str, Any] = super().update(defaults_only=defaults_only, **kwargs)
        return unused


class ExactVLLMWrapper(LedgerWrapper, vLLMWrapper):
    """torchrl's ``vLLMWrapper`` on the ledger's ids, for ``generate`` true and false and all input modes.

    What of torchrl 0.14.1 it mends, and what by:

    - the text of the stop token stays in ``("history", "response")`` and is rendered again; a cut answer is called
      complete: the content ends before the stop id, and ``is_complete`` says whether there was one;
    - text mode has neither ids nor masks, and log-probs of the response only: all are written in every mode;
    - ragged prompts crash, with ``prefer_tokens`` too: rows are handed over one by one, unpadded;
    - tokens equal to the padding token are deleted from what ``generate=False`` scores: nothing is deleted;
    - in history mode the prompt is rendered anew, with torchrl's chat templates: messages are not read;
    - the log-probs of prompts, which switch vLLM's prefix cache off, are not asked for when generating:
      ``("log_probs", "full")`` has the sampled tokens', earlier turns included, and 0 elsewhere.

    Refused: ``pad_output`` (misaligned), ``num_samples`` and ``batching``, ``top_k``, ``top_p``, penalties and settings that are
    not known; an engine whose ``logprobs_mode`` is not that of the sampling; and ``generate=False`` at a temperature other
    than 1, which vLLM does not know for prompts.

    Rows that are not stepped, or may sample nothing more, are left out, as by :class:`~torchrl_chat.VLLMPolicy`; and what
    ``("masks", "all_attention_mask")`` calls padding is not scored.

    Args:
        model: a ``vllm.LLM``, such as ``VLLMPolicy.from_pretrained(...).engine``, or torchrl's ``AsyncVLLM`` (at temperature
            1 with a tokenizer; its engine's settings cannot be seen from here).

    Keyword Args:
        options: as of ``vLLMWrapper``; ``generate_kwargs`` takes ``max_new_tokens``, ``temperature``,
            ``eos_token_id``.

    Example:
        >>> policy = ExactVLLMWrapper(engine, tokenizer=tokenizer, generate_kwargs={"max_new_tokens": 64})
    """

    def __init__(self, model: Any, **options: Any):
        super().__init__(model, **options)
        greedy = (options.get("generate_kwargs") or {}).get("do_sample") is False
        if not self.generate and self.temperature != 1:
            raise ValueError(f"temperature={self.temperature}: vLLM scores given sequences at temperature 1 only.")
        config, bias = getattr(self.model, "model_config", None), None
        if config is not None:
            bias = vocabulary_bias(config, self.codec.vocab_size)
            check_log_probs_mode(config, 0 if greedy else self.temperature, bias)
        elif self.temperature != 1:
            raise ValueError(f"temperature={self.temperature}: this engine does not say what log-probs it reports.")
        names = ("max_tokens", "temperature")
        self._sampling = {name: getattr(self.sampling_params, name) for name in names} | {"logit_bias": bias}

    def _model_eos(self) -> Any:
        config = getattr(self.model, "model_config", None)
        return None if config is None else config.try_get_generation_config().get("eos_token_id")

    def _sampled(self, prompts: list[torch.Tensor], most: int | None) -> Sampled:
        settings = dict(self._sampling)
        if most is not None:
            settings["max_tokens"] = min(most, settings["max_tokens"])
        outputs = self._call_generate(
            prompt_token_ids=[row.tolist() for row in prompts],
            sampling_params=sampling_params(self.stop_ids, **settings),
            use_tqdm=False,
        )
        ids, log_probs = sampled(outputs)
        return ids, list(map(torch.tensor, log_probs))

    def _scored(self, tensordict: TensorDictBase, logits_only: bool) -> TensorDictBase:
        fulls = self._whole(tensordict)
        attention = read_attention(tensordict, fulls)
        rows = [full[mask].tolist() for full, mask in zip(fulls, attention, strict=True)]
        outputs = self._call_generate(prompt_token_ids=rows, sampling_params=self.sampling_params, use_tqdm=False)
        batch, device = tensordict.batch_size, tensordict.device
        scores = []
        for output, row, mask in zip(outputs, rows, attention, strict=True):
            steps = zip(output.prompt_logprobs[1:], row[1:], strict=True)
            values = torch.tensor([0.0, *(step[token].logprob for step, token in steps)], device=mask.device)
            scores.append(torch.zeros(len(mask), device=mask.device).masked_scatter(mask, values))
        return TensorDict(
            {
                self.masks_key: self._masks(tensordict, attention),
                self.log_probs_key: container(LogProbs, [{"full": row} for row in scores], batch, device),
            },
            batch_size=batch,
            device=device,
        )
