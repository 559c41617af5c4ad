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


def grows_linearly(work: Callable[[str], object], make: Callable[[int], str], size: int) -> bool:
    """Whether four times the input costs about four times the CPU time; quadratic work costs sixteen times.

    Each try has a text of its own, as answers are cached by their text. What takes less than 20 ms is not told apart from
    the noise: with an input that is long enough, quadratic work takes seconds.

    Args:
        work: what is measured.
        make: a text of about so many characters.
        size: characters of the longer text.
    """
    for attempt in range(5):
        spent = []
        for length in (size // 4, size):
            text = make(length) + " " * attempt
            start = time.process_time()
            work(text)
            spent.append(time.process_time() - start)
        if spent[1] <= max(8 * spent[0], 0.02):
            return True
    return False
