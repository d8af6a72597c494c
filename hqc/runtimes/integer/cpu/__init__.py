"""The `torch-int8` runtime: an integer program on a CPU, its products by the oneDNN operators that torch carries.

`operators` finds these operators and checks what they add up in, `products` packs weights for them; `passes.cpp` makes
codes (norms, gates, rotation, rounding in one pass over memory), `compiler` compiles it once for this machine,
`native` calls it, `plain` is the same in torch where there is no compiler; `session` runs a program.

Activation codes are stored unsigned, code + 128, with 128 as zero point: what oneDNN multiplies with signed weights.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqc.runtimes.integer.cpu.session import CpuSession

__all__ = ["CpuSession"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from hqc.runtimes.integer.cpu.session import CpuSession

    return CpuSession
