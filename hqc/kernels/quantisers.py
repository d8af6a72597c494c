"""The quantising kernels as functions of torch tensors: rotation alone, or with the norm or gate that stands before it.

On a CUDA device they are compiled on first use; with TRITON_INTERPRET=1 in the environment before triton is imported
they are interpreted on the CPU, slowly, for tests.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hqc.errors import KernelError
from hqc.kernels.cards import card_of
from hqc.kernels.guards import check_devices, check_tensor, check_total, row_pitch
from hqc.kernels.launching import kernel_options, launch_kernel, output_tensor
from hqc.kernels.operands import ColumnStatistics, Quantiser, check_quantiser
from hqc.kernels.options import (
    AffineOptions,
    GateOptions,
    GroupNormOptions,
    HadamardOptions,
    LayerNormOptions,
    StatisticsOptions,
)
from hqc.kernels.parameters import power_of_two
from hqc.kernels.tiles import hadamard_nchw_tile, hadamard_rows_tile

__all__ = [
    "GroupNorm",
    "LayerNorm",
    "column_statistics",
    "gate_quantize",
    "group_norm_quantize",
    "hadamard_quantize",
    "layer_norm_quantize",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STATISTICS_TILE = (128, 32)
_FEW_BLOCKS = 4
"""Blocks of statistics up to which every tile of a group norm joins them by itself; more are joined beforehand.

On an H100 a kernel that joins them costs what four blocks cost in every tile (8×16×16×576), and half of what eight do.
"""
_MOST_BLOCKS, _AFFINE_CHANNELS = 32, 32
"""Blocks that are joined in one go, and channels of a tile that joins them: every load is in flight at once."""
_WIDEST_ROW = 16384
"""Channels of a layer norm whose row one program holds."""


@dataclass(frozen=True)
class GroupNorm:
    """torch's group norm over channels, and the SiLU that may follow; weight and bias fp32 [C], both or neither."""

    groups: int
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    silu: bool = False


@dataclass(frozen=True)
class LayerNorm:
    """torch's layer norm over the last axis; weight and bias fp32 [C], both or neither."""

    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None


def hadamard_quantize(
    x: Tensor,
    inverse_scale: Tensor,
    *,
    low: int | None,
    high: int | None,
    block: int = 1,
    regular: bool = False,
    nchw: bool = False,
    packed: bool = False,
    second: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """q = clip(round(((H_block·x)/√block)·inverse_scale[n]), low, high), half to even, in float32.

    x [N, …, C] with channels last (tokens, NHWC), or with `nchw` [N, C, …] -> [N, …, C]; float16, bfloat16 or float32.
    Rows may lie apart by one pitch (a slice of the last axis).  second: what stands beside x along the channels, last.
    inverse_scale fp32 [N], one a sample; with low and high None [N, 3], 1/s, least and largest code.
    block 1 does not rotate, 8…256 must divide C.
    regular: by the regular H, whose orders are 16, 32, 64 and 256.
    Output int8; `packed`: uint8 with C/2 in the place of C, the first code in the low nibble.
    `out` receives the result if given.

    Raises:
        KernelError: for shapes, dtypes or devices that the kernel does not take.
        RuntimeMissingError: if triton is missing.
    """
    where = "hadamard_quantize"
    if x.ndim < (3 if nchw else 2):
        raise KernelError(where, f"x has {x.ndim} axes, expected {'[N, C, …]' if nchw else '[N, …, C]'}", "Reshape it.")
    pitch = 0 if nchw or second is not None or x.is_contiguous() or x.dtype not in _FLOATS else row_pitch(x)
    if not pitch:
        check_tensor(where, "x", x, dtype=_FLOATS, shape=x.shape)
    samples, channels = x.shape[0], x.shape[1 if nchw else -1]
    if second is not None:
        if nchw:
            raise KernelError(where, "a second image is given with nchw", "Give channels-last images.")
        check_tensor(where, "second", second, dtype=x.dtype, shape=(*x.shape[:-1], None))
        channels += second.shape[-1]
    check_quantiser(where, Quantiser(inverse_scale, low, high, block, regular), samples, channels)
    if packed and channels % 2:
        raise KernelError(where, f"x has {channels} channels, expected an even number for packed codes", "Use int8.")
    places = x.shape[2:] if nchw else x.shape[1:-1]
    shape = (samples, *places, channels // 2 if packed else channels)
    out = output_tensor(where, out, shape, torch.uint8 if packed else torch.int8, x.device)
    check_total(where, x=x, out=out)
    check_devices(where, x, second, inverse_scale, out)
    if not out.numel():
        return out
    per_sample = out.numel() // (samples * shape[-1])
    fields = {"block": block, "regular": regular, "low": low, "high": high, "packed": packed}
    if nchw:
        tall, wide, warps = hadamard_nchw_tile(per_sample, block)
        grid: tuple[int, ...] = (-(-channels // wide), -(-per_sample // tall), samples)
        arguments: tuple[Tensor | int | None, ...] = (x, inverse_scale, channels, per_sample, out)
    else:
        rows = samples * per_sample
        tall, wide, warps = _rows_tile(rows, channels, block, x.device)
        grid, arguments = (-(-rows // tall), -(-channels // wide)), (x, second, inverse_scale, rows, channels)
        arguments = (*arguments, per_sample, out)
        fields |= {"pitch": pitch, "second": second is not None}
        fields |= {"first_channels": 0 if second is None else x.shape[-1]}
    options = kernel_options(
        where,
        HadamardOptions,
        layout="nchw" if nchw else "rows",
        tile_rows=tall,
        tile_channels=wide,
        num_warps=warps,
        **fields,
    )
    launch_kernel(where, options, grid, arguments)
    return out


def column_statistics(x: Tensor) -> ColumnStatistics:
    """Mean and squared deviations of every channel of x [N, …, C], channels last, over blocks of rows.

    Raises:
        KernelError: for shapes, dtypes or devices that the kernel does not take.
    """
    where = "column_statistics"
    check_tensor(where, "x", x, dtype=_FLOATS, shape=x.shape)
    check_total(where, x=x)
    check_devices(where, x)
    samples, channels = x.shape[0], x.shape[-1]
    pixels = x.numel() // max(1, samples * channels)
    tall, wide = _STATISTICS_TILE
    blocks = -(-pixels // tall)
    values = torch.empty((samples, blocks, 2, channels), dtype=torch.float32, device=x.device)
    if values.numel():
        options = kernel_options(where, StatisticsOptions, tile_rows=tall, tile_channels=wide)
        launch_kernel(where, options, (-(-channels // wide), blocks, samples), (x, channels, pixels, values))
    return ColumnStatistics(values, tall)


def group_norm_quantize(
    x: Tensor,
    norm: GroupNorm,
    quantiser: Quantiser | None,
    *,
    second: Tensor | None = None,
    statistics: ColumnStatistics | None = None,
    second_statistics: ColumnStatistics | None = None,
    keep: bool = False,
    beside: Quantiser | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(codes, y, codes of x): y = group norm of x along the channels, then SiLU if the norm has it.

    x [N, …, C] channels last; second: the rest of the channels, where x is two tensors side by side.  y is there with
    `keep`, its codes with a quantiser, those of x itself with `beside`.  Statistics are taken here where they are not
    given.

    Raises:
        KernelError: for shapes, dtypes or devices that the kernel does not take.
        RuntimeMissingError: if triton is missing.
    """
    where = "group_norm_quantize"
    check_tensor(where, "x", x, dtype=_FLOATS, shape=x.shape)
    samples, first = x.shape[0], x.shape[-1]
    channels = first
    if second is not None:
        check_tensor(where, "second", second, dtype=x.dtype, shape=(*x.shape[:-1], None))
        channels += second.shape[-1]
    _check_affine(where, norm.weight, norm.bias, channels)
    if norm.groups < 1 or channels % norm.groups:
        found = f"there are {norm.groups} groups, expected a divisor of {channels}"
        raise KernelError(where, found, "Check the layer's sizes.")
    for how in (quantiser, beside):
        if how is not None:
            check_quantiser(where, how, samples, channels)
    shape = (*x.shape[:-1], channels)
    check_total(where, **{"the image": x.new_empty(shape, device="meta")})
    inverse, beside_scale = (None if how is None else how.inverse_scale for how in (quantiser, beside))
    check_devices(where, x, second, norm.weight, norm.bias, inverse, beside_scale)
    other = None if beside is None else torch.empty(shape, dtype=torch.int8, device=x.device)
    codes = None if quantiser is None else torch.empty(shape, dtype=torch.int8, device=x.device)
    y = torch.empty(shape, dtype=x.dtype, device=x.device) if keep or quantiser is None else None
    if not x.numel():
        return codes, y, other
    pixels = x.numel() // (samples * first)
    parts = [statistics or column_statistics(x)]
    if second is not None:
        parts.append(second_statistics or column_statistics(second))
    fields: dict[str, Any] = {
        "group_channels": channels // norm.groups,
        "eps": norm.eps,
        "affine": norm.weight is not None,
    }
    fields |= {"second": second is not None}
    block = max(1 if how is None else how.block for how in (quantiser, beside))
    tall, wide, warps = _rows_tile(samples * pixels, channels, block, x.device)
    tall = max(1, min(tall, power_of_two(pixels)))
    blocks = max(part.values.shape[1] for part in parts)
    joined = blocks > _FEW_BLOCKS
    sizes = [(part.values.shape[1], part.rows) for part in parts] + [(0, 1)] * (2 - len(parts))
    integers = (channels, first, pixels, *sizes[0], *sizes[1])
    given = (parts[0].values, parts[1].values if len(parts) > 1 else None, norm.weight, norm.bias)
    if joined:
        affine = torch.empty((samples, 2, channels), dtype=torch.float32, device=x.device)
        few = min(_MOST_BLOCKS, power_of_two(blocks))
        options = kernel_options(where, AffineOptions, tile_channels=_AFFINE_CHANNELS, most_blocks=few, **fields)
        grid: tuple[int, ...] = (-(-channels // _AFFINE_CHANNELS), samples)
        launch_kernel(where, options, grid, (*given, *integers, affine))
        given = (affine, None, None, None)
    if quantiser is not None:
        fields |= quantiser.form
    if beside is not None:
        fields |= {"beside": True, "beside_block": beside.block, "beside_regular": beside.regular}
        fields |= {"beside_low": beside.low, "beside_high": beside.high}
    options = kernel_options(
        where,
        GroupNormOptions,
        joined=joined,
        silu=norm.silu,
        codes=codes is not None,
        keep=y is not None,
        tile_rows=tall,
        tile_channels=wide,
        num_warps=warps,
        most_blocks=power_of_two(min(blocks, _FEW_BLOCKS)),
        **fields,
    )
    grid = (-(-channels // wide), -(-pixels // tall), samples)
    launch_kernel(where, options, grid, (x, second, *given, inverse, beside_scale, *integers, y, codes, other))
    return codes, y, other


def layer_norm_quantize(
    x: Tensor, norm: LayerNorm, quantiser: Quantiser, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(codes, y): y = layer norm of x over the last axis; codes as the quantiser says; y is there with `keep`.

    x [N, …, C], C at most 16384.

    Raises:
        KernelError: for shapes, dtypes or devices that the kernel does not take.
        RuntimeMissingError: if triton is missing.
    """
    where = "layer_norm_quantize"
    check_tensor(where, "x", x, dtype=_FLOATS, shape=x.shape)
    samples, channels = x.shape[0], x.shape[-1]
    if channels > _WIDEST_ROW:
        raise KernelError(where, f"rows have {channels} channels, expected at most {_WIDEST_ROW}", "Leave it apart.")
    _check_affine(where, norm.weight, norm.bias, channels)
    check_quantiser(where, quantiser, samples, channels)
    check_total(where, x=x)
    check_devices(where, x, norm.weight, norm.bias, quantiser.inverse_scale)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    y = torch.empty_like(x) if keep else None
    if not x.numel():
        return codes, y
    rows = x.numel() // channels
    wide = max(16, power_of_two(channels), quantiser.block)
    tall = max(1, min(4096 // wide, power_of_two(rows)))
    while tall > 1 and -(-rows // tall) < 2 * card_of(x.device).multiprocessors:
        tall //= 2
    options = kernel_options(
        where,
        LayerNormOptions,
        eps=norm.eps,
        affine=norm.weight is not None,
        keep=keep,
        **quantiser.form,
        tile_rows=tall,
        tile_channels=wide,
        num_warps=max(1, min(8, tall * wide // 1024)),
    )
    arguments = (x, norm.weight, norm.bias, quantiser.inverse_scale, rows, channels, rows // samples, y, codes)
    launch_kernel(where, options, (-(-rows // tall),), arguments)
    return codes, y


def gate_quantize(
    x: Tensor,
    quantiser: Quantiser,
    *,
    kind: Literal["none", "silu", "gelu", "gelu_tanh"],
    gated: bool,
) -> Tensor:
    """Codes of y = a·f(g) with x = (a, g) along the last axis if gated, else of y = f(x); f is the activation `kind`.

    x [N, …, 2·C] or [N, …, C] -> int8 [N, …, C].

    Raises:
        KernelError: for shapes, dtypes or devices that the kernel does not take.
        RuntimeMissingError: if triton is missing.
    """
    where = "gate_quantize"
    check_tensor(where, "x", x, dtype=_FLOATS, shape=x.shape)
    if gated and x.shape[-1] % 2:
        raise KernelError(where, f"x has {x.shape[-1]} channels, expected two halves", "Check the layer's sizes.")
    samples, channels = x.shape[0], x.shape[-1] // (2 if gated else 1)
    check_quantiser(where, quantiser, samples, channels)
    check_total(where, x=x)
    check_devices(where, x, quantiser.inverse_scale)
    codes = torch.empty((*x.shape[:-1], channels), dtype=torch.int8, device=x.device)
    if not codes.numel():
        return codes
    rows = codes.numel() // channels
    tall, wide, warps = _rows_tile(rows, channels, quantiser.block, x.device)
    tall = max(1, tall // 2) if gated else tall  # two values a code
    options = kernel_options(
        where,
        GateOptions,
        kind=kind,
        gated=gated,
        **quantiser.form,
        tile_rows=tall,
        tile_channels=wide,
        num_warps=warps,
    )
    grid = (-(-rows // tall), -(-channels // wide))
    launch_kernel(where, options, grid, (x, quantiser.inverse_scale, rows, channels, rows // samples, codes))
    return codes


def _rows_tile(rows: int, channels: int, block: int, device: torch.device) -> tuple[int, int, int]:
    return hadamard_rows_tile(rows, channels, block, multiprocessors=card_of(device).multiprocessors)


def _check_affine(where: str, weight: Tensor | None, bias: Tensor | None, channels: int) -> None:
    if (weight is None) != (bias is None):
        raise KernelError(where, "a weight or a bias comes alone, expected both or neither", "Fill it with 1 or 0.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_tensor(where, name, tensor, dtype=torch.float32, shape=(channels,))
