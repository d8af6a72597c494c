"""Kernel calls as modules of the rewritten graph: they hold a site's weight and fit torch's layouts to the kernels'.

Images stay [N, C, H, W] for torch with channels innermost in memory, so that a permutation is all that lies between
them and the kernels' [N, H, W, C]. What torch's own operators return in another layout (group_norm on CUDA) is read as
it lies: the quantiser transposes on the way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hqc.kernels import Epilogue, Weight
from hqc.runtimes.cuda.kernel_set import Kernels

__all__ = ["IntegerConv2d", "IntegerLinear", "Quantise"]


class Quantise(nn.Module):
    """x -> codes, channels last: rotation, scaling, rounding and clipping in one pass."""

    def __init__(self, kernels: Kernels, *, low: int, high: int, block: int, image: bool) -> None:
        """image: x is [N, C, H, W] and the codes [N, H, W, C]; else both are [N, …, C]."""
        super().__init__()
        self.low, self.high, self.block, self.image = low, high, block, image
        self._run = kernels.hadamard_quantize

    def forward(self, x: Tensor, inverse_scale: Tensor) -> Tensor:
        """x in float16, bfloat16 or float32, inverse_scale fp32 [N]."""
        options = {"low": self.low, "high": self.high, "block": self.block}
        if not self.image:
            return self._run(x.contiguous(), inverse_scale, **options)
        rows = x.permute(0, 2, 3, 1)
        if rows.is_contiguous():
            return self._run(rows, inverse_scale, **options)
        return self._run(x.contiguous(), inverse_scale, nchw=True, **options)

    def extra_repr(self) -> str:
        """What it prints as."""
        return f"{self.low}…{self.high}, block={self.block}, {'image' if self.image else 'tokens'}"


class _IntegerLayer(nn.Module):
    """A product of codes with a weight, rescaled; then + residual and SiLU where the graph had them next."""

    codes: Tensor
    weight_scale: Tensor
    high: Tensor | None
    bias: Tensor | None

    def __init__(self, kernels: Kernels, weight: Weight, bias: Tensor | None, *, silu: bool) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("high", weight.high)
        self.register_buffer("bias", bias)
        self.rotation, self.high_factor = weight.rotation, weight.high_factor
        self.silu, self.dtype = silu, torch.float32
        self._kernels = kernels

    @property
    def weight(self) -> Weight:
        """As the kernels take it."""
        return Weight(self.codes, self.weight_scale, self.high, self.high_factor, self.rotation)

    def _epilogue(self, residual: Tensor | None) -> Epilogue:
        return Epilogue(self.bias, residual, self.silu, self.dtype)

    def extra_repr(self) -> str:
        """What it prints as."""
        packed = "int4" if self.codes.dtype == torch.uint8 else "int8" if self.high is None else "two digits"
        return f"{packed} {list(self.codes.shape)}, rotation={self.rotation}, silu={self.silu}, {self.dtype}"


class IntegerLinear(_IntegerLayer):
    """codes [N, …, C] -> y [N, …, O]."""

    def forward(self, codes: Tensor, scale: Tensor, residual: Tensor | None = None) -> Tensor:
        """scale fp32 [N]; residual of y's shape and dtype."""
        rest = None if residual is None else residual.contiguous()
        return self._kernels.int_gemm(codes, self.weight, scale, self._epilogue(rest))


class IntegerConv2d(_IntegerLayer):
    """codes [N, H, W, C] -> y [N, O, H', W'], channels innermost in memory."""

    def __init__(
        self,
        kernels: Kernels,
        weight: Weight,
        bias: Tensor | None,
        *,
        silu: bool,
        window: Mapping[str, Sequence[int]],
    ) -> None:
        """window: stride, padding and dilation as (height, width)."""
        super().__init__(kernels, weight, bias, silu=silu)
        self.window: dict[str, Any] = {name: tuple(pair) for name, pair in window.items()}

    def forward(self, codes: Tensor, scale: Tensor, residual: Tensor | None = None) -> Tensor:
        """scale fp32 [N]; residual of y's shape and dtype."""
        rest = None if residual is None else residual.permute(0, 2, 3, 1).contiguous()
        y = self._kernels.int_conv2d(codes, self.weight, scale, self._epilogue(rest), **self.window)
        return y.permute(0, 3, 1, 2)
