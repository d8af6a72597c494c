"""Kernels compiled for every architecture without a GPU: instruction, spills, PTX version, parameters; and refusals."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hqc.errors import ExportError, HqcError, KernelError
from hqc.kernels.compile import ARCHITECTURES, PTX_VERSIONS, CompiledKernel, compile_kernel, kernel_options
from hqc.kernels.options import ConvOptions
from hqc.kernels.variants import FUSED, Variant

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels and cannot compile them"
)

NEWEST_LOADABLE = (9, 0)
"""PTX ISA of CUDA 13.0, whose driver must load what is shipped."""
PRODUCTS = {
    "sm_80": {"mma.sync"},
    "sm_86": {"mma.sync"},
    "sm_89": {"mma.sync"},
    "sm_90": {"wgmma"},
    "sm_100": {"mma.sync", "tcgen05"},  # triton 3.7 writes the first, 3.9 the second
    "sm_120": {"mma.sync"},
}
OUTPUTS = {
    ("group_norm_quantize", False): (["codes"], []),
    ("group_norm_quantize", True): (["codes", "beside"], []),
    ("group_norm_affine", True): ([], ["affine"]),
    ("layer_norm_quantize", False): (["codes"], []),
    ("gate_quantize", False): (["codes"], []),
    ("int_gemm", False): (["y"], []),
    ("int_conv2d", False): ([], ["y", "statistics"]),
    ("attention_scores", False): ([], ["p", "maxima"]),
    ("attention_values", False): (["y"], []),
}
"""(int8, floating-point) outputs of the variants, by kernel and whether they read two images."""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is found compiled, and nothing is left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def check(compiled: CompiledKernel, arch: str) -> None:
    """What every kernel that is shipped must be."""
    version = tuple(int(part) for part in compiled.ptx_version.split("."))
    assert version <= NEWEST_LOADABLE
    assert 10 * version[0] + version[1] == PTX_VERSIONS[arch]
    assert re.search(rf"^\.target {arch}a?$", compiled.ptx, re.MULTILINE)
    assert compiled.spills == 0
    assert 0 < compiled.registers <= 255
    assert compiled.shared_bytes <= 99 * 1024
    assert compiled.cubin[:4] == b"\x7fELF"
    assert ".file" not in compiled.ptx
    assert f".entry {compiled.name}(" in compiled.ptx


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gemm_over_packed_weights_uses_the_int8_instruction(arch: str) -> None:
    compiled = compile_kernel("int_gemm", "fp16", {"form": "words", "rotation": 32}, arch)
    check(compiled, arch)
    assert compiled.instruction in PRODUCTS[arch]


@pytest.mark.parametrize("regular", [False, True], ids=["sylvester", "regular"])
def test_rotated_weights_of_the_widest_block_compile(regular: bool) -> None:
    """H_256 is a ±1 tile and a butterfly over the rest of its bits; of both kinds without a spill."""
    tile = {"tile_rows": 64, "tile_outputs": 64, "tile_channels": 256, "num_stages": 2}
    options = {"form": "words", "rotation": 256, "regular_rotation": regular, **tile}
    compiled = compile_kernel("int_gemm", "fp16", options, "sm_90")
    check(compiled, "sm_90")
    assert compiled.instruction in PRODUCTS["sm_90"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_convolution_uses_the_int8_instruction(arch: str) -> None:
    compiled = compile_kernel("int_conv2d", "bf16", {"residual": True, "silu": True}, arch)
    check(compiled, arch)
    assert compiled.instruction in PRODUCTS[arch]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rotation", [{"block": 32}, {"block": 64, "regular": True}], ids=["sylvester", "regular"])
def test_hadamard_quantize_stays_in_registers(rotation: dict[str, int], arch: str) -> None:
    """No matrix instruction, no shared memory, 16 bytes at a time in and out."""
    compiled = compile_kernel("hadamard_quantize", "fp16", rotation, arch)
    check(compiled, arch)
    assert compiled.instruction == ""
    assert compiled.shared_bytes == 0
    assert re.search(r"ld\.global[\w.:]*\.v4\.b32", compiled.ptx)
    assert re.search(r"st\.global[\w.:]*\.v4\.b32", compiled.ptx)
    assert "shfl.sync.bfly" in compiled.ptx


LONG = pytest.mark.long
# Each on two architectures in turns, which meets each of them with every kernel; the others by `make test-all`.
AROUND = [
    pytest.param(variant, arch, marks=() if (turn - place) % (len(ARCHITECTURES) // 2) == 0 else LONG)
    for turn, variant in enumerate(FUSED)
    for place, arch in enumerate(ARCHITECTURES)
]


@pytest.mark.parametrize(("variant", "arch"), AROUND, ids=lambda value: getattr(value, "name", value))
def test_kernels_with_what_stands_around_them(variant: Variant, arch: str) -> None:
    """Nothing is spilled, integer products are still the int8 instruction, and the others have none."""
    compiled = variant.compile(arch)
    check(compiled, arch)
    assert compiled.instruction in (PRODUCTS[arch] if variant.kernel.startswith("int_") else {""})
    codes = [p.name for p in compiled.params if p.role == "output" and p.type == "*i8"]
    floats = [p.name for p in compiled.params if p.role == "output" and p.type != "*i8"]
    assert (codes, floats) == OUTPUTS[variant.kernel, bool(variant.options.get("second"))]


def test_parameters_are_inputs_integers_outputs_and_two_null_pointers() -> None:
    options = {"two_digits": True, "residual": True, "tile_rows": 16, "tile_outputs": 32, "num_warps": 2}
    compiled = compile_kernel("int_gemm", "fp16", options, "sm_80")
    assert [(p.name, p.role, p.type) for p in compiled.params] == [
        ("codes", "input", "*i8"),
        ("weight", "input", "*i8"),
        ("weight_high", "input", "*i8"),
        ("weight_scale", "input", "*fp32"),
        ("scale", "input", "*fp32"),
        ("bias", "input", "*fp32"),
        ("residual", "input", "*fp16"),
        ("rows", "int32", "i32"),
        ("channels", "int32", "i32"),
        ("outputs", "int32", "i32"),
        ("rows_per_sample", "int32", "i32"),
        ("y", "output", "*fp16"),
        ("global_scratch", "scratch", "*i8"),
        ("profile_scratch", "scratch", "*i8"),
    ]
    found = re.findall(r"^\s*\.param \.(u\d+)", compiled.ptx, re.MULTILINE)
    assert found == ["u64"] * 7 + ["u32"] * 4 + ["u64"] * 3
    body = compiled.ptx[compiled.ptx.index("{") :]
    used = {int(n) for n in re.findall(rf"{compiled.name}_param_(\d+)\]", body)}
    assert used == set(range(12)), "the scratch pointers, which are null, are never read"


def test_a_product_in_parts_and_their_sum() -> None:
    part = compile_kernel("int_conv2d", "fp16", {"splits": 8, "bias": False, "tile_outputs": 64}, "sm_90")
    total = compile_kernel("sum_splits", "fp16", {"splits": 8, "silu": True}, "sm_90")
    check(part, "sm_90")
    check(total, "sm_90")
    assert [(p.name, p.type) for p in part.params if p.role == "output"] == [("y", "*i32")]
    names = ["partial", "weight_scale", "scale", "bias", "rows", "outputs", "rows_per_sample", "y"]
    assert [p.name for p in total.params[:-2]] == names


def test_nothing_is_assumed_of_sizes_that_are_not_aligned() -> None:
    """With aligned=False codes are loaded byte by byte; with it, 16 at a time."""
    tile = {"tile_rows": 16, "tile_outputs": 32, "tile_channels": 32, "num_warps": 2, "even": False}
    plain, fast = (
        compile_kernel("int_gemm", "fp32", {**tile, "aligned": aligned}, "sm_80").ptx for aligned in (False, True)
    )
    assert "cp.async.cg.shared.global" in fast
    assert "cp.async.cg.shared.global" not in plain
    assert re.search(r"ld\.global\.b8|ld\.global\.u8", plain)


def test_options_as_json_has_them() -> None:
    options = kernel_options("int_conv2d", {"kernel": [1, 1], "padding": [0, 0], "stride": [2, 2]})
    assert options == ConvOptions(kernel=(1, 1), padding=(0, 0), stride=(2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("nothing", "fp16", {}, "sm_80"), "there is no kernel 'nothing'"),
        (("int_gemm", "fp16", {}, "sm_75"), "for sm_75: that architecture is not one of ours"),
        (("int_gemm", "fp64", {}, "sm_80"), "the dtype is 'fp64'"),
        (("int_gemm", "fp16", {"tile": 3}, "sm_80"), "int_gemm has no option tile"),
        (("int_gemm", "fp16", {"tile_rows": 48}, "sm_80"), "tile_rows is 48; expected a power of two"),
        (("int_gemm", "fp16", {"rotation": 32}, "sm_80"), "with int8 weights, which are stored rotated"),
        (("int_gemm", "fp16", {"form": "words", "rotation": 128}, "sm_80"), "a multiple of the rotation 128"),
        (("int_gemm", "fp16", {"form": "words", "two_digits": True}, "sm_80"), "two digits with words weights"),
        (("int_gemm", "fp16", {"splits": 4}, "sm_80"), "splits is 4 with an epilogue; expected 1"),
        (("sum_splits", "fp16", {"splits": 1}, "sm_80"), "splits is 1; expected 2 or more"),
        (("int_gemm", "fp16", {"form": "nibbles"}, "sm_80"), 'even weights in the form "nibbles"'),
        (("hadamard_quantize", "fp16", {"block": 24}, "sm_80"), "block is 24; expected one of 1, 8, 16"),
        (
            ("hadamard_quantize", "fp16", {"block": 128}, "sm_80"),
            "tile_channels is 64; expected a multiple of the block",
        ),
        (("hadamard_quantize", "fp16", {"high": 8, "packed": True}, "sm_80"), "packed codes span -7…8"),
        (("hadamard_quantize", "fp16", {"low": 7}, "sm_80"), "codes span 7…7"),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else value,
)
def test_what_cannot_be_compiled(call: tuple[str, str, dict[str, object], str], message: str) -> None:
    with pytest.raises(KernelError, match=re.escape(message)):
        compile_kernel(*call)


def test_tiles_that_triton_refuses_are_one_line() -> None:
    options = {"tile_rows": 4096, "tile_outputs": 4096}
    with pytest.raises(ExportError, match=r"^compile_kernel int_gemm for sm_80: triton could not compile it: .+") as e:
        compile_kernel("int_gemm", "fp16", options, "sm_80")
    assert "\n" not in str(e.value)
    assert isinstance(e.value, HqcError)


def test_an_interpreting_process_refuses_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelError, match=r"^compile_kernel int_gemm for sm_80: this process interprets kernels"):
        compile_kernel("int_gemm", "fp16", {}, "sm_80")


def test_the_ptx_names_no_source_file(tmp_path: Path) -> None:
    compiled = compile_kernel("hadamard_quantize", "fp32", {"block": 8}, "sm_80")
    assert "hqc/kernels" not in compiled.ptx
    assert ".loc" not in compiled.ptx
