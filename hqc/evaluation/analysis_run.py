"""`measure`: from a program to a report, as `hqc analyze` runs it."""

from collections.abc import Callable, Mapping
from typing import Any

from hqc.evaluation.analysis import analyse, with_scales
from hqc.evaluation.analysis_report import Report
from hqc.evaluation.inputs import Sampler, fixed_inputs
from hqc.evaluation.sensitivity import Sensitivity, SensitivityProbe
from hqc.memory import require_call_memory
from hqc.program import Program, Stage
from hqc.recipes import Recipe
from hqc.recipes.run import Request, planned
from hqc.sampling.task import Task

__all__ = ["LONGEST_UNASKED_SECONDS", "SENSITIVITY_TIMESTEPS", "measure", "planned_program"]

LONGEST_UNASKED_SECONDS = 600.0
"""A sensitivity run that is estimated to take longer waits to be asked for."""
SENSITIVITY_TIMESTEPS = 4

Progress = Callable[[int, str], None]
Phase = Callable[[str, int], Any]


def planned_program(
    program: Program, recipe: Recipe, bits: str, timesteps: tuple[float, ...], keep_float: tuple[str, ...] = ()
) -> Program:
    """What the recipe's passes make of a captured program (without LoRA: nothing is trained); others as they are."""
    if program.stage != Stage.CAPTURED:
        return program
    return planned(program, recipe.untrained(), Request(bits, keep_float, timesteps))


def measure(
    program: Program,
    planned: Program,
    task: Task,
    sampler: Sampler,
    measured: Mapping[str, Any],
    *,
    samples: int = 2,
    sensitivity: bool | None = None,
    block: int = 32,
    phase: Phase,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Statistics, then sensitivity.

    sensitivity: None means unless it is estimated to take more than ten minutes. phase(name, total) is a context that
    yields advance(done, note). say: is told estimates.

    Raises:
        MemoryShortError: if the calls do not fit the memory that is free.
    """
    _require_analysis_memory(program, sampler, samples, guided=task.doubles(sampler.guidance_scale))
    inputs = fixed_inputs(task, sampler, samples, SENSITIVITY_TIMESTEPS)
    calls = len(task.timesteps(sampler.num_inference_steps)) * -(-sampler.images // sampler.batch_size)
    with phase("observing", calls) as advance:
        sites = analyse(
            program, planned, task, sampler, inputs=inputs, block=block, progress=lambda done: advance(done, "")
        )
    about = {**measured, "timesteps": [row.timestep for row in sites[0].rows] if sites else []}
    if sensitivity is False:
        return Report(about, sites, sensitivity_note="Not measured (--no-sensitivity).")
    scaled = with_scales(planned, sites) if program.stage == Stage.CAPTURED else planned
    probe = SensitivityProbe(program, scaled, inputs.batch())
    count, estimate = len(probe.sites), _duration(probe.estimated_seconds)
    say(f"sensitivity of {count} sites: about {estimate}")
    if sensitivity is None and probe.estimated_seconds > LONGEST_UNASKED_SECONDS:
        return Report(about, sites, sensitivity_note=f"Not measured: {count} sites take long. Ask with --sensitivity.")
    with phase("sensitivity", count) as advance:
        found: tuple[Sensitivity, ...] = probe.measure(advance)
    note = (
        "Relative error of the denoiser's output when only one site is quantised, weight and activation, on "
        f"{inputs.samples} samples of the float trajectory at each of the timesteps "
        f"{', '.join(f'{t:g}' for t in sorted(inputs.kept))}."
    )
    return Report(about, sites, found, note, probe.all_sites_error())


def _require_analysis_memory(program: Program, sampler: Sampler, samples: int, *, guided: bool) -> None:
    """A call has a batch's rows, twice as many with guidance, or the sensitivity's fixed inputs."""
    batch = min(sampler.batch_size, sampler.images)
    rows = max(batch * (2 if guided else 1), samples * SENSITIVITY_TIMESTEPS)
    require_call_memory(f"analysing on batches of {batch}", program, rows, "Take a smaller --batch-size")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
