"""The axon's metrics: counts and latencies for Prometheus, refusals in the log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, start_http_server
from prometheus_client import Counter as PrometheusCounter

from hiveminer.rpc.connections import bind_error

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOG_SECONDS = 60.0
BUCKET_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.1, 0.25, 1, 5, 20, 60, 300, 1200)


class RefusalLog:
    """Logs each kind of refusal once per `every_seconds`, with the number in between."""

    def __init__(
        self, *, every_seconds: float = LOG_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every_seconds = every_seconds
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
        self._next[kind] = now + self._every_seconds
        return True


class SilenceWatch:
    """Warns after each `quiet_seconds` without a validator's call: the axon may be unreachable."""

    def __init__(self, quiet_seconds: float) -> None:
        self._quiet_seconds = quiet_seconds
        self.last_call = time.monotonic()

    def heard(self) -> None:
        """Record a validator's call."""
        self.last_call = time.monotonic()

    async def watch(self, port: int) -> None:
        warned = 0.0
        while True:
            due = max(self.last_call, warned) + self._quiet_seconds
            now = time.monotonic()
            if now < due:
                await asyncio.sleep(due - now)
                continue
            warned = now
            log.warning(
                "no validator has called for %d minutes: if that goes on, see whether "
                "port %d can be reached from outside",
                (now - self.last_call) // 60,
                port,
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
        return int(self._server.server_port)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def close_socket(self) -> None:
        """Release the port in a forked child."""
        if self._server is not None:
            self._server.socket.close()
