"""The command that serves models over HTTP."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command, served_runtime
from hqc.commands.options import runtime_option, scheduler_option
from hqc.errors import OptionError
from hqc.serving.limits import Limits

if TYPE_CHECKING:
    from hqc.runtimes import Runtime
    from hqc.serving.app import Served

__all__ = ["api_key", "api_key_option", "hosts", "max_images_option", "max_steps_option", "serve"]

KEY_VARIABLE = "HQC_API_KEY"
_LONGEST_KEY_FILE = 4096
_AS_MANY = "as many as pay, by what its first steps cost (hqc_batch_limit in /metrics)."


api_key_option = click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The key that requests must send; {KEY_VARIABLE} in the environment does the same.",
)

max_images_option = click.option(
    "--max-images",
    type=click.IntRange(1, 64),
    default=Limits.max_images,
    show_default=True,
    help="Images of one request.",
)
max_steps_option = click.option(
    "--max-steps",
    type=click.IntRange(1, 10_000),
    default=Limits.max_steps,
    show_default=True,
    help="Denoising steps of one request; the scheduler may take fewer.",
)

threads_option = click.option(
    "--threads", type=click.IntRange(1, 256), help="Of one call of the denoiser (default: the runtime's own choice)."
)
lanes_option = click.option(
    "--lanes",
    type=click.IntRange(1, 64),
    help="Calls of the denoiser side by side, each for a part of the images (default: 2 on onnxruntime where --threads "
    "is not given, else 1).",
)


@click.command(cls=Command)
@click.argument("model")
@runtime_option
@click.option(
    "--against",
    metavar="MODEL",
    help="Serve this model too, as the float one of MODEL: requests name it by `model`, the page shows both.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Loopback by default.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--allowed-host", multiple=True, metavar="NAME", help="A name that the server is called by; may repeat.")
@click.option("--cors-origin", multiple=True, metavar="URL", help="Pages of this origin may ask; may repeat.")
@api_key_option
@max_images_option
@max_steps_option
@click.option(
    "--max-batch",
    type=click.IntRange(1, 256),
    default=Limits.max_batch,
    show_default=True,
    help="Images under way at once.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(0, 10_000),
    default=Limits.max_queue,
    show_default=True,
    help="Requests that wait.",
)
@click.option(
    "--max-body-bytes",
    type=click.IntRange(1024, 2**30),
    default=Limits.max_body_bytes,
    show_default=True,
    help="Size of a request's body.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1, 65_536),
    default=Limits.max_connections,
    show_default=True,
    help="Open at once; fewer where the process may open fewer files.",
)
@click.option(
    "--batching",
    type=click.Choice(["adaptive", "continuous", "static", "single"]),
    default="adaptive",
    show_default=True,
    help="When a waiting image joins: at any step while sharing pays, at any step, once all others have ended, or "
    "alone.",
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(1, 86_400),
    default=Limits.request_s,
    show_default=True,
    help="Seconds a request.",
)
@click.option(
    "--shutdown-grace",
    type=click.FloatRange(0, 3600),
    default=Limits.shutdown_s,
    show_default=True,
    help="Seconds that what runs may go on after a signal.",
)
@threads_option
@lanes_option
@scheduler_option
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep there what a runtime makes of the model for this machine (ONNX Runtime's optimised model, engines, "
    "torch-int8's compiled code): later starts are quicker.",
)
def serve(
    model: str,
    runtime: "Runtime | None",
    against: str | None,
    host: str,
    port: int,
    allowed_host: tuple[str, ...],
    cors_origin: tuple[str, ...],
    api_key_file: Path | None,
    max_images: int,
    max_steps: int,
    max_batch: int,
    max_queue: int,
    max_body_bytes: int,
    max_connections: int,
    batching: Any,
    request_timeout: float,
    shutdown_grace: float,
    threads: int | None,
    lanes: int | None,
    scheduler: str | None,
    cache_dir: Path | None,
) -> None:
    """Serve MODEL over HTTP: POST /v1/images/generations in the shape of the OpenAI images API, and a page at /.

    MODEL is an export, a Program, `digits`, or an exported pipeline, which is served without torch. A request gives a
    prompt, a class label, or neither, as MODEL's pipeline needs: GET /health says which. Requests share calls of the
    denoiser at every step, whatever their steps, guidance and schedulers; an image does not depend on what is beside
    it.
    """
    from hqc.serving.app import create_app
    from hqc.serving.guards import Rules
    from hqc.serving.opening import opened
    from hqc.serving.server import print_url, reserved_socket
    from hqc.serving.server import serve as run

    rules = Rules(hosts=hosts(host, allowed_host), api_key=api_key(api_key_file))
    limits = Limits(
        max_images=max_images,
        max_steps=max_steps,
        max_batch=max_batch,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        max_connections=max_connections,
        request_s=request_timeout,
        shutdown_s=shutdown_grace,
    )

    def announce(url: str) -> None:
        print_url(url)
        if batching == "adaptive":
            click.echo(f"Up to {max_batch} images share calls of the denoiser: {_AS_MANY}")

    with reserved_socket(host, port) as reserved:  # before a model is read, which may take minutes
        served_runtime(model, runtime)
        served = [opened(model, runtime, threads=threads, lanes=lanes, cache=cache_dir, scheduler=scheduler)]
        if against is not None:
            served.append(_other(opened(against, threads=threads, cache=cache_dir, scheduler=scheduler), served[0]))
        app = create_app(served, limits=limits, rules=rules, policy=batching, cors_origins=cors_origin)
        run(app, limits=limits, announce=announce, reserved=reserved)


def _other(second: "Served", first: "Served") -> "Served":
    """The model beside the first, which takes the same requests, under a name of its own."""
    if second.backend.needs.kind != first.backend.needs.kind or second.backend.needs.size != first.backend.needs.size:
        raise OptionError(
            f"--against {second.name}",
            f"draws {second.backend.needs.size} px from {second.backend.needs.kind}, "
            f"{first.name} {first.backend.needs.size} px from {first.backend.needs.kind}",
            "Give the model that it was quantised from.",
        )
    return replace(second, name=f"{second.name}-2") if second.name == first.name else second


def hosts(host: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Names that the Host header may have: loopback's, the address that is listened on, and those that are allowed."""
    from hqc.serving.guards import LOOPBACK

    own = f"[{host}]" if ":" in host else host
    return tuple(dict.fromkeys((*LOOPBACK, own, *allowed)))


def api_key(file: Path | None) -> str | None:
    """The key of a file or of the environment; None where neither is given.

    Raises:
        OptionError: for a file that cannot be read, or holds no key.
    """
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
        where, do = KEY_VARIABLE, "Set it to a key, or not at all."
    else:
        where, do = f"--api-key-file {file}", "Write the key into it, one line of printable ASCII."
        try:
            with file.open("rb") as opened:
                key = opened.read(_LONGEST_KEY_FILE).decode("utf-8", "replace").strip()
        except OSError as error:
            raise OptionError(where, f"cannot be read ({error.strerror})", do) from error
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise OptionError(where, "holds no key", do)
    return key
