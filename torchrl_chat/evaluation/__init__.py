"""Evaluation that decides: a dataset played to its last row, figures with what they can be trusted for, and runs compared by question.

``torchrl-chat eval`` is its command line. :mod:`~torchrl_chat.evaluation.figures` and :mod:`~torchrl_chat.evaluation.pairs` are
numbers in, numbers out; :mod:`~torchrl_chat.evaluation.playing` plays and :mod:`~torchrl_chat.evaluation.runs` reads back;
:mod:`~torchrl_chat.evaluation.report` and :mod:`~torchrl_chat.evaluation.page` are what people see.

Example:
    >>> from torchrl_chat.evaluation import compared
    >>> found = compared([[1.0], [0.0], [0.0], [1.0]], [[1.0], [1.0], [1.0], [1.0]])
    >>> found.gained, found.lost, found.p
    (2, 0, 0.5)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.evaluation.figures import Figures
    from torchrl_chat.evaluation.pairs import Paired, compared
    from torchrl_chat.evaluation.playing import DatasetRun
    from torchrl_chat.evaluation.runs import Run, read_runs
    from torchrl_chat.evaluation.summary import summed_up

_HOMES = {
    "DatasetRun": "playing",
    "Figures": "figures",
    "Paired": "pairs",
    "Run": "runs",
    "compared": "pairs",
    "read_runs": "runs",
    "summed_up": "summary",
}

__all__ = ["DatasetRun", "Figures", "Paired", "Run", "compared", "read_runs", "summed_up"]

__getattr__, __dir__ = lazy(__name__, _HOMES)
