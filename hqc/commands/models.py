"""Commands that run models: sample, eval, serve."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command, check_runtime
from hqc.commands.options import (
    check_writable,
    force_option,
    json_option,
    runtime_option,
    sampler_options,
)
from hqc.errors import ComparisonError

if TYPE_CHECKING:
    from hqc.evaluation.sampling import Samples
    from hqc.runtimes import Runtime

__all__ = ["evaluate", "sample", "serve"]


_MOST_LABELS = 10_000


def _labels(text: str) -> Sequence[int]:
    try:
        first, _, last = text.partition("-")
        labels = range(int(first), int(last) + 1) if last else [int(part) for part in text.split(",")]
        if not 0 < len(labels) <= _MOST_LABELS:
            raise ValueError(text)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(f"{text!r}; expected 0-9 or 1,4,7", param_hint="--labels") from error
    return labels


def _sample(
    model: str, runtime: "Runtime | None", labels: tuple[int, ...], seeds: tuple[int, ...], **sampler: Any
) -> "Samples":
    from hqc import console as out
    from hqc.evaluation.sampling import sample_images
    from hqc.runtimes import load

    pipe = load(model, runtime=runtime).pipeline()
    with out.progress(f"sampling {model}", len(labels)) as advance:
        return sample_images(pipe, labels, seeds, **sampler, progress=lambda done, _: advance(done, ""))


@click.command(cls=Command)
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("samples.png"), show_default=True)
@runtime_option
@click.option("--compare-with", multiple=True, metavar="MODEL", help="Put this model's images beside; may repeat.")
@click.option("--labels", default="0-9", show_default=True, help="Classes: 0-9 or 1,4,7.")
@click.option("--per-class", type=click.IntRange(1, 100), default=8, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@click.option("--batch-size", type=click.IntRange(1, 1024), default=40, show_default=True)
@sampler_options
@force_option
def sample(
    model: str,
    output: Path,
    runtime: "Runtime | None",
    compare_with: tuple[str, ...],
    labels: str,
    per_class: int,
    seed: int,
    force: bool,
    **sampler: Any,
) -> None:
    """Sample a labelled grid of images from MODEL (a Program, an export, or `digits`) into a PNG."""
    from hqc.evaluation.grid import save_comparison, save_grid
    from hqc.storage import refuse_existing_file

    refuse_existing_file(output, force=force)
    check_writable(output)
    models = (model, *compare_with)
    if twice := [name for name in models if models.count(name) > 1]:
        raise ComparisonError(f"model {twice[0]}", "is compared with itself", "Name each model once.")
    classes = tuple(label for label in _labels(labels) for _ in range(per_class))
    seeds = tuple(range(seed, seed + len(classes)))
    first = _sample(model, runtime, classes, seeds, **sampler)
    others = {name: _sample(name, None, classes, seeds, **sampler) for name in compare_with}
    if others:
        save_comparison(output, {model: first, **others}, max_per_class=per_class)
    else:
        save_grid(output, first, model_name=model, max_per_class=per_class)
    click.echo(f"wrote {output}")


@click.command("eval", cls=Command)
@click.argument("model")
@click.option("--against", required=True, metavar="FLOAT", help="The float model: `digits` or a captured Program.")
@runtime_option
@click.option("--images", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@click.option("--batch-size", type=click.IntRange(1, 1024), default=50, show_default=True)
@sampler_options
@json_option
def evaluate(
    model: str, against: str, runtime: "Runtime | None", images: int, seed: int, as_json: bool, **sampler: Any
) -> None:
    """Compare MODEL with the float model on the same seeds: PSNR, SSIM, latent cosine, IS, FID, accuracy.

    IS, FID and accuracy come from the bundled digit classifier, so models of other images are compared without them.
    """
    from hqc import console as out
    from hqc.evaluation.metrics import evaluate as measure
    from hqc.evaluation.metrics import fidelity_figures
    from hqc.evaluation.report import ReportRow, terminal_report
    from hqc.models.classifier import DIGIT_SHAPE, load_digit_classifier

    labels = tuple(i % 10 for i in range(images))
    seeds = tuple(range(seed, seed + images))
    reference = _sample(against, None, labels, seeds, **sampler)
    samples = _sample(model, runtime, labels, seeds, **sampler)
    if samples.images.shape[1:] != DIGIT_SHAPE:
        figures = fidelity_figures(samples, reference)
        named = {"model": model, "against": against, **figures}
        out.print_json(named) if as_json else out.fields(f"{model} against {against}", figures)
        return
    metrics = measure(samples, reference, load_digit_classifier())
    if as_json:
        out.print_json({"model": model, "against": against, **metrics.to_dict()})
    else:
        out.console.print(terminal_report([ReportRow(Path(model).name, metrics)]))


@click.command(cls=Command)
@click.argument("model")
@runtime_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Loopback by default.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--max-images", type=click.IntRange(1, 64), default=8, show_default=True, help="Images of one request.")
@click.option("--threads", type=click.IntRange(1, 256), help="Of the runtime.")
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep there what a runtime makes of the model for this machine (ONNX Runtime's optimised model, engines): "
    "later starts are quicker.",
)
def serve(
    model: str,
    runtime: "Runtime | None",
    host: str,
    port: int,
    max_images: int,
    threads: int | None,
    cache_dir: Path | None,
) -> None:
    """Serve MODEL over HTTP: POST /v1/images/generations in the shape of the OpenAI images API, GET /health.

    MODEL is an export, a Program, or `digits`.
    """
    from hqc.runtimes import load
    from hqc.serving.app import create_app
    from hqc.serving.limits import Limits
    from hqc.serving.server import serve as run

    loaded = load(model, runtime=runtime, threads=threads, cache=cache_dir)
    check_runtime(loaded.runtime)
    limits = Limits(max_images=max_images)
    app = create_app(loaded.pipeline(), model_name=loaded.name, limits=limits, runtime=loaded.runtime)
    run(app, host=host, port=port)
