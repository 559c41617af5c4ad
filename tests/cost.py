"""How the cost of some work grows with its input: a ratio within one test, not a time, so that a busy machine changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable


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
