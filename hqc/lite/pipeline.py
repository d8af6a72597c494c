"""`LitePipeline`: an exported pipeline's folder, drawn from without torch, alone or behind the server."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqc.configurations import check_configuration, read_configuration
from hqc.errors import ArtefactError, EvaluationError, HqcError
from hqc.export.files import CONFIG_FILE, SCHEDULER_FILE
from hqc.lite.arrays import Floats
from hqc.lite.conditions import Given, condition_of
from hqc.lite.forms import form_of, require_listed
from hqc.lite.noise import Noise
from hqc.lite.schedulers import SCHEDULERS, Scheduler, new_scheduler, scheduler_class
from hqc.lite.session import open_part, part_manifest, shape_of
from hqc.lite.styles import attached_scales, check_scales, scale_inputs
from hqc.manifests import PIPELINE_KIND, check_manifest
from hqc.needs import Needs
from hqc.paths import StrPath
from hqc.serving.backend import Drawing, preview_steps
from hqc.serving.split import Split
from hqc.serving.tickets import Call, Task

__all__ = ["LitePipeline"]

Pixels = NDArray[np.uint8]
_DIGIT_CLASSES, _DIGIT_SIZE = 10, (32, 32)
_IMAGES_AT_ONCE = 8
_GUIDANCE = 1.5  # of classes


class LitePipeline:
    """A folder that `hqc export --pipeline` wrote, in ONNX Runtime; a `Backend` of the server.

    An image depends on its own seed alone, and is the one that the pipeline draws with torch, to float rounding.
    """

    previews = True

    def __init__(self, folder: StrPath, *, threads: int | None = None, scheduler: str | None = None) -> None:
        """Opens the models of a folder whose every hash has been checked.

        Args:
            threads: of one call of a model; None leaves the choice to ONNX Runtime. scheduler: ddim, dpmsolver++ or
            euler instead of the folder's own.

        Raises:
            ArtefactError: if the folder is missing, damaged, or no exported pipeline.
            EvaluationError: if its scheduler runs with torch alone, and no other is asked for.
            RuntimeMissingError: if onnxruntime, or for prompts tokenizers, is not installed.
        """
        folder = Path(folder)
        listed = check_manifest(folder, PIPELINE_KIND)["files"]
        self.name, self._scheduler = folder.name, scheduler
        self._form, pipeline = form_of(folder)
        self._config = _configuration(folder / SCHEDULER_FILE)
        self.most_steps = int(self._config.get("num_train_timesteps", 1000))
        scheduler_class(self._config, scheduler)
        require_listed(folder, self._form, listed)
        denoiser = next(
            (folder / name for name in ("unet", "transformer") if (folder / name).is_dir()), folder / "unet"
        )
        told = part_manifest(denoiser)
        self._latents, self._styles = shape_of(told, "sample", denoiser), attached_scales(told, denoiser)
        vae = _configuration(folder / "vae_decoder" / CONFIG_FILE)
        self._scale, channels, enlarged = _of_decoder(vae, folder)
        self._denoiser, self._split = open_part(denoiser, threads), Split()
        self._decoder = open_part(folder / "vae_decoder", threads)
        size = (self._latents[2] * enlarged, self._latents[1] * enlarged)
        self._condition, classes = condition_of(pipeline, folder, denoiser, size, threads)
        digits = channels == 1 and classes == _DIGIT_CLASSES and size == _DIGIT_SIZE
        options, own = self._form.options, self._form.own_guidance
        self.needs = Needs(pipeline, self._form.kind, classes, options, size, digits=digits, own_guidance=own)

    @property
    def schedulers(self) -> tuple[str, ...]:
        """What schedulers may be asked for."""
        return tuple(SCHEDULERS)

    @property
    def loras(self) -> tuple[str, ...]:
        """Names of LoRAs that are attached to the denoiser."""
        return tuple(self._styles)

    @property
    def sampler(self) -> str:
        """diffusers' class of the scheduler that is taken where none is asked for."""
        return scheduler_class(self._config, self._scheduler)

    def cut(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the tokenizer takes."""
        return sum(map(self._condition.cuts, prompts))

    def around(self) -> AbstractContextManager[Any]:
        """Nothing is needed around the engine."""
        return nullcontext()

    def check_steps(self, num_inference_steps: int, scheduler: str | None) -> str | None:
        """Why a scheduler does not take so many steps; None if it does."""
        try:
            new_scheduler(self._config, num_inference_steps, name=scheduler or self._scheduler)
        except HqcError as error:
            return f"{error.found}. {error.do}"
        return None

    def draw(
        self,
        label: int = 0,
        prompt: str | None = None,
        *,
        seed: int = 0,
        steps: int = 20,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        negative_prompt: str = "",
        scheduler: str | None = None,
        loras: Mapping[str, float] | None = None,
    ) -> Pixels:
        """One image, uint8 [H, W] or [H, W, 3], of a class, of a prompt, or of nothing in particular.

        guidance_scale: None is the pipeline's own of prompts (7.5 of Stable Diffusion), 1.5 of classes. loras: scales
        of those of `self.loras` that are not to be as they were attached.

        Raises:
            EvaluationError: if that is not what the pipeline takes.
        """
        guidance = self.needs.usual_guidance(_GUIDANCE) if guidance_scale is None else guidance_scale
        new_scheduler(self._config, steps, name=scheduler or self._scheduler, eta=eta)  # refuses an eta without effect
        scales = tuple((loras or {}).items())
        drawing = Drawing(label, prompt, negative_prompt, seed, steps, guidance, eta, scheduler, loras=scales)
        return next(self.draw_all([drawing]))

    def draw_all(self, drawings: Sequence[Drawing], at_once: int = _IMAGES_AT_ONCE) -> Iterator[Pixels]:
        """The images of some drawings in their order, up to `at_once` of them in one call of the denoiser.

        Raises:
            EvaluationError: if one of them is not what the pipeline takes.
        """
        for start in range(0, len(drawings), at_once):
            under_way = {i: self.begin(drawing) for i, drawing in enumerate(drawings[start : start + at_once])}
            outputs: dict[int, Any] = dict.fromkeys(under_way)
            images: dict[int, Pixels] = {}
            while under_way:
                calls = {}
                for i, steps in list(under_way.items()):
                    try:
                        calls[i] = _next_call(steps, outputs[i])
                    except StopIteration as end:
                        images[i] = end.value
                        del under_way[i]
                outputs = dict(zip(calls, self.denoise(list(calls.values())), strict=True)) if calls else {}
            yield from (images[i] for i in sorted(images))

    def denoise(self, calls: Sequence[Call], at_once: int = 1) -> list[Floats]:
        """The denoiser's outputs of several calls, made in one, or in so many side by side."""
        names, rows = calls[0].inputs.keys(), [call.rows for call in calls]
        joined = {name: np.concatenate([call.inputs[name] for call in calls]) for name in names}
        output = np.concatenate(self._split(self._denoiser, joined, names, sum(rows), at_once))
        return np.split(output, np.cumsum(rows)[:-1])

    def begin(self, drawing: Drawing) -> Generator[Call | Task, Floats, Pixels]:
        """One image as steps: yields what the denoiser is to be called with, is sent its output, returns the pixels.

        As diffusers' pipelines do, it gives eta to a scheduler that has one.

        Raises:
            EvaluationError: if the drawing is not what the pipeline takes.
        """
        self._check(drawing)
        name = drawing.scheduler or self._scheduler
        eta = drawing.eta if scheduler_class(self._config, name) == SCHEDULERS["ddim"] else 0.0
        scheduler = new_scheduler(self._config, drawing.num_inference_steps, name=name, eta=eta)
        return self._steps(drawing, scheduler)

    def _steps(self, drawing: Drawing, scheduler: Scheduler) -> Generator[Call | Task, Floats, Pixels]:
        noise, before = Noise(drawing.seed), None
        shape = (1, *self._latents)
        guidance = drawing.guidance_scale if self.needs.guides and drawing.guidance_scale > 1 else None
        rows = 1 if guidance is None else 2
        told = {**self._conditions(drawing, guided=guidance is not None), **self._scales(drawing, rows)}
        previews = preview_steps(len(scheduler.timesteps), drawing.previews) if drawing.see is not None else []
        x = noise.normal(shape)
        if not self._form.unscaled:
            x = x * scheduler.init_noise_sigma
        for i, timestep in enumerate(scheduler.timesteps):
            seen = scheduler.scaled(x, i)
            x = seen if self._form.unscaled else x
            output = (yield _call(seen, timestep, told, rows))[:, : shape[1]]  # without variances
            if guidance is not None:
                away, towards = output[:1], output[1:]
                output = away + np.float32(guidance) * (towards - away)
            drawn = noise.normal(shape) if scheduler.draws_noise else None
            x, before = scheduler.step(output, i, x, drawn, before)
            if drawing.see is not None and i + 1 in previews:
                drawing.see(previews.index(i + 1), (yield from self._pixels(before)))
        return (yield from self._pixels(x, last=True))

    def _conditions(self, drawing: Drawing, *, guided: bool) -> Given:
        """What every call of the denoiser is told; with guidance what it leads away from first."""
        found = self._condition.of(drawing.label, drawing.prompt)
        if not guided:
            return found
        away = self._condition.away(drawing.negative_prompt)
        return {name: np.concatenate([away[name], value]) for name, value in found.items()}

    def _scales(self, drawing: Drawing, rows: int) -> dict[str, Floats]:
        return scale_inputs(self._styles, drawing.loras, rows)

    def _pixels(self, latents: Floats, *, last: bool = False) -> Generator[Task, Floats, Pixels]:
        """What the decoder makes of latents: round(255·clamp(x/2 + 1/2, 0, 1))."""
        decoded = (yield Task(lambda: self._decoder(sample=latents / np.float32(self._scale)), last))[0]
        if not np.isfinite(decoded).all():
            raise EvaluationError(self.name, "gives an image that is not finite", "Compare it with the float model.")
        image = np.clip(decoded * np.float32(0.5) + np.float32(0.5), 0, 1)
        pixels = np.rint(image * np.float32(255)).astype(np.uint8)
        return pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))

    def _check(self, drawing: Drawing) -> None:
        if self.needs.kind == "class_label":
            self.needs.check_labels([drawing.label])
        if (drawing.prompt is not None) != (self.needs.kind == "prompt"):
            takes = {"prompt": "a prompt", "class_label": "a class label", "nothing": "neither prompt nor label"}
            raise EvaluationError(self.name, f"takes {takes[self.needs.kind]}", "Ask it for what it takes.")
        check_scales(drawing.loras, self._styles)
        if drawing.eta > 0 and "eta" not in self.needs.options:
            raise EvaluationError(f"eta {drawing.eta:g}", f"{self.needs.pipeline} takes none", "Leave it out.")
        if not 0 <= drawing.eta <= 1:
            raise EvaluationError(f"eta {drawing.eta:g}", "expected 0 to 1", "Correct it.")


def _next_call(steps: Generator[Call | Task, Floats, Pixels], output: Any) -> Call:
    """What an image asks of the denoiser next; its tasks are run at once."""
    while isinstance(wanted := steps.send(output), Task):
        output = wanted.run()
    return wanted


def _call(sample: Floats, timestep: Any, told: Mapping[str, Any], rows: int) -> Call:
    inputs = {"sample": np.repeat(sample, rows, axis=0), "timestep": np.full(rows, timestep, np.float32)}
    return Call({**inputs, **told}, rows)


def _configuration(path: Path) -> dict[str, Any]:
    check_configuration(path)
    return read_configuration(path)


def _of_decoder(config: Mapping[str, Any], folder: Path) -> tuple[float, int, int]:
    """What latents are divided by, channels of the images, and pixels of a latent's side."""
    try:
        scale, channels = float(config["scaling_factor"]), int(config["out_channels"])
        enlarged = 2 ** (len(config["block_out_channels"]) - 1)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(str(folder), f"has a decoder without {error}", "Export the pipeline again.") from error
    if channels not in (1, 3) or not scale > 0:
        raise ArtefactError(str(folder), f"draws {channels} channels; expected 1 or 3", "Run it with torch.")
    return scale, channels, enlarged
