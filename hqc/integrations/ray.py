"""Ray Serve: a model on several replicas, each with a batching loop of its own.

    from hqc.integrations.ray import application

    serve.run(application("trained-onnx", replicas=(1, 4)))

A replica is the application of `hqc serve` in a process of its own; Ray's proxy spreads requests, starts replicas anew
that die or whose engine has failed, and scales them by the requests that are under way.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hqc.errors import OptionError, RuntimeMissingError
from hqc.serving.errors import ServingError
from hqc.serving.guards import Rules
from hqc.serving.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

    from hqc.runtimes import Runtime

try:
    from ray import serve
except ModuleNotFoundError as error:
    raise RuntimeMissingError("Ray Serve", "ray is not installed", "pip install 'hqc[ray]'") from error

__all__ = ["Resources", "application", "started"]

HEALTH_S = 10.0


@dataclass(frozen=True)
class Resources:
    """Of one replica: cores, which are the threads of a runtime's call too, and GPUs."""

    cpus: int = 1
    gpus: float = 0.0


def application(
    model: str,
    *,
    runtime: "Runtime | None" = None,
    replicas: tuple[int, int] = (1, 1),
    resources: Resources | None = None,
    limits: Limits | None = None,
    rules: Rules | None = None,
) -> Any:
    """An application for `serve.run`: `model`, whatever `hqc serve` takes, which every node must have at this path.

    replicas: the least and the most; Ray scales between them so that a replica has about as many requests as its batch
    has images. limits: of every replica; a request that finds all lines full waits in Ray's proxy. rules: as for `hqc
    serve`; Ray's proxy hands on the `Host` that the client sent.

    Raises:
        OptionError: unless 1 <= replicas[0] <= replicas[1].
    """
    if not 1 <= replicas[0] <= replicas[1]:
        found = f"from {replicas[0]} to {replicas[1]}"
        raise OptionError("replicas", found, "Give at least one, and no fewer at the most than at the least.")
    resources, limits, rules = resources or Resources(), limits or Limits(), rules or Rules()
    ingress = serve.ingress(_builder(model, runtime, resources, limits, rules))
    deployment = serve.deployment(
        ingress(_Replica),
        name="hqc",
        max_ongoing_requests=limits.max_batch + limits.max_queue,
        ray_actor_options={"num_cpus": resources.cpus, "num_gpus": resources.gpus},
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=limits.shutdown_s + HEALTH_S,
        **_scaling(replicas, limits.max_batch),
    )
    return deployment.bind()


@contextmanager
def started(app: Any, host: str, port: int) -> Iterator[None]:
    """An application on Ray Serve while inside; a cluster that was started for it ends with it.

    Raises:
        ServingError: if Ray cannot start it.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = not ray.is_initialized() and "RAY_ADDRESS" not in os.environ
    try:
        ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": host, "port": port})
        serve.run(app, name="hqc")
    except (RuntimeError, OSError, ray.exceptions.RayError) as error:
        said = " ".join(str(error).split())[:160]
        raise ServingError("Ray Serve", f"could not start it ({said})", "See Ray's logs below /tmp/ray.") from error
    try:
        yield
    finally:
        serve.delete("hqc")
        if own:
            serve.shutdown()
            ray.shutdown()


class _Replica:
    """What Ray asks a replica besides its requests."""

    app: "FastAPI"  # from Ray's wrapper

    def check_health(self) -> None:
        """Raises if the engine takes no requests: the replica is started anew."""
        if not all(engine.alive for engine in self.app.state.engines):
            raise RuntimeError("the engine has stopped; the replica's log has why")


def _scaling(replicas: tuple[int, int], max_batch: int) -> dict[str, Any]:
    least, most = replicas
    if least == most:
        return {"num_replicas": least}
    scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": max_batch}
    return {"autoscaling_config": scaling}


def _builder(
    model: str, runtime: "Runtime | None", resources: Resources, limits: Limits, rules: Rules
) -> "Callable[[], FastAPI]":
    """What builds the application in a replica; it is sent there whole."""

    def build() -> "FastAPI":
        from hqc.serving.app import create_app
        from hqc.serving.opening import opened

        return create_app([opened(model, runtime, cores=resources.cpus)], limits=limits, rules=rules)

    return build
