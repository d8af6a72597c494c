"""Single operators: torch's result and onnxruntime's, of a graph that the capture left as it is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hqc.capture import capture_module
from hqc.export import export_program
from hqc.program import InputSpec, Program, aten, is_op
from hqc.runtimes import load

SPECS = (InputSpec("sample", ("N", 6, 8)), InputSpec("timestep", ("N",)))
Function = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """One function of the sample, with a row of positions that depends on no batch."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.function(sample + timestep.view(-1, 1, 1) / 1000)


def _rotary(x: Tensor) -> Tensor:
    """Angles in float64, as Flux computes them: sines of an outer product, each twice in a row."""
    angles = torch.outer(x.abs().sum((0, 2)), 10.0 ** -torch.arange(0, 2, 0.5, dtype=torch.float64))
    return x * angles.cos().repeat_interleave(2, dim=1, output_size=8).float()


def _unbound(x: Tensor) -> Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-imaginary, real], -1).flatten(2)


def _heads(x: Tensor) -> Tensor:
    """A mask for each head, as diffusers makes it: the batch axis itself is repeated."""
    mask = x.mean(2)[:, None].repeat_interleave(3, dim=0)
    return mask.view(-1, 3, 1, 6).sum(1) * x.mean(2, keepdim=True)


FUNCTIONS: dict[str, tuple[object, Function]] = {
    "concat": (aten.concat.default, lambda x: torch.concat([x, 2 * x], dim=-1)),
    "outer": (aten.outer.default, _rotary),
    "repeat_interleave": (aten.repeat_interleave.self_int, _rotary),
    "repeat_interleave of the batch": (aten.repeat_interleave.self_int, _heads),
    "unbind": (aten.unbind.int, _unbound),
    "pow of a number": (aten.pow.Scalar, lambda x: 2.5**x),
    "rms_norm": (aten.rms_norm.default, nn.RMSNorm(8, eps=1e-6)),
    "rms_norm without weight and epsilon": (
        aten.rms_norm.default,
        lambda x: nn.functional.rms_norm(x, (6, 8)),
    ),
}


def _captured(function: Function, specs: tuple[InputSpec, ...] = SPECS) -> Program:
    torch.manual_seed(0)
    if isinstance(function, nn.RMSNorm):
        nn.init.normal_(function.weight)
    return capture_module(Net(function), specs)


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("case", FUNCTIONS)
def test_operator(case: str, target: str, tmp_path) -> None:
    operator, function = FUNCTIONS[case]
    program = _captured(function)
    assert any(is_op(node, operator) for node in program.graph.nodes)
    export_program(program, target, tmp_path / "x")
    args = program.example_inputs(3, seed=1)
    wanted, found = program.module()(*args), load(tmp_path / "x").session(*args)
    # float32 rounding of sums of a few dozen terms.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert float(wanted.std()) > 0.1
