"""Random layers for the integer products: the weight as the kernel stores it and as the integers that it stands for."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from kernel_oracle import fenced, rotated
from torch import Tensor

from hqc.kernels import Weight, pack_weight
from hqc.ops import digit

__all__ = ["FORMS", "TOLERANCES", "Form", "layer", "random_codes"]

TOLERANCES = {
    torch.float32: 4e-7,  # three roundings of 2^-24, and SiLU's
    torch.float16: 2**-11 + 1e-6,  # the last rounding
    # triton's interpreter cuts the lower bits off where a GPU rounds to nearest: twice the error.
    torch.bfloat16: 2**-8 * (2 if os.environ.get("TRITON_INTERPRET") == "1" else 1) + 1e-6,
}
"""Relative to the largest term of the sum."""


@dataclass(frozen=True)
class Form:
    """How a weight is stored: int8, four bits with a rotation, or two digits."""

    name: str
    block: int = 1
    regular: bool = False

    def __str__(self) -> str:
        kind = "-regular" if self.regular else ""
        return f"{self.name}{kind}-{self.block}" if self.block > 1 else self.name


FORMS = [Form("int8"), Form("packed"), *[Form("packed", b) for b in (8, 16, 32, 64, 128, 256)], Form("digits")]
FORMS += [Form("packed", block, regular=True) for block in (16, 32, 64, 256)]


def random_codes(shape: tuple[int, ...], bound: int, generator: torch.Generator) -> Tensor:
    """int8 in -bound…bound."""
    return torch.randint(-bound, bound + 1, shape, generator=generator, dtype=torch.int8)


def layer(form: Form, shape: tuple[int, ...], generator: torch.Generator, device: str) -> tuple[Weight, np.ndarray]:
    """(the weight for the kernel with scales of 1, its integers in int64) for [O, …, C]."""
    scale = torch.ones(shape[0], device=device)
    if form.name == "int8":
        codes = random_codes(shape, 127, generator)
        return Weight(fenced(codes, 77, device), scale), codes.to(torch.int64).numpy()
    if form.name == "digits":
        wide = torch.randint(-16_000, 16_001, shape, generator=generator).to(torch.int16)
        low, high = (fenced(digit(wide, index), 77, device) for index in (0, 1))
        return Weight(low, scale, high=high), wide.to(torch.int64).numpy()
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    if form.block >= 16:
        # Sums of a wide block leave int8; Gaussian codes of this width stay in it, and the assertion makes sure.
        width = {16: 3.5, 32: 3.0, 64: 2.5, 128: 2.0, 256: 1.4}[form.block]
        codes = (torch.randn(shape, generator=generator) * width).round().clamp(-8, 7).to(torch.int8)
    turned = (
        rotated(codes.numpy(), form.block, regular=form.regular) if form.block > 1 else codes.numpy().astype(np.int64)
    )
    turned_peak = np.abs(turned).max()
    assert turned_peak <= 127, f"the case is wrong: {turned_peak}"
    packed = fenced(pack_weight(codes), 0x77, device)
    return Weight(packed, scale, rotation=form.block, regular=form.regular), turned
