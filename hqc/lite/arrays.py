"""The arrays of this package: numpy's, in float32."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "fused"]

Floats: TypeAlias = NDArray[np.float32]


def fused(a: Any, b: Any, c: Any) -> Floats:
    """a·b + c of float32, rounded once."""
    return np.asarray(np.multiply(a, b, dtype=np.float64) + c, np.float32)
