"""What `scripts/gpu_check.sh` runs: the UNet benchmark, kernel rates, GPU tests; written to docs/measurements/GPU.json.

    gpu_check.py --prepare FOLDER       on a machine with diffusers: outlines of LDM-4, float and quantised (megabytes)
    gpu_check.py [--models FOLDER]      on the GPU machine; without the folder it makes them, if diffusers is there

Steps, the most valuable figures first:

    models     LDM-4 as a float and as a packed W4A4 program
    unet       gpu_contest.py: against both half-precision peers at batches 8, 2, 32 and 1, compiled side by side
    profile    kernels of a call by kind
    kernels    kernel_bench.py
    tune       with --tune: `hqc tune`, the table of measured tiles
    tests      pytest -m gpu

Within six minutes. Every figure is in the file the moment it is there; a step that fails or runs out of time is said
there and by the exit status, and the others go on. --only STEPS keeps what the file holds of the others.
"""

import argparse
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gpu_contest
import kernel_bench
import torch

ROOT = Path(__file__).resolve().parent.parent
MODEL = "arch:ldm4-imagenet"
BATCHES, PROFILED, RUNTIME = (8, 2, 32, 1), (8, 2), "torch-cuda"
STEPS = ("models", "unet", "profile", "kernels", "tune", "tests")
WHOLE_SECONDS, COMPILE_SECONDS, PROFILE_SECONDS, KERNEL_SECONDS = 355, 150, 45, 80
TUNE_RESERVE = 30
"""Seconds for what a tuning does besides its measurements."""
AIM_OF_COPY, AIM_SPEEDUP = 0.85, 1.8
LARGE_MEGABYTES = 8  # below this a copy's own launch is much of its time

Put = Callable[..., None]
Step = Callable[[Put], None]


class Clock:
    """Seconds that are left of the whole."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, limit: float | None = None) -> float:
        """Of the whole, or of a step's own limit if that is less."""
        left = max(1.0, self._end - time.monotonic())
        return left if limit is None else min(left, limit)


class Report:
    """The output file: whole after every figure. steps: those that are measured anew; others are kept."""

    def __init__(self, path: Path, steps: Sequence[str]) -> None:
        self._path, self._data = path, dict[str, Any]()
        if set(steps) < set(STEPS):
            self._data = _read_json(path)
        for name in (*steps, "passed"):
            self._data.pop(name, None)

    def put(self, step: str, /, **values: Any) -> None:
        """Adds to a step's figures; a mapping that is there already takes the new entries in."""
        entry = self._data.setdefault(step, {})
        for name, value in values.items():
            if isinstance(value, dict) and isinstance(entry.get(name), dict):
                entry[name] = {**entry[name], **value}
            else:
                entry[name] = value
        self._write()

    def about(self, **facts: Any) -> None:
        """Adds at the top."""
        self._data = {**facts, **{name: value for name, value in self._data.items() if name not in facts}}
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps(self._data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def prepare(folder: Path, model: str) -> None:
    """Traces and quantises a named architecture as `hqc bench` does, and writes both without their seeded weights."""
    from hqc import api
    from hqc.capture import find_source, trace
    from hqc.evaluation.bench.models import Quantisation, recipe_of
    from hqc.evaluation.bench.outline import write_outline
    from hqc.sampling import synthetic_task

    program = trace(find_source(model))
    write_outline(program, folder / "float", force=True)
    student = api.ptq(program, recipe_of(Quantisation()), "w4a4", hadamard=True, task=synthetic_task(program))
    write_outline(student, folder / "quantised", force=True)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder}: {model} without its weights, {size / 1e6:.1f} MB")


# ---- processes -----------------------------------------------------------------------------------------------------


@contextmanager
def _ended(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose words go to a file, and that does not outlive the block."""
    with log.open("wb") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=dict(environment))
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no message"


# ---- steps ---------------------------------------------------------------------------------------------------------


def make_models(put: Put, models: Path | None, work: Path) -> None:
    """float.hqc and quantised.hqc in the work folder, from outlines or from the architecture itself."""
    put(model=MODEL)
    if all((work / name / "manifest.json").is_file() for name in ("float.hqc", "quantised.hqc")):
        put(kept=True)
        return
    if models is None:
        if not _installed("diffusers"):
            raise RuntimeError("diffusers is missing; give --models FOLDER, which --prepare writes where it is there")
        models = work / "outlines"
        prepare(models, MODEL)
    from hqc.evaluation.bench.outline import read_outline
    from hqc.runtimes.integer.forms import stored_form
    from hqc.storage import save_program

    save_program(read_outline(models / "float"), work / "float.hqc", force=True)
    save_program(stored_form(read_outline(models / "quantised")), work / "quantised.hqc", force=True)


def run_unet(put: Put, clock: Clock, work: Path) -> None:
    """The quantised program against both half-precision peers, see gpu_contest.py."""
    _need_models(work)
    put(model=MODEL, aim_speedup=AIM_SPEEDUP, batches={}, failed={})
    warm = [sys.executable, str(ROOT / "scripts" / "kernel_warm.py"), str(work / "quantised.hqc"), "--kernel-bench"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // len(BATCHES)))
    contest = gpu_contest.Contest(
        work / "quantised.hqc",
        work / "float.hqc",
        BATCHES,
        [*warm, "--batch-size", ",".join(map(str, BATCHES))],
        {**_environment(work), "TORCHINDUCTOR_COMPILE_THREADS": threads},
    )

    def tell(**values: Any) -> None:
        put(**values)
        for batch, found in values.get("batches", {}).items():
            print(f"batch {batch}: {_unet_line(found)}", flush=True)

    failed = gpu_contest.run(contest, tell, work, clock.left(COMPILE_SECONDS))
    if failed:
        put(failed=failed)
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in failed.items()))


def _unet_line(said: Mapping[str, Any]) -> str:
    times = ", ".join(f"{name} {entry['median']:.3f} ms" for name, entry in said["milliseconds"].items())
    ratios = ", ".join(f"{ratio:.2f}× {name}" for name, ratio in said["speedup"].items())
    return f"{times}; {ratios}"


def run_profiles(put: Put, clock: Clock, work: Path) -> None:
    """gpu_profile.py of the quantised program; what was profiled before the end counts."""
    _need_models(work)
    file, log = work / "profile.json", work / "profile.log"
    command = [sys.executable, str(ROOT / "scripts" / "gpu_profile.py"), str(work / "quantised.hqc")]
    command += ["--json", str(file), "--runtime", RUNTIME, "--batch-size", ",".join(map(str, PROFILED))]
    with _ended(command, log, _environment(work)) as process:
        try:
            code = process.wait(clock.left(PROFILE_SECONDS))
        except subprocess.TimeoutExpired:
            code = -1
    if found := _read_json(file).get("batches"):
        put(**{RUNTIME: found})
        print("\n".join(_profile_line(batch, one) for batch, one in found.items()), flush=True)
    if code:
        raise RuntimeError(f"{RUNTIME}: {'out of time' if code == -1 else _last_line(log)}")


def _profile_line(batch: str, found: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{kind} {row['ms']:.2f}" for kind, row in found["by_kind"].items())
    return f"{RUNTIME}, batch {batch}: {found['kernels']:.0f} kernels, {found['busy_ms']:.2f} ms ({kinds})"


def run_kernels(put: Put, clock: Clock) -> None:
    """kernel_bench.py, each row into the file at once."""
    mine, rows = Clock(clock.left(KERNEL_SECONDS)), dict[str, list[dict[str, Any]]]()

    def keep(kind: str, row: dict[str, Any]) -> None:
        rows.setdefault(kind, []).append(row)
        put(rows=rows)
        if mine.left() <= 1:
            raise TimeoutError("out of time")

    try:
        kernel_bench.measure(on_row=keep)
    finally:
        print(kernel_bench.table(rows), flush=True)
        large = [share for row in rows.get("hadamard_quantize", ()) if (share := _of_copy(row)) is not None]
        put(least_of_copy=min(large, default=None), aim_of_copy=AIM_OF_COPY)


def _of_copy(row: Mapping[str, Any]) -> float | None:
    """The share of a copy's speed that the slowest of hqc's ways reaches; None for a small tensor."""
    batch, channels, *sides = row["shape"]
    numel = batch * channels * sides[0] * sides[1]
    times = {name: found["us"] for name, found in row["contenders"].items()}
    ours = [took for name, took in times.items() if name.startswith("hqc")]
    if 2 * numel / 1e6 < LARGE_MEGABYTES or "copy" not in times or not ours:
        return None
    return float(times["copy"] / max(ours))


def run_tune(put: Put, clock: Clock, work: Path, output: Path) -> None:
    """`hqc tune`: measured tiles of the model's products, as a file beside the report; it keeps what it has."""
    _need_models(work)
    limit = clock.left()
    command = [sys.executable, "-c", "from hqc.cli import main; main()", "tune", str(work / "quantised.hqc")]
    command += ["--batch-size", ",".join(map(str, sorted(BATCHES))), "--output", str(output)]
    command += ["--limit-seconds", str(max(1, round(limit - TUNE_RESERVE))), "--json"]
    log = work / "tune.log"
    with _ended(command, log, _environment(work)) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"out of time after {limit:.0f} s; {output.name} has what was measured") from error
    if code:
        raise RuntimeError(_last_line(log))
    text = log.read_text(encoding="utf-8", errors="replace")
    said = json.loads(text[text.index("{") :])
    put(file=output.name, **{name: said[name] for name in ("measured", "kept", "left", "us_before", "us_after")})
    put(problems=said["problems"][:20])


def run_tests(put: Put, clock: Clock, work: Path) -> None:
    """pytest -m gpu: kernels, sessions, captures, PTX; engines where a TensorRT is."""
    report, log = work / "report.xml", work / "tests.log"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "-W", "default", f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "--no-header", "-rfEs"]
    processes = str(max(1, len(os.sched_getaffinity(0)) - 4))
    command += ["-n", processes] if _installed("xdist") else []  # most of the time is triton's compiler
    put(tensorrt=_installed("tensorrt"))
    late = False
    with _ended(command, log, _environment(work)) as process:
        try:
            process.wait(clock.left())
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGINT)  # pytest writes what it has
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
    text = log.read_text(encoding="utf-8", errors="replace")
    print(text[-4000:], flush=True)
    counts = dict(ElementTree.parse(report).getroot()[0].attrib) if report.is_file() else {}
    lines = [line[:300] for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    put(**{name: int(counts[name]) for name in ("tests", "failures", "errors", "skipped") if name in counts})
    put(failing=lines[:20])
    if late:
        raise TimeoutError(f"out of time; {'; '.join(lines[:5]) or 'nothing failed so far'}")
    if process.returncode or not counts:
        raise RuntimeError("; ".join(lines[:5]) or f"pytest ended with {process.returncode}: {_last_line(log)}")


def _need_models(work: Path) -> None:
    if not (work / "quantised.hqc").is_dir():
        raise RuntimeError("there is no model, see models")


def _environment(work: Path) -> dict[str, str]:
    """torch's compiled code is kept in one place for all processes."""
    return {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# ---- the whole -----------------------------------------------------------------------------------------------------


def run_steps(steps: Mapping[str, Step], report: Report, **marks: Any) -> bool:
    """Each step's figures, seconds and, if it failed, the reason into the report; whether all passed.

    marks: said of every step.
    """
    passed = True
    for name, step in steps.items():
        print(f"== {name}", flush=True)
        start, why = time.monotonic(), ""
        report.put(name, **marks)
        try:
            step(lambda _step=name, **values: report.put(_step, **values))
        except Exception as error:  # the other steps go on, whatever this one met
            why = " ".join(f"{type(error).__name__}: {error}".split())[:1000]
        seconds = round(time.monotonic() - start, 1)
        report.put(name, seconds=seconds, **({"failed_because": why} if why else {}))
        passed = passed and not why
        print(f"== {name}: {why or 'passed'}, {seconds} s", flush=True)
    return passed


def describe() -> dict[str, Any]:
    """The card, the machine, the commit; null for what cannot be found out."""
    from hqc.evaluation.bench import machine

    def commit() -> str | None:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        return git.stdout.strip() or None

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _or_none(commit),
        "machine": (_or_none(machine.describe_machine) or {}) | (_or_none(machine.describe_gpu) or {}),
    }


def _or_none(find: Callable[[], Any]) -> Any:
    try:
        return find()
    except Exception as error:  # a fact of the machine is worth less than the figures
        print(f"gpu_check: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def _steps(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in STEPS]:
        raise argparse.ArgumentTypeError(f"there is no step {unknown[0]!r}; there are {', '.join(STEPS)}")
    return tuple(name for name in STEPS if name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--models", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "measurements", metavar="FOLDER")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep programs and compiled code there")
    parser.add_argument("--only", type=_steps, metavar="STEPS", help="comma-separated; models is needed by most")
    parser.add_argument("--tune", action="store_true", help="run the step tune too")
    parser.add_argument("--seconds", type=float, default=WHOLE_SECONDS, metavar="N", help="for all steps together")
    arguments = parser.parse_args()
    if arguments.prepare is not None:
        prepare(arguments.prepare, MODEL)
        return 0
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device; nothing was run, GPU figures are not measured", file=sys.stderr)
        return 2
    clock = Clock(arguments.seconds)
    chosen = arguments.only or tuple(name for name in STEPS if name != "tune")
    chosen = tuple(name for name in STEPS if name in chosen or (name == "tune" and arguments.tune))
    card = kernel_bench.slug(str(_or_none(torch.cuda.get_device_name) or "gpu"))
    output = arguments.output.resolve()
    target = output / f"{card}.json"
    report = Report(target, chosen)
    facts = describe()
    report.about(**facts)
    with tempfile.TemporaryDirectory(prefix="hqc-gpu-") as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        every: dict[str, Step] = {
            "models": lambda put: make_models(put, arguments.models, work),
            "unet": lambda put: run_unet(put, clock, work),
            "profile": lambda put: run_profiles(put, clock, work),
            "kernels": lambda put: run_kernels(put, clock),
            "tune": lambda put: run_tune(put, clock, work, output / f"{card}-tiles.json"),
            "tests": lambda put: run_tests(put, clock, work),
        }
        passed = run_steps({name: every[name] for name in chosen}, report, commit=facts["commit"])
    report.about(passed=passed)
    print(f"wrote {target}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
