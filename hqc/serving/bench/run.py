"""The measurement: policies in turns, saturated and at shares of what one at a time can do."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from typing import Any

import numpy as np

from hqc.serving.bench.load import Answer, Arrival, arrivals, offered, saturated
from hqc.serving.bench.server import Source, serving
from hqc.serving.engine import Policy

__all__ = ["POLICIES", "Latency", "Measured", "Protocol", "ServeBench", "bench_serve", "latency_of"]

POLICIES: tuple[Policy, ...] = ("adaptive", "continuous", "static", "single")


@dataclass(frozen=True)
class Protocol:
    """What is asked.

    requests: of every measurement. steps: least and most denoising steps. shares: of the images a second that one at a
    time draws when it is saturated; at each of them requests arrive. previews: of every request.
    """

    requests: int = 64
    steps: tuple[int, int] = (10, 30)
    guidance_scale: float = 1.5
    shares: tuple[float, ...] = (0.5, 0.9, 1.3)
    max_batch: int = 8
    previews: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Latency:
    """Seconds from request to image, median and 95th percentile, and to the first preview, median; images a second."""

    p50_s: float
    p95_s: float
    first_p50_s: float | None
    images_per_s: float


@dataclass(frozen=True)
class Measured:
    """One policy: images a second when saturated, and the latencies by share of the load."""

    images_per_s: float
    latencies: Mapping[float, Latency]


@dataclass(frozen=True)
class ServeBench:
    """Of all policies; `rates` are requests a second by share."""

    model: str
    runtime: str
    protocol: Protocol
    rates: Mapping[float, float]
    policies: Mapping[str, Measured]
    threads: int | None
    lanes: int

    def ratio(self, policy: str) -> float:
        """Images a second against one at a time, saturated."""
        return self.policies[policy].images_per_s / self.policies["single"].images_per_s

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "model": self.model,
            "runtime": self.runtime,
            "threads": self.threads,
            "lanes": self.lanes,
            "protocol": asdict(self.protocol),
            "requests_per_s": {f"{share:g}": rate for share, rate in self.rates.items()},
            "policies": {
                name: {
                    "saturated_images_per_s": found.images_per_s,
                    "against_single": self.ratio(name),
                    "loads": {f"{share:g}": asdict(latency) for share, latency in found.latencies.items()},
                }
                for name, found in self.policies.items()
            },
        }


def bench_serve(
    name: str, source: Source, runtime: str, protocol: Protocol, on_done: Callable[[str, int], None]
) -> ServeBench:
    """Measures every policy: first saturated, then at the same arrivals.

    on_done: (what goes on, requests done of it).

    Raises:
        EvaluationError: if the server does not start, or answers with anything but images.
    """
    speeds: dict[str, float] = {}
    for policy in POLICIES:
        with serving(source, policy, protocol.max_batch) as port:
            coming = _warmed(port, protocol)
            told = _told(on_done, f"{policy}, saturated")
            speeds[policy] = saturated(port, coming, 2 * protocol.max_batch, told)
    rates = {share: share * speeds["single"] for share in protocol.shares}
    latencies: dict[str, dict[float, Latency]] = {policy: {} for policy in POLICIES}
    for policy in POLICIES:
        with serving(source, policy, protocol.max_batch) as port:
            base = _warmed(port, protocol)[0].body
            for share, rate in rates.items():
                coming = _requests(protocol, rate, base)
                told = _told(on_done, f"{policy}, {share:g} of the load")
                latencies[policy][share] = latency_of(offered(port, coming, told), coming[-1].at_s)
    found: dict[str, Measured] = {policy: Measured(speeds[policy], latencies[policy]) for policy in POLICIES}
    return ServeBench(name, runtime, protocol, rates, found, source.threads, source.lanes)


def latency_of(answers: Sequence[Answer], arrived_s: float) -> Latency:
    """Percentiles of the answers to requests that arrived within `arrived_s`."""
    done = np.array([answer.done_s for answer in answers])
    first = [answer.first_s for answer in answers if answer.first_s is not None]
    p50, p95 = (float(value) for value in np.percentile(done, (50, 95)))
    return Latency(p50, p95, float(np.median(first)) if first else None, len(answers) / (arrived_s + float(done[-1])))


def _base(port: int, protocol: Protocol) -> dict[str, Any]:
    """The body of every request, but for seed and steps: what the model must be asked with."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/health")
        takes = json.loads(connection.getresponse().read())["takes"]
    finally:
        connection.close()
    asked: dict[str, dict[str, Any]] = {"class_label": {"class_label": 0}, "prompt": {"prompt": "a cat"}, "nothing": {}}
    guidance = {"guidance_scale": protocol.guidance_scale} if "guidance_scale" in takes["fields"] else {}
    return {**asked[takes["kind"]], **guidance, "partial_images": protocol.previews if takes["previews"] else 0}


def _warmed(port: int, protocol: Protocol) -> list[Arrival]:
    """Requests to a server that has answered as many as it takes at once."""
    coming = _requests(protocol, 1.0, _base(port, protocol))
    saturated(port, coming[: protocol.max_batch], protocol.max_batch, lambda _: None)
    return coming


def _requests(protocol: Protocol, rate: float, base: dict[str, Any]) -> list[Arrival]:
    return arrivals(rate, protocol.requests, protocol.steps, base, protocol.seed)


def _told(on_done: Callable[[str, int], None], what: str) -> Callable[[int], None]:
    return lambda done: on_done(what, done)
