"""Pipelines without torch: the images of the pipeline with torch, from a process that cannot import it."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from draw_without_torch import BLOCKED

import hqc
from hqc.errors import ArtefactError, EvaluationError, RuntimeMissingError
from hqc.evaluation.images import pixels_of
from hqc.evaluation.needs import needs_of
from hqc.evaluation.sampling import sample_images
from hqc.lite import LitePipeline
from hqc.lite.conditions import Prompts
from hqc.lite.forms import FORMS
from hqc.models.ldm import ClassConditionalLDMPipeline, UnconditionalLDMPipeline
from hqc.serving.backend import Drawing
from hqc.serving.engine import Engine
from hqc.serving.tickets import Task

KINDS = {
    "classes": ClassConditionalLDMPipeline,
    "labels": DiTPipeline,
    "prompts": StableDiffusionPipeline,
    "encoders": StableDiffusionXLPipeline,
    "nothing": UnconditionalLDMPipeline,
}
SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
GREY_LEVELS = 1
"""Two runtimes round differently; a pixel near the middle between two levels goes to the one or the other."""

DRAWINGS: dict[str, list[tuple[int, str | None, int, dict[str, Any]]]] = {
    "classes": [
        (7, None, 0, {"steps": 5}),
        (3, None, 2**40 + 1, {"steps": 4, "guidance_scale": 4.0}),
        (10 - 1, None, 5, {"steps": 3, "guidance_scale": 1.0}),
        (2, None, 6, {"steps": 4, "eta": 1.0}),
        (2, None, 6, {"steps": 4, "scheduler": "euler"}),
        (2, None, 6, {"steps": 4, "scheduler": "dpmsolver++"}),
    ],
    "prompts": [
        (0, "a cat", 0, {"steps": 4}),
        (0, "b 12 and far more words than there are tokens", 1, {"steps": 3, "guidance_scale": 1.0}),
        (0, "cat", 2, {"steps": 3, "guidance_scale": 5.0, "negative_prompt": "dog"}),
        (0, "", 3, {"steps": 2, "eta": 0.5}),
    ],
    "labels": [
        (6, None, 0, {"steps": 4}),
        (1, None, 1, {"steps": 3, "guidance_scale": 1.0}),
        (2, None, 2, {"steps": 3, "guidance_scale": 4.0, "scheduler": "euler"}),
    ],
    "encoders": [
        (0, "a cat", 0, {"steps": 4}),
        (0, "b 12 and far more words than there are tokens", 1, {"steps": 3, "guidance_scale": 1.0}),
        (0, "cat", 2, {"steps": 3, "guidance_scale": 5.0, "negative_prompt": "dog"}),
        (0, "", 3, {"steps": 2, "eta": 0.5, "scheduler": "ddim"}),
    ],
    "nothing": [(0, None, 4, {"steps": 3}), (0, None, 5, {"steps": 3, "scheduler": "euler"})],
}


def drawing(label: int = 3, seed: int = 0, steps: int = 3, guidance: float = 1.5, **options: Any) -> Drawing:
    return Drawing(label, None, "", seed, steps, guidance, **options)


def torch_images(kind: str, source: Path) -> np.ndarray:
    """The images of the pipeline that was exported, one call an image."""
    pipe = KINDS[kind].from_pretrained(source)
    own, images = pipe.scheduler, []
    for label, prompt, seed, options in DRAWINGS[kind]:
        name = options.get("scheduler")
        pipe.scheduler = SCHEDULERS[name].from_config(own.config) if name else own
        found = sample_images(
            pipe,
            [label],
            [seed],
            num_inference_steps=options["steps"],
            guidance_scale=options.get("guidance_scale", needs_of(pipe).usual_guidance(1.5)),
            eta=options.get("eta", 0.0),
            batch_size=1,
            prompts=[prompt] if prompt is not None else [],
            negative_prompt=options.get("negative_prompt", ""),
        )
        images.append(pixels_of(found.images[0]))
    return np.stack(images)


@pytest.fixture(scope="module")
def without_torch(
    folders: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], dict[str, np.ndarray]]:
    """What a process of its own imported, and the images that it drew."""
    work = tmp_path_factory.mktemp("drawn")
    asked = [
        {"folder": str(folder), "to": str(work / f"{kind}.npy"), "drawings": DRAWINGS[kind]}
        for kind, (_, folder) in folders.items()
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("draw_without_torch.py"))],
        input=json.dumps(asked),
        env={**os.environ, "PYTHONPATH": str(Path(hqc.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), {kind: np.load(work / f"{kind}.npy") for kind in folders}


def test_neither_torch_nor_anything_that_needs_it_is_imported(
    without_torch: tuple[list[str], dict[str, np.ndarray]],
) -> None:
    imported, _ = without_torch
    assert {"hqc", "numpy", "onnxruntime", "tokenizers"} <= set(imported)
    assert not BLOCKED & set(imported)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_images_are_those_of_the_pipeline_with_torch(
    kind: str,
    folders: dict[str, tuple[Path, Path]],
    without_torch: tuple[list[str], dict[str, np.ndarray]],
) -> None:
    found, wanted = without_torch[1][kind], torch_images(kind, folders[kind][0])
    assert found.dtype == wanted.dtype == np.uint8
    assert found.shape == wanted.shape
    apart = np.abs(found.astype(int) - wanted)
    assert apart.max() <= GREY_LEVELS
    assert (apart > 0).mean() < 0.01
    assert found.std() > 0
    assert len({image.tobytes() for image in found}) == len(found)  # each depends on what it was asked with


@pytest.fixture(scope="module")
def classes(folders: dict[str, tuple[Path, Path]]) -> LitePipeline:
    return LitePipeline(folders["classes"][1], threads=1)


def test_images_under_way_together_are_those_of_each_alone(classes: LitePipeline) -> None:
    """Other classes, seeds, numbers of steps, guidance and schedulers in one call of the denoiser."""
    asked = [
        drawing(1, 5, 2),
        drawing(2, 6, 4, 1.0),
        drawing(3, 7, 3, 3.0, scheduler="euler"),
        drawing(4, 8, 1),
        drawing(5, 9, 3, eta=1.0),
    ]
    together = list(classes.draw_all(asked, at_once=4))
    for image, one in zip(together, asked, strict=True):
        apart = np.abs(image.astype(int) - next(classes.draw_all([one])))
        assert apart.max() <= GREY_LEVELS
        assert (apart > 0).mean() < 0.01


def test_the_engine_runs_it(classes: LitePipeline) -> None:
    asked = [drawing(label, label, 2 + label % 2) for label in range(5)]
    engine = Engine(classes.denoise, max_batch=3, around=classes.around)
    try:
        ticket = engine.submit([lambda one=one: classes.begin(one) for one in asked])
        found = ticket.result.result(timeout=60)
    finally:
        engine.close()
    for image, wanted in zip(found, classes.draw_all(asked), strict=True):
        assert np.abs(image.astype(int) - wanted).max() <= GREY_LEVELS


def test_previews_come_nearer_to_the_image(classes: LitePipeline) -> None:
    seen: dict[int, np.ndarray] = {}
    image = next(classes.draw_all([drawing(steps=8, previews=3, see=seen.__setitem__)]))
    assert list(seen) == [0, 1, 2]
    away = [float(np.abs(seen[i].astype(int) - image).mean()) for i in range(3)]
    assert all(preview.shape == image.shape and preview.dtype == np.uint8 for preview in seen.values())
    assert away[2] < away[0]


def test_the_last_task_is_the_decoder_of_the_image(classes: LitePipeline) -> None:
    steps = classes.begin(drawing(steps=4, previews=2, see=lambda *_: None))
    tasks: list[bool] = []
    output = None
    with suppress(StopIteration):
        while wanted := steps.send(output):
            tasks += [wanted.last] if isinstance(wanted, Task) else []
            output = wanted.run() if isinstance(wanted, Task) else classes.denoise([wanted])[0]
    assert tasks == [False, False, True]


def test_a_model_is_not_asked_at_every_call_what_it_takes(folders: dict[str, tuple[Path, Path]]) -> None:
    pipe = LitePipeline(folders["classes"][1], threads=1)
    wanted = pipe.draw(3, steps=2)
    pipe._denoiser._session = SimpleNamespace(run=pipe._denoiser._session.run)
    np.testing.assert_array_equal(pipe.draw(3, steps=2), wanted)


def test_what_it_needs(folders: dict[str, tuple[Path, Path]], classes: LitePipeline) -> None:
    assert classes.needs.kind == "class_label"
    assert (classes.needs.classes, classes.needs.size, classes.needs.digits) == (10, (32, 32), True)
    assert classes.most_steps == 100
    assert classes.schedulers == ("ddim", "dpmsolver++", "euler")
    prompts, nothing = (LitePipeline(folders[kind][1], threads=1).needs for kind in ("prompts", "nothing"))
    assert (prompts.kind, prompts.size, prompts.digits) == ("prompt", (16, 16), False)
    assert prompts.options == {"guidance_scale", "eta", "negative_prompt"}
    assert (nothing.kind, nothing.size, nothing.guides) == ("nothing", (8, 8), False)
    assert [each.usual_guidance(1.5) for each in (prompts, nothing, classes.needs)] == [7.5, 1.0, 1.5]


@pytest.mark.parametrize("name", [name for name in FORMS if hasattr(diffusers, name)])
def test_guidance_of_a_class_is_that_of_diffusers(name: str) -> None:
    call = inspect.signature(getattr(diffusers, name).__call__)
    assert FORMS[name].own_guidance == call.parameters["guidance_scale"].default


def test_the_same_words_are_encoded_once(folders: dict[str, tuple[Path, Path]]) -> None:
    folder = folders["prompts"][1]
    prompts = Prompts(folder / "tokenizer", folder / "text_encoder", 1)
    assert prompts.of(0, "a cat") is prompts.of(0, "a cat")
    assert prompts.away("") is prompts.of(0, None)
    assert prompts.of(0, "\ud800") is not None  # half of a pair, which JSON can hold


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label": 10}, "class 10: the model has the classes 0 to 9"),
        ({"label": 1, "prompt": "a cat"}, "classes: takes a class label. Ask it for what it takes."),
        ({"label": 1, "eta": 2.0}, "eta 2: expected 0 to 1"),
        ({"label": 1, "steps": 101}, "101 steps: expected 1 to 100, those of training. Ask for fewer."),
        ({"label": 1, "scheduler": "pndm"}, "scheduler 'pndm': unknown; there are ddim, dpmsolver++, euler."),
        ({"label": 1, "scheduler": "euler", "eta": 0.5}, "eta 0.5: the EulerDiscreteScheduler takes none."),
    ],
)
def test_what_it_is_not_to_be_asked(classes: LitePipeline, options: dict[str, Any], said: str) -> None:
    with pytest.raises(EvaluationError) as error:
        classes.draw(**options)
    assert error.value.line.startswith(said)


def test_steps_are_checked_before_they_are_taken(classes: LitePipeline) -> None:
    assert classes.check_steps(100, None) is None
    assert classes.check_steps(101, "euler") == "expected 1 to 100, those of training. Ask for fewer."


def changed(folder: Path, tmp_path: Path, name: str, change: Any) -> Path:
    """A copy with one JSON file changed, and a manifest that knows."""
    from hqc.manifests import PIPELINE_KIND, write_manifest

    copy = tmp_path / "copy"
    for path in folder.rglob("*"):
        if path.is_file():
            to = copy / path.relative_to(folder)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    data = json.loads((copy / name).read_text(encoding="utf-8"))
    change(data)
    (copy / name).write_text(json.dumps(data), encoding="utf-8")
    (copy / "manifest.json").unlink()
    write_manifest(copy, PIPELINE_KIND, {})
    return copy


BROKEN: Sequence[tuple[str, Any, type[Exception], str]] = [
    ("model_index.json", lambda d: d.update(_class_name="FluxPipeline"), ArtefactError, "holds a FluxPipeline"),
    (
        "scheduler/scheduler_config.json",
        lambda d: d.update(_class_name="PNDMScheduler"),
        EvaluationError,
        "a PNDMScheduler, which runs with torch alone. Ask for one of ddim, dpmsolver++, euler (--scheduler).",
    ),
    ("vae_decoder/config.json", lambda d: d.update(out_channels=4), ArtefactError, "draws 4 channels"),
    ("vae_decoder/config.json", lambda d: d.pop("scaling_factor"), ArtefactError, "without 'scaling_factor'"),
    ("class_embedder/config.json", lambda d: d.update(num_classes="x"), ArtefactError, "says no num_classes"),
    ("unet/manifest.json", lambda d: d.pop("inputs"), ArtefactError, "says no shape of sample"),
    ("unet/manifest.json", lambda d: d.update(names=[]), ArtefactError, "whose names of inputs are none"),
]


@pytest.mark.parametrize(("name", "change", "kind", "said"), BROKEN, ids=[f"{b[0]}-{b[3][:12]}" for b in BROKEN])
def test_a_folder_that_does_not_fit_is_refused(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, name: str, change: Any, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind) as error:
        LitePipeline(changed(folders["classes"][1], tmp_path, name, change), threads=1)
    assert said in error.value.line  # type: ignore[attr-defined]
    assert len(error.value.line) <= 300  # type: ignore[attr-defined]


def test_another_scheduler_than_the_folders(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    pndm = changed(
        folders["classes"][1],
        tmp_path,
        "scheduler/scheduler_config.json",
        lambda data: data.update(_class_name="PNDMScheduler", skip_prk_steps=True),
    )
    found = LitePipeline(pndm, threads=1, scheduler="ddim").draw(3, seed=4, steps=3)
    np.testing.assert_array_equal(found, LitePipeline(folders["classes"][1], threads=1).draw(3, seed=4, steps=3))


def test_a_damaged_folder_is_refused(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    copy = changed(folders["classes"][1], tmp_path, "model_index.json", lambda data: None)
    model = copy / "vae_decoder" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="is truncated or changed"):
        LitePipeline(copy)


@pytest.mark.parametrize(
    "name", ["model_index.json", "scheduler/scheduler_config.json", "unet/model.onnx", "class_embedder/config.json"]
)
def test_a_file_that_the_manifest_does_not_list_is_not_read(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    copy = changed(folders["classes"][1], tmp_path, "model_index.json", lambda data: None)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"][name]
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ArtefactError, match=f"lists no {name}"):
        LitePipeline(copy)


def test_without_tokenizers_it_says_what_to_install(
    folders: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RuntimeMissingError, match="prompts: the package tokenizers is not installed"):
        LitePipeline(folders["prompts"][1])
