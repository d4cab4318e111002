"""Prometheus' counters. With several workers they are kept in files that all share, in prometheus_client's multiprocess mode."""

import os
import time
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own; server.py sets it before workers start
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


class Metrics:
    """What ``/metrics`` tells: of this process, or of all workers where they share a folder."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self):
        self.registry = CollectorRegistry()
        options = {"namespace": "roberta_fast", "registry": self.registry}
        self.requests = Counter("requests", "requests by path and status", ["path", "status"], **options)
        self.seconds = Histogram("request_seconds", "from request to response", ["path"], buckets=SECONDS, **options)
        self.queue_seconds = Histogram("queue_seconds", "until a request's first batch", buckets=SECONDS, **options)
        self.batch_seconds = Histogram("batch_seconds", "of the model, a batch", buckets=SECONDS, **options)
        self.batch_tokens = Histogram("batch_tokens", "real tokens in a batch", buckets=TOKENS, **options)
        self.batch_sequences = Histogram("batch_sequences", "sequences in a batch", buckets=TOKENS, **options)
        self.in_flight = Gauge("requests_in_flight", "admitted and not answered", multiprocess_mode="livesum", **options)
        self.disconnects = Counter("disconnects", "requests whose client went away", **options)
        folder = os.environ.get(SHARED_FOLDER)
        if folder:
            _forget_dead_workers(Path(folder))

    def observe_batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """Counts a batch."""
        self.batch_sequences.observe(sequences)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        if SHARED_FOLDER not in os.environ:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)


def _forget_dead_workers(folder):
    """Gauges of a worker that was killed would count for ever."""
    for file in folder.glob("gauge_live*_*.db"):
        worker = int(file.stem.rpartition("_")[2])
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            mark_process_dead(worker, path=str(folder))


class Measured:
    """ASGI middleware that counts requests, by the path of their route, and times them."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, begun = 500, time.monotonic()

        async def watched_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        finally:
            # A path that no route has is the client's own text.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - begun)
