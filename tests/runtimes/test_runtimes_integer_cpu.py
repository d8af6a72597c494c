"""Products and passes of the `torch-int8` runtime against integers in numpy and the kernels in plain torch."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hqc.evaluation.bench.machine import has_vnni, isa_flags
from hqc.kernels import Epilogue, GroupNorm, LayerNorm, Quantiser, Weight
from hqc.ops import digit
from hqc.runtimes.integer import reference
from hqc.runtimes.integer.cpu import compiler, kernels, operators, plain
from hqc.runtimes.integer.cpu.compiler import compiled_passes
from hqc.runtimes.integer.cpu.native import NativePasses
from hqc.runtimes.integer.cpu.operators import INT16_LIMIT, adds_in_int16, require_operators
from hqc.runtimes.integer.cpu.own import OwnProducts
from hqc.runtimes.integer.cpu.products import OwnSum, largest_weight, pack_product, summands

WINDOW = ((1, 1), (0, 0), (1, 1))


def whole(generator: torch.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=generator)


def stored(codes: torch.Tensor) -> torch.Tensor:
    """Codes as the passes write them."""
    return (codes + 128).to(torch.uint8)


def numpy_conv(codes, weight, window) -> np.ndarray:
    """int64 sums of codes [N, H, W, C] and a weight [O, kh, kw, C], padded with code 0, one tap after the other."""
    (sh, sw), (ph, pw), (dh, dw) = window
    x = np.pad(codes.numpy().astype(np.int64), ((0, 0), (ph, ph), (pw, pw), (0, 0)))
    w = weight.numpy().astype(np.int64)
    _, kh, kw, _ = w.shape
    height = (x.shape[1] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[2] - dw * (kw - 1) - 1) // sw + 1
    acc = np.zeros((len(x), height, width, len(w)), dtype=np.int64)
    for i in range(kh):
        for j in range(kw):
            seen = x[:, i * dh : i * dh + (height - 1) * sh + 1 : sh, j * dw : j * dw + (width - 1) * sw + 1 : sw]
            acc += seen @ w[:, i, j].T
    return acc


def cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8") if file.exists() else ""


@pytest.fixture(scope="module", params=["oneDNN", "own", "own with VNNI", "own without VNNI"])
def own(request, tmp_path_factory, native_cache) -> OwnProducts | None:
    """What multiplies: oneDNN, or code of our own for this machine, for one with VNNI (emulated or not), or without."""
    if request.param == "oneDNN":
        return None
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "own without VNNI":
            if "avx512_vnni" not in isa_flags(cpuinfo()):
                pytest.skip("code for this machine, which is tried above, is without")
            options = ["-march=haswell" if option == "-march=native" else option for option in compiler.OPTIONS]
            patch.setattr(compiler, "OPTIONS", tuple(options))
        if request.param == "own with VNNI":
            header = Path(__file__).with_name("vnni_emulated.h")
            products = tmp_path_factory.mktemp("emulated") / "products.cpp"
            sources = {source.stem: source for source in compiler.SOURCES}
            products.write_text(f'#include "{header}"\n#include "{sources["products"]}"\n')
            patch.setattr(compiler, "SOURCES", tuple({**sources, "products": products}.values()))
        library = compiled_passes.__wrapped__(native_cache)
    found = None if library.functions is None else OwnProducts(library.functions)
    if found is None or not found.there:
        pytest.skip("no compiler, or neither AVX-512 with VNNI nor AVX2")
    expected = {"own with VNNI": False, "own without VNNI": True}
    assert found.in_int16 == expected.get(request.param, found.in_int16)
    return found


# ---- products ------------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "3x3": (3, 3, ((1, 1), (1, 1), (1, 1))),
    "stride": (3, 3, ((2, 2), (1, 1), (1, 1))),
    "dilation": (3, 3, ((1, 1), (2, 2), (2, 2))),
    "oblong": (1, 3, ((1, 2), (0, 1), (1, 1))),
    "1x1": (1, 1, WINDOW),
    "1x1 padded": (1, 1, ((1, 1), (1, 1), (1, 1))),
    "1x1 strided": (1, 1, ((2, 2), (0, 0), (1, 1))),
}


@pytest.mark.parametrize("channels", [3, 16, 36])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_convolution_is_numpy_s_to_the_bit(own, name: str, channels: int) -> None:
    """Scales of 1: float32 holds the sums. Codes span all of int8, padding is code 0."""
    kh, kw, window = GEOMETRIES[name]
    g = torch.Generator().manual_seed(channels)
    codes, weight = whole(g, -128, 127, 2, 6, 7, channels), whole(g, -127, 127, 5, kh, kw, channels).to(torch.int8)
    product = pack_product(Weight(weight, torch.ones(5)), 128, window, (6, 7), own)
    found = product(stored(codes), torch.ones(2), Epilogue(dtype=torch.float32))
    assert found.is_contiguous()
    assert np.array_equal(found.numpy().astype(np.int64), numpy_conv(codes, weight, window))


def test_an_enlarged_image_repeats_each_pixel(own) -> None:
    g = torch.Generator().manual_seed(0)
    codes, weight = whole(g, -8, 7, 1, 3, 2, 4), whole(g, -127, 127, 3, 3, 3, 4).to(torch.int8)
    window = GEOMETRIES["3x3"][2]
    product = pack_product(Weight(weight, torch.ones(3)), 8, window, (6, 4), own)
    found = product(stored(codes), torch.ones(1), Epilogue(dtype=torch.float32), 2)
    large = codes.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert np.array_equal(found.numpy().astype(np.int64), numpy_conv(large, weight, window))


@pytest.mark.parametrize("shape", [(2, 19), (1, 3, 64), (3, 7, 32)])
def test_a_linear_layer_in_two_digits_is_numpy_s_to_the_bit(own, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(len(shape))
    codes, wide = whole(g, -8, 7, *shape), whole(g, -4000, 4000, 70, shape[-1])
    weight = Weight(digit(wide, 0), torch.ones(70), high=digit(wide, 1))
    found = pack_product(weight, 8, own=own)(stored(codes), torch.ones(shape[0]), Epilogue(dtype=torch.float32))
    assert np.array_equal(found.numpy().astype(np.int64), codes.numpy() @ wide.numpy().T)


def test_many_values_and_rows_are_multiplied_in_parts(own) -> None:
    """More values than are multiplied in one go, more rows than one piece has."""
    g = torch.Generator().manual_seed(6)
    codes, weight = whole(g, -8, 7, 2, 9, 13, 260), whole(g, -100, 100, 40, 3, 3, 260).to(torch.int8)
    window = GEOMETRIES["3x3"][2]
    product = pack_product(Weight(weight, torch.ones(40)), 8, window, (9, 13), own)
    found = product(stored(codes), torch.ones(2), Epilogue(dtype=torch.float32))
    assert np.array_equal(found.numpy().astype(np.int64), numpy_conv(codes, weight, window))


@pytest.mark.parametrize("largest", [1, 9, 64, 127])
@pytest.mark.parametrize("reach", [1, 8, 31, 128])
def test_the_largest_codes_and_weights_add_up(own, reach: int, largest: int) -> None:
    """Of one sign throughout, so that a sum that int16 did not hold would show; 13 rows and 37 outputs fill no tile."""
    signs = torch.tensor([1, -1]).repeat(19)[:37, None]
    weight, row = (signs * largest).expand(37, 250).to(torch.int8), torch.tensor([-reach, min(reach, 127)])
    codes = row.repeat(7)[:13, None].expand(13, 250)
    found = pack_product(Weight(weight, torch.ones(37)), reach, own=own)(
        stored(codes), torch.ones(13), Epilogue(dtype=torch.float32)
    )
    assert np.array_equal(found.numpy().astype(np.int64), codes.numpy() @ weight.numpy().T.astype(np.int64))


@pytest.mark.parametrize("scales", ["one timestep", "mixed timesteps"])
@pytest.mark.parametrize("shifts", ["none", "equal", "each its own"])
def test_scales_bias_shift_and_residual(own, scales: str, shifts: str) -> None:
    """y = acc·s_w·s[n] + bias + shift[n] + r, then SiLU; in float64 from numpy's sums, to float32's rounding."""
    g = torch.Generator().manual_seed(3)
    codes, weight = whole(g, -127, 127, 3, 4, 4, 8), whole(g, -127, 127, 6, 3, 3, 8).to(torch.int8)
    window = GEOMETRIES["3x3"][2]
    steps = torch.rand(6, generator=g) * 1e-3
    scale = torch.full((3,), 0.37) if scales == "one timestep" else torch.tensor([0.37, 0.5, 1.3])
    shift = None if shifts == "none" else torch.randn(3 if shifts == "each its own" else 1, 6, generator=g).expand(3, 6)
    bias, residual = torch.randn(6, generator=g), torch.randn(3, 4, 4, 6, generator=g)
    wanted = torch.from_numpy(numpy_conv(codes, weight, window)).double() * steps.double() * scale.view(3, 1, 1, 1)
    wanted = wanted + bias + (0 if shift is None else shift[:, None, None]) + residual
    product, kept = pack_product(Weight(weight, steps), 127, window, (4, 4), own), residual.clone()
    for silu in (False, True):
        epilogue = Epilogue(bias, residual, silu, torch.float32, shift)
        found = product(stored(codes), scale, epilogue).double()
        exact = torch.nn.functional.silu(wanted) if silu else wanted
        assert float((found - exact).abs().max() / exact.abs().max()) <= 1e-6
    assert torch.equal(residual, kept)  # whoever else reads it finds it as it was


# ---- saturation ----------------------------------------------------------------------------------------------------


def pairs_in_int16(codes: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    """What x86 without VNNI computes: neighbouring u8 x s8 products added in int16, which saturates."""
    u, w = stored(codes).numpy().astype(np.int64), weight.numpy().astype(np.int64)
    products = u[:, None] * w
    pairs = np.clip(products[..., ::2] + products[..., 1::2], -(2**15), INT16_LIMIT)
    return pairs.sum(-1) - 128 * w.sum(-1)


@pytest.mark.parametrize("reach", [1, 7, 64, 127])
def test_split_weights_never_leave_int16(reach: int) -> None:
    """The worst codes and weights there are, in a simulation of such a CPU; without the split it is wrong."""
    weight = torch.tensor([[127, 127, -127, -127], [-128, -128, 127, 127], [64, 64, -64, -64]], dtype=torch.int8)
    codes = torch.tensor([[reach] * 4, [-reach] * 4, [reach, reach, -reach, -reach]])
    exact = codes.numpy() @ weight.numpy().astype(np.int64).T
    limit = largest_weight(reach)
    parts = summands(Weight(weight, torch.ones(3)), reach, fits=lambda codes: int(codes.int().abs().max()) <= limit)
    assert np.array_equal(sum(f * pairs_in_int16(codes, part) for part, f in parts), exact)
    assert not np.array_equal(pairs_in_int16(codes, weight), exact)
    assert len(parts) == 2
    assert len(summands(Weight(weight, torch.ones(3)), reach, fits=lambda codes: True)) == 1


def test_products_are_split_as_the_cpu_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(largest: int) -> int:
        return len(summands(Weight(torch.full((1, 4), largest, dtype=torch.int8), torch.ones(1)), 7))

    limit = largest_weight(7)
    monkeypatch.setattr(operators, "adds_in_int16", lambda: True)
    assert (parts(limit), parts(limit + 1), parts(-limit), parts(-limit - 1)) == (1, 2, 1, 2)
    monkeypatch.setattr(operators, "adds_in_int16", lambda: False)
    assert parts(-128) == 1


@pytest.mark.parametrize("adds", ["int16", "int32"])
def test_large_products_are_ours_where_oneDNN_s_saturate(monkeypatch: pytest.MonkeyPatch, adds: str) -> None:
    """Ours add in int16 on every CPU without AVX-512; oneDNN's do not where there is AVX-VNNI."""
    for module in (operators, kernels):
        monkeypatch.setattr(module, "adds_in_int16", lambda: adds == "int16")
    ours: Any = SimpleNamespace(there=True, in_int16=True, group=lambda *_: 1, pack=lambda *_: None)
    weight = Weight(torch.ones(32, 3, 3, 64, dtype=torch.int8), torch.ones(32))
    small, large = (pack_product(weight, 7, GEOMETRIES["3x3"][2], (size, size), ours) for size in (4, 16))
    assert isinstance(small, OwnSum)
    assert isinstance(large, OwnSum) == (adds == "int16")
    said = {"int16": "hqc's own, added in int16", "int32": "oneDNN, added in int32; small ones"}
    assert kernels._products(ours).startswith(said[adds])


WITHOUT_VNNI = """
import sys
sys.path[:0] = sys.argv[1:]
import numpy as np, torch
from test_runtimes_integer_cpu import stored, whole
from hqc.kernels import Epilogue, Weight
from hqc.runtimes.integer.cpu import operators
from hqc.runtimes.integer.cpu.products import pack_product
torch.set_num_threads(1)
operators.require_operators()
scale, whole_sum = torch.ones(32), 127 * 127 * 64
weight, codes = torch.full((32, 64), 127, dtype=torch.int8), torch.full((4, 64), 127)
plain = operators.multiply(stored(codes), operators.pack_linear(weight), scale, 1.0, None)
found = pack_product(Weight(weight, scale), 127)(stored(codes), torch.ones(4), Epilogue(dtype=torch.float32))
print(operators.adds_in_int16(), bool((plain == whole_sum).all()), bool((found == whole_sum).all()))
window = ((1, 1), (0, 0), (1, 1))
weight, codes = weight[:, None, None].repeat(1, 3, 3, 1), torch.full((2, 6, 7, 64), 127)
packed = operators.pack_convolution(weight.permute(0, 3, 1, 2).contiguous(), scale, window, (6, 7))
plain = operators.convolve(stored(codes), packed, scale, 1.0, None, window)
product = pack_product(Weight(weight, scale), 127, window, (6, 7))
found = product(stored(codes), torch.ones(2), Epilogue(dtype=torch.float32))
print(bool((plain == 9 * whole_sum).all()), bool((found == 9 * whole_sum).all()))
"""


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="x86 with AVX2 only")
def test_oneDNN_s_kernels_without_vnni() -> None:
    """oneDNN told to use no more than AVX2, in a process of its own: its sums saturate, ours do not."""
    here = Path(__file__).parent
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", WITHOUT_VNNI, str(here), str(here.parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "False", "True", "False", "True"]


@pytest.mark.skipif(platform.machine() != "x86_64" or not cpuinfo(), reason="Linux on x86 only")
def test_this_machine_adds_as_its_instructions_say() -> None:
    """What is tried, against what the CPU says of itself."""
    require_operators()
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        pytest.skip("oneDNN is told to use less than there is")
    assert adds_in_int16() == (not has_vnni(isa_flags(cpuinfo())))


# ---- passes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["native", "plain"])
def passes(request, native_cache):
    if request.param == "plain":
        return plain
    library = compiled_passes(native_cache)
    if library.functions is None:
        pytest.skip(library.said)
    return NativePasses(library.functions)


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal codes; the sums run in another order, so that one in a thousand may lie a step further."""
    differs = (found.int() - 128 - wanted.int()).abs()
    assert found.dtype == torch.uint8
    assert int(differs.max()) <= 1
    assert int(differs.sum()) <= differs.numel() // 1000


STEPS = torch.tensor([[1.5, -3.0, 12.0], [2.0, -10.0, 5.0]])
"""1/s, least and largest code of two samples."""


@pytest.mark.parametrize("regular", [False, True])
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_rotations(passes, block: int, regular: bool) -> None:
    if regular and block < 4:
        pytest.skip("there is no such regular matrix")
    g = torch.Generator().manual_seed(block)
    x = 3 * torch.randn(2, 5, 3 * block if block > 1 else 37, generator=g)
    for how in ({"low": -7, "high": 7, "inverse_scale": torch.tensor([1.7, 2.3])}, {"low": None, "high": None}):
        given = {"inverse_scale": STEPS, "block": block, "regular": regular, **how}
        check(passes.hadamard_quantize(x, **given), reference.hadamard_quantize(x, **given))


def test_rounding_is_to_even_and_what_is_too_large_is_clipped(passes) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 1e9, -1e9, float("inf"), float("-inf")]])
    found = passes.hadamard_quantize(x, torch.ones(1), low=-127, high=127)
    assert (found.int() - 128).tolist() == [[0, 2, 2, 0, -2, 126, 127, -127, 127, -127]]


def test_images_in_torch_s_own_layout_and_rows_of_a_slice(passes) -> None:
    g, how = torch.Generator().manual_seed(1), {"low": -7, "high": 7, "block": 4}
    inverse = torch.tensor([1.7, 2.3])
    image = torch.randn(2, 8, 3, 5, generator=g)
    check(
        passes.hadamard_quantize(image, inverse, nchw=True, **how),
        reference.hadamard_quantize(image, inverse, nchw=True, **how),
    )
    rows = torch.randn(2, 6, 24, generator=g)[..., 8:16]
    check(passes.hadamard_quantize(rows, inverse, **how), reference.hadamard_quantize(rows, inverse, **how))


@pytest.mark.parametrize("case", [(32, 96, 32, True), (4, 20, 0, False), (3, 6, 3, True)])
def test_group_norm(passes, case: tuple[int, int, int, bool]) -> None:
    """(groups, channels, further channels in a second tensor, SiLU): codes, floats, and codes of x itself."""
    groups, first, rest, silu = case
    g = torch.Generator().manual_seed(groups)
    x = 5 + torch.randn(2, 7, 9, first, generator=g)  # far from zero, as squares minus a square would feel
    second = torch.randn(2, 7, 9, rest, generator=g) if rest else None
    affine = (torch.randn(first + rest, generator=g), torch.randn(first + rest, generator=g))
    block = 32 if groups == 32 else 1
    own, beside = Quantiser(STEPS, None, None, block), Quantiser(torch.tensor([0.7, 3.0]), -127, 127, block)
    for norm in (GroupNorm(groups, 1e-5, *affine, silu), GroupNorm(groups, 1e-5, silu=silu)):
        found = passes.group_norm_quantize(x, norm, own, second=second, keep=True, beside=beside)
        wanted = reference.group_norm_quantize(x, norm, own, second=second, keep=True, beside=beside)
        check(found[0], wanted[0])
        check(found[2], wanted[2])
        whole = (x if second is None else torch.cat([x, second], -1)).double().permute(0, 3, 1, 2)
        exact = torch.nn.functional.group_norm(whole, groups, *_double(norm), norm.eps)
        exact = (torch.nn.functional.silu(exact) if silu else exact).permute(0, 2, 3, 1)
        assert float((found[1] - exact).abs().max()) <= 5e-5
    floats = passes.group_norm_quantize(x, norm, None, second=second)
    assert floats[0] is None
    assert torch.equal(floats[1], found[1])


def _double(norm: GroupNorm) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return None if norm.weight is None else norm.weight.double(), None if norm.bias is None else norm.bias.double()


def test_layer_norm(passes) -> None:
    g = torch.Generator().manual_seed(2)
    x, affine = 3 + torch.randn(2, 5, 48, generator=g), (torch.randn(48, generator=g), torch.randn(48, generator=g))
    for norm in (LayerNorm(1e-5, *affine), LayerNorm(1e-5)):
        found = passes.layer_norm_quantize(x, norm, Quantiser(STEPS, None, None, 16), keep=True)
        wanted = reference.layer_norm_quantize(x, norm, Quantiser(STEPS, None, None, 16), keep=True)
        check(found[0], wanted[0])
        assert float((found[1] - wanted[1]).abs().max()) <= 1e-5


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gates(passes, kind: str, gated: bool) -> None:
    """8 bits over the whole range of the activation, so that a value a hundredth wrong is seen."""
    x = torch.cat([torch.linspace(-12, 12, 40), torch.linspace(-90, 90, 24)]).expand(2, 3, 64).contiguous()
    how = Quantiser(torch.tensor([10.0, 1.4]), -127, 127, 16)
    check(
        passes.gate_quantize(x, how, kind=kind, gated=gated),
        reference.gate_quantize(x, how, kind=kind, gated=gated),
    )


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_what_oneDNN_lacks_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from hqc.errors import RuntimeMissingError

    def refusal() -> str:
        with pytest.raises(RuntimeMissingError) as caught:
            require_operators()
        return str(caught.value)

    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert refusal().startswith("runtime torch-int8: this torch was built without oneDNN. Use runtime='torch'")
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert "oneDNN is switched off" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "onednn", SimpleNamespace(qconv_prepack=None))
        assert "this torch has no operator onednn::qconv2d_pointwise" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr(operators, "multiply", lambda *given: torch.zeros(2, 4, 4, 32))
        assert "not exact on this CPU" in refusal()

    def unsupported(*given: object) -> None:
        raise RuntimeError("could not create a primitive descriptor")

    with monkeypatch.context() as patch:
        patch.setattr(operators, "convolve", unsupported)
        assert "no u8 x s8 products for this CPU" in refusal()
