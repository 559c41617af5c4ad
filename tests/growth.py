"""How the cost of something grows with its input, measured in one test: no limit in seconds, which depend on the machine."""

from __future__ import annotations

import time
from collections.abc import Callable


def cpu_seconds(work: Callable[[], object], tries: int = 1) -> float:
    """The CPU time of the fastest try: other programs of the machine add to it, and take nothing off."""
    taken = []
    for _ in range(tries):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return min(taken)


def assert_linear(work: Callable[[str], object], text: str, factor: int = 16) -> None:
    """The whole text costs about ``factor`` times what a ``factor``-th of it costs; quadratic work ``factor**2`` times."""
    part = cpu_seconds(lambda: work(text[: len(text) // factor]), tries=3)
    whole = cpu_seconds(lambda: work(text))
    assert whole <= 4 * factor * max(part, 0.002), f"{part:.4f} s for 1/{factor} of it, {whole:.4f} s for the whole"
