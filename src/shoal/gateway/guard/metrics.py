"""What the gateway counts, for Prometheus: `GET /metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from shoal.gateway.guard.admission import Admission

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one gateway."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "shoal_requests", "Requests that have ended.", ["endpoint", "status"], registry=self._registry
        )
        self.tokens = Counter("shoal_tokens", "Tokens read and generated.", ["model", "kind"], registry=self._registry)
        self.first_token = Histogram(
            "shoal_first_token_seconds",
            "From a request to the first piece of a stream.",
            ["model"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            "shoal_request_seconds", "How long requests took.", ["endpoint"], buckets=SECONDS, registry=self._registry
        )
        running = Gauge("shoal_requests_running", "Requests that run.", registry=self._registry)
        running.set_function(lambda: admission.num_running)
        waiting = Gauge("shoal_requests_waiting", "Requests that wait.", registry=self._registry)
        waiting.set_function(lambda: admission.num_waiting)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
