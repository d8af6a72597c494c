"""What a target takes is found by its own lowering, without writing anything, at the speed of a walk."""

from typing import get_args

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional

from hqc.capture import capture_module
from hqc.errors import ExportError
from hqc.export import Target, export_program, survey
from hqc.export.surveys import require_taken, survey_targets
from hqc.program import InputSpec, Program

TARGETS = get_args(Target)


class Awkward(nn.Module):
    """Three things that no target takes, and what reads their results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        large = functional.interpolate(self.conv(sample), scale_factor=2, mode="bilinear")
        large = functional.interpolate(large, scale_factor=2, mode="bilinear")
        values, _ = large.max(dim=1, keepdim=True)
        cropped = functional.pad(large, (1, -1, 0, 0), mode="circular")
        return (cropped * values).mean((2, 3)) * timestep[:, None]


@pytest.fixture(scope="module")
def awkward() -> Program:
    torch.manual_seed(0)
    return capture_module(Awkward(), (InputSpec("sample", ("N", 8, 4, 4)), InputSpec("timestep", ("N",))))


@pytest.mark.parametrize("target", TARGETS)
def test_everything_is_found_at_once(awkward: Program, target: Target) -> None:
    found = survey(awkward, target)
    assert [(o.operator, len(o.nodes)) for o in found.obstacles] == [
        ("aten.upsample_bilinear2d.vec", 2),
        ("aten.max.dim", 1),
        ("aten.pad.default", 1),
    ]
    assert "pads circularly by a negative amount" in str(found.obstacles[2])
    assert found.taken["aten.conv2d.default"] == 1
    assert found.taken["aten.mean.dim"] == 1
    assert found.taken["aten.mul.Tensor"] == 2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", [*zoo.ZOO, *zoo.SHAPES])
def test_what_exports_has_no_obstacle(captured, quantised, model: str, target: Target) -> None:
    assert survey(captured(model), target).obstacles == ()
    if model in ("two_sites", "geometry", "shared_input"):
        assert survey(quantised(model, "w4a4"), target).obstacles == ()


@pytest.mark.parametrize("target", TARGETS)
def test_the_export_refuses_what_was_found(awkward: Program, target: Target, tmp_path) -> None:
    with pytest.raises(ExportError, match=r"no ONNX translation for aten\.max\.dim, aten\.upsample_bilinear2d\.vec"):
        export_program(awkward, target, tmp_path / "x")


def test_what_is_refused_before_long_work(awkward: Program, captured) -> None:
    wanted = (
        r"target onnxruntime: does not take aten\.upsample_bilinear2d\.vec \(upsample_bilinear2d, "
        r"upsample_bilinear2d_1\), which has no ONNX translation\. Use other layers"
    )
    with pytest.raises(ExportError, match=wanted):
        require_taken(awkward, "onnxruntime")
    require_taken(captured("two_sites"), "onnxruntime")


def test_a_program_that_a_target_cannot_prepare(quantised) -> None:
    """Codes of eight bits by weights of eight bits in an integer program: the target says so before lowering."""
    from hqc.passes import FreezeIntegers, MergeLora, RotateWeights
    from hqc.pipeline import run_pipeline

    rotated = run_pipeline(quantised("two_sites", "w4a4"), [MergeLora(), FreezeIntegers(), RotateWeights()])
    (obstacle,) = survey(rotated, "portable").obstacles
    assert obstacle.operator == ""
    assert "weights are rotated already" in str(obstacle)
    assert [found.target for found in survey_targets(rotated) if not found.obstacles] == ["onnxruntime", "tensorrt"]


def test_no_weight_is_copied(captured) -> None:
    """Values stand on the program's own memory: a survey of gigabytes takes none."""
    program = captured("cross_attention")
    before = {name: tensor.data_ptr() for name, tensor in program.state.items()}
    survey_targets(program)
    assert {name: tensor.data_ptr() for name, tensor in program.state.items()} == before
