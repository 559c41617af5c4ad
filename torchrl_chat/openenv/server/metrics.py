"""Counters of a server, and their text for Prometheus (exposition format 0.0.4)."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_PREFIX = "torchrl_chat_openenv_"
_HELP = {
    "requests_total": "Requests answered, by kind.",
    "errors_total": "Error replies, by code.",
    "sessions_opened_total": "Sessions opened.",
    "sessions_closed_total": "Sessions closed, by reason.",
    "bytes_sent_total": "Bytes of replies over WebSockets.",
    "refused_total": "Requests refused before they reached a session, by reason.",
}


class Metrics:
    """What a server counts. Used from its event loop only."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self._times = [0] * (len(_BUCKETS) + 1)
        self._seconds = 0.0

    def count(self, name: str, label: str = "", amount: int = 1) -> None:
        """Add to a counter; ``label`` is ``key="value"``."""
        self._counts[name, label] += amount

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a value that is looked up when it is asked for."""
        self._gauges[name] = text, value

    def took(self, seconds: float) -> None:
        """Note how long a step or reset took."""
        self._times[bisect.bisect_left(_BUCKETS, seconds)] += 1
        self._seconds += seconds

    def total(self, name: str, label: str | None = None) -> int:
        """The sum of a counter over its labels, or under one of them."""
        return sum(count for (key, tag), count in self._counts.items() if key == name and label in (None, tag))

    def text(self) -> str:
        """All of it, as Prometheus reads it."""
        lines = []
        for name, (text, value) in self._gauges.items():
            lines += [
                f"# HELP {_PREFIX}{name} {text}",
                f"# TYPE {_PREFIX}{name} gauge",
                f"{_PREFIX}{name} {value():g}",
            ]
        for name, text in _HELP.items():
            lines += [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} counter"]
            found = sorted((label, count) for (key, label), count in self._counts.items() if key == name)
            lines += [
                f"{_PREFIX}{name}{{{label}}} {count}" if label else f"{_PREFIX}{name} {count}"
                for label, count in found
            ]
        name, total = f"{_PREFIX}step_seconds", 0
        lines += [f"# HELP {name} Time of a step or reset.", f"# TYPE {name} histogram"]
        for bound, count in zip((*map(str, _BUCKETS), "+Inf"), self._times, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return "\n".join([*lines, f"{name}_sum {self._seconds:g}", f"{name}_count {total}", ""])
