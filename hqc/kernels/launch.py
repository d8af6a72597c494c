"""The kernels as functions of torch tensors: they check, choose tiles, and launch.

On a CUDA device the kernels are compiled on first use; with TRITON_INTERPRET=1 in the environment before triton is
imported they are interpreted on the CPU, slowly, for tests.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqc.errors import KernelError
from hqc.kernels.cards import card_of
from hqc.kernels.guards import check_devices, check_tensor, check_total
from hqc.kernels.operands import Epilogue, Weight, check_epilogue, check_weight, weight_form
from hqc.kernels.options import BLOCKS, MODULES, ConvOptions, GemmOptions, HadamardOptions, KernelOptions, SumOptions
from hqc.kernels.tiles import hadamard_nchw_tile, hadamard_rows_tile
from hqc.kernels.tuning import chosen_tile

__all__ = ["hadamard_quantize", "int_conv2d", "int_gemm"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_GRID = 65535
_PLAIN = Epilogue()


def hadamard_quantize(
    x: Tensor,
    inverse_scale: Tensor,
    *,
    low: int,
    high: int,
    block: int = 1,
    nchw: bool = False,
    packed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """q = clip(round(((H_block·x)/√block)·inverse_scale[n]), low, high), half to even, in float32.

    x [N, …, C] with channels last (tokens, NHWC), or with `nchw` [N, C, …] -> [N, …, C]; float16, bfloat16 or float32.
    inverse_scale fp32 [N], one a sample.  block 1 does not rotate, 8…256 must divide C.
    Output int8; `packed`: uint8 with C/2 in the place of C, the first code in the low nibble.
    `out` receives the result if given.

    Raises:
        KernelError: for shapes, dtypes or devices that the kernel does not take.
        RuntimeMissingError: if triton is missing.
    """
    where = "hadamard_quantize"
    if x.ndim < (3 if nchw else 2):
        raise KernelError(where, f"x has {x.ndim} axes, expected {'[N, C, …]' if nchw else '[N, …, C]'}", "Reshape it.")
    check_tensor(where, "x", x, dtype=_FLOATS, shape=x.shape)
    samples, channels = x.shape[0], x.shape[1 if nchw else -1]
    check_tensor(where, "inverse_scale", inverse_scale, dtype=torch.float32, shape=(samples,))
    if block not in BLOCKS:
        raise KernelError(where, f"block is {block}, expected one of {BLOCKS}", "Choose one of those.")
    if channels % block:
        found = f"x has {channels} channels, expected a multiple of the block {block}"
        raise KernelError(where, found, "Use the block that hqc.ops.block_size gives.")
    if packed and channels % 2:
        raise KernelError(where, f"x has {channels} channels, expected an even number for packed codes", "Use int8.")
    places = x.shape[2:] if nchw else x.shape[1:-1]
    shape = (samples, *places, channels // 2 if packed else channels)
    out = _output(where, out, shape, torch.uint8 if packed else torch.int8, x.device)
    check_total(where, x=x)
    check_devices(where, x, inverse_scale, out)
    if not x.numel():
        return out
    per_sample = x.numel() // (samples * channels)
    if nchw:
        tall, wide, warps = hadamard_nchw_tile(per_sample, block)
        grid: tuple[int, ...] = (-(-channels // wide), -(-per_sample // tall), samples)
        integers: tuple[int, ...] = (channels, per_sample)
    else:
        rows = samples * per_sample
        tall, wide, warps = hadamard_rows_tile(rows, channels, block, multiprocessors=_multiprocessors(x.device))
        grid, integers = (-(-rows // tall), -(-channels // wide)), (rows, channels, per_sample)
    if max(grid[1:]) > _LARGEST_GRID:
        found = f"the grid is {grid}, expected at most {_LARGEST_GRID} after the first"
        raise KernelError(where, found, "Split the batch.")
    options = _options(
        where,
        HadamardOptions,
        block=block,
        low=low,
        high=high,
        layout="nchw" if nchw else "rows",
        packed=packed,
        tile_rows=tall,
        tile_channels=wide,
        num_warps=warps,
    )
    _launch(options, grid, (x, inverse_scale, *integers, out))
    return out


def int_gemm(
    codes: Tensor, weight: Weight, scale: Tensor, epilogue: Epilogue = _PLAIN, *, out: Tensor | None = None
) -> Tensor:
    """y[m, o] = acc[m, o]·weight.scale[o]·scale[n] + bias[o] + residual[m, o], then SiLU; acc = codes·weightᵀ in int32.

    codes int8 […, C] of N samples of equally many rows, scale fp32 [N] -> […, O] in the epilogue's dtype.
    The caller has checked that Σ|codes·weight| stays below 2^31.

    Raises:
        KernelError: for shapes, dtypes or devices that the kernel does not take.
        RuntimeMissingError: if triton is missing.
    """
    where = "int_gemm"
    if codes.ndim < 2:
        raise KernelError(where, f"codes have {codes.ndim} axes, expected […, C]", "Reshape them.")
    check_tensor(where, "codes", codes, dtype=torch.int8, shape=codes.shape)
    channels, rows = codes.shape[-1], codes.numel() // max(1, codes.shape[-1])
    outputs = check_weight(where, weight, (), channels)
    rows_per_sample = _rows_per_sample(where, scale, rows)
    out = _product_output(where, codes, weight, scale, epilogue, (*codes.shape[:-1], outputs), out)
    if not out.numel():
        return out
    options = _options(where, GemmOptions, **_product(weight, epilogue, rows, outputs, channels, codes.device))
    integers = (rows, channels, outputs, rows_per_sample)
    _launch_product(options, codes, weight, scale, epilogue, integers, out, rows_per_sample)
    return out


def int_conv2d(
    codes: Tensor,
    weight: Weight,
    scale: Tensor,
    epilogue: Epilogue = _PLAIN,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    out: Tensor | None = None,
) -> Tensor:
    """As `int_gemm` for a convolution, padded with code 0.

    codes int8 [N, H, W, C], weight.codes [O, kh, kw, C], scale fp32 [N] -> [N, H', W', O] in the epilogue's dtype; the
    residual has the output's shape.

    Raises:
        KernelError: for shapes, dtypes or devices that the kernel does not take.
        RuntimeMissingError: if triton is missing.
    """
    where = "int_conv2d"
    check_tensor(where, "codes", codes, dtype=torch.int8, shape=(None, None, None, None))
    if weight.codes.ndim != 4:
        found = f"the weight has {weight.codes.ndim} axes, expected [O, kh, kw, C]"
        raise KernelError(where, found, "Use hqc.kernels.channels_last.")
    samples, *size, channels = codes.shape
    kernel = (weight.codes.shape[1], weight.codes.shape[2])
    outputs = check_weight(where, weight, kernel, channels)
    check_tensor(where, "scale", scale, dtype=torch.float32, shape=(samples,))
    window = _window(where, kernel, stride, padding, dilation)
    places = [
        (size[i] + 2 * window["padding"][i] - window["dilation"][i] * (kernel[i] - 1) - 1) // window["stride"][i] + 1
        for i in range(2)
    ]
    if min(places) < 1:
        found = f"an image of {size} gives an output of {places}, expected at least one pixel"
        raise KernelError(where, found, "Use a smaller kernel or more padding.")
    out = _product_output(where, codes, weight, scale, epilogue, (samples, *places, outputs), out)
    if not out.numel():
        return out
    rows = samples * places[0] * places[1]
    taps = kernel[0] * kernel[1]
    product = _product(weight, epilogue, rows, outputs, channels, codes.device, taps=taps)
    options = _options(where, ConvOptions, **product, **window)
    integers = (rows, *size, channels, outputs, *places)
    _launch_product(options, codes, weight, scale, epilogue, integers, out, places[0] * places[1])
    return out


# ---- checks --------------------------------------------------------------------------------------------------------


def _output(where: str, out: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if out is None:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    check_tensor(where, "out", out, dtype=dtype, shape=shape)
    return out


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
    check_epilogue(where, epilogue, shape[-1], shape)
    out = _output(where, out, shape, epilogue.dtype, codes.device)
    check_total(where, codes=codes, out=out)
    check_devices(where, codes, weight.codes, weight.scale, weight.high, scale, epilogue.bias, epilogue.residual, out)
    return out


def _rows_per_sample(where: str, scale: Tensor, rows: int) -> int:
    check_tensor(where, "scale", scale, dtype=torch.float32, shape=(None,))
    if not len(scale) or rows % len(scale):
        found = f"{rows} rows belong to {len(scale)} scales, expected equally many rows a scale"
        raise KernelError(where, found, "Give one scale a sample.")
    return max(1, rows // len(scale))


def _window(
    where: str, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> dict[str, tuple[int, int]]:
    window = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for name, pair in window.items():
        if len(pair) != 2 or min(pair) < (0 if name == "padding" else 1):
            raise KernelError(where, f"{name} is {tuple(pair)}, expected two sizes", "Check the layer's arguments.")
    return {name: (int(pair[0]), int(pair[1])) for name, pair in window.items()}


# ---- launching -----------------------------------------------------------------------------------------------------


def _options(where: str, kind: type[KernelOptions], **fields: Any) -> Any:
    try:
        return kind(**fields)
    except ValueError as error:
        raise KernelError(where, str(error), "Choose other options.") from error


def _product(
    weight: Weight,
    epilogue: Epilogue,
    rows: int,
    outputs: int,
    channels: int,
    device: torch.device,
    *,
    taps: int = 1,
) -> dict[str, Any]:
    """Options that both products share."""
    tile = chosen_tile(
        device,
        rows,
        outputs,
        channels,
        taps=taps,
        rotation=weight.rotation,
        two_digits=weight.high is not None,
    )
    form = weight_form(weight, channels)
    whole = tile.splits == 1  # with splits the epilogue comes in `sum_splits`
    return {
        "form": form,
        "rotation": weight.rotation,
        "two_digits": weight.high is not None,
        "high_factor": weight.high_factor,
        "bias": whole and epilogue.bias is not None,
        "residual": whole and epilogue.residual is not None,
        "silu": whole and epilogue.silu,
        "even": form != "nibbles" and channels % tile.channels == 0,
        "tile_rows": tile.rows,
        "tile_outputs": tile.outputs,
        "tile_channels": tile.channels,
        "splits": tile.splits,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _launch_product(
    options: GemmOptions,
    codes: Tensor,
    weight: Weight,
    scale: Tensor,
    epilogue: Epilogue,
    integers: tuple[int, ...],
    out: Tensor,
    rows_per_sample: int,
) -> None:
    """One kernel, or with splits two: partial sums, then their sum and the epilogue."""
    outputs = out.shape[-1]
    rows = out.numel() // outputs
    stored = weight.codes.view(-1).view(torch.int32) if options.form == "words" else weight.codes
    scales = (weight.scale, scale)
    extras = (epilogue.bias, epilogue.residual)
    grid = (-(-rows // options.tile_rows) * -(-outputs // options.tile_outputs), options.splits)
    if options.splits == 1:
        _launch(options, grid, (codes, stored, weight.high, *scales, *extras, *integers, out))
        return
    partial = torch.empty((options.splits, rows, outputs), dtype=torch.int32, device=out.device)
    check_total(options.function, **{"the partial sums": partial})
    _launch(options, grid, (codes, stored, weight.high, *scales, None, None, *integers, partial))
    total = SumOptions(
        splits=options.splits,
        bias=epilogue.bias is not None,
        residual=epilogue.residual is not None,
        silu=epilogue.silu,
    )
    grid = (-(-rows // total.tile_rows), -(-outputs // total.tile_outputs))
    _launch(total, grid, (partial, *scales, *extras, rows, outputs, rows_per_sample, out))


def _multiprocessors(device: torch.device) -> int:
    return card_of(device).multiprocessors


def _launch(options: KernelOptions, grid: tuple[int, ...], arguments: tuple[Tensor | int | None, ...]) -> None:
    kernel = getattr(importlib.import_module(f"hqc.kernels.jit.{MODULES[options.function]}"), options.function)
    constants = {name: value for name, value in options.constants().items() if not name.endswith("_ptr")}
    # No contraction of a·b + c into one rounding: results are those of the reference, operation by operation.
    kernel[grid](
        *arguments, **constants, num_warps=options.num_warps, num_stages=options.num_stages, enable_fp_fusion=False
    )
