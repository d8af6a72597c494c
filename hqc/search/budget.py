"""Budgets as they are typed: bytes, bit operations, a share of the largest plan, or what equal bits everywhere take.

200MB, 1.5MiB      bytes of all tensors: codes as files hold them or at their true bits, the rest as it is
3.2GBOPs           multiply-adds of the layers times both widths, of one sample in one call
80%                of the bytes of the largest plan
w4a8               the bytes of that plan, which is to be bettered
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from hqc.bits import parse_bits
from hqc.errors import PlanError

__all__ = ["Budget", "Count", "Unit", "parse_budget", "shown"]

Unit = Literal["bytes", "BOPs"]
Count = Literal["files", "bits"]
"""What a code takes: as `hqc export` stores it, half a byte or one, or its bits."""
_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_NAMES = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"), (1, ""))
_FORM = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:(%)|([kmgt]?)(i?)(b|bytes?|bops?))")


@dataclass(frozen=True)
class Budget:
    """What a plan may take: an amount in `unit`, a share of the largest plan, or what equal bits everywhere take."""

    text: str
    unit: Unit = "bytes"
    amount: float | None = None
    share: float | None = None
    bits: str = ""


def parse_budget(text: str) -> Budget:
    """Reads 200MB, 1.5MiB, 3.2GBOPs, 80% or w4a8, case-insensitive.

    >>> parse_budget("1.5MiB").amount, parse_budget("3.2 GBOPs").unit, parse_budget("80%").share
    (1572864.0, 'BOPs', 0.8)

    Raises:
        PlanError: for anything else.
    """
    plain = text.strip().lower()
    if plain.startswith("w"):
        return Budget(text, bits=str(parse_bits(plain)))
    match = _FORM.fullmatch(plain)
    amount = float(match[1]) if match else 0.0
    if match is None or amount <= 0 or (match[4] and (not match[3] or match[5].startswith("bop"))):
        raise PlanError(f"--budget {text}", "is no budget", "Write it as 200MB, 1.5MiB, 3.2GBOPs, 80% or w4a8.")
    if match[2]:
        return Budget(text, share=amount / 100)
    factor = 2 ** (10 * "kmgt".index(match[3]) + 10) if match[4] else _PREFIXES[match[3]]
    return Budget(text, "BOPs" if match[5].startswith("bop") else "bytes", amount * factor)


def shown(cost: float, unit: Unit, *, up: bool = False, down: bool = False) -> str:
    """The amount in five digits; up or down: what it is rounded to.

    >>> shown(1_234_567, "bytes"), shown(1_234_567, "bytes", up=True), shown(512, "BOPs")
    ('1.2346 MB', '1.2346 MB', '512 BOPs')
    """
    size, prefix = next((one for one in _NAMES if cost >= one[0]), (1, ""))
    value = cost / size
    digits = 10 ** max(0, 4 - math.floor(math.log10(value))) if value >= 1 else 10**4
    value = (
        math.ceil(value * digits) if up else math.floor(value * digits) if down else round(value * digits)
    ) / digits
    return f"{value:.7g} {prefix}{'B' if unit == 'bytes' else 'BOPs'}"
