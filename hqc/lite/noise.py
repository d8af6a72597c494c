"""torch's normal numbers on the CPU without torch: the same seed gives the same noise, and so the same image.

    Noise(seed).normal(shape)  ==  torch.randn(shape, generator=torch.Generator().manual_seed(seed))

A Mersenne twister gives 32 bits at a time. From 16 numbers on, every block of 16 uniform numbers of 24 bits becomes 16
normal ones (Box-Muller, eight radii and eight angles); if the count is no multiple of 16, the last 16 are drawn anew.
Fewer than 16 come one at a time from pairs of 53 bits, and what is left of a pair waits for the next call.

Equal to the bit to torch's builds for x86 with AVX2; elsewhere torch takes the logarithm and the sine of the system,
and a number may differ by 2e-6.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hqc.lite.arrays import Floats
from hqc.lite.cephes import log, sin_cos

__all__ = ["Noise"]

_BLOCK = 16
_TWO_PI = np.float32(2 * math.pi)


class Noise:
    """A stream of normal numbers from one seed. It keeps its place: the next call goes on where the last one ended."""

    def __init__(self, seed: int) -> None:
        # torch seeds its twister with the lower half of the seed.
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._waiting: float | None = None

    def normal(self, shape: Sequence[int]) -> Floats:
        """Normal numbers of mean 0 and variance 1."""
        count = math.prod(shape)
        drawn = self._blocks(count) if count >= _BLOCK else np.array([self._one() for _ in range(count)], np.float32)
        return drawn.reshape(tuple(shape))

    def _blocks(self, count: int) -> Floats:
        values = self._uniform(count)
        whole = count - count % _BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole < count:
            values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values

    def _one(self) -> float:
        if self._waiting is not None:
            found, self._waiting = self._waiting, None
            return found
        angle, radius = 2 * math.pi * self._uniform_double(), math.sqrt(-2 * math.log1p(-self._uniform_double()))
        self._waiting = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, count, dtype=np.uint32)

    def _uniform(self, count: int) -> Floats:
        """Numbers in [0, 1) of 24 bits."""
        return (self._words(count) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)

    def _uniform_double(self) -> float:
        high, low = (int(word) for word in self._words(2))
        return float(((high << 32 | low) & (2**53 - 1)) * 2.0**-53)


def _box_muller(uniform: Floats) -> Floats:
    """Blocks of 16 uniform numbers, eight for radii and eight for angles, as normal ones."""
    pairs = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * log(np.float32(1) - pairs[:, 0]))
    sin, cos = sin_cos(_TWO_PI * pairs[:, 1])
    return np.stack([radius * cos, radius * sin], axis=1).reshape(-1)
