"""What a server counts, for Prometheus: the one way of the OpenEnv server and of the gateway.

Counting is adding to a plain number; what Prometheus reads is made of the numbers when it asks. So a request pays a fraction of a
microsecond for it. Law of this file: a server counts in the thread of its event loop only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
"""The content type of :meth:`Metrics.text`."""
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
"""The upper bounds of the buckets of a histogram, in seconds, unless it has its own."""
Values = Mapping[tuple[str, ...], float]


class Metrics:
    """What a server counts, in a registry of its own: servers of one process do not mix.

    Args:
        prefix: how the names of its metrics begin.
        counters: the text and the labels of each counter; the names end in ``_total``.
        histograms: the text of each histogram of seconds; the names end in ``_seconds``.
        buckets: their upper bounds, in seconds.

    Example:
        >>> metrics = Metrics("door_", {"knocks_total": ("Knocks, by hand.", ["hand"])})
        >>> metrics.count("knocks_total", hand="left")
        >>> 'door_knocks_total{hand="left"} 1.0' in metrics.text()
        True
    """

    def __init__(
        self,
        prefix: str,
        counters: Mapping[str, tuple[str, list[str]]],
        histograms: Mapping[str, str] | None = None,
        buckets: tuple[float, ...] = BUCKETS,
    ):
        self._prefix, self._counters, self._histograms = prefix, counters, dict(histograms or {})
        self._buckets = buckets
        self._counts: dict[str, dict[tuple[str, ...], float]] = {
            name: {} if labels else {(): 0} for name, (_, labels) in counters.items()
        }
        self._seconds = {name: [0] * (len(buckets) + 1) for name in self._histograms}
        self._sums = dict.fromkeys(self._histograms, 0.0)
        self._asked: list[tuple[Callable[..., Any], str, str, list[str], Callable[[], Any]]] = []
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def count(self, name: str, amount: float = 1, **label: str) -> None:
        """Add to a counter, under its labels if it has some: ``count("errors_total", code="INTERNAL")``."""
        counts, key = self._counts[name], tuple([label[each] for each in self._counters[name][1]])
        counts[key] = counts.get(key, 0) + amount

    def took(self, name: str, seconds: float) -> None:
        """Note in a histogram how long something took."""
        self._seconds[name][bisect_left(self._buckets, seconds)] += 1
        self._sums[name] += seconds

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a value that is looked up when it is asked for."""
        self._asked.append((GaugeMetricFamily, name, text, [], lambda: {(): value()}))

    def counter(self, name: str, text: str, labels: list[str], values: Callable[[], Values]) -> None:
        """Show counts that are kept elsewhere, and looked up when they are asked for: a number for the values of the labels."""
        self._asked.append((CounterMetricFamily, name, text, labels, values))

    def total(self, name: str, **label: str) -> int:
        """The sum of a counter over its labels, or under some of them."""
        _, names = self._counters[name]
        wanted = label.items()
        return int(
            sum(
                n
                for key, n in [*self._counts[name].items()]
                if wanted <= dict(zip(names, key, strict=True)).items()
            )
        )

    def text(self) -> str:
        """All of it, as Prometheus reads it (exposition format 0.0.4)."""
        return generate_latest(self._registry).decode()

    # ------------------------------------------------------------------ what the registry asks for
    def describe(self) -> Iterable[Metric]:
        """Nothing: or the registry would collect what the server is not ready to tell yet."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The families of metrics, as they stand now."""
        for name, (text, labels) in self._counters.items():
            yield self._family(CounterMetricFamily, name, text, labels, self._counts[name])
        for name, text in self._histograms.items():
            family, counts = HistogramMetricFamily(self._prefix + name, text), self._seconds[name]
            below = [sum(counts[: i + 1]) for i in range(len(counts))]
            bounds = [*map(repr, map(float, self._buckets)), "+Inf"]
            family.add_metric([], [*zip(bounds, below, strict=True)], self._sums[name])
            yield family
        for kind, name, text, labels, values in self._asked:
            yield self._family(kind, name, text, labels, values())

    def _family(self, kind: Callable[..., Any], name: str, text: str, labels: list[str], values: Values) -> Metric:
        family = kind(self._prefix + name, text, labels=labels)
        for key, value in list(values.items()):
            family.add_metric(key, value)
        return family
