"""The command that lowers a Program to ONNX: export."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from hqc.commands.applies import Command
from hqc.commands.engine import EngineArguments, engine_options
from hqc.commands.loras import lora_option, said_of, with_export_loras, with_loras
from hqc.commands.options import (
    check_output,
    force_option,
    json_option,
    output_option,
)
from hqc.commands.triton import export_triton, triton_options
from hqc.stages import doing

if TYPE_CHECKING:
    from hqc.export import ExportReport, Target
    from hqc.export.interface import Names
    from hqc.export.tensorrt.options import Dtype, Plugins, TensorRtOptions
    from hqc.program import Program
    from hqc.triton_server.repository import Device

__all__ = ["export"]


@click.command(cls=Command)
@click.argument("program", type=click.Path(path_type=Path))
@output_option
@click.option(
    "--target",
    type=click.Choice(["portable", "onnxruntime", "tensorrt", "triton", "diffusers"]),
    default="onnxruntime",
    show_default=True,
    help="triton: PROGRAM is an export, which becomes a model of Triton Inference Server. diffusers: no ONNX, but a "
    "folder that from_pretrained loads.",
)
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), help="TensorRT: activations (default: fp16).")
@click.option(
    "--plugins",
    type=click.Choice(["none", "qdp"]),
    help="TensorRT: standard operators only, or nodes for hqc's plugins (default: none).",
)
@click.option(
    "--weight-only",
    multiple=True,
    metavar="PATTERN",
    help="TensorRT: matching linear layers of at most 4 bits keep float activations.",
)
@click.option(
    "--plugin-arch",
    metavar="ARCHS",
    help="TensorRT: comma-separated GPUs that plugins have kernels for (default: sm_80 and every later one).",
)
@click.option("--opset", type=click.IntRange(21, 25), default=21, show_default=True)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The captured Program that the quantisation error is measured from (default: PROGRAM without quantisers).",
)
@click.option("--one-timestep", is_flag=True, help="One timestep a call, as samplers give it: quicker.")
@click.option("--functions", is_flag=True, help="portable: a rotation as one node, hqc::Hadamard, with its body.")
@click.option(
    "--names",
    type=click.Choice(["hqc", "optimum"]),
    help="What inputs and output are called: optimum's are sample, timestep, encoder_hidden_states, …, out_sample "
    "(default: hqc; with --pipeline optimum).",
)
@click.option(
    "--pipeline",
    "whole",
    is_flag=True,
    help="The whole pipeline in optimum's layout, which is sampled and served without torch.",
)
@lora_option("onnxruntime, portable: a LoRA beside the products, its scale an input of the model")
@click.option("--merge-lora", is_flag=True, help="Add --lora to the weights instead: of a PROGRAM that is captured.")
@engine_options(None)
@triton_options
@force_option
@json_option
def export(
    program: Path,
    output: Path,
    target: "Target | Literal['triton', 'diffusers']",
    dtype: "Dtype | None",
    plugins: "Plugins | None",
    weight_only: tuple[str, ...],
    plugin_arch: str | None,
    opset: int,
    against: Path | None,
    one_timestep: bool,
    functions: bool,
    names: "Names | None",
    whole: bool,
    loras: tuple[str, ...],
    merge_lora: bool,
    engine: EngineArguments | None,
    max_batch_size: int | None,
    device: "Device | None",
    force: bool,
    as_json: bool,
) -> None:
    """Lower PROGRAM to ONNX for a target, verify it against the fake-quant graph, and write a folder.

    With --engine, the model is compiled too, as by `hqc build-engine`. With --pipeline, everything around it is written
    as ONNX too: decoder, text encoder, classes. With --target triton, PROGRAM is what was exported before, and -o the
    folder of the model in a model repository; with --target diffusers, -o is a denoiser's folder.
    """
    from hqc import console as out
    from hqc.export import export_program
    from hqc.storage import load_program, pipeline_folder

    check_output(output, program, force=force)
    tensorrt = _tensorrt_options(target, dtype, plugins, weight_only, plugin_arch)
    if engine is not None:
        engine.check(target=target, plugins=plugins)
    if target == "triton":
        export_triton(program, output, max_batch_size=max_batch_size, device=device, force=force, as_json=as_json)
        return
    with doing(f"reading {program}"):
        loaded = load_program(program)
    reference = load_program(against) if against is not None else None
    if target == "diffusers":
        _export_diffusers(loaded, output, reference, force=force, as_json=as_json)
        return
    loaded = with_export_loras(loaded, loras, merged=merge_lora)
    if reference is not None:
        reference = with_loras(reference, loras, merged=merge_lora, say=False)
    if whole:
        settings = {"opset": opset, "one_timestep": one_timestep, "functions": functions, "names": names or "optimum"}
        _export_pipeline(program, loaded, output, target, reference, settings, force=force, as_json=as_json)
        return
    with out.late_progress("compiling kernels") as on_kernel:
        report = export_program(
            loaded,
            target,
            output,
            opset=opset,
            force=force,
            float_program=reference,
            pipeline=pipeline_folder(program),
            one_timestep=one_timestep,
            functions=functions,
            names=names or "hqc",
            tensorrt=tensorrt,
            on_kernel=on_kernel,
        )
    if not as_json:
        click.echo(f"exported {report}")
        for style in loaded.styles:
            click.echo(f"lora     {style}")
    engines = engine.build(output) if engine is not None else None
    if as_json:
        out.print_json(
            {
                **_export_data(output, report),
                **said_of(loaded),
                **({} if tensorrt is None else {"layers": [layer.to_dict() for layer in report.layers]}),
                **({} if engines is None else {"engines": engines.to_dict()["engines"]}),
            }
        )
    elif engines is not None:
        click.echo(f"built {engines}")


def _export_diffusers(
    program: "Program", output: Path, reference: "Program | None", *, force: bool, as_json: bool
) -> None:
    """Writes a denoiser for diffusers, and prints what was written."""
    from hqc import console as out
    from hqc.integrations.diffusers import export_diffusers

    report = export_diffusers(program, output, force=force, float_program=reference)
    if as_json:
        out.print_json({"export": str(output), "target": "diffusers", **report.to_dict()})
    else:
        click.echo(f"exported {report}")


def _export_pipeline(
    path: Path,
    program: "Program",
    output: Path,
    target: "Target",
    reference: "Program | None",
    settings: dict[str, Any],
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Writes the pipeline around a program, and prints what was written."""
    from hqc import console as out
    from hqc.export.pipeline_folder import export_pipeline
    from hqc.runtimes.model import pipeline_around

    report = export_pipeline(
        program,
        target,
        output,
        pipeline=pipeline_around(path, program.origin.pipeline),
        float_program=reference,
        force=force,
        **settings,
    )
    if why := _why_no_scheduler(output):
        click.echo(f"{output}: {why}", err=True)
    if as_json:
        out.print_json({**_export_data(output, report.denoiser), "parts": report.parts, **said_of(program)})
        return
    click.echo(f"exported {report}")
    for style in program.styles:
        click.echo(f"lora     {style}")


def _why_no_scheduler(folder: Path) -> str | None:
    """Why a pipeline cannot be drawn from with the scheduler that it has, and what to do; None if it can."""
    from hqc.configurations import read_configuration
    from hqc.errors import HqcError
    from hqc.export.files import SCHEDULER_FILE
    from hqc.lite.schedulers import new_scheduler

    try:
        new_scheduler(read_configuration(folder / SCHEDULER_FILE), 1)
    except HqcError as error:
        return str(error)
    return None


def _export_data(output: Path, report: "ExportReport") -> dict[str, Any]:
    return {
        "export": str(output),
        "target": report.target,
        "opset": report.opset,
        "nodes": report.nodes,
        "size_bytes": report.size_bytes,
        "seconds": report.seconds,
        "verification": report.verification.to_dict(),
    }


def _tensorrt_options(
    target: str,
    dtype: "Dtype | None",
    plugins: "Plugins | None",
    weight_only: tuple[str, ...],
    plugin_arch: str | None,
) -> "TensorRtOptions | None":
    """The options of the target, None for another one."""
    from hqc.engines.architectures import parse_archs
    from hqc.errors import ExportError
    from hqc.export.tensorrt.options import TensorRtOptions

    given = {
        "--dtype": dtype,
        "--plugins": plugins,
        "--weight-only": " ".join(weight_only) or None,
        "--plugin-arch": plugin_arch,
    }
    if target == "tensorrt":
        if plugin_arch is not None and plugins != "qdp":
            raise ExportError(
                f"--plugin-arch {plugin_arch}", "is for plugins, and none are asked for", "Give --plugins qdp too."
            )
        options = TensorRtOptions(dtype=dtype or "fp16", plugins=plugins or "none", weight_only=weight_only)
        if plugin_arch is None:
            return options
        return replace(options, plugin_archs=parse_archs(plugin_arch, "--plugin-arch"))
    for name, value in given.items():
        if value is not None:
            raise ExportError(
                f"{name} {value}", f"is not for target {target}", "Give --target tensorrt, or leave it out."
            )
    return None
