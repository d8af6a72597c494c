"""How much of the image is left at every timestep of training, from a configuration's betas."""

import math
from functools import lru_cache

import numpy as np

from hqc.lite.arrays import Floats, fused
from hqc.lite.schedulers.settings import Settings

__all__ = ["alphas_cumprod", "sigmas_of"]

_LARGEST_BETA = 0.999
_ALMOST_ZERO = np.float32(2.0**-24)


@lru_cache(maxsize=8)
def alphas_cumprod(settings: Settings, *, above_zero: bool = False) -> Floats:
    """ᾱ at every timestep. above_zero: keeps the last one a little above 0, where σ = √((1 - ᾱ) / ᾱ) is needed."""
    betas = _betas(settings)
    if settings.rescale_betas_zero_snr:
        betas = _to_zero_snr(betas)
    found = _products(np.float32(1) - betas)
    if settings.rescale_betas_zero_snr and above_zero:
        found[-1] = _ALMOST_ZERO
    found.flags.writeable = False
    return found


def sigmas_of(settings: Settings) -> Floats:
    """σ = √((1 - ᾱ) / ᾱ) at every timestep."""
    left = alphas_cumprod(settings, above_zero=True)
    return np.asarray(np.sqrt((np.float32(1) - left) / left))


def _betas(settings: Settings) -> Floats:
    count = settings.num_train_timesteps
    if settings.trained_betas is not None:
        return np.array(settings.trained_betas, np.float32)
    if settings.beta_schedule == "linear":
        return _evenly(settings.beta_start, settings.beta_end, count)
    if settings.beta_schedule == "scaled_linear":
        return np.square(_evenly(settings.beta_start**0.5, settings.beta_end**0.5, count))
    left = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return np.array([min(1 - left[i + 1] / left[i], _LARGEST_BETA) for i in range(count)], np.float32)


def _evenly(first: float, last: float, count: int) -> Floats:
    """torch.linspace: from either end to the middle."""
    begin, end, places = np.float32(first), np.float32(last), np.arange(count)
    if count == 1:
        return np.array([begin])
    step = (end - begin) / np.float32(count - 1)
    return np.where(places < count // 2, fused(places, step, begin), fused(count - 1 - places, -step, end))


def _products(alphas: Floats) -> Floats:
    """torch.cumprod: summed up in float64."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _to_zero_snr(betas: Floats) -> Floats:
    """Betas that leave nothing of the image at the last timestep (algorithm 1 of arXiv:2305.08891)."""
    root = np.sqrt(_products(np.float32(1) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    left = np.square(root)
    alphas = np.concatenate([left[:1], left[1:] / left[:-1]])
    return np.float32(1) - alphas
