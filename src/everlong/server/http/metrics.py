"""Metrics for Prometheus: requests by route, and the shards; never an id of a user or an item."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everlong.server.engine.service import Service

SECONDS = (0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counters of requests; the shards are read at each scrape."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "everlong_request_seconds",
            "time of a request",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._requests = Counter(
            "everlong_requests", "requests", ["route", "status"], registry=self.registry
        )
        self.registry.register(_Shards(service))

        # finding a child by its labels takes longer than counting
        self._child = cache(lambda route: self._seconds.labels(route))
        self._counter = cache(lambda route, status: self._requests.labels(route, status))

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self._child(route).observe(seconds)
        self._counter(route, status).inc()


class Counting:
    """Counts requests and their times by route, never by what they contain."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            name = getattr(scope.get("route"), "path", "other")
            self.metrics.observe(name, status, time.perf_counter() - began)


class _Shards(Collector):
    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        service = self.service
        for name, about, values in (
            ("waiting_events", "events in the queue", [s.waiting for s in service.shards]),
            ("log_events", "events in the log", [s.log.total.events for s in service.shards]),
            ("last_offset", "the newest offset", [s.log.total.last for s in service.shards]),
            ("writable", "1 while the log can be written", [s.writable for s in service.shards]),
        ):
            gauge = GaugeMetricFamily(f"everlong_{name}", about, labels=["shard"])
            for number, value in enumerate(values):
                gauge.add_metric([str(number)], float(value))
            yield gauge
        yield GaugeMetricFamily("everlong_users", "users with a state", value=service.num_users)
        yield GaugeMetricFamily(
            "everlong_waiting_reads", "requests in the queue", value=service.reader.waiting
        )
        for name, about, total in (
            (
                "applied_events",
                "events read into states",
                [s.applied.events for s in service.shards],
            ),
            ("repeated_events", "deliveries again", [s.repeated for s in service.shards]),
            (
                "unread_events",
                "events of items that are not in the catalogue, or without fields that are read",
                [s.applied.unread for s in service.shards],
            ),
            (
                "late_events",
                "events older than one before",
                [s.applied.late for s in service.shards],
            ),
        ):
            yield CounterMetricFamily(f"everlong_{name}", about, value=float(sum(total)))
