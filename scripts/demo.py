"""`make demo`: the whole way on the bundled model, each step the command that a user would type, then one table.

trace -> ptq (RTN, RTN + Hadamard) -> qat (the recipe hqc) -> export -> sample -> eval
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from hqc.console import console
from hqc.evaluation.bench.run import Timing, median_milliseconds
from hqc.evaluation.gain import at_gain_one
from hqc.evaluation.metrics import evaluate
from hqc.evaluation.report import ReportRow, terminal_report
from hqc.evaluation.sampling import sample_images
from hqc.evaluation.trajectory_fidelity import trajectory_fidelity
from hqc.models.classifier import load_digit_classifier
from hqc.runtimes import load

ROWS = {
    "float": "digits.hqc",
    "RTN": "rtn.hqc",
    "RTN + Hadamard": "rtn-hadamard.hqc",
    "hqc, ONNX Runtime": "hqc-onnx",
    "float, ONNX Runtime": "digits-onnx",
}
"""What is measured. The export of the trained program draws what its torch form draws, and many times as fast."""
SAMPLER = {"num_inference_steps": 20, "guidance_scale": 1.5, "eta": 0.0, "batch_size": 50}
GAIN_IMAGES = 50


def hqc(*arguments: str) -> None:
    """Runs one hqc command as a user would, and shows it."""
    console.print(f"$ hqc {' '.join(arguments)}", style="bold cyan", markup=False, highlight=False)
    subprocess.run([sys.executable, "-m", "hqc.cli", *arguments], check=True)


def main() -> None:
    """Runs every step in a work folder and prints the table and the path of the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work/demo"))
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=600, help="updates of the training, half the recipe's; 0: all")
    options = parser.parse_args()
    began, work, bits = time.perf_counter(), options.work, options.bits
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    program, trained = str(work / "digits.hqc"), str(work / "hqc.hqc")
    hqc("trace", "digits", "-o", program)
    hqc("ptq", program, "--bits", bits, "-o", str(work / "rtn.hqc"))
    hqc("ptq", program, "--bits", bits, "--hadamard", "-o", str(work / "rtn-hadamard.hqc"))
    steps = ["--steps", str(options.steps)] if options.steps else []
    hqc("qat", program, "--bits", bits, *steps, "-o", trained)
    hqc("export", trained, "--target", "onnxruntime", "-o", str(work / "hqc-onnx"))
    hqc("export", program, "--target", "onnxruntime", "-o", str(work / "digits-onnx"))
    picture = work / "samples.png"
    hqc("sample", str(work / "hqc-onnx"), "--compare-with", program, "--per-class", "4", "-o", str(picture))
    console.print(f"measuring {options.images} images with each model …")
    timing = Timing(runs=30)
    milliseconds = median_milliseconds({name: work / file for name, file in ROWS.items()}, timing=timing)
    rows = measured_rows(work, options.images, milliseconds)
    Console(width=max(120, console.width)).print(terminal_report(rows))
    console.print(
        f"latency: median ms of one denoiser call at batch {timing.batch_size}, {timing.cores} threads, in turns; "
        "size: the denoiser's files on disk; rows without ONNX Runtime are torch, float or fake-quant",
        highlight=False,
    )
    console.print(f"picture: {picture.resolve()}   {(time.perf_counter() - began) / 60:.1f} minutes", highlight=False)


def measured_rows(work: Path, images: int, milliseconds: dict[str, float]) -> list[ReportRow]:
    """The protocol's images of every model: labels in turn, seeds 0, 1, …; the first model is the others' reference."""
    asked = tuple(i % 10 for i in range(images)), tuple(range(images))
    classifier, rows = load_digit_classifier(), []
    float_pipe = load(work / ROWS["float"]).pipeline()
    reference = sample_images(float_pipe, *asked, **SAMPLER)
    for name, file in ROWS.items():
        model = load(work / file)
        pipe, samples, trajectory, at_one = model.pipeline(), reference, None, None
        if name != "float":
            samples = sample_images(pipe, *asked, **SAMPLER)
            few = (values[:GAIN_IMAGES] for values in asked)
            trajectory = trajectory_fidelity(pipe, float_pipe, *few, **SAMPLER)
        if trajectory is not None and trajectory.gain.divides:
            with at_gain_one(pipe, trajectory.gain):
                at_one = sample_images(pipe, *asked, **SAMPLER)
        metrics = evaluate(samples, reference, classifier, at_gain_one=at_one)
        rows.append(ReportRow(name, metrics, model.size_bytes, milliseconds[name], trajectory))
    return rows


if __name__ == "__main__":
    main()
