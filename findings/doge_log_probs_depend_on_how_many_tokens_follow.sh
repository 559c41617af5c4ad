#!/usr/bin/env bash
# transformers 5.23.0, Doge: what is said of a token depends on how many tokens stand behind it, though not on which.
#
# Expected: a causal model gives the beginning of a row the same log-probs whether the row goes on or not.
# Happens: in rows longer than keep_window_size they differ by more than a nat, while other tokens in the same number behind
#   change nothing at all. Each head keeps the keep_window_size keys with the largest weights; in the first layer such a weight is
#   a function of the key's token alone, so that a token that comes again ties exactly, and which of the tied keys torch.topk
#   returns depends on the length of the row. Below the window everything agrees.
# Versions: transformers 5.23.0, torch 2.13.0 on a CPU (seen 2026-11-30, Python 3.11).
# Why it matters: log-probs that were carried from sampling (each from a row that ends there) are not those that a pass over the
#   finished row gives: importance ratios are wrong before the first update, in every text longer than the window with a word that
#   comes again, and a test with short rows sees nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 >/dev/null 2>&1
cat > doge.py <<'PY'
import torch
from transformers import DogeConfig, DogeForCausalLM


def model(window):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = DogeForCausalLM(DogeConfig(vocab_size=64, keep_window_size=window, max_position_embeddings=256, **sizes)).eval()
    with torch.no_grad():
        for weight in made.parameters():  # as they are initialised, nothing before a token matters to it
            if weight.ndim == 2:
                weight.normal_(std=0.3)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    return made


@torch.no_grad()
def said(made, row):
    return made(input_ids=row[None], use_cache=False).logits[0, :20].log_softmax(-1)


row = torch.randint(8, (40,), generator=torch.Generator().manual_seed(1))
others = torch.cat((row[:20], torch.full((20,), 9)))
found = {}
for window in (64, 8):
    made = model(window)
    whole = said(made, row)
    ended, changed = (float((whole - said(made, other)).abs().max()) for other in (row[:20], others))
    found[window] = ended
    print(f"keep_window_size {window}: the first 20 of 40 tokens, without the others {ended:.1e} nats off, with others {changed:.1e}")
    assert changed == 0, "other tokens behind change something, too"
assert found[64] < 1e-4, "rows below the window differ"
assert found[8] > 0.1, "rows beyond the window agree now"
PY
venv/bin/python doge.py 2>/dev/null
