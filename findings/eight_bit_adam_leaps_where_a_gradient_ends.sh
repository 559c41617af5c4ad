#!/usr/bin/env bash
# torchao 0.18.0, AdamW8bit: the embedding of a token that is in one batch, and not in the next one, goes 4,204 learning rates far.
#
# Expected: AdamW with states in 8 bits takes AdamW's steps within rounding. Whatever the gradients are, a step of Adam with betas 0.9
#   and 0.99 is at most 2.4 learning rates (Cauchy and Schwarz over its two averages).
# Happens: of two tokens the second has gradients of 1e-4 beside those of the first, 1, in its block of 256. Its second moment is 1e-8 of
#   the block's greatest and becomes 0; the first moment, 1e-4 of it, does not. While a gradient comes in each step, that adds to the
#   second moment before it is divided by; in the first step without one the first moment is divided by eps, 1e-8, alone. Two
#   steps show it; nothing is said. (The paper, arXiv:2110.02861, has embeddings in 32 bits, for their own reasons.)
# Versions: torchao 0.18.0, torch 2.13.0 on a CPU (seen 2026-11-30, Python 3.11); compiled or, as here, not.
# Why it matters: batches of reinforcement learning are small, most tokens of a vocabulary are in few of them, and the tied head goes
#   with the embeddings: single weights are destroyed within two steps, at any learning rate.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6 torchao==0.18.0 >/dev/null 2>&1
cat > leap.py <<'PY'
import torch
from torchao.optim import AdamW8bit

torch.compiler.set_stance("force_eager")  # so that no C++ compiler is needed


def steps(kind):
    table = torch.nn.Embedding(64, 128)
    torch.nn.init.zeros_(table.weight)
    optimizer = kind(table.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    far = []
    for tokens in ([0, 1], [0]):
        before = table.weight.detach().clone()
        optimizer.zero_grad()
        weights = torch.tensor([1.0, 1e-4])[tokens, None]
        (table(torch.tensor(tokens)) * weights).sum().backward()
        optimizer.step()
        far.append(float((table.weight - before).detach().abs().max()) / 1e-3)
    print(f"{kind.__name__:9}  farthest weight of two steps, in learning rates: {far[0]:.1f}, {far[1]:.1f}")
    return far


exact, rounded = steps(torch.optim.AdamW), steps(AdamW8bit)
assert max(exact) < 1.01, exact
assert rounded[1] > 1000, rounded
PY
venv/bin/python leap.py 2>/dev/null
