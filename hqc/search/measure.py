"""How much the output errs: with one site alone at some bits, and with all sites at once.

    error = ‖f̂(x) - f(x)‖ / ‖f(x)‖,  f the float denoiser, x inputs along its trajectory, f̂ calibrated by the recipe

Errors of single sites add up as squares, as far as they are independent: error(plan)² ≈ Σ_s error_s(bits of s)².
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from hqc.evaluation.inputs import Sampler as Trajectory
from hqc.evaluation.inputs import trajectory_inputs
from hqc.evaluation.sensitivity import Sensitivity, SensitivityProbe
from hqc.evaluation.workspace import fingerprint
from hqc.memory import require_call_memory
from hqc.program import Program
from hqc.recipes import Recipe
from hqc.recipes.plan_file import USUAL_BITS
from hqc.recipes.run import Request, run_recipe, run_settings
from hqc.sampling import Task, Work
from hqc.search.journal import Journal
from hqc.site_rules import SiteRule, rule_to_data

__all__ = ["Measure"]

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Measure:
    """Quantises by a recipe and measures, unless the journal has it.

    samples: images of the float trajectory at each of so many `timesteps`. seed: of their noise and conditions.
    """

    program: Program
    recipe: Recipe
    task: Task
    keep_float: tuple[str, ...]
    samples: int
    timesteps: int
    seed: int
    journal: Journal

    def check(self) -> None:
        """Refuses inputs that do not fit the memory, and a recipe whose calibration does not.

        Raises:
            MemoryShortError: with the numbers.
        """
        rows = self.samples * max(self.timesteps, 2 if self.task.doubles(self._trajectory.guidance_scale) else 1)
        what = f"measuring on {self.samples} images at {self.timesteps} timesteps"
        require_call_memory(what, self.program, rows, "Take fewer (--samples, --timesteps)")

    def request(self, bits: str, rules: Sequence[SiteRule] = ()) -> Request:
        """What the recipe is asked for."""
        grid = self.task.timesteps(self.recipe.sampler.num_inference_steps)
        return Request(bits, self.keep_float, grid, tuple(rules))

    def sites(self, bits: str, sites: Sequence[str], progress: Progress) -> dict[str, float]:
        """The error of each of the sites, quantised alone at these bits. progress: is told how many are known."""
        request = self.request(bits)
        key = self.key(request)
        known = {site: found for site in sites if (found := self.journal.get(key, site)) is not None}
        progress(len(known), bits)
        if left := [site for site in sites if site not in known]:
            probe = SensitivityProbe(self.program, self.calibrated(request), self.inputs, left)

            def hear(found: Sensitivity) -> None:
                known[found.site] = self.journal.add(key, found.error, found.site)
                progress(len(known), f"{bits} {found.site}")

            probe.measure(on_site=hear)
        return {site: known[site] for site in sites}

    def plan(self, bits: str, rules: Sequence[SiteRule] = ()) -> float:
        """The error with every site quantised at once."""
        request = self.request(bits, rules)
        key = self.key(request)
        known = self.journal.get(key)
        if known is not None:
            return known
        probe = SensitivityProbe(self.program, self.calibrated(request), self.inputs, ())
        return self.journal.add(key, probe.all_sites_error())

    def calibrated(self, request: Request) -> Program:
        """What the recipe makes of the program."""
        recipe = self.recipe.following(request.rules)
        return run_recipe(self.program, recipe, request, Work(self.program, self.task, recipe.sampler))

    def key(self, request: Request) -> str:
        """Of all that decides an error besides the site."""
        asked = {"bits": request.bits, "plan": [rule_to_data(rule) for rule in request.rules]}
        inputs = {**asdict(self._trajectory), "timesteps": self.timesteps}
        return fingerprint("error", {"settings": {**self._settings, **asked}, "inputs": inputs}, measures=True)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What decides every error besides bits and rules; made once, for it reads all weights."""
        return run_settings(self.program, self.recipe, self.request(USUAL_BITS), self.task.drawn_from)

    @property
    def _trajectory(self) -> Trajectory:
        sampler = self.recipe.sampler
        options = (sampler.num_inference_steps, sampler.guidance_scale, sampler.eta)
        return Trajectory(self.samples, self.samples, *options, self.seed)

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the denoisers are run on."""
        return trajectory_inputs(self.program, self.task, self._trajectory, self.timesteps)
