"""A kernel launched through the CUDA driver as TensorRT launches a plugin's PTX: no triton, no torch in between."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Launch", "architecture"]


def architecture() -> str:
    """The current device as triton names it."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


class Launch:
    """Loads PTX with the driver's own compiler and launches its entry point.

    Arguments in TensorRT's order: input pointers, int32 extras, output pointers, and two null pointers for the scratch
    memory that triton's kernels declare and do not use.
    """

    def __init__(self, ptx: str, name: str, shared_bytes: int) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        torch.cuda.current_stream().synchronize()  # makes torch's context the current one
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), ptx.encode() + b"\0"))
        self._check(self._cuda.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))
        if shared_bytes > 48 * 1024:
            maximum_dynamic_shared = 8
            self._check(self._cuda.cuFuncSetAttribute(self._function, maximum_dynamic_shared, shared_bytes))
        self._shared = shared_bytes

    def __call__(
        self, grid: Sequence[int], warps: int, inputs: Sequence[Tensor], integers: Sequence[int], output: Tensor
    ) -> None:
        """Launches on torch's current stream and waits."""
        pointers = [ctypes.c_uint64(t.data_ptr()) for t in inputs]
        extras = [ctypes.c_int32(i) for i in integers]
        arguments = [*pointers, *extras, ctypes.c_uint64(output.data_ptr()), ctypes.c_uint64(0), ctypes.c_uint64(0)]
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        sizes = [*grid, *[1] * (3 - len(grid))]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = (32 * warps, 1, 1)
        self._check(
            self._cuda.cuLaunchKernel(
                self._function, *sizes, *block, self._shared, stream, addresses, ctypes.c_void_p()
            )
        )
        torch.cuda.synchronize()

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"the CUDA driver says {status}: {(text.value or b'unknown').decode()}")
