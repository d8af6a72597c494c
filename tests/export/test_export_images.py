"""Padding and upsampling move pixels and compute nothing: every target gives torch's own, bit for bit."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional

from hqc.capture import capture_module
from hqc.errors import ExportError
from hqc.export import TensorRtOptions, export_program
from hqc.export.reference import ForcedRun
from hqc.pipeline import run_pipeline
from hqc.program import InputSpec, Program, is_op
from hqc.runtimes import load

TARGETS = ("portable", "onnxruntime", "tensorrt")
Function = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """One function of the sample; the timestep takes part, as it must."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.function(sample + timestep.view(-1, 1, 1, 1))


def captured(function: Function, height: int, width: int) -> Program:
    inputs = (InputSpec("sample", ("N", 2, height, width)), InputSpec("timestep", ("N",)))
    return capture_module(Net(function), inputs)


def upsampled(*size: int) -> Function:
    return lambda x: functional.interpolate(x, size=size, mode="nearest")


def middled(*size: int) -> Function:
    return lambda x: functional.interpolate(x, size=size, mode="nearest-exact")


def padded(*amounts: int, mode: str = "circular") -> Function:
    return lambda x: functional.pad(x, amounts, mode=mode)


# (function, height, width, the ONNX operators that move the pixels)
CASES: dict[str, tuple[Function, int, int, set[str]]] = {
    "whole factors": (upsampled(8, 18), 4, 6, {"Resize"}),
    "a factor": (lambda x: functional.interpolate(x, scale_factor=3, mode="nearest"), 5, 4, {"Resize"}),
    "one pixel less": (upsampled(9, 13), 5, 7, {"Resize", "Shape", "Concat"}),
    "one axis whole": (upsampled(10, 13), 5, 7, {"Resize", "Shape", "Concat"}),
    # ⌊i·4/6⌋ falls on whole numbers at i = 3: no runtime is asked to round there.
    "a common divisor": (upsampled(6, 9), 4, 6, {"Gather"}),
    # By the factor as it is, not by 11/9.
    "a broken factor": (lambda x: functional.interpolate(x, scale_factor=1.3, mode="nearest"), 9, 5, {"Gather"}),
    "smaller": (upsampled(3, 4), 9, 8, {"Gather"}),
    # From the middle of each pixel: for 5 → 9 other pixels than the plain one's.
    "from the middle": (middled(9, 8), 5, 4, {"Gather"}),
    "from the middle, whole": (middled(10, 8), 5, 4, {"Resize"}),
    "wrapped": (padded(1, 1, 1, 1), 4, 5, {"Slice", "Concat"}),
    "wrapped unevenly": (padded(0, 5, 2, 0), 4, 5, {"Slice", "Concat"}),
    "wrapped once": (padded(1, 2, 0, 0), 4, 5, {"Slice", "Concat"}),
    "not at all": (padded(0, 0, 0, 0), 4, 5, set()),
    "mirrored": (padded(1, 2, 3, 1, mode="reflect"), 4, 5, {"Pad"}),
    "repeated": (padded(1, 2, 3, 1, mode="replicate"), 4, 5, {"Pad"}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_pixels(case: str, target: str, tmp_path: Path) -> None:
    function, height, width, operators = CASES[case]
    program = captured(function, height, width)
    options = {"tensorrt": TensorRtOptions(dtype="fp32")} if target == "tensorrt" else {}
    export_program(program, target, tmp_path / "x", **options)
    proto = onnx.load(str(tmp_path / "x" / "model.onnx"))
    used = Counter(node.op_type for node in proto.graph.node)
    assert set(used) - {"Add", "Reshape", "Unsqueeze", "Identity"} == operators
    for batch in (1, 3):
        args = program.example_inputs(batch, seed=1)
        wanted = program.module()(*args)
        feeds = {spec.name: arg.numpy() for spec, arg in zip(program.inputs, args, strict=True)}
        np.testing.assert_array_equal(ReferenceEvaluator(proto).run(None, feeds)[0], wanted.numpy())
        if target != "tensorrt":
            assert torch.equal(load(tmp_path / "x").session(*args), wanted)


@pytest.mark.parametrize(("have", "want"), [(5, 9), (7, 13), (33, 65), (65, 129), (127, 253), (2, 3), (3, 5), (8, 15)])
def test_every_size_of_a_level(have: int, want: int, tmp_path: Path) -> None:
    """A level halves an odd side upwards, and the way back asks for one pixel less than twice as many."""
    program = captured(upsampled(want, 2), have, 1)
    export_program(program, "onnxruntime", tmp_path / "x")
    args = program.example_inputs(2)
    assert torch.equal(load(tmp_path / "x").session(*args), program.module()(*args))


def test_a_crop_by_circular_padding_is_refused(tmp_path: Path) -> None:
    program = captured(padded(1, -1, 0, 0), 4, 5)
    with pytest.raises(ExportError, match="pads circularly by a negative amount"):
        export_program(program, "portable", tmp_path / "x")


# ---- verification's own run ------------------------------------------------------------------------------------------


class FromTokens(nn.Module):
    """A convolution whose input is tokens seen as an image: its channels are the innermost axis."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.conv = nn.Linear(32, 32), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        tokens = self.project((sample + timestep.view(-1, 1, 1, 1) / 1000).flatten(2).transpose(1, 2))
        return self.conv(tokens.transpose(1, 2).unflatten(2, (4, 4)))


class Strides(torch.fx.Interpreter):
    """Notes how the results of fake quantisers lie in memory."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module())
        self.found: dict[str, tuple[int, ...]] = {}
        self.codes: dict[str, Tensor] = {}

    def run_node(self, n: torch.fx.Node):
        result = super().run_node(n)
        if is_op(n, torch.ops.hqc.fake_quantize.default):
            self.found[n.name] = result.stride()
            _, scale, _, _ = self.fetch_args_kwargs_from_env(n)[0]
            if n.meta["role"] == "activation_quantizer":
                self.codes[n.meta["site"]] = (result / scale.view(-1, *[1] * (result.ndim - 1))).round().contiguous()
        return result


def test_given_codes_lie_in_memory_as_the_programs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a layer takes another kernel than in the free run, and roundings of the two part without a flipped code."""
    from hqc.passes import InsertQdq, SelectLayers

    torch.manual_seed(4)
    inputs = (InputSpec("sample", ("N", 32, 4, 4)), InputSpec("timestep", ("N",)))
    program = capture_module(FromTokens(), inputs)
    program = run_pipeline(program, [SelectLayers(bits="w8a8"), InsertQdq((0.0, 500.0))])
    state = {k: t / 40 if k.endswith("activation_scale_table") else t for k, t in program.state.items()}
    program, args = program.evolve(state=state), program.example_inputs(3)
    free = Strides(program)
    with torch.no_grad():
        wanted = free.run(*args)
    assert any(strides[1] == 1 for strides in free.found.values() if len(strides) == 4)

    seen: dict[str, tuple[int, ...]] = {}
    own = ForcedRun.run_node

    def noted(self: ForcedRun, n: torch.fx.Node):
        result = own(self, n)
        if n.name in free.found:
            seen[n.name] = result.stride()
        return result

    monkeypatch.setattr(ForcedRun, "run_node", noted)
    forced = ForcedRun(program, free.codes)
    assert torch.equal(forced.run(*args), wanted)
    assert seen == free.found
    assert sum(forced.flipped.values()) == 0
