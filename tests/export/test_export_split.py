"""Parts of split sites in every target: each with codes and scales of its own, under a name with a colon."""

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch

from hqc.calibration import calibrate
from hqc.export import TensorRtOptions, export_program
from hqc.export.tensorrt.forms import Form
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers, SplitConcat
from hqc.pipeline import run_pipeline
from hqc.program import Program
from hqc.runtimes import load
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.integer.kernel_set import reference_kernels

GRID = (0.0, 300.0, 600.0, 900.0)
PARTS = ("conv_shortcut:0", "conv_shortcut:1", "fuse:0", "fuse:1", "fuse:2")


@pytest.fixture(scope="module")
def split(captured):
    """split("symmetric"): the joined model, split, rotated and calibrated on random inputs.

    "static": asymmetric activations with one row for all timesteps, no rotation, as Q-Diffusion has it. "grouped": the
    same with one row for two timesteps each, as QuEST has it.
    """

    @cache
    def build(ranges: str) -> Program:
        select = SelectLayers(bits="w4a4", rules="all")
        if ranges in ("static", "grouped"):
            rows = {"static": True} if ranges == "static" else {"groups": 2}
            steps = [SplitConcat(), select, InsertQdq(GRID, activation="asymmetric", **rows)]
        else:
            steps = [SplitConcat(), select, InsertHadamard(), InsertQdq(GRID, activation=ranges, weight=ranges)]
        program = run_pipeline(captured("joined"), steps)

        def run(denoise) -> None:
            for seed, t in enumerate(GRID):
                denoise(program.example_inputs(4, seed)[0], torch.full((4,), t))

        return calibrate(program, run)

    return build


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("target", ["portable", "onnxruntime", "tensorrt"])
@pytest.mark.parametrize("ranges", ["symmetric", "asymmetric", "static", "grouped"])
def test_every_part_is_verified(split, captured, target: str, ranges: str, tmp_path: Path) -> None:
    program = split(ranges)
    report = export_program(program, target, tmp_path / "x", float_program=captured("joined"))
    assert {site.site for site in report.verification.sites} == {plan.site for plan in program.plan.quantised}
    assert {site.site for site in report.verification.sites} >= set(PARTS)


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_grouped_rows_are_looked_up_for_every_sample(split, captured, target: str, tmp_path: Path) -> None:
    """A batch that mixes timesteps, also between the calibrated ones: as if each of them had a row, by hand."""
    program = split("grouped")
    assert program.state["timestep_grid"].tolist() == [150.0, 750.0]
    steps = [SplitConcat(), SelectLayers(bits="w4a4", rules="all"), InsertQdq(GRID, activation="asymmetric")]
    single = run_pipeline(captured("joined"), steps)
    tables = {name: table for name, table in program.state.items() if name.endswith("_table")}
    by_hand = {name: table[torch.tensor([0, 0, 1, 1])] for name, table in tables.items()}
    single = single.evolve(state={**program.state, "timestep_grid": single.state["timestep_grid"], **by_hand})
    sample, _, *more = program.example_inputs(4, seed=8)
    args = sample, torch.tensor([900.0, 100.0, 460.0, 440.0]), *more
    wanted = single.module()(*args)
    assert torch.equal(program.module()(*args), wanted)
    assert not torch.equal(program.module()(sample, torch.full((4,), 900.0), *more), wanted)
    assert all(bool((table[0] != table[1]).any()) for name, table in tables.items() if "scale" in name)
    export_program(program, target, tmp_path / "x")
    assert relative(load(tmp_path / "x").session(*args), wanted) < 0.02


def test_parts_are_integer_products_in_onnxruntime(split, tmp_path: Path) -> None:
    program = split("symmetric")
    export_program(program, "onnxruntime", tmp_path / "x")
    names = {node.name for node in onnx.load(str(tmp_path / "x" / "model.onnx"), load_external_data=False).graph.node}
    assert all(any(name.startswith(part) for name in names) for part in PARTS)
    args = program.example_inputs(3, seed=8)
    # Float rounding, or where a code flipped for it.
    assert relative(load(tmp_path / "x").session(*args), program.module()(*args)) < 0.02


def test_a_pattern_of_the_whole_site_reaches_both_parts_in_tensorrt(split, tmp_path: Path) -> None:
    options = TensorRtOptions(weight_only=("fuse",))
    report = export_program(split("symmetric"), "tensorrt", tmp_path / "x", tensorrt=options)
    forms = {layer.site: layer.form for layer in report.layers}
    assert {forms[part] for part in PARTS if part.startswith("fuse")} == {Form.INT4_WEIGHT_ONLY}


@pytest.mark.parametrize("ranges", ["symmetric", "asymmetric", "static", "grouped"])
def test_the_gpu_runtime_computes_the_same(split, ranges: str) -> None:
    """Its graph with kernels in plain torch; the sum of two parts may be the tail of one product."""
    program = split(ranges)
    args = program.example_inputs(3, seed=8)
    module = integer_module(program, reference_kernels(), BuildOptions(torch.device("cpu"), torch.float32))
    wanted = integer_form(program).module()(*args)
    assert relative(module(*args), wanted) <= 1e-2
    assert relative(wanted, program.module()(*args)) <= 2e-2
