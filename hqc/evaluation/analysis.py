"""What quantisation meets at every site: outliers, scales and signal to noise along the float sampler's trajectory.

Observers run over the float graph while a sampler calls it. Moments are summed over every value; the scale search runs
on a bounded sample of whole channel vectors, for one timestep at a time, so no activation outlives its reader.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from hqc.bits import Bits, activation_range, parse_bits, weight_range
from hqc.bounds import Bounds
from hqc.calibration import mse_weight_scale
from hqc.errors import EvaluationError, TrainingError
from hqc.evaluation.analysis_statistics import Moments, best_scale, channel_rows, sample_rows, snr_db
from hqc.evaluation.inputs import FixedInputs, Sampler, sample_in_step, unbatched
from hqc.evaluation.stepping import Run, float_program
from hqc.export.reference import evaluate
from hqc.ops.hadamard import hadamard
from hqc.passes.insert_qdq import GRID
from hqc.passes.rewriting import channel_axis
from hqc.plan import SitePlan
from hqc.program import Program, Stage
from hqc.rotations import Rotation, block_size
from hqc.sampling.task import Task
from hqc.sites import QuantisedSite, quantised_sites

__all__ = ["Basis", "SiteAnalysis", "SiteRow", "WeightNumbers", "analyse", "with_scales"]

SAMPLED_VALUES = 16_384
"""Values of a site and timestep that the scale search sees."""


@dataclass(frozen=True)
class Basis:
    """The activation in one basis: outliers, and what the best scale gives at the site's bits."""

    max_over_rms: float | None
    kurtosis: float | None
    scale: float
    snr_db: float | None


@dataclass(frozen=True)
class SiteRow:
    """One site at one timestep; `rotated` is None where no Hadamard block divides the channels.

    `program_scale` and `program_snr_db` belong to the program's own scale table, None for a captured program; a dynamic
    range has no scale to be shown.
    """

    timestep: float
    values: int
    max_abs: float
    rms: float
    plain: Basis
    rotated: Basis | None
    program_scale: float | None = None
    program_snr_db: float | None = None


@dataclass(frozen=True)
class WeightNumbers:
    """The weight of a site (with its LoRA), and its SNR with a scale per output channel."""

    max_over_rms: float | None
    kurtosis: float | None
    snr_db: float | None


@dataclass(frozen=True)
class SiteAnalysis:
    """One site: its plan, the bits and the rotation that the numbers are for, its weight, a row per timestep.

    `bits` are the plan's, or for a site that stays float the bits asked for; `block` is the plan's rotation, or for
    an unrotated site the one that would fit.
    """

    plan: SitePlan
    bits: Bits
    block: int
    weight: WeightNumbers
    rows: tuple[SiteRow, ...]

    @property
    def rotation(self) -> Rotation | None:
        """What `block` stands for: the plan's rotation, or Sylvester's where there is none."""
        return self.plan.hadamard or (Rotation(self.block) if self.block else None)

    def median(self, number: Callable[[SiteRow], float | None]) -> float | None:
        """The median of a number over the timesteps at which it is defined."""
        found = [value for row in self.rows if (value := number(row)) is not None]
        return median(found) if found else None


def analyse(
    program: Program,
    planned: Program,
    task: Task,
    sampler: Sampler,
    *,
    inputs: FixedInputs | None = None,
    block: int = 32,
    candidates: int = 60,
    progress: Callable[[int], None] = lambda calls: None,
) -> tuple[SiteAnalysis, ...]:
    """Observes every site of a program that the plan names along its float trajectory.

    Args:
        program: captured, quantised or trained.
        planned: the program itself if it is quantised, else what the recipe's passes make of it.
        task: what is sampled. sampler: how.
        inputs: takes calls along the way, for the sensitivity.
        block: the Hadamard order to try at sites that the plan does not rotate.
        candidates: of the scale search, as in calibration.
        progress: is told the number of denoiser calls so far.

    Raises:
        EvaluationError: if the program is integer. TrainingError: for NaN or infinity, naming site and timestep.
    """
    if program.stage == Stage.INTEGER:
        raise EvaluationError("program", "is integer: its float weights are gone", "Give the program it came from.")
    if any(plan.weight_only for plan in program.plan.sites):
        found = "has weights of tables beside float activations: there is no range to measure, nor its float weights"
        raise EvaluationError("program", found, "Give the captured program.")
    watched = dict(_watched(program, planned, block))
    grid = planned.state.get(GRID, torch.zeros(1))
    observer = _Observer(watched, grid, Run(float_program(program)), candidates, inputs, progress)
    sample_in_step(task, observer, sampler)
    return observer.finish()


@dataclass
class _Seen:
    """One site at the timestep under way: moments in both bases, and rows [k, C] of the sample."""

    plain: Moments = field(default_factory=Moments)
    rotated: Moments = field(default_factory=Moments)
    rows: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Watched:
    """What the observer knows of a site before it runs. group: of channels with a dynamic scale, 0 for tables."""

    plan: SitePlan
    bits: Bits
    rotation: Rotation | None
    axis: int
    table: Tensor | None
    bounds: Bounds | None
    weight: WeightNumbers
    group: int = 0


@dataclass
class _Observer:
    """The denoiser of a trajectory: the float graph, watched."""

    watched: Mapping[str, _Watched]
    grid: Tensor
    run: Run
    candidates: int
    inputs: FixedInputs | None
    progress: Callable[[int], None]
    rows: dict[str, dict[float, SiteRow]] = field(default_factory=dict)
    seen: dict[str, _Seen] = field(default_factory=dict)
    timestep: float = math.nan
    calls: int = 0

    def __call__(self, sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        now = float(timestep.reshape(-1)[0])
        if now != self.timestep:
            self._flush()
            self.timestep = now
        args = tuple(a for a in (sample, timestep, *conditions) if a is not None)
        if self.inputs is not None:
            self.inputs.note(now, args, unbatched(self.run.program))
        values = self.run.start(args)
        moments: _Shared = {}
        for _, node in self.run.steps(values):
            if node.meta.get("role") == "layer" and node.meta["site"] in self.watched:
                self._observe(node, values[node.args[0]], moments)  # type: ignore[index]
        self.calls += 1
        self.progress(self.calls)
        return values[self.run.nodes[-1]]  # type: ignore[no-any-return]

    def _observe(self, layer: fx.Node, x: Tensor, moments: "_Shared") -> None:
        """Sites that read one tensor share its moments."""
        site = self.watched[layer.meta["site"]]
        source: fx.Node = layer.args[0]  # type: ignore[assignment]
        seen = self.seen.setdefault(site.plan.site, _Seen())
        if (source, None) not in moments:
            moments[source, None] = Moments.of(x)
        if not math.isfinite(moments[source, None].m4):
            raise TrainingError(
                f"analysis at {site.plan.site}",
                f"met NaN or infinity at timestep {self.timestep:g}",
                "Check the checkpoint and its dtype.",
            )
        if site.rotation and (source, site.rotation) not in moments:
            moments[source, site.rotation] = Moments.of(_rotate(x, site.rotation, site.axis))
        seen.plain = seen.plain.merge(moments[source, None])
        if site.rotation:
            seen.rotated = seen.rotated.merge(moments[source, site.rotation])
        seen.rows.append(sample_rows(channel_rows(x, site.axis), SAMPLED_VALUES).clone())

    def _flush(self) -> None:
        """Turns what was seen at the timestep that ends into rows."""
        for name, seen in self.seen.items():
            # A solver of second order may come back to a timestep: what it sees then is the later one's.
            self.rows.setdefault(name, {})[self.timestep] = self._row(self.watched[name], seen)
        self.seen = {}

    def _row(self, site: _Watched, seen: _Seen) -> SiteRow:
        qmin, qmax = activation_range(site.bits.activation)
        x = torch.cat(seen.rows)
        turned = _rotate(x, site.rotation, -1) if site.rotation else x
        rotated = self._basis(turned, seen.rotated, qmin, qmax) if site.rotation else None
        scale = snr = None
        own = turned if site.plan.block else x
        if site.group:
            snr = snr_db(own, _by_own_scale(own, qmax, site.group))
        if site.table is not None and site.bounds is not None:
            row = int((self.grid - self.timestep).abs().argmin())
            scale = float(site.table[row])
            snr = snr_db(own, _quantised(own, scale, *site.bounds.of_row(row)))
        plain = self._basis(x, seen.plain, qmin, qmax)
        count, top, rms = seen.plain.count, seen.plain.top, seen.plain.rms
        return SiteRow(self.timestep, count, top, rms, plain, rotated, scale, snr)

    def _basis(self, x: Tensor, moments: Moments, qmin: int, qmax: int) -> Basis:
        scale = best_scale(x, moments.top, qmin, qmax, self.candidates)
        snr = snr_db(x, _quantised(x, scale, qmin, qmax))
        return Basis(moments.max_over_rms, moments.kurtosis, scale, snr)

    def finish(self) -> tuple[SiteAnalysis, ...]:
        """Every site in graph order, its rows by ascending timestep."""
        self._flush()
        return tuple(
            SiteAnalysis(w.plan, w.bits, w.rotation.block if w.rotation else 0, w.weight, _by_timestep(rows))
            for w, rows in ((w, self.rows.get(name, {})) for name, w in self.watched.items())
        )


_Shared: TypeAlias = dict[tuple[fx.Node, Rotation | None], Moments]


def _by_timestep(rows: Mapping[float, SiteRow]) -> tuple[SiteRow, ...]:
    return tuple(rows[t] for t in sorted(rows))


def _rotate(x: Tensor, rotation: Rotation, axis: int) -> Tensor:
    return hadamard(x, rotation.block, axis, rotation.regular)  # type: ignore[no-any-return]


def _quantised(x: Tensor, scale: float, qmin: int, qmax: int) -> Tensor:
    return (x / scale).round_().clamp_(qmin, qmax).mul_(scale)


def _watched(program: Program, planned: Program, wanted: int) -> Iterator[tuple[str, _Watched]]:
    asked, quantised = parse_bits(planned.plan.bits), {s.site: s for s in quantised_sites(planned)}
    for site, layer in float_program(program).sites():
        if site not in planned.plan:
            continue  # a pass of the recipe removed it
        plan = planned.plan[site]
        bits = Bits(plan.weight_bits or asked.weight, plan.activation_bits or asked.activation)
        axis = channel_axis(layer)
        channels = int(layer.args[0].meta["shape"][axis])  # type: ignore[union-attr]
        # Grouped convolutions see fewer channels than the tensor has: rotating would mix groups.
        fits = channels == plan.in_channels
        block = block_size(channels, wanted) if fits else 0
        rotation = plan.hadamard or (Rotation(block) if block else None)
        own = program.stage != Stage.CAPTURED and site in quantised
        group = plan.activation_group if own else 0
        table = planned.state[f"{site}.activation_scale_table"] if own and not group else None
        bounds = quantised[site].bounds if own else None
        weight = _weight_numbers(program, planned, quantised.get(site), layer, bits)
        yield site, _Watched(plan, bits, rotation, axis, table, bounds, weight, group)


def _by_own_scale(rows: Tensor, top: int, group: int) -> Tensor:
    """Rows [n, C], each quantised with the scales of its own groups."""
    scale = torch.ops.hqc.dynamic_scale(rows, top, -1, group)
    return torch.ops.hqc.fake_quantize_grouped(rows, scale, -top, top, -1, group)  # type: ignore[no-any-return]


@torch.no_grad()
def _weight_numbers(
    program: Program, planned: Program, site: QuantisedSite | None, layer: fx.Node, bits: Bits
) -> WeightNumbers:
    if site is not None:
        quantiser: fx.Node = site.layer.args[1]  # type: ignore[assignment]
        weight = evaluate(planned, quantiser.args[0], {})  # type: ignore[arg-type]
        found = evaluate(planned, quantiser, {})
    else:
        weight = program.state[str(layer.args[1].target)]  # type: ignore[union-attr]
        low, high = weight_range(bits.weight)
        found = torch.ops.hqc.fake_quantize(weight, mse_weight_scale(weight, low, high), low, high)
    moments = Moments.of(weight)
    return WeightNumbers(moments.max_over_rms, moments.kurtosis, snr_db(weight, found))


def with_scales(planned: Program, sites: Sequence[SiteAnalysis]) -> Program:
    """The planned program with the analysis' best scales in its tables.

    A row of several timesteps takes the largest, which clips at none of them; one of none, that of the nearest.
    """
    state: dict[str, Any] = dict(planned.state)
    members = _members(planned)
    for site in sites:
        name = f"{site.plan.site}.activation_scale_table"
        if name not in state:
            continue
        found: Mapping[float, float] = {
            row.timestep: (row.rotated if site.plan.block and row.rotated else row.plain).scale for row in site.rows
        }
        nearest = [[min(found, key=lambda t, to=time: (abs(t - to), t)) for time in times] for times in members]  # type: ignore[misc]
        state[name] = torch.tensor([max(found[t] for t in times) for times in nearest])
    return planned.evolve(state=state)


def _members(planned: Program) -> list[list[float]]:
    """The plan's timesteps by the row of the scale tables that they read; the row's own where there is none."""
    grid = planned.state.get(GRID, torch.zeros(0))
    found: list[list[float]] = [[] for _ in grid]
    for time in planned.plan.timesteps if len(grid) else ():
        found[int((time - grid).abs().argmin())].append(time)
    return [times or [at] for times, at in zip(found, grid.tolist(), strict=True)]
