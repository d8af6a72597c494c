"""Quantised programs for the tests of the GPU runtime: round to nearest, scales near each quantiser's own range."""

import torch
from mixed_bits import mixed_channels
from torch import fx

from hqc.bits import activation_range, asymmetric_top
from hqc.bounds import FAKE_QUANTISERS
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Program, copy_graph

__all__ = ["GRID", "quantised", "relative", "with_quantisers"]

GRID = (0.0, 300.0, 600.0, 900.0)


class _Ranges(fx.Interpreter):
    """Runs a fake-quantised program in float; max |x| / qmax at every activation quantiser, qmax of the bits."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module())
        self.plan = program.plan
        self.scales: dict[str, float] = {}
        self.inputs: dict[str, fx.Node] = {}

    def run_node(self, n: fx.Node):
        if n.target not in FAKE_QUANTISERS:
            return super().run_node(n)
        x = self.fetch_args_kwargs_from_env(n)[0][0]
        if n.meta["role"] == "activation_quantizer":
            high = activation_range(self.plan[n.meta["site"]].activation_bits)[1]
            self.scales[n.meta["site"]] = 0.7 * float(x.abs().max()) / high
            self.inputs[n.meta["site"]] = n.args[0].args[0] if "hadamard" in str(n.args[0].target) else n.args[0]
        return x


_Prepared = tuple[Program, dict[str, float], dict[str, str]]
_made: dict[tuple[int, SelectLayers, InsertHadamard, str], _Prepared] = {}
_HQ_DM = InsertHadamard()


def _prepared(program: Program, layers: SelectLayers, rotation: InsertHadamard, kind: str) -> _Prepared:
    """Made once for each captured program, which its own cache keeps alive."""
    key = (id(program.graph), layers, rotation, kind)
    if key not in _made:
        _made[key] = _prepare(program, layers, rotation, kind)
    return _made[key]


def _prepare(program: Program, layers: SelectLayers, rotation: InsertHadamard, kind: str) -> _Prepared:
    activation = "symmetric" if kind == "symmetric" else "asymmetric"
    student = run_pipeline(program, [layers, rotation, InsertQdq(GRID, activation=activation, weight=kind)])
    ranges = _Ranges(student)
    with torch.no_grad():
        ranges.run(*student.example_inputs(4, seed=5))
    return student, ranges.scales, {site: node.name for site, node in ranges.inputs.items()}


def quantised(
    program: Program,
    bits: str,
    *,
    shared: bool = True,
    keep_float: tuple[str, ...] = (),
    rotation: InsertHadamard = _HQ_DM,
    kind: str = "symmetric",
) -> Program:
    """A program with random scale tables [T], and of the kind "asymmetric" random zero points beside them.

    kind "mixed": random bits by output channel besides.
    shared: sites that read one tensor in one range have one table, as calibration gives them; else each its own.
    """
    student, scales, inputs = _prepared(program, SelectLayers(bits=bits, keep_float=keep_float), rotation, kind)
    generator, state = torch.Generator().manual_seed(1), dict(student.state)
    spreads: dict[tuple[str, float], torch.Tensor] = {}
    for site, scale in scales.items():
        spread = 0.8 + 0.4 * torch.rand(len(GRID), generator=generator)
        key = (inputs[site], scale) if shared else (site, scale)
        state[f"{site}.activation_scale_table"] = scale * spreads.setdefault(key, spread)
        if not student.plan[site].activation_symmetric:
            # As the spread of the scale: at most a quarter of the range beside its middle.
            levels = asymmetric_top(student.plan[site].activation_bits)
            state[f"{site}.activation_zero_table"] = levels * (0.5 + 1.25 * (spreads[key] - 1))
    return student.evolve(state=state | mixed_channels(student, generator))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖ in float64."""
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm())


def with_quantisers(program: Program, low: int, high: int) -> Program:
    """A program in its integer form with other least and largest codes."""
    graph = copy_graph(program.graph)
    for node in graph.nodes:
        if node.target is torch.ops.hqc.quantize.default:
            node.args = (*node.args[:2], low, high)
    return program.evolve(graph=graph)
