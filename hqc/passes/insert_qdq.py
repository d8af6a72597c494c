"""Insert quantise/dequantise pairs: activations with a scale per calibrated timestep, weights per output channel.

    before   y = op(Ĥ·(Ĥ·x), W)                          (or op(x, W) at an unrotated site)
    after    y = op(Ĥ·Q_a(Ĥ·x; s_a[i]), Q_w(W; s_w)),    i = argmin_j |timestep - grid[j]| per sample

Q_a is symmetric with narrow range ±(2^(n-1) - 1), Q_w symmetric with full range and one scale per output channel.
With an asymmetric range the codes are -z…2ⁿ-1-z: of an activation z is looked up as its scale is, of a weight it is one
per output channel. z is a parameter like the scales, rounded and kept in 0…2ⁿ-1 where it is read. Operands of 8 bits
stay symmetric, since their codes would not fit int8; the plan says so. A mixed weight is an asymmetric one whose
channels have tops of their own, -z…t-z with t = 2ᵇ-1: b is n until `mix_channel_bits` chooses n - 1, n or n + 1.
A residual weight is a mixed one whose salient channels have a binary code more, α·sign(W - Q(W)), instead of a bit.
A weight with a table has codes of 8 bits, of which `fit_lookup` uses 2ⁿ for each output channel.
The row i comes from the graph's own `timestep` input, so the program stays a pure function and a batch may mix
timesteps. With groups a row is that of neighbouring timesteps, and the grid holds the middles of theirs; a program that
reads a sample and nothing else, as a half of an autoencoder, has one row. Weight scales start at max|W_o|/qmax, or span
the channel's values and 0 where it is asymmetric; the tables start at scale 1 and a zero point in the middle:
calibration fills them all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, fx

from hqc.bits import (
    HIGHEST_ASYMMETRIC_BITS,
    HIGHEST_LOOKUP_BITS,
    HIGHEST_MIXED_BITS,
    activation_range,
    asymmetric_top,
    weight_range,
)
from hqc.errors import PassError, PlanError
from hqc.ops.grouped import by_group, group_count
from hqc.passes.rewriting import UNPLANNED, Rewriter, channel_axis, layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.plan import SitePlan
from hqc.program import BATCH, Program, Stage, aten

__all__ = [
    "GRID",
    "InsertQdq",
    "bounds_around",
    "grouped",
    "look_up_row",
    "reach_scale",
    "residual_step_of",
    "spanning_range",
    "spanning_weight_range",
    "weight_top",
]

GRID = "timestep_grid"
ops = torch.ops.hqc
Range = Literal["symmetric", "asymmetric"]
ActivationRange = Literal["symmetric", "asymmetric", "dynamic", "float"]
WeightRange = Literal["symmetric", "asymmetric", "mixed", "residual", "lookup"]
_MIXED = ("mixed", "residual")


@dataclass(frozen=True)
class InsertQdq:
    """Puts quantisers on the input and the weight of every quantised site.

    timesteps: the calibrated grid, one row of every scale table each; empty: what the plan asks for, or one row.
    activation, weight: "symmetric", or "asymmetric" for operands of at most 7 bits. weight="mixed": asymmetric, and up
    to 6 bits with bits of its own for every output channel; "residual": the same, and salient channels have a binary
    code more instead of a bit; "lookup": up to 4 bits with a table for each of them.
    activation="float": beside such weights, activations are not quantised, and wider weights neither.
    activation="dynamic": symmetric, and the scale is that of the values of every token or pixel itself, of
    `activation_group` input channels together, 0: of all of them; nothing is stored. weight_group: that many input
    channels of symmetric weights have a scale of their own, 0: all of an output channel have one. Where either does not
    divide the channels, the last group is shorter.
    groups: that many rows, each for neighbouring timesteps: all whose nearest middle of a group it is; 0: one row each.
    static: one row for all timesteps.
    """

    timesteps: tuple[float, ...] = ()
    activation: ActivationRange = "symmetric"
    weight: WeightRange = "symmetric"
    static: bool = False
    groups: int = 0
    weight_group: int = 0
    activation_group: int = 0

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = Stage.QUANTISED
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        if not all(isinstance(t, (int, float)) and math.isfinite(t) for t in self.timesteps):
            raise PlanError("timesteps", f"the grid {self.timesteps} is not all numbers", "Give finite timesteps.")
        if len(set(self.timesteps)) != len(self.timesteps):
            raise PlanError("timesteps", "the grid repeats a timestep", "Give distinct timesteps.")
        for name, value, kinds in (
            ("activation", self.activation, ActivationRange),
            ("weight", self.weight, WeightRange),
        ):
            if value not in (known := get_args(kinds)):
                raise PlanError(f"{name} {value!r}", f"unknown range; there are {', '.join(known)}", "Use one.")
        if self.activation == "float" and self.weight != "lookup":
            found = f"leaves activations float beside {self.weight} weights; only those of tables can stay so"
            raise PlanError("insert_qdq", found, "Give weight='lookup', or quantise activations.")
        if type(self.groups) is not int or self.groups < 0:
            raise PlanError("insert_qdq", f"groups is {self.groups!r}; expected 0, 1, 2, …", "Give a whole number.")
        for name, count in (("weight_group", self.weight_group), ("activation_group", self.activation_group)):
            if type(count) is not int or count < 0:
                found = f"{name} is {count!r}; expected 0, 1, 2, …"
                raise PlanError("insert_qdq", found, "Give a whole number of input channels.")
        if self.weight_group and self.weight != "symmetric":
            found = f"gives {self.weight} weights scales of {self.weight_group} channels; only symmetric ones take them"
            raise PlanError("insert_qdq", found, "Leave weight_group or weight out.")
        if self.activation_group and self.activation != "dynamic":
            found = f"has activation_group={self.activation_group} and {self.activation} activations, which have tables"
            raise PlanError("insert_qdq", found, "Give activation='dynamic' too.")
        if self.activation == "dynamic" and (self.static or self.groups):
            found = "has dynamic activations, which have no tables, and says how many rows tables have"
            raise PlanError("insert_qdq", found, "Leave static and groups out.")
        if self.static and self.groups:
            raise PlanError("insert_qdq", f"is static and has {self.groups} groups", "Give one of the two.")

    def find(self, program: Program) -> Findings:
        """Every site that the plan quantises."""
        misses = [(p.site, f"float: {p.reason}") for p in program.plan.sites if not p.quantised]
        misses += [(site, UNPLANNED) for site, _ in program.sites() if site not in program.plan]
        return Findings(tuple(p.site for p in program.plan.quantised), tuple(misses))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Inserts the grid lookup once, then both quantisers of each site."""
        if self.activation == "float":
            return self._weights_alone(program, matches)
        edit, plans = rewrite(program), {}
        grid = self.timesteps or program.plan.timesteps or (0.0,)
        rows = self._rows(grid if program.has_timestep else grid[:1])
        row = look_up_row(edit, rows, GRID) if matches and self.activation != "dynamic" else None
        for site in matches:
            layer = edit.layers[site]
            plan = plans[site] = self._with_ranges(program.plan[site], layer)
            x, weight, _ = layer_inputs(layer)
            rotated, reader = (x.all_input_nodes[0], x) if x.meta.get("role") == "rotation_back" else (x, layer)
            ranges = (
                _dynamic_range(edit, plan, rotated, reader, channel_axis(layer))
                if plan.activation_group
                else _activation_range(edit, plan, row, len(rows), reader)
            )
            _quantise(edit, plan, rotated, reader, ranges, "activation_quantizer")
            _quantise(edit, plan, weight, layer, _weight_range(edit, plan, weight, layer), "weight_quantizer")
        return edit.finish(plan=replace(program.plan.with_sites(plans), timesteps=grid))

    def _rows(self, grid: tuple[float, ...]) -> tuple[float, ...]:
        """The timesteps of the tables' rows."""
        if self.static:
            return grid[:1]
        return grouped(grid, self.groups) if self.groups else grid

    @staticmethod
    def _weights_alone(program: Program, matches: Sequence[str]) -> Program:
        """No quantiser at all: `fit_lookup` writes weights of few values, `freeze_integers` finds their codes."""
        plans = {}
        for site in matches:
            plan = program.plan[site]
            if plan.block:
                found = f"{site} is rotated for an activation that stays float"
                raise PassError("insert_qdq", found, "Leave the rotation out: --no-hadamard.")
            few = (plan.weight_bits or 8) <= HIGHEST_LOOKUP_BITS
            note = "activations stay float" if few else f"tables have at most {HIGHEST_LOOKUP_BITS} bits"
            reason = "; ".join(text for text in (plan.reason, note) if text)
            own = {"weight_lookup": True} if few else {"weight_bits": None, "trained": True}
            plans[site] = replace(plan, activation_bits=None, reason=reason, **own)
        return program.evolve(plan=program.plan.with_sites(plans))

    def _with_ranges(self, plan: SitePlan, layer: fx.Node) -> SitePlan:
        """The plan with what its ranges are, and where it says so why one is not as asked."""
        wide = [
            name
            for name, kind, bits in (
                ("activations", self.activation, plan.activation_bits),
                ("weights", self.weight, plan.weight_bits),
            )
            if kind in ("asymmetric", *_MIXED) and (bits or 8) > HIGHEST_ASYMMETRIC_BITS
        ]
        note = f"{' and '.join(wide)} symmetric: asymmetric codes of 8 bits do not fit int8" if wide else ""
        narrow = (plan.weight_bits or 8) <= HIGHEST_MIXED_BITS
        return replace(
            plan,
            weight_group=self.weight_group,
            activation_group=self._activation_group(layer),
            activation_symmetric=self.activation in ("symmetric", "dynamic") or "activations" in wide,
            weight_symmetric=self.weight in ("symmetric", "lookup") or "weights" in wide,
            weight_lookup=self.weight == "lookup" and (plan.weight_bits or 8) <= HIGHEST_LOOKUP_BITS,
            weight_mixed=self.weight in _MIXED and narrow,
            weight_residual=self.weight == "residual" and narrow,
            reason="; ".join(text for text in (plan.reason, note) if text),
        )

    def _activation_group(self, layer: fx.Node) -> int:
        """How many input channels of a layer have a dynamic scale together, 0 for a scale of a table."""
        if self.activation != "dynamic":
            return 0
        return self.activation_group or int(layer_inputs(layer)[0].meta["shape"][channel_axis(layer)])


def grouped(timesteps: Sequence[float], groups: int) -> tuple[float, ...]:
    """The middles of so many groups of neighbouring timesteps, ascending, as equally large as can be; all if few.

    >>> grouped((900.0, 700.0, 500.0, 300.0, 100.0), 2)
    (200.0, 700.0)
    """
    ordered = sorted(timesteps)
    count = min(groups, len(ordered))
    ends = [len(ordered) * index // count for index in range(count + 1)]
    runs = [ordered[start:end] for start, end in pairwise(ends)]
    return tuple((run[0] + run[-1]) / 2 for run in runs)


def look_up_row(edit: Rewriter, timesteps: Sequence[float], name: str) -> fx.Node:
    """The lookup of each sample's row in the grid of that name, which stands right behind its input.

    A program that reads a sample and nothing else has one row, for as many samples as there are.
    """
    inputs = {node.name: node for node in edit.graph.nodes if node.op == "placeholder"}
    if "timestep" not in inputs and list(inputs) != ["sample"]:
        raise PassError(
            "insert_qdq",
            f"the inputs are {', '.join(inputs)}; expected one named timestep",
            "Name the input that holds each sample's timestep [N] `timestep`.",
        )
    timestep = inputs["timestep" if "timestep" in inputs else "sample"]
    first = timestep.next
    if "timestep" not in inputs:
        timesteps = (0.0,)
        count = edit.call(first, aten.sym_size.int, timestep, 0)
        timestep = edit.call(first, aten.full.default, [count], 0.0, shape=(BATCH,), dtype="float32")
    grid = edit.weight(name, torch.tensor(timesteps, dtype=torch.float32), first)
    nearest = ops.nearest_timestep.default
    return edit.call(first, nearest, timestep, grid, shape=(BATCH,), dtype="int64", role="row")


def _activation_range(edit: Rewriter, plan: SitePlan, row: Any, rows: int, reader: fx.Node) -> tuple[Any, Any, Any]:
    """Scale, least and largest code of each sample."""
    bits = plan.activation_bits or 8
    table = edit.weight(f"{plan.site}.activation_scale_table", torch.ones(rows), reader)

    def look_up(stored: fx.Node) -> fx.Node:
        return edit.call(reader, aten.index_select.default, stored, 0, row, shape=(BATCH,), dtype="float32")

    if plan.activation_symmetric:
        return look_up(table), *activation_range(bits)
    middle = torch.full((rows,), float(2 ** (bits - 1)))
    zero = edit.weight(f"{plan.site}.activation_zero_table", middle, reader)
    low, high = bounds_around(edit, zero, bits, reader)
    return look_up(table), look_up(low), look_up(high)


def _dynamic_range(
    edit: Rewriter, plan: SitePlan, x: fx.Node, reader: fx.Node, axis: int
) -> tuple[fx.Node, int, int, int, int]:
    """Scales of x itself, least and largest code, axis and size of the groups."""
    low, high = activation_range(plan.activation_bits or 8)
    group, shape = plan.activation_group, list(x.meta["shape"])
    shape[axis] = group_count(shape[axis], group)
    meta: dict[str, Any] = {"shape": tuple(shape), "dtype": "float32", "site": plan.site, "role": "dynamic_scale"}
    return edit.call(reader, ops.dynamic_scale.default, x, high, axis, group, **meta), low, high, axis, group


def _quantise(edit: Rewriter, plan: SitePlan, x: fx.Node, reader: fx.Node, ranges: tuple[Any, ...], role: str) -> None:
    """Puts a quantiser between x and its reader.

    ranges: scale, least and largest code, and then a residual's step, or the axis and the size of groups.
    """
    target = ops.fake_quantize_bounded.default if isinstance(ranges[1], fx.Node) else ops.fake_quantize.default
    target = {4: ops.fake_quantize_residual.default, 5: ops.fake_quantize_grouped.default}.get(len(ranges), target)
    reader.replace_input_with(x, edit.call(reader, target, x, *ranges, like=x, site=plan.site, role=role))


def _weight_range(edit: Rewriter, plan: SitePlan, weight: fx.Node, layer: fx.Node) -> tuple[Any, ...]:
    """Scale, least and largest code of each output channel, and where it has one the step of its binary code."""
    value, bits = edit.program.state[str(weight.target)], plan.weight_code_bits
    low, high = weight_range(bits)
    if plan.weight_group:
        scale = reach_scale(value, high, plan.weight_group)
        return edit.weight(f"{plan.site}.weight_scale", scale, layer), low, high, 1, plan.weight_group
    if plan.weight_symmetric:
        return edit.weight(f"{plan.site}.weight_scale", _range_scale(value, high), layer), low, high
    scale, zero = spanning_weight_range(value, bits)
    stored = edit.weight(f"{plan.site}.weight_scale", scale, layer)
    kept = edit.weight(f"{plan.site}.weight_zero", zero, layer)
    if not plan.weight_mixed:
        return stored, *bounds_around(edit, kept, bits, layer)
    top = edit.weight(f"{plan.site}.weight_top", torch.full_like(zero, asymmetric_top(bits)), layer)
    ranges = (stored, *_bounds_below(edit, kept, top, layer))
    return (*ranges, _residual_step(edit, plan, zero, layer)) if plan.weight_residual else ranges


def _residual_step(edit: Rewriter, plan: SitePlan, like: Tensor, before: fx.Node) -> fx.Node:
    """α of the salient channels, 0 of the others; no channel is until `mix_channel_bits` has chosen."""
    step = edit.weight(f"{plan.site}.weight_residual_scale", torch.ones_like(like), before)
    salient = edit.weight(f"{plan.site}.weight_salient", torch.zeros_like(like), before)
    return edit.call(before, aten.mul.Tensor, step, salient, like=step)


def bounds_around(edit: Rewriter, zero: fx.Node, bits: int, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """-z and 2ⁿ-1-z of a zero point, whole and in 0…2ⁿ-1."""
    top = asymmetric_top(bits)
    inside = edit.call(before, aten.clamp.default, zero, 0, top, like=zero)
    whole = edit.call(before, ops.round_ste.default, inside, like=zero)
    low = edit.call(before, aten.neg.default, whole, like=zero)
    return low, edit.call(before, aten.rsub.Scalar, whole, top, like=zero)


def _bounds_below(edit: Rewriter, zero: fx.Node, top: fx.Node, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """-z and t - z of a zero point, whole and in 0…t, with a top t for each channel."""
    positive = edit.call(before, aten.clamp.default, zero, 0, like=zero)
    inside = edit.call(before, aten.minimum.default, positive, top, like=zero)
    whole = edit.call(before, ops.round_ste.default, inside, like=zero)
    low = edit.call(before, aten.neg.default, whole, like=zero)
    return low, edit.call(before, aten.sub.Tensor, top, whole, like=zero)


def residual_step_of(program: Program, quantiser: fx.Node) -> Tensor:
    """α [O] of a weight's `fake_quantize_residual`: the stored one of salient channels, 0 of the others."""
    scale, salient = (program.state[str(one.target)] for one in quantiser.args[4].args)  # type: ignore[union-attr]
    return scale * salient


def weight_top(plan: SitePlan, state: Mapping[str, Tensor]) -> Tensor:
    """2ⁿ - 1 of a weight's asymmetric codes: one number, or one a channel [O] where bits are mixed."""
    if plan.weight_mixed:
        return state[f"{plan.site}.weight_top"]
    return torch.tensor(float(asymmetric_top(plan.weight_bits or 8)))


def spanning_weight_range(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`spanning_range` of 2ⁿ codes for every output channel."""
    return spanning_range(weight, torch.tensor(float(asymmetric_top(bits))))


@torch.no_grad()
def spanning_range(weight: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point per output channel [O] whose t + 1 codes span the channel's values and 0.

    s = (max(W_o, 0) - min(W_o, 0))/t, z = round(-min(W_o, 0)/s); t a number or [O]. An all-zero channel gets scale 1.
    """
    if not weight.numel():
        return weight.new_ones(len(weight)), weight.new_zeros(len(weight))
    flat = weight.flatten(1).to(torch.float32)
    least, largest = flat.amin(1).clamp_max(0), flat.amax(1).clamp_min(0)
    span = largest - least
    scale = torch.where(span > 0, span / top, torch.ones_like(span))
    return scale, torch.minimum((-least / scale).round().clamp_min(0), top)


@torch.no_grad()
def reach_scale(weight: Tensor, top: int, group: int) -> Tensor:
    """max|W|/top of every group of input channels [O, G, …]; 1 for a group of zeros, which it represents exactly."""
    reach = by_group(weight.abs().to(torch.float32), 1, group).amax(2)
    return torch.where(reach > 0, reach / top, torch.ones_like(reach))


@torch.no_grad()
def _range_scale(weight: Tensor, qmax: int) -> Tensor:
    """max|W_o|/qmax [O]; 1 for a channel of zeros, which it represents exactly."""
    absmax = weight.flatten(1).abs().amax(1).to(torch.float32) if weight.numel() else weight.new_zeros(len(weight))
    return torch.where(absmax > 0, absmax / qmax, torch.ones_like(absmax))
