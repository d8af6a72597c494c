"""Bounds that lie beside the scales: each sample's codes are those of a kernel compiled for its own bounds."""

from collections.abc import Callable

import pytest
import torch
from kernel_oracle import fenced
from torch import Tensor

from hqc.errors import KernelError
from hqc.kernels import (
    Epilogue,
    GroupNorm,
    LayerNorm,
    Quantiser,
    Weight,
    gate_quantize,
    group_norm_quantize,
    hadamard_quantize,
    int_conv2d,
    int_gemm,
    layer_norm_quantize,
    wide_attention,
)
from hqc.kernels import launch as launchers
from hqc.kernels.products import ProductTile
from hqc.runtimes.integer import reference

RANGES = ((0, 15), (-15, 0), (-6, 9))
SAMPLES = len(RANGES)
BLOCK = 16


def floats(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def check(run: Callable[[Quantiser], Tensor | None], device: str, *, scale: float = 1.0) -> Tensor:
    """Looked-up bounds, between poison, against one call for each pair of bounds."""
    inverse = scale * torch.linspace(6.0, 10.0, SAMPLES)
    steps = torch.cat([inverse[:, None], torch.tensor(RANGES, dtype=torch.float32)], 1)
    found = run(Quantiser(fenced(steps, float("nan"), device), None, None, BLOCK))
    assert found is not None
    assert found.dtype == torch.int8
    for n, (low, high) in enumerate(RANGES):
        fixed = run(Quantiser(inverse.to(device), low, high, BLOCK))
        assert fixed is not None
        assert torch.equal(found[n], fixed[n])
        assert {low, 0, high} <= set(found[n].flatten().tolist()), "the range is used and clipped at both ends"
    return found


def by_keywords(x: Tensor, how: Quantiser, **more: object) -> Tensor:
    return hadamard_quantize(x, how.inverse_scale, **how.form, **more)


@pytest.mark.parametrize("shape", [(3, 3, 48), (77, 48)], ids=str)
def test_rows(shape: tuple[int, ...], device: str) -> None:
    x = floats(SAMPLES, *shape).to(device)
    found = check(lambda how: by_keywords(x, how), device)
    steps = torch.cat([torch.linspace(6.0, 10.0, SAMPLES)[:, None], torch.tensor(RANGES, dtype=torch.float32)], 1)
    plain = reference.hadamard_quantize(x.cpu(), steps, low=None, high=None, block=BLOCK)
    assert float((found.cpu() != plain).float().mean()) < 1e-3  # sums in another order


def test_images(device: str) -> None:
    x = floats(SAMPLES, 48, 5, 3).to(device)
    check(lambda how: by_keywords(x, how, nchw=True), device)


def test_two_tensors_side_by_side(device: str) -> None:
    x, second = floats(SAMPLES, 5, 32).to(device), floats(SAMPLES, 5, 48, seed=1).to(device)
    check(lambda how: by_keywords(x, how, second=second), device)


def test_group_norm_and_what_lies_beside(device: str) -> None:
    x, norm = floats(SAMPLES, 3, 5, 48, dtype=torch.float16).to(device), GroupNorm(8, 1e-5)
    check(lambda how: group_norm_quantize(x, norm, how)[0], device, scale=2.0)
    plain = Quantiser(torch.ones(SAMPLES, device=device), -7, 7, BLOCK)
    check(lambda how: group_norm_quantize(x, norm, plain, beside=how)[2], device)


def test_layer_norm(device: str) -> None:
    x = floats(SAMPLES, 9, 48).to(device)
    check(lambda how: layer_norm_quantize(x, LayerNorm(1e-5), how)[0], device, scale=2.0)


@pytest.mark.parametrize("gated", [True, False])
def test_gates(gated: bool, device: str) -> None:
    x = floats(SAMPLES, 9, 96).to(device)
    check(lambda how: gate_quantize(x, how, kind="silu", gated=gated), device, scale=3.0)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", [16, 5])
def test_products(rows: int, splits: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """16 rows are one tile of one sample; 5 make tiles over several."""
    monkeypatch.setattr(launchers, "chosen_tile", lambda *sizes, **form: ProductTile(16, 32, 32, 1, 1, splits))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (SAMPLES, rows, 416), generator=generator).to(torch.int8).to(device)
    wide = torch.randint(-90, 91, (64, 416), generator=generator).to(torch.int8).to(device)
    weight, scale = Weight(wide, torch.full((64,), 1 / 2000, device=device)), torch.ones(SAMPLES, device=device)
    check(lambda how: int_gemm(codes, weight, scale, Epilogue(quantiser=how)), device)


def test_convolution(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(launchers, "chosen_tile", lambda *sizes, **form: ProductTile(16, 32, 32, 1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (SAMPLES, 4, 5, 48), generator=generator).to(torch.int8).to(device)
    wide = torch.randint(-90, 91, (32, 3, 3, 48), generator=generator).to(torch.int8).to(device)
    weight, scale = Weight(wide, torch.full((32,), 1 / 2000, device=device)), torch.ones(SAMPLES, device=device)
    check(lambda how: int_conv2d(codes, weight, scale, Epilogue(quantiser=how), padding=(1, 1)), device)


def test_attention(device: str) -> None:
    q, k, v = (floats(SAMPLES, 70, 96, seed=s, dtype=torch.float16).to(device) for s in range(3))
    check(lambda how: wide_attention(q, k, v, heads=1, quantiser=how), device, scale=3.0)


def test_scales_without_their_bounds_are_refused(device: str) -> None:
    x, inverse = floats(SAMPLES, 5, 48).to(device), torch.ones(SAMPLES, device=device)
    with pytest.raises(KernelError, match="inverse_scale"):
        hadamard_quantize(x, inverse, low=None, high=None, block=BLOCK)
    with pytest.raises(KernelError, match="inverse_scale"):
        hadamard_quantize(x, inverse[:, None].expand(-1, 3).contiguous(), low=-7, high=7, block=BLOCK)
