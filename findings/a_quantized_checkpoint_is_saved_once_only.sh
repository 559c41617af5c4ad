#!/usr/bin/env bash
# transformers 5.23.0 with torchao 0.18.0: a model that was quantized and saved loads, and cannot be saved again.
#
# Expected: what from_pretrained has read from a folder, save_pretrained writes to another one, as with every other model.
# Happens: the model that was quantized while it was loaded is saved. The one that was loaded from that folder computes the same logits to
#   the bit, trains an adapter, can be copied, and raises a NotImplementedError without a word when it is saved: the conversion of
#   its weights was recorded at the load, and has no way back.
# Versions: transformers 5.23.0, torchao 0.18.0, peft 0.21.2, torch 2.13.0 on a CPU (seen 2026-11-30, Python 3.11).
# Why it matters: a trainer of an adapter on a quantized checkpoint finds it out at the end, when it writes the merged model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 torchao==0.18.0 peft==0.21.2 accelerate==1.15.0 >/dev/null 2>&1
cat > saved.py <<'PY'
import copy
import warnings

import peft
import torch
import transformers
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def saves(model, folder):
    try:
        model.save_pretrained(folder)
    except NotImplementedError as error:
        return f"NotImplementedError({str(error)!r})"
    return "saved"


torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("whole")
ids = torch.arange(8)[None]
first = AutoModelForCausalLM.from_pretrained("whole", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
seen = {"quantized at its load": saves(first, "quantized")}
second = AutoModelForCausalLM.from_pretrained("quantized")
assert torch.equal(first(ids).logits, second(ids).logits)
assert torch.equal(copy.deepcopy(second)(ids).logits, second(ids).logits)
seen["loaded from there"] = saves(second, "again")
adapted = peft.get_peft_model(second, peft.LoraConfig(r=2, target_modules="all-linear"))
adapted(ids, labels=ids).loss.backward()
assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)
seen["with an adapter merged"] = saves(adapted.merge_and_unload(), "merged")
for model, outcome in seen.items():
    print(f"{model}: {outcome}")
error = "NotImplementedError('')"
assert list(seen.values()) == ["saved", error, error], seen
PY
venv/bin/python saved.py 2>&1 | grep -v -e torchao/_C -e pytree
