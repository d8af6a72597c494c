"""The products within quantised attention: which are of two operands' codes, so that they are integers, and why not.

    scores   q̂ @ k̂ᵀ = s_q·s_k·(c_q @ c_kᵀ)             q, k and v: codes c around 0, as every activation's
    values   p̂ @ v̂  = s_p·s_v·(c_p @ c_v)              softmax: codes from 0, where its steps are even

The sums are exact in int32: codes·codes·length < 2^31 is checked, of codes as they are stored, since kernels sum those
and take zero points off in the end. The second operand's codes are int8 where the sum of two neighbouring products fits
int16, in which x86 without VNNI adds them; else they are uint8, whose products are added in 32 bits by every kernel, at
half the speed. A range may have zero points by timestep: codes are q - z, around 0, so that the zero point in the file
is one constant for all samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from hqc.attentions import softmax_kinds, written_out
from hqc.export.site_checks import MULTIPLY_ADD_LIMIT
from hqc.program import Program, is_op
from hqc.sites import QuantisedSite, attention_quantisers

__all__ = ["AttentionProduct", "attention_products"]

_INT32_LIMIT = 2**31


@dataclass(frozen=True)
class AttentionProduct:
    """One product. operands: their quantisers, None for floats. obstacle: why it is of floats, empty for integers."""

    node: fx.Node
    operands: tuple[QuantisedSite | None, QuantisedSite | None]
    obstacle: str

    @property
    def codes(self) -> tuple[QuantisedSite, QuantisedSite]:
        """The operands of a product of integers."""
        left, right = self.operands
        assert left is not None
        assert right is not None
        return left, right

    @property
    def signed(self) -> bool:
        """Whether the second operand's codes may be int8."""
        return _signed(*self.codes)


def _signed(left: QuantisedSite, right: QuantisedSite) -> bool:
    return 2 * _unsigned_top(left) * right.bounds.largest <= MULTIPLY_ADD_LIMIT


def _unsigned_top(site: QuantisedSite) -> int:
    """The largest code as uint8, which has a zero point but for a softmax."""
    return site.bounds.high if _is_softmax(site) else 2 * site.bounds.largest + 1


def _is_softmax(site: QuantisedSite) -> bool:
    return is_op(site.quantiser, torch.ops.hqc.softmax_quantize.default)


def attention_products(program: Program) -> Iterator[AttentionProduct]:
    """Both products of every attention that has a quantiser, in graph order."""
    sites = {(site.product, site.real): site for site in attention_quantisers(program)}
    for found in written_out(program):
        if not found.quantisers:
            continue
        for node, *parts in found.products:
            reals = [found.quantisers.get(part) for part in parts]
            left, right = (None if real is None else sites[node, real] for real in reals)
            floats = [part for part, real in zip(parts, reals, strict=True) if real is None]
            yield AttentionProduct(node, (left, right), _obstacle(program, node, left, right, floats))


def _obstacle(
    program: Program, node: fx.Node, left: QuantisedSite | None, right: QuantisedSite | None, floats: list[str]
) -> str:
    if left is None or right is None:
        return f"{' and '.join(floats)} {'are' if len(floats) > 1 else 'is'} float"
    if _is_softmax(left) and softmax_kinds(program, left.quantiser)[1]:
        return "softmax has powers of two, which no product of integers takes"
    length = node.args[0].meta["shape"][-1]  # type: ignore[union-attr]
    if not isinstance(length, int):
        return "the length of its sums is not known before it runs"
    reach = length * _unsigned_top(left) * (right.bounds.largest if _signed(left, right) else _unsigned_top(right))
    return f"its sums reach {reach}, past int32" if reach >= _INT32_LIMIT else ""
