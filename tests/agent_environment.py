"""The environment of other houses' agents (``scripts/environment.py agents``), and how one of them is run at a gateway."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".agents" / "bin" / "python"
# Agents that the main environment can run as well, and what they import.
ANYWHERE = {"openai_sdk": "openai", "anthropic_sdk": "anthropic"}


def python_of(program: str, here: str) -> str:
    """The Python that runs a program of ``tests/public_agents``; without one the test is skipped, as ``make test-all`` makes it.

    Args:
        program: its name.
        here: the Python that runs what it can.
    """
    if find_spec(ANYWHERE.get(program, "-")) is not None:
        return here
    if not PYTHON.exists():
        pytest.skip("the agents' environment is made by make test-all (scripts/environment.py agents)")
    return str(PYTHON)


def drive(program: str, how: str, variables: dict[str, str], tasks: Sequence[str], python: str, cwd: Path) -> Any:
    """What a program of ``tests/public_agents`` prints: its answers, and the name of the error that ended it.

    Args:
        program, how: the file's name without its suffix, and its argument.
        variables: the address and the key, as :meth:`Served.environment` has them.
        tasks: what it is asked, one after the other.
        python: see :func:`python_of`.
        cwd: a folder of its own: what it writes stays there.
    """
    kept = {
        key: value for key, value in os.environ.items() if not key.endswith(("_API_KEY", "_BASE_URL", "_API_BASE"))
    }
    home = {"HOME": str(cwd), "MSWEA_GLOBAL_CONFIG_DIR": str(cwd), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    # -P: the folder of the programs is not looked in for what they import.
    run = subprocess.run(
        [python, "-P", str(ROOT / "tests" / "public_agents" / f"{program}.py"), how],
        env={**kept, **home, **variables, "AGENT_TASKS": json.dumps(list(tasks))},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout[run.stdout.rindex('{"answers"') :])  # some print what they stream
