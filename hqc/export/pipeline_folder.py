"""`export_pipeline`: a whole pipeline as ONNX files in optimum's layout, which runs without torch.

NAME/model_index.json             the pipeline's own: its class, and the class of every part
NAME/scheduler/                   scheduler_config.json
NAME/unet/                        the denoiser as `export_program` writes it: model.onnx, config.json, …
NAME/vae_decoder/                 the autoencoder's decoder in float, the same way
NAME/text_encoder/, tokenizer/    of Stable Diffusion, of XL two of each; see `hqc.export.conditioning`
NAME/class_embedder/              of hqc's class-conditional pipeline
NAME/manifest.json                kind hqc-pipeline: sha256 and size of every file
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hqc.atomic import atomic_folder, refuse_nested
from hqc.capture.autoencoders import KIND as AUTOENCODER
from hqc.capture.autoencoders import from_autoencoder, part_of
from hqc.capture.diffusers_models import CaptureOptions
from hqc.capture.sources import trace
from hqc.errors import ExportError
from hqc.export.artefact import ExportReport, export_program
from hqc.export.conditioning import last_but_one, write_class_embedder, write_text_encoder, write_tokenizer
from hqc.export.files import CLASS_LABELS, CONFIG_FILE, LAST_HIDDEN_STATE, SCHEDULER_FILE, TEXT_EMBEDS
from hqc.export.interface import Names
from hqc.export.prepare import Target
from hqc.manifests import PIPELINE_KIND, write_manifest
from hqc.paths import StrPath
from hqc.pipeline_parts import INDEX
from hqc.program import BATCH, Program
from hqc.quiet import quiet_libraries
from hqc.runtimes.pipeline_files import check_pipeline
from hqc.runtimes.text_encoder import load_text_pipeline
from hqc.stages import doing
from hqc.styles.record import scale_input

__all__ = ["PIPELINES", "PipelineReport", "export_pipeline", "require_pipeline"]

_ALONE = "Export the denoiser alone, without --pipeline."
# Parts that check or steer images: an export without them would be another pipeline.
_MISSED = ("safety_checker", "image_encoder")
# What a pipeline gives its denoiser besides the sample and the time.
_TOLD: Mapping[str, tuple[str, ...]] = {
    "ClassConditionalLDMPipeline": ("condition",),
    "UnconditionalLDMPipeline": (),
    "DiTPipeline": (CLASS_LABELS,),
    "StableDiffusionPipeline": ("condition",),
    "StableDiffusionXLPipeline": ("condition", TEXT_EMBEDS, "time_ids"),
}
PIPELINES = tuple(_TOLD)
"""What runs without torch."""


@dataclass(frozen=True)
class PipelineReport:
    """What was written: the folder, its parts, and what `export_program` says of the denoiser."""

    folder: Path
    parts: tuple[str, ...]
    denoiser: ExportReport

    def __str__(self) -> str:
        return f"{self.denoiser}\nparts    {', '.join(self.parts)}"


def require_pipeline(program: Program, source: Path | None, target: Target) -> dict[str, Any]:
    """The index of a pipeline that can be exported whole.

    Raises:
        ExportError: saying what is in the way. ArtefactError: if the folder cannot be trusted.
    """
    if target == "tensorrt":
        raise ExportError("--pipeline", "is not for target tensorrt", "Use --target onnxruntime or portable.")
    if part_of(program.origin) != "denoiser":
        raise ExportError("--pipeline", "takes a denoiser; the program is a half of an autoencoder", _ALONE)
    if source is None:
        raise ExportError("--pipeline", "the program was not traced from a pipeline", "Trace the pipeline's folder.")
    index = check_pipeline(source)
    kind = str(index["_class_name"])
    if kind not in PIPELINES:
        raise ExportError(f"pipeline {kind}", f"is none of {', '.join(PIPELINES)}", _ALONE)
    known = {"sample", "timestep", *_TOLD[kind], *map(scale_input, program.attached_styles)}
    if extra := sorted({spec.name for spec in program.inputs} - known):
        raise ExportError("denoiser", f"takes {', '.join(extra)}, which is given with torch alone", _ALONE)
    if missed := [name for name in _MISSED if any(index.get(name) or ())]:
        do = f"Set {missed[0]} to [null, null] in its {INDEX}, or export the denoiser alone."
        raise ExportError(f"pipeline {kind}", f"has a {missed[0]}, which is not exported", do)
    if (autoencoder := (index.get("vae") or [None, None])[1]) != AUTOENCODER:
        raise ExportError(f"pipeline {kind}", f"has a {autoencoder} as its vae; expected {AUTOENCODER}", _ALONE)
    if not (source / SCHEDULER_FILE).is_file():
        raise ExportError(str(source), f"has no {SCHEDULER_FILE}", "Check the folder.")
    return index


def export_pipeline(
    program: Program,
    target: Target,
    folder: StrPath,
    *,
    pipeline: Path | None,
    names: Names = "optimum",
    opset: int = 21,
    force: bool = False,
    float_program: Program | None = None,
    one_timestep: bool = False,
    functions: bool = False,
) -> PipelineReport:
    """Writes a program with all that its pipeline needs, verifies every part, and only then puts it in its place.

    Args:
        program: the denoiser, at any stage. target: `portable` or `onnxruntime`, of the denoiser; the rest is
        `portable`. folder: written whole or not at all. pipeline: the diffusers folder that it was traced from.
        names: of inputs and outputs. The others as for `export_program`.

    Raises:
        ExportError: if the pipeline has what cannot be exported, or a part is out of bounds.
        ArtefactError: if the folder exists or cannot be written, or the pipeline cannot be loaded.
    """
    folder = Path(folder)
    index = require_pipeline(program, pipeline, target)
    assert pipeline is not None
    refuse_nested(folder, pipeline)
    latents = next(spec.shape for spec in program.inputs if spec.name == "sample")
    with atomic_folder(folder, force=force) as temporary:
        denoiser = "transformer" if "transformer" in index else "unet"
        report = export_program(
            program,
            target,
            temporary / denoiser,
            opset=opset,
            float_program=float_program,
            one_timestep=one_timestep,
            functions=functions,
            names=names,
        )
        _write_config(temporary / denoiser, program.origin.unet_config)
        with doing("writing the decoder"):
            _write_decoder(pipeline, (int(latents[2]), int(latents[3])), temporary, names, opset)
        with doing("writing what gives the condition"):
            _CONDITIONS[index["_class_name"]](program, pipeline, temporary, opset)
        (temporary / "scheduler").mkdir()
        shutil.copyfile(pipeline / SCHEDULER_FILE, temporary / SCHEDULER_FILE)
        shutil.copyfile(pipeline / INDEX, temporary / INDEX)
        parts = tuple(sorted(path.name for path in temporary.iterdir() if path.is_dir()))
        fields = {"target": target, "parts": parts, "origin": asdict(program.origin)}
        write_manifest(temporary, PIPELINE_KIND, fields)
    return PipelineReport(folder, parts, replace(report, folder=folder / denoiser))


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """The configuration beside a model, which optimum wants whatever its names are."""
    if not (folder / CONFIG_FILE).exists():
        (folder / CONFIG_FILE).write_text(json.dumps(dict(config), indent=1) + "\n", encoding="utf-8")


def _write_decoder(pipeline: Path, size: tuple[int, int], folder: Path, names: Names, opset: int) -> None:
    options = CaptureOptions(latent_size=size)
    decoder = trace(from_autoencoder(pipeline, str(pipeline), "vae-decoder", options))
    if decoder.origin.unet_config.get("latents_mean") is not None:
        raise ExportError("vae", "has means of its latents, which are not exported", _ALONE)
    export_program(decoder, "portable", folder / "vae_decoder", opset=opset, names=names)
    _write_config(folder / "vae_decoder", decoder.origin.unet_config)


def _write_classes(program: Program, pipeline: Path, folder: Path, opset: int) -> None:
    from hqc.models.ldm import ClassEmbedder

    with quiet_libraries():
        embedder = ClassEmbedder.from_pretrained(pipeline / "class_embedder", use_safetensors=True)
    write_class_embedder(embedder, folder / "class_embedder", opset)


def _write_nothing(program: Program, pipeline: Path, folder: Path, opset: int) -> None:
    """An unconditional pipeline has no condition; a class whose number the denoiser takes needs no file."""


def _write_text(program: Program, pipeline: Path, folder: Path, opset: int) -> None:
    loaded = load_text_pipeline(pipeline)
    encoder = loaded.text_encoder
    _require_encoder(encoder, "CLIPTextModel")
    _require_condition(program, loaded.tokenizer, int(encoder.config.hidden_size))
    tokens = write_tokenizer(loaded.tokenizer, pipeline / "tokenizer", folder / "tokenizer")
    write_text_encoder(encoder, tokens, folder / "text_encoder", opset)


def _write_two_texts(program: Program, pipeline: Path, folder: Path, opset: int) -> None:
    """Of Stable Diffusion XL, whose denoiser reads both encoders' last but one hidden states."""
    loaded = load_text_pipeline(pipeline)
    first, second = loaded.text_encoder, loaded.text_encoder_2
    _require_encoder(first, "CLIPTextModel")
    _require_encoder(second, "CLIPTextModelWithProjection")
    width = int(first.config.hidden_size) + int(second.config.hidden_size)
    for tokenizer in (loaded.tokenizer, loaded.tokenizer_2):
        _require_condition(program, tokenizer, width)
    tokens = write_tokenizer(loaded.tokenizer, pipeline / "tokenizer", folder / "tokenizer")
    write_text_encoder(first, tokens, folder / "text_encoder", opset, (LAST_HIDDEN_STATE, last_but_one(first)))
    tokens = write_tokenizer(loaded.tokenizer_2, pipeline / "tokenizer_2", folder / "tokenizer_2")
    names = (TEXT_EMBEDS, LAST_HIDDEN_STATE, last_but_one(second))
    write_text_encoder(second, tokens, folder / "text_encoder_2", opset, names)


def _require_encoder(encoder: Any, wanted: str) -> None:
    if (kind := type(encoder).__name__) != wanted:
        raise ExportError("text encoder", f"is a {kind}; expected a {wanted}", _ALONE)
    if getattr(encoder.config, "use_attention_mask", False):
        raise ExportError("text encoder", "takes an attention mask, which is not exported", _ALONE)


def _require_condition(program: Program, tokenizer: Any, width: int) -> None:
    wanted = {spec.name: spec.shape for spec in program.inputs}
    given = (BATCH, int(tokenizer.model_max_length), width)
    if wanted.get("condition") != given:
        found = f"takes a condition {list(wanted.get('condition', ()))}; the text encoder gives {list(given)}"
        raise ExportError("denoiser", found, "Trace the pipeline with its own --condition-length.")


_CONDITIONS: Mapping[str, Callable[[Program, Path, Path, int], None]] = {
    "ClassConditionalLDMPipeline": _write_classes,
    "UnconditionalLDMPipeline": _write_nothing,
    "DiTPipeline": _write_nothing,
    "StableDiffusionPipeline": _write_text,
    "StableDiffusionXLPipeline": _write_two_texts,
}
