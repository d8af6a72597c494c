"""The compiled passes with the signatures of `hqc.kernels`; codes are u8, code + 128."""

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hqc.kernels import GroupNorm, LayerNorm, Quantiser
from hqc.kernels.guards import row_pitch

__all__ = ["NativePasses"]

_ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
_Pointer, _Size, _Int, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Quantiser(ctypes.Structure):
    _fields_ = (
        ("inverse", _Pointer),
        ("low", _Pointer),
        ("high", _Pointer),
        ("block", _Int),
        ("regular", _Int),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("x", _Pointer),
        ("second", _Pointer),
        ("first", _Size),
        ("pitch", _Size),
        ("second_pitch", _Size),
        ("channels", _Size),
    )


class NativePasses:
    """The functions of one library."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        """functions: of `compiler.compiled_passes`."""
        where = [_Pointer, _Size, _Size]
        self._quantise = _typed(functions.hqc_quantise, [*where, _Pointer, _Pointer, _Int])
        norm = [*where, _Int, _Float, _Pointer, _Pointer, _Int, *[_Pointer] * 5, _Int]
        self._group_norm = _typed(functions.hqc_group_norm, norm)
        self._layer_norm = _typed(functions.hqc_layer_norm, [*where, _Float, *[_Pointer] * 5, _Int])
        self._gate = _typed(functions.hqc_gate, [*where, _Int, _Int, _Pointer, _Pointer, _Int])

    def hadamard_quantize(
        self,
        x: Tensor,
        inverse_scale: Tensor,
        *,
        low: int | None,
        high: int | None,
        block: int = 1,
        regular: bool = False,
        nchw: bool = False,
        second: Tensor | None = None,
    ) -> Tensor:
        """See `hqc.kernels`."""
        rows = _Matrix(x.permute(0, 2, 3, 1) if nchw else x, second)
        codes = rows.codes()
        quantiser = _Codes(Quantiser(inverse_scale, low, high, block, regular), rows.samples)
        self._quantise(*rows.arguments, quantiser.address, codes.data_ptr(), torch.get_num_threads())
        return codes

    def group_norm_quantize(
        self,
        x: Tensor,
        norm: GroupNorm,
        quantiser: Quantiser | None,
        *,
        second: Tensor | None = None,
        statistics: None = None,
        second_statistics: None = None,
        keep: bool = False,
        beside: Quantiser | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `hqc.kernels`; statistics are taken here."""
        rows = _Matrix(x, second)
        own, other = _Codes(quantiser, rows.samples), _Codes(beside, rows.samples)
        codes, others = (rows.codes() if q is not None else None for q in (quantiser, beside))
        floats = torch.empty(rows.shape) if keep or quantiser is None else None
        affine = (_address(norm.weight), _address(norm.bias), int(norm.silu))
        written = (own.address, _address(codes), _address(floats), other.address, _address(others))
        self._group_norm(*rows.arguments, norm.groups, norm.eps, *affine, *written, torch.get_num_threads())
        return codes, floats, others

    def layer_norm_quantize(
        self, x: Tensor, norm: LayerNorm, quantiser: Quantiser, *, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `hqc.kernels`."""
        rows = _Matrix(x)
        own, codes = _Codes(quantiser, rows.samples), rows.codes()
        floats = torch.empty(rows.shape) if keep else None
        affine, written = (_address(norm.weight), _address(norm.bias)), (_address(codes), _address(floats))
        self._layer_norm(*rows.arguments, norm.eps, *affine, own.address, *written, torch.get_num_threads())
        return codes, floats

    def gate_quantize(self, x: Tensor, quantiser: Quantiser, *, kind: str, gated: bool) -> Tensor:
        """See `hqc.kernels`."""
        rows = _Matrix(x)
        own, codes = _Codes(quantiser, rows.samples), rows.codes(2 if gated else 1)
        how = (_ACTIVATIONS[kind], int(gated))
        self._gate(*rows.arguments, *how, own.address, codes.data_ptr(), torch.get_num_threads())
        return codes


class _Matrix:
    """Rows [N, …, C] of one tensor, or of two side by side; what they point at is kept alive with it."""

    def __init__(self, x: Tensor, second: Tensor | None = None) -> None:
        self._parts = [_in_rows(part) for part in (x, second) if part is not None]
        (first, pitch), (rest, rest_pitch) = self._parts[0], self._parts[1] if second is not None else (None, 0)
        *places, width = first.shape
        self.samples = places[0]
        self.shape = (*places, width if rest is None else width + rest.shape[-1])
        pixels = first.numel() // max(self.samples * width, 1)
        self._rows = _Rows(first.data_ptr(), _address(rest), width, pitch, rest_pitch, self.shape[-1])
        self.arguments = (ctypes.byref(self._rows), self.samples, pixels)

    def codes(self, share: int = 1) -> Tensor:
        """Room for those of every row, or of a part of its channels."""
        return torch.empty((*self.shape[:-1], self.shape[-1] // share), dtype=torch.uint8)


class _Codes:
    """A quantiser as the library reads it; what it points at is kept alive with it."""

    def __init__(self, quantiser: Quantiser | None, samples: int) -> None:
        self.address: Any = None
        if quantiser is None:
            return
        if quantiser.low is None or quantiser.high is None:
            self._steps = quantiser.inverse_scale.t().contiguous()
            inverse, low, high = (row.data_ptr() for row in self._steps)
        else:
            self._steps = quantiser.inverse_scale.contiguous()
            self._bounds = _repeated(quantiser.low, samples), _repeated(quantiser.high, samples)
            inverse, (low, high) = self._steps.data_ptr(), (bound.data_ptr() for bound in self._bounds)
        self._quantiser = _Quantiser(inverse, low, high, quantiser.block, int(quantiser.regular))
        self.address = ctypes.byref(self._quantiser)


@lru_cache(maxsize=256)
def _repeated(bound: int, samples: int) -> Tensor:
    return torch.full((samples,), float(bound))


def _in_rows(x: Tensor) -> tuple[Tensor, int]:
    """x and the numbers between the starts of its rows, all of them one pitch apart."""
    x = x if x.dtype == torch.float32 else x.to(torch.float32)
    if x.is_contiguous():
        return x, x.shape[-1]
    pitch = row_pitch(x)
    return (x, pitch) if pitch else (x.contiguous(), x.shape[-1])


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _typed(function: Any, arguments: list[Any]) -> Any:
    function.argtypes, function.restype = arguments, None
    return function
