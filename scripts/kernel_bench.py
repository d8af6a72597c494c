"""Times hqc's kernels on an NVIDIA GPU: GB/s against a device copy, TOP/s against torch._int_mm, fp16 GEMM and cuDNN.

Shapes are those of LDM-4 at a batch of 8. Medians of `triton.testing.do_bench`, which empties the L2 cache before each
call. Prints one table; `--json FILE` writes the rows.
"""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HALF = torch.float16
IMAGES = [(8, 192, 64), (8, 384, 32), (8, 576, 16), (8, 960, 8), (32, 192, 64)]  # batch, channels, size
GEMMS = [(8192, 384, 3072), (8192, 1536, 384), (2048, 576, 4608), (2048, 2304, 576), (512, 960, 960), (512, 3840, 960)]
CONVOLUTIONS = [  # batch, size, channels, outputs, kernel, stride
    (8, 64, 192, 192, 3, 1),
    (8, 64, 192, 192, 3, 2),
    (8, 32, 384, 384, 3, 1),
    (8, 16, 576, 576, 3, 1),
    (8, 8, 960, 960, 3, 1),
    (8, 8, 1920, 960, 3, 1),
    (8, 32, 384, 384, 1, 1),
]
REP_MS = 40


def milliseconds(call: Callable[[], Any]) -> float:
    """Median of a call on the device, its L2 cache emptied before each."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=REP_MS, return_mode="median"))


def rotations() -> list[dict[str, Any]]:
    """Hadamard-quantise in both layouts: bytes read and written over time, as a fraction of a copy's."""
    from hqc.kernels import hadamard_quantize

    rows = []
    for batch, channels, size in IMAGES:
        x = torch.randn(batch, channels, size, size, device="cuda", dtype=HALF)
        last = x.permute(0, 2, 3, 1).contiguous()
        inverse, target = torch.full((batch,), 2.0, device="cuda"), torch.empty_like(last)
        copy = 4 * x.numel() / milliseconds(partial(target.copy_, last)) / 1e6
        for layout, given in (("NHWC", last), ("NCHW", x)):
            for top in (7, 127):
                options = {"low": -top, "high": top, "block": 32, "nchw": layout == "NCHW"}
                took = milliseconds(partial(hadamard_quantize, given, inverse, **options))
                speed = 3 * x.numel() / took / 1e6
                shape = [batch, channels, size, size]
                row = {"shape": shape, "layout": layout, "codes": f"±{top}", "megabytes": 2 * x.numel() / 1e6}
                rows.append({**row, "gb_s": speed, "copy_gb_s": copy, "of_copy": speed / copy})
    return rows


def weights(outputs: int, *inner: int) -> dict[str, Any]:
    """An int8 and a packed four-bit weight, channels last."""
    from hqc.kernels import Weight, pack_weight

    scale = torch.full((outputs,), 1e-3, device="cuda")
    wide = torch.randint(-127, 128, (outputs, *inner), device="cuda", dtype=torch.int8)
    narrow = torch.randint(-3, 4, (outputs, *inner), device="cuda", dtype=torch.int8)
    return {"int8": Weight(wide, scale), "int4": Weight(pack_weight(narrow), scale, rotation=32)}


def products() -> list[dict[str, Any]]:
    """GEMMs against torch._int_mm (int32 out, no epilogue) and fp16."""
    from hqc.kernels import Epilogue, int_gemm

    rows = []
    for m, k, n in GEMMS:
        codes = torch.randint(-7, 8, (m, k), device="cuda", dtype=torch.int8)
        scale, bias = torch.ones(1, device="cuda"), torch.zeros(n, device="cuda")
        epilogue, made = Epilogue(bias, dtype=HALF), weights(n, k)
        ours = {form: partial(int_gemm, codes, weight, scale, epilogue) for form, weight in made.items()}
        right = torch.randn(k, n, device="cuda", dtype=HALF)
        peers = {
            "torch._int_mm": partial(torch._int_mm, codes, made["int8"].codes.t()),
            "fp16 matmul": partial(torch.mm, codes.to(HALF), right),
        }
        rows.append({"shape": [m, k, n], **_rates(2 * m * k * n, ours, peers)})
    return rows


def convolutions() -> list[dict[str, Any]]:
    """Convolutions against cuDNN in fp16, channels-last, its best algorithm."""
    from hqc.kernels import Epilogue, int_conv2d

    torch.backends.cudnn.benchmark = True
    rows = []
    for batch, size, channels, outputs, kernel, stride in CONVOLUTIONS:
        codes = torch.randint(-7, 8, (batch, size, size, channels), device="cuda", dtype=torch.int8)
        scale, bias = torch.ones(batch, device="cuda"), torch.zeros(outputs, device="cuda")
        window = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}
        epilogue, made = Epilogue(bias, dtype=HALF), weights(outputs, kernel, kernel, channels)
        ours = {form: partial(int_conv2d, codes, w, scale, epilogue, **window) for form, w in made.items()}
        image = torch.randn(batch, channels, size, size, device="cuda", dtype=HALF)
        weight = torch.randn(outputs, channels, kernel, kernel, device="cuda", dtype=HALF)
        places = (size + 2 * (kernel // 2) - kernel) // stride + 1
        operations = 2 * batch * places**2 * outputs * channels * kernel**2
        peers = {"fp16 cuDNN": _cudnn(image, weight, bias.to(HALF), stride, kernel // 2)}
        shape = [batch, size, channels, outputs, kernel, stride]
        rows.append({"shape": shape, **_rates(operations, ours, peers)})
    return rows


def _cudnn(image: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Callable[[], Tensor]:
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (image, weight))
    return partial(torch.nn.functional.conv2d, x, w, bias, stride, padding)


def _rates(operations: int, ours: dict[str, Any], peers: dict[str, Any]) -> dict[str, Any]:
    """TOP/s by name, and how many times a peer's rate int8 reaches."""
    rates = {name: operations / milliseconds(call) / 1e9 for name, call in {**ours, **peers}.items()}
    return {"tops": rates, "int8_over": {name: rates["int8"] / rates[name] for name in peers}}


def table(measured: dict[str, list[dict[str, Any]]]) -> str:
    """All rows as Markdown."""
    lines = ["| Hadamard-quantise | layout | codes | GB/s | copy | of copy |", "|---|---|---|---|---|---|"]
    for row in measured["hadamard_quantize"]:
        speeds = f"{row['gb_s']:.0f} | {row['copy_gb_s']:.0f} | {100 * row['of_copy']:.0f} %"
        lines.append(f"| {'×'.join(map(str, row['shape']))} | {row['layout']} | {row['codes']} | {speeds} |")
    for kind in ("int_gemm", "int_conv2d"):
        names = list(measured[kind][0]["tops"])
        lines += ["", f"| {kind}, TOP/s | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for row in measured[kind]:
            values = " | ".join(f"{row['tops'][name]:.0f}" for name in names)
            lines.append(f"| {'×'.join(map(str, row['shape']))} | {values} |")
    return "\n".join(lines)


def measure() -> dict[str, list[dict[str, Any]]]:
    """Every row, by kernel."""
    return {"hadamard_quantize": rotations(), "int_gemm": products(), "int_conv2d": convolutions()}


def slug(name: str) -> str:
    """A card's name as a file name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "kernel_bench: torch finds no CUDA device\n")
    measured = measure()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{table(measured)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
