"""What the GPU scripts compute from what a GPU says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def profiler() -> ModuleType:
    import gpu_profile

    return gpu_profile


@pytest.fixture
def kernels() -> ModuleType:
    import kernel_bench

    return kernel_bench


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


# ---- kernel_bench --------------------------------------------------------------------------------------------------

INTERPRETED = """
import json, sys

import kernel_bench as bench
import torch

torch.set_num_threads(1)
bench.DEVICE, bench.GROUPS = "cpu", 4
bench.IMAGES, bench.NORMED, bench.TOKENS, bench.GATED = [(2, 32, 2)], [(2, 32, 2)], [(2, 3, 32)], [(2, 3, 32)]
bench.GEMMS, bench.CONVOLUTIONS, bench.ATTENDED = [(32, 64, 32)], [(1, 3, 32, 32, 3, 1)], [(2, 5, 96)]
ran = {}
for kind, cases in bench.KINDS.items():
    for case in cases():
        for name, contender in case.contenders.items():
            contender.make(0)()
            ran.setdefault(kind, []).append(name)
print(json.dumps(ran))
"""


def test_every_contender_runs() -> None:
    """On tiny shapes, hqc's kernels in triton's interpreter."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=ROOT / "scripts", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ran = json.loads(done.stdout)
    assert ran["hadamard_quantize"] == ["hqc NHWC", "hqc NCHW", "copy"]
    assert ran["wide_attention"] == ["hqc", "bmm, softmax, bmm", "torch's fused"]
    assert ran["int_gemm"][:2] == ["int8", "int4"]
    assert ran["int_gemm"][3] == "fp16 cuBLAS"
    assert ran["int_conv2d"] == ["int8", "int4", "fp16 cuDNN"]


def test_one_that_fails_is_said_and_rates_come_from_medians(kernels: ModuleType, monkeypatch) -> None:
    from hqc.evaluation.bench.gpu_timing import Measured

    def broken(i: int) -> None:
        raise RuntimeError("no such kernel")

    def capture(calls: list[Any], times: int) -> Any:
        assert 8 <= times <= 24
        return calls[0]

    contenders = {
        "ours": kernels.Contender(lambda i: lambda: None, 1000),
        "broken": kernels.Contender(broken, 1000),
        "copy": kernels.Contender(lambda i: lambda: None, 1000),
    }
    case = kernels.Case("k", (8, 192), "SiLU", "GB/s", 30e6, contenders)
    times = {"ours": Measured(10.0, 9.0, 11.0), "copy": Measured(8.0, 8.0, 8.5)}
    monkeypatch.setattr(kernels, "capture", capture)
    monkeypatch.setattr(kernels, "cache_bytes", lambda: 50 * 2**20)
    monkeypatch.setattr(kernels, "interleaved", lambda replays, calls, rounds: {name: times[name] for name in replays})
    row = kernels.measure_case(case)
    assert row["contenders"]["ours"] == {"us": 10.0, "us_low": 9.0, "us_high": 11.0, "rate": pytest.approx(3000)}
    assert row["over"] == {"copy": 0.8}
    assert row["failed"] == {"broken": "RuntimeError: no such kernel"}
    text = kernels.table({"k": [row]})
    assert "| 8×192 SiLU | ours | 10.0 | 9.0–11.0 | 3000 | – |" in text
    assert "| 8×192 SiLU | copy | 8.0 | 8.0–8.5 | 3750 | 0.80 |" in text
    assert "| 8×192 SiLU | broken | – | RuntimeError: no such kernel | – | – |" in text


def test_rows_are_heard_of_at_once(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, int]] = []
    monkeypatch.setattr(kernels, "KINDS", {"a": lambda: iter([1, 2]), "b": lambda: iter([])})
    monkeypatch.setattr(kernels, "measure_case", lambda case: {"case": case})
    found = kernels.measure(["a", "b"], lambda kind, row: heard.append((kind, row["case"])))
    assert heard == [("a", 1), ("a", 2)]
    assert found == {"a": [{"case": 1}, {"case": 2}]}


def test_a_cards_name_as_a_file(kernels: ModuleType) -> None:
    assert kernels.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
