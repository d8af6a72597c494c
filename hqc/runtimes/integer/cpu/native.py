"""The compiled passes with the signatures of `hqc.kernels`; codes are u8, code + 128."""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from hqc.kernels import GroupNorm, LayerNorm, Quantiser
from hqc.kernels.guards import row_pitch
from hqc.runtimes.integer.cpu import steps
from hqc.runtimes.integer.cpu.steps import QuantiserFields, RowsFields, address, run_step

__all__ = ["NativePasses"]

_ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}


class NativePasses:
    """The functions of one library."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        """functions: of `compiler.compiled_passes`."""
        self._functions = steps.load_steps(functions)

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
        quantiser = _quantiser(Quantiser(inverse_scale, low, high, block, regular))
        run_step(self._functions, steps.Quantise(rows.fields, quantiser, address(codes)))
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
        codes, others = (rows.codes() if q is not None else None for q in (quantiser, beside))
        floats = rows.floats() if keep or quantiser is None else None
        given = (rows.fields, _quantiser(quantiser), _quantiser(beside))
        pointers = map(address, (norm.weight, norm.bias, codes, floats, others))
        run_step(self._functions, steps.GroupNormFields(*given, *pointers, norm.groups, int(norm.silu), norm.eps))
        return codes, floats, others

    def layer_norm_quantize(
        self, x: Tensor, norm: LayerNorm, quantiser: Quantiser, *, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `hqc.kernels`."""
        rows = _Matrix(x)
        codes, floats = rows.codes(), rows.floats() if keep else None
        pointers = map(address, (norm.weight, norm.bias, codes, floats))
        run_step(self._functions, steps.LayerNormFields(rows.fields, _quantiser(quantiser), *pointers, norm.eps))
        return codes, floats

    def gate_quantize(self, x: Tensor, quantiser: Quantiser, *, kind: str, gated: bool) -> Tensor:
        """See `hqc.kernels`."""
        rows = _Matrix(x)
        codes = rows.codes(2 if gated else 1)
        how = (_ACTIVATIONS[kind], int(gated))
        run_step(self._functions, steps.Gate(rows.fields, _quantiser(quantiser), address(codes), *how))
        return codes


class _Matrix:
    """Rows [N, …, C] of one tensor, or of two side by side; what they point at is kept alive with it."""

    def __init__(self, x: Tensor, second: Tensor | None = None) -> None:
        self._parts = [_in_rows(part) for part in (x, second) if part is not None]
        (first, pitch), (rest, rest_pitch) = self._parts[0], self._parts[1] if second is not None else (None, 0)
        *places, width = first.shape
        samples = places[0]
        self.shape = (*places, width if rest is None else width + rest.shape[-1])
        pixels = first.numel() // max(samples * width, 1)
        sizes = (width, pitch, rest_pitch, self.shape[-1], samples, pixels)
        self.fields = RowsFields(address(first), address(rest), *sizes)

    def codes(self, share: int = 1) -> Tensor:
        """Room for those of every row, or of a part of its channels."""
        shape = (*self.shape[:-1], self.shape[-1] // share)
        return torch.empty(shape, dtype=torch.uint8, device=self._parts[0][0].device)

    def floats(self) -> Tensor:
        """Room for as many numbers."""
        return torch.empty(self.shape, device=self._parts[0][0].device)


def _quantiser(quantiser: Quantiser | None) -> QuantiserFields:
    """A quantiser as the library reads it; all zero for none. Its tensor is the caller's to keep."""
    if quantiser is None:
        return QuantiserFields()
    inverse, pitch = quantiser.inverse_scale, quantiser.inverse_scale.stride(0)
    how = (quantiser.block, int(quantiser.regular))
    if quantiser.low is None or quantiser.high is None:
        return QuantiserFields(*(address(inverse[:, i]) for i in range(3)), pitch, pitch, *how)
    bounds = (address(_number(bound)) for bound in (quantiser.low, quantiser.high))
    return QuantiserFields(address(inverse), *bounds, pitch, 0, *how)


@lru_cache(maxsize=1024)
def _number(bound: int) -> Tensor:
    """Codes have eight bits, so that none is ever dropped while the library reads it."""
    return torch.full((1,), float(bound))


def _in_rows(x: Tensor) -> tuple[Tensor, int]:
    """x and the numbers between the starts of its rows, all of them one pitch apart."""
    x = x if x.dtype == torch.float32 else x.to(torch.float32)
    if x.is_contiguous():
        return x, x.shape[-1]
    pitch = row_pitch(x)
    return (x, pitch) if pitch else (x.contiguous(), x.shape[-1])
