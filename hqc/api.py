"""The Python API, in the shape that users of quantisation tools know: program in, program out.

    program = hqc.trace("digits")
    student = hqc.ptq(program, "rtn", "w4a4")                            # training-free
    student = hqc.qat(program, "hq-dm", "w4a4", work_dir="run")          # distillation, resumable
    report = hqc.export_program(student, "onnxruntime", "digits-w4a4")
    pipe.unet = hqc.load("digits-w4a4").as_unet()

    task = hqc.task_of(program, prompts=["a cat", "a dog"])              # what to calibrate and train on
    student = hqc.ptq(program, "rtn", "w4a4", task=task)

`forward_loop(unet)` may replace the built-in calibration: it runs a pipeline whose `.unet` is the object it is given.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqc.calibration import calibrate
from hqc.capture import ARCHITECTURE
from hqc.claims import claimed
from hqc.errors import ArtefactError, PlanError, TrainingError
from hqc.memory import activation_bytes, require_memory, return_free_memory, training_bytes
from hqc.models import digits_path
from hqc.paths import StrPath
from hqc.pipeline import run_pipeline
from hqc.program import InputSpec, Program
from hqc.recipes import Recipe, TrainingSettings, find_recipe
from hqc.runtimes import as_unet
from hqc.runtimes.base import named_inputs
from hqc.runtimes.model import Model
from hqc.runtimes.text_encoder import load_text_pipeline
from hqc.runtimes.torch_runtime import TorchSession
from hqc.sampling import Task, pipeline_task, synthetic_task
from hqc.sampling.prompts import prompt_task, require_prompt_inputs
from hqc.sampling.task import Denoise, denoiser, trajectory
from hqc.stages import doing
from hqc.training import StepRecord, distil
from hqc.training.run import Run, run_settings

__all__ = ["ForwardLoop", "configure", "finish_run", "ptq", "qat", "quantise", "task_of"]

ForwardLoop = Callable[[nn.Module], Any]


def configure(
    recipe: str | Recipe,
    *,
    block: int | None = None,
    rules: str | None = None,
    training: TrainingSettings | None = None,
) -> Recipe:
    """A recipe with some of its options replaced; `block` 0 turns the rotation off.

    Raises:
        PlanError: if the recipe is unknown.
    """
    found = find_recipe(recipe) if isinstance(recipe, str) else recipe
    wanted = {"block": block, "rules": rules, "training": training}
    return found.model_copy(update={key: value for key, value in wanted.items() if value is not None})


def task_of(
    program: Program,
    pipeline: Any | None = None,
    *,
    folder: StrPath | None = None,
    synthetic: bool = False,
    prompts: Sequence[str] = (),
    guidance_scale: float | None = None,
) -> Task:
    """What to sample while calibrating and training `program`: from the pipeline, or from the one it was traced from.

    folder: the pipeline folder beside the program, instead of the one that its origin names.
    synthetic: noise and random conditions instead, for any denoiser; always so for a named architecture, which has
    seeded weights and no pipeline. prompts: conditions from the pipeline's own text encoder, which is loaded for it
    and freed. guidance_scale: with prompts, of a denoiser that takes it as an input (Flux, latent consistency models);
    None takes the pipeline's own default.

    Raises:
        TrainingError: if there is none, or both prompts and synthetic are given.
    """
    folder = None if folder is None else Path(folder)
    if prompts and synthetic:
        raise TrainingError("--prompts", "and --synthetic exclude each other", "Give one of them.")
    if prompts:
        return _prompt_task(program, pipeline, folder, prompts, guidance_scale)
    if pipeline is None and (synthetic or program.origin.source.startswith(ARCHITECTURE)):
        return synthetic_task(program)
    if pipeline is None:
        pipeline = _pipeline_around(program, folder)
    if pipeline is None:
        raise _without_pipeline(
            program,
            "Give --synthetic for noise and random conditions, or task=Task(...) or forward_loop=… from Python.",
        )
    return pipeline_task(pipeline, program)


def _prompt_task(
    program: Program, pipeline: Any | None, folder: Path | None, prompts: Sequence[str], guidance_scale: float | None
) -> Task:
    require_prompt_inputs(program)
    if pipeline is not None:
        return prompt_task(pipeline, program, prompts, guidance_scale=guidance_scale)
    found = _folder_around(program, folder)
    if found is None:
        raise _without_pipeline(program, "Give --synthetic instead of --prompts, or trace the whole pipeline.")
    task = prompt_task(load_text_pipeline(found), program, prompts, guidance_scale=guidance_scale)
    return_free_memory()
    return task


def _without_pipeline(program: Program, do: str) -> TrainingError:
    source = program.origin.source or "a module"
    return TrainingError(f"program from {source}", "was not traced from a pipeline, so hqc cannot sample it", do)


def _folder_around(program: Program, folder: Path | None) -> Path | None:
    """The folder of the pipeline that a program was traced from, if it is still there."""
    reference = program.origin.pipeline
    if folder is None:
        folder = digits_path() if reference == "digits" else Path(reference)
    return folder if (reference or folder.name) and (folder / "model_index.json").is_file() else None


def _pipeline_around(program: Program, folder: Path | None) -> Any | None:
    """The pipeline that a program was traced from, if it is still there."""
    found = _folder_around(program, folder)
    if found is None:
        return None
    config, size = program.origin.unet_config, program.size_bytes()
    return Model(program.origin.pipeline, "torch", TorchSession(program), program.plan, size, config, found).pipeline()


def quantise(
    program: Program,
    recipe: Recipe,
    bits: str,
    *,
    task: Task | None = None,
    forward_loop: ForwardLoop | None = None,
    keep_float: Sequence[str] = (),
) -> Program:
    """Runs a recipe's passes and calibrates: the training-free part of every method.

    The grid of the scale tables is the sampler's timesteps, or with a forward loop the timesteps that it visits.

    Raises:
        PlanError: bits or rules make no sense. TrainingError: calibration met NaN, or nothing to sample.
    """
    if forward_loop is None:
        task = task or task_of(program)
        _require_calibration_memory(program, recipe, guided=task.doubles(recipe.training.guidance_scale))
        grid = task.timesteps(recipe.training.num_inference_steps)
        run = _sampler_loop(task, recipe)
    else:
        run = _user_loop(forward_loop, program)
        grid = _visited(program, run)
    with doing("rewriting the graph, choosing weight scales"):
        quantised = run_pipeline(program, recipe.passes(bits, grid, tuple(keep_float)))
    quantised = quantised.evolve(plan=replace(quantised.plan, recipe=recipe.name))
    return calibrate(quantised, run, candidates=recipe.calibration.candidates)


def _require_calibration_memory(program: Program, recipe: Recipe, *, guided: bool) -> None:
    """All calibration images are one batch, twice as large with guidance; the quantised program is a second copy."""
    batch = recipe.calibration.samples * (2 if guided else 1)
    require_memory(
        f"calibrating on {recipe.calibration.samples} images",
        program.size_bytes() + activation_bytes(program.graph, batch),
        "Take fewer calibration images (--calib-size), close other programs, or take a larger machine",
    )


def _require_training_memory(program: Program, recipe: Recipe, *, guided: bool) -> None:
    """A step runs a batch, twice as large with guidance, and keeps what the backward pass needs."""
    batch = recipe.training.batch_size
    require_memory(
        f"training on batches of {batch}",
        program.size_bytes() + training_bytes(program, batch * (2 if guided else 1)),
        "Take a smaller --batch-size, close other programs, or take a larger machine",
    )


def _sampler_loop(task: Task, recipe: Recipe) -> Callable[[Denoise], None]:
    sampler, calibration = recipe.training, recipe.calibration

    def run(denoise: Denoise) -> None:
        options = (sampler.num_inference_steps, sampler.guidance_scale, sampler.eta, calibration.seed)
        steps = len(task.scheduler(sampler.num_inference_steps).timesteps)
        with doing("calibrating") as stage:
            for step, _ in enumerate(trajectory(task, denoise, calibration.samples, *options)):
                stage(step, steps)

    return run


def _user_loop(forward_loop: ForwardLoop, program: Program) -> Callable[[Denoise], None]:
    def run(denoise: Denoise) -> None:
        forward_loop(as_unet(_Observed(program.inputs, denoise), program.origin.unet_config))

    return run


@dataclass(frozen=True)
class _Observed:
    """The model of a forward loop: what it is called on goes to `denoise`."""

    inputs: tuple[InputSpec, ...]
    denoise: Denoise
    name: str = "calibration"

    def __call__(
        self, sample: Tensor, timestep: Tensor | float, *conditions: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        given = named_inputs(self.inputs, sample, timestep, *conditions, **named)
        return self.denoise(*given.values())


def _visited(program: Program, run: Callable[[Denoise], None]) -> tuple[float, ...]:
    """The timesteps that a forward loop visits, found by running it once on the float program."""
    denoise, seen = denoiser(program.module()), set[float]()

    @torch.no_grad()
    def record(sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        seen.update(timestep.tolist())
        return denoise(sample, timestep, *conditions)

    run(record)
    if not seen:
        raise TrainingError("calibration", "the forward loop never called the model", "Call the unet it is given.")
    return tuple(sorted(seen))


def ptq(
    program: Program,
    recipe: str | Recipe = "rtn",
    bits: str = "w4a4",
    *,
    hadamard: bool = False,
    block: int = 32,
    forward_loop: ForwardLoop | None = None,
    task: Task | None = None,
    keep_float: Sequence[str] = (),
) -> Program:
    """Quantises without training: MSE weight scales, per-timestep activation scales along the float trajectory.

    `hadamard` inserts the rotation (of order `block`) before the quantisers.

    Raises:
        PlanError, TrainingError: see `quantise`.
    """
    found = configure(recipe)
    if found.trains:
        raise PlanError(f"recipe {found.name!r}", "needs training", "Use hqc qat, or --recipe rtn here.")
    if hadamard:
        found = configure(found, block=block)
    return quantise(program, found, bits, task=task, forward_loop=forward_loop, keep_float=keep_float)


def qat(
    program: Program,
    recipe: str | Recipe = "hq-dm",
    bits: str = "w4a4",
    *,
    forward_loop: ForwardLoop | None = None,
    task: Task | None = None,
    settings: TrainingSettings | None = None,
    keep_float: Sequence[str] = (),
    work_dir: StrPath | None = None,
    resume: bool = False,
    restart: bool = False,
    on_start: Callable[[Program, int], None] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> Program:
    """Quantises and trains by distillation from `program`; with a work folder it can be killed and resumed.

    work_dir: keeps the calibrated program, a JSON-lines log and the last checkpoint; no other run may use it meanwhile.
    resume: continue there, to the same bits as an uninterrupted run, without calibrating again. restart: begin anew,
    and drop the unfinished run that is there. on_start(quantised, first step), on_step(record).

    Raises:
        PlanError, TrainingError: see `quantise`. ArtefactError: nothing to resume, or a run with other settings; with
        neither resume nor restart, an unfinished run.
    """
    found = configure(recipe, training=settings)
    if not found.trains:
        raise PlanError(f"recipe {found.name!r}", "does not train", "Use hqc ptq for it, or --recipe hq-dm here.")
    if resume and restart:
        raise ArtefactError("--resume", "and --restart exclude each other", "Give one of them.")
    if resume and work_dir is None:
        raise ArtefactError("resume", "no work folder was given", "Give the work folder of the run to continue.")
    run = Run(Path(work_dir)) if work_dir is not None else None
    with claimed(run.folder, stays=True) if run is not None else nullcontext():
        if run is not None and not resume:
            run.check_new(restart=restart)
        task = task or task_of(program)
        settings_used = run_settings(program, found, bits, keep_float, task)
        checkpoint = None
        if run is not None and resume:
            student, checkpoint = run.load(settings_used)
        else:
            _require_training_memory(program, found, guided=task.doubles(found.training.guidance_scale))
            student = quantise(program, found, bits, task=task, forward_loop=forward_loop, keep_float=keep_float)
            student = student.evolve(plan=replace(student.plan, training=settings_used))
            if run is not None:
                run.begin(student)
        if on_start is not None:
            on_start(student, checkpoint.step if checkpoint else 0)

        def record(step: StepRecord) -> None:
            if run is not None:
                run.log(step)
            if on_step is not None:
                on_step(step)

        return distil(
            student,
            program,
            task,
            found.training,
            resume=checkpoint,
            on_step=record,
            on_checkpoint=run.save if run is not None else None,
        )


def finish_run(folder: StrPath) -> None:
    """Drops the calibrated program and the checkpoint of a run whose result is saved; the log stays.

    Raises:
        ArtefactError: if another command uses the folder.
    """
    folder = Path(folder)
    with claimed(folder, stays=True):
        Run(folder).finish()
