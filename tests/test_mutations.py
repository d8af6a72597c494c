"""Changed artefacts with mended hashes: whatever was changed, hqc refuses it in one line or works, within bounds."""

import copy
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_storage import resign

from hqc.calibration.activations import calibrate
from hqc.errors import LONGEST_LINE, LONGEST_LIST, HqcError
from hqc.evaluation.stepping import Run, float_program
from hqc.export.onnxruntime import lower_onnxruntime
from hqc.export.portable import lower_portable
from hqc.export.prepare import prepare
from hqc.memory import activation_bytes, export_bytes, peak_resident_bytes, training_bytes
from hqc.passes import (
    AttachLora,
    DropSingleKeyAttention,
    FreezeIntegers,
    InsertHadamard,
    InsertQdq,
    MergeLora,
    RotateWeights,
    SelectLayers,
    SplitDigits,
)
from hqc.pipeline import run_pipeline
from hqc.program import Program, Stage
from hqc.runtimes.torch_runtime import TorchSession
from hqc.sampling.task import Denoise
from hqc.storage import load_program, save_program
from hqc.text import graph_text

MUTATIONS = 200
LONGEST_SECONDS = 10.0
MOST_BYTES = 2**30
GRID = (0.0, 500.0)
QUANTISE = (InsertHadamard(block=8), InsertQdq(GRID), AttachLora(rank=2))
REGULAR = (InsertHadamard(16, kind="regular", weights=True), InsertQdq(GRID), AttachLora(rank=2))
GROUPS = (InsertQdq(activation="dynamic", activation_group=8, weight_group=8),)
FORMS: dict[str, tuple[Any, ...]] = {
    "captured": (),
    "quantised": (SelectLayers(), *QUANTISE),
    "frozen": (SelectLayers(), *QUANTISE, MergeLora(), FreezeIntegers()),
    "integer": (SelectLayers(), *QUANTISE, MergeLora(), FreezeIntegers(), RotateWeights(), SplitDigits()),
    "groups": (SelectLayers(), *GROUPS),
    "frozen groups": (SelectLayers(), *GROUPS, FreezeIntegers()),
    "regular": (SelectLayers(), *REGULAR, MergeLora(), FreezeIntegers(), RotateWeights(), SplitDigits()),
}
FILES = ("graph.json", "graph.json", "graph.json", "plan.json", "manifest.json")
NUMBERS = (0, 1, -1, 2, 3, 64, 127, 128, 2**15, 2**31, 2**40, 2**62, 10**9, 10**12, -(2**63), 1.5, 1e300)
TEXTS = ("", "N", "2*N", "N//0", "9**9**9", "float16", "int64", "bool", "layer", "rotation_back", "lora", "integer")
OTHERS = (True, None, [], {}, [[]], [1, 1], [10**9] * 2, {"node": "sample"}, {"dtype": "complex64"}, {"float": "nan"})
OPERATORS = (
    *("aten.empty.memory_format", "aten.embedding.default", "aten.unbind.int", "aten.full.default"),
    *("aten.expand.default", "aten._reshape_alias.default", "aten.as_strided.default", "operator.mul"),
    *("aten.conv1d.default", "aten.index_select.default", "operator.getitem", "hqc.hadamard.default"),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place below the root of some JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


def mutated(data: Any, draw: random.Random) -> tuple[Any, str]:
    """A copy with one thing changed, and what that is."""
    data = copy.deepcopy(data)
    paths = list(places(data))
    path = draw.choice(paths)
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    old, key, kind = parent[path[-1]], path[-1], draw.random()
    if key == "target" and kind < 0.7:
        parent[key] = draw.choice(OPERATORS)
    elif kind < 0.12:
        del parent[key]
    elif kind < 0.2 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(old))
    elif kind < 0.5 and type(old) is int:
        parent[key] = old + draw.choice((-2, -1, 1, 2, old))
    else:
        parent[key] = draw.choice((*NUMBERS, *TEXTS, *OTHERS))
    return data, f"{path}: {str(old)[:60]}"


def loop_of(program: Program) -> Callable[[Denoise], None]:
    def loop(model: Denoise) -> None:
        for t in GRID:
            sample, _, *conditions = program.example_inputs(1)
            model(sample, torch.tensor([t]), *conditions)

    return loop


@torch.no_grad()
def use(program: Program) -> None:
    """What commands do with a program: read it, run it, plan, quantise, calibrate, freeze, rotate, lower."""
    graph_text(program)
    assert activation_bytes(program.graph, 1) >= 0
    assert export_bytes(program, 2) + training_bytes(program, 2) >= 0
    TorchSession(program)(*program.example_inputs(2))
    run = Run(program)
    run.finish(run.start(program.example_inputs(1)))
    for target, lower in (("onnxruntime", lower_onnxruntime), ("portable", lower_portable)):
        try:
            lower(prepare(program, target), 21)  # type: ignore[arg-type, operator]
        except HqcError as error:
            check_line(error)
    if program.stage == Stage.CAPTURED:
        program = run_pipeline(program, [DropSingleKeyAttention(), SelectLayers(), *QUANTISE])
    if program.stage == Stage.QUANTISED:
        float_program(program)
        program = calibrate(program, loop_of(program))
        program = run_pipeline(program, [MergeLora(), FreezeIntegers()])
    run_pipeline(program, [RotateWeights(), SplitDigits()])


def check_line(error: HqcError) -> None:
    """A refusal is a line of at most 300 characters, and no bug of hqc's."""
    text = error.line
    assert len(text) <= (LONGEST_LIST if error.lists else LONGEST_LINE), text
    assert "Report a bug" not in text, text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", ["two_sites", "shared_weights"])
def test_a_changed_artefact_is_refused_in_a_line_or_works(
    model: str, form: str, captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # so that the lines hold short paths
    source, work = Path("source.hqc"), Path("p.hqc")
    save_program(run_pipeline(captured(model), FORMS[form]), source)
    use(load_program(source))
    before, draw = peak_resident_bytes(), random.Random(f"{model} {form}")
    contents = {name: json.loads((source / name).read_text()) for name in FILES}
    refused = 0
    for _ in range(MUTATIONS if model == "two_sites" else MUTATIONS // 4):
        name = draw.choice(FILES)
        data, what = mutated(contents[name], draw)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work)
        (work / name).write_text(json.dumps(data))
        if name != "manifest.json":
            resign(work)
        start = time.perf_counter()
        try:
            use(load_program(work))
        except HqcError as error:
            refused += 1
            check_line(error)
        except Exception as error:
            raise AssertionError(f"{name} {what}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - start < LONGEST_SECONDS, f"{name} {what}"
        assert peak_resident_bytes() - before < MOST_BYTES, f"{name} {what}"
    assert refused > 0
