"""The integer weight of a site, and the int8 tensors that hold it exactly.

    total   w [O, C, …] int32: codes times H where the site is rotated, whatever digits the program has them in
    one     w                                   −128 ≤ w ≤ 127
    halves  w = ⌊w/2⌋ + (w − ⌊w/2⌋)             −256 ≤ w ≤ 254
    digits  w = low + 256·high                  −32 896 ≤ w ≤ 32 639,  low −128…127

Tensor cores add int8 products in int32, so that every product may use the whole of int8. The limits of
`split_digits`, which x86's saturating multiply-add sets, do not apply: digits are summed up and split anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from hqc.errors import ExportError
from hqc.export.reference import evaluate
from hqc.program import Program, is_op
from hqc.sites import Product

__all__ = ["Digit", "int8_digits", "stored_codes", "total_codes"]

ops = torch.ops.hqc
_BASE = 256


@dataclass(frozen=True)
class Digit:
    """An int8 tensor and the factor that its product carries."""

    codes: Tensor
    factor: int


def total_codes(program: Program, products: Sequence[Product]) -> Tensor:
    """The integer weight of a site's products, int32 [O, C, …]."""
    parts = (evaluate(program, p.node.args[1], {}).to(torch.int32) * p.factor for p in products)  # type: ignore[arg-type]
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def stored_codes(program: Program, weight: fx.Node) -> Tensor:
    """The codes that a weight expression starts from: int8 [O, C, …], not rotated."""
    node = weight
    while node.op == "call_function" and not is_op(node, ops.unpack_int4.default):
        node = node.args[0]  # type: ignore[assignment]
    return evaluate(program, node, {})


def int8_digits(total: Tensor, site: str) -> tuple[Digit, ...]:
    """One digit where int8 holds the weight, two halves or two digits where it does not; exact.

    Raises:
        ExportError: for a weight past two digits.
    """
    low, high = int(total.min()), int(total.max())
    if low >= -128 and high <= 127:
        return (Digit(total.to(torch.int8), 1),)
    if low >= -256 and high <= 254:
        half = torch.div(total, 2, rounding_mode="floor")
        return Digit(half.to(torch.int8), 1), Digit((total - half).to(torch.int8), 1)
    upper = torch.div(total + _BASE // 2, _BASE, rounding_mode="floor")
    if int(upper.min()) < -128 or int(upper.max()) > 127:
        raise ExportError(
            f"site {site}",
            f"its weight codes span {low}…{high}, past two int8 digits",
            "Use a smaller Hadamard block, or rotate the weight too (insert_hadamard(weights=True)).",
        )
    return Digit((total - _BASE * upper).to(torch.int8), 1), Digit(upper.to(torch.int8), _BASE)
