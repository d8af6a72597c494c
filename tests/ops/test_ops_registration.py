"""`torch.library.opcheck` on every operator: schema, fake implementation, autograd registration, dynamic shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hqc.ops  # noqa: F401  (registers the operators)

ops = torch.ops.hqc


def real(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(grad)


def codes(*shape: int, dtype: torch.dtype = torch.int8, top: int = 7) -> torch.Tensor:
    return torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def scale(n: int, grad: bool = False) -> torch.Tensor:
    return torch.linspace(0.1, 1, n).requires_grad_(grad)


def bounds(n: int, grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """-z and 15 - z of different z."""
    zero = torch.arange(n, dtype=torch.float32) * 3
    return (-zero).requires_grad_(grad), (15 - zero).requires_grad_(grad)


def kinds(n: int) -> torch.Tensor:
    """Even steps and powers of two in turns."""
    return torch.arange(n, dtype=torch.float32) % 2


CASES: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "hadamard-tokens": (ops.hadamard, lambda: (real(2, 3, 16), 8, -1)),
    "hadamard-images": (ops.hadamard, lambda: (real(2, 16, 3, 5), 8, 1)),
    "hadamard-matrix": (ops.hadamard, lambda: (real(2, 16), 16, 1)),
    "hadamard-tokens-grad": (ops.hadamard, lambda: (real(2, 3, 16, grad=True), 8, -1)),
    "hadamard-images-grad": (ops.hadamard, lambda: (real(2, 16, 3, 5, grad=True), 8, 1)),
    "hadamard-strided": (ops.hadamard, lambda: (real(2, 3, 5, 16).permute(0, 3, 1, 2), 8, 1)),
    "hadamard-regular": (ops.hadamard, lambda: (real(2, 3, 32), 16, -1, True)),
    "hadamard-regular-grad": (ops.hadamard, lambda: (real(2, 32, 3, 5, grad=True), 32, 1, True)),
    "fake_quantize": (ops.fake_quantize, lambda: (real(3, 4, 5), scale(3), -7, 7)),
    "fake_quantize-grad": (ops.fake_quantize, lambda: (real(3, 4, grad=True), scale(3, grad=True), -7, 7)),
    "fake_quantize-scale-grad": (ops.fake_quantize, lambda: (real(3, 4), scale(3, grad=True), -7, 7)),
    "fake_quantize_backward": (ops.fake_quantize_backward, lambda: (real(3, 4), real(3, 4), scale(3), -7, 7)),
    "fake_quantize_bounded": (ops.fake_quantize_bounded, lambda: (real(3, 4, 5), scale(3), *bounds(3))),
    "fake_quantize_bounded-grad": (
        ops.fake_quantize_bounded,
        lambda: (real(3, 4, grad=True), scale(3, grad=True), *bounds(3, grad=True)),
    ),
    "fake_quantize_bounded_backward": (
        ops.fake_quantize_bounded_backward,
        lambda: (real(3, 4), real(3, 4), scale(3), *bounds(3)),
    ),
    "fake_quantize_residual": (ops.fake_quantize_residual, lambda: (real(3, 4, 5), scale(3), *bounds(3), scale(3))),
    "fake_quantize_residual-grad": (
        ops.fake_quantize_residual,
        lambda: (real(3, 4, grad=True), scale(3, grad=True), *bounds(3, grad=True), scale(3, grad=True)),
    ),
    "quantize_bounded": (ops.quantize_bounded, lambda: (real(3, 4, 2, 2), scale(3), *bounds(3))),
    "round_ste": (ops.round_ste, lambda: (real(5),)),
    "round_ste-grad": (ops.round_ste, lambda: (real(5, grad=True),)),
    "softmax_quantize": (ops.softmax_quantize, lambda: (real(3, 2, 5).softmax(-1), scale(3) / 99, kinds(3), 4)),
    "softmax_quantize-grad": (
        ops.softmax_quantize,
        lambda: (real(3, 5).softmax(-1).requires_grad_(), scale(3, grad=True), kinds(3), 8),
    ),
    "softmax_quantize_backward": (
        ops.softmax_quantize_backward,
        lambda: (real(3, 4), real(3, 4).softmax(-1), scale(3), kinds(3), 4),
    ),
    "quantize": (ops.quantize, lambda: (real(3, 4, 2, 2), scale(3), -7, 7)),
    "dequantize": (ops.dequantize, lambda: (codes(3, 4), scale(3))),
    "dynamic_scale-images": (ops.dynamic_scale, lambda: (real(2, 10, 3, 2), 7, 1, 4)),
    "dynamic_scale-tokens": (ops.dynamic_scale, lambda: (real(2, 3, 8), 7, -1, 4)),
    "fake_quantize_grouped": (
        ops.fake_quantize_grouped,
        lambda: (real(3, 10, 2, 2), scale(36).view(3, 3, 2, 2), -8, 7, 1, 4),
    ),
    "fake_quantize_grouped-strided": (
        ops.fake_quantize_grouped,
        lambda: (real(3, 2, 2, 8).permute(0, 3, 1, 2), scale(24).view(3, 2, 2, 2), -8, 7, 1, 4),
    ),
    "quantize_grouped": (ops.quantize_grouped, lambda: (real(2, 3, 8), scale(12).view(2, 3, 2), -7, 7, -1, 4)),
    "dequantize_grouped": (ops.dequantize_grouped, lambda: (codes(3, 10), scale(9).view(3, 3), 1, 4)),
    "nearest_timestep": (ops.nearest_timestep, lambda: (scale(4), scale(7))),
    "unpack_int4": (ops.unpack_int4, lambda: (codes(8).to(torch.uint8), [3, 5])),
    "lookup": (ops.lookup, lambda: (codes(3, 4, 2, 2), real(3, 16))),
    "rotate_codes-linear": (ops.rotate_codes, lambda: (codes(3, 16), 8)),
    "rotate_codes-conv": (ops.rotate_codes, lambda: (codes(3, 16, 3, 3), 16)),
    "rotate_codes-regular": (ops.rotate_codes, lambda: (codes(3, 32, 3, 3), 16, True)),
    "half-lower": (ops.half, lambda: (codes(3, 4, top=127), 0)),
    "half-upper": (ops.half, lambda: (codes(3, 4, top=127), 1)),
    "digit-low": (ops.digit, lambda: (codes(3, 4, dtype=torch.int16, top=900), 0)),
    "digit-high": (ops.digit, lambda: (codes(3, 4, dtype=torch.int16, top=900), 1)),
    "int_linear": (ops.int_linear, lambda: (codes(2, 3, 8), codes(4, 8, dtype=torch.int16), 7)),
    "int_conv2d": (ops.int_conv2d, lambda: (codes(2, 8, 5, 6), codes(4, 8, 3, 2), [2, 1], [1, 0], [1, 2], 7)),
    "rescale-tokens": (ops.rescale, lambda: (codes(2, 3, 4, dtype=torch.int32), scale(2), scale(4), scale(4), -1)),
    "rescale-images": (ops.rescale, lambda: (codes(2, 4, 3, 3, dtype=torch.int32), scale(2), scale(4), None, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    operator, arguments = CASES[name]
    outcomes = torch.library.opcheck(operator.default, arguments())
    assert set(outcomes) >= {
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    }
    assert set(outcomes.values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:

    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("hqc::")}
    assert {operator._qualified_op_name.split("::")[1] for operator, _ in CASES.values()} == registered
