"""A site's product by oneDNN: the weight packed once, the scale of a timestep and the bias inside the product.

    one timestep a call     y = (codes·Wᵀ)·(s_w·s) + (bias + shift)            one pass
    several                 y = (codes·Wᵀ)·s_w, then y·s[n] + bias + shift[n]     two

What one int8 weight cannot hold is a sum of products: two digits of a rotated 8-bit weight; halves of one whose
products with its codes could leave int16, where the CPU adds two neighbours in that (x86 without VNNI).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hqc.kernels import Epilogue, Weight
from hqc.ops import half
from hqc.runtimes.integer.cpu import operators
from hqc.runtimes.integer.cpu.operators import ZERO, Window
from hqc.runtimes.integer.cpu.small import SmallProduct, SmallProducts
from hqc.runtimes.integer.layers import Packed

__all__ = ["INT16_LIMIT", "largest_weight", "pack_product", "summands"]

INT16_LIMIT = 2**15 - 1
_FEW = 8_000_000
"""Multiplications of a call of two samples, up to which a product is small."""


@dataclass(frozen=True)
class _Part:
    """One product of the sum: a packed weight and its scale [O]."""

    packed: Tensor
    scale: Tensor


def pack_product(
    weight: Weight,
    reach: int,
    window: Window | None = None,
    size: Sequence[int] = (1, 1),
    small: SmallProducts | None = None,
) -> Packed:
    """The product of codes of at most `reach` with a weight.

    window: of a convolution. size: of the usual image, or of the usual rows of a sample. small: what multiplies where
    there is little to do, if the CPU has it.

    (codes u8, scale fp32 [N], epilogue) -> float32, channels last; `upsample` of a convolution repeats each pixel.
    """
    if small is not None and small.takes(weight.codes) and _multiplications(weight.codes, window, size) <= _FEW:
        digits = [(weight.codes, 1)] + ([] if weight.high is None else [(weight.high, weight.high_factor)])
        return _Small(tuple(small.pack(codes, weight.scale * factor, window) for codes, factor in digits))
    pointwise = window is None or _is_pointwise(weight.codes, window)
    taken = None if pointwise else window
    parts = []
    for codes, factor in summands(weight, reach):
        scale = (weight.scale * factor).contiguous()
        parts.append(_Part(_packed(codes, scale, taken, size), scale))
    return _Product(tuple(parts), taken)


def largest_weight(reach: int) -> int:
    """Of one product whose neighbours are added in int16, for codes of at most `reach`.

    >>> largest_weight(7), largest_weight(127)
    (121, 64)
    """
    return min(127, INT16_LIMIT // (2 * (ZERO + reach)))


def summands(weight: Weight, reach: int, *, in_int16: bool | None = None) -> list[tuple[Tensor, int]]:
    """int8 weights with the factor of each, whose sum the weight is; see the module."""
    digits = [(weight.codes, 1)] + ([] if weight.high is None else [(weight.high, weight.high_factor)])
    if not (operators.adds_in_int16() if in_int16 is None else in_int16):
        return digits
    limit, found = largest_weight(reach), list[tuple[Tensor, int]]()
    for codes, factor in digits:
        low, high = (int(bound) for bound in codes.aminmax())
        fits = max(-low, high) <= limit
        found += [(codes, factor)] if fits else [(half(codes, index), factor) for index in (0, 1)]
    return found


def _multiplications(codes: Tensor, window: Window | None, size: Sequence[int]) -> int:
    """Of a call of two samples."""
    stride = (1, 1) if window is None else window[0]
    places = math.prod(size) // math.prod(stride)
    return 2 * places * codes.numel()


def _is_pointwise(codes: Tensor, window: Window) -> bool:
    """Whether a convolution is a linear layer of every pixel."""
    stride, padding, _ = window
    return tuple(codes.shape[1:3]) == (1, 1) and set(stride) == {1} and set(padding) == {0}


def _packed(codes: Tensor, scale: Tensor, window: Window | None, size: Sequence[int]) -> Tensor:
    if window is None:
        return operators.pack_linear(codes.flatten(1))
    return operators.pack_convolution(codes.permute(0, 3, 1, 2).contiguous(), scale, window, size)


class _Small:
    """A small product, each sample with its own scale and shift in one pass."""

    def __init__(self, parts: tuple[SmallProduct, ...]) -> None:
        self._parts = parts

    @property
    def terms(self) -> int:
        """How many products are added."""
        return len(self._parts)

    def __call__(self, codes: Tensor, scale: Tensor, epilogue: Epilogue, upsample: int = 1) -> Tensor:
        """See `pack_product`."""
        codes = codes if upsample == 1 else _enlarged(codes, upsample)
        bias = epilogue.bias if epilogue.shift is None else _sum(epilogue.shift, epilogue.bias)
        first, *others = self._parts
        y = first(codes, scale, bias)
        for part in others:
            part(codes, scale, None, y)
        return _finished(y, epilogue)


def _sum(shift: Tensor, bias: Tensor | None) -> Tensor:
    return shift.contiguous() if bias is None else shift + bias


def _finished(y: Tensor, epilogue: Epilogue) -> Tensor:
    if epilogue.residual is not None:
        y.add_(epilogue.residual)
    return functional.silu(y, inplace=True) if epilogue.silu else y


class _Product:
    """Packed weights in oneDNN's operators."""

    def __init__(self, parts: tuple[_Part, ...], window: Window | None) -> None:
        self._parts, self._window = parts, window

    @property
    def terms(self) -> int:
        """How many products are added."""
        return len(self._parts)

    def __call__(self, codes: Tensor, scale: Tensor, epilogue: Epilogue, upsample: int = 1) -> Tensor:
        """See `pack_product`."""
        codes = codes if upsample == 1 else _enlarged(codes, upsample)
        bias = _bias(epilogue)
        factors = scale.tolist()
        if all(factor == factors[0] for factor in factors) and (bias is None or bias.ndim == 1):
            y = self._sum(codes, factors[0], bias)
        else:
            y = self._sum(codes, 1.0, None)
            y = _per_sample(y, scale, bias)
        return _finished(y, epilogue)

    def _sum(self, codes: Tensor, factor: float, bias: Tensor | None) -> Tensor:
        first, *others = self._parts
        y = self._run(codes, first, factor, bias)
        for part in others:
            y.add_(self._run(codes, part, factor, None))
        return y

    def _run(self, codes: Tensor, part: _Part, factor: float, bias: Tensor | None) -> Tensor:
        if self._window is None:
            return operators.multiply(codes, part.packed, part.scale, factor, bias)
        return operators.convolve(codes, part.packed, part.scale, factor, bias, self._window)


def _bias(epilogue: Epilogue) -> Tensor | None:
    """bias [O], or bias + shift [N, O] where samples differ."""
    shift = epilogue.shift
    if shift is None:
        return epilogue.bias
    if len(shift) == 1 or torch.equal(shift[:1].expand_as(shift), shift):
        shift = shift[0]
    return _sum(shift, epilogue.bias)


def _per_sample(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y·scale[n] + bias in one pass, in place."""
    factors = scale.view(-1, *[1] * (y.ndim - 1))
    if bias is None:
        return y.mul_(factors)
    places = bias if bias.ndim == 1 else bias.view(len(bias), *[1] * (y.ndim - 2), -1)
    return torch.addcmul(places, y, factors, out=y)


def _enlarged(codes: Tensor, factor: int) -> Tensor:
    """Every pixel of [N, H, W, C] `factor` times along both axes."""
    n, h, w, c = codes.shape
    return codes[:, :, None, :, None].expand(n, h, factor, w, factor, c).reshape(n, h * factor, w * factor, c)
