"""From what the user names to what is timed: the float program and the integer export, made where they are missing.

arch:NAME | digits | diffusers folder | module:callable    traced, quantised, exported
captured Program                                           quantised, exported
quantised, trained or integer Program                      exported; the float side is --float, or its source
export folder                                              taken as it is; the float side likewise
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqc.errors import (
    ArtefactError,
    CaptureError,
    ComparisonError,
    OptionError,
    PlanError,
    RuntimeMissingError,
    TrainingError,
)
from hqc.evaluation.workspace import Workspace, content
from hqc.export import EXPORT_KIND, export_program
from hqc.export.model import MODEL_FILE
from hqc.export.surveys import require_taken
from hqc.program import InputSpec, Program, Stage
from hqc.storage import check_manifest, load_program, pipeline_folder, save_program

if TYPE_CHECKING:
    from hqc.recipes import Recipe
    from hqc.sampling import Task

__all__ = ["Models", "Quantisation", "calibration_of", "exported", "find_models", "inputs_of", "recipe_of"]

PROGRAM_KIND = "hqc-program"
DEFAULT_BITS = "w4a4"


@dataclass(frozen=True)
class Quantisation:
    """How a float model is quantised for the benchmark: round-to-nearest, calibrated on a short float trajectory.

    bits: None is w4a4. asked: the options that were typed, which a model that is quantised already does not take.
    """

    bits: str | None = None
    hadamard: bool = True
    rules: str | None = None
    calib_size: int = 1
    n_steps: int = 4
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Models:
    """What is timed: the export (a Program for torch-int8 and torch-cuda), the captured program of the same denoiser,
    and what both were calibrated on.
    """

    export: Path
    float_program: Path
    inputs: tuple[InputSpec, ...]
    bits: str
    recipe: str
    calibrated_on: str  # the conditions that the calibration drew; "" where nothing was calibrated here
    quantised: Path | None = None  # the quantised program; nothing where MODEL is an export


@dataclass(frozen=True)
class _Form:
    """What runs the quantised model, and whether an export for it takes one timestep a call."""

    runtime: str
    one_timestep: bool


def find_models(
    model: str,
    float_model: str | None,
    wanted: Quantisation,
    space: Workspace,
    runtime: str = "onnxruntime",
    *,
    one_timestep: bool = True,
) -> Models:
    """Makes what is missing, one stage after the other, in `space`; nothing stays in memory.

    one_timestep: of an export that is made. Samplers give every sample of a call one, as the benchmark does.

    Raises:
        HqcError: whatever capture, calibration or export says; the float side is missing or does not fit.
    """
    folder = Path(model)
    kind = _kind(folder)
    form = _Form(runtime, one_timestep)
    if kind == EXPORT_KIND and runtime != "onnxruntime":
        raise RuntimeMissingError(
            f"runtime {runtime}", f"cannot run {model}, an ONNX export", "Give the program that it was exported from."
        )
    if kind == EXPORT_KIND:
        return _from_export(folder, float_model, wanted, space)
    if kind == PROGRAM_KIND and check_manifest(folder, kind)["stage"] != Stage.CAPTURED:
        return _from_quantised(folder, float_model, wanted, space, form)
    if float_model is not None:
        raise ComparisonError(f"--float {float_model}", f"{model} is the float model itself", "Leave --float out.")
    captured = folder if kind == PROGRAM_KIND else _traced(model, space)
    return _from_float(captured, wanted, space, form)


def inputs_of(artefact: Path) -> tuple[InputSpec, ...]:
    """The inputs of a Program or an export, from its manifest.

    Raises:
        ArtefactError: if it is neither, or damaged.
    """
    kind = _kind(artefact)
    return _inputs(check_manifest(artefact, kind or PROGRAM_KIND), artefact)


def _kind(folder: Path) -> str | None:
    """The format of an artefact; None for anything else."""
    if not (folder / "manifest.json").is_file():
        return None
    try:
        kind = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            str(folder / "manifest.json"), f"cannot be read ({error})", "Write the artefact again."
        ) from error
    if kind not in (EXPORT_KIND, PROGRAM_KIND):
        raise ArtefactError(str(folder), f"holds {kind!r}", "Give a folder that hqc wrote.")
    return str(kind)


# ---- the three kinds -----------------------------------------------------------------------------------------------


def _from_float(captured: Path, wanted: Quantisation, space: Workspace, form: _Form) -> Models:
    bits = (wanted.bits or DEFAULT_BITS).lower()
    settings = {
        "bits": bits,
        "hadamard": wanted.hadamard,
        "rules": wanted.rules,
        "calib_size": wanted.calib_size,
        "n_steps": wanted.n_steps,
    }
    depends = {"program": content(captured), **settings}
    quantised = space.make(
        "quantised.hqc", PROGRAM_KIND, depends, lambda target: _quantise(captured, bits, wanted, target, form.runtime)
    )
    inputs = _inputs(check_manifest(captured, PROGRAM_KIND), captured)
    calibration = json.loads((quantised / "plan.json").read_text(encoding="utf-8"))["training"]["calibrated_on"]
    recipe = "rtn + Hadamard" if wanted.hadamard else "rtn"
    return Models(_lowered(quantised, space, form), captured, inputs, bits, recipe, calibration, quantised)


def _from_quantised(
    folder: Path, float_model: str | None, wanted: Quantisation, space: Workspace, form: _Form
) -> Models:
    _refuse_choices(folder, wanted)
    program = load_program(folder)
    plan, inputs, source = program.plan, program.inputs, program.origin.source
    del program
    captured = _float_side(str(folder), float_model, source, inputs, space)
    return Models(_lowered(folder, space, form), captured, inputs, plan.bits, plan.recipe, "", folder)


def _from_export(folder: Path, float_model: str | None, wanted: Quantisation, space: Workspace) -> Models:
    _refuse_choices(folder, wanted)
    manifest = check_manifest(folder, EXPORT_KIND)
    inputs = _inputs(manifest, folder)
    if MODEL_FILE not in manifest["files"]:
        raise ArtefactError(str(folder), f"lists no {MODEL_FILE}", "Export it again.")
    try:
        source, plan = str(manifest["origin"]["source"]), manifest["plan"]
        bits, recipe = str(plan["bits"]), str(plan["recipe"])
    except (KeyError, TypeError) as error:
        raise ArtefactError(str(folder), f"has an incomplete manifest ({error})", "Export it again.") from error
    captured = _float_side(str(folder), float_model, source, inputs, space)
    return Models(folder, captured, inputs, bits, recipe, "")


def _inputs(manifest: Mapping[str, Any], folder: Path) -> tuple[InputSpec, ...]:
    try:
        return tuple(InputSpec.from_dict(spec) for spec in manifest["inputs"])
    except (KeyError, TypeError) as error:
        raise ArtefactError(str(folder), f"has a manifest without inputs ({error})", "Write it again.") from error


def _refuse_choices(folder: Path, wanted: Quantisation) -> None:
    if wanted.bits is not None:
        raise PlanError(f"--bits {wanted.bits}", f"{folder} is quantised already", "Leave --bits out.")
    if wanted.asked:
        raise OptionError(wanted.asked[0], f"{folder} is quantised already", "Leave it out.")


def _float_side(
    model: str, float_model: str | None, source: str, inputs: tuple[InputSpec, ...], space: Workspace
) -> Path:
    """The captured program that a quantised model came from: --float, else its source traced again."""
    where = float_model or source
    try:
        captured = Path(where) if _kind(Path(where)) == PROGRAM_KIND else _traced(where, space, inputs)
        manifest = check_manifest(captured, PROGRAM_KIND)
    except (CaptureError, ArtefactError) as error:
        if float_model is not None:
            raise
        raise ComparisonError(
            model, f"its float side is not there ({error.found})", "Give --float PROGRAM, the program before hqc ptq."
        ) from error
    if manifest["stage"] != Stage.CAPTURED:
        raise ComparisonError(where, f"is {manifest['stage']}; expected a float program", "Give the captured one.")
    if _inputs(manifest, captured) != inputs:
        raise ComparisonError(where, f"takes other inputs than {model}", "Give the program that it came from.")
    return captured


# ---- stages --------------------------------------------------------------------------------------------------------


def _traced(source: str, space: Workspace, inputs: Sequence[InputSpec] = ()) -> Path:
    """inputs: what it should take, where the source leaves its sizes open; nothing takes the source's own."""
    content = _source_content(source)
    if content is not None:
        content["inputs"] = [asdict(spec) for spec in inputs]
    return space.make("float.hqc", PROGRAM_KIND, content, lambda target: _trace(source, target, inputs))


def _source_content(source: str) -> dict[str, Any] | None:
    """What decides a capture; None where it cannot be known without doing it."""
    from hqc.capture import ARCHITECTURE
    from hqc.capture.source import versions

    if source == "digits" or source.startswith(ARCHITECTURE):
        return {"source": source, "versions": versions()}
    if not Path(source).is_dir():
        return None
    files = [(str(f.relative_to(source)), f.stat()) for f in sorted(Path(source).rglob("*")) if f.is_file()]
    listing = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]
    return {"source": str(Path(source).resolve()), "files": listing, "versions": versions()}


def _trace(source: str, target: Path, inputs: Sequence[InputSpec]) -> None:
    from hqc.capture import find_source, trace

    found = find_source(source)
    if inputs and found.inputs != tuple(inputs):
        found = find_source(source, **_other_sizes(found.inputs, inputs))
    save_program(trace(found), target, force=True)


def _other_sizes(own: Sequence[InputSpec], wanted: Sequence[InputSpec]) -> dict[str, Any]:
    """The options of a source that give it other sizes."""
    mine, theirs = ({spec.name: spec.shape for spec in inputs} for inputs in (own, wanted))
    sizes: dict[str, Any] = {}
    sample, condition = theirs.get("sample", ()), theirs.get("condition", ())
    if len(sample) == 4 and mine.get("sample") != sample:
        sizes["latent_size"] = sample[2:]
    if len(condition) == 3 and mine.get("condition") != condition:
        sizes["condition_length"] = condition[1]
    return sizes


def _quantise(captured: Path, bits: str, wanted: Quantisation, target: Path, runtime: str) -> None:
    from hqc import api

    program = load_program(captured)
    if runtime == "onnxruntime":
        require_taken(program, "onnxruntime")
    task, name = calibration_of(program, captured)
    result = api.ptq(program, recipe_of(wanted), bits, hadamard=wanted.hadamard, task=task)
    del program
    save_program(
        result.evolve(plan=replace(result.plan, training={**result.plan.training, "calibrated_on": name})),
        target,
        force=True,
    )


def recipe_of(wanted: Quantisation) -> "Recipe":
    """Round-to-nearest with the benchmark's calibration."""
    from hqc.recipes import RECIPES

    found = RECIPES["rtn"].set("sampler.num_inference_steps", wanted.n_steps)
    found = found.set("calibrate_activations.samples", wanted.calib_size)
    return found if wanted.rules is None else found.set("select_layers.rules", wanted.rules)


def calibration_of(program: Program, folder: Path) -> "tuple[Task, str]":
    """What to calibrate on and its name: the pipeline's conditions, or noise for a program without one."""
    from hqc import api
    from hqc.capture import ARCHITECTURE
    from hqc.sampling import synthetic_task

    try:
        task = api.task_of(program, folder=pipeline_folder(folder))
    except TrainingError:
        return synthetic_task(program), "noise"
    return task, "noise" if program.origin.source.startswith(ARCHITECTURE) else "the pipeline's conditions"


def _lowered(program: Path, space: Workspace, form: _Form) -> Path:
    """What the runtime runs."""
    if form.runtime == "onnxruntime":
        return exported(program, space, one_timestep=form.one_timestep)
    depends = {"program": content(program), "runtime": form.runtime}
    return space.make("integer.hqc", PROGRAM_KIND, depends, lambda target: _store(program, target, form.runtime))


def _store(program: Path, target: Path, runtime: str) -> None:
    from hqc.runtimes.integer.forms import stored_form

    save_program(stored_form(load_program(program), runtime), target, force=True)


def exported(program: Path, space: Workspace, *, one_timestep: bool = True) -> Path:
    """The export of a quantised program for ONNX Runtime."""
    depends = {"program": content(program), "one_timestep": one_timestep}
    return space.make("integer", EXPORT_KIND, depends, lambda target: _export(program, target, one_timestep))


def _export(program: Path, target: Path, one_timestep: bool) -> None:
    export_program(load_program(program), "onnxruntime", target, force=True, one_timestep=one_timestep)
