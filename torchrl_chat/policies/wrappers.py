"""torchrl's own LLM wrappers, generating from the ledger's ids: for code that is written for those wrappers.

The defects named in the docstrings are those of torchrl 0.14.1. Where the parent is right, it does the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torch.nn.utils.rnn import pad_sequence
from torchrl.data.llm import History
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from torchrl.modules.llm.policies import ChatHistory, LLMWrapperBase, LogProbs, Masks, Text

from torchrl_chat import columns
from torchrl_chat.conversation import Turn
from torchrl_chat.conversation.turn import Errors
from torchrl_chat.models.sampling import default_stop_ids, generate
from torchrl_chat.policies.policy import Policy, Prompt
from torchrl_chat.policies.transformers import token_logits
from torchrl_chat.policies.vllm import check_log_probs_mode, sampled, sampling_params, vocabulary_bias
from torchrl_chat.policies.writing import Prompts, container, read_attention
from torchrl_chat.templates.backends import tokenizer_of
from torchrl_chat.templates.codec import codec_of

# Options of the sampling that change the distribution in ways that a forward pass over the sequence does not see, and the
# values at which they do not: those of one, those of nothing, and those of which only ``None`` is nothing.
_ONES = "top_p typical_p repetition_penalty encoder_repetition_penalty length_penalty guidance_scale num_beams num_beam_groups"
_ZEROS = """min_p epsilon_cutoff eta_cutoff presence_penalty frequency_penalty diversity_penalty no_repeat_ngram_size min_length
    min_new_tokens min_tokens ignore_eos early_stopping"""
_NONES = """top_h exponential_decay_length_penalty penalty_alpha suppress_tokens begin_suppress_tokens forced_bos_token_id
    forced_eos_token_id sequence_bias logit_bias allowed_token_ids bad_words bad_words_ids force_words_ids watermarking_config
    logits_processor prefix_allowed_tokens_fn stop_sequences stop_strings"""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (None, 0, -1),
    **dict.fromkeys(_ONES.split(), (None, 1)),
    **dict.fromkeys(_ZEROS.split(), (None, 0)),
    **dict.fromkeys(_NONES.split(), (None,)),
}
_TAKEN = ("max_new_tokens", "do_sample", "temperature", "eos_token_id")
_COUNTS = ("num_return_sequences", "n")
# What code for torchrl's wrappers says about the output, which is the same here whatever it says.
_OUTPUT = {"max_tokens", "pad_token_id", "output_scores", "output_logits", "return_dict_in_generate", "logprobs"}
_OUTPUT |= {"prompt_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"}
_OUTPUT |= {"include_stop_str_in_output"}
Sampled = tuple[list[list[int]], list[Any]]  # ids and log-probs of each row


class LedgerWrapper(Policy, LLMWrapperBase):
    """What the two wrappers share: prompts from the ledger, answers into the parent's containers.

    In every input mode ``generate=True`` reads ``("tokens", "prompt")``, and ``generate=False`` ``("tokens", "full")``:
    an environment of this package writes the one and the policy the other, whatever the mode.
    """

    model: Any
    generate_kwargs: dict[str, Any]
    out_keys: list[Any]

    def __init__(self, model: Any, **options: Any):
        settings = dict(options.get("generate_kwargs") or {})
        _check_settings(settings, type(self).__name__)
        for name, only in (("pad_output", False), ("batching", None), ("num_samples", None), ("input_key", None)):
            if options.get(name, only) not in (only, None, False):
                raise ValueError(f"{type(self).__name__} has no {name}: a row of the environment has one answer.")
        if options.get("pad_model_input") is False:
            raise ValueError("pad_model_input=False lets tokens see those behind them (torchrl 0.14.1).")
        if settings.get("temperature") and "do_sample" not in settings:
            settings["do_sample"] = True  # transformers would ignore the temperature, and take the likeliest token
        super().__init__(model, **{**options, "generate_kwargs": settings})
        self._options = {**options, "generate_kwargs": settings}
        self.tokenizer: Any = tokenizer_of(self.tokenizer)
        self.codec = codec_of(self.tokenizer)
        self.temperature = settings.get("temperature") or 1.0
        given = settings.get("eos_token_id")
        if given is None:
            self.stop_ids = default_stop_ids(self.tokenizer, self._model_eos())
        else:
            self.stop_ids = frozenset([given] if isinstance(given, int) else given)
        self.in_keys = [("tokens", "prompt" if self.generate else "full")]
        self.input_key = self.in_keys[0]
        if self.generate:
            self.out_keys = [*dict.fromkeys([*self.out_keys, self.text_key, "finish_reason"])]

    def get_new_version(self, **options: Any) -> Any:
        """The same wrapper with other options."""
        model = options.pop("model", self.model)
        return type(self)(model, **{**self._options, **options})

    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        logits_only: bool = False,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Answer every row's prompt, or, with ``generate=False``, score ``("tokens", "full")``.

        Raises:
            KeyError: the ids are not there.
        """
        if kwargs:
            raise ValueError(
                f"{sorted(kwargs)} cannot be given to a call: use get_new_version(generate_kwargs=...)."
            )
        if not tensordict.ndim:
            return self.forward(lazy_stack([tensordict]), logits_only=logits_only)[0]
        if self.generate:
            written = super().forward(columns.replaced(tensordict, _NOTHING))
            names = {self.tokens_key: "tokens", self.masks_key: "masks", self.log_probs_key: "log_probs"}
            names |= {self.text_key: "text", "finish_reason": "finish_reason"}
            if self.input_mode == "history" and "history" in written.keys():
                names[self.history_key] = "history"
        else:
            written = self._scored(tensordict, logits_only)
            if "logits" in self.out_keys:  # a distribution is asked for
                return written
            names = {key: key for key in (self.masks_key, self.log_probs_key)}
        if tensordict_out is None:
            fresh = TensorDict(batch_size=tensordict.batch_size, device=tensordict.device)
            tensordict_out = tensordict if self.inplace is True else fresh
        for name, source in names.items():
            tensordict_out.set(name, written.get(source))
        return tensordict_out

    def _model_eos(self) -> Any:
        """``eos_token_id`` of the model's generation config."""
        raise NotImplementedError

    # ------------------------------------------------------------------ generate=True
    def _sampled(self, prompts: list[torch.Tensor], most: int | None) -> Sampled:
        raise NotImplementedError

    def _sample(self, prompts: Sequence[Prompt]) -> list[Turn]:
        if any(prompt.seed is not None for prompt in prompts):
            raise ValueError(f"{type(self).__name__} does not sample from seeds.")
        limits = [prompt.limit for prompt in prompts]
        known = [limit for limit in limits if limit is not None]
        ids, scores = self._sampled(self._ids(prompts), max(known) if len(known) == len(limits) else None)
        ids = [row[:limit] for row, limit in zip(ids, limits, strict=True)]
        return self._turns(prompts, ids, [row[:limit] for row, limit in zip(scores, limits, strict=True)])

    def _write(
        self, td: TensorDictBase, shown: Prompts | None, turns: Sequence[Turn], errors: Errors
    ) -> TensorDictBase:
        written, batch, device = super()._write(td, shown, turns, errors), td.batch_size, td.device
        if self.input_mode != "tokens":
            prompts = columns.read_field(written.get("text"), "prompt", batch)
            if prompts is None:
                ids = columns.read_field(written.get("tokens"), "prompt", batch) or []
                prompts = self.codec.decode([row.tolist() for row in ids])
            texts = [turn.text or "" for turn in turns]
            fields = {
                "prompt": prompts,
                "response": texts,
                "full": list(map("".join, zip(prompts, texts, strict=True))),
            }
            rows = [{key: columns.as_object(text, device) for key, text in row.items()} for row in rows_of(fields)]
            written.set("text", container(Text, rows, batch, device))
        if self.input_mode == "history" and (history := written.get("history", None)) is not None:
            whole = [turn.finish_reason == "stop" for turn in turns]
            said = [turn.sampled.tolist() for turn in turns]
            bodies = self.codec.decode([row[:-1] if stop else row for row, stop in zip(said, whole, strict=True)])
            written.set("history", _answered_histories(history, bodies, whole, written))
        return written

    # ------------------------------------------------------------------ generate=False
    def _scored(self, tensordict: TensorDictBase, logits_only: bool) -> TensorDictBase:
        raise NotImplementedError

    def _sequences(self, tensordict: TensorDictBase) -> tuple[list[torch.Tensor], list[torch.Tensor], TensorDict]:
        """The sequences to score, which of their ids are no padding, and the masks, beside which the scores are written."""
        batch, device = tensordict.batch_size, tensordict.device
        fulls = columns.read_field(tensordict.get("tokens", None), "full", batch)
        if fulls is None:
            raise KeyError(
                "('tokens', 'full') is not there: a policy of this package and training_view() write it. Text or messages "
                "are not tokenized again."
            )
        attention = read_attention(tensordict, fulls)
        fields = {"all_attention_mask": attention}  # padding is what the mask says, whatever the ids
        sampled = columns.read_field(tensordict.get("masks", None), "all_assistant_mask", batch)
        if sampled is not None and all(len(m) == len(row) for m, row in zip(sampled, attention, strict=True)):
            fields["all_assistant_mask"] = sampled
        masks = container(Masks, rows_of(fields), batch, device)
        return fulls, attention, TensorDict({self.masks_key: masks}, batch_size=batch, device=device)


def _check_settings(settings: Mapping[str, Any], cls: str) -> None:
    """Refuse what would change the distribution without the loss seeing it, and what would be ignored."""
    for name, value in settings.items():
        if name in _COUNTS:
            if value not in (None, 1):
                raise ValueError(
                    f"generate_kwargs has {name}={value!r}, and {cls} gives a row of the environment one answer: let the "
                    f"environment repeat its rows (repeats=...)."
                )
        elif name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise ValueError(
                    f"generate_kwargs has {name}={value!r}: the loss, which has the model's own distribution at one "
                    f"temperature, would train on samples of another. Leave {name} out."
                )
        elif name not in (*_TAKEN, *_OUTPUT):
            raise ValueError(
                f"generate_kwargs has {name}={value!r}, which {cls} does not know: leave it out. Known are "
                f"{', '.join(_TAKEN)}."
            )
    if settings.get("do_sample") and settings.get("temperature") == 0:
        raise ValueError(
            "generate_kwargs has do_sample=True and temperature=0, which takes the likeliest token: give one of the two."
        )


def rows_of(fields: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns as rows."""
    return [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]


_NOTHING = TensorDict()
_ENTRY = ("role", "content", "is_complete")


def _answered_histories(
    history: Any, bodies: Sequence[str], complete: Sequence[bool], like: TensorDictBase
) -> ChatHistory:
    """The ``ChatHistory`` with the response, and the conversation up to it."""
    batch, device = like.batch_size, like.device
    prompts = columns.read_field(history, "prompt", batch) or []
    rows = []
    for prompt, body, whole in zip(prompts, bodies, complete, strict=True):
        [entry] = columns.history_messages([{"role": "assistant", "content": body}], device)
        entry._tensordict["is_complete"] = columns.as_object(whole, device)
        before = list(columns.bare(prompt).unbind(0))
        entries = {"prompt": before, "response": [entry], "full": [*before, entry]}
        rows.append(
            {
                key: columns.wrap(History, columns.stack_scalars(value, columns.Conversation), *_ENTRY)
                for key, value in entries.items()
            }
        )
    return container(ChatHistory, rows, batch, device)


class ExactTransformersWrapper(LedgerWrapper, TransformersWrapper):
    """torchrl's ``TransformersWrapper`` on the ledger's ids, for ``generate`` true and false and all input modes.

    What of torchrl 0.14.1 it mends, and what by:

    - the first sampled token's log-prob is 0; log-probs ignore the temperature: log-probs are those of the
      distribution that was sampled from, and ``generate=False`` and ``get_dist`` divide by the same temperature;
    - no ``("log_probs", "full")`` from ``generate=True``: it is written, 0 where not sampled, earlier turns included;
    - rows that are padded with ``<none>`` messages, or have unequal numbers of messages or tokens, lose their answers or
      crash, ``prefer_tokens`` or not: messages are not read;
    - tokens equal to the padding or eos token are deleted: an answer ends at its first stop id, and sequences have no
      padding;
    - ``generate=False`` tokenizes histories again, to other ids: it scores ``("tokens", "full")`` in every mode;
    - torchrl's own chat templates in place of the tokenizer's: none is used here.

    Refused, since they cannot be mended here: ``pad_output``, packing (``pad_model_input=False``, not causal), ``num_samples``
    and ``batching``, sampling that the loss cannot see (``top_k``, ``top_p``, penalties, beams ...), and settings that are
    not known. The model's own generation config is not read, but for its ``eos_token_id``.

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
        >>> from torchrl.objectives.llm import GRPOLoss
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> policy = ExactTransformersWrapper(
        ...     model, tokenizer=tokenizer, generate_kwargs={"max_new_tokens": 64, "do_sample": True}
        ... )
        >>> loss = GRPOLoss(policy.get_new_version(generate=False), masking_strategy="sft")
    """

    def __init__(self, model: Any, **options: Any):
        super().__init__(model, **options)
        given = self._options["generate_kwargs"]
        most = given.get("max_tokens", given.get("max_new_tokens"))
        self.generate_kwargs = {"max_new_tokens": most, "do_sample": bool(given.get("do_sample"))}

    def _model_eos(self) -> Any:
        return getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)

    def _sampled(self, prompts: list[torch.Tensor], most: int | None) -> Sampled:
        device = next(self.model.parameters()).device
        lengths = [length for length in (most, self.generate_kwargs["max_new_tokens"]) if length is not None]
        ids, scores = generate(
            self.model,
            [prompt.to(device) for prompt in prompts],
            stop_ids=self.stop_ids,
            most=[min(lengths, default=20)] * len(prompts),
            vocab_size=self.codec.vocab_size,
            temperature=self.temperature if self.generate_kwargs["do_sample"] else 0.0,
        )
        return [row.tolist() for row in ids], [row.cpu() for row in scores]

    def _scored(self, tensordict: TensorDictBase, logits_only: bool) -> TensorDictBase:
        fulls, attention, written = self._sequences(tensordict)
        logits, attended = token_logits(self.model, fulls, attention, self.codec.vocab_size, self.temperature)

        def unpadded(rows: torch.Tensor) -> list[torch.Tensor]:
            return [row[len(row) - len(full) :].to(full.device) for row, full in zip(rows, fulls, strict=True)]

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
        return written.set(self.log_probs_key, container(LogProbs, rows, written.batch_size, written.device))

    def _get_dist_with_assistant_mask(self, tensordict: TensorDictBase, *args: Any, **options: Any) -> Any:
        # torchrl writes what it got into the TensorDict, which fails for ragged columns of a dense one.
        rows = tensordict.select("tokens", "masks", strict=False).to_lazystack(0)
        return super()._get_dist_with_assistant_mask(rows, *args, **options)


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
        >>> policy = ExactVLLMWrapper(engine, tokenizer=tokenizer, generate_kwargs={"max_new_tokens": 64})  # doctest: +SKIP
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
        return sampled(outputs)

    def _scored(self, tensordict: TensorDictBase, logits_only: bool) -> TensorDictBase:
        fulls, attention, written = self._sequences(tensordict)
        rows = [full[mask].tolist() for full, mask in zip(fulls, attention, strict=True)]
        outputs = self._call_generate(prompt_token_ids=rows, sampling_params=self.sampling_params, use_tqdm=False)
        scores = []
        for output, row, mask in zip(outputs, rows, attention, strict=True):
            steps = zip(output.prompt_logprobs[1:], row[1:], strict=True)
            values = torch.tensor([0.0, *(step[token].logprob for step, token in steps)], device=mask.device)
            scores.append(torch.zeros(len(mask), device=mask.device).masked_scatter(mask, values))
        scored = container(LogProbs, [{"full": row} for row in scores], written.batch_size, written.device)
        return written.set(self.log_probs_key, scored)
