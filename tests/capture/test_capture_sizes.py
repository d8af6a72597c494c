"""Sizes and options of a source: obeyed by what comes after, or refused in one line, and never dropped."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ldm_original as original
import pytest
import torch
from denoisers import denoiser
from diffusers import UNet2DModel
from safetensors.torch import save_file
from tiny_pipeline import save_tiny_pipeline
from torch import Tensor, nn

from hqc.api import task_of
from hqc.capture import find_source, trace
from hqc.capture.architectures import ARCHITECTURES
from hqc.capture.diffusers_models import denoiser_source
from hqc.errors import CaptureError, ExportError, TrainingError
from hqc.export import export_program
from hqc.passes import InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import InputSpec, aten, is_op
from hqc.runtimes import load
from hqc.sampling.sources import synthetic_task
from hqc.sampling.task import Task, require_steps, trajectory
from hqc.sampling.task import denoiser as as_denoise
from hqc.sizes import LatentSize, sides
from hqc.storage import save_program


class Mine(nn.Module):
    """A user's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample) + timestep[:, None, None, None]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """By kind, what `find_source` is given."""
    module: Any = ModuleType("mine")
    module.build = lambda: (Mine(), {"sample": torch.zeros(2, 3, 8, 8), "timestep": torch.zeros(2)})
    monkeypatch.setitem(sys.modules, "mine", module)
    config = original.tiny_config("bedroom")
    save_file(dict(original.make_checkpoint(config)), tmp_path / "ldm.safetensors")
    for name in ("dit", "sd3"):
        denoiser(name).save_pretrained(tmp_path / name)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **blocks
    ).save_pretrained(tmp_path / "plain")
    return {
        "callable": {"source": "mine:build"},
        "original": {
            "source": str(tmp_path / "ldm.safetensors"),
            "config": original.save_config(config, tmp_path / "ldm.yaml"),
        },
        "classes": {"source": str(save_tiny_pipeline(tmp_path / "classes"))},
        **{name: {"source": str(tmp_path / name)} for name in ("dit", "sd3", "plain")},
    }


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("callable", {"latent_size": 16}, "takes no --latent-size: its sample is [3, 8, 8]"),
        ("callable", {"condition_length": 3}, "takes no --condition-length: it has no condition"),
        ("original", {"condition_length": 3}, "takes no --condition-length: it has no condition"),
        ("plain", {"condition_length": 3}, "takes no --condition-length: it has no condition"),
        ("dit", {"condition_length": 3}, "takes no --condition-length: it has no condition"),
        ("classes", {"condition_length": 3}, "takes no --condition-length: its class embedder gives one token"),
        (
            "dit",
            {"latent_size": 9},
            "are not divided by the model's patches of 2. Give for example --latent-size 8 or 10",
        ),
        ("sd3", {"latent_size": 9}, "are not divided by the model's patches of 2"),
        ("sd3", {"latent_size": 4096}, "have more patches a side than the model's"),
        ("sd3", {"latent_size": (9, 12)}, "latents of 9×12: are not divided"),
        ("sd3", {"latent_size": (9, 12)}, "Give for example --latent-size 8x12 or 10x14."),
        ("dit", {"latent_size": (8, 12)}, "are no square"),
        ("plain", {"latent_size": (8, 9)}, "are not divided by 2, as the levels of diffusers' UNet2DModel need"),
        ("plain", {"latent_size": (8, 9)}, "Give for example --latent-size 8."),
        ("plain", {"latent_size": (8, 0)}, "expected a side such as 64, or height and width such as 64x96"),
        ("callable", {"latent_size": (8, 16)}, "takes no --latent-size: its sample is [3, 8, 8]"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    kind: str, options: dict[str, Any], said: str, sources: dict[str, dict[str, Any]]
) -> None:
    with pytest.raises(CaptureError) as caught:
        find_source(**sources[kind], **options)
    assert said in str(caught.value)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("kind", "size"),
    [("original", (16, 8)), ("classes", 16), ("classes", (16, 8)), ("plain", 16), ("sd3", (16, 8))],
)
def test_the_size_that_was_asked_for_is_sampled(
    kind: str, size: LatentSize, sources: dict[str, dict[str, Any]]
) -> None:
    height, width = sides(size)
    source = find_source(**sources[kind], latent_size=size)
    program = trace(source)
    assert program.inputs[0].shape[2:] == (height, width)
    assert program.origin.unet_config["sample_size"] == (16 if size == 16 else [16, 8])
    if kind != "classes":
        return
    task = task_of(program, folder=source.pipeline)
    assert task.latent_shape == (4, height, width)
    drawn = trajectory(task, as_denoise(program.module()), 2, 2, 1.5, 0.0, 0)
    assert all(x.shape == (2, 4, height, width) for x in drawn)


def test_a_pipeline_samples_height_and_width(sources: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    source = find_source(**sources["classes"], latent_size=(8, 16))
    save_program(trace(source), tmp_path / "x.hqc", pipeline=source.pipeline)
    images = load(tmp_path / "x.hqc").pipeline()([0, 1], num_inference_steps=1, output_type="pt").images
    assert images.shape[2] * 2 == images.shape[3]


def test_a_packed_transformer_has_its_places_row_by_row() -> None:
    source = denoiser_source(denoiser("flux"), "flux", 5, (8, 12))
    shapes = {spec.name: spec.shape for spec in source.inputs}
    assert shapes["sample"][1] == shapes["img_ids"][0] == 4 * 6
    program = trace(source)
    places = synthetic_task(program).draw_conditions(2, torch.Generator())[2]
    assert places.shape == (24, 3)
    assert places[:, 1].tolist() == [row for row in range(4) for _ in range(6)]
    assert places[:, 2].tolist() == list(range(6)) * 4


def test_a_named_architecture_takes_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**dict(denoiser("sd15").config), "sample_size": 8}
    tiny = type(ARCHITECTURES["sd15"])("UNet2DConditionModel", {k: v for k, v in options.items() if k[0] != "_"})
    monkeypatch.setattr("hqc.capture.architectures.ARCHITECTURES", {"tiny": tiny})
    assert find_source("arch:tiny", latent_size=12).inputs[0].shape == ("N", 4, 12, 12)
    assert find_source("arch:tiny", latent_size=(9, 12)).inputs[0].shape == ("N", 4, 9, 12)


def test_a_transformer_at_another_size_has_its_places_as_a_tensor(
    sources: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Grids of places have no ONNX operator; what they give depends on the size alone."""
    source = find_source(**sources["dit"], latent_size=12)
    program = trace(source)
    assert not any(is_op(node, aten.meshgrid.indexing) for node in program.graph.nodes)
    assert [name for name in program.state if name.startswith("grid_")] == ["grid_0"]
    args = program.example_inputs(3)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*args), source.module(*args), rtol=0, atol=1e-5)
    assert export_program(program, "portable", tmp_path / "dit.onnx").nodes


def test_an_export_is_measured_against_its_own_program(sources: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    plain, dit = (trace(find_source(**sources[kind])) for kind in ("plain", "dit"))
    plain = run_pipeline(plain, [SelectLayers(bits="w4a4"), InsertQdq((0.0,))])
    with pytest.raises(ExportError, match=r"--against: takes sample .*class_labels .*; the program takes sample "):
        export_program(plain, "portable", tmp_path / "x", float_program=dit)


# ---- steps ---------------------------------------------------------------------------------------------------------


def _ddim(**options: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=100, clip_sample=False, **options)


@pytest.mark.parametrize(
    ("options", "steps"), [({}, 200), ({"steps_offset": 1}, 100)], ids=["too many", "past the end"]
)
def test_steps_that_a_scheduler_refuses(options: dict[str, Any], steps: int) -> None:
    scheduler = _ddim(**options)
    task = Task(lambda: type(scheduler).from_config(scheduler.config), (3, 4, 4))
    wanted = rf"--num-inference-steps {steps}: DDIMScheduler cannot take them \(.*\)\. Give fewer steps; .* on 100\."
    with pytest.raises(TrainingError, match=wanted):
        list(trajectory(task, lambda sample, timestep, condition: sample, 2, steps, 1.0, 0.0, 0))
    with pytest.raises(TrainingError, match=wanted):
        require_steps(scheduler, steps)
    require_steps(scheduler, steps // 2 - 1)


def test_input_specs_are_as_before() -> None:
    """Sizes that divide are taken as they are."""
    from hqc.capture.families import family_of

    assert family_of("DiTTransformer2DModel").inputs(denoiser("dit").config, 1, 10)[0] == InputSpec(
        "sample", ("N", denoiser("dit").config.in_channels, 10, 10)
    )
