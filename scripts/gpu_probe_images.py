"""Where the plugin's kernels for images differ from `hadamard_quantize`, and from the definition in float64.

For several shapes, both layouts and every tactic the kernel runs as the plugin launches it (PTX that the driver
compiles), as a cubin from triton's own assembler, and through triton's launcher; further tiles show what a difference
depends on. Each differing code is placed (sample, channel, pixel) with its level's distance from a rounding boundary.
"F2IP" counts conversions of floats to bytes in the machine code. There should be none: where a code is the lowest byte
of a float sum's bits, ptxas may convert the sum instead.

    gpu_probe_images.py [--json FILE] [--only SUBSTRING]

Exit status: 0 all equal, 1 some differ, 2 no GPU.
"""

import argparse
import hashlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqc.kernels import hadamard_quantize
from hqc.kernels.compile import CompiledKernel, compile_kernel
from hqc.kernels.options import HadamardOptions
from hqc.plugins.hqc_qdp.driver import load_kernel
from hqc.plugins.hqc_qdp.nodes import HadamardVariant
from hqc.plugins.tactics import Tactic, tactics

SHAPES = [(3, 64, 8, 8), (3, 64, 16, 16), (2, 192, 8, 8), (2, 32, 8, 8), (3, 64, 5, 6), (2, 960, 8, 8)]
BLOCKS = (32, 1, 16, 64)
TOP, REPEATS, SHOWN = 7, 5, 12
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def levels(x: Tensor, inverse: Tensor, block: int) -> Tensor:
    """(Ĥ·x)·inverse in float64 on the CPU, before rounding: [N, C, pixels] -> [N, pixels, C]."""
    from hqc.ops import sylvester

    rows = x.double().cpu().transpose(1, 2).contiguous()
    rotated = rows.view(-1, block) @ sylvester(block).double() / block**0.5
    return rotated.view(rows.shape) * inverse.double().cpu().view(-1, 1, 1)


def boundary_distance(level: Tensor) -> Tensor:
    """How far a level is from the next half, where rounding turns.

    >>> boundary_distance(torch.tensor([2.5, 2.0, -1.75])).tolist()
    [0.0, 0.5, 0.25]
    """
    return ((level - level.floor()) - 0.5).abs()


def differences(found: Tensor, wanted: Tensor, level: Tensor) -> dict[str, Any]:
    """How many codes differ, by how much, near which boundary, where; codes and levels are [N, pixels, C]."""
    places = (found != wanted).nonzero()
    if not len(places):
        return {"differ": 0}
    n, p, c = places.T
    step = (found[n, p, c].int() - wanted[n, p, c].int()).abs()
    distance = boundary_distance(level[n, p, c])
    return {
        "differ": len(places),
        "of": found.numel(),
        "largest_step": int(step.max()),
        "unwritten": int((found[n, p, c] == 77).sum()),
        "boundary_distance": {"least": float(distance.min()), "largest": float(distance.max())},
        "by_sample": _counts(n),
        "by_channel": _counts(c),
        "by_pixel": _counts(p),
        "first": [
            {
                "sample": int(i),
                "channel": int(k),
                "pixel": int(j),
                "found": int(found[i, j, k]),
                "wanted": int(wanted[i, j, k]),
                "level": float(level[i, j, k]),
            }
            for i, j, k in places[:SHOWN].tolist()
        ],
    }


def _counts(values: Tensor) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values.tolist()).items())}


def explanation(found: Tensor, level: Tensor, x: Tensor, inverse: Tensor, block: int) -> list[str]:
    """Which single fault of the butterfly gives exactly these codes: a stage left out, negated, or done twice."""
    order, fitting = block.bit_length() - 1, []
    rows = x.double().cpu().transpose(1, 2).contiguous()
    for stage in range(order):
        for fault in ("left out", "with its sign turned", "done twice"):
            y = rows.view(-1, block)
            for bit in range(order):
                times = {"left out": 0, "done twice": 2}.get(fault, 1) if bit == stage else 1
                for _ in range(times):
                    pairs = y.view(-1, block // 2 ** (bit + 1), 2, 2**bit)
                    a, b = pairs[:, :, 0], pairs[:, :, 1]
                    turned = fault == "with its sign turned" and bit == stage
                    y = torch.stack((a - b, a + b) if turned else (a + b, a - b), 2).reshape(-1, block)
            faulty = y.view(rows.shape) / block**0.5 * inverse.double().cpu().view(-1, 1, 1)
            if torch.equal(faulty.round().clamp(-TOP, TOP).to(torch.int8), found):
                fitting.append(f"stage {stage} {fault}")
    return fitting


@cache
def compiled(tactic: Tactic, arch: str) -> CompiledKernel:
    """Once for all shapes."""
    return compile_kernel(tactic.kernel, tactic.dtype, tactic.plain_options(), arch)


@cache
def conversions(cubin: bytes) -> int | None:
    """F2IP instructions in machine code; None where triton brings no disassembler."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            done = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
    return len(re.findall(r"\bF2IP\b", done.stdout)) if done.stdout else None


# ---- ways to run ---------------------------------------------------------------------------------------------------


def further(tactic: Tactic) -> Iterator[tuple[str, Tactic]]:
    """The tactic with one, two and four warps, also on a tile of 64 × 64: does a butterfly across warps differ?"""
    options = tactic.options
    assert isinstance(options, HadamardOptions)
    tall = max(options.tile_rows, 4096 // options.tile_channels)
    for rows, warps in dict.fromkeys((rows, warps) for rows in (options.tile_rows, tall) for warps in (1, 2, 4)):
        if (rows, warps) != (options.tile_rows, options.num_warps):
            yield (
                f"{rows} rows, {warps} warps",
                replace(tactic, options=replace(options, tile_rows=rows, num_warps=warps)),
            )


def run_binary(
    binary: bytes, kernel: CompiledKernel, launch: Any, inputs: Sequence[Tensor], out: Tensor, wanted_times: int
) -> list[Tensor]:
    """PTX or a cubin through the driver, several times: results that change are a race."""
    loaded = load_kernel(binary, kernel.name, kernel.shared_bytes)
    results = []
    for _ in range(wanted_times):
        out.fill_(77)
        pointers = [tensor.data_ptr() for tensor in inputs]
        stream = torch.cuda.current_stream().cuda_stream
        loaded.launch(pointers, launch.integers, out.data_ptr(), launch.grid, 32 * kernel.num_warps, stream)
        torch.cuda.synchronize()
        results.append(out.cpu())
    return results


def run_launcher(tactic: Tactic, launch: Any, inputs: Sequence[Tensor], out: Tensor) -> list[Tensor]:
    """The same kernel and options through triton's launcher."""
    options = tactic.options
    kernel = getattr(importlib.import_module("hqc.kernels.jit.hadamard_quantize"), options.function)
    parameters = options.parameters(tactic.dtype)
    names = [f"{p.name}_ptr" for p in parameters if p.role == "input"] + [
        p.name for p in parameters if p.role == "int32"
    ]
    named = dict(zip(names, (*inputs, *launch.integers), strict=True)) | {f"{parameters[-1].name}_ptr": out}
    out.fill_(77)
    settings = {"num_warps": options.num_warps, "num_stages": options.num_stages, "enable_fp_fusion": False}
    kernel[launch.grid](**named, **options.constants(), **settings)
    torch.cuda.synchronize()
    return [out.cpu()]


def probe(shape: Sequence[int], block: int, layout: str, arch: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every tactic of a variant, every way to run it."""
    batch, channels, *size = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tuple(shape), generator=generator).to(dtype).cuda()
    inverse = torch.tensor([1.0, 2.5, 7.0][:batch]).cuda()
    last = x.permute(0, 2, 3, 1).contiguous()
    pixels = size[0] * size[1]
    level = levels(x.flatten(2), inverse, block)
    wanted = hadamard_quantize(last, inverse, low=-TOP, high=TOP, block=block).cpu().view(batch, pixels, channels)
    exact = level.round().clamp(-TOP, TOP).to(torch.int8)
    variant = HadamardVariant(NAMES[dtype], layout, channels, block, -TOP, TOP)
    given = [x if layout == "nchw" else last, inverse]
    rows = []
    tried: set[Tactic] = set()
    for tactic in tactics(variant, [pixels]):
        for note, kind in (("", tactic), *further(tactic)):
            if kind in tried:
                continue
            tried.add(kind)
            rows += _ways(kind, note, variant, shape, given, wanted, level, exact, x.flatten(2), inverse, arch)
    for row in rows:
        row.update(shape=list(shape), block=block, layout=layout, dtype=NAMES[dtype])
    return rows


def _ways(
    tactic: Tactic,
    note: str,
    variant: HadamardVariant,
    shape: Sequence[int],
    given: Sequence[Tensor],
    wanted: Tensor,
    level: Tensor,
    exact: Tensor,
    x: Tensor,
    inverse: Tensor,
    arch: str,
) -> list[dict[str, Any]]:
    kernel = compiled(tactic, arch)
    launch = variant.launch(tuple(shape), tactic.tile, lambda a, b: -(-a // b))
    out = torch.empty(wanted.shape, dtype=torch.int8, device="cuda")
    common = {
        "tile": list(tactic.tile),
        "num_warps": kernel.num_warps,
        "shared_bytes": kernel.shared_bytes,
        "grid": list(launch.grid),
        "integers": list(launch.integers),
        "ptx_sha256": hashlib.sha256(kernel.ptx.encode()).hexdigest()[:16],
        "variation": note,
        "F2IP": conversions(kernel.cubin),
        "reference_from_float64": int((wanted != exact).sum()),
    }
    rows = []
    ways: dict[str, Any] = {
        "ptx": lambda: run_binary(kernel.ptx.encode(), kernel, launch, given, out, REPEATS),
        "cubin": lambda: run_binary(kernel.cubin, kernel, launch, given, out, REPEATS),
        "launcher": lambda: run_launcher(tactic, launch, given, out),
    }
    for way, run in ways.items():
        try:
            results = run()
        except Exception as error:  # the other ways go on
            rows.append({**common, "way": way, "failed_because": f"{type(error).__name__}: {error}"[:300]})
            continue
        found = results[0]
        entry = {**common, "way": way, **differences(found, wanted, level)}
        entry["results_change"] = any(not torch.equal(found, other) for other in results[1:])
        if entry["differ"]:
            entry["from_float64"] = int((found != exact).sum())
            entry["explained_by"] = explanation(found, level, x, inverse, variant.block)
        rows.append(entry)
    return rows


# ---- all of it -----------------------------------------------------------------------------------------------------


def line(row: Mapping[str, Any]) -> str:
    """One result as a line."""
    what = f"{'×'.join(map(str, row['shape']))} {row['dtype']} block {row['block']} {row['layout']}"
    how = f"tile {row['tile'][0]}×{row['tile'][1]}, {row['num_warps']} warps, {row['way']}"
    how += f", {row['F2IP']} F2IP" if row["F2IP"] else ""
    if "failed_because" in row:
        return f"{what}, {how}: {row['failed_because']}"
    if not row["differ"]:
        return f"{what}, {how}: equal{', RESULTS CHANGE' if row['results_change'] else ''}"
    near = row["boundary_distance"]
    found = f"{row['differ']} of {row['of']} differ, by up to {row['largest_step']}, {row['unwritten']} unwritten"
    found += f", boundary {near['least']:.1e}…{near['largest']:.1e}, {row['from_float64']} from float64"
    found += ", RESULTS CHANGE" if row["results_change"] else ""
    return f"{what}, {how}: {found}; fault: {', '.join(row['explained_by']) or 'none of those tried'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="of a line's beginning, such as 'block 32 nchw'"
    )
    parser.add_argument("--quick", action="store_true", help="the first shape and block only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_probe_images: torch finds no CUDA device\n")
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    own = f"sm_{major}{minor}"
    from hqc.kernels.compile import ARCHITECTURES

    arch = own if own in ARCHITECTURES else "sm_80"
    cases = [
        (shape, block, layout, torch.float16)
        for block in (BLOCKS[:1] if arguments.quick else BLOCKS)
        for shape in (SHAPES[:1] if arguments.quick else SHAPES)
        if shape[1] % block == 0
        for layout in ("nchw", "nhwc")
    ]
    if not arguments.quick:
        cases += [(SHAPES[0], 32, "nchw", dtype) for dtype in (torch.bfloat16, torch.float32)]
    rows: list[dict[str, Any]] = []
    for shape, block, layout, dtype in cases:
        if arguments.only not in f"{'×'.join(map(str, shape))} {NAMES[dtype]} block {block} {layout}":
            continue
        for row in probe(shape, block, layout, arch, dtype):
            rows.append(row)
            print(line(row), flush=True)
        if arguments.json is not None:
            _write(arguments.json, rows, arch)
    wrong = [row for row in rows if row.get("differ") or row.get("results_change") or "failed_because" in row]
    print(f"{len(rows)} runs, {len(wrong)} wrong")
    return 1 if wrong else 0


def _write(path: Path, rows: Sequence[Mapping[str, Any]], arch: str) -> None:
    import triton

    about = {
        "gpu": torch.cuda.get_device_name(),
        "arch": arch,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    options = asdict(HadamardOptions())
    path.write_text(json.dumps({**about, "default_options": options, "runs": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
