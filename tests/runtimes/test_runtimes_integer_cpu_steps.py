"""What the `torch-int8` runtime runs besides products and passes: attention of its own, and steps in threads."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from hqc.runtimes.integer.cpu import attention, native, steps
from hqc.runtimes.integer.cpu.compiler import compiled_passes
from hqc.runtimes.integer.cpu.native import NativePasses

# ---- attention -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def functions(native_cache):
    library = compiled_passes(native_cache)
    if library.functions is None:
        pytest.skip(library.said)
    return library.functions


@pytest.mark.parametrize("few", [0, 10**9])
@pytest.mark.parametrize(("queries", "keys", "depth", "width"), [(1, 1, 3, 5), (33, 70, 24, 24), (64, 130, 40, 7)])
def test_attention(functions, queries: int, keys: int, depth: int, width: int, few: int, monkeypatch) -> None:
    """Against float64, by ours and by torch's; heads lie side by side in rows, or apart."""
    monkeypatch.setattr(attention, "_FEW", few)
    g = torch.Generator().manual_seed(depth)
    q = torch.randn(2, queries, 3 * depth, generator=g).view(2, queries, 3, depth).transpose(1, 2)
    k, v = torch.randn(2, 3, keys, depth, generator=g), torch.randn(2, 3, keys, width, generator=g)
    for scale in (None, 2.5):
        found = attention.OwnAttention(functions, scale)(q, k, v)
        exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
        assert float((found - exact).abs().max()) <= 2e-5  # scores of up to fifty, rounded in the exponent
    huge = attention.OwnAttention(functions, 1.0)(q * 1e3, k, v)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double() * 1e3, k.double(), v.double(), scale=1.0)
    assert float((huge - exact).abs().max()) <= 1e-2  # scores of thousands, float32's rounding in the exponent


def test_only_plain_attention_is_taken(functions) -> None:
    class Masked(torch.nn.Module):
        def forward(self, q, mask):
            plain = torch.ops.aten.scaled_dot_product_attention.default(q, q, q)
            return torch.ops.aten.scaled_dot_product_attention.default(plain, q, q, mask)

    module, g = torch.fx.symbolic_trace(Masked()), torch.Generator().manual_seed(5)
    given = torch.randn(1, 2, 9, 8, generator=g), torch.randn(9, 9, generator=g)
    wanted = module(*given)
    attention.take_attention(module, functions)
    assert [node.op for node in module.graph.nodes].count("call_module") == 1
    assert float((module(*given) - wanted).abs().max()) <= 1e-5


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_of_our_own_compute_what_one_computes(functions, threads: int) -> None:
    """Many short steps from several callers at once, of whom one has the threads."""
    from concurrent.futures import ThreadPoolExecutor

    x, inverse = torch.randn(4, 300, 64, generator=torch.Generator().manual_seed(1)), torch.full((4,), 1.7)
    passes = NativePasses(functions)
    wanted = passes.hadamard_quantize(x, inverse, low=-7, high=7, block=32)

    def many(_: int) -> bool:
        found, taken = torch.zeros_like(wanted), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native.torch, "empty", lambda *_, **__: found)
            with steps.recording(SimpleNamespace(address=torch.Tensor.data_ptr, step=taken.append)):
                passes.hadamard_quantize(x, inverse, low=-7, high=7, block=32)
        table = (steps.Step * 20)(*taken * 20)
        for _ in range(50):
            found.zero_()
            functions.hqc_run(ctypes.addressof(table), 20, threads, True)
        return torch.equal(found, wanted)

    assert many(0)
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(many, range(3)))
