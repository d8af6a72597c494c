"""`hqc restore`: a folder of images through three artefacts, their conditions, and what cannot be."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import ok
from test_cli import refused as refused_in
from tiny_pipeline import saved_pipeline, traced_pipeline

import hqc
from hqc.errors import EvaluationError
from hqc.restoration import Restorer
from hqc.restoring import conditions_asked, restore_folder
from hqc.sampling.image_files import ImageFolder
from hqc.storage import save_program

PARTS = ("vae-encoder", "denoiser", "vae-decoder")
STEP = ("--timestep", "99")


def refused(folder: Path, *arguments: object, match: str) -> None:
    found = refused_in(folder, *arguments)
    assert re.search(match, found), found


def save_images(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(4)
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (32, 40), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("restore")
    for part in PARTS:
        save_program(traced_pipeline("classes", part), folder / f"{part}.hqc", pipeline=saved_pipeline("classes"))
    return SimpleNamespace(paths=[folder / f"{part}.hqc" for part in PARTS], images=save_images(folder / "low"))


@pytest.fixture(scope="module")
def restorer(made: SimpleNamespace) -> Restorer:
    encoder, denoiser, decoder = (hqc.load(path) for path in made.paths)
    return Restorer(encoder, denoiser, decoder, 99.0)


def test_a_folder_of_images_becomes_one_of_restored_ones(
    made: SimpleNamespace, restorer: Restorer, tmp_path: Path
) -> None:
    done = ok("restore", *made.paths, "--images", made.images, "-o", tmp_path / "out", *STEP, "--label", "3")
    assert done.stdout == f"wrote {tmp_path / 'out'}: 3 images\n"
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["0.png", "1.png", "2.png", "manifest.json"]
    x = ImageFolder(made.images, (1, 32, 32)).read([made.images / "1.png"])
    embedder = restorer.pipeline.class_embedder
    wanted = ((restorer(x, embedder(torch.tensor([3])).float()) + 1) * 127.5).round().clamp(0, 255)
    found = np.asarray(Image.open(tmp_path / "out" / "1.png"))
    assert found.shape == (32, 32)
    assert np.abs(found - wanted[0, 0].numpy()).max() <= 1
    assert (found != np.asarray(Image.open(tmp_path / "out" / "2.png"))).any()
    other = tmp_path / "two"
    again = ("restore", *made.paths, "--images", made.images, "-o", other, *STEP, "--label", "3")
    told = ok(*again, "--batch-size", "2", "--json")
    assert json.loads(told.stdout) == {"restored": str(other), "images": 3, "runtime": "torch", "timestep": 99.0}
    for name in files[:3]:
        pair = [np.asarray(Image.open(folder / name)).astype(int) for folder in (tmp_path / "out", other)]
        assert np.abs(pair[0] - pair[1]).max() <= 1
    refused(tmp_path, *again, match="already exists")
    ok(*again[:-1], "4", "--force")
    assert (np.asarray(Image.open(other / "1.png")) != found).any()


def test_what_cannot_be_restored_is_said(made: SimpleNamespace, tmp_path: Path) -> None:
    encoder, denoiser, decoder = made.paths

    def said(match: str, *arguments: object, parts: tuple[Path, ...] = (encoder, denoiser, decoder)) -> None:
        refused(tmp_path, "restore", *parts, "-o", tmp_path / "out", *STEP, *arguments, match=match)

    images = ("--images", made.images)
    said("takes a class, 0 to 9. Give --label NUMBER", *images)
    said("--label 10: .* has the classes 0 to 9", *images, "--label", "10")
    said("--prompt: .* takes a class besides the image", *images, "--label", "1", "--prompt", "sharp")
    said("decoder vae-encoder.hqc: is the encoder of a pipeline", *images, parts=(encoder, denoiser, encoder))
    said("encoder denoiser.hqc: is the denoiser of a pipeline", *images, parts=(denoiser, encoder, decoder))
    said("is no folder", "--images", tmp_path / "nowhere", "--label", "1")
    said("no such folder", *images, parts=(encoder, tmp_path / "x.hqc", decoder))
    said("lies inside", *images, "-o", made.images / "out")


def test_files_that_are_no_images_end_it_before_anything_is_written(made: SimpleNamespace, tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", 1)
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n rest")
    command = ("restore", *made.paths, "--images", images, "-o", tmp_path / "out", *STEP, "--label", "1")
    refused(tmp_path, *command, match=r"broken.png: cannot be read as an image")
    (images / "broken.png").unlink()
    Image.new("L", (32, 32)).save(images / "0.jpg")
    refused(tmp_path, *command, match=r"0.jpg and 0.png would both become 0.png. Rename one of them")


def test_a_result_that_is_not_finite_is_not_written(restorer: Restorer, tmp_path: Path) -> None:
    def nothing(n: int) -> tuple[torch.Tensor, ...]:
        return (torch.full((n, 1, 32), torch.nan),)

    images = save_images(tmp_path / "images", 1)
    with pytest.raises(EvaluationError, match=r"0.png: was restored to NaN or infinity"):
        restore_folder(restorer, images, tmp_path / "out", nothing)
    assert not (tmp_path / "out").exists()


def test_text_conditional_denoisers_take_the_empty_prompt_or_another(tmp_path: Path) -> None:
    parts = [tmp_path / f"{part}.hqc" for part in PARTS]
    for part, path in zip(PARTS, parts, strict=True):
        save_program(traced_pipeline("sd15", part), path, pipeline=saved_pipeline("sd15"))
    encoder, denoiser, decoder = (hqc.load(path) for path in parts)
    restorer = Restorer(encoder, denoiser, decoder)
    empty, same, other = (conditions_asked(restorer, prompt=text)(2) for text in (None, "", "a red house"))
    assert empty[0] is not None
    assert empty[0].shape == (2, *(int(d) for d in restorer.denoiser.session.inputs[2].shape[1:]))
    assert same[0] is not None
    assert other[0] is not None
    assert torch.equal(empty[0], same[0])
    assert not torch.equal(empty[0], other[0])
    with pytest.raises(EvaluationError, match=r"--label: denoiser\.hqc takes a prompt besides the image"):
        conditions_asked(restorer, label=1)
