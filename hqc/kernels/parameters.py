"""What the options of every kernel share: parameters of an entry point, compile-time constants, checks of values."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from hqc.rotations import ORDERS

__all__ = [
    "BLOCKS",
    "FLOATS",
    "REGULAR_BLOCKS",
    "Constant",
    "Parameter",
    "Role",
    "check_bounds",
    "check_powers_of_two",
    "check_rotation",
    "check_value",
    "float_inputs",
    "left_out",
    "power_of_two",
    "rotation_constants",
]

Constant: TypeAlias = int | float | bool | str | None
Role: TypeAlias = Literal["input", "int32", "output", "scratch"]
BLOCKS = (1, 8, 16, 32, 64, 128, 256)
"""Orders of Sylvester's H that kernels rotate by, 1 for none."""
REGULAR_BLOCKS = ORDERS["regular"]
FLOATS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel's entry point, in order.

    role: a pointer in, a 32-bit integer, a pointer out, or one of the two pointers that triton adds at the end.
    type: triton's name (`*fp16`, `i32`, …).  multiple_of_16: an integer that the compiled code takes to be one.
    """

    name: str
    role: Role
    type: str
    multiple_of_16: bool = False


def check_value(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuses what is not among the allowed values.

    Raises:
        ValueError: naming them.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, allowed))}")


def check_powers_of_two(**values: int) -> None:
    """Refuses sizes that are no powers of two.

    Raises:
        ValueError: naming the first.
    """
    for name, value in values.items():
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name} is {value}; expected a power of two")


def check_bounds(low: int | None, high: int | None) -> None:
    """Refuses bounds of codes that int8 does not hold; None and None are those that lie beside the scales.

    Raises:
        ValueError: naming them.
    """
    if low is None and high is None:
        return
    if low is None or high is None or not -128 <= low < high <= 127:
        raise ValueError(f"codes span {low}…{high}; expected a range within -128…127")


def left_out(**present: bool) -> dict[str, Constant]:
    """Pointers to what is not there are constants: None."""
    return {f"{name}_ptr": None for name, there in present.items() if not there}


def float_inputs(*names: str) -> list[Parameter]:
    """float32 tensors that a kernel reads."""
    return [Parameter(name, "input", "*fp32") for name in names]


def check_rotation(name: str, block: int, *, regular: bool) -> None:
    """Refuses an order that a kind of rotation does not have; `name` of the option.

    Raises:
        ValueError: naming the orders that it has.
    """
    check_value(name, block, REGULAR_BLOCKS if regular else BLOCKS)


def rotation_constants(block: int, low: int | None, high: int | None, regular: bool) -> dict[str, Constant]:
    """Compile-time arguments of a rotation and a quantisation: 1/√b, log2 b, the kind, bounds."""
    sizes = {"NORM": 1 / math.sqrt(block), "LOW": low, "HIGH": high, "LOG_BLOCK": block.bit_length() - 1}
    return {**sizes, "REGULAR": regular}


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below value.

    >>> power_of_two(1), power_of_two(48), power_of_two(64)
    (1, 64, 64)
    """
    return 1 << (value - 1).bit_length()
