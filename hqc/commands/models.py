"""Commands that run models: sample, eval."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command
from hqc.commands.asking import Asked, asked_for, asking_options, followed, sampled
from hqc.commands.loras import lora_scale_option, set_scales
from hqc.commands.options import (
    check_output_file,
    drawing_options,
    force_option,
    json_option,
    runtime_option,
    scheduler_option,
)
from hqc.errors import ComparisonError, EvaluationError, OptionError
from hqc.lite.opening import is_exported_pipeline, open_pipeline

if TYPE_CHECKING:
    from hqc.evaluation.protocol import Pictures
    from hqc.evaluation.sampling import Samples
    from hqc.evaluation.trajectory_fidelity import TrajectoryFidelity
    from hqc.needs import Needs
    from hqc.runtimes import Runtime

__all__ = ["evaluate", "sample"]

_GAIN_IMAGES = 64

_batch_option = click.option(
    "--batch-size", type=click.IntRange(1, 1024), help="Images at once (default: 40, fewer of more than 64 pixels)."
)


def _opened(
    model: str, runtime: "Runtime | None", asked: Asked, sampler: dict[str, Any], scheduler: str | None = None
) -> "tuple[Any, Needs, dict[str, Any]]":
    """The model's pipeline, what it needs, and the sampler's options, once it is known to take what is asked for."""
    from hqc.evaluation.needs import needs_of
    from hqc.runtimes import load
    from hqc.sampling.task import require_steps
    from hqc.serving.schedulers import chosen_scheduler

    pipe = load(model, runtime=runtime).pipeline()
    pipe.scheduler = chosen_scheduler(pipe.scheduler, scheduler)
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
@lora_scale_option
@_batch_option
@scheduler_option
@drawing_options
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
    lora_scales: tuple[str, ...],
    batch_size: int | None,
    scheduler: str | None,
    force: bool,
    **sampler: Any,
) -> None:
    """Sample a grid of images from MODEL (a Program, an export, an exported pipeline, or `digits`) into a PNG.

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
    found: dict[str, Pictures] = {}
    for name in models:
        if is_exported_pipeline(name):
            own = (runtime, lora_scales) if name == model else (None, ())
            found[name] = _drawn_without_torch(name, *own, asked, per_class, seed, batch_size, scheduler, sampler)
            continue
        pipe, needs, options = _opened(name, runtime if name == model else None, asked, sampler, scheduler)
        set_scales(pipe, lora_scales if name == model else ())
        rows = [row for row in asked.rows(needs) for _ in range(per_class)]
        found[name] = sampled(name, pipe, asked, rows, seed, batch_size, **options)
    if compare_with:
        save_comparison(output, found, max_per_class=per_class)
    else:
        save_grid(output, found[model], model_name=model, max_per_class=per_class)
    click.echo(f"wrote {output}")


def _drawn_without_torch(
    model: str,
    runtime: "Runtime | None",
    lora_scales: tuple[str, ...],
    asked: Asked,
    per_class: int,
    seed: int,
    batch_size: int | None,
    scheduler: str | None,
    sampler: dict[str, Any],
) -> "Pictures":
    """The images of an exported pipeline."""
    from hqc.lite.pictures import draw_pictures
    from hqc.stages import doing
    from hqc.styles.request import parse_scales

    scales = parse_scales(lora_scales)
    pipe = open_pipeline(model, runtime, scheduler=scheduler)
    options = asked.sampler(pipe.needs, sampler)
    rows = [row for row in asked.rows(pipe.needs) for _ in range(per_class)]
    if cut := pipe.cut(asked.prompts):
        click.echo(f"{model}: {cut} of {len(asked.prompts)} prompts are longer than its tokenizer takes: cut", err=True)
    with doing(f"sampling {model}"):
        return draw_pictures(
            pipe,
            rows,
            seed,
            batch_size=batch_size,
            prompts=asked.prompts,
            negative_prompt=asked.negative_prompt,
            loras=scales,
            **options,
        )


@click.command("eval", cls=Command)
@click.argument("model")
@click.option("--against", required=True, metavar="FLOAT", help="The float model: `digits` or a captured Program.")
@runtime_option
@asking_options
@click.option("--images", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@click.option(
    "--gain-images",
    type=click.IntRange(0, 100_000),
    help="Images for ε gain and latent cosine by timestep, each sampled three times; 0: none "
    f"(default: {_GAIN_IMAGES}, or as many as --images).",
)
@click.option(
    "--no-gain-1",
    is_flag=True,
    help="No IS at gain 1, for which MODEL is sampled a second time, with ε divided by its gain.",
)
@lora_scale_option
@_batch_option
@drawing_options
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
    gain_images: int | None,
    no_gain_1: bool,
    lora_scales: tuple[str, ...],
    batch_size: int | None,
    as_json: bool,
    **sampler: Any,
) -> None:
    """Compare MODEL with the float model on the same seeds: PSNR, SSIM, latent cosine, IS, FID, accuracy, ε gain.

    The images go through the classes (--labels) or prompts (--prompts) in turns. IS, FID and accuracy come from the
    bundled digit classifier: models of other images are compared without them. The gain of MODEL's ε over the float
    model's and the cosine of their latents are given by timestep, and IS also with the gain divided out.
    """
    asked = asked_for(labels, prompt, prompts, negative_prompt)
    for name in (against, model):
        asked.check_kind(name)
    float_pipe, float_needs, float_options = _opened(against, None, asked, sampler)
    pipe, needs, options = _opened(model, runtime, asked, sampler)
    set_scales(pipe, lora_scales)
    if needs.digits:
        _check_enough(images)
    elif no_gain_1:
        raise OptionError("--no-gain-1", f"{model} draws no digits, so there is no IS to leave out", "Leave it out.")

    def drawn(count: int, needs: "Needs") -> Sequence[int]:
        rows = asked.rows(needs)
        return [rows[i % len(rows)] for i in range(count)]

    reference = sampled(against, float_pipe, asked, drawn(images, float_needs), seed, batch_size, **float_options)
    samples = sampled(model, pipe, asked, drawn(images, needs), seed, batch_size, **options)
    trajectory = at_gain_1 = None
    if followers := min(_GAIN_IMAGES, images) if gain_images is None else gain_images:
        order = drawn(followers, needs)
        trajectory = followed(model, pipe, float_pipe, asked, order, seed, batch_size, **options)
        if needs.digits and not no_gain_1:
            at_gain_1 = _sampled_at_gain_1(model, pipe, trajectory, asked, samples.labels, seed, batch_size, options)
    if needs.digits:
        _print_scores(model, against, samples, reference, trajectory, at_gain_1, as_json=as_json)
    else:
        _print_figures(model, against, samples, reference, trajectory, as_json=as_json)


def _check_enough(images: int) -> None:
    from hqc.evaluation.metrics import check_enough, least_images
    from hqc.models.classifier import FEATURE_DIM

    try:
        check_enough(images, FEATURE_DIM)
    except EvaluationError as error:
        raise OptionError(f"--images {images}", error.found, f"Give {least_images(FEATURE_DIM)} or more.") from error


def _sampled_at_gain_1(
    model: str,
    pipe: Any,
    trajectory: "TrajectoryFidelity",
    asked: Asked,
    labels: Sequence[int],
    seed: int,
    batch_size: int | None,
    sampler: dict[str, Any],
) -> "Samples | None":
    """The images once more with ε divided by its gain; None, and a line that says so, where that cannot be done."""
    from hqc.evaluation.gain import at_gain_one

    try:
        trajectory.gain.check_divides()
    except EvaluationError as error:
        click.echo(f"left out: IS at {error}", err=True)
        return None
    with at_gain_one(pipe, trajectory.gain):
        return sampled(f"{model} at gain 1", pipe, asked, labels, seed, batch_size, **sampler)


def _print_scores(
    model: str,
    against: str,
    samples: "Samples",
    reference: "Samples",
    trajectory: "TrajectoryFidelity | None",
    at_gain_1: "Samples | None",
    *,
    as_json: bool,
) -> None:
    """What the digit classifier can be asked about."""
    from hqc import console as out
    from hqc.evaluation.metrics import evaluate as measure
    from hqc.evaluation.report import ReportRow, terminal_report
    from hqc.models.classifier import load_digit_classifier

    metrics = measure(samples, reference, load_digit_classifier(), at_gain_one=at_gain_1)
    if as_json:
        out.print_json({"model": model, "against": against, **metrics.to_dict(), **_trajectory_data(trajectory)})
    else:
        out.console.print(terminal_report([ReportRow(Path(model).name, metrics, trajectory=trajectory)]))


def _print_figures(
    model: str,
    against: str,
    samples: "Samples",
    reference: "Samples",
    trajectory: "TrajectoryFidelity | None",
    *,
    as_json: bool,
) -> None:
    """What can be said of any model's images."""
    from hqc import console as out
    from hqc.evaluation.metrics import fidelity_figures
    from hqc.evaluation.report import ReportRow, terminal_trajectories

    figures = fidelity_figures(samples, reference)
    if as_json:
        out.print_json({"model": model, "against": against, **figures, **_trajectory_data(trajectory)})
        return
    out.fields(f"{model} against {against}", _measured(figures))
    if trajectory is not None:
        out.console.print(terminal_trajectories([ReportRow(Path(model).name, trajectory=trajectory)]))


def _trajectory_data(trajectory: "TrajectoryFidelity | None") -> dict[str, Any]:
    return {"trajectory": None if trajectory is None else trajectory.to_dict()}


def _measured(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures for people: what could not be measured is a dash, the protocol one line."""
    protocol = ", ".join(f"{key} {value}" for key, value in figures["protocol"].items())
    identical = figures["identical_images"] == figures["num_images"]
    shown = {key: ("∞" if identical and "psnr" in key else "–") if v is None else v for key, v in figures.items()}
    return {**shown, "protocol": protocol}
