"""Commands that serve on more than one process: deploy ray."""

import os
import threading
from typing import Any

import click

from hqc.commands.applies import Command, served_runtime
from hqc.commands.bench_serve import Between
from hqc.commands.options import runtime_option
from hqc.commands.serve import api_key, api_key_option, hosts, max_images_option, max_steps_option

__all__ = ["deploy"]


@click.group()
def deploy() -> None:
    """Serve a model on several processes or machines, by the framework that is named."""


@deploy.command("ray", cls=Command)
@click.argument("model")
@runtime_option
@click.option(
    "--replicas",
    type=Between("a number of replicas", 1024),
    default="1",
    show_default=True,
    help="Least and most, as 1-4: Ray scales between them by the requests under way.",
)
@click.option(
    "--cpus", type=click.IntRange(1, 1024), default=1, show_default=True, help="Of a replica, and its threads."
)
@click.option("--gpus", type=click.FloatRange(0, 64), default=0.0, show_default=True, help="Of one replica.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Of Ray's proxy; loopback by default.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--allowed-host", multiple=True, metavar="NAME", help="A name that the server is called by; may repeat.")
@api_key_option
@max_images_option
@max_steps_option
@click.option("--max-batch", type=click.IntRange(1, 256), default=8, show_default=True, help="Of one replica.")
@click.option("--max-queue", type=click.IntRange(0, 10_000), default=64, show_default=True, help="Of one replica.")
def deploy_ray(
    model: str,
    runtime: Any,
    replicas: tuple[int, int],
    cpus: int,
    gpus: float,
    host: str,
    port: int,
    allowed_host: tuple[str, ...],
    api_key_file: Any,
    max_images: int,
    max_steps: int,
    max_batch: int,
    max_queue: int,
) -> None:
    """Serve MODEL on Ray Serve, until Ctrl-C: replicas with a batching loop each, behind Ray's proxy.

    It joins the Ray cluster that RAY_ADDRESS names, or starts one on this machine. MODEL must be at this path on every
    node. Needs hqc[ray].
    """
    from hqc.integrations.ray import Resources, application, started
    from hqc.serving.guards import Rules
    from hqc.serving.limits import Limits

    served_runtime(model, runtime)  # before a cluster is started
    rules = Rules(hosts=hosts(host, allowed_host), api_key=api_key(api_key_file))
    limits = Limits(max_images=max_images, max_steps=max_steps, max_batch=max_batch, max_queue=max_queue)
    app = application(
        os.path.abspath(model) if os.path.exists(model) else model,
        runtime=runtime,
        replicas=replicas,
        resources=Resources(cpus, gpus),
        limits=limits,
        rules=rules,
    )
    with started(app, host, port):
        click.echo(f"Serving at http://{host}:{port} on Ray (POST /v1/images/generations). Stop with Ctrl-C.")
        threading.Event().wait()
