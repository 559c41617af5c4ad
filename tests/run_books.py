"""What tests of training scripts share: the scripts as modules, and the lines of their books."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
SCRIPTS = ("grpo", "ppo", "expert_iteration", "python_tool")
SHORT = [
    *(
        "--steps",
        "4",
        "--prompts",
        "4",
        "--group_size",
        "4",
        "--minibatch",
        "8",
        "--eval",
        "4",
        "--save_every",
        "1",
    ),
    *("--max_new_tokens", "3"),
]
"""Words of the command line for a run of seconds."""


def example(name: str) -> ModuleType:
    """A script of the examples as a module of its own; of the one that is in the package, that."""
    if name == "grpo":
        return importlib.import_module("torchrl_chat.recipes.grpo")
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their own module
    spec.loader.exec_module(module)
    return module


def words(name: str, *more: str) -> list[str]:
    """The command line of a short run of a script."""
    return [name, *SHORT, *(("--warm_steps", "3") if name == "python_tool" else ()), *more]


def jsonl(path: Path) -> list[dict]:
    """The lines of a file; what is no JSON (NaN, say) is an error."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def documented_metrics() -> tuple[set[str], set[str]]:
    """The names of the table of metrics in the docs, and those of them that the line of a run tells."""
    text = (ROOT / "docs" / "reference" / "runs.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    cells = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith(("| `", "| **`")))
    return set(re.findall(r"`(\w+)`", cells)), set(re.findall(r"\*\*`(\w+)`\*\*", cells))
