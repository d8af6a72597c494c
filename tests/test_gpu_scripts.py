"""What the GPU scripts compute from what a GPU says."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def profiler(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_profile

    return gpu_profile


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_probe_images

    return gpu_probe_images


def _event(name: str, start: float, took: float, category: str = "kernel", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": took, "args": args}


def test_a_trace_is_summed_by_kind_and_kernel(profiler: ModuleType) -> None:
    """Two equal calls of three kernels and a copy; the host's events do not count."""
    events = []
    for start in (0.0, 1000.0):
        events += [
            _event("int_conv2d", start, 100.0, grid=[4, 1, 1]),
            _event("int_conv2d", start + 110, 300.0, grid=[8, 1, 1]),
            _event("void at::native::vectorized_layer_norm_kernel<float>", start + 420, 50.0),
            _event("Memcpy DtoD", start + 480, 20.0, "gpu_memcpy"),
            _event("cudaGraphLaunch", start, 900.0, "cuda_runtime"),
        ]
    found = profiler.summary(reversed(events), 2)
    assert found["kernels"] == 4
    assert found["busy_ms"] == pytest.approx(0.470)
    assert found["span_ms"] == pytest.approx(0.500)
    assert list(found["by_kind"]) == ["int_conv2d", "layer norm", "copies"]
    assert found["by_kind"]["int_conv2d"] == {"kernels": 2, "ms": pytest.approx(0.4)}
    assert found["top"][0] == {
        "name": "int_conv2d",
        "grid": "8×1×1",
        "kind": "int_conv2d",
        "count": 1,
        "us": 300,
        "ms_a_call": pytest.approx(0.3),
    }
    text = profiler.table(8, found)
    assert "batch 8: 4 kernels a call, 0.470 ms of kernels, 0.500 ms from the first to the last" in text
    assert "| int_conv2d | 2 | 0.400 |" in text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sum_splits", "split sums"),
        ("group_norm_quantize", "quantisers"),
        ("group_norm_affine", "norm statistics"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>", "group norm"),
        ("fmha_cutlassF_f16_aligned_64x128_rf_sm80", "attention"),
        ("void at::native::(anonymous namespace)::softmax_warp_forward<float>", "attention"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("void at::native::CatArrayBatchedCopy_vectorized<Half>", "copies"),
        ("void cudnn::engines_precompiled::nhwcToNchwKernel<half>", "copies"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32", "fp16 convolutions"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n", "fp16 products"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "fp16 products"),
        ("void at::native::vectorized_elementwise_kernel<4, silu_kernel>", "elementwise"),
        ("void at::native::upsample_nearest2d_nhwc_out_frame<half>", "resampling"),
    ],
)
def test_kinds(profiler: ModuleType, name: str, kind: str) -> None:
    assert profiler.kind_of(name) == kind


def test_calls_that_differ_have_no_span(profiler: ModuleType) -> None:
    events = [_event("a", 0, 1), _event("a", 5, 1), _event("a", 9, 1)]
    assert profiler.summary(events, 2)["span_ms"] is None
    assert profiler.summary([], 2)["kernels"] == 0


def test_differing_codes_are_placed_and_explained(probe: ModuleType) -> None:
    x, inverse = torch.randn(2, 64, 9, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 2.5])
    level = probe.levels(x, inverse, 32)
    wanted = level.round().clamp(-7, 7).to(torch.int8)
    assert probe.differences(wanted, wanted, level) == {"differ": 0}
    found = wanted.clone()
    found[1, 2, 3], found[0, 8, 63] = 77, wanted[0, 8, 63] - 1
    said = probe.differences(found, wanted, level)
    assert (said["differ"], said["of"], said["unwritten"]) == (2, 2 * 64 * 9, 1)
    assert said["by_channel"] == {"3": 1, "63": 1}
    assert said["first"][0] == said["first"][0] | {"sample": 0, "channel": 63, "pixel": 8}
    assert probe.explanation(found, level, x, inverse, 32) == []


def test_a_stage_left_out_is_recognised(probe: ModuleType) -> None:
    x, inverse = torch.randn(1, 8, 50, generator=torch.Generator().manual_seed(2)), torch.tensor([2.5])
    y = x.double().transpose(1, 2).reshape(-1, 8)
    for bit in (0, 2):
        pairs = y.view(-1, 8 // 2 ** (bit + 1), 2, 2**bit)
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).reshape(-1, 8)
    found = (y.view(1, 50, 8) / 8**0.5 * 2.5).round().clamp(-7, 7).to(torch.int8)
    assert probe.explanation(found, probe.levels(x, inverse, 8), x, inverse, 8) == ["stage 1 left out"]
