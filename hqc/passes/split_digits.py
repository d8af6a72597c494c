"""Split digits: weights that overflow int8 after rotation become two int8 products.

    before   acc = int_op(q, w),  w int16
    after    acc = int_op(q, int8(w))                              where every |w| fits
             acc = int_op(q, w₀) + int_op(q, w₁)                   where every |w| fits twice; w₀ = ⌊w/2⌋, w₁ = w - w₀
             acc = int_op(q, low) + 128·int_op(q, high)            else; w = low + 128·high, low -64…63

All three are exact. Halves need no factor, so that a runtime can form both products as one, twice as long.

The limit is 127 where unsigned activation codes reach 129 at most: symmetric ones of up to 7 bits, asymmetric ones of
up to 6. Otherwise it is 64: x86 kernels without VNNI add two u8×s8 products in int16, which silently saturates at
255·127·2 > 32 767 but holds 129·127·2 = 32 766 and 255·64·2 = 32 640.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from hqc.errors import PassError
from hqc.ops.weight_codes import DIGIT_BASE
from hqc.passes.rewriting import rewrite
from hqc.passes.rotate_weights import rotated_codes
from hqc.pipeline import Findings
from hqc.program import Program, Stage, aten, is_op
from hqc.sites import rotation_within

__all__ = ["SplitDigits", "digit_limit"]

ops = torch.ops.hqc
_TWO_DIGITS = (-64 - 128 * 128, 63 + 128 * 127)
_LARGEST_UNSIGNED = 129
"""Codes in ±q are stored as 1…2·q + 1; twice this times 127 is an int16."""
PRODUCTS = (ops.int_linear.default, ops.int_conv2d.default)


def digit_limit(largest_code: int) -> int:
    """Largest |weight code| that one int8 product with activation codes of ±largest_code may hold; see the module.

    >>> digit_limit(7), digit_limit(64), digit_limit(65), digit_limit(127)
    (127, 127, 64, 64)
    """
    return 127 if 2 * largest_code + 1 <= _LARGEST_UNSIGNED else 64


@dataclass(frozen=True)
class SplitDigits:
    """Makes every integer product int8: one digit where the rotated codes fit, two where they do not."""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.INTEGER,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        """Sites that need two digits; a miss is a site where one is enough."""
        matches, misses = [], []
        for node in program.graph.nodes:
            if not is_op(node, *PRODUCTS):
                continue
            site = node.meta["site"]
            if is_op(node.args[1], ops.digit.default, ops.half.default, aten.to.dtype):
                misses.append((site, "its weight is a digit already"))
                continue
            low, high = (int(bound) for bound in rotated_codes(program, site, rotation_within(node.args[1])).aminmax())
            if low < _TWO_DIGITS[0] or high > _TWO_DIGITS[1]:
                raise PassError(
                    f"split_digits at {site}",
                    f"rotated codes span {low}…{high}, past two digits {_TWO_DIGITS}",
                    "Use a block of 64 or less, or rotate the weight too (insert_hadamard(weights=True)): both fit.",
                )
            peak = max(-low, high)
            limit = digit_limit(int(node.args[-1]))
            if peak > limit:
                matches.append(site)
            else:
                misses.append((site, f"one digit is enough: codes reach {peak} of {limit}"))
        return Findings(tuple(matches), tuple(misses))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Casts single digits, duplicates products for halves and double digits."""
        edit = rewrite(program)
        for node in [n for n in edit.graph.nodes if is_op(n, *PRODUCTS)]:
            weight, site = node.args[1], node.meta["site"]
            if site not in matches:
                if weight.meta["dtype"] != "int8":
                    meta = {"shape": weight.meta["shape"], "dtype": "int8", "site": site, "role": "weight"}
                    low = edit.call(node, aten.to.dtype, weight, torch.int8, **meta)
                    node.replace_input_with(weight, low)
                continue
            parts = []
            split = ops.half.default if _halves(program, node) else ops.digit.default
            for index in (0, 1):
                meta = {"shape": weight.meta["shape"], "dtype": "int8", "site": site, "role": "weight"}
                part = edit.call(node, split, weight, index, **meta)
                args = [part if a is weight else a for a in node.args]
                parts.append(edit.call(node, node.target, *args, like=node, site=site, role="product"))
            high = parts[1]
            if split is ops.digit.default:
                high = edit.call(node, aten.mul.Scalar, parts[1], DIGIT_BASE, like=node)
            total = edit.call(node, aten.add.Tensor, parts[0], high, like=node, site=site)
            node.replace_all_uses_with(total)
        return edit.finish()


def _halves(program: Program, product: fx.Node) -> bool:
    """Whether w = w₀ + w₁ is enough: |w_i| ≤ 64 at most, and within what one product may hold."""
    site, rotation = product.meta["site"], rotation_within(product.args[1])
    peak = max(abs(int(bound)) for bound in rotated_codes(program, site, rotation).aminmax())
    return peak <= 2 * min(64, digit_limit(int(product.args[-1])))  # type: ignore[arg-type]
