"""Commands that run models: sample, eval, serve."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command, check_runtime
from hqc.commands.asking import Asked, asked_for, asking_options, sampled
from hqc.commands.options import (
    check_output_file,
    force_option,
    json_option,
    runtime_option,
    sampler_options,
)
from hqc.errors import ComparisonError

if TYPE_CHECKING:
    from hqc.evaluation.needs import Needs
    from hqc.runtimes import Runtime

__all__ = ["evaluate", "sample", "serve"]

_batch_option = click.option(
    "--batch-size", type=click.IntRange(1, 1024), help="Images at once (default: 40, fewer of more than 64 pixels)."
)


def _opened(
    model: str, runtime: "Runtime | None", asked: Asked, sampler: dict[str, Any]
) -> "tuple[Any, Needs, dict[str, Any]]":
    """The model's pipeline, what it needs, and the sampler's options, once it is known to take what is asked for."""
    from hqc.evaluation.needs import needs_of
    from hqc.runtimes import load
    from hqc.sampling.task import require_steps

    pipe = load(model, runtime=runtime).pipeline()
    needs = needs_of(pipe)
    fitting = asked.sampler(needs, sampler)
    require_steps(pipe.scheduler, sampler["num_inference_steps"])
    return pipe, needs, fitting


@click.command(cls=Command)
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("samples.png"), show_default=True)
@runtime_option
@click.option("--compare-with", multiple=True, metavar="MODEL", help="Put this model's images beside; may repeat.")
@asking_options
@click.option(
    "--per-class",
    "--per-prompt",
    "per_class",
    type=click.IntRange(1, 100),
    default=8,
    show_default=True,
    help="Images of each class or prompt; in all where there are none.",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@_batch_option
@sampler_options
@force_option
def sample(
    model: str,
    output: Path,
    runtime: "Runtime | None",
    compare_with: tuple[str, ...],
    labels: str | None,
    prompt: tuple[str, ...],
    prompts: Path | None,
    negative_prompt: str | None,
    per_class: int,
    seed: int,
    batch_size: int | None,
    force: bool,
    **sampler: Any,
) -> None:
    """Sample a grid of images from MODEL (a Program, an export, or `digits`) into a PNG.

    A row a class (--labels) or prompt (--prompt, --prompts), as MODEL's pipeline needs; unconditional models need
    neither.
    """
    from hqc.evaluation.grid import save_comparison, save_grid

    check_output_file(output, force=force)
    models = (model, *compare_with)
    if twice := [name for name in models if models.count(name) > 1]:
        raise ComparisonError(f"model {twice[0]}", "is compared with itself", "Name each model once.")
    asked = asked_for(labels, prompt, prompts, negative_prompt)
    for name in models:
        asked.check_kind(name)
    found = {}
    for name in models:
        pipe, needs, options = _opened(name, runtime if name == model else None, asked, sampler)
        rows = [row for row in asked.rows(needs) for _ in range(per_class)]
        found[name] = sampled(name, pipe, asked, rows, seed, batch_size, **options)
    if compare_with:
        save_comparison(output, found, max_per_class=per_class)
    else:
        save_grid(output, found[model], model_name=model, max_per_class=per_class)
    click.echo(f"wrote {output}")


@click.command("eval", cls=Command)
@click.argument("model")
@click.option("--against", required=True, metavar="FLOAT", help="The float model: `digits` or a captured Program.")
@runtime_option
@asking_options
@click.option("--images", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@_batch_option
@sampler_options
@json_option
def evaluate(
    model: str,
    against: str,
    runtime: "Runtime | None",
    labels: str | None,
    prompt: tuple[str, ...],
    prompts: Path | None,
    negative_prompt: str | None,
    images: int,
    seed: int,
    batch_size: int | None,
    as_json: bool,
    **sampler: Any,
) -> None:
    """Compare MODEL with the float model on the same seeds: PSNR, SSIM, latent cosine, IS, FID, accuracy.

    The images go through the classes (--labels) or prompts (--prompts) in turns. IS, FID and accuracy come from the
    bundled digit classifier: models of other images are compared without them.
    """
    from hqc import console as out
    from hqc.evaluation.metrics import check_enough, fidelity_figures
    from hqc.evaluation.metrics import evaluate as measure
    from hqc.evaluation.report import ReportRow, terminal_report
    from hqc.models.classifier import FEATURE_DIM, load_digit_classifier

    asked = asked_for(labels, prompt, prompts, negative_prompt)
    for name in (against, model):
        asked.check_kind(name)
    found, digits = {}, False
    for name, engine in ((against, None), (model, runtime)):
        pipe, needs, options = _opened(name, engine, asked, sampler)
        digits = needs.digits
        if digits:
            check_enough(images, FEATURE_DIM)
        rows = asked.rows(needs)
        order = [rows[i % len(rows)] for i in range(images)]
        found[name, engine] = sampled(name, pipe, asked, order, seed, batch_size, **options)
    reference, samples = found[against, None], found[model, runtime]
    if not digits:
        figures = fidelity_figures(samples, reference)
        named = {"model": model, "against": against, **figures}
        out.print_json(named) if as_json else out.fields(f"{model} against {against}", _measured(figures))
        return
    metrics = measure(samples, reference, load_digit_classifier())
    if as_json:
        out.print_json({"model": model, "against": against, **metrics.to_dict()})
    else:
        out.console.print(terminal_report([ReportRow(Path(model).name, metrics)]))


def _measured(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures for people: what could not be measured is a dash, the protocol one line."""
    protocol = ", ".join(f"{key} {value}" for key, value in figures["protocol"].items())
    identical = figures["identical_images"] == figures["num_images"]
    shown = {key: ("∞" if identical and "psnr" in key else "–") if v is None else v for key, v in figures.items()}
    return {**shown, "protocol": protocol}


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

    MODEL is an export, a Program, or `digits`. A request gives a prompt, a class label, or neither, as MODEL's pipeline
    needs: GET /health says which.
    """
    from hqc.evaluation.needs import call_kind
    from hqc.runtimes import load
    from hqc.runtimes.model import describe
    from hqc.serving.app import create_app
    from hqc.serving.limits import Limits
    from hqc.serving.server import serve as run

    found = describe(model)
    call_kind(found.pipeline, found.conditions)  # before the weights are read
    loaded = load(model, runtime=runtime, threads=threads, cache=cache_dir)
    check_runtime(loaded.runtime)
    limits = Limits(max_images=max_images)
    app = create_app(loaded.pipeline(), model_name=loaded.name, limits=limits, runtime=loaded.runtime)
    run(app, host=host, port=port)
