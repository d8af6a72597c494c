"""Outlines: a program of a named architecture without its weights comes back with every one of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hqc.capture import capture_module
from hqc.capture.architectures import fill_seeded
from hqc.errors import ArtefactError
from hqc.evaluation.bench.outline import read_outline, seeded_tensor, write_outline
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import InputSpec, Program
from hqc.text import graph_text


class _Small(torch.nn.Module):
    """A norm, two convolutions and a linear layer, as an architecture's names have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = torch.nn.Conv2d(32, 64, 3, padding=1)
        self.norm = torch.nn.GroupNorm(8, 64)
        self.conv_out = torch.nn.Conv2d(64, 32, 1)
        self.linear = torch.nn.Linear(1, 64)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.conv_in(sample)) + self.linear(timestep[:, None])[:, :, None, None]
        return self.conv_out(torch.nn.functional.silu(hidden))


@pytest.fixture(scope="module")
def program() -> Program:
    inputs = (InputSpec("sample", ("N", 32, 4, 4)), InputSpec("timestep", ("N",)))
    return capture_module(fill_seeded(_Small()), inputs)


def assert_equal(found: Program, wanted: Program) -> None:
    assert found.state.keys() == wanted.state.keys()
    assert all(torch.equal(tensor, wanted.state[name]) for name, tensor in found.state.items())
    assert graph_text(found) == graph_text(wanted)
    assert (found.plan, found.inputs, found.stage, found.origin) == (
        wanted.plan,
        wanted.inputs,
        wanted.stage,
        wanted.origin,
    )


def test_nothing_of_a_float_program_is_stored(program: Program, tmp_path: Path) -> None:
    write_outline(program, tmp_path / "o")
    assert_equal(read_outline(tmp_path / "o"), program)
    assert (tmp_path / "o" / "kept.safetensors").stat().st_size < 100  # its empty header


def test_of_a_quantised_program_the_scales_are(program: Program, tmp_path: Path) -> None:
    student = run_pipeline(program, [SelectLayers(bits="w4a4"), InsertHadamard(), InsertQdq((0.0, 500.0))])
    write_outline(student, tmp_path / "o")
    assert_equal(read_outline(tmp_path / "o"), student)
    weights = sum(t.numel() * 4 for n, t in student.state.items() if n.endswith("weight"))
    assert (tmp_path / "o" / "kept.safetensors").stat().st_size < 0.1 * weights


def test_a_tensor_that_is_not_what_its_name_says_is_stored(program: Program, tmp_path: Path) -> None:
    weight = program.state["conv_in.weight"].clone()
    weight[0, 0, 0, 0] += 2**-20
    changed = program.evolve(state={**program.state, "conv_in.weight": weight})
    write_outline(changed, tmp_path / "o")
    assert torch.equal(read_outline(tmp_path / "o").state["conv_in.weight"], weight)
    assert not torch.equal(weight, seeded_tensor("conv_in.weight", (64, 32, 3, 3)))


def _flip(folder: Path) -> None:
    data = bytearray((folder / "seeded.json").read_bytes())
    data[5] ^= 1
    (folder / "seeded.json").write_bytes(bytes(data))


def _forget(folder: Path) -> None:
    (folder / "graph.json").unlink()


@pytest.mark.parametrize("damage", [_flip, _forget])
def test_a_damaged_outline_is_refused(program: Program, tmp_path: Path, damage: Any) -> None:
    write_outline(program, tmp_path / "o")
    damage(tmp_path / "o")
    with pytest.raises(ArtefactError):
        read_outline(tmp_path / "o")
    with pytest.raises(ArtefactError, match="no such folder"):
        read_outline(tmp_path / "nothing")
