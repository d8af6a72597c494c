"""The CUDA driver through its own library: which GPU, which CUDA, and launching PTX on TensorRT's stream.

Only what the plugins need, so that an export's plugins run with nothing but TensorRT beside them.
"""

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from .problems import MissingError, PluginError

__all__ = ["LoadedKernel", "current_capability", "driver_cuda", "load_kernel"]

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_ALWAYS_SHARED = 48 * 1024

# What the user can do, by the driver's codes: out of memory; no binary for this GPU, PTX of a later driver.
_DO = {
    2: "Free memory on the GPU.",
    209: "Export again with --plugin-arch of this GPU.",
    222: "Update the NVIDIA driver.",
}


@cache
def _library() -> Any:
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver serves; None without a driver."""
    library = _library()
    if library is None:
        return None
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def current_capability() -> tuple[int, int]:
    """Compute capability of the GPU whose context is current, else of the first.

    Raises:
        MissingError: if there is no driver or no GPU.
    """
    library, device = _library(), _current_device()
    values = (ctypes.c_int(), ctypes.c_int())
    for value, which in zip(values, (_MAJOR, _MINOR), strict=True):
        library.cuDeviceGetAttribute(ctypes.byref(value), which, device)
    return values[0].value, values[1].value


def _current_device() -> int:
    library = _library()
    device = ctypes.c_int()
    if library is None:
        raise MissingError("TensorRT plugins", "there is no NVIDIA driver here", "Use the machine with the GPU.")
    if library.cuCtxGetDevice(ctypes.byref(device)) != 0 and library.cuDeviceGet(ctypes.byref(device), 0) != 0:
        raise MissingError("TensorRT plugins", "the driver finds no GPU here", "Use the machine with the GPU.")
    return device.value


class LoadedKernel:
    """An entry point on the GPU, loaded into the context that was current."""

    def __init__(self, ptx: bytes, entry: str, shared_bytes: int) -> None:
        """Raises:
        PluginError: if the driver refuses the PTX.
        """
        self._library, self._shared = _library(), shared_bytes
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(ptx), entry=entry)
        self._call(
            "cuModuleGetFunction",
            ctypes.byref(self._function),
            self._module,
            ctypes.c_char_p(entry.encode()),
            entry=entry,
        )
        if shared_bytes > _ALWAYS_SHARED:
            self._call("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, shared_bytes, entry=entry)
        self._entry = entry

    def launch(
        self,
        pointers: Sequence[int],
        integers: Sequence[int],
        output: int,
        grid: Sequence[int],
        threads: int,
        stream: int,
    ) -> None:
        """Inputs, 32-bit integers, output, and the two null pointers for triton's scratch memory, which is not used.

        Raises:
            PluginError: if the driver refuses the launch.
        """
        values: list[Any] = [ctypes.c_void_p(pointer) for pointer in pointers]
        values += [ctypes.c_int32(value) for value in integers]
        values += [ctypes.c_void_p(output), ctypes.c_void_p(0), ctypes.c_void_p(0)]
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self._call(
            "cuLaunchKernel",
            self._function,
            *(ctypes.c_uint(size) for size in grid),
            *(ctypes.c_uint(size) for size in (threads, 1, 1)),
            ctypes.c_uint(self._shared),
            ctypes.c_void_p(stream),
            arguments,
            ctypes.c_void_p(0),
            entry=self._entry,
        )

    def _call(self, name: str, *arguments: Any, entry: str) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            found = f"{name} failed with {self._text(code)}"
            raise PluginError(f"kernel {entry}", found, _DO.get(code, "Report a bug."))

    def _text(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(text))
        return text.value.decode() if text.value else f"error {code}"


def load_kernel(ptx: bytes, entry: str, shared_bytes: int) -> LoadedKernel:
    """The kernel, loaded once a GPU and process.

    Raises:
        MissingError: if there is no GPU.
        PluginError: if the driver refuses the PTX.
    """
    return _loaded(_current_device(), ptx, entry, shared_bytes)


@cache
def _loaded(device: int, ptx: bytes, entry: str, shared_bytes: int) -> LoadedKernel:
    return LoadedKernel(ptx, entry, shared_bytes)
