"""`bench`: the whole benchmark, from what the user names to the figures."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hqc.errors import ArtefactError, EvaluationError, HqcError
from hqc.evaluation.bench.contender import Contender, Loaded
from hqc.evaluation.bench.machine import describe_gpu, describe_machine
from hqc.evaluation.bench.models import Models, Quantisation, find_models, inputs_of
from hqc.evaluation.bench.peers import COMPILING, HQC, ON_GPU, PEERS, Built, compared, size_bytes
from hqc.evaluation.bench.result import BenchResult, Figures, spread
from hqc.evaluation.bench.rounds import PAUSE_SECONDS, Rounds, take_turns
from hqc.evaluation.workspace import Workspace
from hqc.export.model import MODEL_FILE
from hqc.machine import available_cores
from hqc.plan import QuantPlan
from hqc.program import InputSpec

__all__ = ["Timing", "bench", "first_timestep", "median_milliseconds", "write_inputs"]


@dataclass(frozen=True)
class Timing:
    """How calls are timed. threads: of one call; None takes every core that this process may use."""

    batch_size: int = 2
    threads: int | None = None
    runs: int = 10
    warm_up: int = 3
    seed: int = 0

    @property
    def cores(self) -> int:
        """The threads of one call."""
        return self.threads or available_cores()


def bench(
    model: str,
    against: Sequence[str],
    space: Workspace,
    *,
    float_model: str | None = None,
    quantisation: Quantisation | None = None,
    timing: Timing | None = None,
    runtime: str = "onnxruntime",
    on_round: Callable[[int], None] = lambda done: None,
) -> BenchResult:
    """Times `model` against the named peers; see the package's first lines and `models` for what it may be.

    runtime: what runs the quantised model: onnxruntime, torch-int8, or torch-cuda.

    Raises:
        HqcError: the model cannot be made or run, or what a peer needs is not installed. A peer that fails
            otherwise is listed in the result instead.
    """
    quantisation, timing = quantisation or Quantisation(), timing or Timing()
    _require_machine(runtime)
    for name in against:
        PEERS[name].require()
    models = find_models(model, float_model, quantisation, space, runtime)
    built, failed = _build_peers(against, models, quantisation, space)
    with tempfile.TemporaryDirectory(dir=space.folder) as scratch:
        inputs = Path(scratch) / "inputs.npz"
        write_inputs(models.inputs, timing, first_timestep(models.export), inputs)
        contenders = {HQC: compared(models.export, runtime), **built}
        figures, dropped = _measure(contenders, models.float_program, inputs, timing, space, on_round)
    return BenchResult(
        model=model,
        quantisation=f"{models.bits} {models.recipe}".strip(),
        protocol={
            **asdict(timing),
            "threads": timing.cores,
            "pause_seconds": PAUSE_SECONDS,
            "calibration": _calibration(models, quantisation),
            "runtime": runtime,
        },
        machine=describe_machine() | (describe_gpu() if runtime in ON_GPU else {}),
        stages=tuple(space.done),
        ours=figures.pop(HQC),
        peers=dict(sorted(figures.items(), key=lambda item: spread(item[1].milliseconds).median)),
        failed={**failed, **dropped},
    )


def median_milliseconds(artefacts: Mapping[str, Path], *, timing: Timing) -> dict[str, float]:
    """Median milliseconds of one call of Programs (torch) and exports (onnxruntime), in turns on the same inputs.

    All samples of a call are at the first calibrated timestep: exports may take one timestep a call.

    Raises:
        HqcError: if one of them cannot be loaded or run.
    """
    inputs = inputs_of(next(iter(artefacts.values())))
    built = {
        name: compared(path) if (path / MODEL_FILE).exists() else Built("torch", path)
        for name, path in artefacts.items()
    }
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as processes:
        first = max((t for path in artefacts.values() if (t := first_timestep(path)) is not None), default=None)
        write_inputs(inputs, timing, first, Path(scratch) / "inputs.npz")
        runners = {n: processes.enter_context(Contender(n, b.runtime, b.model)) for n, b in built.items()}
        for runner in runners.values():
            runner.load(Path(scratch) / "inputs.npz", timing.cores)
        rounds = take_turns(runners, runs=timing.runs, warm_up=timing.warm_up)
    for name, reason in rounds.failed.items():
        raise EvaluationError(name, reason, "Export it again.")
    return {name: spread(times).median for name, times in rounds.milliseconds.items()}


_OURS = {
    "onnxruntime": "the export in ONNX Runtime",
    "torch-int8": "integer products by oneDNN in PyTorch",
    "torch-cuda": "int8 kernels on a GPU, float16 around them",
}


def _require_machine(runtime: str) -> None:
    """Before long work: whether this machine runs the kernels at all."""
    if runtime == "torch-int8":
        from hqc.runtimes.integer.cpu.operators import require_operators

        require_operators()
    elif runtime in ON_GPU:
        from hqc.runtimes.integer.cuda.session import require_gpu

        require_gpu()


def _calibration(models: Models, quantisation: Quantisation) -> str:
    if not models.calibrated_on:
        return "as the model was quantised"
    images = "1 image" if quantisation.calib_size == 1 else f"{quantisation.calib_size} images"
    return f"{images}, {quantisation.n_steps} timesteps, {models.calibrated_on}"


def _build_peers(
    against: Sequence[str], models: Models, quantisation: Quantisation, space: Workspace
) -> tuple[dict[str, Built], dict[str, str]]:
    built: dict[str, Built] = {}
    failed: dict[str, str] = {}
    for name in against:
        try:
            built[name] = PEERS[name].build(models, quantisation, space)
        except HqcError as error:
            failed[name] = error.found
        except Exception as error:  # a peer's tool may raise anything: its row says so, the others go on
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return built, failed


def write_inputs(specs: Sequence[InputSpec], timing: Timing, first_timestep: float | None, file: Path) -> None:
    """Fixed random inputs: normal noise at the sampler's first timestep, the one at which noise is what it sees.

    At a later one noise is no input that the activation scales were calibrated for, and the error would say so.
    """
    generator = torch.Generator().manual_seed(timing.seed)
    arrays = {spec.name: spec.example(timing.batch_size, generator).numpy() for spec in specs}
    if first_timestep is not None and "timestep" in arrays:
        arrays["timestep"][:] = first_timestep
    np.savez(file, **arrays)  # type: ignore[arg-type]


def first_timestep(export: Path) -> float | None:
    """The largest calibrated timestep of an export's plan; None for a float one."""
    try:
        plan = QuantPlan.from_dict(json.loads((export / "plan.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ArtefactError(str(export), f"has no readable plan.json ({error})", "Export it again.") from error
    return max(plan.timesteps, default=None)


# ---- measuring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ready:
    """A loaded contender that gave a finite output."""

    contender: Contender
    loaded: Loaded
    error: float


def _measure(
    built: Mapping[str, Built],
    float_program: Path,
    inputs: Path,
    timing: Timing,
    space: Workspace,
    on_round: Callable[[int], None],
) -> tuple[dict[str, Figures], dict[str, str]]:
    """Figures of those that ran to the end, the reasons of the others. Ours must be among the first.

    Raises:
        EvaluationError: if it is not.
    """
    ready: dict[str, _Ready] = {}
    with ExitStack() as processes:
        contenders = {
            name: processes.enter_context(Contender(name, made.runtime, made.model)) for name, made in built.items()
        }
        on_gpu = all(made.runtime in ON_GPU for made in built.values())
        load = _load_together if on_gpu else _load_in_turn
        loaded, reference, failed = load(contenders, float_program, inputs, timing, space)
        for name in loaded:
            try:
                # First calls may compile and capture, up to a minute or two: that is a line of its own.
                with space.stage(f"first calls of {name}") if built[name].runtime in COMPILING else nullcontext():
                    first = contenders[name].prepare()
                error = _error(contenders[name], reference, inputs.with_name("output.npy"))
                whole = replace(loaded[name], load_seconds=loaded[name].load_seconds + first)
                ready[name] = _Ready(contenders[name], whole, error)
            except HqcError as error:
                contenders[name].close()
                failed[name] = error.found
        _require_ours(failed)
        runners = {name: item.contender for name, item in ready.items()}
        with space.stage("timing"):
            rounds = take_turns(runners, runs=timing.runs, warm_up=timing.warm_up, on_round=on_round)
        _require_ours(rounds.failed)
        figures = {name: _figures(name, built[name], ready[name], rounds) for name in rounds.milliseconds}
    return figures, {**failed, **rounds.failed}


_LoadedAll = tuple[dict[str, Loaded], NDArray[np.float32], dict[str, str]]


def _load_in_turn(
    contenders: Mapping[str, Contender], float_program: Path, inputs: Path, timing: Timing, space: Workspace
) -> _LoadedAll:
    """Those that loaded, the float program's output, and why the others did not."""
    with space.stage("float reference"):
        reference = _reference(float_program, inputs, timing)
    loaded: dict[str, Loaded] = {}
    failed: dict[str, str] = {}
    for name, contender in contenders.items():
        _note(name, contender, partial(contender.load, inputs, timing.cores), loaded, failed)
    return loaded, reference, failed


def _load_together(
    contenders: Mapping[str, Contender], float_program: Path, inputs: Path, timing: Timing, space: Workspace
) -> _LoadedAll:
    """The same at once: on a GPU nothing of it is timed, and the float program runs on the CPU."""
    loaded: dict[str, Loaded] = {}
    failed: dict[str, str] = {}
    with space.stage("loading, float reference"), ThreadPoolExecutor(len(contenders) + 1) as pool:
        reference = pool.submit(_reference, float_program, inputs, timing)
        loads = {name: pool.submit(contender.load, inputs, timing.cores) for name, contender in contenders.items()}
        for name, load in loads.items():
            _note(name, contenders[name], load.result, loaded, failed)
        return loaded, reference.result(), failed


def _note(
    name: str, contender: Contender, load: Callable[[], Loaded], loaded: dict[str, Loaded], failed: dict[str, str]
) -> None:
    try:
        loaded[name] = load()
    except HqcError as error:
        contender.close()
        failed[name] = error.found


def _reference(float_program: Path, inputs: Path, timing: Timing) -> NDArray[np.float32]:
    """The float program's output."""
    file = inputs.with_name("reference.npy")
    with Contender("float reference", "torch", float_program) as float_run:
        float_run.load(inputs, timing.cores)
        float_run.save_output(file)
    output: NDArray[np.float32] = np.load(file)
    return output


def _require_ours(failed: Mapping[str, str]) -> None:
    if HQC in failed:
        raise EvaluationError("the export", failed[HQC], "Export it again.")


def _figures(name: str, built: Built, ready: _Ready, rounds: Rounds) -> Figures:
    memory = ready.contender.memory()
    return Figures(
        what=_OURS[built.runtime] if name == HQC else PEERS[name].what,
        runtime=built.runtime,
        milliseconds=rounds.milliseconds[name],
        size_bytes=size_bytes(built),
        loaded=ready.loaded,
        resident_bytes=memory.resident_bytes,
        peak_resident_bytes=memory.peak_resident_bytes,
        error_to_float=ready.error,
        notes=built.notes + ready.loaded.notes,
        device_bytes=memory.device_bytes,
    )


def _error(contender: Contender, reference: NDArray[np.float32], file: Path) -> float:
    """‖y - r‖ / ‖r‖ of one run's output against the float program's, in float64.

    Raises:
        EvaluationError: if the output is of another shape or not finite.
    """
    contender.save_output(file)
    output, wanted = np.load(file).astype(np.float64), reference.astype(np.float64)
    if output.shape != wanted.shape:
        raise EvaluationError(
            contender.name, f"its output is {list(output.shape)}; expected {list(wanted.shape)}", "Export it again."
        )
    if not np.isfinite(output).all():
        raise EvaluationError(contender.name, "its output holds NaN or infinity", "Check the model.")
    return float(np.linalg.norm(output - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
