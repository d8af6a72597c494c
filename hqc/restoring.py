"""Folders of images through a `Restorer`: what its denoiser is given beside them, and restored images as PNG files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from hqc.errors import EvaluationError
from hqc.paths import StrPath
from hqc.program import InputSpec, Origin, Program
from hqc.restoration import Restorer
from hqc.runtimes.model import Model
from hqc.sampling.image_files import ImageFolder
from hqc.sampling.prompts import prompt_task
from hqc.sampling.sources import conditions_of
from hqc.storage import atomic_folder, write_manifest

__all__ = ["Conditions", "conditions_asked", "restore_folder"]

Conditions = Callable[[int], tuple[Tensor | None, ...]]
"""How many images -> the denoiser's conditions in its order."""
IMAGES_KIND = "hqc-restored-images"


def conditions_asked(restorer: Restorer, *, prompt: str | None = None, label: int | None = None) -> Conditions:
    """The same condition for every image: a prompt, the empty one unless another is given, a class, or nothing.

    Raises:
        EvaluationError: for a condition that the denoiser does not take, a class that is missing or that there is not.
        TrainingError: if the pipeline does not encode prompts into what the denoiser takes.
    """
    wanted = conditions_of(restorer.denoiser.session.inputs)
    if not wanted:
        _refuse(restorer.denoiser, "nothing", prompt=prompt, label=label)
        return lambda n: ()
    embedder = getattr(restorer.pipeline, "class_embedder", None)
    if embedder is not None or [spec.name for spec in wanted] == ["class_labels"]:
        _refuse(restorer.denoiser, "a class", prompt=prompt)
        chosen = _class_asked(restorer.denoiser, wanted[0], embedder, label)
        return lambda n: (chosen.expand(n, *chosen.shape[1:]).contiguous(),)
    _refuse(restorer.denoiser, "a prompt", label=label)
    task = prompt_task(restorer.pipeline, _taking(restorer.denoiser), [prompt or ""])

    def draw(n: int) -> tuple[Tensor | None, ...]:
        assert task.draw_conditions is not None
        found = task.draw_conditions(n, torch.Generator())
        return found if isinstance(found, tuple) else (found,)

    return draw


def _refuse(model: Model, taken: str, **given: object) -> None:
    """Refuses what was asked for and is not taken."""
    for name, value in given.items():
        if value is not None:
            raise EvaluationError(f"--{name}", f"{model.name} takes {taken} besides the image", "Leave it out.")


@torch.no_grad()
def _class_asked(model: Model, spec: InputSpec, embedder: Any, label: int | None) -> Tensor:
    """The condition [1, …] of a class."""
    count = int(embedder.config.num_classes if embedder is not None else (spec.span or (0, 1))[1])
    if label is None:
        raise EvaluationError(model.name, f"takes a class, 0 to {count - 1}", "Give --label NUMBER.")
    if not 0 <= label < count:
        raise EvaluationError(f"--label {label}", f"{model.name} has the classes 0 to {count - 1}", "Give one of them.")
    chosen = torch.tensor([label])
    return chosen if embedder is None else embedder(chosen).float()


def _taking(model: Model) -> Program:
    """What says of a denoiser, export or program, which inputs it takes and of which class it is."""
    graph = fx.Graph()
    graph.output(graph.placeholder("sample"))
    config = dict(model.unet_config)
    origin = Origin(source=model.name, kind=str(config.get("_class_name", "module")), unet_config=config)
    return Program(graph, {}, model.session.inputs, origin=origin)


def restore_folder(
    restorer: Restorer,
    images: StrPath,
    output: StrPath,
    conditions: Conditions,
    *,
    batch_size: int = 1,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> int:
    """Restores every image of a folder into a PNG file of its name in another; gives how many there were.

    Each is scaled to cover the size that the encoder was captured for, and cut around its middle. The folder is written
    whole or not at all. progress: is told how many are done, and of how many.

    Raises:
        TrainingError: for a file that is no image. EvaluationError: for a result that is not finite, or two images of
        one name. ArtefactError: if the output exists or cannot be written.
    """
    found = ImageFolder(Path(images), restorer.image_shape)
    files = list(found.files)
    names = _names(files)
    with atomic_folder(Path(output), force=force) as temporary:
        for start in range(0, len(files), batch_size):
            progress(start, len(files))
            batch = files[start : start + batch_size]
            restored = restorer(found.read(batch), *conditions(len(batch)))
            for path, image in zip(batch, restored, strict=True):
                _write(temporary / names[path], image, path)
        progress(len(files), len(files))
        parts = {role: getattr(restorer, role).name for role in ("encoder", "denoiser", "decoder")}
        write_manifest(temporary, IMAGES_KIND, {**parts, "timestep": restorer.timestep})
    return len(files)


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """What the restored image of each is called."""
    found: dict[str, Path] = {}
    for path in files:
        name = f"{path.stem}.png"
        if name in found:
            both = f"{found[name].name} and {path.name} would both become {name}"
            raise EvaluationError(f"--images {path.parent}", both, "Rename one of them.")
        found[name] = path
    return {path: name for name, path in found.items()}


def _write(target: Path, image: Tensor, source: Path) -> None:
    """A restored image [C, H, W] in -1…1 as PNG."""
    from PIL import Image

    if not bool(image.isfinite().all()):
        raise EvaluationError(str(source), "was restored to NaN or infinity", "Check the three parts on their own.")
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(target, format="PNG")
