"""Restoring images in one step: what each part of the pipeline is given, through the parts before it as they are.

    image --vae-encoder--> z = scale·mean --denoiser at one timestep--> x_0 --vae-decoder--> restored image

A part that is quantised already stands in its place, so that the next one is calibrated on what it will meet; in the
place of the encoder stands the pipeline's own otherwise. Source: PassionSR (arXiv 2411.17106), OSEDiff.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqc.capture.autoencoders import KIND, Part, VaePart, part_of
from hqc.capture.diffusers_models import load_denoiser
from hqc.configurations import read_configuration
from hqc.errors import EvaluationError, TrainingError
from hqc.program import InputSpec, Program
from hqc.runtimes.model import Model
from hqc.sampling.image_files import ImageFolder
from hqc.sampling.image_gain import image_of
from hqc.sampling.one_call import OneCall
from hqc.sampling.task import Denoise, Task, called_once, denoiser, guided, start

__all__ = ["Restorer", "restoring_task"]

_ORDER: tuple[Part, ...] = ("vae-encoder", "denoiser", "vae-decoder")


@dataclass(frozen=True)
class _Latents:
    """How images become latents: the encoder's moments, their mean, shifted and scaled as the denoiser takes them."""

    encode: Denoise
    scale: float
    shift: float

    def of(self, images: Tensor) -> Tensor:
        mean = self.encode(images, torch.zeros(len(images)), None).chunk(2, dim=1)[0]
        return (mean - self.shift) * self.scale

    def decoded(self, latents: Tensor) -> Tensor:
        """As the decoder takes them."""
        return latents / self.scale + self.shift


def restoring_task(
    program: Program,
    folder: Path | None,
    images: Path,
    *,
    through: Sequence[Program] = (),
    timestep: float | None = None,
    denoising: Task | None = None,
) -> Task:
    """The task of a part of a pipeline that restores the images of a folder.

    folder: of the pipeline. through: parts that come before and are quantised already. timestep: of the one call.
    denoising: the denoiser's own task, with its scheduler and conditions: of the program, or of the denoiser that a
    decoder comes behind.

    Raises:
        TrainingError: for parts that do not come before, no autoencoder to encode with, or no timestep.
    """
    part = part_of(program.origin)
    earlier = _earlier(part, through)
    shape: Any = program.inputs[0].shape[1:]
    if part == "vae-encoder":
        return Task(OneCall, shape, draw_sample=ImageFolder(images, shape).draw, drawn_from=_said(images, ()))
    config = _autoencoder(folder)
    latents = _latents(config, earlier.get("vae-encoder"), folder)
    pictures = ImageFolder(images, _image_shape(program, config))
    said = _said(images, through)

    @torch.no_grad()
    def encoded(n: int, generator: torch.Generator) -> Tensor:
        return latents.of(pictures.draw(n, generator))

    if part == "denoiser":
        own = _once(denoising, timestep)
        return replace(own, draw_sample=encoded, drawn_from=f"{own.drawn_from}, {said}" if own.drawn_from else said)
    before, restored = earlier.get("denoiser"), encoded
    if before is not None:
        restored = _restored(before, replace(_once(denoising, timestep), draw_sample=encoded))

    def given(n: int, generator: torch.Generator) -> Tensor:
        return latents.decoded(restored(n, generator))

    return Task(OneCall, shape, draw_sample=given, drawn_from=said)


def _earlier(part: Part, through: Sequence[Program]) -> Mapping[Part, Program]:
    """The parts that come before, by name."""
    found: dict[Part, Program] = {}
    for one in through:
        name = part_of(one.origin)
        if name in found or _ORDER.index(name) >= _ORDER.index(part):
            what = "is given twice" if name in found else f"does not come before the {part}"
            raise TrainingError(f"--through {name}", what, f"The order is {', '.join(_ORDER)}.")
        found[name] = one
    return found


def _once(task: Task | None, timestep: float | None) -> Task:
    if task is None or timestep is None:
        do = "Take a recipe with sampler.timestep (passionsr), or --set sampler.timestep=999."
        raise TrainingError("--images", "is for a denoiser that is called once, and no timestep is said", do)
    return called_once(task, timestep)


def _restored(before: Program, task: Task) -> Any:
    """(n, generator) -> x_0 of the quantised denoiser's one call."""
    run, scheduler = denoiser(before.module()), task.scheduler(1)
    timestep = float(scheduler.timesteps[0])

    @torch.no_grad()
    def draw(n: int, generator: torch.Generator) -> Tensor:
        sample, conditions = start(task, n, generator)
        return image_of(scheduler, timestep, sample, guided(run, sample, timestep, conditions, 1.0))

    return draw


def _autoencoder(folder: Path | None) -> Mapping[str, Any]:
    """The configuration of the pipeline's autoencoder."""
    own = None if folder is None else folder / "vae" / "config.json"
    if own is None or not own.is_file():
        found = "needs the pipeline's autoencoder, and there is none around the program"
        raise TrainingError("--images", found, "Trace the pipeline's folder, with its vae/.")
    config = read_configuration(own)
    if config.get("_class_name") != KIND:
        found = f"encodes with an {KIND}, and the pipeline has a {config.get('_class_name')}"
        raise TrainingError("--images", found, "Leave it out.")
    return config


def _latents(config: Mapping[str, Any], encoder: Program | None, folder: Path | None) -> _Latents:
    scale, shift = _scale_and_shift(config)
    if encoder is not None:
        return _Latents(denoiser(encoder.module()), scale, shift)
    assert folder is not None
    module = VaePart(load_denoiser(folder / "vae", KIND), "vae-encoder").eval().requires_grad_(False)
    return _Latents(lambda sample, timestep, *conditions: module(sample), scale, shift)


def _image_shape(program: Program, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of images whose latents the program takes."""
    side = 2 ** (len(config.get("block_out_channels") or [0]) - 1)
    height, width = (int(d) * side for d in program.inputs[0].shape[-2:])
    return int(config.get("in_channels") or 3), height, width


def _said(images: Path, through: Sequence[Program]) -> str:
    """For reports, and to tell one run from another."""
    parts = [f"{part_of(one.origin)} at {one.plan.bits or 'float'}" for one in through]
    return f"images of {images.name}" + (f" through {', '.join(parts)}" if parts else "")


# ---- the pipeline of several artefacts -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restorer:
    """Restores images with three loaded models: exports or programs, of any runtime.

        restore = Restorer(hqc.load("encoder-onnx"), hqc.load("unet-onnx"), hqc.load("decoder-onnx"))
        images = restore(low_quality, condition)

    timestep: of the denoiser's one call. The scheduler is that of the denoiser's pipeline.

    Raises:
        ArtefactError: for a denoiser without a pipeline. EvaluationError: for a part in another's place.
    """

    encoder: Model
    denoiser: Model
    decoder: Model
    timestep: float = 999.0

    def __post_init__(self) -> None:
        for role in ("encoder", "denoiser", "decoder"):
            _require_role(getattr(self, role), role)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that it takes."""
        channels, height, width = (int(d) for d in _sample_of(self.encoder).shape[1:])
        return channels, height, width

    @torch.no_grad()
    def __call__(self, images: Tensor, *conditions: Tensor | None) -> Tensor:
        """Images [N, C, H, W] in -1…1, and the denoiser's conditions in its order -> restored images.

        Raises:
            EvaluationError: for inputs that a part was not captured for.
        """
        config = self.encoder.unet_config
        latents = _Latents(lambda sample, *rest: self.encoder.session(sample), *_scale_and_shift(config))
        z = latents.of(images)
        output = self.denoiser.session(z, self.timestep, *conditions)
        return self.decoder.session(latents.decoded(image_of(self._scheduler, self.timestep, z, output)))

    @cached_property
    def pipeline(self) -> Any:
        """The denoiser's, whose scheduler it takes.

        Raises:
            ArtefactError: if it has none.
        """
        return self.denoiser.pipeline()

    @property
    def _scheduler(self) -> Any:
        return self.pipeline.scheduler


def _sample_of(model: Model) -> InputSpec:
    return next(spec for spec in model.session.inputs if spec.name == "sample")


def _require_role(model: Model, role: str) -> None:
    """Refuses a part that cannot be this one: by its inputs, and of a half of an autoencoder by its channels."""
    named, config = [spec.name for spec in model.session.inputs], model.unet_config
    found = "denoiser"
    if "timestep" not in named and config.get("_class_name") == KIND:
        channels = {"encoder": config.get("in_channels"), "decoder": config.get("latent_channels")}
        fitting = [half for half, count in channels.items() if count == _sample_of(model).shape[1]]
        found = role if role in fitting else (fitting or ["denoiser"])[0]
    elif "timestep" not in named:
        raise EvaluationError(f"{role} {model.name}", f"takes {', '.join(named)}: no part of a pipeline", _PARTS)
    if found != role:
        raise EvaluationError(f"{role} {model.name}", f"is the {found} of a pipeline", _PARTS)


_PARTS = "Give the encoder, the denoiser and the decoder, in this order."


def _scale_and_shift(config: Mapping[str, Any]) -> tuple[float, float]:
    """Of an autoencoder's latents."""
    return float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
