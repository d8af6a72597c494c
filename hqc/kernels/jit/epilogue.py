"""From int32 sums to real outputs, shared by the integer products."""

import triton
import triton.language as tl

from hqc.kernels.jit.codes import inverse_at, row_codes, sample_codes
from hqc.kernels.jit.gate import activation
from hqc.kernels.jit.rotation import butterfly
from hqc.kernels.jit.statistics import store_statistics

__all__ = ["sum_splits", "tile_of", "write_outputs", "write_sums"]


@triton.jit
def tile_of(rows, outputs, TILE_ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, output tile) of this program: GROUP row tiles share each weight tile while it is in the L2 cache."""
    across = tl.cdiv(outputs, TILE_OUTPUTS)
    down = tl.cdiv(rows, TILE_ROWS)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    return first + within % height, within // height


@triton.jit
def write_outputs(
    acc,
    weight_scale_ptr,
    scale_ptr,
    bias_ptr,
    shift_ptr,
    residual_ptr,
    inverse_scale_ptr,
    y_ptr,
    statistics_ptr,
    m,
    first,
    rows,
    outputs,
    rows_per_sample,
    block,
    SHIFT_PITCH: tl.constexpr,
    WHOLE: tl.constexpr,
    SILU: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    REGULAR: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
):
    """y[m, o] = acc·weight_scale[o]·scale[n] + bias[o] + shift[n, o] + residual[m, o], then SiLU.

    n = m // rows_per_sample.  The same operations in the same order as `hqc::rescale`.  Pointers that are None are left
    out.  acc is the tile of outputs first … first + TILE_OUTPUTS - 1, its rows the block of that number.
    WHOLE: every tile lies in one sample, so that what belongs to samples is read once.
    GATE, if not "none": outputs are pairs (a, g) side by side, and y[m, o/2] = a·GATE(g) is half as wide.
    inverse_scale: y is rotated and quantised, codes int8 instead of floats, LOG_BLOCK, NORM, LOW, HIGH as in
    `hadamard_quantize_rows`.
    statistics: mean and squared deviations of y's columns over the tile's rows, [block]; needs WHOLE.
    """
    o = first + tl.arange(0, TILE_OUTPUTS)
    in_rows, in_outputs = m < rows, o < outputs
    mask = in_rows[:, None] & in_outputs[None, :]
    weight_scale = tl.load(weight_scale_ptr + o, in_outputs, other=0.0)
    sample = m // rows_per_sample
    owner = block * TILE_ROWS // rows_per_sample
    y = acc.to(tl.float32) * weight_scale[None, :]
    if WHOLE:
        y *= tl.load(scale_ptr + owner)
    else:
        y *= tl.load(scale_ptr + sample, in_rows, other=0.0)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, in_outputs, other=0.0)[None, :]
    if shift_ptr is not None:
        if WHOLE:
            y += tl.load(shift_ptr + owner * SHIFT_PITCH + o, in_outputs, other=0.0).to(tl.float32)[None, :]
        else:
            y += tl.load(shift_ptr + sample[:, None] * SHIFT_PITCH + o[None, :], mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + m[:, None] * outputs + o[None, :], mask, other=0.0).to(tl.float32)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    WIDE: tl.constexpr = TILE_OUTPUTS if GATE == "none" else TILE_OUTPUTS // 2
    pitch = outputs
    if GATE != "none":
        a, g = tl.split(tl.reshape(y, (TILE_ROWS, WIDE, 2)))
        y = a * activation(g, GATE)
        o = first // 2 + tl.arange(0, WIDE)
        pitch = outputs // 2
    mask = in_rows[:, None] & (o < pitch)[None, :]
    offsets = m[:, None] * pitch + o[None, :]
    if inverse_scale_ptr is not None:
        y = butterfly(y, TILE_ROWS * WIDE, 0, LOG_BLOCK, REGULAR) * NORM
        if WHOLE:
            y *= tl.load(inverse_at(inverse_scale_ptr, owner, LOW))
            codes = sample_codes(y, inverse_scale_ptr, owner, LOW, HIGH)
        else:
            y *= tl.load(inverse_at(inverse_scale_ptr, sample, LOW), in_rows, other=0.0)[:, None]
            codes = row_codes(y, inverse_scale_ptr, sample, in_rows, LOW, HIGH)
        tl.store(y_ptr + offsets, codes.to(tl.int8), mask)
    else:
        rounded = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, rounded, mask)
        if statistics_ptr is not None:
            # Of what is stored: whoever reads y and these numbers sees one tensor.
            store_statistics(rounded.to(tl.float32), in_rows, TILE_ROWS, statistics_ptr, block, o, pitch)


@triton.jit
def write_sums(acc, partial_ptr, part, m, o, rows, outputs):
    """partial[part, m, o] = acc: one part of a product whose inner axis is split; `sum_splits` follows."""
    mask = (m < rows)[:, None] & (o < outputs)[None, :]
    tl.store(partial_ptr + (part * rows + m[:, None]) * outputs + o[None, :], acc, mask)


@triton.jit
def sum_splits(
    partial_ptr,
    weight_scale_ptr,
    scale_ptr,
    bias_ptr,
    shift_ptr,
    residual_ptr,
    inverse_scale_ptr,
    rows,
    outputs,
    rows_per_sample,
    y_ptr,
    statistics_ptr,
    SPLITS: tl.constexpr,
    SHIFT_PITCH: tl.constexpr,
    WHOLE: tl.constexpr,
    SILU: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    REGULAR: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
):
    """The end of a product whose inner axis was split: partial int32 [SPLITS, rows, outputs] summed, then the epilogue.

    Grid: (⌈rows / TILE_ROWS⌉, ⌈outputs / TILE_OUTPUTS⌉).  Integers, so that the order of the sum does not matter.
    """
    m = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    first = tl.program_id(1) * TILE_OUTPUTS
    o = first + tl.arange(0, TILE_OUTPUTS)
    mask = (m < rows)[:, None] & (o < outputs)[None, :]
    offsets = m[:, None] * outputs + o[None, :]
    acc = tl.zeros((TILE_ROWS, TILE_OUTPUTS), tl.int32)
    for part in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + part * rows * outputs + offsets, mask, other=0)
    write_outputs(
        acc,
        weight_scale_ptr,
        scale_ptr,
        bias_ptr,
        shift_ptr,
        residual_ptr,
        inverse_scale_ptr,
        y_ptr,
        statistics_ptr,
        m,
        first,
        rows,
        outputs,
        rows_per_sample,
        tl.program_id(0),
        SHIFT_PITCH,
        WHOLE,
        SILU,
        GATE,
        NORM,
        LOW,
        HIGH,
        LOG_BLOCK,
        REGULAR,
        TILE_ROWS,
        TILE_OUTPUTS,
    )
