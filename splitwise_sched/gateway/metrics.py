"""What the gateway counts, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 6, 10, 30, 60)
_TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.5, 1)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 900)


class GatewayMetrics:
    """All in a registry of their own, so that several gateways may live in a process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix = "splitwise_gateway_"
        self.requests = Counter(
            f"{prefix}requests", "Requests by how they ended.", ("route", "outcome"), registry=self.registry
        )
        self.in_flight = Gauge(f"{prefix}in_flight", "Completion requests under way.", registry=self.registry)
        self.queue_rejects = Counter(
            f"{prefix}queue_rejects", "Requests refused because the queue was full.", registry=self.registry
        )
        self.unconfirmed_submits = Gauge(
            f"{prefix}unconfirmed_submits",
            "Requests that were queued without a replica's having them in time (--durability wait), since the start.",
            registry=self.registry,
        )
        self.prompt_tokens = Counter(f"{prefix}prompt_tokens", "Prompt tokens taken.", registry=self.registry)
        self.output_tokens = Counter(f"{prefix}output_tokens", "Output tokens given.", registry=self.registry)
        self.ttft = Histogram(
            f"{prefix}ttft_seconds", "Arrival to first token.", buckets=_TTFT_BUCKETS, registry=self.registry
        )
        self.tpot = Histogram(
            f"{prefix}tpot_seconds", "Mean time of an output token after the first.", buckets=_TPOT_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self.e2e = Histogram(
            f"{prefix}e2e_seconds", "Arrival to last token.", buckets=_E2E_BUCKETS, registry=self.registry
        )

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    @contextmanager
    def timing(self) -> Iterator[RequestTimer]:
        """Around one completion request, from its arrival."""
        timer = RequestTimer(self)
        with self.in_flight.track_inprogress():
            yield timer


class RequestTimer:
    """Times one request's tokens."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._arrived = time.monotonic()
        self._first: float | None = None
        self._num_tokens = 0

    def took_prompt(self, num_tokens: int) -> None:
        self._metrics.prompt_tokens.inc(num_tokens)

    def got_tokens(self, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        self._metrics.output_tokens.inc(num_tokens)
        self._num_tokens += num_tokens
        if self._first is None:
            self._first = time.monotonic()
            self._metrics.ttft.observe(self._first - self._arrived)

    def finished(self) -> None:
        """The answer is complete; answers that were broken off have no time per token."""
        now = time.monotonic()
        self._metrics.e2e.observe(now - self._arrived)
        if self._first is not None and self._num_tokens > 1:
            self._metrics.tpot.observe((now - self._first) / (self._num_tokens - 1))
