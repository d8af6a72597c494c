"""What `scripts/gpu_check.sh` runs: GPU tests, kernel rates, the UNet benchmark; written to docs/measurements/GPU.json.

    gpu_check.py --prepare FOLDER       on a machine with diffusers: outlines of LDM-4, float and quantised (megabytes)
    gpu_check.py [--models FOLDER]      on the GPU machine; without the folder it makes them, if diffusers is there

While the tests run, a process for each batch size compiles the kernels that it will need into triton's cache. Each step
has a limit of its own within eight minutes in all; one that fails or runs out of time is said in the file and by the
exit status, and the others go on.
"""

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import kernel_bench
import torch

ROOT = Path(__file__).resolve().parent.parent
MODEL = "arch:ldm4-imagenet"
BATCHES = (1, 2, 8, 32)
WHOLE_SECONDS, TEST_SECONDS, MODEL_SECONDS = 460, 180, 100
AIM_OF_COPY, AIM_SPEEDUP = 0.85, 1.8
LARGE_MEGABYTES = 8  # below this a copy's own launch is much of its time


class Clock:
    """Seconds that are left of the whole."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, limit: float | None = None) -> float:
        """Of the whole, or of a step's own limit if that is less."""
        left = max(1.0, self._end - time.monotonic())
        return left if limit is None else min(left, limit)


def prepare(folder: Path, model: str) -> None:
    """Traces and quantises a named architecture as `hqc bench` does, and writes both without their seeded weights."""
    from hqc import api
    from hqc.capture import find_source, trace
    from hqc.evaluation.bench.models import Quantisation, recipe_of
    from hqc.evaluation.bench.outline import write_outline
    from hqc.training import synthetic_task

    program = trace(find_source(model))
    write_outline(program, folder / "float", force=True)
    student = api.ptq(program, recipe_of(Quantisation()), "w4a4", hadamard=True, task=synthetic_task(program))
    write_outline(student, folder / "quantised", force=True)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder}: {model} without its weights, {size / 1e6:.1f} MB")


# ---- steps ---------------------------------------------------------------------------------------------------------


def make_models(models: Path | None, work: Path) -> dict[str, Any]:
    """float.hqc and quantised.hqc in the work folder, from outlines or from the architecture itself."""
    if models is None:
        if not _installed("diffusers"):
            raise RuntimeError("diffusers is missing; give --models FOLDER, which --prepare writes where it is there")
        models = work / "outlines"
        prepare(models, MODEL)
    from hqc.evaluation.bench.outline import read_outline
    from hqc.runtimes.cuda.forms import stored_form
    from hqc.storage import save_program

    save_program(read_outline(models / "float"), work / "float.hqc")
    save_program(stored_form(read_outline(models / "quantised")), work / "quantised.hqc")
    return {"model": MODEL}


WARM = """
import sys
from hqc.runtimes.cuda.session import CudaSession
from hqc.storage import load_program
program = load_program(sys.argv[1])
CudaSession(program)(*program.example_inputs(int(sys.argv[2])))
"""


class Warmers:
    """Processes that compile what the benchmark will run; nothing that they say counts."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """One for each batch size, if there is a model."""
        if self._model.is_dir():
            commands = [[sys.executable, "-c", WARM, str(self._model), str(batch)] for batch in BATCHES]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self._running = [subprocess.Popen(command, cwd=ROOT, **quiet) for command in commands]

    def finish(self, seconds: float) -> None:
        """Waits for them, and ends those that take longer: the timing must have the GPU to itself."""
        end = time.monotonic() + seconds
        for process in self._running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run_tests(clock: Clock) -> dict[str, Any]:
    """pytest -m gpu: kernels, sessions, captures, PTX; engines where a TensorRT is."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "-W", "default", f"--junitxml={report}"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "--no-header", "-rfEs"]
        command += ["-n", "6"] if _installed("xdist") else []  # most of the time is triton's compiler
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=clock.left(TEST_SECONDS))
        counts = dict(ElementTree.parse(report).getroot()[0].attrib) if report.is_file() else {}
    print(done.stdout[-4000:])
    if done.returncode or not counts:
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise RuntimeError("; ".join(lines[:5]) or f"pytest ended with {done.returncode}: {done.stderr[-300:]}")
    wanted = ("tests", "failures", "errors", "skipped")
    return {**{name: int(counts[name]) for name in wanted}, "tensorrt": _installed("tensorrt")}


def run_kernels() -> dict[str, Any]:
    """GB/s and TOP/s of the kernels."""
    measured = kernel_bench.measure()
    print(kernel_bench.table(measured))
    large = [row["of_copy"] for row in measured["hadamard_quantize"] if row["megabytes"] >= LARGE_MEGABYTES]
    return {**measured, "least_of_copy": min(large), "aim_of_copy": AIM_OF_COPY}


def run_unet(clock: Clock, work: Path) -> dict[str, Any]:
    """`hqc bench MODEL --runtime torch-cuda --against torch-fp16-cudagraph`, one batch size after the other."""
    if not (work / "quantised.hqc").is_dir():
        raise RuntimeError("there is no model, see models")
    model = [str(work / "quantised.hqc"), "--float", str(work / "float.hqc")]
    found: dict[str, Any] = {"model": MODEL, "batches": {}, "failed": {}, "aim_speedup": AIM_SPEEDUP}
    for batch in BATCHES:
        command = [sys.executable, "-c", "from hqc.cli import main; main()", "bench", *model]
        command += ["--runtime", "torch-cuda", "--against", "torch-fp16-cudagraph", "--batch-size", str(batch)]
        command += ["--runs", "5", "--warm-up", "1", "--json", "--work-dir", str(work / "bench")]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=clock.left(MODEL_SECONDS))
        except subprocess.TimeoutExpired as error:
            found["failed"][str(batch)] = f"out of time after {error.timeout:.0f} s"
            continue
        if done.returncode:
            found["failed"][str(batch)] = done.stderr.strip().splitlines()[-1][:500]
            continue
        said = json.loads(done.stdout)
        found["batches"][str(batch)] = {
            name: said[name] for name in ("milliseconds", "speedup", "speedup_spread", "device_bytes", "error_to_float")
        } | ({"failed": said["failed"]} if said["failed"] else {})
        print(f"batch {batch}: {_unet_line(said)}")
    if found["failed"] or not found["batches"]:
        raise Incomplete(found, "; ".join(f"batch {b}: {why}" for b, why in found["failed"].items()))
    return found


class Incomplete(RuntimeError):
    """A step of which a part was measured."""

    def __init__(self, found: dict[str, Any], why: str) -> None:
        super().__init__(why)
        self.found = found


def _unet_line(said: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {entry['median']:.3f} ms" for name, entry in said["milliseconds"].items())
    ratios = ", ".join(f"{ratio:.2f}× {name}" for name, ratio in said["speedup"].items())
    return f"{times}; {ratios}"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# ---- the whole -----------------------------------------------------------------------------------------------------


def run_steps(steps: dict[str, Callable[[], dict[str, Any]]]) -> tuple[dict[str, Any], bool]:
    """Results by step, each with its seconds, or the reason why there is none; and whether all passed."""
    results: dict[str, Any] = {}
    passed = True
    for name, step in steps.items():
        print(f"== {name}", flush=True)
        start = time.monotonic()
        try:
            result, why = step(), ""
        except Incomplete as error:
            result, why = error.found, str(error)
        except Exception as error:  # the other steps go on, whatever this one met
            result, why = {}, " ".join(f"{type(error).__name__}: {error}".split())[:1000]
        seconds = round(time.monotonic() - start, 1)
        results[name] = {**result, "seconds": seconds} | ({"failed_because": why} if why else {})
        passed = passed and not why
        print(f"== {name}: {why or 'passed'}, {seconds} s", flush=True)
    return results, passed


def describe() -> dict[str, Any]:
    """The card, the machine, the commit."""
    from hqc.evaluation.bench.machine import describe_gpu, describe_machine

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, "commit": git.stdout.strip() or None, "machine": describe_machine() | describe_gpu()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--models", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "measurements", metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.prepare is not None:
        prepare(arguments.prepare, MODEL)
        return 0
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device; nothing was run, GPU figures are not measured", file=sys.stderr)
        return 2
    clock = Clock(WHOLE_SECONDS)
    with tempfile.TemporaryDirectory(prefix="hqc-gpu-") as work:
        folder = Path(work)
        warmers = Warmers(folder / "quantised.hqc")

        def tests() -> dict[str, Any]:
            warmers.start()
            try:
                return run_tests(clock)
            finally:
                warmers.finish(clock.left(TEST_SECONDS / 2))

        results, passed = run_steps(
            {
                "models": lambda: make_models(arguments.models, folder),
                "tests": tests,
                "kernels": run_kernels,
                "unet": lambda: run_unet(clock, folder),
            }
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    target = arguments.output / f"{kernel_bench.slug(torch.cuda.get_device_name())}.json"
    target.write_text(json.dumps({**describe(), "passed": passed, **results}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
