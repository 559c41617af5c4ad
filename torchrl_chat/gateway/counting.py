"""What a gateway counts, for Prometheus at ``/metrics``.

Most of it is counted by the sessions anyway and is added up when Prometheus asks; only statuses and seconds are noted call by call.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from torchrl_chat.gateway.table import Table
from torchrl_chat.openenv.server.metrics import Metrics

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_COUNTERS = {
    "calls_total": ("Requests of agents, by dialect and HTTP status; 499: the client left.", ["dialect", "status"]),
}
_SECONDS = {
    "call_seconds": "Time of an agent's request, until its whole answer is handed on.",
    "engine_seconds": "Time until all answers to a request were sampled, waiting for the engine included.",
}
_BEGINNINGS = ("begins", "forks", "restarts")
"""Why a sequence of a session begins, as sessions report it."""
LEFT = 499  # as nginx writes it down


class Counting:
    """The metrics of a gateway.

    Args:
        table: its sessions.
    """

    def __init__(self, table: Table):
        self._table = table
        self._metrics = metrics = Metrics("torchrl_chat_gateway_", _COUNTERS, _SECONDS, _BUCKETS)
        metrics.gauge("sessions", "Sessions open now.", lambda: len(table.open))
        metrics.gauge("sessions_max", "Sessions that may be open.", lambda: table.limits.max_sessions)
        metrics.gauge("calls_flying", "Requests on their way.", lambda: sum(s.flying for s in self._open()))
        engine: Any = table.engine
        if hasattr(engine, "waiting"):  # one that batches; a server knows its own queue
            metrics.gauge("engine_queue", "Answers that wait for the engine to begin.", lambda: engine.waiting)
        metrics.counter("sessions_opened_total", "Sessions made.", [], lambda: {(): self._count("sessions")})
        metrics.counter("sessions_finished_total", "Sessions finished, by stop reason.", ["stop"], self._stops)
        metrics.counter("answers_total", "Answers sampled.", [], lambda: {(): self._count("answers")})
        metrics.counter("tokens_total", "Tokens, of prompts and sampled.", ["kind"], self._tokens)
        metrics.counter("sequences_total", "Sequences begun, by why.", ["reason"], self._sequences)
        metrics.counter("events_total", "What else sessions report: retries, errors ...", ["kind"], self._events)

    def call(self, dialect: str, status: int, begun: float) -> None:
        """Count a request of an agent.

        Args:
            dialect: what it was spoken in.
            status: the status that was answered.
            begun: when it came, by ``time.perf_counter``.
        """
        self._metrics.count("calls_total", dialect=dialect, status=str(status))
        self._metrics.took("call_seconds", time.perf_counter() - begun)

    def sampled(self, seconds: float) -> None:
        """Note how long the engine took for a request."""
        self._metrics.took("engine_seconds", seconds)

    def text(self) -> str:
        """All of it, as Prometheus reads it."""
        return self._metrics.text()

    # ------------------------------------------------------------------ what sessions have counted
    def _open(self) -> list[Any]:
        return [*self._table.open.values()]

    def _counts(self) -> Counter[str]:
        found = Counter(self._table.past)
        for session in self._open():
            found.update(session.counts())
        return found

    def _count(self, name: str) -> int:
        return self._counts()[name]

    def _tokens(self) -> dict[tuple[str, ...], float]:
        found = self._counts()
        return {(kind,): found[f"{kind} tokens"] for kind in ("prompt", "sampled")}

    def _sequences(self) -> dict[tuple[str, ...], float]:
        found = self._counts()
        return {(reason,): found[f"report: {reason}"] for reason in _BEGINNINGS}

    def _events(self) -> dict[tuple[str, ...], float]:
        others = {
            name.removeprefix("report: "): n for name, n in self._counts().items() if name.startswith("report: ")
        }
        return {(name,): n for name, n in sorted(others.items()) if name not in _BEGINNINGS}

    def _stops(self) -> dict[tuple[str, ...], float]:
        return {(word,): n for word, n in sorted(self._table.stops.items())}
