"""Products of few multiplications by `products.cpp`: what oneDNN's operator does before it begins takes longer."""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hqc.runtimes.integer.cpu.operators import ZERO, Window

__all__ = ["SmallProducts"]

_LANES, _WIDE, _QUAD = 16, 32, 4
_POINT: Window = ((1, 1), (0, 0), (1, 1))
_Pointer, _Size = ctypes.c_void_p, ctypes.c_int64
_Pair = _Size * 2


class _Struct(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("weight", "offset", "scale", "bias", "factor")),
        *((name, _Size) for name in ("bias_pitch", "samples", "height", "width", "channels", "outputs")),
        *((name, _Pair) for name in ("kernel", "stride", "padding", "dilation", "size")),
    )


class SmallProducts:
    """Of one library, on a CPU with AVX-512 and VNNI: there the sums are int32 and nothing saturates."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        """functions: of `compiler.compiled_passes`; `there` says whether it has products."""
        self.there = bool(functions.hqc_has_products())
        if self.there:
            self._run: Any = functions.hqc_product
            self._run.argtypes, self._run.restype = [_Pointer, _Pointer, _Pointer, ctypes.c_int, ctypes.c_int], None

    def takes(self, weight: Tensor) -> bool:
        """Whether a weight int8 [O, …, C] can be packed: codes are read four channels at a time."""
        return self.there and weight.shape[-1] % _QUAD == 0

    def pack(self, weight: Tensor, scale: Tensor, window: Window | None) -> "SmallProduct":
        """The product of a weight [O, C] or [O, h, w, C] and its scale [O]."""
        return SmallProduct(self._run, weight, scale, window or _POINT)


class SmallProduct:
    """One weight, in the order in which it is read."""

    def __init__(self, run: Any, weight: Tensor, scale: Tensor, window: Window) -> None:
        outputs, *places, channels = weight.shape
        self._kernel = tuple(places) if len(places) == 2 else (1, 1)
        self._run, self._scale, self._window = run, scale.contiguous(), window
        self._offset = weight.flatten(1).to(torch.int32).sum(1, dtype=torch.int32).mul_(ZERO)
        rows = functional.pad(weight.reshape(outputs, -1), (0, 0, 0, -outputs % _WIDE))
        self._weight = rows.view(-1, _LANES, rows.shape[1] // _QUAD, _QUAD).transpose(1, 2).contiguous()
        stride, padding, dilation = (_Pair(*pair) for pair in window)
        self._struct = (_Pair(*self._kernel), stride, padding, dilation)
        self._outputs, self._channels = outputs, channels

    def __call__(self, codes: Tensor, factor: Tensor, bias: Tensor | None, into: Tensor | None = None) -> Tensor:
        """codes u8 [N, …, C], factor fp32 [N], bias [O] or [N, O] -> float32 [N, …, O], or `into` with it added."""
        samples, *places = codes.shape[:-1]
        image = len(places) == 2
        height, width = places if image else (1, codes.numel() // (samples * self._channels))
        size = self._size(height, width)
        shape = (samples, *(size if image else places), self._outputs)
        y = torch.empty(shape) if into is None else into
        codes, factor = codes.contiguous(), factor.contiguous()
        pitch = 0 if bias is None or bias.ndim == 1 else self._outputs
        given = _Struct(
            self._weight.data_ptr(),
            self._offset.data_ptr(),
            self._scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            factor.data_ptr(),
            *(pitch, samples, height, width, self._channels, self._outputs),
            *self._struct,
            _Pair(*size),
        )
        threads = torch.get_num_threads()
        self._run(ctypes.byref(given), codes.data_ptr(), y.data_ptr(), int(into is not None), threads)
        return y

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Of the output."""
        found = []
        for i, length in enumerate((height, width)):
            stride, padding, dilation = (pair[i] for pair in self._window)
            found.append((length + 2 * padding - dilation * (self._kernel[i] - 1) - 1) // stride + 1)
        return found[0], found[1]
