"""Runs of ``torchrl-chat eval`` as its tests make them: folders with the files that a run leaves, no model behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_chat.rollouts import as_line


def episode(row: int, place: int, right: bool, **fields: Any) -> dict[str, Any]:
    """An episode as an evaluation writes it."""
    query = fields.pop("query", f"question {row}")
    answer = fields.pop("answer", str(row) if right else "no idea")
    return {
        "version": 1,
        "id": f"{row}.{place}",
        "row": row,
        "place": place,
        "query": query,
        "reference": str(row),
        "messages": [{"role": "user", "content": query}, {"role": "assistant", "content": answer}],
        "reward": float(right),
        "success": right,
        "reward_parts": {},
        "grade_failure": None,
        "extracted": str(row) if right else None,
        "stop": "answered",
        "cut": False,
        "error": None,
        "turns": 1,
        "sampled_tokens": 3,
        "total_tokens": 10,
        "columns": {},
        "metadata": {"time": 0.0, "seconds": 0.5, "policy": "m", "dataset": "made-up"},
        **fields,
    }


def write_run(folder: Path, episodes: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
    """A finished run; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rollouts.jsonl").write_bytes(b"".join(map(as_line, episodes)))
    settings = {"dataset": "made-up", "model": folder.name, "samples": None, **settings}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def answers(folder: Path, values: Sequence[Sequence[int]], **settings: Any) -> Path:
    """A run of question 0, 1, 2 ..., each answered rightly (1) or wrongly (0) as often as told."""
    rows = [episode(row, place, bool(v)) for row, of in enumerate(values) for place, v in enumerate(of)]
    return write_run(folder, rows, **settings)
