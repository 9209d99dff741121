"""The gateway's own metrics, and those of the node for the same page.

This list is the reference; docs/DISAGGREGATION.md quotes it.
"""

from __future__ import annotations

import asyncio
import http.client
from concurrent.futures import Executor

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

NODE_METRICS_BYTES_MAX = 8 << 20
NODE_METRICS_SECONDS_MAX = 5.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# They double, as those of the node, from 1 ms to 1,049 s.
_SECONDS = tuple(0.001 * 2**i for i in range(21))


class Metrics:
    """Counters of one gateway."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "pbs_gateway_requests",
            "Requests that ended, by route and HTTP status; 499 is a client that left",
            ("route", "status"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "pbs_gateway_request_time_seconds",
            "Time from a request's headers to its reply, by route",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.prepare_seconds = Histogram(
            "pbs_gateway_prepare_time_seconds",
            "Time to read a body, render the chat template and make token ids",
            buckets=_SECONDS,
            registry=registry,
        )
        self.running = Gauge(
            "pbs_gateway_requests_running",
            "Requests that are answered now",
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "pbs_gateway_prompt_tokens",
            "Prompt tokens of requests that were answered",
            registry=registry,
        )
        self.released = Counter(
            "pbs_gateway_leases_released",
            "Caches that the gateway freed because the client had left",
            registry=registry,
        )
        self.failovers = Counter(
            "pbs_gateway_failovers",
            "Requests that went to a further node because one was not available",
            registry=registry,
        )
        self.node_metrics_up = Gauge(
            "pbs_gateway_node_metrics_up",
            "1 if this page has the node's metrics",
            registry=registry,
        )

    def text(self) -> bytes:
        """The gateway's own part of the page."""
        return generate_latest(self._registry)


class NodeMetrics:
    """The node's page, at HOST:PORT."""

    def __init__(self, address: str, executor: Executor) -> None:
        """`address` is HOST:PORT; "" is none."""
        self._address, self._executor = address, executor
        self._lock = asyncio.Lock()

    async def text(self) -> bytes | None:
        """The page; None when there is none or it cannot be read."""
        if not self._address:
            return None
        async with self._lock:  # one connection at a time
            loop = asyncio.get_running_loop()
            try:
                return await loop.run_in_executor(self._executor, self._read)
            except (OSError, http.client.HTTPException):
                return None

    def _read(self) -> bytes:
        connection = http.client.HTTPConnection(
            self._address, timeout=NODE_METRICS_SECONDS_MAX
        )
        try:
            connection.request("GET", "/metrics")
            reply = connection.getresponse()
            page = reply.read(NODE_METRICS_BYTES_MAX + 1)
        finally:
            connection.close()
        if reply.status != 200 or len(page) > NODE_METRICS_BYTES_MAX:
            raise OSError("no page of metrics")
        return page if page.endswith(b"\n") else page + b"\n"
