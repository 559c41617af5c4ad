"""What torchrl's LLM wrappers need to generate from the ledger's ids: the part that does not depend on the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, LLMWrapperBase, Masks, Text

from torchrl_chat import columns
from torchrl_chat.policies.writing import (
    Prompts,
    container,
    read_prompts,
    sample_answers,
    write_answers,
)
from torchrl_chat.sampling import default_stop_ids
from torchrl_chat.templates.backends import tokenizer_of
from torchrl_chat.templates.codec import codec_of

# Options of the sampling that change the distribution in ways that a forward pass over the sequence does not see, and the
# values at which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (None, 0, -1),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "presence_penalty": (None, 0.0),
    "frequency_penalty": (None, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
    "diversity_penalty": (None, 0.0),
    "length_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "penalty_alpha": (None,),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "min_tokens": (None, 0),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None,),
    "logit_bias": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None,),
    "bad_words_ids": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "logits_processor": (None,),
    "prefix_allowed_tokens_fn": (None,),
    "ignore_eos": (None, False),
    "stop_sequences": (None,),
    "stop_strings": (None,),
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "early_stopping": (None, False),
}
_TAKEN = ("max_new_tokens", "do_sample", "temperature", "eos_token_id")
_COUNTS = ("num_return_sequences", "n")
# What code for torchrl's wrappers says about the output, which is the same here whatever it says.
_OUTPUT = {"max_tokens", "pad_token_id", "output_scores", "output_logits", "return_dict_in_generate", "logprobs"}
_OUTPUT |= {"prompt_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"}
_OUTPUT |= {"include_stop_str_in_output"}
Sampled = tuple[list[list[int]], list[torch.Tensor]]


class LedgerWrapper(LLMWrapperBase):
    """What the two wrappers share: prompts from the ledger, answers into the parent's containers.

    In every input mode ``generate=True`` reads ``("tokens", "prompt")``, and ``generate=False`` ``("tokens", "full")``:
    an environment of this package writes the one and the policy the other, whatever the mode.
    """

    model: Any
    stop_ids: frozenset[int]
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
            written = self._answered(tensordict)
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

    def _within(self, prompts: list[torch.Tensor], limits: list[int] | None, _seeds: Any = None) -> Sampled:
        ids, scores = self._sampled(prompts, max(limits) if limits else None)
        if limits:  # a budget's
            ids = [row[:limit] for row, limit in zip(ids, limits, strict=True)]
            scores = [row[:limit] for row, limit in zip(scores, limits, strict=True)]
        return ids, scores

    @torch.no_grad()
    def _answered(self, tensordict: TensorDictBase) -> TensorDictBase:
        prompts = read_prompts(tensordict)
        answers = sample_answers(prompts, self._within, stop_ids=self.stop_ids, codec=self.codec)
        written = write_answers(columns.replaced(tensordict, _NOTHING), prompts, *answers)
        if self.input_mode != "tokens":
            written.set("text", self._texts(written, prompts, answers.texts))
        if self.input_mode == "history" and (history := tensordict.get("history", None)) is not None:
            whole = [reason == "stop" for reason in answers.finish_reasons]
            rows = [row.tolist() for row in answers.responses]
            bodies = self.codec.decode([row[:-1] if stop else row for row, stop in zip(rows, whole, strict=True)])
            written.set("history", _answered_histories(history, bodies, whole, written))
        return written

    def _texts(self, written: TensorDictBase, prompts: Prompts, texts: list[str]) -> Text:
        batch, device = written.batch_size, written.device
        known = columns.read_field(written.get("text"), "prompt", batch)
        before = known or self.codec.decode([row.tolist() for row in prompts.ids])
        fields = {"prompt": before, "response": texts, "full": list(map("".join, zip(before, texts, strict=True)))}
        rows = [{key: columns.as_object(value, device) for key, value in row.items()} for row in rows_of(fields)]
        return container(Text, rows, batch, device)

    # ------------------------------------------------------------------ generate=False
    def _scored(self, tensordict: TensorDictBase, logits_only: bool) -> TensorDictBase:
        raise NotImplementedError

    def _whole(self, tensordict: TensorDictBase) -> list[torch.Tensor]:
        """The sequences to score."""
        fulls = columns.read_field(tensordict.get("tokens", None), "full", tensordict.batch_size)
        if fulls is None:
            raise KeyError(
                "('tokens', 'full') is not there: a policy of this package and training_view() write it. Text or messages "
                "are not tokenized again."
            )
        return fulls

    def _masks(self, tensordict: TensorDictBase, attention: list[torch.Tensor]) -> Masks:
        """The masks of whole sequences: padding is what the mask says, whatever the ids."""
        sampled = columns.read_field(tensordict.get("masks", None), "all_assistant_mask", tensordict.batch_size)
        fields = {"all_attention_mask": attention}
        if sampled is not None and all(len(m) == len(row) for m, row in zip(sampled, attention, strict=True)):
            fields["all_assistant_mask"] = sampled
        return container(Masks, rows_of(fields), tensordict.batch_size, tensordict.device)


def _check_settings(settings: Mapping[str, Any], cls: str) -> None:
    """Refuse what would change the distribution without the loss seeing it, and what would be ignored."""
    for name, value in settings.items():
        if name in _COUNTS:
            if value not in (None, 1):
                raise ValueError(
                    f"generate_kwargs has {name}={value!r}, and {cls} gives a row of the environment one answer: let the "
                    f"environment repeat its rows (repeats=...)."
                )
        elif name in NEUTRAL:
            if value not in NEUTRAL[name]:
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
