"""The peer `torch-compile`: the float program compiled for the CPU by inductor, torch's own compiler."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hqc.evaluation.bench.requirements import require_cpp_compiler
from hqc.program import Program

__all__ = ["CompiledSession"]


class CompiledSession:
    """As `TorchSession`, compiled in one piece, for one set of sizes after the other.

    Frozen: weights are constants, which inductor packs for oneDNN's kernels beforehand. That is what makes it quicker
    than eager torch on a CPU. The first call of a set of sizes compiles for minutes; torch keeps what it compiled in
    TORCHINDUCTOR_CACHE_DIR.
    """

    name = "torch-compile"

    def __init__(self, program: Program, *, backend: str = "inductor") -> None:
        """backend: of torch.compile; another than inductor takes no C++ compiler, and is not frozen.

        Raises:
            RuntimeMissingError: without a C++ compiler.
        """
        options: dict[str, str | int | bool | Callable[..., Any]] | None = None
        if backend == "inductor":
            require_cpp_compiler()
            options = {"freezing": True}
        self.inputs = program.inputs
        module = program.module().eval()
        # In one piece or not at all: a peer that fell apart would be slower than it need be.
        compiled = torch.compile(module, dynamic=False, fullgraph=True, backend=backend, options=options)
        self._module = cast(nn.Module, compiled)

    def compile(self, *inputs: Tensor) -> None:
        """Compiles for the sizes of these inputs, by a first call."""
        self(*inputs)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output for all of the program's inputs, in order."""
        return cast(Tensor, self._module(*inputs))
