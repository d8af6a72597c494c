"""The `torch-cuda` runtime: an integer program on an NVIDIA GPU, its products in int8 through hqc's kernels.

In the order in which data meets it: `forms` brings a program into rotated integers, `tidy` takes out what does nothing,
`weights` holds the codes, `place` puts kernel calls (`layers`) in the places of sites, `fusions` let them take in what
stands around them, `precision` casts the rest to half, `side_stream` orders what does not depend on the image, `build`
does all of that and writes a `report`, `graphs` captures one CUDA graph a batch size, `session` runs them; `compiled`
is the strongest float peer, `tune` measures tiles. `reference` has the
kernels in plain torch, so that all but graphs and sessions run on a CPU.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqc.runtimes.cuda.session import CudaSession

__all__ = ["CudaSession"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from hqc.runtimes.cuda.session import CudaSession

    return CudaSession
