"""On an NVIDIA GPU: kernels against plain torch on LDM-4's shapes, sessions against the CPU, captures, bare PTX."""

import threading
from importlib.util import find_spec

import pytest
import torch
from cuda_driver import Launch, architecture
from integer_programs import quantised, relative
from torch import Tensor

from hqc import kernels
from hqc.kernels import Epilogue, Weight, channels_last, pack_weight, packed_weight_fits
from hqc.ops import digit
from hqc.runtimes import as_unet, load
from hqc.runtimes.integer import reference
from hqc.runtimes.integer.cuda import CudaSession
from hqc.runtimes.integer.cuda.session import HalfSession
from hqc.runtimes.integer.forms import integer_form
from hqc.storage import save_program

pytestmark = pytest.mark.gpu
UNETS = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
HALF = torch.float16


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = HALF) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def codes_of(*shape: int, top: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randint(-top, top + 1, shape, generator=generator, device="cuda", dtype=torch.int8)


# ---- kernels -------------------------------------------------------------------------------------------------------

IMAGES = [(2, 192, 64, 64), (2, 384, 32, 32), (2, 576, 16, 16), (8, 960, 8, 8), (3, 1920, 8, 8)]
TOKENS = [(2, 1024, 384), (2, 256, 576), (8, 64, 960), (2, 1, 512), (3, 64, 3840)]


@pytest.mark.parametrize(("block", "top"), [(1, 127), (32, 7), (64, 7)])
@pytest.mark.parametrize("shape", [*IMAGES, *TOKENS], ids=str)
def test_hadamard_quantize(shape: tuple[int, ...], block: int, top: int) -> None:
    x = random(*shape)
    inverse = torch.linspace(0.7, 1.4, shape[0], device="cuda") * top / 3.0
    options = {"low": -top, "high": top, "block": block}
    layouts = [(x, False)] if x.ndim == 3 else [(x, True), (x.permute(0, 2, 3, 1).contiguous(), False)]
    for given, nchw in layouts:
        wanted = reference.hadamard_quantize(given, inverse, nchw=nchw, **options)
        poisoned = torch.full_like(wanted, 99)
        found = kernels.hadamard_quantize(given, inverse, nchw=nchw, out=poisoned, **options)
        step = (found.int() - wanted.int()).abs()
        assert int(step.max()) <= 1
        # A butterfly adds in another order than a matrix product: only a value within 2^-20 of a boundary flips.
        assert float(step.float().mean()) <= 1e-4
        assert float(found.float().std()) > 1


def weight_of(form: str, shape: tuple[int, ...]) -> Weight:
    """[O, C] or [O, C, kh, kw] as the kernels hold it."""
    # Outputs of some tens, far from where float16 ends.
    scale = torch.linspace(0.5, 1.5, shape[0], device="cuda") / (40_000 if form == "two digits" else 1000)
    if form == "int8":
        return Weight(channels_last(codes_of(*shape, top=127, seed=1)), scale)
    if form == "two digits":
        wide = channels_last(torch.randint(-4000, 4000, shape, device="cuda", dtype=torch.int32))
        return Weight(digit(wide, 0), scale, high=digit(wide, 1))
    narrow = random(*shape, seed=1, scale=2.0).round().clamp(-8, 7).to(torch.int8)
    block = 32
    while not packed_weight_fits(narrow, block):
        narrow = (narrow * 0.7).to(torch.int8)
    return Weight(pack_weight(channels_last(narrow)), scale, rotation=block)


# Not every pair: each is a kernel to compile.
FORMS = pytest.mark.parametrize(("form", "tail"), [("int8", False), ("int4", True), ("two digits", True)])


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """Integer sums are exact and the epilogue's operations are in one order: at most a last bit of float16."""
    assert found.dtype == wanted.dtype == HALF
    assert relative(found, wanted) <= 2**-11
    assert float((found.float() - wanted.float()).abs().max()) <= 2**-9 * float(wanted.abs().max())
    assert float(wanted.float().std()) > 0.01


@FORMS
@pytest.mark.parametrize(
    ("batch", "rows", "channels", "outputs"),
    [
        (2, 1024, 384, 384),
        (2, 1024, 384, 3072),
        (2, 256, 2304, 576),
        (8, 64, 960, 960),
        (1, 1, 768, 384),
        (3, 1, 512, 960),
    ],
)
def test_int_gemm(batch: int, rows: int, channels: int, outputs: int, form: str, tail: bool) -> None:
    codes, weight = codes_of(batch, rows, channels, top=7), weight_of(form, (outputs, channels))
    scale = torch.linspace(0.5, 2.0, batch, device="cuda")
    residual = random(batch, rows, outputs, seed=3) if tail else None
    epilogue = Epilogue(random(outputs, seed=2, dtype=torch.float32), residual, tail, HALF)
    poisoned = torch.full((batch, rows, outputs), torch.nan, device="cuda", dtype=HALF)
    found = kernels.int_gemm(codes, weight, scale, epilogue, out=poisoned)
    assert_same(found, reference.int_gemm(codes, weight, scale, epilogue))


@FORMS
@pytest.mark.parametrize(
    ("batch", "size", "channels", "outputs", "kernel", "stride"),
    [
        (2, 64, 192, 192, 3, 1),
        (2, 64, 192, 192, 3, 2),
        (2, 32, 384, 384, 3, 1),
        (2, 32, 192, 384, 1, 1),
        (8, 8, 1920, 960, 3, 1),
        (3, 16, 576, 576, 3, 2),
        (2, 64, 32, 32, 3, 1),
    ],
)
def test_int_conv2d(
    batch: int, size: int, channels: int, outputs: int, kernel: int, stride: int, form: str, tail: bool
) -> None:
    codes, weight = codes_of(batch, size, size, channels, top=7), weight_of(form, (outputs, channels, kernel, kernel))
    scale = torch.linspace(0.5, 2.0, batch, device="cuda")
    places = (size + 2 * (kernel // 2) - kernel) // stride + 1
    residual = random(batch, places, places, outputs, seed=3) if tail else None
    epilogue = Epilogue(random(outputs, seed=2, dtype=torch.float32), residual, tail, HALF)
    window = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}
    poisoned = torch.full((batch, places, places, outputs), torch.nan, device="cuda", dtype=HALF)
    found = kernels.int_conv2d(codes, weight, scale, epilogue, out=poisoned, **window)
    assert_same(found, reference.int_conv2d(codes, weight, scale, epilogue, **window))


def assert_codes(found: Tensor, wanted: Tensor) -> None:
    """Equal but for levels on a rounding boundary: sums in another order, exp and erf of another library."""
    assert found.dtype == wanted.dtype == torch.int8
    step = (found.int() - wanted.int()).abs()
    assert int(step.max()) <= 1
    assert float(step.float().mean()) <= 2e-4
    assert float(found.float().std()) > 1


@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_group_norm_quantize(shape: tuple[int, ...]) -> None:
    """Alone and as two tensors, statistics of its own and of a product's blocks; the same bits every time."""
    x = (random(*shape) + 0.5).permute(0, 2, 3, 1).contiguous()
    affine = [random(shape[1], seed=s, dtype=torch.float32) for s in (1, 2)]
    norm = kernels.GroupNorm(32, 1e-5, *affine, silu=True)
    how = kernels.Quantiser(torch.linspace(1.7, 3.0, shape[0], device="cuda"), -7, 7, 32)
    wanted, _, _ = reference.group_norm_quantize(x, norm, how)
    found, kept, _ = kernels.group_norm_quantize(x, norm, how, keep=True)
    assert_codes(found, wanted)
    assert float((kept - reference.group_norm_quantize(x, norm, None)[1]).abs().max()) <= 2**-7
    first = shape[1] // 3 // 32 * 32
    parts = [x[..., :first].contiguous(), x[..., first:].contiguous()]
    both, _, _ = kernels.group_norm_quantize(parts[0], norm, how, second=parts[1])
    assert torch.equal(both, found)
    assert all(torch.equal(kernels.group_norm_quantize(x, norm, how)[0], found) for _ in range(3))


@pytest.mark.parametrize("shape", TOKENS[:3] + TOKENS[4:], ids=str)
def test_layer_norm_and_gates(shape: tuple[int, ...]) -> None:
    x, channels = random(*shape), shape[-1]
    affine = [random(channels, seed=s, dtype=torch.float32) for s in (1, 2)]
    how = kernels.Quantiser(torch.linspace(1.7, 3.0, shape[0], device="cuda"), -7, 7, 32)
    norm = kernels.LayerNorm(1e-5, *affine)
    found, _ = kernels.layer_norm_quantize(x, norm, how)
    assert_codes(found, reference.layer_norm_quantize(x, norm, how)[0])
    for kind in ("gelu", "silu", "gelu_tanh"):
        options = {"kind": kind, "gated": kind != "silu"}
        given = 2 * random(*shape[:-1], 2 * channels if options["gated"] else channels, seed=5)
        assert_codes(kernels.gate_quantize(given, how, **options), reference.gate_quantize(given, how, **options))


@pytest.mark.parametrize(
    ("batch", "rows", "channels", "outputs"), [(8, 1024, 384, 3072), (2, 64, 960, 7680), (3, 1, 64, 128)]
)
@pytest.mark.parametrize("gate", ["gelu", "none"])
def test_codes_from_the_epilogue(batch: int, rows: int, channels: int, outputs: int, gate: str) -> None:
    codes, weight = codes_of(batch, rows, channels, top=7), weight_of("int8", (outputs, channels))
    scale = torch.linspace(0.5, 2.0, batch, device="cuda")
    residual = random(batch, rows, outputs, seed=3) if gate == "none" else None
    shift = random(batch, 2 * outputs, seed=4, dtype=torch.float32)[:, :outputs]
    how = kernels.Quantiser(torch.linspace(1.0, 0.4, batch, device="cuda"), -7, 7, 32)
    bias = random(outputs, seed=2, dtype=torch.float32)
    epilogue = Epilogue(bias, residual, False, HALF, shift, gate, how)
    found = kernels.int_gemm(codes, weight, scale, epilogue)
    assert_codes(found, reference.int_gemm(codes, weight, scale, epilogue))
    assert torch.equal(found, kernels.int_gemm(codes, weight, scale, epilogue))


@pytest.mark.parametrize(
    ("batch", "size", "channels", "outputs"), [(8, 64, 192, 192), (2, 32, 384, 384), (8, 8, 960, 960), (2, 6, 64, 96)]
)
def test_statistics_and_upsampling_of_convolutions(batch: int, size: int, channels: int, outputs: int) -> None:
    codes, weight = codes_of(batch, size, size, channels, top=7), weight_of("int8", (outputs, channels, 3, 3))
    scale = torch.linspace(0.5, 2.0, batch, device="cuda")
    epilogue = Epilogue(random(outputs, seed=2, dtype=torch.float32), dtype=HALF)
    for upsample in (1, 2):
        window = {"padding": (1, 1), "upsample": upsample}
        y, statistics = kernels.int_conv2d_statistics(codes, weight, scale, epilogue, **window)
        assert_same(y, reference.int_conv2d(codes, weight, scale, epilogue, **window))
        parts = y.flatten(1, 2).double().split(statistics.rows, 1)
        assert len(parts) == statistics.values.shape[1]
        for i, part in enumerate(parts):
            mean, away = statistics.values[:, i].double().unbind(1)
            assert torch.allclose(mean, part.mean(1), rtol=1e-4, atol=1e-4)
            assert torch.allclose(away, (part - part.mean(1, keepdim=True)).square().sum(1), rtol=1e-3, atol=1e-3)


# ---- sessions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits", "dtypes"),
    [
        pytest.param("cross_attention", "w4a4", ("fp32", "fp16", "bf16"), marks=UNETS),
        pytest.param("unconditional", "w8a8", ("fp16",), marks=UNETS),
        ("geometry", "w4a4", ("fp32", "fp16")),
        ("awkward", "w4a4", ("fp16",)),
    ],
)
def test_a_session_against_the_cpu(captured, monkeypatch, name: str, bits: str, dtypes: tuple[str, ...]) -> None:
    """The bounds of the tests without a GPU, which run the same graph over plain torch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    program = quantised(captured(name), bits)
    inputs = program.example_inputs(3, seed=7)
    wanted = captured(name).module()(*inputs)
    exact = integer_form(program).module()(*inputs)
    quantisation = relative(exact, wanted)
    assert quantisation > 1e-3
    for dtype in dtypes:
        found = CudaSession(program, dtype=dtype)(*inputs)  # type: ignore[arg-type]
        assert found.device.type == "cpu"
        if dtype != "fp32":
            # It did run in half precision; geometry ends in a product written in float32, and no code of it flips.
            assert relative(found, exact) > 0 or name == "geometry"
        else:
            # A value on a rounding boundary may flip by a step: a tenth of the quantisation error; float32 besides.
            assert relative(found, exact) <= max(0.1 * quantisation, 1e-5)
        assert relative(found, wanted) <= 1.2 * quantisation + {"fp32": 0, "fp16": 0.02, "bf16": 0.08}[dtype]


@UNETS
def test_one_capture_serves_mixed_timesteps(captured) -> None:
    program = quantised(captured("unconditional"), "w4a4")
    session = CudaSession(program, dtype="fp32")
    sample = program.example_inputs(4, seed=3)[0].cuda()
    together = [torch.tensor(t, device="cuda") for t in ([10.0, 290.0, 610.0, 999.0], [999.0, 610.0, 290.0, 10.0])]
    first = session(sample, together[0])
    kept = first.clone()
    second = session(sample, together[1])
    assert len(session._graphs.shapes) == 1
    assert first.is_cuda
    assert torch.equal(first, kept)  # the second replay has not written into the first output
    assert relative(second, first) > 0.05
    eager = session.module  # the same kernels without a capture
    for timesteps, found in zip(together, (first, second), strict=True):
        # Nothing but the capture differs; cuDNN and attention may choose other algorithms.
        assert relative(found, eager(sample, timesteps)) <= 1e-2
        for i in range(4):
            alone = eager(sample[i : i + 1], timesteps[i : i + 1])
            assert relative(found[i : i + 1], alone) <= 1e-1  # a flipped code at most


def test_batch_sizes_keep_a_few_captures(captured) -> None:
    program = quantised(captured("two_sites"), "w4a4")
    session = CudaSession(program, dtype="fp32", graphs=2)
    reference_module = integer_form(program).module()
    for batch in (1, 3, 2, 1, 5):
        inputs = program.example_inputs(batch, seed=batch)
        assert relative(session(*inputs), reference_module(*inputs)) <= 1e-5  # float32 rounding
    assert len(session._graphs.shapes) == 2


@UNETS
def test_threads_and_streams_take_turns(captured) -> None:
    program = quantised(captured("unconditional"), "w4a4")
    session = CudaSession(program, dtype="fp32")
    inputs = [tuple(t.cuda() for t in program.example_inputs(2, seed=i)) for i in range(4)]
    wanted = [session(*given).clone() for given in inputs]
    found: dict[tuple[int, int], Tensor] = {}

    def run(which: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for turn in range(20):
                found[which, turn] = session(*inputs[which])
            stream.synchronize()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(output, wanted[which]) for (which, _), output in found.items())


@UNETS
def test_loaded_from_disk_inside_a_pipelines_call(captured, tmp_path) -> None:
    """CUDA tensors in, CUDA tensors out, in the caller's dtype; CPU tensors come back to the CPU."""
    program = quantised(captured("cross_attention"), "w4a4")
    save_program(program, tmp_path / "q.hqc")
    model = load(tmp_path / "q.hqc", runtime="torch-cuda")
    assert model.runtime == "torch-cuda"
    unet = as_unet(model.session, {}).to("cuda")
    assert unet.device.type == "cuda"
    sample, timestep, condition = program.example_inputs(2, seed=7)
    there = unet(sample.cuda().half(), timestep.cuda(), condition.cuda(), return_dict=False)[0]
    here = unet(sample, timestep, condition, return_dict=False)[0]
    assert there.is_cuda
    assert there.dtype == HALF
    assert here.device.type == "cpu"
    # The half-precision input is rounded by the caller here and by the graph there: the same rounding.
    assert relative(there.cpu(), here) <= 1e-3


@UNETS
def test_packed_weights_take_a_fraction_of_the_memory(captured) -> None:
    program = quantised(captured("cross_attention"), "w4a4")

    def weights(session: CudaSession) -> int:
        tensors = [b for m in session.module.modules() for n, b in m.named_buffers(recurse=False) if n == "codes"]
        assert all(b.is_cuda for b in tensors)
        return sum(b.numel() * b.element_size() for b in tensors)

    # The first, the last and the shortcut layers have eight bits.
    packed, plain = CudaSession(program, weights="int4"), CudaSession(program)
    assert weights(packed) < 0.65 * weights(plain)
    assert packed.report.weight_bytes < plain.report.weight_bytes
    inputs = program.example_inputs(2, seed=3)
    wanted = captured("cross_attention").module()(*inputs)
    quantisation = relative(integer_form(program).module()(*inputs), wanted)
    for session in (packed, plain):
        # Other tiles sum a norm's statistics in other blocks: codes on a boundary flip. The bound of all sessions.
        assert relative(session(*inputs), wanted) <= 1.2 * quantisation + 0.02


@UNETS
def test_the_half_precision_peer(captured) -> None:
    program = captured("cross_attention")
    inputs = program.example_inputs(2, seed=1)
    # float16 rounds to 2^-11 relative a layer, some thirty layers deep.
    assert 0 < relative(HalfSession(program)(*inputs), program.module()(*inputs)) <= 5e-3


# ---- PTX as TensorRT launches it -----------------------------------------------------------------------------------


def compiled(kernel: str, dtype: str, options: dict):
    from hqc.kernels.compile import ARCHITECTURES, compile_kernel

    if architecture() not in ARCHITECTURES:
        pytest.skip(f"kernels are compiled ahead of time for {', '.join(ARCHITECTURES)}; this is {architecture()}")
    made = compile_kernel(kernel, dtype, options, architecture())
    assert [p.role for p in made.params][-3:] == ["output", "scratch", "scratch"]
    return made


def test_ptx_of_hadamard_quantize() -> None:
    x, inverse = random(2, 100, 320), torch.tensor([0.9, 1.3], device="cuda")
    options = {"block": 32, "tile_rows": 64, "tile_channels": 64}
    made = compiled("hadamard_quantize", "fp16", options)
    output = torch.full((2, 100, 320), 99, device="cuda", dtype=torch.int8)
    grid = (-(-200 // 64), -(-320 // 64))
    Launch(made.ptx, made.name, made.shared_bytes)(grid, made.num_warps, [x, inverse], [200, 320, 100], output)
    wanted = reference.hadamard_quantize(x, inverse, low=-7, high=7, block=32)
    step = (output.int() - wanted.int()).abs()
    assert int(step.max()) <= 1
    assert float(step.float().mean()) <= 1e-4  # see test_hadamard_quantize
    assert float(output.float().std()) > 0.5


def test_ptx_of_int_gemm() -> None:
    codes, weight = codes_of(2, 100, 320, top=7), weight_of("int4", (192, 320))
    scale, bias = torch.tensor([0.5, 2.0], device="cuda"), random(192, dtype=torch.float32)
    options = {"form": "words", "rotation": 32, "tile_rows": 64, "tile_outputs": 64, "num_warps": 4}
    made = compiled("int_gemm", "fp16", options)
    output = torch.full((2, 100, 192), torch.nan, device="cuda", dtype=HALF)
    grid = (-(-200 // 64) * -(-192 // 64),)
    inputs = [codes, weight.codes, weight.scale, scale, bias]
    Launch(made.ptx, made.name, made.shared_bytes)(grid, made.num_warps, inputs, [200, 320, 192, 100], output)
    assert_same(output, reference.int_gemm(codes, weight, scale, Epilogue(bias, dtype=HALF)))


def test_ptx_of_int_conv2d() -> None:
    codes, weight = codes_of(2, 16, 16, 192, top=7), weight_of("int8", (192, 192, 3, 3))
    scale, bias = torch.tensor([0.5, 2.0], device="cuda"), random(192, dtype=torch.float32)
    options = {"stride": (2, 2), "tile_rows": 64, "tile_outputs": 64, "num_warps": 4}
    made = compiled("int_conv2d", "fp16", options)
    output = torch.full((2, 8, 8, 192), torch.nan, device="cuda", dtype=HALF)
    grid = (-(-128 // 64) * -(-192 // 64),)
    inputs = [codes, weight.codes, weight.scale, scale, bias]
    integers = [2 * 8 * 8, 16, 16, 192, 192, 8, 8]
    Launch(made.ptx, made.name, made.shared_bytes)(grid, made.num_warps, inputs, integers, output)
    window = {"stride": (2, 2), "padding": (1, 1)}
    assert_same(output, reference.int_conv2d(codes, weight, scale, Epilogue(bias, dtype=HALF), **window))
