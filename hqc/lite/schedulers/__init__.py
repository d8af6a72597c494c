"""diffusers' schedulers in numpy: DDIM, Euler and DPM-Solver++, from a pipeline's scheduler_config.json.

    scheduler = new_scheduler(config, steps=20)
    x = noise * scheduler.init_noise_sigma
    before = None
    for i, t in enumerate(scheduler.timesteps):
        x, before = scheduler.step(denoise(scheduler.scaled(x, i), t), i, x, before=before)

A scheduler is a value: it holds the timesteps and coefficients of one number of steps and nothing of an image, so that
any number of images may go through one at steps of their own. Its numbers are diffusers' to float rounding. What a
configuration asks for and this does not have is refused.
"""

from collections.abc import Mapping
from typing import Any

from hqc.errors import EvaluationError
from hqc.lite.schedulers.ddim import Ddim
from hqc.lite.schedulers.dpm_solver import DpmSolver
from hqc.lite.schedulers.euler import Euler
from hqc.lite.schedulers.scheduler import Scheduler, Step
from hqc.lite.schedulers.settings import read_settings

__all__ = ["SCHEDULERS", "Scheduler", "Step", "new_scheduler", "scheduler_class"]

SCHEDULERS = {"ddim": "DDIMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler"}
"""What a scheduler is asked for by, and its class in diffusers."""

_KINDS = {"DDIMScheduler": Ddim, "EulerDiscreteScheduler": Euler, "DPMSolverMultistepScheduler": DpmSolver}


def scheduler_class(config: Mapping[str, Any], name: str | None = None) -> str:
    """diffusers' class of the scheduler asked for; None asks for the configuration's own.

    Raises:
        EvaluationError: if there is no such scheduler.
    """
    if name is not None and name not in SCHEDULERS:
        raise EvaluationError(f"scheduler {name!r}", f"unknown; there are {', '.join(SCHEDULERS)}", "Use one of them.")
    kind = str(config.get("_class_name")) if name is None else SCHEDULERS[name]
    if kind not in _KINDS:
        do = f"Ask for one of {', '.join(SCHEDULERS)} (--scheduler)."
        raise EvaluationError("scheduler", f"the pipeline has a {kind[:60]}, which runs with torch alone", do)
    return kind


def new_scheduler(config: Mapping[str, Any], steps: int, *, name: str | None = None, eta: float = 0.0) -> Scheduler:
    """A scheduler for a number of steps.

    Args:
        config: scheduler_config.json. steps: denoising steps, at most those of training. name: another scheduler than
        the configuration's, with its settings as far as it has them. eta: noise of DDIM, 0 to 1.

    Raises:
        EvaluationError: if there is no such scheduler, it cannot take so many steps, or it has no eta.
        ArtefactError: if the configuration asks for what it does not have here.
    """
    kind = scheduler_class(config, name)
    settings = read_settings(kind, config)
    if not 1 <= steps <= settings.num_train_timesteps:
        raise EvaluationError(
            f"{steps} steps", f"expected 1 to {settings.num_train_timesteps}, those of training", "Ask for fewer."
        )
    if kind == "DDIMScheduler":
        return Ddim.of(settings, steps, eta)
    if eta > 0:
        raise EvaluationError(f"eta {eta:g}", f"the {kind} takes none", "Leave it out, or ask for ddim.")
    return Euler.of(settings, steps) if kind == "EulerDiscreteScheduler" else DpmSolver.of(settings, steps)
