"""Asymmetric ranges in the GPU runtime's graph, its kernels in plain torch: every fusion takes looked-up bounds."""

import pytest
import torch
import zoo
from integer_programs import GRID, quantised, relative

from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.integer.kernel_set import reference_kernels
from hqc.runtimes.integer.layers import Codes, IntegerLayer, IntegerLinear, Quantise

CPU = torch.device("cpu")


def built(program, dtype=torch.float32, *, pack=True, fuse=True):
    return integer_module(program, reference_kernels(), BuildOptions(CPU, dtype, pack=pack, fuse=fuse))


@pytest.mark.parametrize(
    ("name", "bits"), [*((name, "w4a4") for name in (*zoo.PLAIN, "cross_attention")), ("two_sites", "w7a7")]
)
def test_it_computes_what_the_integer_program_computes(captured, name: str, bits: str) -> None:
    """Batch 3, mixed timesteps. In float32 the same sums; in half precision no further from the float model."""
    _check(captured(name), bits, "asymmetric")


@pytest.mark.parametrize(("name", "bits"), [("cross_attention", "w4a4"), ("geometry", "w2a4"), ("two_sites", "w6a6")])
def test_channels_of_mixed_bits(captured, name: str, bits: str) -> None:
    _check(captured(name), bits, "mixed")


@pytest.mark.parametrize(("name", "bits"), [("cross_attention", "w4a4"), ("geometry", "w2a4"), ("two_sites", "w6a6")])
def test_binary_codes_beside(captured, name: str, bits: str) -> None:
    _check(captured(name), bits, "residual")


def test_one_product_adds_the_other(captured) -> None:
    """Both read one quantiser's codes; the sum is taken into a kernel."""
    module = built(quantised(captured("two_sites"), "w4a4", kind="residual"), fuse=False)
    calls = [n for n in module.graph.nodes if n.op == "call_module"]
    products = [n for n in calls if isinstance(module.get_submodule(str(n.target)), IntegerLayer)]
    assert [set(n.kwargs) for n in products] == [set(), {"residual"}] * 2
    assert [n.kwargs.get("residual") for n in products[1::2]] == products[::2]
    assert [n.args[0] for n in products[1::2]] == [n.args[0] for n in products[::2]]


def _check(original, bits: str, kind: str) -> None:
    program = quantised(original, bits, kind=kind)
    assert any(plan.weight_mixed for plan in program.plan.quantised) == (kind in ("mixed", "residual"))
    inputs = program.example_inputs(3, seed=7)
    wanted, reference = original.module()(*inputs), integer_form(program).module()(*inputs)
    quantisation = relative(reference, wanted)
    assert quantisation > 1e-3
    # A value on a rounding boundary may flip by a step (sums in another order): a tenth of the quantisation error.
    assert relative(built(program)(*inputs), reference) <= max(0.1 * quantisation, 1e-6)
    assert relative(built(program, torch.float16)(*inputs), wanted) <= 1.2 * quantisation + 0.02


def test_fusions_are_those_of_a_symmetric_program(captured) -> None:
    kinds, model = ("symmetric", "asymmetric"), captured("cross_attention")
    reports = [built(quantised(model, "w4a4", kind=kind)).meta["report"] for kind in kinds]
    taken = [[(record.name, len(record.sites)) for record in report.fusions] for report in reports]
    assert taken[0] == taken[1]
    assert sum(count for _, count in taken[1]) > 5


def test_one_look_up_serves_every_range(captured) -> None:
    module = built(quantised(captured("cross_attention"), "w4a4", kind="asymmetric"))
    found = [
        n for n in module.graph.nodes if n.op == "call_function" and getattr(n.target, "__name__", "") == "look_up"
    ]
    assert len(found) == 2  # scales, and 1/scale with bounds
    kinds = {codes.low is None for codes in module.modules() if isinstance(codes, Codes)}
    assert kinds == {True, False}  # edges of 8 bits are symmetric


def test_query_key_and_value_share_codes_only_with_equal_ranges(captured) -> None:
    program = quantised(captured("shared_input"), "w4a4", kind="asymmetric")
    inputs = program.example_inputs(2, seed=1)
    other = {**program.state, "to_k.activation_zero_table": torch.zeros(len(GRID))}
    for state, count in ((program.state, 1), (other, 2)):
        changed = program.evolve(state=state)
        module = built(changed, fuse=False)
        assert len([m for m in module.modules() if isinstance(m, Quantise)]) == count
        assert len([m for m in module.modules() if isinstance(m, IntegerLinear)]) == 3
        assert relative(module(*inputs), integer_form(changed).module()(*inputs)) <= 1e-6  # float32 rounding


def test_rows_of_the_tables_are_the_nearest(captured) -> None:
    program = quantised(captured("two_sites"), "w4a4", kind="asymmetric")
    sample = program.example_inputs(2, seed=3)[0]
    timesteps = torch.tensor([GRID[1] + 40, GRID[1] - 40])
    spoilt = dict(program.state)
    for name in [n for n in spoilt if n.endswith("activation_zero_table")]:
        spoilt[name] = torch.where(torch.arange(len(GRID)) == 1, spoilt[name], 15.0)
    same = built(program.evolve(state=spoilt))(sample, timesteps)
    assert torch.equal(same, built(program)(sample, timesteps))
    assert not torch.equal(same, built(program.evolve(state=spoilt))(sample, torch.tensor([0.0, 900.0])))
