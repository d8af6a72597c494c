"""How much each site alone costs: the output's error when only that site is quantised.

    sensitivity(site) = ‖f_site(x) - f(x)‖ / ‖f(x)‖,  f the float denoiser, x fixed inputs at a few timesteps

f_site quantises the activation and the weight of one site, with its rotation where the plan has one. The float graph
runs once; at every site the run forks: the quantised output takes the float one's place and only the nodes behind the
site run again.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hqc.evaluation.stepping import Run, float_program
from hqc.export.reference import evaluate
from hqc.program import Program
from hqc.sites import quantised_sites

__all__ = ["Sensitivity", "SensitivityProbe"]


@dataclass(frozen=True)
class Sensitivity:
    """One site quantised alone: the relative error over all fixed inputs, and over those of each timestep."""

    site: str
    error: float
    by_timestep: tuple[tuple[float, float], ...]


class SensitivityProbe:
    """The float run, timed, that tells what measuring every site will take.

    only: the sites to measure; None measures all that are quantised.
    """

    def __init__(
        self, program: Program, planned: Program, args: Sequence[Tensor], only: Collection[str] | None = None
    ) -> None:
        self.planned, self.args = planned, tuple(args)
        self.run = Run(float_program(program))
        sites = {site.site: site for site in quantised_sites(planned)}
        self.sites = sites if only is None else {name: sites[name] for name in sites if name in only}
        self.names = [spec.name for spec in program.inputs]
        values, started, at = self.run.start(self.args), time.perf_counter(), {}
        for _, node in self.run.steps(values):
            if node.meta.get("role") == "layer" and node.meta["site"] in self.sites:
                at[node.meta["site"]] = time.perf_counter() - started
        self.wanted: Tensor = values[self.run.nodes[-1]]
        whole = time.perf_counter() - started
        self.estimated_seconds = whole + sum(whole - t for t in at.values())

    @torch.no_grad()
    def all_sites_error(self) -> float:
        """The relative error with every site quantised at once: what the sites' own errors add up to."""
        run = Run(self.planned)
        return _relative(run.finish(run.start(self.args)), self.wanted)

    @torch.no_grad()
    def measure(
        self,
        progress: Callable[[int, str], None] = lambda done, site: None,
        on_site: Callable[[Sensitivity], None] = lambda found: None,
    ) -> tuple[Sensitivity, ...]:
        """Every site that is asked for, in graph order. on_site: hears of each once it is measured."""
        inputs = (node for node in self.planned.graph.nodes if node.op == "placeholder")
        known = dict(zip(inputs, self.args, strict=True))
        times = self.args[self.names.index("timestep")]
        values, found = self.run.start(self.args), []
        for number, node in self.run.steps(values):
            site = self.sites.get(node.meta["site"]) if node.meta.get("role") == "layer" else None
            if site is None:
                continue
            x = values[node.args[0]]  # type: ignore[index]
            quantised = evaluate(self.planned, site.layer, {**known, site.x: x})
            fork = {**values, node: quantised}
            output = self.run.finish(fork, number + 1)
            rows = [(t, times == t) for t in sorted(set(times.tolist()))]
            by_timestep = tuple((t, _relative(output[row], self.wanted[row])) for t, row in rows)
            found.append(Sensitivity(site.site, _relative(output, self.wanted), by_timestep))
            on_site(found[-1])
            progress(len(found), site.site)
        return tuple(found)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
