"""Least and largest codes, read off the graph: numbers, tables, and what is neither."""

from collections.abc import Callable

import pytest
import torch
from torch import fx

from hqc.bounds import bounds_of, clip_codes
from hqc.errors import ExportError
from hqc.passes import FreezeIntegers, InsertQdq, SelectLayers
from hqc.passes.rewriting import layer_inputs
from hqc.pipeline import run_pipeline
from hqc.program import Program, aten, copy_graph
from hqc.sites import quantised_sites

GRID = (0.0, 300.0, 600.0)
ops = torch.ops.hqc


@pytest.fixture(scope="session")
def asymmetric(captured: Callable[[str], Program]) -> Program:
    chain = [SelectLayers(bits="w4a4"), InsertQdq(GRID, activation="asymmetric", weight="asymmetric")]
    program = run_pipeline(captured("two_sites"), chain)
    table = torch.tensor([-3.0, 6.4, 21.0])  # kept in 0…15 and rounded where it is read
    return program.evolve(state={**program.state, "conv.activation_zero_table": table})


@pytest.mark.parametrize("frozen", [False, True])
def test_tables_are_read_off_the_graph(frozen: bool, asymmetric: Program) -> None:
    program = run_pipeline(asymmetric, [FreezeIntegers()]) if frozen else asymmetric
    bounds = {site.site: site.bounds for site in quantised_sites(program)}
    conv, head = bounds["conv"], bounds["head"]
    assert conv.lookups is not None
    assert conv.lookups.lows.tolist() == [0, -6, -15]
    assert conv.lookups.highs.tolist() == [15, 9, 0]
    assert (conv.low, conv.high, conv.largest) == (-15, 15, 15)
    assert (head.low, head.high) == (-8, 7)
    assert [conv.of_row(row) for row in range(3)] == [(0, 15), (-6, 9), (-15, 0)]
    assert conv.key != head.key
    assert conv.key == next(s for s in quantised_sites(program) if s.site == "conv").bounds.key


def test_channels_of_a_mixed_weight_have_tops_of_their_own(captured: Callable[[str], Program]) -> None:
    """-z … t-z, z rounded and kept in 0…t."""
    ranges = InsertQdq(GRID, activation="asymmetric", weight="mixed")
    program = run_pipeline(captured("two_sites"), [SelectLayers(bits="w4a4"), ranges])
    top, zero = program.state["conv.weight_top"].clone(), program.state["conv.weight_zero"].clone()
    assert top.tolist() == [15.0] * len(top)
    top[:3], zero[:3] = torch.tensor([31.0, 7.0, 15.0]), torch.tensor([30.6, 9.0, -2.0])
    program = program.evolve(state={**program.state, "conv.weight_top": top, "conv.weight_zero": zero})
    found = bounds_of(layer_inputs(dict(program.sites())["conv"])[1], program)
    assert [found.of_row(row) for row in range(3)] == [(-31, 0), (-7, 0), (0, 15)]
    frozen = run_pipeline(program, [FreezeIntegers()])
    assert {name for name in frozen.state if name.startswith("conv.weight_")} == {
        "conv.weight_codes",
        "conv.weight_scale",
    }
    codes = frozen.state["conv.weight_codes"].flatten(1)
    assert [int(codes[0].max()), int(codes[1].min()), int(codes[2].min())] == [0, -7, 0]


def test_equal_numbers_are_one_key(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("two_sites"), [SelectLayers(bits="w4a4"), InsertQdq(GRID)])
    first, second = (site.bounds for site in quantised_sites(program))
    assert first.lookups is None
    assert first.key == second.key == (-7, 7)
    assert first.of_row(2) == (-7, 7)


def codes_node(program: Program, *bounds: object) -> tuple[fx.Node, Program]:
    """The first quantiser of a program, with other bounds."""
    graph = copy_graph(program.graph)
    node = next(n for n in graph.nodes if n.meta.get("role") == "activation_quantizer")
    node.args = (*node.args[:2], *bounds)
    return node, program.evolve(graph=graph)


def test_a_bound_that_is_no_whole_number(asymmetric: Program) -> None:
    node, program = codes_node(asymmetric, -7, 7.5)
    with pytest.raises(ExportError, match=r"site conv: its code range ends at 7\.5, no whole number"):
        bounds_of(node, program)


def test_a_bound_that_no_pass_makes(asymmetric: Program) -> None:
    _, program = codes_node(asymmetric, -7, 7)
    node = next(n for n in program.graph.nodes if n.meta.get("role") == "activation_quantizer")
    with program.graph.inserting_before(node):
        strange = program.graph.call_function(aten.mul.Scalar, (node.args[1], 2))
    node.args = (*node.args[:2], strange, strange)
    with pytest.raises(ExportError, match="which no pass writes"):
        bounds_of(node, program)


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_table_that_is_not_whole(value: float, asymmetric: Program) -> None:
    frozen = run_pipeline(asymmetric, [FreezeIntegers()])
    state = {**frozen.state, "conv.activation_low_table": torch.tensor([0.0, value, -15.0])}
    with pytest.raises(ExportError, match="site conv: its code range has ends that are no whole numbers"):
        list(quantised_sites(frozen.evolve(state=state)))


def test_codes_are_clipped_for_each_sample() -> None:
    levels = torch.tensor([[-20.0, 3.0, 20.0], [-20.0, 3.0, 20.0]])
    assert clip_codes(levels, -7, 7).tolist() == [[-7, 3, 7]] * 2
    low, high = torch.tensor([0.0, -15.0]), torch.tensor([15.0, 0.0])
    assert clip_codes(levels, low, high).tolist() == [[0, 3, 15], [-15, 0, 0]]
