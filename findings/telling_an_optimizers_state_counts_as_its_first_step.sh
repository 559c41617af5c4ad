#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint: asking for the state of an optimizer before its first step takes that step.
#
# Expected: get_optimizer_state_dict() reads. A run that writes a checkpoint before its first step learns what one without it learns.
# Happens: an optimizer without a state is stepped once, with zero gradients and the learning rate 0, so that there is a state to
#   tell; Adam counts that as its first step, keeps the count, and corrects its moments for one step too many from then on: the
#   first real update of a weight is 0.742 of what it would have been (betas 0.9 and 0.99). No other process and no FSDP is needed
#   for it, and nothing is said.
# Versions: torch 2.13.0 on a CPU (seen 2026-11-30, Python 3.11).
# Why it matters: recipes write the weights they begin with, and a run of one process that saves with torch.save is compared with
#   one of several that saves so: their curves differ from the first step on, by far more than sums in another order explain.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6 >/dev/null 2>&1
cat > steps.py <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_update(asked):
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    adam = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    if asked:
        get_optimizer_state_dict(layer, adam)
    adam.zero_grad()
    layer(torch.ones(1, 1)).sum().backward()
    adam.step()
    count = int(adam.state[layer.weight]["step"])
    print(f"state asked for before: {asked!s:5}  first update {layer.weight.item():.4f}, counted as step {count}")
    return layer.weight.item(), count


unasked, asked = first_update(False), first_update(True)
assert unasked[1] == 1 and asked[1] == 2, (unasked, asked)
assert abs(asked[0] / unasked[0] - 0.742) < 0.001, asked[0] / unasked[0]
PY
venv/bin/python steps.py
