"""What products do after their sums, against the plain-torch kernels: shift, gate, codes, statistics; also split."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_oracle import fenced
from torch import Tensor

from hqc.kernels import Epilogue, Quantiser, Weight, int_conv2d, int_conv2d_statistics, int_gemm, int_gemm_statistics
from hqc.kernels import launch as launchers
from hqc.kernels.products import ProductTile
from hqc.runtimes.integer import reference

SINGLE = torch.float32


def codes_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(*shape: int) -> Weight:
    wide = torch.randint(-90, 91, shape, generator=torch.Generator().manual_seed(9)).to(torch.int8)
    return Weight(wide, torch.linspace(0.5, 1.5, shape[0]) / 2000)


EPILOGUES: dict[str, Any] = {
    "shift": {"shift": True},
    "gelu": {"gate": "gelu"},
    "shift, silu gate, codes": {"shift": True, "gate": "silu", "codes": True},
    "residual, codes": {"residual": True, "codes": True},
    "shift, residual, silu": {"shift": True, "residual": True, "silu": True},
}


def epilogue_of(
    what: dict[str, Any], samples: int, shape: tuple[int, ...], outputs: int, block: int, *, regular: bool = False
) -> Epilogue:
    """On the CPU. The shift is a slice of a wider matrix, as that of one layer among many is."""
    shift = floats(samples, 2 * outputs, seed=2)[:, 8 : 8 + outputs] if what.get("shift") else None
    residual = floats(*shape, outputs, seed=3) if what.get("residual") else None
    inverse = torch.linspace(2.0, 5.0, samples)
    quantiser = Quantiser(inverse, -7, 7, block, regular) if what.get("codes") else None
    gate, silu = what.get("gate", "none"), what.get("silu", False)
    return Epilogue(floats(outputs, seed=1), residual, silu, SINGLE, shift, gate, quantiser)


def on(device: str, epilogue: Epilogue) -> Epilogue:
    moved = {}
    for name in ("bias", "shift", "residual"):
        tensor = getattr(epilogue, name)
        moved[name] = None if tensor is None else tensor.to(device)
    if epilogue.quantiser is not None:
        moved["quantiser"] = replace(
            epilogue.quantiser, inverse_scale=fenced(epilogue.quantiser.inverse_scale, float("nan"), device)
        )
    return replace(epilogue, **moved)


def weight_on(device: str, weight: Weight) -> Weight:
    return replace(weight, codes=weight.codes.to(device), scale=weight.scale.to(device))


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    found = found.cpu()
    if found.dtype == torch.int8:
        # A butterfly adds in another order than a matrix product: at most a code in a thousand is on a boundary.
        step = (found.int() - wanted.int()).abs()
        assert int(step.max()) <= 1
        assert float(step.float().mean()) <= 1e-3
        assert len(found.unique()) > 7
    else:
        # The same operations in one order; exp and erf of another library.
        assert float((found - wanted).abs().max()) <= 2e-6 * max(1.0, float(wanted.abs().max()))
        assert float(wanted.std()) > 0.1


@pytest.fixture(params=[1, 3], ids=["whole", "split"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ProductTile:
    """Tiles of 16 rows and 32 outputs, over the whole inner axis or a third of it."""
    chosen = ProductTile(16, 32, 32, 1, 1, request.param)
    monkeypatch.setattr(launchers, "chosen_tile", lambda *sizes, **form: chosen)
    return chosen


ROWS = [(2, 16), (3, 5), (2, 1)]


# Every epilogue on whole tiles and on tiles over several samples, of which there are two kinds in turns.
@pytest.mark.parametrize(
    ("what", "samples", "rows"),
    [(what, *rows) for turn, what in enumerate(EPILOGUES) for rows in (ROWS[0], ROWS[1 + turn % 2])],
)
def test_gemm(what: str, samples: int, rows: int, tile: ProductTile, device: str) -> None:
    """16 rows are one tile of one sample; 5 and 1 make tiles over several."""
    codes, weight, scale = codes_of(samples, rows, 416), weight_of(64, 416), torch.linspace(0.5, 2.0, samples)
    epilogue = epilogue_of(EPILOGUES[what], samples, (samples, rows), 64, 16)
    wanted = reference.int_gemm(codes, weight, scale, epilogue)
    found = int_gemm(codes.to(device), weight_on(device, weight), scale.to(device), on(device, epilogue))
    assert_same(found, wanted)


@pytest.mark.parametrize("block", [16, 32])
def test_codes_of_a_regular_rotation(block: int, tile: ProductTile, device: str) -> None:
    codes, weight, scale = codes_of(2, 16, 416), weight_of(64, 416), torch.tensor([0.5, 2.0])
    epilogue = epilogue_of(EPILOGUES["residual, codes"], 2, (2, 16), 64, block, regular=True)
    wanted = reference.int_gemm(codes, weight, scale, epilogue)
    assert_same(int_gemm(codes.to(device), weight_on(device, weight), scale.to(device), on(device, epilogue)), wanted)
    sylvester = replace(epilogue, quantiser=replace(epilogue.quantiser, regular=False))
    assert not torch.equal(wanted, reference.int_gemm(codes, weight, scale, sylvester))


@pytest.mark.parametrize(
    ("what", "height", "upsample"),
    [("shift", 4, 1), ("residual, codes", 4, 1), ("residual, codes", 4, 2), ("shift", 2, 3)],
)
def test_convolution(what: str, height: int, upsample: int, tile: ProductTile, device: str) -> None:
    codes, weight, scale = codes_of(2, height, 2, 48), weight_of(40, 3, 3, 48), torch.tensor([0.5, 2.0])
    window = {"stride": (1, 1), "padding": (1, 1), "upsample": upsample}
    epilogue = epilogue_of(EPILOGUES[what], 2, (2, height * upsample, 2 * upsample), 40, 8)
    wanted = reference.int_conv2d(codes, weight, scale, epilogue, **window)
    assert wanted.shape[1:3] == (height * upsample, 2 * upsample)
    found = int_conv2d(codes.to(device), weight_on(device, weight), scale.to(device), on(device, epilogue), **window)
    assert_same(found, wanted)


@pytest.mark.parametrize(("samples", "size", "dtype"), [(1, 8, torch.float16), (2, 5, torch.float32)])
def test_statistics_are_those_of_the_output(
    samples: int, size: int, dtype: torch.dtype, tile: ProductTile, device: str
) -> None:
    """64 pixels are whole tiles and come from the epilogue, 25 are not and take a pass of their own."""
    codes, weight = codes_of(samples, size, size, 32), weight_of(40, 3, 3, 32)
    scale = torch.tensor([0.5, 2.0])[:samples]
    arguments = (codes.to(device), weight_on(device, weight), scale.to(device), Epilogue(dtype=dtype))
    y, statistics = int_conv2d_statistics(*arguments, padding=(1, 1))
    assert torch.equal(y, int_conv2d(*arguments, padding=(1, 1)))
    check_statistics(y, statistics, {8: (16, 4) if tile.splits == 1 else (32, 2), 5: (128, 1)}[size])


def test_statistics_of_a_gemm(tile: ProductTile, device: str) -> None:
    codes, weight, scale = codes_of(2, 32, 416), weight_of(72, 416), torch.tensor([0.5, 2.0])
    arguments = (codes.to(device), weight_on(device, weight), scale.to(device), Epilogue(dtype=torch.float16))
    y, statistics = int_gemm_statistics(*arguments)
    assert torch.equal(y, int_gemm(*arguments))
    check_statistics(y, statistics, (16, 2) if tile.splits == 1 else (32, 1))


def check_statistics(y: Tensor, statistics: Any, blocks: tuple[int, int]) -> None:
    assert (statistics.rows, statistics.values.shape[1]) == blocks
    parts = y.cpu().flatten(1, -2).double().split(statistics.rows, 1)
    for i, part in enumerate(parts):
        mean, away = statistics.values[:, i].cpu().double().unbind(1)
        deviations = (part - part.mean(1, keepdim=True)).square().sum(1)
        # float32 sums of at most 128 numbers.
        assert torch.allclose(mean, part.mean(1), rtol=1e-5, atol=1e-5)
        assert torch.allclose(away, deviations, rtol=1e-4, atol=1e-5)
