"""A site's product by oneDNN: the weight packed once, the scale of a timestep and the bias inside the product.

    one timestep a call     y = (codes·Wᵀ)·(s_w·s) + (bias + shift)            one pass
    several                 y = (codes·Wᵀ)·s_w, then y·s[n] + bias + shift[n]     two

What one int8 weight cannot hold is a sum of products: two digits of a rotated 8-bit weight; halves of one whose
products with its codes could leave int16, where the CPU adds two neighbours in that (x86 without VNNI).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hqc.kernels import Epilogue, Weight
from hqc.ops import half
from hqc.runtimes.integer.cpu import operators
from hqc.runtimes.integer.cpu.operators import INT16_LIMIT, ZERO, Window, output_size
from hqc.runtimes.integer.cpu.own import OwnProduct, OwnProducts
from hqc.runtimes.integer.cpu.steps import recorder
from hqc.runtimes.integer.layers import Packed

__all__ = ["LaterProduct", "OwnSum", "largest_weight", "pack_product", "summands"]

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
    own: OwnProducts | None = None,
) -> Packed:
    """The product of codes of at most `reach` with a weight.

    window: of a convolution. size: of the usual image, or of the usual rows of a sample. own: what multiplies
    where there is little to do, and everywhere on a CPU without VNNI, if it has products for the CPU.

    (codes u8, scale fp32 [N], epilogue) -> float32, channels last; `upsample` of a convolution repeats each pixel.
    """
    everywhere = own is not None and own.in_int16 and operators.adds_in_int16()  # AVX-VNNI alone: oneDNN's are exact
    if own is not None and own.there and (everywhere or _multiplications(weight.codes, window, size) <= _FEW):
        digits = summands(weight, reach, fits=lambda codes: own.group(reach, codes) > 0)
        return OwnSum(tuple(own.pack(codes, weight.scale * factor, reach, window) for codes, factor in digits))
    pointwise = window is None or _is_pointwise(weight.codes, window)
    taken = None if pointwise else window
    parts = []
    for codes, factor in summands(weight, reach):
        scale = (weight.scale * factor).contiguous()
        parts.append(_Part(_packed(codes, scale, taken, size), scale))
    return OneDnnProduct(tuple(parts), taken, weight.codes.shape[1:-1])


def largest_weight(reach: int) -> int:
    """Of one product whose neighbours are added in int16, for codes of at most `reach`.

    >>> largest_weight(7), largest_weight(127)
    (121, 64)
    """
    return min(127, INT16_LIMIT // (2 * (ZERO + reach)))


def summands(weight: Weight, reach: int, *, fits: Callable[[Tensor], bool] | None = None) -> list[tuple[Tensor, int]]:
    """int8 weights with the factor of each, whose sum the weight is; see the module.

    fits: whether a weight is one product; None: as oneDNN adds here.
    """
    digits = [(weight.codes, 1)] + ([] if weight.high is None else [(weight.high, weight.high_factor)])
    fits = fits or partial(_fits, limit=largest_weight(reach) if operators.adds_in_int16() else ZERO)
    found = list[tuple[Tensor, int]]()
    for codes, factor in digits:
        found += [(codes, factor)] if fits(codes) else [(half(codes, index), factor) for index in (0, 1)]
    return found


def _fits(codes: Tensor, limit: int) -> bool:
    low, high = (int(bound) for bound in codes.aminmax())
    return max(-low, high) <= limit


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


class OwnSum:
    """Products of our own, each sample with its own scale and shift in one pass."""

    def __init__(self, parts: tuple[OwnProduct, ...]) -> None:
        self._parts = parts

    @property
    def terms(self) -> int:
        """How many products are added."""
        return len(self._parts)

    def __call__(self, codes: Tensor, scale: Tensor, epilogue: Epilogue, upsample: int = 1) -> Tensor:
        """See `pack_product`; bias and shift come with the first product, residual and SiLU with the last."""
        y: Tensor | None = None
        for part in self._parts:
            first, last = part is self._parts[0], part is self._parts[-1]
            own = replace(
                epilogue,
                bias=epilogue.bias if first else None,
                shift=epilogue.shift if first else None,
                residual=epilogue.residual if last else None,
                silu=epilogue.silu and last,
            )
            y = part(codes, scale, own, into=y, upsample=upsample)
        assert y is not None
        return y


class OneDnnProduct:
    """Packed weights in oneDNN's operators."""

    def __init__(self, parts: tuple[_Part, ...], window: Window | None, kernel: Sequence[int]) -> None:
        """kernel: height and width of a convolution's."""
        self._parts, self._window, self._kernel = parts, window, kernel

    @property
    def terms(self) -> int:
        """How many products are added."""
        return len(self._parts)

    def __call__(self, codes: Tensor, scale: Tensor, epilogue: Epilogue, upsample: int = 1) -> Tensor:
        """See `pack_product`."""
        taker = recorder()
        if taker is not None:
            y = torch.empty((*self._places(codes.shape, upsample), len(self._parts[0].scale)), device=codes.device)
            given = (codes, scale, epilogue.bias, epilogue.residual, epilogue.shift)
            taker.shares_threads = True
            taker.call(LaterProduct(self, epilogue.silu, upsample), given, {}, y)
            return y
        codes = codes if upsample == 1 else _enlarged(codes, upsample)
        bias = _bias(epilogue)
        factors = scale.tolist()
        if all(factor == factors[0] for factor in factors) and (bias is None or bias.ndim == 1):
            y = self._sum(codes, factors[0], bias)
        else:
            y = self._sum(codes, 1.0, None)
            y = _per_sample(y, scale, bias)
        if epilogue.residual is not None:
            y.add_(epilogue.residual)
        return functional.silu(y, inplace=True) if epilogue.silu else y

    @property
    def name(self) -> str:
        """What it is, and whose."""
        return "linear layers, oneDNN" if self._window is None else "convolutions, oneDNN"

    def multiplications(self, shape: Sequence[int], upsample: int) -> int:
        """Of a call with codes of that shape."""
        sums = math.prod(self._places(shape, upsample)) * len(self._parts[0].scale)
        return sums * math.prod(self._kernel) * shape[-1] * self.terms

    def _places(self, shape: Sequence[int], upsample: int) -> Sequence[int]:
        """Of the output: samples, and height and width of an image."""
        samples, *places = shape[:-1]
        if self._window is None:
            return samples, *places
        size = [length * upsample for length in places]
        return samples, *output_size(size, self._kernel, self._window)

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


@dataclass(frozen=True)
class LaterProduct:
    """A call of a product as a recording holds it."""

    product: OneDnnProduct
    silu: bool
    upsample: int

    def __call__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        """The product of the tensors at hand."""
        return self.product(codes, scale, Epilogue(bias, residual, self.silu, torch.float32, shift), self.upsample)


def _bias(epilogue: Epilogue) -> Tensor | None:
    """bias [O], or bias + shift [N, O] where samples differ."""
    shift = epilogue.shift
    if shift is None:
        return epilogue.bias
    if len(shift) == 1 or torch.equal(shift[:1].expand_as(shift), shift):
        shift = shift[0]
    return shift.contiguous() if epilogue.bias is None else shift + epilogue.bias


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
