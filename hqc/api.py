"""The Python API, in the shape that users of quantisation tools know: program in, program out.

    program = hqc.trace("digits")
    student = hqc.ptq(program, "rtn", "w4a4")                            # training-free
    student = hqc.qat(program, "hq-dm", "w4a4", work_dir="run")          # distillation, resumable
    student = hqc.qat(program, "hq-dm", settings={"distil.epochs": 10})  # with options of a step changed
    student = hqc.ptq(program, "rtn", plan="plan.yaml")                  # with bits of single sites from a plan file
    report = hqc.export_program(student, "onnxruntime", "digits-w4a4")
    pipe.unet = hqc.load("digits-w4a4").as_unet()

    program = hqc.merge_loras(program, ["pixel.safetensors:0.8"])        # a style, before anything is quantised
    student = hqc.attach_loras(student, ["pixel.safetensors"])           # or beside it, its scale an input

    task = hqc.task_of(program, prompts=["a cat", "a dog"])              # what to calibrate and train on
    student = hqc.ptq(program, "rtn", "w4a4", task=task)

`forward_loop(unet)` may replace the built-in calibration: it runs a pipeline whose `.unet` is the object it is given.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqc.capture import ARCHITECTURE
from hqc.claims import claimed
from hqc.errors import ArtefactError, PlanError, TrainingError
from hqc.memory import return_free_memory
from hqc.models import digits_path
from hqc.passes import AttachStyle, MergeStyle
from hqc.paths import StrPath
from hqc.pipeline import run_pass
from hqc.processes import ALONE, Processes
from hqc.program import InputSpec, Program
from hqc.recipes import Recipe, find_recipe
from hqc.recipes.plan_file import PlanFile, plan_asked
from hqc.recipes.rotation import Rotation, rotation
from hqc.recipes.run import Request, planned, run_recipe, run_settings
from hqc.recipes.work_folder import Run
from hqc.runtimes import as_unet
from hqc.runtimes.base import named_inputs
from hqc.runtimes.model import Model
from hqc.runtimes.text_encoder import load_text_pipeline
from hqc.runtimes.torch_runtime import TorchSession
from hqc.sampling import Observe, Task, Update, Work, pipeline_task, synthetic_task
from hqc.sampling.prompts import prompt_task, require_prompt_inputs
from hqc.sampling.task import Denoise, called_once, denoiser
from hqc.styles.request import parse_loras

__all__ = [
    "ForwardLoop",
    "attach_loras",
    "finish_run",
    "merge_loras",
    "ptq",
    "qat",
    "quantise",
    "recipe_of",
    "task_of",
]

ForwardLoop = Callable[[nn.Module], Any]


def task_of(
    program: Program,
    pipeline: Any | None = None,
    *,
    folder: StrPath | None = None,
    synthetic: bool = False,
    prompts: Sequence[str] = (),
    guidance_scale: float | None = None,
    images: StrPath | None = None,
    through: Sequence[Program] = (),
    timestep: float | None = None,
) -> Task:
    """What to sample while calibrating and training `program`: from the pipeline, or from the one it was traced from.

    folder: the pipeline folder beside the program, instead of the one that its origin names.
    synthetic: noise and random conditions instead, for any denoiser; always so for a named architecture, which has
    seeded weights and no pipeline. prompts: conditions from the pipeline's own text encoder, which is loaded for it
    and freed. guidance_scale: with prompts, of a denoiser that takes it as an input (Flux, latent consistency models);
    None takes the pipeline's own default.
    images: a folder of images that the pipeline restores in one step, at the `timestep` of its one call; `through` are
    parts of it that come before this program and are quantised already (`hqc.restoration`).

    Raises:
        TrainingError: if there is none, or both prompts and synthetic are given.
    """
    folder = None if folder is None else Path(folder)
    if attached := program.attached_styles:
        found = f"has the LoRA {attached[0]} attached, and what is sampled here gives no scale"
        raise TrainingError("the program", found, "Give the program from before it was attached.")
    if prompts and synthetic:
        raise TrainingError("--prompts", "and --synthetic exclude each other", "Give one of them.")
    if through and images is None:
        raise TrainingError("--through", "is for images that are restored", "Give --images too.")
    if images is not None:
        conditions = {"synthetic": synthetic, "prompts": prompts, "guidance_scale": guidance_scale}
        return _restoring_task(program, pipeline, folder, Path(images), through, timestep, conditions)
    if not program.has_timestep:
        return _one_call_task(program, synthetic=synthetic, prompts=prompts)
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


def _restoring_task(
    program: Program,
    pipeline: Any | None,
    folder: Path | None,
    images: Path,
    through: Sequence[Program],
    timestep: float | None,
    conditions: Mapping[str, Any],
) -> Task:
    """Of a part of a pipeline that restores images; conditions: what its denoiser is given besides."""
    from hqc.restoration import restoring_task

    around = _folder_around(program, folder)
    denoisers = [one for one in (program, *through) if one.has_timestep]
    if not denoisers and (conditions["synthetic"] or conditions["prompts"]):
        option = "--synthetic" if conditions["synthetic"] else "--prompts"
        raise TrainingError(option, "is for a denoiser, and the images meet none", "Leave it out.")
    denoising = task_of(denoisers[0], pipeline, folder=around, **conditions) if denoisers else None
    return restoring_task(program, around, images, through=through, timestep=timestep, denoising=denoising)


def _one_call_task(program: Program, *, synthetic: bool, prompts: Sequence[str]) -> Task:
    """Of a program without a timestep, which no sampler runs."""
    source = f"program from {program.origin.source or 'a module'}"
    if prompts:
        raise TrainingError(source, "has no condition, so it takes no --prompts", "Give --synthetic.")
    if not synthetic:
        do = "Give --images FOLDER, --synthetic for noise, or task=Task(...) from Python."
        raise TrainingError(source, "has no timestep, so no sampler runs it", do)
    return synthetic_task(program)


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


@dataclass(frozen=True)
class _Observed:
    """The model of a forward loop: what it is called on goes to `denoise`."""

    inputs: tuple[InputSpec, ...]
    denoise: Denoise
    name: str = "calibration"

    def __call__(
        self, sample: Tensor, timestep: Tensor | float | None = None, *conditions: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        given = named_inputs(self.inputs, sample, timestep, *conditions, **named)
        return self.denoise(*given.values())


def _user_loop(forward_loop: ForwardLoop, program: Program) -> Observe:
    def run(denoise: Denoise) -> None:
        forward_loop(as_unet(_Observed(program.inputs, denoise), program.origin.unet_config))

    return run


def _visited(program: Program, run: Observe) -> tuple[float, ...]:
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


def recipe_of(recipe: str | Recipe, settings: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of that name, or in that file, with options of its steps changed: {"distil.epochs": 10}.

    Raises:
        PlanError, PipelineTextError: if there is none, or it has no such option.
    """
    found = find_recipe(recipe) if isinstance(recipe, str) else recipe
    for path, value in (settings or {}).items():
        found = found.set(path, value)
    return found


def quantise(
    program: Program,
    recipe: str | Recipe,
    bits: str | None = None,
    *,
    task: Task | None = None,
    forward_loop: ForwardLoop | None = None,
    keep_float: Sequence[str] = (),
    plan: StrPath | PlanFile | None = None,
    settings: Mapping[str, Any] | None = None,
    work_dir: StrPath | None = None,
    resume: bool = False,
    restart: bool = False,
    on_update: Callable[[Update], None] | None = None,
    processes: Processes = ALONE,
) -> Program:
    """Runs a recipe's steps on a captured program; with a work folder it can be killed and resumed.

    bits: None takes the plan's, or w4a4. plan: a file of rules that give single sites bits, a rotation, a LoRA rank
    (`hqc.recipes.plan_file`).
    settings: options of its steps, as {"calibrate_activations.samples": 8}. forward_loop: calibrates instead of the
    sampler; the grid of the scale tables is then the timesteps that it visits, else the sampler's.
    work_dir: keeps the program after every long step, a JSON-lines log and the last checkpoint; no other run may use it
    meanwhile. resume: continue there, to the same bits as an uninterrupted run. restart: begin anew, and drop the
    unfinished run that is there. on_update: hears of every update of training.
    processes: `hqc.processes.joined()` of several that train together, each of which calls this; the first writes.

    Raises:
        PlanError, PipelineTextError: bits, rules, recipe or settings make no sense. TrainingError: calibration or
        training met NaN, or there is nothing to sample. MemoryShortError: before anything runs. ArtefactError: nothing
        to resume, or a run with other settings; with neither resume nor restart, an unfinished run.
    """
    found, asked = recipe_of(recipe, settings), plan_asked(plan)
    bits, found = asked.bits_with(bits), found.following(asked.rules)
    if resume and restart:
        raise ArtefactError("--resume", "and --restart exclude each other", "Give one of them.")
    if resume and work_dir is None:
        raise ArtefactError("resume", "no work folder was given", "Give the work folder of the run to continue.")
    if not resume:  # what passes behind long work refuse of this program is said before it
        planned(program, found, Request(bits, tuple(keep_float), rules=asked.rules), calibrated=False)
    run = Run(Path(work_dir), writes=processes.first) if work_dir is not None else None
    with claimed(run.folder, stays=True) if run is not None and processes.first else nullcontext():
        if run is not None and not resume and processes.first:
            run.check_new(restart=restart)
        if task is None and (forward_loop is None or found.kind == "qat"):
            task = task_of(program)
        observe = _user_loop(forward_loop, program) if forward_loop is not None else None
        grid = _visited(program, observe) if observe is not None else _grid(task, found)
        request = Request(bits, tuple(keep_float), grid, asked.rules)
        drawn_from = task.drawn_from if task is not None else "the forward loop"
        return run_recipe(
            program,
            found,
            request,
            Work(
                program,
                task,
                found.sampler,
                observe,
                on_update=_logged(run, on_update),
                on_validation=None if run is None or not processes.first else run.log,
                processes=processes,
            ),
            settings=run_settings(program, found, request, drawn_from, processes.count),
            run=run,
            resume=resume,
        )


def _grid(task: Task | None, recipe: Recipe) -> tuple[float, ...]:
    sampler = recipe.sampler
    return called_once(task, sampler.timestep).timesteps(sampler.num_inference_steps) if task is not None else ()


def _logged(run: Run | None, on_update: Callable[[Update], None] | None) -> Callable[[Update], None]:
    def hear(update: Update) -> None:
        if run is not None:
            run.log(update)
        if on_update is not None:
            on_update(update)

    return hear


def ptq(
    program: Program,
    recipe: str | Recipe = "rtn",
    bits: str | None = None,
    *,
    hadamard: Rotation | bool = False,
    block: int | None = None,
    **options: Any,
) -> Program:
    """Quantises without training: MSE weight scales, per-timestep activation scales along the float trajectory.

    hadamard: rotate before the quantisers, with the kind ("sylvester", which True is, "regular", or "auto" to choose
    one at every site) and the order `block`, the kind's usual one unless given.
    options: those of `quantise`.

    Raises:
        PlanError: if the recipe trains; else see `quantise`.
    """
    found = recipe_of(recipe)
    if found.kind != "ptq":
        raise PlanError(f"recipe {found.name!r}", "needs training", "Use hqc qat, or --recipe rtn here.")
    if hadamard:
        found = found.rotated(rotation("sylvester" if hadamard is True else hadamard, block))
    return quantise(program, found, bits, **options)


def qat(program: Program, recipe: str | Recipe = "hqc", bits: str | None = None, **options: Any) -> Program:
    """Quantises and trains by distillation from `program`. options: those of `quantise`.

    Raises:
        PlanError: if the recipe does not train; else see `quantise`.
    """
    found = recipe_of(recipe)
    if found.kind != "qat":
        raise PlanError(f"recipe {found.name!r}", "does not train", "Use hqc ptq for it, or --recipe hq-dm here.")
    return quantise(program, found, bits, **options)


def merge_loras(program: Program, loras: Sequence[str]) -> Program:
    """Adds LoRAs to the weights of a captured program, before anything is quantised.

    loras: each `[NAME=]FILE.safetensors[:SCALE]`. What a file holds for text encoders is left out; the record says so.

    Raises:
        OptionError: for a text that is none. ArtefactError: for a file that is none, or of another model.
        PassError: if the program is quantised.
    """
    for asked in parse_loras(loras):
        program = run_pass(program, MergeStyle(file=asked.file, scale=asked.scale, name=asked.name))
    return program


def attach_loras(program: Program, loras: Sequence[str]) -> Program:
    """Puts LoRAs beside the layers of a program, captured or quantised, each with an input `lora_scale_NAME` [N].

    loras: each `[NAME=]FILE.safetensors[:SCALE]`; the scale is what the input is where a call gives none, 1 unless
    given. What a file holds for text encoders is left out; the record says so.

    Raises:
        OptionError, ArtefactError: as `merge_loras`. PassError: if the program has an input of that name, or is frozen
        to integers.
    """
    for asked in parse_loras(loras):
        program = run_pass(program, AttachStyle(file=asked.file, scale=asked.scale, name=asked.name))
    return program


def finish_run(folder: StrPath) -> None:
    """Drops the programs and the checkpoint of a run whose result is saved; the log stays.

    Raises:
        ArtefactError: if another command uses the folder.
    """
    folder = Path(folder)
    with claimed(folder, stays=True):
        Run(folder).finish()
