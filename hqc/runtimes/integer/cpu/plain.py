"""The passes in plain torch, for machines without a C++ compiler; codes are u8, code + 128."""

from typing import Any

import torch
from torch import Tensor

from hqc.kernels import GroupNorm, LayerNorm, Quantiser
from hqc.runtimes.integer import reference
from hqc.runtimes.integer.cpu.operators import ZERO

__all__ = ["gate_quantize", "group_norm_quantize", "hadamard_quantize", "layer_norm_quantize"]


def hadamard_quantize(x: Tensor, inverse_scale: Tensor, **how: Any) -> Tensor:
    """See `hqc.kernels`."""
    return _unsigned(reference.hadamard_quantize(x, inverse_scale, **how))


def group_norm_quantize(
    x: Tensor, norm: GroupNorm, quantiser: Quantiser | None, **how: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `hqc.kernels`."""
    codes, floats, beside = reference.group_norm_quantize(x, norm, quantiser, **how)
    return None if codes is None else _unsigned(codes), floats, None if beside is None else _unsigned(beside)


def layer_norm_quantize(x: Tensor, norm: LayerNorm, quantiser: Quantiser, **how: Any) -> tuple[Tensor, Tensor | None]:
    """See `hqc.kernels`."""
    codes, floats = reference.layer_norm_quantize(x, norm, quantiser, **how)
    return _unsigned(codes), floats


def gate_quantize(x: Tensor, quantiser: Quantiser, **how: Any) -> Tensor:
    """See `hqc.kernels`."""
    return _unsigned(reference.gate_quantize(x, quantiser, **how))


def _unsigned(codes: Tensor) -> Tensor:
    """code + 128: the highest bit is the other one."""
    return codes.view(torch.uint8).bitwise_xor_(ZERO)
