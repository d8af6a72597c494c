"""Calls that do not fit their operators, shapes that do not fit their values: refused when loaded, and at trace."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_storage import nodes_of, resign, write_nodes
from torch import Tensor, nn

import hqc.memory
from hqc.capture import capture_module
from hqc.checking import check_calls, size_of
from hqc.errors import ArtefactError, CaptureError, MemoryShortError
from hqc.passes import FreezeIntegers, InsertHadamard, InsertQdq, RotateWeights, SelectLayers, SplitDigits
from hqc.pipeline import run_pipeline
from hqc.program import InputSpec, Program
from hqc.storage import load_program, save_program


@pytest.fixture
def artefact(captured: Callable[[str], Program], tmp_path: Path) -> Path:
    save_program(captured("two_sites"), tmp_path / "p.hqc")
    return tmp_path / "p.hqc"


@pytest.fixture
def integer_artefact(captured: Callable[[str], Program], tmp_path: Path) -> Path:
    chain = [SelectLayers(), InsertHadamard(block=8), InsertQdq((0.0, 9.0)), FreezeIntegers(), RotateWeights()]
    save_program(run_pipeline(captured("two_sites"), [*chain, SplitDigits()]), tmp_path / "i.hqc")
    return tmp_path / "i.hqc"


def call(name: str, target: str, *args: Any, shape: Any = None, dtype: str = "float32", **kwargs: Any) -> Any:
    meta = {} if shape is None else {"shape": shape, "dtype": dtype}
    return {"name": name, "op": "call_function", "target": target, "args": args, "kwargs": kwargs, "meta": meta}


def insert(artefact: Path, *calls: Any) -> None:
    """Puts calls in front of a graph's output."""
    nodes = nodes_of(artefact)
    nodes[-1:-1] = calls
    write_nodes(artefact, nodes)


X = {"node": "sample"}
SHAPE = ["N", 32, 4, 4]
CALLS: dict[str, tuple[tuple[Any, ...], str]] = {
    "too many": ((call("a", "aten.relu.default", X, 1, shape=SHAPE),), "has 2 arguments; expected at most 1"),
    "too few": ((call("a", "aten.relu.default", shape=SHAPE),), "lacks its argument self"),
    "unknown name": ((call("a", "aten.relu.default", X, shape=SHAPE, extra=1),), "has no argument 'extra'"),
    "twice": ((call("a", "aten.relu.default", X, shape=SHAPE, self=X),), "or has it twice"),
    "text": ((call("a", "aten.softmax.int", X, "one", shape=SHAPE),), "has 'one' as dim; expected int"),
    "half": ((call("a", "aten.softmax.int", X, 1.5, shape=SHAPE),), "has '1.5' as dim; expected int"),
    "truth": ((call("a", "aten.softmax.int", X, True, shape=SHAPE),), "has 'True' as dim; expected int"),
    "axis": ((call("a", "aten.softmax.int", X, 7, shape=SHAPE),), "has axis 7; its input has 4"),
    "list": ((call("a", "aten.permute.default", X, [0, 1, None, 2], shape=SHAPE),), "has 'None' as dims"),
    "dtype": ((call("a", "aten.to.dtype", X, 6, shape=SHAPE),), "has '6' as dtype"),
    "shape": ((call("a", "aten.relu.default", X, shape=["N", 32, 4, 5]),), "notes float32 ['N', 32, 4, 5]; it gives"),
    "noted dtype": ((call("a", "aten.relu.default", X, shape=SHAPE, dtype="float64"),), "notes float64"),
    "no note": ((call("a", "aten.relu.default", X),), "notes no shape"),
    "code as shape": ((call("a", "aten.relu.default", X, shape=["exit()", 4, 4, 4]),), "no dimension"),
    "power": ((call("a", "aten.relu.default", X, shape=["9**9**9", 4, 4, 4]),), "no dimension"),
    "zero": ((call("a", "aten.relu.default", X, shape=["N//0", 4, 4, 4]),), "no dimension"),
    "many parts": ((call("a", "aten.expand.default", X, [10**6, 32, 4, 4], shape=[10**6, 32, 4, 4]),), "take"),
    "unbind": (
        (
            call("a", "aten.full.default", [10**6], 1.0, shape=[10**6]),
            call("b", "aten.unbind.int", {"node": "a"}),
        ),
        "makes 1000000 parts; expected 1 to 4096",
    ),
    "unread": (
        (
            call("a", "aten.empty.memory_format", [4], shape=[4]),
            call("b", "aten.relu.default", {"node": "a"}, shape=[4]),
        ),
        "gives memory that nothing has written",
    ),
    "stride": ((call("a", "aten.avg_pool2d.default", X, [2, 2], [0, 0], shape=SHAPE),), "has a stride of 0"),
    "padding": ((call("a", "aten.avg_pool2d.default", X, [2, 2], [2, 2], [-1, 0], shape=SHAPE),), "has a padding"),
    "dropout": ((call("a", "aten.dropout.default", X, 0.5, True, shape=SHAPE),), "drops out at random"),
    "float index": ((call("a", "aten.index_select.default", X, 1, X, shape=SHAPE),), "not whole"),
    "block": ((call("a", "hqc.hadamard.default", X, 2**40, 1, shape=SHAPE),), "rotates 32 channels in blocks of"),
    "kind": (
        (call("a", "hqc.hadamard.default", X, 8, 1, True, shape=SHAPE),),
        "rotates 32 channels in regular blocks of 8",
    ),
    "Sylvester's": ((call("a", "hqc.hadamard.default", X, 256, 1, shape=SHAPE),), "in blocks of 256"),
    "numbers": ((call("a", "operator.mul", X, 2),), "takes numbers"),
    "overflow": (
        (
            call("a", "aten.sym_size.int", X, 0),
            call("b", "operator.mul", {"node": "a"}, 2**62),
        ),
        "does not fit 64 bits",
    ),
    "getitem": ((call("a", "operator.getitem", X, 0),), "takes a list of tensors"),
    "beyond": (
        (call("a", "aten.chunk.default", X, 2, 1), call("b", "operator.getitem", {"node": "a"}, 5, shape=SHAPE)),
        "does not take its arguments",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_does_not_fit_is_refused(case: str, artefact: Path) -> None:
    calls, message = CALLS[case]
    insert(artefact, *calls)
    with pytest.raises(ArtefactError, match=re.escape(message)) as caught:
        load_program(artefact)
    assert "\n" not in str(caught.value)


def test_a_call_that_fits_is_taken(artefact: Path) -> None:
    insert(
        artefact,
        call("a", "aten.sym_size.int", X, 0),
        call("b", "operator.mul", {"node": "a"}, 2),
        call("c", "aten.cat.default", [X, X], shape=["2*N", 32, 4, 4]),
        call("d", "aten.view.default", {"node": "c"}, [{"node": "b"}, 512], shape=["2*N", 512]),
    )
    load_program(artefact)


@pytest.mark.parametrize(
    ("target", "place", "value"),
    [
        ("hqc.rescale.default", 4, 0),
        ("hqc.int_linear.default", 2, 0),
        ("hqc.rotate_codes.default", 1, 6),
        ("hqc.quantize.default", 3, 10**6),
        ("hqc.quantize.default", 2, 100),
        ("hqc.nearest_timestep.default", 1, {"node": "sample"}),
    ],
)
def test_own_operators_are_checked(target: str, place: int, value: Any, integer_artefact: Path) -> None:
    nodes = nodes_of(integer_artefact)
    next(node for node in nodes if node["target"] == target)["args"][place] = value
    write_nodes(integer_artefact, nodes)
    with pytest.raises(ArtefactError, match="is not a program"):
        load_program(integer_artefact)


def test_what_does_not_fit_memory_is_refused(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hqc.memory, "available_bytes", lambda: 2**30)
    insert(artefact, call("a", "aten.full.default", [10**9], 1.0, shape=[10**9]))
    with pytest.raises(MemoryShortError, match=r"needs about 4\.0 GB of memory and 1\.1 GB are available"):
        load_program(artefact)


def test_an_input_that_does_not_fit_memory_is_refused(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hqc.memory, "available_bytes", lambda: 2**30)
    manifest = json.loads((artefact / "manifest.json").read_text())
    manifest["inputs"][0]["shape"] = ["N", 2**20, 2**20]
    (artefact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((MemoryShortError, ArtefactError)):
        load_program(artefact)


@pytest.mark.parametrize(
    "dimension", ["", "M", "N/2", "N**2", "-1", "N - 5", "1.5", "N()", "N" * 300, True, None, 2**63]
)
def test_what_is_no_dimension(dimension: Any) -> None:
    with pytest.raises(ValueError, match=r"dimension"):
        size_of(dimension, 3)


def test_checking_computes_nothing(captured: Callable[[str], Program]) -> None:
    """Weights are not read: a program whose tensors have no data passes."""
    program = captured("cross_attention")
    check_calls(program.evolve(state={k: v.to("meta") for k, v in program.state.items()}))


# ---- at trace --------------------------------------------------------------------------------------------------------


class _Sorts(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample.sort(1).values + timestep[:, None]


class _Transforms(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.fft.fftn(sample, dim=(1,)).real + timestep[:, None]


@pytest.mark.parametrize(("kind", "name"), [(_Sorts, "aten.sort.default"), (_Transforms, "aten.fft_fftn.default")])
def test_trace_names_what_a_program_may_not_hold(kind: type[nn.Module], name: str) -> None:
    inputs = (InputSpec("sample", ("N", 8)), InputSpec("timestep", ("N",)))
    with pytest.raises(CaptureError, match=f"operator '{name}' is not one that a Program may hold"):
        capture_module(kind(), inputs)


# ---- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["origin"].update(source=5), "is no text"),
        (lambda m: m["origin"].update(pipeline="a\0b"), "is no text"),
        (lambda m: m["origin"].update(versions={"torch": 2}), "versions"),
        (lambda m: m["origin"].update(capture_error="0"), "capture_error"),
        (lambda m: m["origin"].update(unet_config=[]), "unet_config is no mapping"),
        (lambda m: m["origin"].update(unet_config={"patch_size": "two"}), "no size as patch_size"),
        (lambda m: m["origin"].update(unet_config={"sample_size": 10**9}), "no size as sample_size"),
        (lambda m: m["inputs"][0].update(name="a b"), "an input is called 'a b'"),
        (lambda m: m["inputs"][0].update(shape=["N", 10**12]), "has shape"),
        (lambda m: m["inputs"][0].update(shape=["N"] * 20), "has shape"),
        (lambda m: m["inputs"][1].update(span=[0, 1e300]), "has span"),
        (lambda m: m["inputs"][1].update(shape=[61]), "the graph says otherwise"),
        (lambda m: m["inputs"][1].update(dtype="int64"), "notes float32"),
    ],
    ids=range(13),
)
def test_a_field_of_the_manifest_that_makes_no_sense_is_refused(
    change: Callable[[Any], object], message: str, artefact: Path
) -> None:
    manifest = json.loads((artefact / "manifest.json").read_text())
    change(manifest)
    (artefact / "manifest.json").write_text(json.dumps(manifest))
    resign(artefact)
    with pytest.raises(ArtefactError, match=re.escape(message)):
        load_program(artefact)
