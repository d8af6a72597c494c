"""log, sin and cos in float32 as torch's normal numbers have them on x86: Cephes' polynomials, products fused.

numpy's own are as exact and differ in the last bit, and an image would then differ from torch's in some pixels. What
torch multiplies and adds is one fused operation in its builds for AVX2 and AVX-512; here a product and a sum in float64
stand for it, which round alike but for about one sum in 10⁹.
"""

import numpy as np

from hqc.lite.arrays import Floats, fused

__all__ = ["log", "sin_cos"]

_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_LOG_2 = (-2.12194440e-4, 0.693359375)  # in two parts, the small one first
_SQRT_HALF = 0.707106781186547524
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)  # minus π/4, in three parts
_FOUR_BY_PI = 1.27323954473516


def log(x: Floats) -> Floats:
    """The natural logarithm of numbers above 0 that are no denormals."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < np.float32(_SQRT_HALF)
    exponent = (exponent - small).astype(np.float32)
    x = (mantissa - np.float32(1)) + np.where(small, mantissa, np.float32(0))
    square = x * x
    y = _polynomial(_LOG, x) * x
    y = fused(y, square, exponent * np.float32(_LOG_2[0]))
    y = fused(-square, np.float32(0.5), y)
    return fused(exponent, np.float32(_LOG_2[1]), x + y)


def sin_cos(x: Floats) -> tuple[Floats, Floats]:
    """The sine and the cosine of angles from 0 to 2π."""
    octant = (x * np.float32(_FOUR_BY_PI)).astype(np.int32)
    octant = (octant + 1) & ~1  # the nearest even one: what is left lies within π/4 of it
    for part in _QUARTER_PI:
        x = fused(octant.astype(np.float32), np.float32(part), x)
    square = x * x
    cos = fused(_polynomial(_COS, square) * square, square, -(square * np.float32(0.5))) + np.float32(1)
    sin = fused(_polynomial(_SIN, square) * square, x, x)
    even = (octant & 2) == 0
    found_sin, found_cos = np.where(even, sin, cos), np.where(even, cos, sin)
    return (
        np.where((octant & 4) != 0, -found_sin, found_sin),
        np.where(((octant + 2) & 4) != 0, -found_cos, found_cos),
    )


def _polynomial(coefficients: tuple[float, ...], x: Floats) -> Floats:
    """Horner's rule, the highest power first."""
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = fused(y, x, np.float32(coefficient))
    return y
