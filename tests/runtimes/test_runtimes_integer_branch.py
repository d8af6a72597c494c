"""Smoothed sites with a branch in the GPU runtime's graph, its kernels in plain torch."""

import pytest
import torch
from integer_programs import GRID, quantised, relative

from hqc.export.reference import without_quantisers
from hqc.passes import AttachBranch, InsertHadamard, InsertQdq, InsertSmoothing, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Program
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.integer.kernel_set import reference_kernels
from hqc.runtimes.integer.layers import IntegerLayer

CPU = torch.device("cpu")


def with_branches(program: Program) -> Program:
    """Random factors and branches; scales near what the sites see."""
    rest = [SelectLayers(), InsertSmoothing(), AttachBranch(rank=2), InsertHadamard(), InsertQdq(GRID)]
    made, generator = run_pipeline(program, rest), torch.Generator().manual_seed(3)
    state, plain = dict(made.state), quantised(program, "w4a4")
    for name, tensor in made.state.items():
        if "branch_" in name:
            state[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
        elif name.endswith(".smoothing"):
            state[name] = 0.8 + 0.4 * torch.rand(tensor.shape, generator=generator)
        elif name.endswith("scale_table"):
            state[name] = plain.state[name]
    return made.evolve(state=state)


@pytest.mark.parametrize("name", ["two_sites", "geometry", "shared_input", "cross_attention"])
def test_it_computes_what_the_integer_program_computes(captured, name: str) -> None:
    program = with_branches(captured(name))
    inputs = program.example_inputs(3, seed=7)
    reference = integer_form(program).module()(*inputs)
    for fuse in (False, True):
        module = integer_module(program, reference_kernels(), BuildOptions(CPU, torch.float32, pack=True, fuse=fuse))
        # A code on a rounding boundary may flip (sums in another order) and part what follows.
        assert relative(module(*inputs), reference) <= (1e-5 if name != "cross_attention" else 0.05)
    # In half precision codes flip; no further from the float model.
    half, wanted = integer_module(program, reference_kernels(), BuildOptions(CPU)), without_quantisers(program).module()
    assert relative(half(*inputs), wanted(*inputs)) <= 1.2 * relative(reference, wanted(*inputs)) + 0.02


def test_the_branch_is_what_the_product_adds(captured) -> None:
    """The sum is taken into the kernel; both layers of the branch stay float."""
    program = with_branches(captured("two_sites"))
    module = integer_module(program, reference_kernels(), BuildOptions(CPU, torch.float32))
    products = [n for n in module.graph.nodes if n.op == "call_module"]
    layers = [n for n in products if isinstance(module.get_submodule(str(n.target)), IntegerLayer)]
    assert [set(node.kwargs) for node in layers] == [{"residual"}, {"residual"}]
    targets = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.aten.conv2d.default) == targets.count(torch.ops.aten.linear.default) == 2
