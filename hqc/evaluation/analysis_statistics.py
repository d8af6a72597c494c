"""The numbers of an analysis: moments that merge exactly, the best scale of a sample, signal to noise.

max/RMS   max|x| / √(Σx²/n)
kurtosis  E[(x - μ)⁴] / E[(x - μ)²]², the plain one: 3 for normal values, 1.8 for uniform ones
SNR, dB   10·log₁₀(Σx² / Σ(x - x̂)²)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "best_scale", "channel_rows", "sample_rows", "snr_db"]


@dataclass(frozen=True)
class Moments:
    """Count, mean, central moments Σ(x - μ)ᵏ for k = 2, 3, 4, and max|x| of a stream of values."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    top: float = 0.0

    @staticmethod
    def of(x: Tensor) -> "Moments":
        """The moments of one tensor; sums run in double precision."""
        if x.numel() == 0:
            return Moments()
        mean = float(x.mean(dtype=torch.float64))
        centred = x - mean
        square = centred.square()
        m2, m4 = (float(v.sum(dtype=torch.float64)) for v in (square, square.square()))
        m3 = float((square * centred).sum(dtype=torch.float64))
        return Moments(x.numel(), mean, m2, m3, m4, float(x.abs().max()))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both streams together.  Source: Pébay, SAND2008-6212, equations 3.1."""
        a, b, n = self.count, other.count, self.count + other.count
        if n == 0:
            return self
        delta = other.mean - self.mean
        m2 = self.m2 + other.m2 + delta**2 * a * b / n
        m3 = self.m3 + other.m3 + delta**3 * a * b * (a - b) / n**2
        m3 += 3 * delta * (a * other.m2 - b * self.m2) / n
        m4 = self.m4 + other.m4 + delta**4 * a * b * (a**2 - a * b + b**2) / n**3
        m4 += 6 * delta**2 * (a**2 * other.m2 + b**2 * self.m2) / n**2
        m4 += 4 * delta * (a * other.m3 - b * self.m3) / n
        return Moments(n, self.mean + delta * b / n, m2, m3, m4, max(self.top, other.top))

    @property
    def rms(self) -> float:
        """√(Σx²/n)."""
        return math.sqrt(self.m2 / self.count + self.mean**2) if self.count else 0.0

    @property
    def max_over_rms(self) -> float | None:
        """max|x|/RMS; None where every value is zero."""
        return self.top / self.rms if self.rms > 0 else None

    @property
    def kurtosis(self) -> float | None:
        """E[(x - μ)⁴]/E[(x - μ)²]²; None where all values are equal."""
        return self.count * self.m4 / self.m2**2 if self.m2 > 0 and self.m2**2 > 0 else None


def channel_rows(x: Tensor, axis: int) -> Tensor:
    """x with its channels last, one row a position: [N, C, H, W] or […, C] -> [rows, C]."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def sample_rows(rows: Tensor, values: int) -> Tensor:
    """Evenly spread whole rows [k, C] with about `values` values in all, so that they can still be rotated."""
    wanted = max(1, values // max(1, rows.shape[1]))
    # An odd stride visits every column of an image whose width is a power of two.
    return rows[:: max(1, len(rows) // wanted) | 1] if len(rows) > wanted else rows


def snr_db(x: Tensor, found: Tensor) -> float | None:
    """10·log₁₀(Σx²/Σ(x - x̂)²); None where one of the sums is zero."""
    signal, noise = (float(v.square().sum(dtype=torch.float64)) for v in (x, x - found))
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def best_scale(x: Tensor, top: float, qmin: int, qmax: int, candidates: int = 60) -> float:
    """The scale that minimises Σ(x - s·clip(round(x/s), qmin, qmax))², among those that calibration tries.

    top: the largest |x| that the scale must serve; candidates are top/qmax·r, r evenly in 1/candidates…1.05.
    Zeros get scale 1, which represents them exactly.
    """
    if top <= 0:
        return 1.0
    scales = (top / qmax) * torch.linspace(1.0 / candidates, 1.05, candidates)
    flat, errors = x.reshape(-1), []
    for scale in scales:
        errors.append(float((flat / scale).round_().clamp_(qmin, qmax).mul_(scale).sub_(flat).square_().sum()))
    return float(scales[min(range(candidates), key=errors.__getitem__)])
