"""The schedulers that a request may name, in place of the pipeline's own."""

from typing import Any

from hqc.errors import OptionError

__all__ = ["SCHEDULER_NAMES", "chosen_scheduler", "scheduler_names", "scheduler_of"]

_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
SCHEDULER_NAMES = tuple(_SCHEDULERS)


def scheduler_names(scheduler: Any) -> tuple[str, ...]:
    """The names of schedulers that can stand for a pipeline's: they read its configuration and solve the same equation.

    None for flow matching, consistency models and others, whose timesteps are their own.
    """
    compatible = {kind.__name__ for kind in getattr(scheduler, "compatibles", ())}
    if type(scheduler).__name__ not in compatible:
        return ()
    return tuple(name for name, kind in _SCHEDULERS.items() if kind in compatible)


def scheduler_of(scheduler: Any, name: str | None) -> Any:
    """A fresh scheduler of a name, or of the same class where there is none, with the configuration of `scheduler`."""
    kind: Any = type(scheduler)
    if name is not None:
        import diffusers

        kind = getattr(diffusers, _SCHEDULERS[name])
    return kind.from_config(scheduler.config)


def chosen_scheduler(scheduler: Any, name: str | None) -> Any:
    """A pipeline's scheduler, or the one of a name that `--scheduler` asks for instead.

    Raises:
        OptionError: for one that cannot stand for the pipeline's.
    """
    if name is None:
        return scheduler
    names = scheduler_names(scheduler)
    if name not in names:
        do = f"Use one of {', '.join(names)}." if names else "Leave it out."
        raise OptionError(f"--scheduler {name}", f"cannot stand for the pipeline's {type(scheduler).__name__}", do)
    return scheduler_of(scheduler, name)
