"""A Gaussian process with a Matérn-5/2 kernel, and how much a point is expected to better the best one.

k(a, b) = σ²·(1 + r + r²/3)·e^(-r),  r = √5·‖a - b‖/ℓ;  ℓ of the largest likelihood among a few
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["GaussianProcess", "expected_improvement"]

Array = NDArray[np.float64]
_LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_NOISE = 1e-4
"""Of the variance: a training on the same plan gives the same error, a plan's neighbour nearly."""


class GaussianProcess:
    """Fitted to values at points; far from them it says their mean, and their variance."""

    def __init__(self, points: Sequence[Sequence[float]], values: Sequence[float]) -> None:
        self._points, y = np.asarray(points, dtype=np.float64), np.asarray(values, dtype=np.float64)
        self._mean, self._variance = float(y.mean()), max(float(y.var()), 1e-6)
        self._rest = (y - self._mean) / math.sqrt(self._variance)
        self._length = max(_LENGTHS, key=self._likelihood)
        self._root = np.linalg.cholesky(self._kernel(self._points, self._length) + _NOISE * np.eye(len(y)))
        self._weights = np.linalg.solve(self._root.T, np.linalg.solve(self._root, self._rest))

    def _kernel(self, others: Array, length: float) -> Array:
        distance = np.linalg.norm(others[:, None] - self._points[None], axis=-1)
        r = math.sqrt(5) * distance / (length * math.sqrt(self._points.shape[1]))
        return (1 + r + r**2 / 3) * np.exp(-r)  # type: ignore[no-any-return]

    def _likelihood(self, length: float) -> float:
        root = np.linalg.cholesky(self._kernel(self._points, length) + _NOISE * np.eye(len(self._rest)))
        white = np.linalg.solve(root, self._rest)
        return float(-0.5 * white @ white - np.log(np.diag(root)).sum())

    def predict(self, points: Sequence[Sequence[float]]) -> tuple[Array, Array]:
        """Mean and standard deviation at points."""
        k = self._kernel(np.asarray(points, dtype=np.float64), self._length)
        spread = 1 - (np.linalg.solve(self._root, k.T) ** 2).sum(0)
        deviation = np.sqrt(self._variance * spread.clip(0))
        return self._mean + math.sqrt(self._variance) * (k @ self._weights), deviation


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """By how much a value is expected to be below the best: (b - μ)·Φ(z) + σ·φ(z), z = (b - μ)/σ."""
    from scipy.special import ndtr

    safe = np.maximum(deviation, 1e-12)
    z = (best - mean) / safe
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return np.where(deviation > 0, (best - mean) * ndtr(z) + safe * density, np.maximum(best - mean, 0))
