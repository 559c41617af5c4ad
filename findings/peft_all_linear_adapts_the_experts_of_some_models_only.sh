#!/usr/bin/env bash
# peft 0.21.2, target_modules="all-linear": the experts of Mixtral get a LoRA, those of gpt-oss get none, and nothing is said.
#
# Expected: "all-linear" adapts the same parts of two mixtures of experts, or says which it leaves out.
# Happens: of Mixtral the fused experts (both of their matrices) and the router are adapted beside the attention; of gpt-oss the
#   attention alone, though in both the experts hold three fifths of the weights here, and most of them in the released models. Both
#   keep their experts as three-dimensional parameters of one module, so that neither has linear layers there.
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0 on a CPU (seen 2026-11-30, Python 3.11).
# Why it matters: "LoRA on all layers" is what recipes advise for reinforcement learning; of gpt-oss that trains attention only, and two
#   models that are trained with one setting are not compared with one setting.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 >/dev/null 2>&1
cat > adapted.py <<'PY'
import warnings

import peft
import transformers
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
}


def adapted(made):
    every = sum(weight.numel() for weight in made.parameters())
    experts = sum(weight.numel() for name, weight in made.named_parameters() if "experts" in name)
    model = peft.get_peft_model(made, peft.LoraConfig(r=2, target_modules="all-linear"))
    names = {name.split(".lora_")[0].split("layers.0.")[1] for name, weight in model.named_parameters() if weight.requires_grad}
    print(f"{type(made).__name__}: the experts hold {experts / every:.0%} of the weights; adapted: {', '.join(sorted(names))}")
    return {"experts": any("experts" in name for name in names), "attention": any("q_proj" in name for name in names)}


mixtral = adapted(MixtralForCausalLM(MixtralConfig(**SIZES)))
gpt_oss = adapted(GptOssForCausalLM(GptOssConfig(**SIZES, layer_types=["full_attention"])))
assert mixtral == {"experts": True, "attention": True}, mixtral
assert gpt_oss == {"experts": False, "attention": True}, gpt_oss
PY
venv/bin/python adapted.py
