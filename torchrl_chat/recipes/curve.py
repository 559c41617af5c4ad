"""The learning curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_curve(
    path: Path, metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], title: str
) -> None:
    """Draw the pass rates of a run's batches and of its evaluations.

    Args:
        path: of the PNG.
        metrics: the lines of ``metrics.jsonl``.
        evaluations: the lines of ``evaluations.jsonl``.
        title: what stands above.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # no display, and no state of pyplot that others share
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for rows, style, label in ((metrics, "-", "batch"), (evaluations, "o", "evaluation")):
        shown = [row for row in rows if row.get("pass_rate") is not None]
        axis.plot(
            [row["step"] for row in shown], [row["pass_rate"] for row in shown], style, linewidth=1, label=label
        )
    axis.set(xlabel="step", ylabel="pass rate", ylim=(-0.02, 1.02), title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
