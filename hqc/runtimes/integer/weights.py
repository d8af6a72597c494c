"""A site's weight as the kernels read it: four bits packed where that is exact, else int8, else two int8 digits."""

import torch
from torch import Tensor, fx

from hqc.errors import ExportError
from hqc.kernels import Weight, channels_last, pack_weight, packed_weight_fits
from hqc.ops import digit
from hqc.program import Program, is_op
from hqc.rotations import Rotation
from hqc.sites import QuantisedSite, rotation_of

__all__ = ["site_weight", "weight_form"]

ops = torch.ops.hqc
_TWO_DIGITS = (-64 - 128 * 128, 63 + 128 * 127)


def site_weight(program: Program, site: QuantisedSite, *, device: torch.device, pack: bool = True) -> Weight:
    """The weight of a site in the integer form, on the device.

    pack: keep codes of at most four bits packed and unrotated where |w_q·H| ≤ 127, and rotate them in the kernel.

    Raises:
        ExportError: if the rotated codes need more than two digits.
    """
    scale = _state(program, site.layer.args[2]).to(device)
    stored, rotation = _stored(program, site, device)
    if pack and _four_bits(stored) and packed_weight_fits(stored, *rotation):
        packed = pack_weight(channels_last(stored))
        return Weight(packed, scale, rotation=rotation.block, regular=rotation.regular)
    rotated = channels_last(_total(program, site, device))
    low, high = (int(bound) for bound in rotated.aminmax())
    if low >= -128 and high <= 127:
        return Weight(rotated.to(torch.int8), scale)
    if low < _TWO_DIGITS[0] or high > _TWO_DIGITS[1]:
        raise ExportError(
            f"site {site.site}",
            f"rotated codes span {low}…{high}, past two digits {_TWO_DIGITS}",
            "Use a block of 64 or less, or rotate the weight too (insert_hadamard(weights=True)): both fit.",
        )
    return Weight(digit(rotated, 0), scale, high=digit(rotated, 1))


def weight_form(weight: Weight) -> str:
    """int4, int8 or two digits."""
    if weight.packed:
        return "int4"
    return "int8" if weight.high is None else "two digits"


def _stored(program: Program, site: QuantisedSite, device: torch.device) -> tuple[Tensor, Rotation]:
    """The codes before the rotation, and the rotation, order 1 for none."""
    node = site.products[0].node.args[1]
    while is_op(node, torch.ops.aten.to.dtype, ops.digit.default, ops.half.default):
        node = node.args[0]  # type: ignore[union-attr]
    if is_op(node, ops.rotate_codes.default):
        return _value(program, node.args[0], device), rotation_of(node)  # type: ignore[union-attr, arg-type]
    return _value(program, node, device), Rotation(1)


def _total(program: Program, site: QuantisedSite, device: torch.device) -> Tensor:
    """What the weights of a site's products add up to: as it is stored for one product, else int32."""
    values = [(p.factor, _value(program, p.node.args[1], device)) for p in site.products]
    (factor, total), *others = values
    if factor == 1 and not others:
        return total
    total = factor * total.to(torch.int32)
    for factor, value in others:
        total += factor * value.to(torch.int32)
    return total


def _four_bits(codes: Tensor) -> bool:
    return int(codes.min()) >= -8 and int(codes.max()) <= 7


def _state(program: Program, node: object) -> Tensor:
    assert isinstance(node, fx.Node)
    return program.state[str(node.target)].detach()


def _value(program: Program, node: object, device: torch.device) -> Tensor:
    """A weight expression, computed on the device."""
    assert isinstance(node, fx.Node)
    if node.op == "get_attr":
        return program.state[str(node.target)].detach().to(device)
    first, *others = node.args
    return node.target(_value(program, first, device), *others)  # type: ignore[operator, no-any-return]
