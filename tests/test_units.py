"""Units: which there are, that they are whole, and that each computes its output from its inputs in both graphs."""

from collections.abc import Callable

import pytest
import torch
from denoisers import captured_denoiser
from torch import Tensor, fx

from hqc.calibration import calibrate
from hqc.passes import DropSingleKeyAttention, InsertHadamard, InsertQdq, SelectLayers, SplitConcat
from hqc.pipeline import run_pipeline
from hqc.program import Program
from hqc.units import Unit, unit_program, units_of

Captured = Callable[[str], Program]
PASSES = (DropSingleKeyAttention(), SplitConcat(), SelectLayers(bits="w4a4", rules="all"))


class Values(fx.Interpreter):
    """The value of every node."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module(), garbage_collect_values=False)

    @torch.no_grad()
    def of(self, *args: Tensor) -> dict[str, Tensor]:
        self.run(*args)
        return {node.name: value for node, value in self.env.items()}


def captured_or_denoiser(captured: Captured, name: str) -> Program:
    return captured_denoiser(name) if name in ("sd3", "flux") else captured(name)


@pytest.mark.parametrize("name", ["unconditional", "cross_attention", "joined", "sd3", "flux"])
def test_every_site_is_in_one_unit(captured: Captured, name: str) -> None:
    program = run_pipeline(captured_or_denoiser(captured, name), PASSES)
    sites = [site for unit in units_of(program) for site in unit.sites]
    assert sites == [site for site, _ in program.sites()]


def test_blocks_of_a_unet(captured: Captured) -> None:
    units = {unit.name: unit for unit in units_of(captured("cross_attention"))}
    assert list(units)[:6] == [
        *("time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "down_blocks.0.resnets.0"),
        *("down_blocks.0.downsamplers.0.conv", "down_blocks.1.resnets.0"),
    ]
    block = units["down_blocks.1.attentions.0.transformer_blocks.0"]
    assert len(block.sites) == 10
    assert "condition" in block.inputs
    assert units["down_blocks.1.attentions.0.proj_in"].sites == ("down_blocks.1.attentions.0.proj_in",)
    assert "down_blocks.1.attentions.0" not in units


def test_an_attention_without_transformer_blocks_is_one(captured: Captured) -> None:
    units = {unit.name: unit for unit in units_of(captured("unconditional"))}
    assert [site.rpartition("attentions.0.")[2] for site in units["mid_block.attentions.0"].sites] == [
        *("to_q", "to_k", "to_v", "to_out.0")
    ]


def test_a_block_of_two_outputs_is_taken_apart() -> None:
    """SD3's blocks give image and text tokens; its last, and PixArt's, give one."""
    names = [unit.name for unit in units_of(captured_denoiser("sd3"))]
    assert "transformer_blocks.1" in names
    assert "transformer_blocks.0" not in names
    assert "transformer_blocks.0.attn.to_q" in names


def test_parts_of_a_split_layer_are_one_unit(captured: Captured) -> None:
    program = run_pipeline(captured("joined"), PASSES)
    units = {unit.name: unit for unit in units_of(program)}
    assert units["conv_shortcut"] == Unit(
        "conv_shortcut", ("conv2d_1", "mul"), "conv2d_2", ("conv_shortcut:0", "conv_shortcut:1")
    )
    assert units["fuse"].sites == ("fuse:0", "fuse:1", "fuse:2")


def test_sites_without_a_batch_are_in_none(captured: Captured) -> None:
    sites = {site for unit in units_of(captured("awkward")) for site in unit.sites}
    assert sites == {"fine", "grouped"}  # `across` reads [4HW, N, 32], `twice` [2N, …]


@pytest.mark.parametrize("name", ["joined", "cross_attention", "single_key", "flux"])
def test_each_computes_its_output_from_its_inputs(captured: Captured, name: str) -> None:
    """In the float graph and in the quantised one, where scales are looked up by the timestep."""
    program = run_pipeline(captured_or_denoiser(captured, name), PASSES)
    quantised = run_pipeline(program, [InsertHadamard(), InsertQdq((0.0, 500.0), activation="asymmetric")])
    args = program.example_inputs(3, seed=2)

    def run(denoise: Callable[..., Tensor]) -> None:
        denoise(args[0], torch.zeros(3), *args[2:])

    for one in (program, calibrate(quantised, run)):
        values, units = Values(one).of(*args), units_of(program)
        for unit in units:
            part = unit_program(one, unit)
            names = [node.name for node in part.graph.nodes if node.op == "placeholder"]
            # On two of the three samples: sizes are those of what it is given.
            given = [values[n][:2] if values[n].shape[:1] == (3,) else values[n] for n in names]
            assert set(names) <= {*unit.inputs, *(spec.name for spec in program.inputs)}, unit.name
            with torch.no_grad():
                found = part.module()(*given)
            torch.testing.assert_close(found, values[unit.output][:2], rtol=1e-4, atol=1e-5, msg=unit.name)


def test_given_nodes_are_inputs(captured: Captured) -> None:
    program = run_pipeline(captured("two_sites"), PASSES)
    quantised = run_pipeline(program, [InsertQdq((0.0,))])
    unit = units_of(program)[0]
    quantiser = dict(quantised.sites())["conv"].args[1]
    part = unit_program(quantised, unit, [quantiser.name])
    names = [node.name for node in part.graph.nodes if node.op == "placeholder"]
    assert quantiser.name in names
    assert "conv.weight" not in part.state
    assert "conv.bias" in part.state
