"""Times hqc's kernels on an NVIDIA GPU, inside CUDA graphs, in turns with their peers: us, GB/s or TOP/s, quartiles.

Shapes are those of LDM-4 at a batch of 8. A graph holds 8 to 24 calls, each on another copy of what it reads: together
more than the L2 cache holds, as far as 24 reach. The card is spun up before each contest, and the contenders take turns
for several rounds. The quantisers are compared with a device copy that moves the same bytes and with torch's own
pieces; the products with CUTLASS's int8 GEMM where sgl_kernel is installed, else torch._int_mm, and with cuBLAS and
cuDNN in float16.

    kernel_bench.py [--only KINDS] [--json FILE]
"""

import argparse
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hqc.evaluation.bench.gpu_timing import Rotation, cache_bytes, capture, interleaved

DEVICE, HALF, GROUPS, BLOCK, TOP = "cuda", torch.float16, 32, 32, 7
ROUNDS = 9

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """make(i) is a call on the i-th copy of its operands, of which a call reads and writes `bytes`."""

    make: Callable[[int], Call]
    bytes: int


@dataclass(frozen=True)
class Case:
    """One row: who computes the same, ours first, and how much work a call is.

    unit: "GB/s" of the bytes that must be moved, or "TOP/s". other_work: where a contender's work is another.
    """

    kind: str
    shape: tuple[int, ...]
    note: str
    unit: str
    work: float
    contenders: Mapping[str, Contender]
    other_work: Mapping[str, float] = field(default_factory=dict)


# ---- quantisers ----------------------------------------------------------------------------------------------------

IMAGES = [(8, 192, 64), (8, 384, 32), (8, 576, 16), (8, 960, 8), (32, 192, 64)]  # batch, channels, side
NORMED = [(8, 192, 64), (8, 384, 64), (8, 384, 32), (8, 576, 16), (8, 960, 8)]
TOKENS = [(8, 1024, 384), (8, 256, 576), (8, 64, 960)]  # batch, tokens, channels
GATED = [(8, 1024, 1536), (8, 256, 2304), (8, 64, 3840)]  # batch, tokens, channels of the codes


def _copy(moved: int) -> Contender:
    """A device copy that reads and writes `moved` bytes together."""

    def make(i: int) -> Call:
        source = torch.zeros(moved // 2, dtype=torch.uint8, device=DEVICE)
        return partial(torch.empty_like(source).copy_, source)

    return Contender(make, moved)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=HALF)


def _quantiser(kind: str, shape: tuple[int, ...], note: str, moved: int, **ways: Callable[[int], Call]) -> Case:
    named = {name.replace("_", " "): Contender(make, moved) for name, make in ways.items()}
    return Case(kind, shape, note, "GB/s", moved, {**named, "copy": _copy(moved)})


def rotations() -> Iterator[Case]:
    """Hadamard-quantise in both layouts."""
    from hqc.kernels import hadamard_quantize

    for batch, channels, side in IMAGES:
        inverse = torch.full((batch,), 2.0, device=DEVICE)
        options = {"low": -TOP, "high": TOP, "block": BLOCK}

        def last(
            i: int, b: int = batch, c: int = channels, s: int = side, inv: Tensor = inverse, o: Any = options
        ) -> Call:
            return partial(hadamard_quantize, _random(b, s, s, c), inv, **o)

        def nchw(
            i: int, b: int = batch, c: int = channels, s: int = side, inv: Tensor = inverse, o: Any = options
        ) -> Call:
            return partial(hadamard_quantize, _random(b, c, s, s), inv, nchw=True, **o)

        shape, moved = (batch, channels, side, side), 3 * batch * channels * side**2
        yield _quantiser("hadamard_quantize", shape, "", moved, hqc_NHWC=last, hqc_NCHW=nchw)


def group_norms() -> Iterator[Case]:
    """Group norm, SiLU, rotation and quantisation: in one pass, with and without the producer's statistics."""
    from hqc import kernels

    if not hasattr(kernels, "group_norm_quantize"):
        return
    for batch, channels, side in NORMED:
        yield _group_norm(batch, channels, side)


def _group_norm(batch: int, channels: int, side: int) -> Case:
    from hqc.kernels import GroupNorm, Quantiser, column_statistics, group_norm_quantize, hadamard_quantize

    weight, bias = torch.rand(channels, device=DEVICE), torch.rand(channels, device=DEVICE)
    inverse = torch.full((batch,), 2.0, device=DEVICE)
    norm, quantiser = GroupNorm(GROUPS, 1e-5, weight, bias, silu=True), Quantiser(inverse, -TOP, TOP, BLOCK)

    def image() -> Tensor:
        return _random(batch, side, side, channels)

    def known(i: int) -> Call:
        x = image()
        return partial(group_norm_quantize, x, norm, quantiser, statistics=column_statistics(x))

    def alone(i: int) -> Call:
        return partial(group_norm_quantize, image(), norm, quantiser)

    def pieces(i: int) -> Call:
        x, w, b = image().permute(0, 3, 1, 2), weight.to(HALF), bias.to(HALF)

        def call() -> Tensor:
            y = F.silu(F.group_norm(x, GROUPS, w, b))
            return hadamard_quantize(y.contiguous(), inverse, low=-TOP, high=TOP, block=BLOCK, nchw=True)

        return call

    moved = 3 * batch * channels * side**2
    ways = {"hqc": known, "hqc_with_statistics": alone, "torch's_pieces": pieces}
    return _quantiser("group_norm_quantize", (batch, channels, side, side), "SiLU", moved, **ways)


def layer_norms() -> Iterator[Case]:
    """Layer norm, rotation and quantisation."""
    from hqc import kernels

    if not hasattr(kernels, "layer_norm_quantize"):
        return
    for shape in TOKENS:
        yield _layer_norm(*shape)


def _layer_norm(batch: int, tokens: int, channels: int) -> Case:
    from hqc.kernels import LayerNorm, Quantiser, hadamard_quantize, layer_norm_quantize

    weight, bias = torch.rand(channels, device=DEVICE), torch.rand(channels, device=DEVICE)
    inverse = torch.full((batch,), 2.0, device=DEVICE)
    norm, quantiser = LayerNorm(1e-5, weight, bias), Quantiser(inverse, -TOP, TOP, BLOCK)

    def fused(i: int) -> Call:
        return partial(layer_norm_quantize, _random(batch, tokens, channels), norm, quantiser)

    def pieces(i: int) -> Call:
        x, w, b = _random(batch, tokens, channels), weight.to(HALF), bias.to(HALF)

        def call() -> Tensor:
            y = F.layer_norm(x, (channels,), w, b)
            return hadamard_quantize(y, inverse, low=-TOP, high=TOP, block=BLOCK)

        return call

    moved = 3 * batch * tokens * channels
    ways = {"hqc": fused, "torch's_pieces": pieces}
    return _quantiser("layer_norm_quantize", (batch, tokens, channels), "", moved, **ways)


def gates() -> Iterator[Case]:
    """GEGLU, rotation and quantisation."""
    from hqc import kernels

    if not hasattr(kernels, "gate_quantize"):
        return
    for shape in GATED:
        yield _gate(*shape)


def _gate(batch: int, tokens: int, channels: int) -> Case:
    from hqc.kernels import Quantiser, gate_quantize, hadamard_quantize

    inverse = torch.full((batch,), 2.0, device=DEVICE)
    quantiser = Quantiser(inverse, -TOP, TOP, BLOCK)

    def fused(i: int) -> Call:
        return partial(gate_quantize, _random(batch, tokens, 2 * channels), quantiser, kind="gelu", gated=True)

    def pieces(i: int) -> Call:
        x = _random(batch, tokens, 2 * channels)

        def call() -> Tensor:
            a, g = x.chunk(2, -1)
            return hadamard_quantize(a * F.gelu(g), inverse, low=-TOP, high=TOP, block=BLOCK)

        return call

    moved = 5 * batch * tokens * channels
    ways = {"hqc": fused, "torch's_pieces": pieces}
    return _quantiser("gate_quantize", (batch, tokens, channels), "GEGLU", moved, **ways)


# ---- attention ------------------------------------------------------------------------------------------------------

ATTENDED = [(8, 1024, 384), (8, 256, 576), (8, 64, 960)]  # batch, tokens, width of the one head


def attentions() -> Iterator[Case]:
    """One head too wide for flash kernels, rotation and quantisation; unit TOP/s of both products."""
    for shape in ATTENDED:
        yield _attention(*shape)


def _attention(batch: int, tokens: int, width: int) -> Case:
    from hqc.kernels import Quantiser, hadamard_quantize, wide_attention

    inverse, scale = torch.full((batch,), 2.0, device=DEVICE), width**-0.5
    quantiser = Quantiser(inverse, -TOP, TOP, BLOCK)

    def operands() -> tuple[Tensor, Tensor, Tensor]:
        return _random(batch, tokens, width), _random(batch, tokens, width), _random(batch, tokens, width)

    def codes(y: Tensor) -> Tensor:
        return hadamard_quantize(y, inverse, low=-TOP, high=TOP, block=BLOCK)

    def ours(i: int) -> Call:
        return partial(wide_attention, *operands(), heads=1, scale=scale, quantiser=quantiser)

    def pieces(i: int) -> Call:
        q, k, v = operands()

        def call() -> Tensor:
            scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
            return codes(torch.bmm(scores.softmax(-1), v))

        return call

    def fused(i: int) -> Call:
        q, k, v = (t[:, None] for t in operands())
        return lambda: codes(F.scaled_dot_product_attention(q, k, v, scale=scale)[:, 0])

    moved = 7 * batch * tokens * width
    ways = {"hqc": ours, "bmm, softmax, bmm": pieces, "torch's fused": fused}
    contenders = {name: Contender(make, moved) for name, make in ways.items()}
    operations = 4.0 * batch * tokens * tokens * width
    return Case("wide_attention", (batch, tokens, width), "one head", "TOP/s", operations, contenders)


# ---- products ------------------------------------------------------------------------------------------------------

GEMMS = [(8192, 384, 3072), (8192, 1536, 384), (2048, 576, 4608), (2048, 2304, 576), (512, 960, 960), (512, 3840, 960)]
CONVOLUTIONS = [  # batch, side, channels, outputs, kernel, stride
    (8, 64, 192, 192, 3, 1),
    (8, 64, 192, 192, 3, 2),
    (8, 32, 384, 384, 3, 1),
    (8, 16, 576, 576, 3, 1),
    (8, 8, 960, 960, 3, 1),
    (8, 8, 1920, 960, 3, 1),
    (8, 32, 384, 384, 1, 1),
]


def _codes(top: int, *shape: int) -> Tensor:
    return torch.randint(-top, top + 1, shape, device=DEVICE, dtype=torch.int8)


def _weight(form: str, outputs: int, *inner: int) -> Any:
    """An int8 or a packed four-bit weight, channels last."""
    from hqc.kernels import Weight, pack_weight

    scale = torch.full((outputs,), 1e-3, device=DEVICE)
    if form == "int8":
        return Weight(_codes(127, outputs, *inner), scale)
    return Weight(pack_weight(_codes(3, outputs, *inner)), scale, rotation=BLOCK)


def products() -> Iterator[Case]:
    """GEMMs with bias, scales and float16 out."""
    for m, k, n in GEMMS:
        yield _gemm(m, k, n)


def _gemm(m: int, k: int, n: int) -> Case:
    from hqc.kernels import Epilogue, int_gemm

    scale, bias = torch.ones(1, device=DEVICE), torch.zeros(n, device=DEVICE)
    epilogue = Epilogue(bias, dtype=HALF)

    def ours(form: str, i: int) -> Call:
        return partial(int_gemm, _codes(TOP, m, k), _weight(form, n, k), scale, epilogue)

    def half(i: int) -> Call:
        return partial(F.linear, _random(m, k), _random(n, k), bias.to(HALF))

    int8 = m * k + k * n + 2 * m * n
    contenders = {
        "int8": Contender(partial(ours, "int8"), int8),
        "int4": Contender(partial(ours, "int4"), int8 - k * n // 2),
        **_int8_peer(m, k, n, bias, int8),
        "fp16 cuBLAS": Contender(half, 2 * (m * k + k * n + m * n)),
    }
    return Case("int_gemm", (m, k, n), "", "TOP/s", 2.0 * m * k * n, contenders)


def _int8_peer(m: int, k: int, n: int, bias: Tensor, moved: int) -> dict[str, Contender]:
    """CUTLASS with scales, bias and float16 out; without sgl_kernel torch's plain product, which writes int32."""
    if importlib.util.find_spec("sgl_kernel") is not None:
        product = importlib.import_module("sgl_kernel").int8_scaled_mm

        def cutlass(i: int) -> Call:
            scales = torch.ones(m, 1, device=DEVICE), torch.ones(n, 1, device=DEVICE)
            return partial(product, _codes(TOP, m, k), _codes(127, n, k).t(), *scales, HALF, bias.to(HALF))

        return {"CUTLASS int8": Contender(cutlass, moved)}

    def plain(i: int) -> Call:
        return partial(torch._int_mm, _codes(TOP, m, k), _codes(127, n, k).t())

    return {"torch._int_mm": Contender(plain, moved + 2 * m * n)}


def convolutions() -> Iterator[Case]:
    """Convolutions with bias and scales; cuDNN's quickest algorithm, channels-last."""
    torch.backends.cudnn.benchmark = True
    for shape in CONVOLUTIONS:
        yield _convolution(*shape)


def _convolution(batch: int, side: int, channels: int, outputs: int, kernel: int, stride: int) -> Case:
    from hqc.kernels import Epilogue, int_conv2d

    scale, bias = torch.ones(batch, device=DEVICE), torch.zeros(outputs, device=DEVICE)
    padding, epilogue = kernel // 2, Epilogue(bias, dtype=HALF)
    window = {"stride": (stride, stride), "padding": (padding, padding)}

    def ours(form: str, i: int) -> Call:
        weight = _weight(form, outputs, kernel, kernel, channels)
        return partial(int_conv2d, _codes(TOP, batch, side, side, channels), weight, scale, epilogue, **window)

    def cudnn(i: int) -> Call:
        x, w = _random(batch, channels, side, side), _random(outputs, channels, kernel, kernel)
        operands = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        return partial(F.conv2d, *operands, bias.to(HALF), stride, padding)

    places = (side + 2 * padding - kernel) // stride + 1
    weights, image, out = outputs * channels * kernel**2, batch * channels * side**2, batch * outputs * places**2
    contenders = {
        "int8": Contender(partial(ours, "int8"), weights + image + 2 * out),
        "int4": Contender(partial(ours, "int4"), weights // 2 + image + 2 * out),
        "fp16 cuDNN": Contender(cudnn, 2 * (weights + image + out)),
    }
    operations = 2.0 * out * channels * kernel**2
    return Case("int_conv2d", (batch, side, channels, outputs, kernel, stride), "", "TOP/s", operations, contenders)


# ---- all of it -----------------------------------------------------------------------------------------------------

KINDS: Mapping[str, Callable[[], Iterator[Case]]] = {
    "hadamard_quantize": rotations,
    "group_norm_quantize": group_norms,
    "layer_norm_quantize": layer_norms,
    "gate_quantize": gates,
    "wide_attention": attentions,
    "int_gemm": products,
    "int_conv2d": convolutions,
}
"""Kernel -> its cases, made one after the other. A further kernel is one entry."""


def measure_case(case: Case) -> dict[str, Any]:
    """A row: microseconds with quartiles and the rate of each contender; the reasons of those that cannot run."""
    replays, calls, failed = dict[str, Call](), dict[str, int](), dict[str, str]()
    for name, contender in case.contenders.items():
        rotation = Rotation.over(contender.bytes, cache_bytes())
        try:
            replays[name] = capture([contender.make(i) for i in range(rotation.copies)], rotation.calls)
            calls[name] = rotation.calls
        except Exception as error:  # the others go on
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    measured = interleaved(replays, calls, rounds=ROUNDS) if replays else {}
    row: dict[str, Any] = {"shape": list(case.shape), "note": case.note, "unit": case.unit}
    row["contenders"] = {name: found.to_dict() | _rate(case, name, found.median) for name, found in measured.items()}
    first = next(iter(case.contenders))
    if first in measured:
        ours = measured[first].median
        row["over"] = {name: found.median / ours for name, found in measured.items() if name != first}
    return row | ({"failed": failed} if failed else {})


def _rate(case: Case, name: str, microseconds: float) -> dict[str, float]:
    scale = 1e3 if case.unit == "GB/s" else 1e6
    return {"rate": case.other_work.get(name, case.work) / microseconds / scale}


def measure(
    kinds: Sequence[str] = tuple(KINDS), on_row: Callable[[str, dict[str, Any]], None] = lambda kind, row: None
) -> dict[str, list[dict[str, Any]]]:
    """Every row by kernel; `on_row` hears of each the moment it is there."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for kind in kinds:
        for case in KINDS[kind]():
            found[kind].append(measure_case(case))
            on_row(kind, found[kind][-1])
    return {kind: rows for kind, rows in found.items() if rows}


def table(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """All rows as Markdown: us (quartiles), rate, and how many times our time each takes."""
    lines = []
    for kind, rows in measured.items():
        unit = rows[0]["unit"]
        lines += [f"| {kind} | contender | us | quartiles | {unit} | × ours |", "|---|---|---|---|---|---|"]
        for row in rows:
            shape = " ".join(("×".join(map(str, row["shape"])), row["note"])).strip()
            for name, found in row["contenders"].items():
                times = f"{found['us']:.1f} | {found['us_low']:.1f}–{found['us_high']:.1f}"
                over = f"{row['over'][name]:.2f}" if name in row.get("over", {}) else "–"
                lines.append(f"| {shape} | {name} | {times} | {found['rate']:.0f} | {over} |")
            lines += [f"| {shape} | {name} | – | {why} | – | – |" for name, why in row.get("failed", {}).items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def slug(name: str) -> str:
    """A card's name as a file name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", default=",".join(KINDS), metavar="KINDS", help=", ".join(KINDS))
    arguments = parser.parse_args()
    kinds = [kind.strip() for kind in arguments.only.split(",") if kind.strip()]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"there is no kernel {unknown[0]!r}; there are {', '.join(KINDS)}")
    if not torch.cuda.is_available():
        parser.exit(2, "kernel_bench: torch finds no CUDA device\n")
    measured: dict[str, list[dict[str, Any]]] = {}

    def keep(kind: str, row: dict[str, Any]) -> None:
        measured.setdefault(kind, []).append(row)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    for kind in kinds:
        if found := measure([kind], keep):
            print(table(found), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
