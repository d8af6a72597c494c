"""Running a recipe: every step in order, recorded; with a work folder it can be killed and goes on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from typing_extensions import TypeIs

from hqc.bits import parse_bits
from hqc.calibration import ChooseRotation
from hqc.calibration.rotations import free_sites
from hqc.errors import PassError
from hqc.pipeline import Procedure, Step, run_pass, run_procedure
from hqc.plan import QuantPlan
from hqc.program import Program, Stage
from hqc.recipes.recipe import Recipe
from hqc.recipes.work_folder import Run
from hqc.sampling import Work
from hqc.site_rules import SiteRule, rule_to_data
from hqc.stages import doing
from hqc.steps import flat_options, step_name

__all__ = ["Request", "begin", "is_procedure", "planned", "run_recipe", "run_settings"]


@dataclass(frozen=True)
class Request:
    """What a run is asked for besides the recipe: bits, layers to keep float, the grid of the scale tables.

    rules: of a plan file, for single sites.
    """

    bits: str
    keep_float: tuple[str, ...] = ()
    timesteps: tuple[float, ...] = ()
    rules: tuple[SiteRule, ...] = ()


def run_settings(
    program: Program, recipe: Recipe, request: Request, conditions: str, processes: int = 1
) -> dict[str, Any]:
    """Everything that decides a run's result, as JSON data. conditions: what they are drawn from."""
    rules = [rule_to_data(rule) for rule in request.rules]
    return {
        "recipe": recipe.name,
        "steps": flat_options(recipe.steps),
        "sampler": recipe.sampler.settings(),
        "bits": str(parse_bits(request.bits)),
        "keep_float": list(request.keep_float),
        "weights_sha256": _weights_digest(program),
        "threads": torch.get_num_threads(),
        "conditions": conditions,
        **({"plan": rules} if rules else {}),
        **({"processes": processes} if processes > 1 else {}),
    }


def _weights_digest(program: Program) -> str:
    digest = hashlib.sha256()
    for name in sorted(program.state):
        digest.update(name.encode())
        digest.update(program.state[name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def begin(program: Program, recipe: Recipe, request: Request, settings: Mapping[str, Any] | None = None) -> Program:
    """The captured program with what is asked for in its plan.

    Raises:
        PlanError: bits that make no sense. PassError: a program that is quantised already.
    """
    if program.stage != Stage.CAPTURED:
        raise PassError(
            f"recipe {recipe.name!r}",
            f"takes a program that is captured; this one is {program.stage}",
            "Give hqc trace's.",
        )
    if attached := program.attached_styles:
        raise PassError(
            f"recipe {recipe.name!r}",
            f"takes a program without inputs of LoRAs; this one has {attached[0]} attached",
            "Quantise the program from before, and attach the LoRA to the result.",
        )
    bits = str(parse_bits(request.bits))
    plan = QuantPlan(recipe.name, bits, (), request.timesteps, request.keep_float, dict(settings or {}), request.rules)
    return program.evolve(plan=plan)


def is_procedure(step: Step) -> TypeIs[Procedure]:
    """Whether a step needs more than the program."""
    return hasattr(step, "run")


def planned(program: Program, recipe: Recipe, request: Request, *, calibrated: bool = True) -> Program:
    """What the recipe plans: its passes, and if `calibrated` those procedures that need no samples."""
    current = begin(program, recipe, request)
    for step in recipe.steps:
        if not is_procedure(step):
            current = run_pass(current, step)
        elif (calibrated and not step.samples_denoiser) or _has_nothing_to_sample(step, current):
            current = run_procedure(current, step, Work(program))
    return current


def _has_nothing_to_sample(step: Procedure, program: Program) -> bool:
    """Whether all that a step would measure has been decided by a plan."""
    return isinstance(step, ChooseRotation) and not free_sites(program)


def run_recipe(
    program: Program,
    recipe: Recipe,
    request: Request,
    work: Work,
    *,
    settings: Mapping[str, Any] | None = None,
    run: Run | None = None,
    resume: bool = False,
) -> Program:
    """Runs a recipe on a captured program.

    settings: goes into the plan, and tells one run in a work folder from another. resume: goes on in the folder of
    `run`, to the same bits as a run that was never killed.

    Raises:
        PlanError, PassError: bits, layers or a program that the recipe does not take. TrainingError: calibration or
        training met what they cannot go on with. MemoryShortError: said before anything runs. ArtefactError: nothing to
        resume, or a run with other settings.
    """
    current = begin(program, recipe, request, settings)
    _check(current, recipe.steps, work)
    done, checkpoint = 0, None
    if run is not None and resume:
        done, saved, checkpoint = work.processes.in_turn(lambda: run.load(settings or {}))
        current = saved or current
    elif run is not None:
        run.begin(settings or {})
    unquantised = _unquantised(begin(program, recipe, request), recipe.steps[:done])
    for number, step in enumerate(recipe.steps, 1):
        if number > done:
            own = checkpoint if checkpoint is not None and checkpoint.of == number else None
            before, around = current, replace(work, checkpoint=own, unquantised=unquantised)
            current = _one(current, step, number, around, run)
            unquantised = _behind(unquantised, step, before, current)
    return current


def _behind(unquantised: Program, step: Step, before: Program, after: Program) -> Program:
    """`unquantised` after a step that made `after` of `before`.

    Procedures leave it alone, so that a run that goes on has the same one as a run that was never killed.
    """
    if unquantised is before and not is_procedure(step) and step.preserves == "numerics":
        return after
    return _unquantised(unquantised, [step])


def _unquantised(program: Program, steps: Sequence[Step]) -> Program:
    """The captured program after those of the steps that rewrite it and keep its numbers."""
    for step in steps:
        if not is_procedure(step) and step.preserves == "numerics" and program.stage in step.takes:
            program = run_pass(program, step)
    return program


def _check(program: Program, steps: Sequence[Step], work: Work) -> None:
    for step in reversed(steps):  # the last need the most
        if is_procedure(step):
            step.check(program, work)


def _one(program: Program, step: Step, number: int, work: Work, run: Run | None) -> Program:
    name = step_name(type(step))
    if not is_procedure(step):
        with doing(f"rewriting the graph: {name}"):
            return run_pass(program, step)
    if run is not None:
        run.at(number)
        work = replace(work, on_checkpoint=run.save)
    with doing(name.replace("_", " ")):
        result = run_procedure(program, step, work)
    if run is not None and step.samples_denoiser:  # the others are quicker to run again
        run.keep(result, name)
    return result
