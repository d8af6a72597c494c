"""From int32 sums to real outputs, shared by the integer products."""

import triton
import triton.language as tl

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
    acc, weight_scale_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, m, o, sample, rows, outputs, SILU: tl.constexpr
):
    """y[m, o] = acc·weight_scale[o]·scale[sample[m]] + bias[o] + residual[m, o], then SiLU; y [rows, outputs].

    The same operations in the same order as `hqc::rescale`.  Pointers that are None are left out.
    """
    in_rows, in_outputs = m < rows, o < outputs
    mask = in_rows[:, None] & in_outputs[None, :]
    offsets = m[:, None] * outputs + o[None, :]
    weight_scale = tl.load(weight_scale_ptr + o, in_outputs, other=0.0)
    scale = tl.load(scale_ptr + sample, in_rows, other=0.0)
    y = acc.to(tl.float32) * weight_scale[None, :] * scale[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, in_outputs, other=0.0)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask, other=0.0).to(tl.float32)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)


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
    residual_ptr,
    rows,
    outputs,
    rows_per_sample,
    y_ptr,
    SPLITS: tl.constexpr,
    SILU: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
):
    """The end of a product whose inner axis was split: partial int32 [SPLITS, rows, outputs] summed, then the epilogue.

    Grid: (⌈rows / TILE_ROWS⌉, ⌈outputs / TILE_OUTPUTS⌉).  Integers, so that the order of the sum does not matter.
    """
    m = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    o = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    mask = (m < rows)[:, None] & (o < outputs)[None, :]
    offsets = m[:, None] * outputs + o[None, :]
    acc = tl.zeros((TILE_ROWS, TILE_OUTPUTS), tl.int32)
    for part in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + part * rows * outputs + offsets, mask, other=0)
    write_outputs(
        acc, weight_scale_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, m, o, m // rows_per_sample, rows, outputs, SILU
    )
