"""What the server counts, in Prometheus' text format."""

import time
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from hqc.serving.engine import Engine
from hqc.serving.errors import Cancelled, Stopped, TimeUp
from hqc.serving.tickets import Ticket

__all__ = ["CONTENT_TYPE", "EngineMetrics", "ServerMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_STATUS: dict[type[BaseException], str] = {Cancelled: "cancelled", TimeUp: "time_limit", Stopped: "stopped"}


class ServerMetrics:
    """The page that Prometheus reads; every server has a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engines: dict[str, Engine] = {}
        self.registry.register(_Now(self._engines))
        self.requests = self._counter("hqc_requests", "Requests by how they ended.", "status")
        self.images = self._counter("hqc_images", "Images drawn for requests that succeeded.")
        self.latency = self._histogram("hqc_request_latency_seconds", "From a request to its last image.")
        self.queue = self._histogram("hqc_queue_time_seconds", "From a request to the start of its first image.")
        self.partial = self._histogram("hqc_time_to_first_partial_seconds", "From a request to its first preview.")
        self.step = self._histogram("hqc_step_latency_seconds", "One call of the denoiser.")
        self.batch = self._histogram("hqc_step_batch_size", "Images that shared a call.", _BATCHES)

    def watch(self, model: str, engine: Engine) -> None:
        """Also tells how many images run, how many requests wait and what steps cost, at the moment of reading."""
        self._engines[model] = engine

    def page(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, ["model", *labels], registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(name, what, ["model"], buckets=buckets, registry=self.registry)


class EngineMetrics:
    """The observer of one model's engine."""

    def __init__(self, server: ServerMetrics, model: str) -> None:
        self._server, self._model = server, model

    def step(self, images: int, rows: int, seconds: float) -> None:
        """See `Observer`."""
        self._server.batch.labels(self._model).observe(images)
        self._server.step.labels(self._model).observe(seconds)

    def ended(self, ticket: Ticket, error: BaseException | None) -> None:
        """See `Observer`."""
        self._count("ok" if error is None else _STATUS.get(type(error), "failed"))
        self._server.queue.labels(self._model).observe(ticket.queue_s)
        if error is None:
            self._server.images.labels(self._model).inc(len(ticket.begins))
            self._server.latency.labels(self._model).observe(ticket.queue_s + ticket.run_s)

    def refused(self) -> None:
        """A request found the line full."""
        self._count("refused")

    def first_partial(self, since: float) -> None:
        """A request of that moment (`time.monotonic`) has its first preview."""
        self._server.partial.labels(self._model).observe(time.monotonic() - since)

    def _count(self, status: str) -> None:
        self._server.requests.labels(self._model, status).inc()


class _Now(Collector):
    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[GaugeMetricFamily]:
        running = GaugeMetricFamily("hqc_requests_running", "Images under way.", labels=["model"])
        waiting = GaugeMetricFamily("hqc_requests_waiting", "Requests of which no image has begun.", labels=["model"])
        limit = GaugeMetricFamily("hqc_batch_limit", "Images that would share calls if many waited.", labels=["model"])
        fixed = GaugeMetricFamily("hqc_step_fixed_seconds", "Of a step, whatever shares it.", labels=["model"])
        each = GaugeMetricFamily("hqc_step_row_seconds", "Of a step, for every row a lane.", labels=["model"])
        for model, engine in self._engines.items():
            running.add_metric([model], engine.running)
            waiting.add_metric([model], engine.waiting)
            limit.add_metric([model], engine.limit)
            if (cost := engine.cost) is not None:
                fixed.add_metric([model], cost.fixed)
                each.add_metric([model], cost.each)
        return running, waiting, limit, fixed, each
