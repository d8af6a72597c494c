"""Commands over Programs: trace, explain, inspect, export."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import OF_A_RECIPE, Command, asked, option_name
from hqc.commands.engine import EngineArguments, engine_options
from hqc.commands.exportable import print_survey, warn_unless_exportable
from hqc.commands.loras import lora_option, said_of, with_export_loras, with_loras
from hqc.commands.options import (
    bits_option,
    check_output,
    force_option,
    json_option,
    keep_float_option,
    latent_size_option,
    output_option,
    plan_option,
)
from hqc.commands.recipe_options import plan_and_bits, recipe_asked, recipe_options
from hqc.stages import doing
from hqc.wording import printable

if TYPE_CHECKING:
    from hqc.capture.autoencoders import Part
    from hqc.capture.averages import Weights
    from hqc.export import ExportReport, Target
    from hqc.export.interface import Names
    from hqc.export.tensorrt.options import Dtype, Plugins, TensorRtOptions
    from hqc.program import Program
    from hqc.sizes import LatentSize

__all__ = ["explain", "export", "inspect", "trace"]


@click.command(cls=Command)
@click.argument("source")
@output_option
@click.option(
    "--condition-length", type=click.IntRange(1, 4096), help="Tokens of the condition (default: from SOURCE)."
)
@latent_size_option
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The configuration of a checkpoint file, SOURCE: YAML of the original code, or diffusers' config.json.",
)
@click.option(
    "--weights",
    type=click.Choice(["raw", "ema"]),
    help="Of a file, folder or hub id that has both raw and averaged weights (default: ema).",
)
@click.option("--variant", help="Of the weights in a diffusers folder or hub id, for example fp16 or non_ema.")
@click.option("--revision", help="Branch, tag or commit of a hub id, SOURCE.")
@click.option(
    "--part",
    type=click.Choice(["denoiser", "vae-encoder", "vae-decoder"]),
    default="denoiser",
    show_default=True,
    help="Of a pipeline: its denoiser, or a half of its autoencoder (or of the autoencoder's own folder).",
)
@click.option("--outliers", is_flag=True, help="Heavy-tailed activations in a named architecture, arch:NAME.")
@lora_option("A LoRA to add to the weights, times SCALE (default: 1), a .safetensors file")
@force_option
@json_option
def trace(
    source: str,
    output: Path,
    condition_length: int | None,
    latent_size: "LatentSize | None",
    config: Path | None,
    weights: "Weights | None",
    variant: str | None,
    revision: str | None,
    part: "Part",
    outliers: bool,
    loras: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Capture SOURCE into a Program.

    SOURCE is `digits`, a diffusers pipeline or denoiser folder, a hub id (owner/name), a checkpoint file (.ckpt or
    .safetensors, with --config), `arch:NAME` (a published size with seeded weights), or `module:callable`.
    """
    import time

    from hqc import console as out
    from hqc.capture import find_source
    from hqc.capture import trace as capture
    from hqc.capture.unreached import left_out
    from hqc.storage import save_program
    from hqc.styles.reading import check_file
    from hqc.styles.request import parse_loras

    check_output(output, Path(source), force=force)
    for asked_for in parse_loras(loras):  # before long work
        check_file(Path(asked_for.file))
    start = time.perf_counter()
    found = find_source(
        source,
        condition_length=condition_length,
        latent_size=latent_size,
        config=config,
        outliers=outliers,
        revision=revision,
        weights=weights,
        variant=variant,
        part=part,
    )
    program = with_loras(capture(found), loras, merged=True)
    with doing(f"writing {output}"):
        save_program(program, output, force=force, pipeline=found.pipeline, variant=found.notes.get("variant"))
    with doing("looking for what targets do not take"):
        takers = warn_unless_exportable(program, output)
    summary = {
        "program": str(output),
        "source": source,
        "sites": len(list(program.sites())),
        "nodes": len(program.graph.nodes),
        "weights_bytes": program.size_bytes(),
        "graph_equals_module_relative_error": program.origin.capture_error,
        "exports_to": takers if as_json else ", ".join(takers) or "no target",
        "seconds": round(time.perf_counter() - start, 2),
        **said_of(program),
        **found.notes,
        **left_out(found.module, program, found.pipeline, found.prefix),
    }
    out.print_json(summary) if as_json else out.fields(f"traced {source}", summary)


@click.command(cls=Command)
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--recipe", default="hq-dm", show_default=True)
@bits_option
@recipe_options
@plan_option
@keep_float_option
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the plan as YAML for --plan.")
@click.option(
    "--target",
    type=click.Choice(["portable", "onnxruntime", "tensorrt"]),
    help="Show instead which operators of PROGRAM this export target takes, and which it does not: exit status 1 then.",
)
@json_option
def explain(
    program: Path,
    recipe: str,
    keep_float: tuple[str, ...],
    as_yaml: bool,
    target: "Target | None",
    as_json: bool,
    **given: Any,
) -> None:
    """Show what a recipe would do to PROGRAM: every site with its bits, rotation, and the reason of every miss.

    A PROGRAM that is quantised already shows its own plan, with the error of every rotation that was tried.
    """
    from hqc import console as out
    from hqc.calibration.rotations import free_sites
    from hqc.plan import RULE_SETS
    from hqc.program import Stage
    from hqc.recipes.run import Request, is_procedure, planned
    from hqc.steps import step_text
    from hqc.storage import load_program

    if target is not None:
        from hqc.export.surveys import survey

        print_survey(program, survey(load_program(program), target), as_json=as_json)
        return
    captured = load_program(program)
    if captured.stage != Stage.CAPTURED:
        _show_own_plan(program, captured, as_yaml=as_yaml, as_json=as_json)
        return
    plan, bits = plan_and_bits(given)
    found = recipe_asked(recipe, given).following(plan.rules)
    result = planned(captured, found, Request(bits, keep_float, rules=plan.rules), calibrated=False)
    unseen = [step_text(s) for s in found.steps if is_procedure(s) and s.samples_denoiser]
    unseen = [text for text in unseen if text not in [record.text for record in result.history]]
    if as_yaml:
        undecided = [site.site for site in free_sites(result)] if found.step("choose_rotation") is not None else []
        _print_plan(result, f"{program} by the recipe {found.name}", undecided)
        return
    if as_json:
        ran = [
            {"pass": str(r.text), "missed": dict(r.missed), "removed": list(r.removed)}
            for r in result.history[len(captured.history) :]
        ]
        out.print_json(
            {
                "plan": result.plan.to_dict(),
                "pipeline": found.text,
                "passes": ran,
                "weights": _weights(result),
                **said_of(result),
            }
        )
        return
    out.console.print(out.sites_table(result))
    _print_beside(result)
    _print_weights(result)
    rules = found.step("select_layers").rules
    ordered = [f"  {rule}" for rule in (*RULE_SETS[rules], *plan.rules)]
    out.console.print("rules, last match wins:", *ordered, sep="\n", markup=False)
    out.console.print(f"pipeline: {found.text}", markup=False)
    if unseen:
        out.console.print(f"not run, since they need samples: {', '.join(unseen)}", markup=False, highlight=False)
    for record in result.history[len(captured.history) :]:
        out.console.print(str(record), markup=False, highlight=False)


def _print_plan(program: "Program", of: str, undecided: Sequence[str] = ()) -> None:
    """The plan of a program as a file of rules. undecided: sites whose rotation is chosen when the recipe runs."""
    from hqc.recipes.plan_file import plan_of, plan_yaml

    left = [f"the recipe chooses the rotation of {len(undecided)} sites when it runs"] if undecided else []
    click.echo(plan_yaml(plan_of(program.plan, undecided), [f"The plan of {printable(of)}", *left]), nl=False)


def _show_own_plan(path: Path, program: "Program", *, as_yaml: bool, as_json: bool) -> None:
    """The plan of a program that is quantised: with the rotations that were chosen, and why.

    Raises:
        OptionError: for options of a recipe, which is not asked any more.
    """
    from hqc import console as out
    from hqc.errors import OptionError

    if typed := [name for name in OF_A_RECIPE if asked(name)]:
        raise OptionError(option_name(typed[0]), f"{path} is quantised and has its own plan", "Leave it out.")
    if as_yaml:
        _print_plan(program, str(path))
        return
    if as_json:
        out.print_json({"plan": program.plan.to_dict(), "weights": _weights(program), **said_of(program)})
        return
    out.console.print(out.sites_table(program))
    _print_beside(program)
    _print_weights(program)


def _print_beside(program: "Program") -> None:
    """How attention is quantised, where it is, and the LoRAs of the program."""
    from hqc import console as out
    from hqc.attentions import part_name

    for plan in program.plan.attentions:
        kinds = program.state.get(f"{part_name(plan.name, 'softmax')}.log2_table")
        powers = 0 if kinds is None else int((kinds > 0.5).sum())
        more = f", in powers of two at {powers} of {len(kinds)} timesteps" if powers and kinds is not None else ""
        out.console.print(f"attention {plan.name}: {plan}{more}", markup=False, highlight=False)
    for style in program.styles:
        out.console.print(f"LoRA {style}", markup=False, highlight=False)


def _weights(program: "Program") -> dict[str, int]:
    """Bytes of the quantised weights by their bits, and as files keep them."""
    from hqc.evaluation.comparison.size import weight_bytes

    return dict(zip(("bytes_by_bits", "bytes_stored"), map(round, weight_bytes(program)), strict=True))


def _print_weights(program: "Program") -> None:
    from hqc import console as out
    from hqc.memory import bytes_text

    by_bits, stored = map(bytes_text, _weights(program).values())
    out.console.print(
        f"weights: {by_bits} by their bits, {stored} as int8 and packed int4", markup=False, highlight=False
    )


@click.command(cls=Command)
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--graph/--no-graph", default=True, show_default=True, help="Print the graph's text.")
@json_option
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
        **said_of(loaded),
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
        out.console.print(str(record), markup=False, highlight=False)
    out.fields(str(program), summary)


@click.command(cls=Command)
@click.argument("program", type=click.Path(path_type=Path))
@output_option
@click.option(
    "--target", type=click.Choice(["portable", "onnxruntime", "tensorrt"]), default="onnxruntime", show_default=True
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
@force_option
@json_option
def export(
    program: Path,
    output: Path,
    target: "Target",
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
    force: bool,
    as_json: bool,
) -> None:
    """Lower PROGRAM to ONNX for a target, verify it against the fake-quant graph, and write a folder.

    With --engine, the model is compiled too, as by `hqc build-engine`. With --pipeline, everything around it is written
    as ONNX too: decoder, text encoder, classes.
    """
    from hqc import console as out
    from hqc.export import export_program
    from hqc.storage import load_program, pipeline_folder

    check_output(output, program, force=force)
    tensorrt = _tensorrt_options(target, dtype, plugins, weight_only, plugin_arch)
    if engine is not None:
        engine.check(target=target, plugins=plugins)
    with doing(f"reading {program}"):
        loaded = load_program(program)
    reference = load_program(against) if against is not None else None
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
    if as_json:
        out.print_json({**_export_data(output, report.denoiser), "parts": report.parts})
    else:
        click.echo(f"exported {report}")


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
