"""Insert quantise/dequantise pairs: activations with a scale per calibrated timestep, weights per output channel.

    before   y = op(Ĥ·(Ĥ·x), W)                          (or op(x, W) at an unrotated site)
    after    y = op(Ĥ·Q_a(Ĥ·x; s_a[i]), Q_w(W; s_w)),    i = argmin_j |timestep - grid[j]| per sample

Q_a is symmetric with narrow range ±(2^(n-1) - 1), Q_w symmetric with full range and one scale per output channel.
The row i comes from the graph's own `timestep` input, so the program stays a pure function and a batch may mix
timesteps. Weight scales start at max|W_o|/qmax, the activation tables at 1: calibration fills both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from hqc.errors import PassError, PlanError
from hqc.passes.rewriting import UNPLANNED, layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.plan import activation_range, weight_range
from hqc.program import BATCH, Program, Stage, aten

__all__ = ["GRID", "InsertQdq"]

GRID = "timestep_grid"
FAKE_QUANTIZE = torch.ops.hqc.fake_quantize.default


@dataclass(frozen=True)
class InsertQdq:
    """Puts quantisers on the input and the weight of every quantised site.

    timesteps: the calibrated grid, one row of every scale table each; empty: what the plan asks for, or one row.
    """

    timesteps: tuple[float, ...] = ()

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = Stage.QUANTISED
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        if not all(isinstance(t, (int, float)) and math.isfinite(t) for t in self.timesteps):
            raise PlanError("timesteps", f"the grid {self.timesteps} is not all numbers", "Give finite timesteps.")
        if len(set(self.timesteps)) != len(self.timesteps):
            raise PlanError("timesteps", "the grid repeats a timestep", "Give distinct timesteps.")

    def find(self, program: Program) -> Findings:
        """Every site that the plan quantises."""
        misses = [(p.site, f"float: {p.reason}") for p in program.plan.sites if not p.quantised]
        misses += [(site, UNPLANNED) for site, _ in program.sites() if site not in program.plan]
        return Findings(tuple(p.site for p in program.plan.quantised), tuple(misses))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Inserts the grid lookup once, then both quantisers of each site."""
        edit = rewrite(program)
        planned = replace(program.plan, timesteps=self.timesteps or program.plan.timesteps or (0.0,))
        if not matches:
            return edit.finish(plan=planned)
        inputs = {node.name: node for node in edit.graph.nodes if node.op == "placeholder"}
        if "timestep" not in inputs:
            raise PassError(
                "insert_qdq",
                f"the inputs are {', '.join(inputs)}; expected one named timestep",
                "Name the input that holds each sample's timestep [N] `timestep`.",
            )
        timestep = inputs["timestep"]
        # The lookup stands right behind its input: it depends on nothing else.
        first = timestep.next
        grid = edit.weight(GRID, torch.tensor(planned.timesteps, dtype=torch.float32), first)
        row = edit.call(
            first, torch.ops.hqc.nearest_timestep.default, timestep, grid, shape=(BATCH,), dtype="int64", role="row"
        )
        for site in matches:
            plan, layer = program.plan[site], edit.layers[site]
            x, weight, _ = layer_inputs(layer)
            rotated, reader = (x.all_input_nodes[0], x) if x.meta.get("role") == "rotation_back" else (x, layer)
            table = edit.weight(f"{site}.activation_scale_table", torch.ones(len(planned.timesteps)), reader)
            scale = edit.call(reader, aten.index_select.default, table, 0, row, shape=(BATCH,), dtype="float32")
            low, high = activation_range(plan.activation_bits or 8)
            quantised = edit.call(
                reader, FAKE_QUANTIZE, rotated, scale, low, high, like=rotated, site=site, role="activation_quantizer"
            )
            reader.replace_input_with(rotated, quantised)
            self._quantise_weight(
                edit.program.state[str(weight.target)], site, layer, weight, edit, plan.weight_bits or 8
            )
        return edit.finish(plan=planned)

    @staticmethod
    def _quantise_weight(value: Tensor, site: str, layer: fx.Node, weight: fx.Node, edit, bits: int) -> None:  # type: ignore[no-untyped-def]
        low, high = weight_range(bits)
        scale = edit.weight(f"{site}.weight_scale", _range_scale(value, high), layer)
        quantised = edit.call(
            layer, FAKE_QUANTIZE, weight, scale, low, high, like=weight, site=site, role="weight_quantizer"
        )
        layer.replace_input_with(weight, quantised)


@torch.no_grad()
def _range_scale(weight: Tensor, qmax: int) -> Tensor:
    """max|W_o|/qmax [O]; 1 for a channel of zeros, which it represents exactly."""
    absmax = weight.flatten(1).abs().amax(1).to(torch.float32) if weight.numel() else weight.new_zeros(len(weight))
    return torch.where(absmax > 0, absmax / qmax, torch.ones_like(absmax))
