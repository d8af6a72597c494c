"""`make figures`: measures what the README shows about `digits`; a cell that is there is not measured again.

For each bit width: RTN, RTN + Hadamard, the same QAT without Hadamard, HQ-DM. Every cell is exported to ONNX Runtime's
integer form and 1 000 images of it are compared with the float model's, three times: run k uses image seeds
1000·k … 1000·k + 999. Training has one seed, `--train-seed`.
"""

import argparse
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hqc.console import console
from hqc.evaluation.metrics import Metrics, evaluate
from hqc.evaluation.sampling import Samples, sample_images
from hqc.models.classifier import load_digit_classifier
from hqc.runtimes import load

METHODS = {
    "RTN": ("ptq",),
    "RTN + Hadamard": ("ptq", "--hadamard"),
    "QAT without Hadamard": ("qat", "--no-hadamard"),
    "HQ-DM": ("qat",),
}
SAMPLER = {"num_inference_steps": 20, "guidance_scale": 1.5, "eta": 0.0, "batch_size": 100}


def hqc(*arguments: str) -> None:
    """Runs one hqc command."""
    console.print(f"$ hqc {' '.join(arguments)}", style="cyan", markup=False, highlight=False)
    subprocess.run([sys.executable, "-m", "hqc.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def images_of(path: Path | str, seeds: Sequence[int]) -> Samples:
    """One image a seed, labels in turn."""
    pipe = load(path, threads=torch.get_num_threads()).pipeline()
    return sample_images(pipe, tuple(i % 10 for i in range(len(seeds))), seeds, **SAMPLER)


def figures(metrics: Metrics) -> dict[str, float]:
    """The figures of one cell and run."""
    return {
        "inception_score": metrics.inception_score,
        "fid_to_float": metrics.fid_reference,
        "psnr_db": None if math.isinf(metrics.fidelity.psnr_db) else metrics.fidelity.psnr_db,
        "ssim": metrics.fidelity.ssim,
        "latent_cosine": metrics.fidelity.latent_cosine,
        "accuracy": metrics.accuracy,
    }


def measure(work: Path, method: str, bits: str, train_seed: int, reference: Samples) -> dict[str, Any]:
    """Makes, exports and measures one cell; returns its figures, size and training seconds."""
    name = f"{bits}-{method.lower().replace(' + ', '-').replace(' ', '-')}"
    program, export = work / f"{name}.hqc", work / f"{name}-onnx"
    started = time.perf_counter()
    if not program.exists():
        seed = ("--seed", str(train_seed)) if METHODS[method][0] == "qat" else ()
        command, *flags = METHODS[method]
        hqc(command, str(work / "digits.hqc"), "--bits", bits, *flags, *seed, "-o", str(program))
    seconds = time.perf_counter() - started
    if not export.exists():
        hqc("export", str(program), "--target", "onnxruntime", "-o", str(export))
    samples = images_of(export, reference.seeds)
    metrics = evaluate(samples, reference, load_digit_classifier())
    return {**figures(metrics), "size_bytes": load(export).size_bytes, "seconds": seconds}


def spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    """Mean ± standard deviation over the runs."""
    scaled = [scale * v for v in values]
    deviation = statistics.stdev(scaled) if len(scaled) > 1 else 0.0
    return f"{statistics.mean(scaled):.{digits}f} ± {deviation:.{digits}f}"


def markdown(results: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| bits | method | IS | PSNR to float, dB | SSIM | accuracy, % | FID to float |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for cell in results["cells"].values():
        groups.setdefault((cell["bits"], cell["method"]), []).append(cell["figures"])
    for (bits, method), runs in groups.items():
        columns = {key: [run[key] for run in runs] for key in runs[0] if runs[0][key] is not None}
        exact = method == "float"
        lines.append(
            f"| {bits} | {method} | {spread(columns['inception_score'], 2)} | "
            f"{'∞' if exact else spread(columns['psnr_db'], 2)} | {spread(columns['ssim'], 3)} | "
            f"{spread(columns['accuracy'], 1, 100)} | {spread(columns['fid_to_float'], 2)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures every cell that is missing, then writes the JSON and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work/figures"))
    parser.add_argument("--output", type=Path, default=Path("docs/measurements/digits.json"))
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w4a3"])
    parser.add_argument("--runs", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-seed", type=int, default=3407)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(options.work, ignore_errors=True)
        options.output.unlink(missing_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.output.read_text()) if options.output.exists() else {"cells": {}}
    results["protocol"] = {
        **SAMPLER,
        "sampler": "DDIM",
        "images": options.images,
        "train_seed": options.train_seed,
        "threads": torch.get_num_threads(),
    }
    results["machine"] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    if not (options.work / "digits.hqc").exists():
        hqc("trace", "digits", "-o", str(options.work / "digits.hqc"))
    for run in options.runs:
        reference = None
        for bits, method in [("fp32", "float"), *((b, m) for b in options.bits for m in METHODS)]:
            key = f"{bits}/{method}/{run}"
            if key in results["cells"]:
                continue
            seeds = range(1000 * run, 1000 * run + options.images)
            reference = reference or images_of(options.work / "digits.hqc", tuple(seeds))
            if method == "float":
                cell = figures(evaluate(reference, reference, load_digit_classifier()))
            else:
                cell = measure(options.work, method, bits, options.train_seed, reference)
            results["cells"][key] = {"bits": bits, "method": method, "run": run, "figures": cell}
            options.output.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
            console.print(key, cell, highlight=False)
    console.print(markdown(results), markup=False, highlight=False)


if __name__ == "__main__":
    main()
