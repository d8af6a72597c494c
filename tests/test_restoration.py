"""Restoring in one step: what each part is given through the parts before it, and three artefacts as one pipeline."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import saved_pipeline, tiny_pipeline, traced_pipeline
from torch import Tensor

import hqc
from hqc import api
from hqc.errors import EvaluationError, TrainingError
from hqc.program import Program
from hqc.restoration import Restorer
from hqc.sampling.image_files import ImageFolder
from hqc.sampling.task import start

PARTS = ("vae-encoder", "denoiser", "vae-decoder")
TIMESTEP = 99.0
FEW = {
    "smooth.samples": 2,
    "learn_factors.updates": 3,
    "learn_factors.batch_size": 2,
    "calibrate_activations.samples": 4,
    "calibrate_activations.candidates": 8,
    "learn_bounds.updates": 3,
    "learn_bounds.batch_size": 2,
    "sampler.timestep": TIMESTEP,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(4)
    for number in range(3):
        pixels = generator.integers(0, 255, (32, 40 + number), dtype=np.uint8)
        Image.fromarray(pixels).save(found / f"{number}.png")
    (found / "notes.txt").write_text("no image")
    return found


@pytest.fixture(scope="module")
def parts() -> dict[str, Program]:
    return {part: traced_pipeline("classes", part) for part in PARTS}


def _task(parts: dict[str, Program], part: str, images: Path, *through: Program) -> hqc.Task:
    return api.task_of(parts[part], images=images, through=through, timestep=TIMESTEP)


@pytest.fixture(scope="module")
def quantised(parts: dict[str, Program], images: Path) -> dict[str, Program]:
    """In the paper's order, each through those before."""
    found: dict[str, Program] = {}
    for part in PARTS:
        task = _task(parts, part, images, *found.values())
        found[part] = hqc.qat(parts[part], "passionsr", "w6a6", task=task, settings=FEW)
    return found


def _moments_to_latents(moments: Tensor) -> Tensor:
    return moments[:, :4] * tiny_pipeline().vae.config.scaling_factor


def _image_of(latents: Tensor, noise: Tensor) -> Tensor:
    """DDIM's own x̂_0, by diffusers."""
    scheduler = tiny_pipeline().scheduler
    scheduler.set_timesteps(100)
    found: Tensor = scheduler.step(noise, 99, latents).pred_original_sample
    return found


def test_images_are_cut_to_size(images: Path) -> None:
    found = ImageFolder(images, (1, 16, 16)).draw(5, torch.Generator().manual_seed(1))
    assert found.shape == (5, 1, 16, 16)
    assert -1 <= float(found.min()) < -0.5
    assert 0.5 < float(found.max()) <= 1
    assert ImageFolder(images, (3, 8, 16)).draw(1, torch.Generator()).shape == (1, 3, 8, 16)
    whole = ImageFolder(images, (1, 32, 40))._read(images / "0.png")
    pixels = torch.from_numpy(np.asarray(Image.open(images / "0.png"), dtype=np.float32))
    torch.testing.assert_close(whole[0], pixels / 127.5 - 1)


def _refused(folder: Path, match: str) -> None:
    with pytest.raises(TrainingError, match=match):
        ImageFolder(folder, (1, 8, 8)).draw(1, torch.Generator())


def test_what_is_read_is_an_image_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a file holds, not by its name: what else an image library opens may run programs."""
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    _refused(tmp_path, r"a.png: cannot be read as an image \(cannot identify image file")
    Image.new("RGB", (8, 8)).save(path, format="TIFF")
    _refused(tmp_path, "cannot identify image file")
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(path)
    _refused(tmp_path, "pixels of the kind I;16; expected 8 bits a channel")
    Image.new("L", (300, 200)).save(path)
    monkeypatch.setattr("hqc.sampling.image_files._MOST_PIXELS", 2**15)
    _refused(tmp_path, "300x200 pixels, more than 0 Mi")
    monkeypatch.setattr("hqc.sampling.image_files._LARGEST_FILE", 10)
    _refused(tmp_path, "larger than 0 MiB")


def test_an_image_is_upright_as_its_camera_says(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:8] = 255  # light above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    found = ImageFolder(tmp_path, (1, 16, 16)).read([tmp_path / "turned.png"])[0, 0]
    assert float(found[:8].max()) == -1
    assert float(found[8:].min()) == 1


def test_parts_in_another_s_place_are_refused(parts: dict[str, Program], tmp_path: Path) -> None:
    for part, program in parts.items():
        hqc.save_program(program, tmp_path / part)
    encoder, unet, decoder = (hqc.load(tmp_path / part) for part in PARTS)
    assert Restorer(encoder, unet, decoder).image_shape == (1, 32, 32)
    with pytest.raises(EvaluationError, match="encoder vae-decoder: is the decoder of a pipeline"):
        Restorer(decoder, unet, encoder)
    with pytest.raises(EvaluationError, match="denoiser vae-encoder: is the encoder of a pipeline"):
        Restorer(encoder, encoder, decoder)


def test_each_part_is_given_what_comes_through_those_before(
    parts: dict[str, Program], quantised: dict[str, Program], images: Path
) -> None:
    """The encoder images; the denoiser latents of the quantised encoder; the decoder x_0 of both."""
    encoder, unet = quantised["vae-encoder"], quantised["denoiser"]
    pictures = _task(parts, "vae-encoder", images)
    assert start(pictures, 2, torch.Generator())[0].shape == (2, 1, 32, 32)
    generator, own = torch.Generator().manual_seed(6), api.task_of(parts["denoiser"])
    assert own.draw_conditions is not None
    own.draw_conditions(2, generator)  # conditions are drawn first
    given, _ = start(pictures, 2, generator)
    latents, conditions = start(_task(parts, "denoiser", images, encoder), 2, torch.Generator().manual_seed(6))
    torch.testing.assert_close(latents, _moments_to_latents(encoder.module()(given)))
    plain, _ = start(_task(parts, "denoiser", images), 2, torch.Generator().manual_seed(6))
    torch.testing.assert_close(plain, _moments_to_latents(parts["vae-encoder"].module()(given)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain, latents)
    task = _task(parts, "vae-decoder", images, encoder, unet)
    decoded, none = start(task, 2, torch.Generator().manual_seed(6))
    assert none is None
    assert conditions is not None
    noise = unet.module()(latents, torch.full((2,), TIMESTEP), conditions[1])
    torch.testing.assert_close(decoded, _image_of(latents, noise), rtol=1e-4, atol=1e-4)
    said = f"images of {images.name} through vae-encoder at w6a6, denoiser at w6a6"
    assert task.drawn_from == said


def test_every_part_has_static_scales(quantised: dict[str, Program]) -> None:
    for part, program in quantised.items():
        tables = [t for name, t in program.state.items() if name.endswith("activation_scale_table")]
        assert {len(t) for t in tables} == {1}, part
        assert program.plan.timesteps == ((TIMESTEP,) if part == "denoiser" else (0.0,))
    assert any(plan.shifted for plan in quantised["denoiser"].plan.sites)


def test_three_exports_are_one_pipeline(
    parts: dict[str, Program], quantised: dict[str, Program], tmp_path: Path
) -> None:
    """In integers by ONNX Runtime they give what the programs give in torch."""
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(8)) * 2 - 1
    condition = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(9))
    for part, program in quantised.items():
        hqc.export_program(
            program, "onnxruntime", tmp_path / part, float_program=parts[part], pipeline=saved_pipeline("classes")
        )
    exports = [hqc.load(tmp_path / part) for part in PARTS]
    found = Restorer(exports[0], exports[1], exports[2], TIMESTEP)(x, condition)

    def by_hand(of: dict[str, Program]) -> Tensor:
        latents = _moments_to_latents(of["vae-encoder"].module()(x))
        noise = of["denoiser"].module()(latents, torch.full((2,), TIMESTEP), condition)
        result: Tensor = of["vae-decoder"].module()(_image_of(latents, noise))
        return result

    wanted, plain = by_hand(quantised), by_hand(parts)
    assert found.shape == (2, 1, 32, 32)
    assert float((found - wanted).norm()) < 0.3 * float((plain - wanted).norm())


def test_what_cannot_be_is_said(parts: dict[str, Program], images: Path, tmp_path: Path) -> None:
    encoder, unet, decoder = (parts[part] for part in PARTS)
    with pytest.raises(TrainingError, match="--through vae-decoder: does not come before the denoiser"):
        _task(parts, "denoiser", images, decoder)
    with pytest.raises(TrainingError, match="--through vae-encoder: is given twice"):
        _task(parts, "denoiser", images, encoder, encoder)
    with pytest.raises(TrainingError, match="called once, and no timestep is said"):
        api.task_of(unet, images=images)
    with pytest.raises(TrainingError, match="--through: is for images that are restored"):
        api.task_of(unet, through=[encoder])
    with pytest.raises(TrainingError, match="--synthetic: is for a denoiser, and the images meet none"):
        api.task_of(encoder, images=images, synthetic=True)
    with pytest.raises(TrainingError, match="has no images"):
        api.task_of(encoder, images=tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(TrainingError, match=r"broken.png: cannot be read as an image"):
        start(api.task_of(encoder, images=tmp_path), 1, torch.Generator())


def test_without_an_autoencoder_there_is_nothing_to_encode_with(parts: dict[str, Program], images: Path) -> None:
    alone = parts["denoiser"].evolve(origin=replace(parts["denoiser"].origin, pipeline=""))
    with pytest.raises(TrainingError, match="needs the pipeline's autoencoder, and there is none around the program"):
        api.task_of(alone, images=images, timestep=TIMESTEP, synthetic=True)
