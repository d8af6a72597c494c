"""Layers behind SiLU and GELU: numbers, what each sign's codes are worth, every target, refusals."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hqc.calibration import calibrate
from hqc.capture import trace
from hqc.capture.sources import Source
from hqc.errors import PassError
from hqc.export import export_program
from hqc.passes import InsertQdq, SelectLayers, SplitConcat, SplitSigns
from hqc.pipeline import run_pass, run_pipeline
from hqc.program import InputSpec, Origin, Program
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.integer.kernel_set import reference_kernels
from hqc.text import graph_text

Captured = Callable[[str], Program]
GRID = (10.0, 500.0)
PARTED = ("behind", "beside", "token")


class _OneSided(nn.Module):
    """A padded convolution behind SiLU, a linear layer behind GELU, another layer that reads the same SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.behind = nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.beside = nn.Conv2d(16, 16, 1, stride=2, bias=False)
        self.token = nn.Linear(16, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = functional.silu(2 * self.first(sample) + (timestep / 1000).view(-1, 1, 1, 1))
        tokens = (self.behind(hidden) + self.beside(hidden)).flatten(2).transpose(1, 2)
        return self.token(functional.gelu(2 * tokens))


@pytest.fixture(scope="module")
def whole() -> Program:
    torch.manual_seed(17)
    inputs = (InputSpec("sample", ("N", 4, 8, 8)), InputSpec("timestep", ("N",)))
    return trace(Source(_OneSided(), inputs, Origin(source="one-sided")))


@pytest.fixture(scope="module")
def split(whole: Program) -> Program:
    return run_pass(whole, SplitSigns(), check_numerics=True)


def quantised(program: Program) -> Program:
    """4 bits everywhere, calibrated on random inputs."""
    made = run_pipeline(program, [SelectLayers(bits="w8a4", rules="all"), InsertQdq(GRID)])

    def run(denoise) -> None:  # type: ignore[no-untyped-def]
        for seed, t in enumerate(GRID):
            denoise(made.example_inputs(4, seed)[0], torch.full((4,), t))

    return calibrate(made, run)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_it_equals_the_whole_model_in_float64(whole: Program, split: Program) -> None:
    args = [arg.double() for arg in whole.example_inputs(3)]
    programs = [p.evolve(state={k: v.double() for k, v in p.state.items()}) for p in (whole, split)]
    with torch.no_grad():
        wanted, found = (program.module()(*args) for program in programs)
    assert float((found - wanted).abs().max()) <= 1e-13 * float(wanted.abs().max())


def test_a_layer_a_sign(whole: Program, split: Program) -> None:
    layers = dict(split.sites())
    assert list(layers) == ["first", *(f"{name}:{n}" for name in PARTED for n in (0, 1))]
    assert SplitSigns().find(whole).matches == PARTED
    for n in (0, 1):
        assert torch.equal(split.state[f"behind:{n}.weight"], whole.state["behind.weight"])
    assert layers["behind:0"].args[0] is layers["beside:0"].args[0]  # one clamp for all that read the tensor
    assert layers["behind:0"].args[2] is not None
    assert layers["behind:1"].args[2] is None


def test_each_sign_has_levels_of_its_own(whole: Program, split: Program) -> None:
    """Small values below zero keep what a common scale rounds away."""
    one, two = quantised(whole), quantised(split)
    scales = [float(two.state[f"behind:{n}.activation_scale_table"].max()) for n in (0, 1)]
    assert scales[1] < 0.3 * scales[0]
    args = whole.example_inputs(4, 9)
    wanted = whole.module()(*args)
    assert relative(two.module()(*args), wanted) < 0.9 * relative(one.module()(*args), wanted)


@pytest.mark.parametrize("target", ["portable", "onnxruntime", "tensorrt"])
def test_every_part_is_verified_in_every_target(whole: Program, split: Program, target: str, tmp_path: Path) -> None:
    program = quantised(split)
    report = export_program(program, target, tmp_path / "x", float_program=whole)
    assert {site.site for site in report.verification.sites} == {plan.site for plan in program.plan.quantised}
    if target == "onnxruntime":
        nodes = onnx.load(str(tmp_path / "x" / "model.onnx"), load_external_data=False).graph.node
        products = [node for node in nodes if node.op_type == "MatMulIntegerToFloat"]
        assert len(products) == len(program.plan.quantised)  # no site stayed in floating point


def test_the_gpu_runtime_computes_the_same(split: Program) -> None:
    program = quantised(split)
    args = program.example_inputs(3, seed=8)
    module = integer_module(program, reference_kernels(), BuildOptions(torch.device("cpu"), torch.float32))
    wanted = integer_form(program).module()(*args)
    assert relative(module(*args), wanted) <= 1e-2  # float16 between the products
    assert relative(wanted, program.module()(*args)) <= 2e-2


def test_it_composes_with_split_concat(captured: Captured) -> None:
    program = run_pipeline(captured("joined"), [SplitConcat(), SplitSigns()])
    sites = [site for site, _ in program.sites()]
    assert {"conv:0", "conv:1", "conv_shortcut:0", "conv_shortcut:1"} <= set(sites)
    assert SplitSigns().find(program).matches == ()
    assert dict(SplitSigns().find(program).misses) == {}


@pytest.mark.parametrize("model", ["two_sites", "shared_input"])
def test_it_does_not_fire_elsewhere(captured: Captured, model: str) -> None:
    program = captured(model)
    said = (("SiLU, GELU", "no layer of the model reads the result of one"),)
    assert SplitSigns().find(program).misses == said
    assert graph_text(run_pass(program, SplitSigns())) == graph_text(program)


def test_it_comes_before_the_selection(whole: Program) -> None:
    with pytest.raises(PassError, match=r"split_signs: the layers are selected already. Run it before select_layers"):
        run_pass(run_pass(whole, SelectLayers(bits="w4a4")), SplitSigns())
