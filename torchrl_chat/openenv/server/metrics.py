"""Counters of a server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_PREFIX = "torchrl_chat_openenv_"
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_COUNTERS = {
    "requests_total": ("Requests answered, by kind.", ["kind"]),
    "errors_total": ("Error replies, by code.", ["code"]),
    "sessions_opened_total": ("Sessions opened.", []),
    "sessions_closed_total": ("Sessions closed, by reason.", ["reason"]),
    "bytes_sent_total": ("Bytes of replies over WebSockets.", []),
    "refused_total": ("Requests refused before they reached a session, by reason.", ["reason"]),
}


class Metrics:
    """What a server counts, in a registry of its own: servers of one process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counters = {
            name: Counter(_PREFIX + name, text, labels, registry=self._registry)
            for name, (text, labels) in _COUNTERS.items()
        }
        self._seconds = Histogram(
            _PREFIX + "step_seconds", "Time of a step or reset.", buckets=_BUCKETS, registry=self._registry
        )

    def count(self, name: str, amount: int = 1, **label: str) -> None:
        """Add to a counter, under its label if it has one: ``count("errors_total", code="INTERNAL")``."""
        counter = self._counters[name]
        (counter.labels(**label) if label else counter).inc(amount)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a value that is looked up when it is asked for."""
        Gauge(_PREFIX + name, text, registry=self._registry).set_function(value)

    def took(self, seconds: float) -> None:
        """Note how long a step or reset took."""
        self._seconds.observe(seconds)

    def total(self, name: str, **label: str) -> int:
        """The sum of a counter over its labels, or under one of them."""
        [family] = self._counters[name].collect()
        found = [sample for sample in family.samples if sample.name.endswith("_total")]
        return int(sum(sample.value for sample in found if label.items() <= sample.labels.items()))

    def text(self) -> str:
        """All of it, as Prometheus reads it (exposition format 0.0.4)."""
        return generate_latest(self._registry).decode()
