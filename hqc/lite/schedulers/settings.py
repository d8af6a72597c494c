"""A scheduler_config.json as settings: checked, with diffusers' defaults, nothing of it ignored."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from hqc.errors import ArtefactError

__all__ = ["Settings", "read_settings"]

_MOST_TIMESTEPS = 100_000


@dataclass(frozen=True)
class Settings:
    """What the schedulers read; each ignores what it has no part of. Names and defaults are diffusers'."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    # DDIM
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    # Euler and DPM-Solver
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    # DPM-Solver
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf


_COMMON = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("timestep_spacing", "steps_offset", "rescale_betas_zero_snr"),
)
_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "final_sigmas_type")
_READ = {
    "DDIMScheduler": (*_COMMON, "clip_sample", "clip_sample_range", "set_alpha_to_one"),
    "EulerDiscreteScheduler": (*_COMMON, *_SIGMAS, "sigma_min", "sigma_max"),
    "DPMSolverMultistepScheduler": (
        *(*_COMMON, *_SIGMAS, "solver_order", "solver_type"),
        *("lower_order_final", "euler_at_final", "lambda_min_clipped"),
    ),
}
_DEFAULTS: dict[str, dict[str, Any]] = {"DDIMScheduler": {"timestep_spacing": "leading"}}
# Settings of a class that have one value here, and those that mean something only with another value of such a one.
_ONLY: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"thresholding": False},
    "EulerDiscreteScheduler": {
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "use_beta_sigmas": False,
    },
    "DPMSolverMultistepScheduler": {
        "algorithm_type": "dpmsolver++",
        "thresholding": False,
        "variance_type": None,
        "use_beta_sigmas": False,
        "use_dynamic_shifting": False,
        "use_flow_sigmas": False,
        "use_lu_lambdas": False,
    },
}
_UNUSED = ("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type")
# Settings of diffusers' other schedulers, which a configuration may hold and the class does not read.
_ELSEWHERE = (
    *("disable_corrector", "predict_x0", "rho", "shift_terminal", "sigma_data", "sigma_schedule", "skip_prk_steps"),
    *("solver_p", "variance_type"),
)
_KNOWN = {*_UNUSED, *_ELSEWHERE, *(f.name for f in fields(Settings)), *(key for only in _ONLY.values() for key in only)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_beta(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _one_of(*values: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in values, f"one of {', '.join(values)}"


def _whole(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high, f"{low} to {high}"


_FLAG: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "true or false")
_BETA: tuple[Callable[[Any], bool], str] = (_is_beta, "0 to 1")
_SIGMA: tuple[Callable[[Any], bool], str] = (lambda v: v is None or (_is_number(v) and v > 0), "a number above 0")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": _whole(1, _MOST_TIMESTEPS),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "beta_schedule": _one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": (lambda v: v is None or (isinstance(v, list) and all(map(_is_beta, v))), "numbers of 0 to 1"),
    "prediction_type": _one_of("epsilon", "sample", "v_prediction"),
    "timestep_spacing": _one_of("leading", "trailing", "linspace"),
    "steps_offset": _whole(0, _MOST_TIMESTEPS),
    "clip_sample_range": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "sigma_min": _SIGMA,
    "sigma_max": _SIGMA,
    "final_sigmas_type": _one_of("zero", "sigma_min"),
    "solver_order": _whole(1, 2),
    "solver_type": _one_of("midpoint", "heun"),
    "lambda_min_clipped": (lambda v: v == -math.inf or _is_number(v), "a number"),
}


def read_settings(kind: str, config: Mapping[str, Any]) -> Settings:
    """The settings of one class of scheduler; what a configuration holds for others is not read, as in diffusers.

    Raises:
        ArtefactError: naming the setting that the scheduler does not have here.
    """
    for key, value in config.items():
        if not key.startswith("_"):
            _check(kind, key, value)
    found = {**_DEFAULTS.get(kind, {}), **{key: config[key] for key in _READ[kind] if key in config}}
    if found.get("trained_betas") is not None:
        found["trained_betas"] = tuple(found["trained_betas"])
        if len(found["trained_betas"]) != found.get("num_train_timesteps", Settings.num_train_timesteps):
            raise _refused(kind, "trained_betas", "another number of them", "one a timestep of training")
    if found.get("use_karras_sigmas") and found.get("use_exponential_sigmas"):
        raise _refused(kind, "use_karras_sigmas", True, "no use_exponential_sigmas beside it")
    return Settings(**found)


def _check(kind: str, key: str, value: Any) -> None:
    if key in _ONLY[kind]:
        if value != _ONLY[kind][key]:
            raise _refused(kind, key, value, repr(_ONLY[kind][key]))
    elif key in _READ[kind]:
        fits, expected = _CHECKS.get(key, _FLAG)
        if not fits(value):
            raise _refused(kind, key, value, expected)
    elif key not in _KNOWN:
        raise _refused(kind, key[:40], value, "no such setting")


def _refused(kind: str, key: str, value: Any, expected: str) -> ArtefactError:
    found = f"has {str(value)[:40]!r} as {key}; without torch it takes {expected}"
    return ArtefactError(f"scheduler {kind}", found, "Run the pipeline with torch, or ask for another scheduler.")
