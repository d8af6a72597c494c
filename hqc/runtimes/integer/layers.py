"""Kernel calls as modules of the rewritten graph: they hold a site's weight and fit torch's layouts to the kernels'.

Images stay [N, C, H, W] for torch with channels innermost in memory, so that a permutation is all that lies between
them and the kernels' [N, H, W, C]. What torch's own operators return in another layout (a float convolution whose
weight is not channels-last) is read as it lies: the plain quantiser transposes on the way, a norm copies.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from hqc.kernels import Epilogue, GroupNorm, LayerNorm, Quantiser, Weight
from hqc.kernels.guards import row_pitch
from hqc.runtimes.integer.kernel_set import Kernels

__all__ = [
    "Codes",
    "GateQuantise",
    "GroupNormQuantise",
    "IntegerConv2d",
    "IntegerLayer",
    "IntegerLinear",
    "KernelCall",
    "LayerNormQuantise",
    "Packed",
    "Quantise",
]


class Packed(Protocol):
    """A product that holds its weight in the kernels' own form, as a sum of `terms` products."""

    @property
    def terms(self) -> int:
        """How many products are added."""
        ...

    def __call__(self, codes: Tensor, scale: Tensor, epilogue: Epilogue, upsample: int = 1) -> Tensor:
        """As `hqc.kernels.int_gemm` and `int_conv2d`."""
        ...


class Codes(nn.Module):
    """How a tensor becomes codes: bounds, order and kind of the rotation; the scale is an argument of each call.

    low and high None: the bounds are looked up, and the scale brings them along, see `hqc.kernels.Quantiser`.
    """

    def __init__(self, *, low: int | None, high: int | None, block: int, regular: bool = False) -> None:
        super().__init__()
        self.low, self.high, self.block, self.regular = low, high, block, regular

    def quantiser(self, inverse_scale: Tensor) -> Quantiser:
        """As the kernels take it."""
        return Quantiser(inverse_scale, self.low, self.high, self.block, self.regular)

    def extra_repr(self) -> str:
        """What it prints as."""
        span = "looked up" if self.low is None else f"{self.low}…{self.high}"
        return f"{span}, block={self.block}{' regular' if self.regular else ''}"


class KernelCall(nn.Module):
    """One call of a kernel. activations: which positional arguments and keywords are floats that run in half."""

    activations: ClassVar[tuple[int | str, ...]] = (0,)

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels


class Quantise(KernelCall):
    """x -> codes, channels last: rotation, scaling, rounding and clipping in one pass."""

    activations = (0, "second")

    def __init__(self, kernels: Kernels, codes: Codes, *, image: bool) -> None:
        """image: x is [N, C, H, W] and the codes [N, H, W, C]; else both are [N, …, C]."""
        super().__init__(kernels)
        self.codes, self.image = codes, image

    def forward(self, x: Tensor, inverse_scale: Tensor, second: Tensor | None = None) -> Tensor:
        """x in float16, bfloat16 or float32; inverse_scale as in `hqc.kernels.Quantiser`; second: the rest of x."""
        how = {name: getattr(self.codes, name) for name in ("low", "high", "block", "regular")}
        run = self.kernels.hadamard_quantize
        if not self.image:
            return run(_close_rows(x), inverse_scale, **how)
        rows = x.permute(0, 2, 3, 1)
        if second is not None:
            return run(rows.contiguous(), inverse_scale, second=second.permute(0, 2, 3, 1).contiguous(), **how)
        if rows.is_contiguous():
            return run(rows, inverse_scale, **how)
        return run(x.contiguous(), inverse_scale, nchw=True, **how)

    def extra_repr(self) -> str:
        """What it prints as."""
        return "image" if self.image else "tokens"


class GroupNormQuantise(KernelCall):
    """x [N, C, H, W] -> group norm, SiLU, codes [N, H, W, C]; the floats as well, or alone, channels innermost.

    beside: codes of x itself as well, for what reads it around the norm.
    """

    activations = (0, "second")

    def __init__(self, kernels: Kernels, norm: GroupNorm, codes: Codes | None, *, keep: bool) -> None:
        """codes: None for floats alone. keep: (codes, floats)."""
        super().__init__(kernels)
        self.register_buffer("weight", norm.weight)
        self.register_buffer("bias", norm.bias)
        self.groups, self.eps, self.silu = norm.groups, norm.eps, norm.silu
        self.codes, self.keep = codes, keep
        self.beside: Codes | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a call gives: a tuple in this order, or what there is alone."""
        there = {"codes": self.codes is not None, "floats": self.keep or self.codes is None}
        return tuple(name for name, given in {**there, "beside": self.beside is not None}.items() if given)

    def forward(
        self,
        x: Tensor,
        inverse_scale: Tensor | None = None,
        second: Tensor | None = None,
        statistics: Any = None,
        second_statistics: Any = None,
        beside_scale: Tensor | None = None,
    ) -> Any:
        """inverse_scale, beside_scale fp32 [N]; second: the rest of x's channels; statistics: of x and of second."""
        norm = GroupNorm(self.groups, self.eps, self.weight, self.bias, self.silu)  # type: ignore[arg-type]
        found = self.kernels.group_norm_quantize(
            x.permute(0, 2, 3, 1).contiguous(),
            norm,
            None if self.codes is None or inverse_scale is None else self.codes.quantiser(inverse_scale),
            second=None if second is None else second.permute(0, 2, 3, 1).contiguous(),
            statistics=statistics,
            second_statistics=second_statistics,
            keep=self.keep,
            beside=None if self.beside is None or beside_scale is None else self.beside.quantiser(beside_scale),
        )
        codes, y, beside = found
        results = {"codes": codes, "floats": None if y is None else y.permute(0, 3, 1, 2), "beside": beside}
        given = tuple(results[name] for name in self.outputs)
        return given if len(given) > 1 else given[0]

    def extra_repr(self) -> str:
        """What it prints as."""
        return f"groups={self.groups}, silu={self.silu}, keep={self.keep}"


class LayerNormQuantise(KernelCall):
    """x [N, …, C] -> layer norm, codes [N, …, C]; the floats as well where somebody else reads them."""

    def __init__(self, kernels: Kernels, norm: LayerNorm, codes: Codes, *, keep: bool) -> None:
        """keep: (codes, floats)."""
        super().__init__(kernels)
        self.register_buffer("weight", norm.weight)
        self.register_buffer("bias", norm.bias)
        self.eps, self.codes, self.keep = norm.eps, codes, keep

    def forward(self, x: Tensor, inverse_scale: Tensor) -> Any:
        """inverse_scale fp32 [N]."""
        norm = LayerNorm(self.eps, self.weight, self.bias)  # type: ignore[arg-type]
        quantiser = self.codes.quantiser(inverse_scale)
        codes, y = self.kernels.layer_norm_quantize(x.contiguous(), norm, quantiser, keep=self.keep)
        return (codes, y) if self.keep else codes

    def extra_repr(self) -> str:
        """What it prints as."""
        return f"keep={self.keep}"


class GateQuantise(KernelCall):
    """x [N, …, 2·C] -> codes of a·f(g), or x [N, …, C] -> codes of f(x)."""

    def __init__(self, kernels: Kernels, codes: Codes, *, kind: str, gated: bool) -> None:
        """kind: the activation f."""
        super().__init__(kernels)
        self.codes, self.kind, self.gated = codes, kind, gated

    def forward(self, x: Tensor, inverse_scale: Tensor) -> Tensor:
        """inverse_scale fp32 [N]."""
        quantiser = self.codes.quantiser(inverse_scale)
        return self.kernels.gate_quantize(x.contiguous(), quantiser, kind=self.kind, gated=self.gated)

    def extra_repr(self) -> str:
        """What it prints as."""
        return f"{self.kind}, gated={self.gated}"


class IntegerLayer(KernelCall):
    """A product of codes with a weight, rescaled, then what the graph had next: see `hqc.kernels.Epilogue`.

    reach: the largest code that it is given. window: of a convolution. size: of the image that it usually reads, or of
    the rows of a sample.
    """

    activations = ()
    window: Mapping[str, Sequence[int]] | None = None

    codes: Tensor
    weight_scale: Tensor
    high: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        kernels: Kernels,
        weight: Weight,
        bias: Tensor | None,
        *,
        silu: bool,
        reach: int = 127,
        size: Sequence[int] = (),
    ) -> None:
        super().__init__(kernels)
        self.silu, self.dtype, self.reach, self.size = silu, torch.float32, reach, size
        self.gate, self.quantised, self.statistics = "none", None, False
        self.packed: Packed | None = None
        self.set_weight(weight, bias)

    gate: str
    quantised: Codes | None
    statistics: bool

    def set_weight(self, weight: Weight, bias: Tensor | None) -> None:
        """Holds another weight."""
        self.register_buffer("codes", weight.codes)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("high", weight.high)
        self.register_buffer("bias", bias)
        self.rotation, self.regular, self.high_factor = weight.rotation, weight.regular, weight.high_factor

    @property
    def weight(self) -> Weight:
        """As the kernels take it."""
        return Weight(self.codes, self.weight_scale, self.high, self.high_factor, self.rotation, self.regular)

    def pack(self) -> None:
        """From now on the product is the kernels' own, where they have one; its weight is held once."""
        if self.kernels.pack is None:
            return
        self.packed = self.kernels.pack(self.weight, self.reach, self.window, self.size)
        self.codes, self.high = self.codes.new_empty(0), None

    def _epilogue(self, residual: Tensor | None, shift: Tensor | None, inverse_scale: Tensor | None) -> Epilogue:
        quantiser = None
        if self.quantised is not None and inverse_scale is not None:
            quantiser = self.quantised.quantiser(inverse_scale)
        return Epilogue(self.bias, residual, self.silu, self.dtype, shift, self.gate, quantiser)

    def extra_repr(self) -> str:
        """What it prints as."""
        packed = "int4" if self.codes.dtype == torch.uint8 else "int8" if self.high is None else "two digits"
        after = [f"gate={self.gate}"] if self.gate != "none" else []
        after += ["statistics"] if self.statistics else []
        rotation = f"rotation={self.rotation}{' regular' if self.regular else ''}"
        shape = f"{packed} {list(self.codes.shape)}, {rotation}, silu={self.silu}, {self.dtype}"
        return ", ".join([shape, *after])


class IntegerLinear(IntegerLayer):
    """codes [N, …, C] -> y [N, …, O]."""

    def forward(
        self,
        codes: Tensor,
        scale: Tensor,
        residual: Tensor | None = None,
        shift: Tensor | None = None,
        inverse_scale: Tensor | None = None,
    ) -> Any:
        """scale fp32 [N]; residual of y's shape and dtype; shift [N, O]; inverse_scale fp32 [N] of the codes of y."""
        rest = None if residual is None else residual.contiguous()
        if self.packed is not None:
            return self.packed(codes, scale, self._epilogue(rest, shift, inverse_scale))
        run = self.kernels.int_gemm_statistics if self.statistics else self.kernels.int_gemm
        return run(codes, self.weight, scale, self._epilogue(rest, shift, inverse_scale))


class IntegerConv2d(IntegerLayer):
    """codes [N, H, W, C] -> y [N, O, H', W'], channels innermost in memory; or its codes [N, H', W', O]."""

    def __init__(
        self,
        kernels: Kernels,
        weight: Weight,
        bias: Tensor | None,
        *,
        silu: bool,
        window: Mapping[str, Sequence[int]],
        reach: int = 127,
        size: Sequence[int] = (),
    ) -> None:
        """window: stride, padding and dilation as (height, width)."""
        super().__init__(kernels, weight, bias, silu=silu, reach=reach, size=size)
        self.window: dict[str, Any] = {name: tuple(pair) for name, pair in window.items()}
        self.upsample = 1

    def forward(
        self,
        codes: Tensor,
        scale: Tensor,
        residual: Tensor | None = None,
        shift: Tensor | None = None,
        inverse_scale: Tensor | None = None,
    ) -> Any:
        """scale fp32 [N]; residual of y's shape and dtype; shift [N, O]; inverse_scale fp32 [N] of the codes of y."""
        rest = None if residual is None else residual.permute(0, 2, 3, 1).contiguous()
        epilogue, window = self._epilogue(rest, shift, inverse_scale), {**self.window, "upsample": self.upsample}
        if self.packed is not None:
            return self.packed(codes, scale, epilogue, self.upsample).permute(0, 3, 1, 2)
        if self.statistics:
            y, statistics = self.kernels.int_conv2d_statistics(codes, self.weight, scale, epilogue, **window)
            return y.permute(0, 3, 1, 2), statistics
        y = self.kernels.int_conv2d(codes, self.weight, scale, epilogue, **window)
        return y if self.quantised is not None else y.permute(0, 3, 1, 2)


def _close_rows(x: Tensor) -> Tensor:
    """x itself if its rows are whole and one pitch apart, else a copy."""
    return x if x.is_contiguous() or row_pitch(x) else x.contiguous()
