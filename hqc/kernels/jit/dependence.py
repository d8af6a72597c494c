"""Programmatic dependent launch: a kernel's programs start while the last ones of the kernel before still run.

What a kernel does before `await_inputs` overlaps with its predecessor; everything that reads or writes memory comes
after it. Needs compute capability 9.0 and a launch that says so.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["await_inputs"]


@triton.jit
def await_inputs(DEPENDENT: tl.constexpr):
    """Waits until the kernel before has ended and its results can be seen; lets the next kernel start as well.

    The next one starts when every program of this one has come here, so that it takes the place of none of them.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
