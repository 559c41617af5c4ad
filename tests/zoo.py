"""Random models of every causal language model that transformers registers, made small by the package's own rules."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from torchrl_chat.models.small import small_config, widen

# Configs whose defaults leave out what their models need, and decoders that have to be told so.
_DECODER = {"is_decoder": True}
TOLD = {
    **dict.fromkeys(
        ["bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"],
        _DECODER,
    ),
    **dict.fromkeys(["roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"], _DECODER),
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "roc_bert": {**_DECODER, "enable_pronunciation": False, "enable_shape": False},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "xlstm": {"qk_dim_factor": 1.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
}
# What there is no model of here: parts that need other packages, drafts of other models, several configs in one, and
# Reformer, which takes no gradient in eval().
LEFT_OUT = {
    *(
        "gemma3n",
        "gemma4_assistant",
        "gemma4_unified_assistant",
        "musicgen",
        "musicgen_melody",
        "blt",
        "dbrx",
        "dots3_note",
    ),
    *("cohere_compass_text", "qwen4_exp", "qwen4_exp_text", "xlm", "reformer"),
}
KINDS = (
    *(
        "llama",
        "gpt2",
        "gpt_oss",
        "gemma3",
        "deepseek_v3",
        "deepseek_v4",
        "qwen3_next",
        "falcon_h1",
        "mamba",
        "rwkv",
    ),
    *("recurrent_gemma", "bloom", "opt", "roberta"),
)
"""A model of every kind: attention whole, by window and compressed, states, positions learned and added, a shell."""


def architectures() -> list[str]:
    """All that can be made here."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LEFT_OUT]


def make(name: str, seed: int = 0, **told):
    """A model in ``eval()``."""
    config = small_config(CONFIG_MAPPING[name](**{**TOLD.get(name, {}), **told}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        widen(model)
    return model
