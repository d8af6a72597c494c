"""The strongest float peer on a GPU: the float program in half precision, compiled by torch, inside a CUDA graph."""

import os
import shutil
from typing import cast

import torch
from torch import nn

from hqc.errors import RuntimeMissingError
from hqc.program import Program
from hqc.runtimes.integer.build import BuildOptions, float_module
from hqc.runtimes.integer.cuda.session import Precision, _dtype, _GraphSession, require_cuda

__all__ = ["COMPILERS", "CompiledHalfSession", "compiled", "require_torch_compile"]

COMPILERS = ("cc", "gcc", "clang")
"""What triton looks for to build its launchers, unless CC names another."""

_NAME = "torch-fp16-compile"


class CompiledHalfSession(_GraphSession):
    """As `HalfSession`, with `torch.compile` in its default mode; channels-last convolutions.

    The first call of a batch size compiles for about a minute (torch keeps the result in TORCHINDUCTOR_CACHE_DIR), and
    is then captured.
    """

    name = _NAME

    def __init__(self, program: Program, *, dtype: Precision = "fp16", graphs: int = 4, device: str = "cuda") -> None:
        """See `CudaSession`.

        Raises:
            RuntimeMissingError: without a CUDA device, triton or a C compiler.
        """
        require_cuda()
        require_torch_compile()
        options = BuildOptions(torch.device(device), _dtype(dtype))
        super().__init__(program.inputs, compiled(float_module(program, options)), options.device, graphs)


def compiled(module: nn.Module, backend: str = "inductor") -> nn.Module:
    """The module under torch.compile, for one set of sizes after the other: each is compiled for itself.

    The default mode: "reduce-overhead" would capture graphs of its own, and the session does that already. In one piece
    or not at all: a peer that fell apart would be slower than it need be.
    """
    return cast(nn.Module, torch.compile(module, dynamic=False, fullgraph=True, backend=backend))


def require_torch_compile() -> None:
    """Refuses to go on where torch cannot compile for a GPU; a minute later its error would be a page long.

    Raises:
        RuntimeMissingError: without triton or a C compiler.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeMissingError(_NAME, "torch.compile needs triton", "Install triton.") from error
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        found = f"CC names {named}, which is not there" if named else f"finds none of {', '.join(COMPILERS)}"
        raise RuntimeMissingError(_NAME, f"torch.compile needs a C compiler; {found}", "Install gcc.")
