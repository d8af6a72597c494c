"""Halves of an autoencoder: captured as diffusers computes them, quantised by one row of scales, exported."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_pipeline import saved_pipeline, tiny_pipeline, traced_pipeline

import hqc
from hqc.api import task_of
from hqc.capture.autoencoders import autoencoder_source, part_of
from hqc.errors import ArtefactError, CaptureError, ExportError, TrainingError
from hqc.export import Target
from hqc.runtimes.model import describe
from hqc.storage import load_program, save_program

QUICK = {"calibrate_activations.samples": 2, "calibrate_activations.candidates": 8}


@pytest.fixture(scope="module")
def halves() -> dict[str, hqc.Program]:
    return {part: traced_pipeline("classes", part) for part in ("vae-encoder", "vae-decoder")}


@pytest.fixture(scope="module")
def folder() -> Path:
    return saved_pipeline("classes")


def _quantised(program: hqc.Program, bits: str = "w8a8") -> hqc.Program:
    return hqc.ptq(program, "rtn", bits, task=task_of(program, synthetic=True), settings=QUICK)


@pytest.mark.parametrize(("part", "shape"), [("vae-encoder", ("N", 1, 32, 32)), ("vae-decoder", ("N", 4, 4, 4))])
def test_captured_as_diffusers_computes_it(
    part: str, shape: tuple[object, ...], folder: Path, halves: dict[str, hqc.Program]
) -> None:
    program = halves[part]
    assert [(spec.name, spec.shape) for spec in program.inputs] == [("sample", shape)]
    assert part_of(program.origin) == part
    assert not program.has_timestep
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    x = program.example_inputs(3, seed=5)[0]
    with torch.no_grad():
        wanted = vae.encode(x).latent_dist.parameters if part == "vae-encoder" else vae.decode(x).sample
    torch.testing.assert_close(program.module()(x), wanted, rtol=1e-5, atol=1e-5)


def test_sites_are_named_as_in_the_autoencoder(halves: dict[str, hqc.Program]) -> None:
    names = [site for site, _ in halves["vae-decoder"].sites()]
    assert names[:2] == ["post_quant_conv", "decoder.conv_in"]
    plan = _quantised(halves["vae-decoder"], "w4a4").plan
    edges = {"post_quant_conv", "decoder.conv_in", "decoder.conv_out"}
    assert {site.site for site in plan.sites if site.widths == "w8a8" and "first or last" in site.reason} == edges


def test_the_size_is_that_of_the_pipelines_latents(folder: Path) -> None:
    assert hqc.trace(folder, part="vae-encoder", latent_size=(4, 8)).inputs[0].shape == ("N", 1, 32, 64)
    assert hqc.trace(folder / "vae", part="vae-decoder", latent_size=2).inputs[0].shape == ("N", 4, 2, 2)


@pytest.mark.parametrize(
    ("part", "target"),
    [("vae-encoder", "onnxruntime"), *(("vae-decoder", name) for name in ("portable", "onnxruntime", "tensorrt"))],
)
def test_quantised_with_one_row_of_scales_and_exported(
    part: str, target: Target, halves: dict[str, hqc.Program], tmp_path: Path
) -> None:
    program = halves[part]
    student = _quantised(program, "w4a4")
    assert student.plan.timesteps == (0.0,)
    assert {len(t) for name, t in student.state.items() if name.endswith("scale_table")} == {1}
    report = hqc.export_program(student, target, tmp_path / "export", float_program=program)
    assert report.verification.worst is not None  # within its bounds, or it would have been refused
    if target == "onnxruntime":
        x = program.example_inputs(3, seed=2)[0]
        found = hqc.load(tmp_path / "export").session(x)
        error = (found - student.module()(x)).norm() / student.module()(x).norm()
        assert float(error) < 0.1 * float(
            (program.module()(x) - student.module()(x)).norm() / program.module()(x).norm()
        )


def test_a_batch_equals_its_samples_one_by_one(halves: dict[str, hqc.Program]) -> None:
    student = _quantised(halves["vae-decoder"]).module()
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    both, alone = student(x), torch.cat([student(one[None]) for one in x])
    assert float((both - alone).norm() / both.norm()) < 0.02  # kernels of other batches round a few codes otherwise


def test_stored_and_loaded_it_is_the_same(halves: dict[str, hqc.Program], tmp_path: Path) -> None:
    student = _quantised(halves["vae-encoder"])
    save_program(student, tmp_path / "half.hqc")
    loaded = load_program(tmp_path / "half.hqc")
    x = student.example_inputs(2, seed=3)[0]
    assert torch.equal(loaded.module()(x), student.module()(x))
    assert part_of(loaded.origin) == "vae-encoder"


def test_trained_by_its_own_output(halves: dict[str, hqc.Program]) -> None:
    program = halves["vae-decoder"]
    settings = {**QUICK, "distil.updates": 12, "distil.batch_size": 4, "calibrate_activations.samples": 4}
    losses: list[float] = []
    hqc.qat(
        program,
        "efficientdm",
        "w4a4",
        task=task_of(program, synthetic=True),
        settings=settings,
        on_update=lambda update: losses.append(update.relative_error),
    )
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4])


def test_what_it_does_not_take_is_said(folder: Path, halves: dict[str, hqc.Program], tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="has no vae/ folder"):
        hqc.trace(folder / "scheduler", part="vae-encoder")
    with pytest.raises(CaptureError, match="holds a UNet2DConditionModel; --part vae-encoder takes an AutoencoderKL"):
        hqc.trace(folder / "unet", part="vae-encoder")
    with pytest.raises(CaptureError, match="takes no --condition-length"):
        hqc.trace(folder, part="vae-encoder", condition_length=2)
    with pytest.raises(CaptureError, match="takes no --weights"):
        hqc.trace(folder, part="vae-encoder", weights="raw")
    with pytest.raises(CaptureError, match="takes no --part vae-decoder"):
        hqc.trace("arch:sd15", part="vae-decoder")
    program = halves["vae-decoder"]
    with pytest.raises(TrainingError, match="has no timestep, so no sampler runs it"):
        task_of(program)
    with pytest.raises(ExportError, match="the program has no timestep"):
        hqc.export_program(program, "portable", tmp_path / "x", one_timestep=True)


def test_it_does_not_sample(folder: Path, halves: dict[str, hqc.Program], tmp_path: Path) -> None:
    save_program(halves["vae-decoder"], tmp_path / "half.hqc", pipeline=folder)
    with pytest.raises(ArtefactError, match=r"half.hqc: is a half of an autoencoder, no denoiser"):
        hqc.load(tmp_path / "half.hqc").pipeline()
    with pytest.raises(ArtefactError, match="is a half of an autoencoder"):
        describe(tmp_path / "half.hqc")


def test_an_autoencoder_without_convolutions_around_its_latents() -> None:
    vae = tiny_pipeline().vae
    plain = AutoencoderKL.from_config({**vae.config, "use_quant_conv": False, "use_post_quant_conv": False}).eval()
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    source = autoencoder_source(plain, "", "vae-decoder")
    with torch.no_grad():
        torch.testing.assert_close(hqc.trace(source).module()(x), plain.decode(x).sample, rtol=1e-5, atol=1e-5)
