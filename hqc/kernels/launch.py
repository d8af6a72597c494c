"""The integer products as functions of torch tensors: they check, choose tiles, and launch.

On a CUDA device the kernels are compiled on first use; with TRITON_INTERPRET=1 in the environment before triton is
imported they are interpreted on the CPU, slowly, for tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hqc.errors import KernelError
from hqc.kernels.guards import check_devices, check_tensor, check_total
from hqc.kernels.launching import kernel_options, launch_kernel, output_tensor
from hqc.kernels.operands import ColumnStatistics, Epilogue, Weight, check_epilogue, check_weight, weight_form
from hqc.kernels.options import ConvOptions, GemmOptions, SumOptions
from hqc.kernels.quantisers import column_statistics
from hqc.kernels.tuning import chosen_tile

__all__ = ["int_conv2d", "int_conv2d_statistics", "int_gemm", "int_gemm_statistics"]

_PLAIN = Epilogue()


def int_gemm(
    codes: Tensor, weight: Weight, scale: Tensor, epilogue: Epilogue = _PLAIN, *, out: Tensor | None = None
) -> Tensor:
    """y[m, o] = acc[m, o]·weight.scale[o]·scale[n] + bias[o] + shift[n, o] + residual[m, o], then SiLU, gate, codes.

    acc = codes·weightᵀ in int32; codes int8 […, C] of N samples of equally many rows, scale fp32 [N] -> […, O] in the
    epilogue's dtype, half as many with a gate, int8 with a quantiser.
    The caller has checked that Σ|codes·weight| stays below 2^31.

    Raises:
        KernelError: for shapes, dtypes or devices that the kernel does not take.
        RuntimeMissingError: if triton is missing.
    """
    return _gemm(codes, weight, scale, epilogue, out=out)[0]


def int_gemm_statistics(
    codes: Tensor, weight: Weight, scale: Tensor, epilogue: Epilogue = _PLAIN
) -> tuple[Tensor, ColumnStatistics]:
    """`int_gemm` and the statistics of its float output, which a group norm reads next."""
    out, statistics = _gemm(codes, weight, scale, epilogue, statistics=True)
    assert statistics is not None
    return out, statistics


def int_conv2d(
    codes: Tensor,
    weight: Weight,
    scale: Tensor,
    epilogue: Epilogue = _PLAIN,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    upsample: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """As `int_gemm` for a convolution, padded with code 0.

    codes int8 [N, H, W, C], weight.codes [O, kh, kw, C], scale fp32 [N] -> [N, H', W', O] in the epilogue's dtype; the
    residual has the output's shape.  upsample: every pixel of the codes is that many along each axis.

    Raises:
        KernelError: for shapes, dtypes or devices that the kernel does not take.
        RuntimeMissingError: if triton is missing.
    """
    window = {"stride": stride, "padding": padding, "dilation": dilation, "upsample": upsample}
    return _conv2d(codes, weight, scale, epilogue, window, out=out)[0]


def int_conv2d_statistics(
    codes: Tensor,
    weight: Weight,
    scale: Tensor,
    epilogue: Epilogue = _PLAIN,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    upsample: int = 1,
) -> tuple[Tensor, ColumnStatistics]:
    """`int_conv2d` and the statistics of its float output, which a group norm reads next."""
    window = {"stride": stride, "padding": padding, "dilation": dilation, "upsample": upsample}
    out, statistics = _conv2d(codes, weight, scale, epilogue, window, statistics=True)
    assert statistics is not None
    return out, statistics


def _gemm(
    codes: Tensor,
    weight: Weight,
    scale: Tensor,
    epilogue: Epilogue,
    *,
    out: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, ColumnStatistics | None]:
    where = "int_gemm"
    if codes.ndim < 2:
        raise KernelError(where, f"codes have {codes.ndim} axes, expected […, C]", "Reshape them.")
    check_tensor(where, "codes", codes, dtype=torch.int8, shape=codes.shape)
    channels, rows = codes.shape[-1], codes.numel() // max(1, codes.shape[-1])
    outputs = check_weight(where, weight, (), channels)
    rows_per_sample = _rows_per_sample(where, scale, rows)
    out = _product_output(where, codes, weight, scale, epilogue, (*codes.shape[:-1], outputs), out)
    product = _Product(where, weight, scale, epilogue, (rows, outputs, channels, rows_per_sample), statistics)
    if not out.numel():
        return out, product.of(out)
    options = product.options(GemmOptions, codes.device)
    return out, product.launch(options, codes, (rows, channels, outputs, rows_per_sample), out)


def _conv2d(
    codes: Tensor,
    weight: Weight,
    scale: Tensor,
    epilogue: Epilogue,
    window: dict[str, Any],
    *,
    out: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, ColumnStatistics | None]:
    where = "int_conv2d"
    check_tensor(where, "codes", codes, dtype=torch.int8, shape=(None, None, None, None))
    if weight.codes.ndim != 4:
        found = f"the weight has {weight.codes.ndim} axes, expected [O, kh, kw, C]"
        raise KernelError(where, found, "Use hqc.kernels.channels_last.")
    samples, *size, channels = codes.shape
    kernel = (weight.codes.shape[1], weight.codes.shape[2])
    outputs = check_weight(where, weight, kernel, channels)
    check_tensor(where, "scale", scale, dtype=torch.float32, shape=(samples,))
    window = _window(where, kernel, **window)
    places = [
        (size[i] * window["upsample"] + 2 * window["padding"][i] - window["dilation"][i] * (kernel[i] - 1) - 1)
        // window["stride"][i]
        + 1
        for i in range(2)
    ]
    if min(places) < 1:
        found = f"an image of {size} gives an output of {places}, expected at least one pixel"
        raise KernelError(where, found, "Use a smaller kernel or more padding.")
    if _is_pointwise(window):
        return _gemm(codes, _rows_of(weight), scale, epilogue, out=out, statistics=statistics)
    out = _product_output(where, codes, weight, scale, epilogue, (samples, *places, outputs), out)
    pixels = places[0] * places[1]
    rows = samples * pixels
    product = _Product(where, weight, scale, epilogue, (rows, outputs, channels, pixels), statistics)
    if not out.numel():
        return out, product.of(out)
    options = product.options(ConvOptions, codes.device, taps=kernel[0] * kernel[1], **window)
    return out, product.launch(options, codes, (rows, *size, channels, outputs, *places), out)


# ---- checks --------------------------------------------------------------------------------------------------------


def _product_output(
    where: str,
    codes: Tensor,
    weight: Weight,
    scale: Tensor,
    epilogue: Epilogue,
    shape: tuple[int, ...],
    out: Tensor | None,
) -> Tensor:
    """The output tensor, after the checks that both products share."""
    outputs, gated = shape[-1], epilogue.gate != "none"
    shape = (*shape[:-1], outputs // 2) if gated else shape
    check_epilogue(where, epilogue, len(scale), outputs, shape)
    out = output_tensor(where, out, shape, epilogue.output_dtype, codes.device)
    check_total(where, codes=codes, out=out)
    inverse = None if epilogue.quantiser is None else epilogue.quantiser.inverse_scale
    others = (epilogue.bias, epilogue.shift, epilogue.residual, inverse)
    check_devices(where, codes, weight.codes, weight.scale, weight.high, scale, *others, out)
    return out


def _rows_per_sample(where: str, scale: Tensor, rows: int) -> int:
    check_tensor(where, "scale", scale, dtype=torch.float32, shape=(None,))
    if not len(scale) or rows % len(scale):
        found = f"{rows} rows belong to {len(scale)} scales, expected equally many rows a scale"
        raise KernelError(where, found, "Give one scale a sample.")
    return max(1, rows // len(scale))


def _window(
    where: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    upsample: int,
) -> dict[str, Any]:
    window = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for name, pair in window.items():
        if len(pair) != 2 or min(pair) < (0 if name == "padding" else 1):
            raise KernelError(where, f"{name} is {tuple(pair)}, expected two sizes", "Check the layer's arguments.")
    if upsample < 1:
        raise KernelError(where, f"upsample is {upsample}, expected 1 or more", "Check the layer's arguments.")
    return {name: (int(pair[0]), int(pair[1])) for name, pair in window.items()} | {"upsample": upsample}


def _is_pointwise(window: dict[str, Any]) -> bool:
    """Whether a convolution is a product of pixels: one tap, every pixel once."""
    plain = window["kernel"] == window["stride"] == (1, 1) and window["upsample"] == 1
    return bool(plain and window["padding"] == (0, 0))


def _rows_of(weight: Weight) -> Weight:
    """[O, 1, 1, C] -> [O, C]."""
    high = None if weight.high is None else weight.high.flatten(1)
    return replace(weight, codes=weight.codes.flatten(1), high=high)


# ---- launching -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """A product after its checks. sizes: rows, outputs, channels, rows of a sample."""

    where: str
    weight: Weight
    scale: Tensor
    epilogue: Epilogue
    sizes: tuple[int, int, int, int]
    statistics: bool

    def options(self, kind: type[GemmOptions], device: torch.device, *, taps: int = 1, **window: Any) -> GemmOptions:
        """What the kernel is compiled for, with the tile that is chosen for it."""
        rows, outputs, channels, per_sample = self.sizes
        weight, epilogue = self.weight, self.epilogue
        tile = chosen_tile(
            device,
            rows,
            outputs,
            channels,
            taps=taps,
            rotation=weight.rotation,
            two_digits=weight.high is not None,
            whole_rows=per_sample if self.statistics else 0,
            crowded=epilogue.residual is not None,
        )
        form = weight_form(weight, channels)
        # With splits the epilogue comes in `sum_splits`.
        after: dict[str, Any] = {"bias": False} if tile.splits > 1 else self._after(tile.rows)
        wide = tile.outputs
        if epilogue.quantiser is not None:  # whole blocks of the rotation lie in a tile
            wide = max(wide, epilogue.quantiser.block * (2 if epilogue.gate != "none" else 1))
        options: GemmOptions = kernel_options(
            self.where,
            kind,
            form=form,
            rotation=weight.rotation,
            regular_rotation=weight.regular,
            two_digits=weight.high is not None,
            high_factor=weight.high_factor,
            even=form != "nibbles" and channels % tile.channels == 0,
            tile_rows=tile.rows,
            tile_outputs=wide,
            tile_channels=tile.channels,
            splits=tile.splits,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **after,
            **window,
        )
        return options

    def launch(
        self, options: GemmOptions, codes: Tensor, integers: tuple[int, ...], out: Tensor
    ) -> ColumnStatistics | None:
        """One kernel, or with splits two: partial sums, then their sum and the epilogue. Writes out."""
        rows, outputs, _, per_sample = self.sizes
        weight, epilogue = self.weight, self.epilogue
        stored = weight.codes.view(-1).view(torch.int32) if options.form == "words" else weight.codes
        scales = (weight.scale, self.scale)
        inverse = None if epilogue.quantiser is None else epilogue.quantiser.inverse_scale
        extras = (epilogue.bias, epilogue.shift, epilogue.residual, inverse)
        grid = (-(-rows // options.tile_rows) * -(-outputs // options.tile_outputs), options.splits)
        if options.splits == 1:
            statistics = self._blocks(options, out)
            arguments = (codes, stored, weight.high, *scales, *extras, *integers, out, statistics)
            launch_kernel(self.where, options, grid, arguments)
            return self.of(out, statistics, options.tile_rows)
        partial = torch.empty((options.splits, rows, outputs), dtype=torch.int32, device=out.device)
        check_total(self.where, **{"the partial sums": partial})
        nothing = (None,) * len(extras)
        arguments = (codes, stored, weight.high, *scales, *nothing, *integers, partial, None)
        launch_kernel(self.where, options, grid, arguments)
        total = self._sum_options(options.splits)
        statistics = self._blocks(total, out)
        grid = (-(-rows // total.tile_rows), -(-outputs // total.tile_outputs))
        launch_kernel(self.where, total, grid, (partial, *scales, *extras, rows, outputs, per_sample, out, statistics))
        return self.of(out, statistics, total.tile_rows)

    def of(self, out: Tensor, statistics: Tensor | None = None, rows: int = 0) -> ColumnStatistics | None:
        """The statistics that were asked for: those of the epilogue, or of a pass of their own."""
        if not self.statistics:
            return None
        return column_statistics(out) if statistics is None else ColumnStatistics(statistics, rows)

    def _blocks(self, options: GemmOptions | SumOptions, out: Tensor) -> Tensor | None:
        """Where the epilogue writes statistics."""
        if not options.statistics:
            return None
        samples = len(self.scale)
        shape = (samples, self.sizes[3] // options.tile_rows, 2, out.shape[-1])
        return torch.empty(shape, dtype=torch.float32, device=out.device)

    def _sum_options(self, splits: int) -> SumOptions:
        per_sample = self.sizes[3]
        tall = next((t for t in (32, 16) if per_sample % t == 0), 16) if self.statistics else 16
        block = 1 if self.epilogue.quantiser is None else self.epilogue.quantiser.block
        wide = max(64, 2 * block)
        options: SumOptions = kernel_options(
            self.where,
            SumOptions,
            splits=splits,
            tile_rows=tall,
            tile_outputs=wide,
            **self._after(tall),
        )
        return options

    def _after(self, tile_rows: int) -> dict[str, Any]:
        """The epilogue's options for tiles of so many rows."""
        epilogue, whole = self.epilogue, self.sizes[3] % tile_rows == 0
        shift, quantiser = epilogue.shift, epilogue.quantiser
        fields: dict[str, Any] = {
            "bias": epilogue.bias is not None,
            "shift": shift is not None,
            "shift_pitch": 0 if shift is None else shift.stride(0),
            "residual": epilogue.residual is not None,
            "silu": epilogue.silu,
            "whole": whole,
            "gate": epilogue.gate,
            "statistics": self.statistics and whole,
        }
        if quantiser is not None:
            fields |= {"codes": True, **quantiser.form}
        return fields
