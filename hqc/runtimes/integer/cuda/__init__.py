"""The `torch-cuda` runtime: an integer program on an NVIDIA GPU, its products in int8 through hqc's Triton kernels.

`side_stream` orders what does not depend on the image, `graphs` captures one CUDA graph a batch size, `session` runs
them; `compiled` is the strongest float peer, `tune` measures tiles.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqc.runtimes.integer.cuda.session import CudaSession

__all__ = ["CudaSession"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from hqc.runtimes.integer.cuda.session import CudaSession

    return CudaSession
