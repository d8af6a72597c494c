"""The PTX of an export, launched on a GPU as TensorRT launches it: inputs, integers, output, two null pointers."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
import torch
from plugin_models import model

from hqc.kernels import Epilogue, Weight, hadamard_quantize, int_conv2d, int_gemm
from hqc.ops import sylvester
from hqc.plugins import plugin_nodes, write_plugins
from hqc.plugins.hqc_qdp.driver import current_capability, load_kernel
from hqc.plugins.hqc_qdp.nodes import Choice
from hqc.plugins.hqc_qdp.table import Kernel, KernelTable, read_table

pytestmark = pytest.mark.gpu
BATCH = 3
NODES = ("image", "image bounded", "conv", "tokens", "tokens bounded", "linear")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelTable:
    """The kernels of models with every plugin node, for this GPU."""
    torch.cuda.init()
    capability = current_capability()
    folder = tmp_path_factory.mktemp("export")
    onnx.save(model(NODES), str(folder / "model.onnx"))
    own = f"sm_{capability[0]}{capability[1]}"
    archs = (own,) if own in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120") else ("sm_80",)
    write_plugins(folder, folder / "model.onnx", archs)
    return read_table(folder / "plugins", capability)


def _choices(name: str) -> tuple[Choice, ...]:
    return next(node for node in plugin_nodes(model(NODES)) if node.name == name).choices()


def _run(
    kernels: KernelTable, choice: Choice, sizes: Sequence[int], inputs: Sequence[torch.Tensor], out: torch.Tensor
) -> list[torch.Tensor]:
    """The output of every tactic; `sizes` are the first input's as ONNX has them."""
    found = []
    for kernel in kernels.tactics(choice.variant.key):
        out.fill_(77)
        launch = choice.variant.launch(sizes, kernel.tile, lambda a, b: -(-a // b))
        stream = torch.cuda.current_stream().cuda_stream
        loaded = load_kernel(kernel.ptx, kernel.entry, kernel.shared_bytes)
        pointers = [tensor.data_ptr() for tensor in inputs]
        loaded.launch(pointers, launch.integers, out.data_ptr(), launch.grid, kernel.threads, stream)
        torch.cuda.synchronize()
        found.append(out.clone())
    return found


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _weights(*shape: int) -> torch.Tensor:
    """Packed four-bit codes in −1…1, whose rotation fits int8: nibbles 15, 0 and 1."""
    nibbles = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(2)) & 15
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).to(torch.uint8).cuda()


@pytest.mark.parametrize("index", [0, 1])
def test_images(index: int, kernels: KernelTable) -> None:
    choice = _choices("site.codes")[index]
    x = _normal(BATCH, 64, 8, 8).half().cuda()
    inverse = torch.tensor([1.0, 2.5, 7.0]).cuda()
    last = x.permute(0, 2, 3, 1).contiguous()
    wanted = hadamard_quantize(last, inverse, low=-7, high=7, block=32)
    assert len(wanted.unique()) == 15
    given = x if choice.formats[0] == "LINEAR" else last
    results = _run(kernels, choice, x.shape, [given, inverse], torch.empty_like(wanted))
    exact = last.double().cpu().view(BATCH, 8, 8, 2, 32) @ sylvester(32).double() / 32**0.5
    levels = exact.view(wanted.shape) * inverse.double().cpu().view(-1, 1, 1, 1)
    used = kernels.tactics(choice.variant.key)
    assert not [
        _differing(kernel, result, wanted, levels)
        for kernel, result in zip(used, results, strict=True)
        if not torch.equal(result, wanted)
    ]


@pytest.mark.parametrize(("name", "index"), [("image", 0), ("image", 1), ("tokens", 0)])
def test_bounds_of_every_sample(name: str, index: int, kernels: KernelTable) -> None:
    choice = _choices(f"{name} bounded.codes")[index]
    x = _normal(*((BATCH, 64, 8, 8) if name == "image" else (BATCH, 77, 64))).half().cuda()
    step = torch.tensor([[4.0, -15, 0], [5, -3, 12], [6, 0, 15]]).cuda()
    last = x.permute(0, 2, 3, 1).contiguous() if name == "image" else x
    wanted = hadamard_quantize(last, step, low=None, high=None, block=32)
    assert [len(codes.unique()) for codes in wanted] == [16] * BATCH
    given = x if choice.formats[0] == "LINEAR" else last
    results = _run(kernels, choice, x.shape, [given, step], torch.empty_like(wanted))
    assert all(torch.equal(result, wanted) for result in results)


def _differing(kernel: Kernel, found: torch.Tensor, wanted: torch.Tensor, levels: torch.Tensor) -> str:
    """Which codes of an image differ: how many, where, and the level in float64 that they are rounded from."""
    found, wanted = found.cpu(), wanted.cpu()
    places = (found != wanted).nonzero().tolist()
    shown = [f"{p}: {found[*p]} for {wanted[*p]}, level {levels[*p]:.6f}" for p in places[:8]]
    where = f"{kernel.name} (tile {kernel.tile}, {kernel.num_warps} warps, {kernel.shared_bytes} bytes shared)"
    return f"{where}: {len(places)} of {found.numel()} at [sample, y, x, channel]: {'; '.join(shown)}"


def test_tokens_and_their_product(kernels: KernelTable) -> None:
    x, inverse = _normal(BATCH, 77, 64).half().cuda(), torch.tensor([1.0, 2.5, 7.0]).cuda()
    codes = hadamard_quantize(x, inverse, low=-7, high=7, block=32)
    results = _run(kernels, _choices("line.codes")[0], x.shape, [x, inverse], torch.empty_like(codes))
    assert all(torch.equal(result, codes) for result in results)
    weight, scale_w, bias = _weights(96, 64), _normal(96).abs().cuda(), _normal(96).cuda()
    scale = 1 / inverse
    wanted = int_gemm(codes, Weight(weight, scale_w, rotation=32), scale, Epilogue(bias))
    operands = [codes, weight, scale_w, scale, bias]
    results = _run(kernels, _choices("line")[0], codes.shape, operands, torch.empty_like(wanted))
    assert float(wanted.std()) > 0
    assert all(torch.equal(result, wanted) for result in results)


def test_convolutions(kernels: KernelTable) -> None:
    codes = torch.randint(-7, 8, (BATCH, 8, 8, 64), generator=torch.Generator().manual_seed(4)).to(torch.int8).cuda()
    weight, scale_w, bias = _weights(96, 3, 3, 64), _normal(96).abs().cuda(), _normal(96).cuda()
    scale = torch.tensor([1.0, 0.4, 0.1]).cuda()
    wanted = int_conv2d(codes, Weight(weight, scale_w, rotation=32), scale, Epilogue(bias), padding=(1, 1))
    operands = [codes, weight, scale_w, scale, bias]
    results = _run(kernels, _choices("site")[0], (BATCH, 64, 8, 8), operands, torch.empty_like(wanted))
    assert float(wanted.std()) > 0
    assert all(torch.equal(result, wanted) for result in results)


def test_ptx_that_is_none_is_refused_with_the_drivers_word(tmp_path: Path) -> None:
    from hqc.plugins.hqc_qdp.problems import PluginError

    torch.cuda.init()
    with pytest.raises(PluginError, match="kernel nothing: cuModuleLoadData failed with CUDA_ERROR_INVALID"):
        load_kernel(b"this is no PTX", "nothing", 0)
