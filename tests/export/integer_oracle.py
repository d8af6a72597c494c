"""Integer sites in numpy int64, written apart from hqc: loops for the convolution, popcount for Hadamard's matrices."""

from collections.abc import Sequence

import numpy as np
from onnx.reference.op_run import OpRun

__all__ = [
    "MatMulIntegerToFloat",
    "asymmetric_conv",
    "conv",
    "regular_signs",
    "rotated",
    "saturated_pair_sum",
    "signs",
]


def signs(order: int) -> np.ndarray:
    """H ±1 of a power-of-two order."""
    return np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(order)] for i in range(order)], dtype=np.int64)


def regular_signs(order: int) -> np.ndarray:
    """The regular H ±1: pairs of bits of i ⊕ j, and below them one bit of i & j where the order is no power of four."""
    single = order.bit_length() % 2 == 0
    pairs = sum(1 << bit for bit in range(int(single), order.bit_length() - 1, 2))
    parity = [
        [((i ^ j) & ((i ^ j) >> 1) & pairs).bit_count() + (i & j & int(single)) for j in range(order)]
        for i in range(order)
    ]
    return 1 - 2 * (np.array(parity, dtype=np.int64) % 2)


def rotated(weight: np.ndarray, block: int, *, regular: bool = False) -> np.ndarray:
    """w·H over input channels, block by block; [O, C, …]."""
    if not block:
        return weight.astype(np.int64)
    out = np.zeros(weight.shape, dtype=np.int64)
    matrix = regular_signs(block) if regular else signs(block)
    for start in range(0, weight.shape[1], block):
        part = weight[:, start : start + block].astype(np.int64)
        out[:, start : start + block] = np.einsum("ij,oj...->oi...", matrix, part)
    return out


def conv(
    codes: np.ndarray, weight: np.ndarray, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> np.ndarray:
    """acc[n, o, y, x] over int64, padded with 0; one output pixel at a time."""
    n, _, height, width = codes.shape
    outputs, _, kh, kw = weight.shape
    (sy, sx), (py, px), (dy, dx) = stride, padding, dilation
    padded = np.zeros((n, codes.shape[1], height + 2 * py, width + 2 * px), dtype=np.int64)
    padded[:, :, py : py + height, px : px + width] = codes
    rows = (height + 2 * py - dy * (kh - 1) - 1) // sy + 1
    columns = (width + 2 * px - dx * (kw - 1) - 1) // sx + 1
    acc = np.zeros((n, outputs, rows, columns), dtype=np.int64)
    for y in range(rows):
        for x in range(columns):
            patch = padded[:, :, y * sy : y * sy + dy * (kh - 1) + 1 : dy, x * sx : x * sx + dx * (kw - 1) + 1 : dx]
            acc[:, :, y, x] = np.einsum("ncij,ocij->no", patch, weight.astype(np.int64))
    return acc


def asymmetric_conv(
    q: np.ndarray,
    zero: np.ndarray,
    w: np.ndarray,
    w_zero: np.ndarray,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> np.ndarray:
    """Σ (q - z[n])·(w - z_w[o]) over int64 by its four sums, from unsigned codes and explicit zero points.

    q in 0…2ⁿ-1 [N, C, H, W] is padded with its own zero point, the code of real 0; w in 0…2ⁿ-1 [O, C, kh, kw].
    """
    (py, px), (n, channels, height, width) = padding, q.shape
    padded = np.broadcast_to(zero.reshape(-1, 1, 1, 1), (n, channels, height + 2 * py, width + 2 * px)).astype(np.int64)
    padded[:, :, py : py + height, px : px + width] = q
    ones, terms = np.ones_like(w[:1]), w[0].size
    none = (0, 0)
    products = conv(padded, w, stride, none, dilation)
    inputs = conv(padded, ones, stride, none, dilation)
    weights = w.astype(np.int64).sum((1, 2, 3)).reshape(1, -1, 1, 1)
    z, z_w = zero.astype(np.int64).reshape(-1, 1, 1, 1), w_zero.astype(np.int64).reshape(1, -1, 1, 1)
    return products - z_w * inputs - z * weights + terms * z * z_w


def saturated_pair_sum(codes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """What x86 without VNNI computes: products of neighbours added in int16 with saturation, then in int32."""
    pairs = codes.astype(np.int64)[:, :, None] * weight.astype(np.int64)[None]  # [M, K, O]
    added = np.clip(pairs[:, 0::2] + pairs[:, 1::2], -(2**15), 2**15 - 1)
    return added.sum(1)


class MatMulIntegerToFloat(OpRun):
    """com.microsoft's operator from its documentation, in int64 and one rounding per factor."""

    op_domain = "com.microsoft"

    def _run(self, a, b, a_scale, b_scale, a_zero_point=None, b_zero_point=None, bias=None):
        left = a.astype(np.int64) - (0 if a_zero_point is None else a_zero_point.astype(np.int64))
        right = b.astype(np.int64) - (0 if b_zero_point is None else b_zero_point.astype(np.int64))
        out = (left @ right).astype(np.float32) * (a_scale * b_scale).astype(np.float32)
        return (out if bias is None else out + bias,)
