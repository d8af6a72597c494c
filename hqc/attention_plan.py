"""How one attention that is written out is quantised."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AttentionPlan", "attention_plan"]

_LOWEST, _HIGHEST, _HIGHEST_ASYMMETRIC = 2, 8, 7


@dataclass(frozen=True)
class AttentionPlan:
    """name: as `hqc.attentions` gives it. softmax_bits, operand_bits (of q, k and v): None for float.

    operands_symmetric False: their ranges have zero points.
    """

    name: str
    softmax_bits: int | None = None
    operand_bits: int | None = None
    operands_symmetric: bool = True

    @property
    def quantisers(self) -> int:
        """How many of q, k, v and softmax have one."""
        return 3 * (self.operand_bits is not None) + (self.softmax_bits is not None)

    def __str__(self) -> str:
        star = "" if self.operands_symmetric else "*"
        operands = "float" if self.operand_bits is None else f"a{self.operand_bits}{star}"
        softmax = "float" if self.softmax_bits is None else f"a{self.softmax_bits}"
        return f"q, k and v {operands}, softmax {softmax}"


def attention_plan(data: Mapping[str, Any]) -> AttentionPlan:
    """The entry of a plan.json.

    Raises:
        TypeError, ValueError: if it is none.
    """
    plan = AttentionPlan(**data)
    if not isinstance(plan.name, str) or type(plan.operands_symmetric) is not bool:
        raise ValueError(f"attention {str(plan.name)[:40]!r} has a field of the wrong type")
    for bits in (plan.softmax_bits, plan.operand_bits):
        if bits is not None and (type(bits) is not int or not _LOWEST <= bits <= _HIGHEST):
            raise ValueError(f"attention {plan.name!r} has {bits!r} bits")
    if not plan.operands_symmetric and (plan.operand_bits or _HIGHEST) > _HIGHEST_ASYMMETRIC:
        raise ValueError(f"attention {plan.name!r} has an asymmetric range of {plan.operand_bits} bits")
    return plan
