"""Commands that quantise a Program: ptq and qat."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.options import (
    bits_option,
    block_option,
    calib_size_option,
    check_output,
    force_option,
    json_option,
    keep_float_option,
    output_option,
    rotation_order,
    rules_option,
    sampler_options,
    synthetic_option,
)

if TYPE_CHECKING:
    from hqc.program import Program
    from hqc.recipes import TrainingSettings

__all__ = ["ptq", "qat"]


@click.command()
@click.argument("program", type=click.Path(path_type=Path))
@output_option
@click.option("--recipe", default="rtn", show_default=True)
@bits_option
@click.option("--hadamard", is_flag=True, help="Rotate activations before quantising.")
@block_option
@rules_option
@keep_float_option
@calib_size_option
@synthetic_option
@sampler_options
@force_option
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
    synthetic: bool,
    num_inference_steps: int,
    guidance_scale: float,
    eta: float,
    force: bool,
) -> None:
    """Quantise PROGRAM without training: the baseline that every gain is measured against."""
    from hqc import api
    from hqc import console as out
    from hqc.storage import load_program, pipeline_folder, save_program

    check_output(output, force=force)
    captured = load_program(program)
    found = api.configure(recipe, rules=rules)
    sampler = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "eta": eta}
    found = found.model_copy(
        update={
            "training": found.training.model_copy(update=sampler),
            "calibration": found.calibration.model_copy(update={"samples": calib_size}),
        }
    )
    task = api.task_of(captured, folder=pipeline_folder(program), synthetic=synthetic)
    result = api.ptq(
        captured,
        found,
        bits,
        hadamard=hadamard,
        block=rotation_order(block, rotated=hadamard),
        task=task,
        keep_float=keep_float,
    )
    save_program(result, output, force=force, pipeline=pipeline_folder(program))
    summary = {"program": str(output), "sites": len(result.plan.quantised), "bits": bits, **_drawn(captured, synthetic)}
    out.fields(f"quantised {program}", summary)


@click.command()
@click.argument("program", type=click.Path(path_type=Path))
@output_option
@click.option("--recipe", default="hq-dm", show_default=True)
@bits_option
@click.option("--no-hadamard", is_flag=True, help="The same training without rotation (the method's ablation).")
@block_option
@rules_option
@keep_float_option
@calib_size_option
@synthetic_option
@click.option("--epochs", type=click.IntRange(1), help="Trajectories (default: the recipe's).")
@click.option("--steps", type=click.IntRange(1), help="Updates in all, instead of --epochs.")
@click.option("--batch-size", type=click.IntRange(1, 1024), help="Images of a trajectory.")
@click.option("--seed", type=click.IntRange(0, 2**31), help="Of the training trajectories and LoRA.")
@click.option("--lr-lora", type=float, help="LoRA learning rate over the site's mean weight scale.")
@click.option("--lr-weight-scale", type=float)
@click.option("--lr-activation-scale", type=float)
@sampler_options
@click.option("--checkpoint-every", type=click.IntRange(1), help="Updates between checkpoints.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Log and checkpoints (default: OUTPUT.training).")
@click.option("--resume", is_flag=True, help="Continue the run in the work folder, to the same bits.")
@force_option
@json_option
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
    synthetic: bool,
    work_dir: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Quantise PROGRAM and train it against itself: scales and LoRA, merged before export."""
    from hqc import api
    from hqc import console as out
    from hqc.storage import load_program, pipeline_folder, save_program

    check_output(output, force=force)
    captured = load_program(program)
    found = api.configure(recipe, rules=rules)
    rotated = bool(found.block) and not no_hadamard
    found = api.configure(found, block=rotation_order(block, rotated=rotated))
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
            task=api.task_of(captured, folder=pipeline_folder(program), synthetic=synthetic),
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
        **_drawn(captured, synthetic),
        "updates": training.total_steps,
        "last_loss": last[0].loss if last else None,
        "log": str(folder / "log.jsonl"),
    }
    out.print_json(summary) if as_json else out.fields(f"trained {program}", summary)


def _drawn(program: "Program", synthetic: bool) -> dict[str, str]:
    """What the scales were found on, where that is not the pipeline's own conditions."""
    from hqc.capture import ARCHITECTURE

    if not synthetic and not program.origin.source.startswith(ARCHITECTURE):
        return {}
    return {"calibrated_on": "noise and random conditions, not real ones"}


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
