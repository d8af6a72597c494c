"""Where the time of a denoiser call goes on an NVIDIA GPU: kernels by kind, and the most expensive ones.

    gpu_profile.py PROGRAM [--batch-size 1,2,8,32] [--runtime torch-cuda] [--json FILE]

Replays the CUDA graph of the runtime's session under torch's profiler; where a driver shows no kernels of a graph, the
module's own calls.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TEARDOWN_CUPTI", "0")  # a tracer that goes away and comes back misses the kernels of graphs

import torch

REPLAYS, TOP = 5, 40
DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")

KINDS: Sequence[tuple[str, str]] = (
    ("int_conv2d", r"^int_conv2d"),
    ("int_gemm", r"^int_gemm"),
    ("split sums", r"^sum_splits"),
    ("quantisers", r"quantize|quantise"),
    ("norm statistics", r"^column_statistics|^group_norm_|^group_affine|^layer_norm_"),
    ("inductor", r"^triton_"),
    ("group norm", r"[Gg]roup_?[Nn]orm|RowwiseMoments|ComputeFusedParams|ComputeInternalGradients"),
    ("layer norm", r"[Ll]ayer_?[Nn]orm"),
    ("attention", r"fmha|flash|attention|[Ss]oft_?[Mm]ax"),
    (
        "copies",
        r"copy_kernel|_copy|[Cc]opy|[Mm]emcpy|[Mm]emset|CatArray|nchwToNhwc|nhwcToNchw|nchw2nhwc|nhwc2nchw|[Tt]ranspose",
    ),
    ("fp16 convolutions", r"cudnn|conv|fprop|implicit_gemm|xmma_.*fprop"),
    ("fp16 products", r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitK"),
    ("resampling", r"upsample|interpolate|pool"),
    ("elementwise", r"elementwise|[Ss]ilu|[Gg]elu|reduce_kernel|index|gather|scatter"),
)
"""Kind -> pattern of a kernel's name; the first that is found counts."""


def kind_of(name: str) -> str:
    """The kind of a kernel.

    >>> kind_of("hadamard_quantize_rows"), kind_of("triton_poi_fused_add_3"), kind_of("sm90_xmma_gemm_f16f16")
    ('quantisers', 'inductor', 'fp16 products')
    """
    plain = re.sub(r"^void ", "", name)
    return next((kind for kind, pattern in KINDS if re.search(pattern, plain)), "other")


def summary(events: Iterable[Mapping[str, Any]], calls: int, top: int = TOP) -> dict[str, Any]:
    """Of the device events of `calls` equal calls in a chrome trace: kernels and milliseconds a call, by kind.

    busy_ms adds up the kernels; span_ms goes from the first to the last one of a call, gaps included.
    """
    found = sorted((e for e in events if e.get("ph") == "X" and e.get("cat") in DEVICE_EVENTS), key=lambda e: e["ts"])
    kinds: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    single: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for event in found:
        grid = "×".join(str(size) for size in event.get("args", {}).get("grid", ()))
        for entry in (kinds[kind_of(event["name"])], single[event["name"], grid]):
            entry[0] += 1
            entry[1] += event["dur"]
    ranked = sorted(single.items(), key=lambda item: -item[1][1])[:top]
    per_call = len(found) // calls
    whole = calls and len(found) == per_call * calls
    return {
        "kernels": len(found) / calls,
        "busy_ms": sum(event["dur"] for event in found) / calls / 1e3,
        "span_ms": _span(found, per_call, calls) if whole and per_call else None,
        "by_kind": {
            kind: {"kernels": count / calls, "ms": time / calls / 1e3}
            for kind, (count, time) in sorted(kinds.items(), key=lambda item: -item[1][1])
        },
        "top": [
            {
                "name": name[:160],
                "grid": grid,
                "kind": kind_of(name),
                "count": count / calls,
                "us": time / count,
                "ms_a_call": time / calls / 1e3,
            }
            for (name, grid), (count, time) in ranked
        ],
    }


def _span(events: Sequence[Mapping[str, Any]], per_call: int, calls: int) -> float:
    parts = [events[i * per_call : (i + 1) * per_call] for i in range(calls)]
    return statistics.median(max(e["ts"] + e["dur"] for e in part) - part[0]["ts"] for part in parts) / 1e3


def traced(call: Callable[[], Any], calls: int) -> list[dict[str, Any]]:
    """The events of a chrome trace of that many calls, one after the other."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "trace.json")
        profiler.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return events


def profile_session(session: Any, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Of a session of `hqc.runtimes.integer.cuda`, on inputs that lie on the GPU."""
    from hqc.evaluation.bench.gpu_timing import spin_up

    traced(lambda: torch.zeros(1, device="cuda"), 1)  # the tracer is there before the graph is captured
    with torch.no_grad():
        session(*inputs)
        spin_up()
        found = {"of": "replays of the CUDA graph", **summary(traced(lambda: session(*inputs), REPLAYS), REPLAYS)}
        if found["kernels"] < 10:
            session.module(*inputs)
            spin_up()
            events = traced(lambda: session.module(*inputs), REPLAYS)
            found = {"of": "the module's own calls", **summary(events, REPLAYS)}
    report = getattr(session, "report", None)
    return found | ({} if report is None else {"session": report.text().splitlines()})


SESSIONS = ("torch-cuda", "torch-fp16-cudagraph", "torch-fp16-compile")


def open_session(program: Any, runtime: str, *, weights: str = "int8") -> Any:
    """A session by the runtime's name in `hqc bench`."""
    from hqc.runtimes.integer.cuda.session import CudaSession, HalfSession

    if runtime == "torch-fp16-compile":
        from hqc.runtimes.integer.cuda.compiled import CompiledHalfSession

        return CompiledHalfSession(program)
    return CudaSession(program, weights=weights) if runtime == "torch-cuda" else HalfSession(program)


def profile_program(
    program: Any,
    batches: Sequence[int],
    *,
    runtime: str = "torch-cuda",
    weights: str = "int8",
    on_batch: Callable[[int, dict[str, Any]], None] = lambda batch, found: None,
) -> dict[str, Any]:
    """The profile of each batch size; `on_batch` hears of each the moment it is there."""
    session, profiles = open_session(program, runtime, weights=weights), dict[str, Any]()
    for batch in batches:
        inputs = [tensor.cuda() for tensor in program.example_inputs(batch)]
        profiles[str(batch)] = profile_session(session, inputs)
        on_batch(batch, profiles[str(batch)])
    return profiles


def table(batch: int | str, found: Mapping[str, Any]) -> str:
    """One batch size as Markdown."""
    span = "" if found["span_ms"] is None else f", {found['span_ms']:.3f} ms from the first to the last"
    lines = [f"batch {batch}: {found['kernels']:.0f} kernels a call, {found['busy_ms']:.3f} ms of kernels{span}", ""]
    lines += ["| kind | kernels | ms |", "|---|---|---|"]
    lines += [f"| {kind} | {row['kernels']:.0f} | {row['ms']:.3f} |" for kind, row in found["by_kind"].items()]
    lines += ["", "| kernel | grid | a call | us | ms a call |", "|---|---|---|---|---|"]
    for row in found["top"]:
        name = row["name"].replace("|", "/")[:80]
        lines.append(f"| {name} | {row['grid']} | {row['count']:.0f} | {row['us']:.1f} | {row['ms_a_call']:.3f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, metavar="PROGRAM")
    parser.add_argument("--batch-size", default="8", metavar="SIZES")
    parser.add_argument(
        "--runtime", choices=SESSIONS, default="torch-cuda", help="float PROGRAMs need a torch-fp16 one"
    )
    parser.add_argument("--weights", choices=("int8", "int4"), default="int8")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_profile: torch finds no CUDA device\n")
    from hqc.storage import load_program

    profiles: dict[str, Any] = {}

    def show(batch: int, found: dict[str, Any]) -> None:
        profiles[str(batch)] = found
        print(table(batch, found), end="\n\n", flush=True)
        if arguments.json is not None:
            said = {"gpu": torch.cuda.get_device_name(), "runtime": arguments.runtime, "batches": profiles}
            arguments.json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")

    batches = [int(size) for size in arguments.batch_size.split(",")]
    program = load_program(arguments.program)
    profile_program(program, batches, runtime=arguments.runtime, weights=arguments.weights, on_batch=show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
