"""The axon's metrics: counts and latencies for Prometheus, refusals in the log."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, start_http_server
from prometheus_client import Counter as PrometheusCounter

from hiveminer.rpc.connections import bind_error, close_in_children

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOG_SECONDS = 60.0
QUIET_SECONDS = 600.0
BUCKET_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.1, 0.25, 1, 5, 20, 60, 300, 1200)


class RefusalLog:
    """Logs each kind of refusal once per LOG_SECONDS, with the number in between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next: dict[str, float] = {}
        self._skipped: Counter[str] = Counter()

    def refused(self, kind: str, reason: str, ip: str) -> None:
        if self._due(kind):
            more = f"{self._skipped.pop(kind, 0)} more since the last such line"
            log.warning("refused (%s): %s, from %s; %s", kind, reason, ip, more)

    def failed(self, error: Exception) -> None:
        """Log a bug with its traceback."""
        if self._due("traceback"):
            log.error("a request failed", exc_info=error)

    def _due(self, kind: str) -> bool:
        now = self._clock()
        if now < self._next.get(kind, now):
            self._skipped[kind] += 1
            return False
        self._next[kind] = now + LOG_SECONDS
        return True


class SilenceWatch:
    """Warns after each QUIET_SECONDS without a validator's call: the axon may be unreachable."""

    def __init__(self, *, port: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._port = port
        self._clock = clock
        self.last_call = self._warned = clock()

    def heard(self) -> None:
        """Record a validator's call."""
        self.last_call = self._clock()

    def check(self) -> None:
        """Warn if it is time; called about once a second."""
        now = self._clock()
        if now - max(self.last_call, self._warned) < QUIET_SECONDS:
            return
        self._warned = now
        log.warning(
            "no validator has called for %d minutes: if that goes on, see whether "
            "port %d can be reached from outside",
            (now - self.last_call) // 60,
            self._port,
        )


class AxonMetrics:
    """Counts and latencies, also for Prometheus, and refusals in the log."""

    def __init__(self, *, connections: Callable[[], float]) -> None:
        registry = self._registry = CollectorRegistry()
        self.counts: Counter[str] = Counter()
        self.log = RefusalLog()
        Gauge("hiveminer_axon_connections", "Open connections", registry=registry).set_function(
            connections
        )
        self._requests = PrometheusCounter(
            "hiveminer_axon_requests",
            "Requests and connections by how they ended",
            ["kind"],
            registry=registry,
        )
        self._seconds = Histogram(
            "hiveminer_axon_seconds",
            "From a verified request's header to its answer, waiting and work included",
            ["synapse"],
            buckets=BUCKET_SECONDS,
            registry=registry,
        )
        self._server: Any = None

    def count(self, kind: str, reason: str = "", ip: str = "") -> None:
        """Count how a request or connection ended; with a reason it is a refusal."""
        self.counts[kind] += 1
        self._requests.labels(kind).inc()
        if reason:
            self.log.refused(kind, reason, ip)

    def observe(self, synapse: str, seconds: float) -> None:
        self._seconds.labels(synapse).observe(seconds)

    def serve(self, port: int) -> int:
        """Serve /metrics on the loopback address; returns the port. Raises `OperatorError`."""
        try:
            self._server, _ = start_http_server(port, addr=LOOPBACK, registry=self._registry)
        except OSError as error:
            raise bind_error(error, "--axon.metrics_port", LOOPBACK, port) from None
        close_in_children(self._server.socket)
        return int(self._server.server_port)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
