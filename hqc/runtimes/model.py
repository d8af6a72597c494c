"""`load`: whatever hqc wrote, ready to run, with the diffusers pipeline around it."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from hqc.claims import restore_interrupted
from hqc.errors import ArtefactError, RuntimeMissingError
from hqc.export.artefact import EXPORT_KIND
from hqc.export.model import DATA_FILE, MODEL_FILE
from hqc.manifests import PIPELINE_KIND
from hqc.models import digits_path
from hqc.paths import StrPath
from hqc.pipeline_parts import pipeline_variant
from hqc.plan import QuantPlan
from hqc.program import Program
from hqc.quiet import quiet_libraries
from hqc.runtimes.base import Session
from hqc.runtimes.ort_runtime import OrtSession
from hqc.runtimes.pipeline_files import check_pipeline, read_index
from hqc.runtimes.torch_runtime import ModuleSession, TorchSession
from hqc.runtimes.unet import SessionUNet, as_unet
from hqc.stages import doing
from hqc.storage import load_program

__all__ = [
    "Description",
    "Model",
    "Runtime",
    "artefact_kind",
    "describe",
    "fitting_runtime",
    "load",
    "pipeline_around",
]

Runtime = Literal["torch", "torch-int8", "torch-cuda", "onnxruntime", "tensorrt"]
DIGITS = "digits"
PROGRAM_KIND = "hqc-program"


@dataclass(frozen=True)
class Model:
    """A loaded denoiser: its session, its plan, its size on disk, and the pipeline that it belongs to.

    `pipeline_folder` is None where the source had no pipeline.
    """

    name: str
    runtime: str
    session: Session
    plan: QuantPlan
    size_bytes: int
    unet_config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    pipeline_folder: Path | None = None

    def as_denoiser(self) -> SessionUNet:
        """The denoiser as a drop-in for a diffusers pipeline's `.unet` or `.transformer`."""
        return as_unet(self.session, self.unet_config, timesteps=self.plan.timesteps)

    def as_unet(self) -> SessionUNet:
        """The same as `as_denoiser`."""
        return self.as_denoiser()

    def pipeline(self) -> Any:
        """The diffusers pipeline with this denoiser in it.

        Raises:
            ArtefactError: if there is no pipeline, or diffusers cannot load it.
        """
        _require_denoiser(self.name, self.unet_config)
        if self.pipeline_folder is None:
            raise _no_pipeline(self.name)
        return _load_pipeline(self.pipeline_folder, self.as_denoiser())


@dataclass(frozen=True)
class _OrtOptions:
    """How an export is opened."""

    threads: int | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Description:
    """What is known of a model without its weights: its pipeline's class, the denoiser's conditions by name."""

    pipeline: type
    conditions: tuple[str, ...]


def describe(path: StrPath) -> Description:
    """Reads a model's manifest and the index of its pipeline.

    Raises:
        ArtefactError: if the path is no artefact, or there is no pipeline around its denoiser.
    """
    folder = Path(path)
    if str(path) == DIGITS:
        return Description(_pipeline_class(digits_path(), read_index(digits_path())), ("condition",))
    manifest = _read_manifest(folder)
    try:
        names = tuple(str(spec["name"]) for spec in manifest["inputs"] if spec.get("default") is None)
        reference, config = str(manifest["origin"]["pipeline"]), dict(manifest["origin"]["unet_config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(str(folder / "manifest.json"), f"is damaged ({error})", "Write it again.") from error
    _require_denoiser(folder.name, config)
    pipeline = pipeline_around(folder, reference)
    if pipeline is None:
        raise _no_pipeline(folder.name)
    conditions = tuple(name for name in names if name not in ("sample", "timestep"))
    return Description(_pipeline_class(pipeline, read_index(pipeline)), conditions)


def _require_denoiser(name: str, config: Mapping[str, Any]) -> None:
    """A half of an autoencoder does not sample."""
    if config.get("_class_name") == "AutoencoderKL":
        do = "Give the pipeline's denoiser; `hqc.load` runs the half by itself."
        raise ArtefactError(name, "is a half of an autoencoder, no denoiser", do)


def _no_pipeline(name: str) -> ArtefactError:
    return ArtefactError(name, "has no pipeline around its denoiser", "Trace a pipeline folder, or use as_denoiser().")


def load(
    path: StrPath, *, runtime: Runtime | None = None, threads: int | None = None, cache: StrPath | None = None
) -> Model:
    """Loads a Program folder (torch), an export folder (onnxruntime, tensorrt), or `digits`, the bundled float model.

    runtime: None picks the one that fits; torch-int8 runs a quantised Program in int8 on the CPU, torch-cuda on a GPU;
    tensorrt runs the engine of an export for TensorRT, building it once if there is none for the GPU, and is picked for
    such an export where it can run. threads: of one onnxruntime call. cache: a folder of models as onnxruntime has
    optimised them for this machine, with which a large export opens several times as fast the next time; for tensorrt,
    of built engines; for torch-int8, of what is compiled for this CPU.

    Raises:
        ArtefactError: if the path is no artefact, or one that is damaged.
        RuntimeMissingError: if the runtime is unknown, not installed, or cannot run this artefact.
    """
    if runtime is not None and runtime not in get_args(Runtime):
        raise RuntimeMissingError(
            f"runtime {runtime!r}", f"unknown; there are {', '.join(get_args(Runtime))}", "Use one of them."
        )
    kind = DIGITS if str(path) == DIGITS else artefact_kind(Path(path))
    openers = _OPENERS[kind]
    if runtime is not None and runtime not in openers:
        raise RuntimeMissingError(f"runtime {runtime}", f"cannot run {path}, {_WHAT[kind]}", _DO[kind])
    opener = openers[_fitting(kind, Path(path)) if runtime is None else runtime]
    with doing(f"loading {path}"):
        return opener(Path(path), _OrtOptions(threads, None if cache is None else Path(cache)))


def fitting_runtime(path: StrPath) -> str:
    """The runtime that `load` takes for a path where none is named.

    Raises:
        ArtefactError: if the path is no artefact.
    """
    kind = DIGITS if str(path) == DIGITS else artefact_kind(Path(path))
    return _fitting(kind, Path(path))


def _fitting(kind: str, folder: Path) -> str:
    """The runtime of an artefact: tensorrt for an export for it where that can run, else the first of its kind."""
    if kind == EXPORT_KIND:
        from hqc.runtimes.trt.plans import TARGET, read_manifest, usable_here

        manifest = read_manifest(folder)
        if manifest.get("target") == TARGET and usable_here(folder, manifest):
            return "tensorrt"
    return next(iter(_OPENERS[kind]))


def artefact_kind(folder: Path) -> str:
    """hqc-program or hqc-export, from the folder's manifest.

    Raises:
        ArtefactError: if it is neither.
    """
    return str(_read_manifest(folder)["format"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    restore_interrupted(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "has no manifest.json" if folder.is_dir() else "no such folder"
        raise ArtefactError(str(folder), what, f"Give a folder that hqc wrote, or `{DIGITS}`.") from error
    except (OSError, ValueError) as error:
        raise ArtefactError(
            str(folder / "manifest.json"), f"cannot be read ({error})", "Write the artefact again."
        ) from error
    kind = manifest.get("format") if isinstance(manifest, dict) else None
    if kind == PIPELINE_KIND:
        do = "Give it to `hqc sample` or `hqc serve`, or its unet/ folder, which is an export like any other."
        raise ArtefactError(str(folder), "is an exported pipeline, which runs without torch", do)
    if kind in _ELSEWHERE:
        what, do = _ELSEWHERE[kind]
        raise ArtefactError(str(folder), f"is {what}", do)
    if kind not in (PROGRAM_KIND, EXPORT_KIND):
        raise ArtefactError(str(folder), f"holds {kind!r}", f"Give a folder that hqc wrote, or `{DIGITS}`.")
    return dict(manifest)


def _open_program(folder: Path, options: _OrtOptions) -> Model:
    program = load_program(folder)
    return _program_model(folder, program, TorchSession(program))


def _open_program_in_int8(folder: Path, options: _OrtOptions) -> Model:
    from hqc.runtimes.integer.cpu.operators import require_operators
    from hqc.runtimes.integer.cpu.session import CpuSession

    require_operators()  # before the weights are read
    program = load_program(folder)
    return _program_model(folder, program, CpuSession(program, cache=options.cache))


def _open_program_on_gpu(folder: Path, options: _OrtOptions) -> Model:
    from hqc.runtimes.integer.cuda.session import CudaSession, require_gpu

    require_gpu()  # before the weights are read
    program = load_program(folder)
    return _program_model(folder, program, CudaSession(program))


def _program_model(folder: Path, program: Program, session: Session) -> Model:
    return Model(
        name=folder.name,
        runtime=session.name,
        session=session,
        plan=program.plan,
        size_bytes=_size(folder, ("graph.json", "weights.safetensors")),
        unet_config=program.origin.unet_config,
        pipeline_folder=pipeline_around(folder, program.origin.pipeline),
    )


def _open_export(folder: Path, options: _OrtOptions) -> Model:
    return _export_model(folder, OrtSession(folder, threads=options.threads, cache=options.cache))


def _open_engine(folder: Path, options: _OrtOptions) -> Model:
    from hqc.runtimes.trt.plans import PlanOptions
    from hqc.runtimes.trt.session import TensorRtSession

    return _export_model(folder, TensorRtSession(folder, PlanOptions(cache=options.cache)))


def _export_model(folder: Path, session: Session) -> Model:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    try:
        plan = QuantPlan.from_dict(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
        origin = manifest["origin"]
        config, reference = dict(origin["unet_config"]), str(origin["pipeline"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(str(folder), f"is not an export ({error})", "Export it again.") from error
    return Model(
        name=folder.name,
        runtime=session.name,
        session=session,
        plan=plan,
        size_bytes=_size(folder, (MODEL_FILE, DATA_FILE)),
        unet_config=config,
        pipeline_folder=pipeline_around(folder, reference),
    )


def _open_digits(path: Path, options: _OrtOptions) -> Model:
    from diffusers import UNet2DConditionModel

    folder = digits_path()
    try:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ArtefactError(
            str(folder), f"the bundled model cannot be loaded ({error})", "Install hqc again."
        ) from error
    files = [file.name for file in (folder / "unet").iterdir() if file.suffix == ".safetensors"]
    return Model(
        name=DIGITS,
        runtime="torch",
        session=ModuleSession(unet),
        plan=QuantPlan(),
        size_bytes=_size(folder / "unet", files),
        unet_config=dict(unet.config),
        pipeline_folder=folder,
    )


_OPENERS: Mapping[str, Mapping[str, Callable[[Path, _OrtOptions], Model]]] = {
    PROGRAM_KIND: {"torch": _open_program, "torch-int8": _open_program_in_int8, "torch-cuda": _open_program_on_gpu},
    EXPORT_KIND: {"onnxruntime": _open_export, "tensorrt": _open_engine},
    DIGITS: {"torch": _open_digits},
}
"""What runs each kind; see `_fitting` for what is taken where none is named."""
_WHAT = {
    PROGRAM_KIND: "a program: torch, torch-int8 and torch-cuda run those",
    EXPORT_KIND: "an ONNX export: onnxruntime runs those, tensorrt those for TensorRT",
    DIGITS: "the bundled float model: only torch runs it",
}
_DO = {
    PROGRAM_KIND: "Export it with `hqc export` and run the export.",
    EXPORT_KIND: "Leave the runtime out, or give the program folder that it was exported from.",
    DIGITS: "Trace it with `hqc trace digits`, then export that.",
}


_ELSEWHERE = {
    "hqc-diffusers": (
        "a denoiser for diffusers",
        "Load it with from_pretrained after `import hqc.integrations.diffusers`, or give the program.",
    ),
    "hqc-triton": ("a model for Triton Inference Server", "Give the export that it was made from."),
}
"""Kinds of artefacts that others load, and what to do."""


def _size(folder: Path, names: tuple[str, ...] | list[str]) -> int:
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


# ---- the pipeline --------------------------------------------------------------------------------------------------


def pipeline_around(folder: Path, reference: str) -> Path | None:
    """A pipeline's folder: the copy inside the artefact, else the one that the origin names; None if it is gone."""
    if (folder / "pipeline" / "model_index.json").is_file():
        return folder / "pipeline"
    if reference == DIGITS:
        return digits_path()
    return Path(reference) if reference and (Path(reference) / "model_index.json").is_file() else None


def _load_pipeline(folder: Path, denoiser: SessionUNet) -> Any:
    index = check_pipeline(folder)
    kind, part = _pipeline_class(folder, index), "transformer" if "transformer" in index else "unet"
    try:
        with quiet_libraries():
            # diffusers checks the class of a module that it is handed here, and takes any where it builds a pipeline.
            loaded = kind.from_pretrained(
                folder,
                **{part: None},
                use_safetensors=True,
                local_files_only=True,
                variant=pipeline_variant(folder, index),
            )
            pipeline = _rebuilt(loaded.to(torch.float32), index, part, denoiser)
    except Exception as error:  # whatever a configuration makes diffusers raise
        found = " ".join(str(error).split())[:160] or type(error).__name__
        raise ArtefactError(
            str(folder), f"diffusers could not load the pipeline ({found})", "Check the folder."
        ) from error
    return pipeline


def _rebuilt(loaded: Any, index: Mapping[str, Any], part: str, denoiser: SessionUNet) -> Any:
    """The pipeline with its denoiser from the start: constructors read the size of new images from it."""
    accepted = set(inspect.signature(type(loaded).__init__).parameters) - {"self"}
    options = {name: value for name, value in {**index, **loaded.config}.items() if name in accepted}
    return type(loaded)(**{**options, **loaded.components, part: denoiser})


def _pipeline_class(folder: Path, index: Mapping[str, Any]) -> Any:
    import diffusers

    import hqc.models.ldm as own

    name = str(index["_class_name"])
    for module in (own, diffusers):
        kind = getattr(module, name, None)
        if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
            return kind
    raise ArtefactError(str(folder), f"holds a {name}, which diffusers does not have", "Update diffusers.")
