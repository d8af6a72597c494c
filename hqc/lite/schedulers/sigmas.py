"""Noise levels and timesteps of the schedulers that step from one σ to the next."""

import math

import numpy as np
from numpy.typing import NDArray

from hqc.lite.schedulers.betas import sigmas_of
from hqc.lite.schedulers.settings import Settings

__all__ = ["levels"]

_KARRAS_RHO = 7.0


def levels(
    settings: Settings, timesteps: NDArray[np.float64], steps: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """σ of every step and of the end, and the timesteps, which Karras' and exponential levels replace.

    timesteps: those that the configuration spaces out; rounding may make them one more than the steps asked for, which
    the other levels never are.
    """
    known = sigmas_of(settings)
    if settings.use_karras_sigmas or settings.use_exponential_sigmas:
        # Those that end them are of all of training in DPM-Solver, and of the steps in Euler: the caller's timesteps.
        largest, least = np.interp(timesteps[[0, -1]], np.arange(len(known)), known)
        found = _between(settings, float(largest), float(least), steps)
        timesteps = _timesteps_of(found, np.log(known))
    else:
        found = np.interp(timesteps, np.arange(len(known)), known)
    last = known[0] if settings.final_sigmas_type == "sigma_min" else 0
    return np.append(found, last).astype(np.float32), timesteps


def _between(settings: Settings, largest: float, least: float, steps: int) -> NDArray[np.float64]:
    """Levels of Karras et al. (arXiv:2206.00364), or with even logarithms."""
    least = least if settings.sigma_min is None else settings.sigma_min
    largest = largest if settings.sigma_max is None else settings.sigma_max
    if settings.use_exponential_sigmas:
        return np.exp(np.linspace(math.log(largest), math.log(least), steps))
    begin, end = largest ** (1 / _KARRAS_RHO), least ** (1 / _KARRAS_RHO)
    return np.asarray((begin + np.linspace(0, 1, steps) * (end - begin)) ** _KARRAS_RHO)


def _timesteps_of(sigmas: NDArray[np.float64], log_known: NDArray[np.float32]) -> NDArray[np.float64]:
    """Where in training the levels lie, between the two nearest by their logarithms."""
    wanted = np.log(np.maximum(sigmas, 1e-10))
    low = (np.searchsorted(log_known, wanted, side="right") - 1).clip(0, len(log_known) - 2)
    share = (log_known[low] - wanted) / (log_known[low] - log_known[low + 1])
    share = np.clip(share, 0, 1)
    return np.asarray((1 - share) * low + share * (low + 1))
