"""The main job learns: GRPO from random weights to a pass rate of 0.9."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import of_the_day

pytestmark = [pytest.mark.learn, pytest.mark.timeout(1500)]


@pytest.mark.parametrize("seed", of_the_day(0, 1, 2))
def test_default_training_learns(tmp_path, seed):
    command = [sys.executable, "-m", "torchrl_chat.cli.main", "train", "--seed", str(seed), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"pass rate after training: ([\d.]+) \(before: ([\d.]+)\)", done.stdout)
    assert found, done.stdout[-2000:]
    after, before = map(float, found.groups())
    assert before < 0.1
    assert after >= 0.9
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["pass_rate"] < 0.1
    # Log-probs and ids agree between sampling and training: the first minibatch of a batch is exactly on-policy.
    assert all(0 < row["ess"] <= 1 + 1e-6 for row in metrics)
