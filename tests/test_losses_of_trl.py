"""Losses and their gradients beside those of TRL's ``GRPOTrainer``, as it is, in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from torchrl_chat.training import importance_weights, kl_estimate, masked_mean, policy_loss

TRL = Path(__file__).parents[1] / ".trl" / "bin" / "python"
pytestmark = pytest.mark.full

# TRL's settings, and ours.
CASES = {
    "grpo": ({"loss_type": "grpo"}, {"aggregation": "sequence"}),
    "clip higher": ({"loss_type": "grpo", "epsilon_high": 0.28}, {"aggregation": "sequence", "clip": (0.2, 0.28)}),
    "dual clip": ({"loss_type": "grpo", "delta": 1.5}, {"aggregation": "sequence", "dual_clip": 1.5}),
    "dr-grpo": ({"loss_type": "dr_grpo"}, {"aggregation": "constant", "constant": 16.0}),
    "dapo": ({"loss_type": "dapo"}, {"aggregation": "token"}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        {"aggregation": "sequence", "surrogate": "gspo"},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, {"aggregation": "token", "surrogate": "cispo"}),
    "sapo": ({"loss_type": "sapo"}, {"aggregation": "sequence", "surrogate": "sapo"}),
    "k3": ({"loss_type": "grpo", "beta": 0.1}, {"aggregation": "sequence"}),
    "tis": ({"loss_type": "dapo", "use_vllm": True}, {"aggregation": "token"}),
}

PROGRAM = """
import json, sys, types
import torch
from trl import GRPOTrainer

given = {name: torch.tensor(value) for name, value in json.load(sys.stdin).items()}
same = lambda value, **_: value
found = {}
for name, settings in json.loads(sys.argv[1]).items():
    log_probs = given["log_probs"].clone().requires_grad_()
    told = {"loss_type": "grpo", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None,
            "importance_sampling_level": "token", "use_vllm": False} | settings
    args = types.SimpleNamespace(
        delta=told["delta"], use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        steps_per_generation=1,
    )
    self = types.SimpleNamespace(
        args=args, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        vllm_importance_sampling_correction=True, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
        max_completion_length=16, model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(num_processes=1, gather=same, gather_for_metrics=same, reduce=same),
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
        _metrics={"train": __import__("collections").defaultdict(list)}, **told,
    )
    mask = given["mask"].long()
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": given["advantage"], "old_per_token_logps": given["old"], "ref_per_token_logps": given["reference"],
        "importance_sampling_ratio": given["weights"], "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(self, self.model, inputs)
    loss.backward()
    found[name] = [float(loss), log_probs.grad.tolist()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def drawn():
    draw = torch.Generator().manual_seed(0)
    numbers = -torch.rand(4, 6, 9, generator=draw, dtype=torch.float64) * 2
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 1, 2, 9])[:, None]
    found = dict(zip(("log_probs", "old", "reference", "sampler"), numbers, strict=True))
    found |= {"mask": mask, "advantage": torch.randn(6, generator=draw, dtype=torch.float64)}
    weights, _ = importance_weights(found["old"], found["sampler"], mask, high=2.0)
    return found | {"weights": weights}


@pytest.fixture(scope="module")
def theirs(drawn):
    if not TRL.exists():
        pytest.skip("TRL is in an environment of its own: make test-all makes it")
    done = subprocess.run(
        [TRL, "-c", PROGRAM, json.dumps({name: given for name, (given, _) in CASES.items()})],
        input=json.dumps({name: value.tolist() for name, value in drawn.items()}),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_trls(drawn, theirs, name):
    settings, ours = CASES[name]
    log_probs = drawn["log_probs"].clone().requires_grad_()
    weights = drawn["weights"] if settings.get("use_vllm") else None
    loss, _ = policy_loss(log_probs, drawn["old"], drawn["advantage"], drawn["mask"], weights=weights, **ours)
    if beta := settings.get("beta"):
        divergence = kl_estimate(log_probs, drawn["reference"], "k3")
        loss = loss + beta * masked_mean(divergence, drawn["mask"], "sequence")
    loss.backward()
    value, gradient = theirs[name]
    assert float(loss.detach()) == pytest.approx(value, rel=1e-5)
    assert torch.allclose(log_probs.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-4, atol=1e-7)
