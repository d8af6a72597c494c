"""The command line: parse, call, print. Every command is a thin layer over the Python API."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc import __version__
from hqc.errors import ComparisonError, HqcError

if TYPE_CHECKING:
    from hqc.evaluation.sampling import Samples
    from hqc.export import Target
    from hqc.recipes import TrainingSettings
    from hqc.runtimes import Runtime

__all__ = ["main"]


class _Commands(click.Group):
    """Turns errors that the user can act on into one line and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HqcError as error:
            raise _UserError(str(error)) from error
        except BrokenPipeError:
            raise  # the reader has seen enough: click ends quietly
        except OSError as error:
            raise _UserError(
                f"{error.filename or 'file system'}: {error.strerror or error}. Check the path."
            ) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _UserError(click.ClickException):
    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"hqc: {' '.join(self.format_message().split())}", err=True)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda t: t.replace("_", "-")},
)
@click.version_option(__version__, prog_name="hqc")
def main() -> None:
    """Hadamard Quantisation Compiler: low-bit latent diffusion, from checkpoint to integer kernels."""


def _check_output(output: Path, *, force: bool) -> None:
    """Refuses an artefact that is there, and a place that cannot be written, before long work starts."""
    from hqc.storage import refuse_existing

    refuse_existing(output, force=force)
    _check_writable(output)


def _check_writable(output: Path) -> None:
    import tempfile

    from hqc.errors import ArtefactError

    folder = output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=folder):
            pass
    except OSError as error:
        raise ArtefactError(
            str(output.parent), f"cannot be written ({error.strerror})", "Choose a writable folder."
        ) from error


# ---- options that several commands share ---------------------------------------------------------------------------

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _options(*decorators: _Decorator) -> _Decorator:
    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_output = click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where to write.")
_force = click.option("--force", is_flag=True, help="Replace an artefact that is already there.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
_bits = click.option("--bits", default="w4a4", show_default=True, help="wNaM, N and M in 2…8, case-insensitive.")
_rules = click.option("--rules", help="Layer rules: default, reference or all (default: the recipe's).")
_keep_float = click.option("--keep-float", multiple=True, metavar="PATTERN", help="Leave matching sites float.")
_sampler = _options(
    click.option("--num-inference-steps", "--n-steps", type=click.IntRange(1, 1000), default=20, show_default=True),
    click.option("--guidance-scale", type=click.FloatRange(0, 100), default=1.5, show_default=True),
    click.option("--eta", type=click.FloatRange(0, 1), default=0.0, show_default=True),
)
_runtime = click.option(
    "--runtime", type=click.Choice(["torch", "onnxruntime"]), help="Default: the artefact's own (Program: torch)."
)
_calib_size = click.option("--calib-size", type=click.IntRange(1, 4096), default=16, show_default=True, help="Images.")
_block = click.option(
    "--block",
    type=click.Choice(["8", "16", "32", "64", "128"]),
    help="Hadamard order (default: 32).",
)


def _order(block: str | None, *, rotated: bool) -> int:
    from hqc.errors import PlanError

    if block is not None and not rotated:
        raise PlanError(f"--block {block}", "there is no rotation to give an order to", "Ask for the rotation too.")
    return int(block or 32) if rotated else 0


@main.command()
@click.argument("source")
@_output
@click.option(
    "--condition-length", type=click.IntRange(1, 4096), help="Tokens of the condition (default: from SOURCE)."
)
@_force
@_as_json
def trace(source: str, output: Path, condition_length: int | None, force: bool, as_json: bool) -> None:
    """Capture SOURCE into a Program: `digits`, a diffusers pipeline or UNet folder, or `module:callable`."""
    import time

    from hqc import console as out
    from hqc.capture import find_source
    from hqc.capture import trace as capture
    from hqc.storage import save_program

    _check_output(output, force=force)
    start = time.perf_counter()
    found = find_source(source, condition_length=condition_length)
    program = capture(found)
    save_program(program, output, force=force, pipeline=found.pipeline)
    summary = {
        "program": str(output),
        "source": source,
        "sites": len(list(program.sites())),
        "nodes": len(program.graph.nodes),
        "weights_bytes": program.size_bytes(),
        "graph_equals_module_relative_error": program.origin.capture_error,
        "seconds": round(time.perf_counter() - start, 2),
    }
    out.print_json(summary) if as_json else out.fields(f"traced {source}", summary)


@main.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--recipe", default="hq-dm", show_default=True)
@_bits
@_rules
@click.option("--no-hadamard", is_flag=True, help="Without rotation.")
@_block
@_keep_float
@_as_json
def explain(
    program: Path,
    recipe: str,
    bits: str,
    rules: str | None,
    no_hadamard: bool,
    block: str | None,
    keep_float: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what a recipe would do to PROGRAM: every site with its bits, rotation, and the reason of every miss."""
    from hqc import console as out
    from hqc.api import configure
    from hqc.pipeline import dry_run, format_pipeline
    from hqc.plan import RULE_SETS
    from hqc.storage import load_program

    found = configure(recipe, rules=rules)
    rotated = bool(found.block) and not no_hadamard
    found = configure(found, block=_order(block, rotated=rotated))
    captured = load_program(program)
    passes = found.passes(bits, (0.0,), keep_float)
    *_, (_, _, result) = dry_run(captured, passes)
    result = result.evolve(plan=replace(result.plan, recipe=found.name))
    if as_json:
        misses = [{"pass": str(r.text), "missed": dict(r.missed)} for r in result.history[len(captured.history) :]]
        out.print_json({"plan": result.plan.to_dict(), "pipeline": format_pipeline(passes), "passes": misses})
        return
    out.console.print(out.sites_table(result))
    out.console.print(
        "rules, last match wins:", *(f"  {rule}" for rule in RULE_SETS[found.rules]), sep="\n", markup=False
    )
    out.console.print(f"pipeline: {format_pipeline(passes)}", markup=False)
    for record in result.history[len(captured.history) :]:
        out.console.print(record, markup=False, highlight=False)


@main.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--graph/--no-graph", default=True, show_default=True, help="Print the graph's text.")
@_as_json
def inspect(program: Path, graph: bool, as_json: bool) -> None:
    """Show PROGRAM: graph text, plan, history, sizes."""
    from hqc import console as out
    from hqc.storage import load_program
    from hqc.text import graph_text

    loaded = load_program(program)
    sizes: dict[str, int] = {}
    for name, tensor in loaded.state.items():
        kind = name.rsplit(".", 1)[-1]
        sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()
    summary = {
        "stage": str(loaded.stage),
        "source": loaded.origin.source,
        "nodes": len(loaded.graph.nodes),
        "sites": len(list(loaded.sites())),
        "weights_bytes": loaded.size_bytes(),
        "bytes_by_kind": sizes,
    }
    if as_json:
        text = {"graph": graph_text(loaded).splitlines()} if graph else {}
        out.print_json({**summary, "plan": loaded.plan.to_dict(), "history": [str(r) for r in loaded.history], **text})
        return
    if graph:
        click.echo(graph_text(loaded))
    if loaded.plan.sites:
        out.console.print(out.sites_table(loaded))
    for record in loaded.history:
        out.console.print(record, markup=False, highlight=False)
    out.fields(str(program), summary)


@main.command()
@click.argument("program", type=click.Path(path_type=Path))
@_output
@click.option("--recipe", default="rtn", show_default=True)
@_bits
@click.option("--hadamard", is_flag=True, help="Rotate activations before quantising.")
@_block
@_rules
@_keep_float
@_calib_size
@_sampler
@_force
def ptq(
    program: Path,
    output: Path,
    recipe: str,
    bits: str,
    hadamard: bool,
    block: str | None,
    rules: str | None,
    keep_float: tuple[str, ...],
    calib_size: int,
    num_inference_steps: int,
    guidance_scale: float,
    eta: float,
    force: bool,
) -> None:
    """Quantise PROGRAM without training: the baseline that every gain is measured against."""
    from hqc import api
    from hqc import console as out
    from hqc.runtimes import load
    from hqc.storage import load_program, pipeline_folder, save_program

    _check_output(output, force=force)
    captured = load_program(program)
    found = api.configure(recipe, rules=rules)
    sampler = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "eta": eta}
    found = found.model_copy(
        update={
            "training": found.training.model_copy(update=sampler),
            "calibration": found.calibration.model_copy(update={"samples": calib_size}),
        }
    )
    task = api.task_of(captured, load(program).pipeline())
    result = api.ptq(
        captured,
        found,
        bits,
        hadamard=hadamard,
        block=_order(block, rotated=hadamard),
        task=task,
        keep_float=keep_float,
    )
    save_program(result, output, force=force, pipeline=pipeline_folder(program))
    out.fields(f"quantised {program}", {"program": str(output), "sites": len(result.plan.quantised), "bits": bits})


@main.command()
@click.argument("program", type=click.Path(path_type=Path))
@_output
@click.option("--recipe", default="hq-dm", show_default=True)
@_bits
@click.option("--no-hadamard", is_flag=True, help="The same training without rotation (the method's ablation).")
@_block
@_rules
@_keep_float
@_calib_size
@click.option("--epochs", type=click.IntRange(1), help="Trajectories (default: the recipe's).")
@click.option("--steps", type=click.IntRange(1), help="Updates in all, instead of --epochs.")
@click.option("--batch-size", type=click.IntRange(1, 1024), help="Images of a trajectory.")
@click.option("--seed", type=click.IntRange(0, 2**31), help="Of the training trajectories and LoRA.")
@click.option("--lr-lora", type=float, help="LoRA learning rate over the site's mean weight scale.")
@click.option("--lr-weight-scale", type=float)
@click.option("--lr-activation-scale", type=float)
@_sampler
@click.option("--checkpoint-every", type=click.IntRange(1), help="Updates between checkpoints.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Log and checkpoints (default: OUTPUT.training).")
@click.option("--resume", is_flag=True, help="Continue the run in the work folder, to the same bits.")
@_force
@_as_json
def qat(
    program: Path,
    output: Path,
    recipe: str,
    bits: str,
    no_hadamard: bool,
    block: str | None,
    rules: str | None,
    keep_float: tuple[str, ...],
    calib_size: int,
    work_dir: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Quantise PROGRAM and train it against itself: scales and LoRA, merged before export."""
    from hqc import api
    from hqc import console as out
    from hqc.runtimes import load
    from hqc.storage import load_program, pipeline_folder, save_program

    _check_output(output, force=force)
    captured = load_program(program)
    found = api.configure(recipe, rules=rules)
    rotated = bool(found.block) and not no_hadamard
    found = api.configure(found, block=_order(block, rotated=rotated))
    training = _training(found.training, settings)
    found = found.model_copy(update={"calibration": found.calibration.model_copy(update={"samples": calib_size})})
    folder = work_dir or output.with_name(output.name + ".training")
    last: list[Any] = []
    with out.progress(f"{found.name} {bits}", training.total_steps) as advance:

        def show(record: Any) -> None:
            last[:] = [record]
            advance(record.step, f"loss {record.loss:.4g}")

        result = api.qat(
            captured,
            found,
            bits,
            task=api.task_of(captured, load(program).pipeline()),
            settings=training,
            keep_float=keep_float,
            work_dir=folder,
            resume=resume,
            on_step=show,
        )
    save_program(result, output, force=force, pipeline=pipeline_folder(program))
    api.finish_run(folder)
    summary = {
        "program": str(output),
        "sites": len(result.plan.quantised),
        "bits": bits.lower(),
        "updates": training.total_steps,
        "last_loss": last[0].loss if last else None,
        "log": str(folder / "log.jsonl"),
    }
    out.print_json(summary) if as_json else out.fields(f"trained {program}", summary)


def _training(defaults: "TrainingSettings", given: dict[str, Any]) -> "TrainingSettings":
    from pydantic import ValidationError

    from hqc.errors import PlanError

    values = defaults.model_dump() | {key: value for key, value in given.items() if value is not None}
    try:
        return type(defaults)(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-")
        raise PlanError(name, f"{first['input']!r}: {first['msg']}", "Give a value in range.") from error


@main.command()
@click.argument("program", type=click.Path(path_type=Path))
@_output
@click.option("--target", type=click.Choice(["portable", "onnxruntime"]), default="onnxruntime", show_default=True)
@click.option("--opset", type=click.IntRange(21, 25), default=21, show_default=True)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The captured Program that the quantisation error is measured from (default: PROGRAM without quantisers).",
)
@_force
@_as_json
def export(
    program: Path, output: Path, target: "Target", opset: int, against: Path | None, force: bool, as_json: bool
) -> None:
    """Lower PROGRAM to ONNX for a target, verify it against the fake-quant graph, and write a folder."""
    from hqc import console as out
    from hqc.export import export_program
    from hqc.storage import load_program, pipeline_folder

    _check_output(output, force=force)
    loaded = load_program(program)
    report = export_program(
        loaded,
        target,
        output,
        opset=opset,
        force=force,
        float_program=load_program(against) if against is not None else None,
        pipeline=pipeline_folder(program),
    )
    if as_json:
        out.print_json(
            {
                "export": str(output),
                "target": report.target,
                "opset": report.opset,
                "nodes": report.nodes,
                "size_bytes": report.size_bytes,
                "seconds": report.seconds,
                "verification": report.verification.to_dict(),
            }
        )
    else:
        click.echo(f"exported {report}")


# ---- commands over models ------------------------------------------------------------------------------------------


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


@main.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("samples.png"), show_default=True)
@_runtime
@click.option("--compare-with", multiple=True, metavar="MODEL", help="Put this model's images beside; may repeat.")
@click.option("--labels", default="0-9", show_default=True, help="Classes: 0-9 or 1,4,7.")
@click.option("--per-class", type=click.IntRange(1, 100), default=8, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@click.option("--batch-size", type=click.IntRange(1, 1024), default=40, show_default=True)
@_sampler
@_force
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
    _check_writable(output)
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


@main.command("eval")
@click.argument("model")
@click.option("--against", required=True, metavar="FLOAT", help="The float model: `digits` or a captured Program.")
@_runtime
@click.option("--images", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@click.option("--batch-size", type=click.IntRange(1, 1024), default=50, show_default=True)
@_sampler
@_as_json
def evaluate(
    model: str, against: str, runtime: "Runtime | None", images: int, seed: int, as_json: bool, **sampler: Any
) -> None:
    """Compare MODEL with the float model on the same seeds: PSNR, SSIM, latent cosine, IS, FID, accuracy."""
    from hqc import console as out
    from hqc.evaluation.metrics import evaluate as measure
    from hqc.evaluation.report import ReportRow, terminal_report
    from hqc.models.classifier import load_digit_classifier

    labels = tuple(i % 10 for i in range(images))
    seeds = tuple(range(seed, seed + images))
    reference = _sample(against, None, labels, seeds, **sampler)
    samples = _sample(model, runtime, labels, seeds, **sampler)
    metrics = measure(samples, reference, load_digit_classifier())
    if as_json:
        out.print_json({"model": model, "against": against, **metrics.to_dict()})
    else:
        out.console.print(terminal_report([ReportRow(Path(model).name, metrics)]))


@main.command()
@click.argument("export_folder", metavar="EXPORT")
@click.option("--host", default="127.0.0.1", show_default=True, help="Loopback by default.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--max-images", type=click.IntRange(1, 64), default=8, show_default=True, help="Images of one request.")
@click.option("--threads", type=click.IntRange(1, 256), help="Of the runtime.")
def serve(export_folder: str, host: str, port: int, max_images: int, threads: int | None) -> None:
    """Serve EXPORT over HTTP: POST /v1/images/generations in the shape of the OpenAI images API, GET /health."""
    from hqc.runtimes import load
    from hqc.serving.app import create_app
    from hqc.serving.limits import Limits
    from hqc.serving.server import serve as run

    model = load(export_folder, threads=threads)
    limits = Limits(max_images=max_images)
    app = create_app(model.pipeline(), model_name=model.name, limits=limits, runtime=model.runtime)
    run(app, host=host, port=port)


if __name__ == "__main__":
    main()
