"""`hqc bench` on a small UNet: every kind of model and peer, real processes; and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_line import hqc
from contenders_here import run_here
from diffusers import UNet2DModel
from PIL import Image

from hqc.api import ptq
from hqc.capture import capture_module, trace
from hqc.errors import ComparisonError, EvaluationError, ExportError
from hqc.evaluation.bench import peers as peers_module
from hqc.evaluation.bench.contender import Contender
from hqc.evaluation.bench.models import Quantisation
from hqc.evaluation.bench.peers import Built, Peer
from hqc.evaluation.bench.run import Timing, bench, median_milliseconds
from hqc.evaluation.bench.toolkits import ONNXRUNTIME, run_tool
from hqc.evaluation.workspace import Workspace
from hqc.export import export_program
from hqc.program import InputSpec, Program
from hqc.sampling.sources import synthetic_task
from hqc.storage import load_program, save_program

SOURCE = "zoo:without_attention"
AS_IT_IS = ("--runs", 2, "--warm-up", 1, "--threads", 1)
QUICK = (*AS_IT_IS, "--calib-size", 1, "--n-steps", 2)
TIMING = Timing(batch_size=2, threads=1, runs=1, warm_up=0)
PEERS = ["onnxruntime-fp32", "onnxruntime-int8", "torch"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One command from a module to the figures, with every peer."""
    work = tmp_path_factory.mktemp("bench")
    result = hqc(
        *("bench", SOURCE, "--against", ",".join(PEERS), "--work-dir", work / "w", *QUICK, "--json"),
        *("--chart", work / "chart.png"),
    )
    assert result.exit_code == 0, result.stderr
    return SimpleNamespace(work=work, said=json.loads(result.stdout), stderr=result.stderr)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders in this process: those of `done` are processes."""
    run_here(monkeypatch)


# ---- one command ---------------------------------------------------------------------------------------------------


def test_the_json_holds_every_figure_of_every_contender(done: SimpleNamespace) -> None:
    said = done.said
    assert said["failed"] == {}
    assert sorted(said["speedup"]) == sorted(PEERS)
    medians = [said["milliseconds"][peer]["median"] for peer in said["speedup"]]
    assert medians == sorted(medians)  # the fastest first
    everyone = ["hqc", *said["speedup"]]
    for name in ("size_bytes", "resident_bytes", "peak_resident_bytes", "runtime_resident_bytes"):
        assert list(said[name]) == everyone
        assert all(type(value) is int and value > 0 for value in said[name].values())
    assert all(value > 0 for value in said["load_seconds"].values())
    for contender in everyone:
        times = said["milliseconds"][contender]
        assert len(times["runs"]) == 2
        assert times["median"] == median(times["runs"])
        assert 0 < times["p10"] <= times["median"] <= times["p90"]
    assert said["protocol"] | {"batch_size": 2, "threads": 1, "runs": 2, "warm_up": 1} == said["protocol"]
    assert said["quantisation"] == "w4a4 rtn + Hadamard"


def test_ratios_are_those_of_the_runs_in_the_same_document(done: SimpleNamespace) -> None:
    times = {name: entry["runs"] for name, entry in done.said["milliseconds"].items()}
    for peer in PEERS:
        ratios = [theirs / ours for theirs, ours in zip(times[peer], times["hqc"], strict=True)]
        assert done.said["speedup"][peer] == pytest.approx(median(ratios), rel=1e-12)


def test_outputs_are_compared_with_the_float_programs(done: SimpleNamespace) -> None:
    error = done.said["error_to_float"]
    assert error["torch"] == 0  # the reference is the same program in the same runtime with the same threads
    assert error["onnxruntime-fp32"] < 1e-5  # float32 sums in another order
    assert 1e-4 < error["onnxruntime-int8"] < 0.5
    assert 1e-3 < error["hqc"] < 1


def test_sizes_are_those_of_the_files(done: SimpleNamespace) -> None:
    size, work = done.said["size_bytes"], done.work / "w"
    assert size["hqc"] == (work / "integer" / "model.onnx").stat().st_size
    assert size["onnxruntime-int8"] == (work / "onnxruntime-int8" / "model.onnx").stat().st_size
    assert size["hqc"] < size["onnxruntime-fp32"]
    kept = [work / "float.hqc" / name for name in ("graph.json", "weights.safetensors")]
    assert size["torch"] == sum(path.stat().st_size for path in kept)


def test_the_runtime_of_onnx_contenders_is_theirs_alone(done: SimpleNamespace) -> None:
    """A worker that imported torch for an ONNX model would count torch's pages as the model's."""
    before = done.said["runtime_resident_bytes"]
    assert max(before["hqc"], before["onnxruntime-int8"]) < 0.7 * before["torch"]


def test_the_int8_peer_is_a_qdq_model_with_s8_channels(done: SimpleNamespace) -> None:
    model = onnx.load(done.work / "w" / "onnxruntime-int8" / "model.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") > 3
    types = {i.name: (i.data_type, list(i.dims)) for i in model.graph.initializer}
    weights = [
        types[node.input[0]][0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in types
    ]
    assert onnx.TensorProto.INT8 in weights
    scales = [types[n.input[1]][1] for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert any(dims and dims[0] > 1 for dims in scales)  # one scale a channel


def test_stages_are_lines_with_seconds(done: SimpleNamespace) -> None:
    names = [stage["name"] for stage in done.said["stages"]]
    wanted = [
        "float.hqc",
        "quantised.hqc",
        "integer",
        "onnxruntime-fp32",
        "onnxruntime-int8",
        "float reference",
        "timing",
    ]
    assert names == wanted
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == wanted


def test_the_chart_is_a_picture(done: SimpleNamespace) -> None:
    with Image.open(done.work / "chart.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > image.height > 300


@pytest.mark.usefixtures("here")
def test_a_second_bench_takes_what_is_there(done: SimpleNamespace) -> None:
    """The module has to be traced to be known; its program is the same, and so is all that follows."""
    result = hqc("bench", SOURCE, "--work-dir", done.work / "w", *QUICK, "--chart", done.work / "chart.svg")
    assert result.exit_code == 0, result.stderr
    assert "quantised.hqc: 0.0 s, kept from an earlier run" in result.stderr
    assert result.stderr.count("kept from an earlier run") == 3
    assert "| onnxruntime-fp32 " in result.stdout
    assert (done.work / "chart.svg").read_text().startswith("<?xml")


# ---- artefacts as models -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_an_export_is_taken_as_it_is_and_its_source_traced_for_the_peers(done: SimpleNamespace, tmp_path: Path) -> None:
    export, before = tmp_path / "export", None
    shutil.copytree(done.work / "w" / "integer", export)
    manifest = json.loads((export / "manifest.json").read_text())
    assert manifest["origin"]["source"] == "without_attention"  # nothing that can be traced: a Source of its own name
    before = (export / "model.onnx").read_bytes()
    result = hqc("bench", export, *AS_IT_IS)
    assert result.exit_code == 2
    assert "its float side is not there" in result.stderr
    assert "--float PROGRAM" in result.stderr
    result = hqc("bench", export, "--float", done.work / "w" / "float.hqc", "--against", "torch", *AS_IT_IS, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["size_bytes"]["hqc"] == len(before)
    assert [stage["name"] for stage in said["stages"]] == ["float reference", "timing"]
    assert said["protocol"]["calibration"] == "as the model was quantised"
    assert said["quantisation"].startswith("w4a4")


@pytest.mark.usefixtures("here")
def test_a_quantised_program_is_exported(done: SimpleNamespace, tmp_path: Path) -> None:
    work = done.work / "w"
    result = bench(
        str(work / "quantised.hqc"),
        ["torch"],
        Workspace(tmp_path),
        float_model=str(work / "float.hqc"),
        timing=TIMING,
    )
    assert [stage.name for stage in result.stages] == ["integer", "float reference", "timing"]
    assert result.peers["torch"].error_to_float == 0
    with pytest.raises(ComparisonError, match="is quantised; expected a float program"):
        bench(str(work / "quantised.hqc"), [], Workspace(tmp_path), float_model=str(work / "quantised.hqc"))


def test_a_float_side_with_other_inputs_is_refused(
    done: SimpleNamespace, tmp_path: Path, captured: Callable[[str], Program]
) -> None:
    save_program(captured("two_sites"), tmp_path / "other.hqc")
    result = hqc("bench", done.work / "w" / "integer", "--float", tmp_path / "other.hqc", *AS_IT_IS)
    assert result.exit_code == 2
    assert "takes other inputs" in result.stderr


@pytest.mark.usefixtures("here")
def test_the_float_side_is_traced_at_the_size_of_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    ).save_pretrained(folder)
    captured = trace(str(folder), latent_size=(4, 6))
    save_program(ptq(captured, task=synthetic_task(captured)), tmp_path / "quantised.hqc")
    bench(str(tmp_path / "quantised.hqc"), [], Workspace(tmp_path / "w"), timing=TIMING)
    assert load_program(tmp_path / "w" / "float.hqc").inputs[0].shape == ("N", 3, 4, 6)


def test_what_the_target_does_not_take_is_refused_before_calibration(tmp_path: Path) -> None:
    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.max_pool2d(self.conv(sample), 3, 1, 1) + timestep.view(-1, 1, 1, 1)

    inputs = (InputSpec("sample", ("N", 8, 4, 4)), InputSpec("timestep", ("N",)))
    save_program(capture_module(Pooled(), inputs), tmp_path / "pooled.hqc")
    with pytest.raises(ExportError, match=r"target onnxruntime: does not take aten\.max_pool2d\.default"):
        bench(str(tmp_path / "pooled.hqc"), [], Workspace(tmp_path / "w"), timing=TIMING)
    assert not (tmp_path / "w" / "quantised.hqc").exists()


@pytest.mark.usefixtures("here")
def test_a_captured_program_is_quantised_without_rotation_on_request(done: SimpleNamespace, tmp_path: Path) -> None:
    result = bench(
        str(done.work / "w" / "float.hqc"),
        [],
        Workspace(tmp_path),
        quantisation=Quantisation("W8A8", hadamard=False, calib_size=8, n_steps=2),
        timing=TIMING,
    )
    assert result.quantisation == "w8a8 rtn"
    assert load_program(tmp_path / "quantised.hqc").plan.bits == "w8a8"
    assert 1e-5 < result.ours.error_to_float < 0.08  # 0.046: scales of 8 images of 192 values each


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("FLOAT", "--float", "FLOAT"), "is the float model itself"),
        (("INTEGER", "--float", "FLOAT", "--bits", "w4a4"), "is quantised already"),
        (("FLOAT", "--against", "tensorflow"), "unknown. There are onnxruntime-fp32, onnxruntime-int8, torch"),
        (("FLOAT", "--chart", "a.pdf"), "neither .png nor .svg"),
        (("nothing-there",), "nothing that hqc can trace"),
        (("FLOAT", "--bits", "w9a4"), "w9a4"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(
    done: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"FLOAT": done.work / "w" / "float.hqc", "INTEGER": done.work / "w" / "integer"}
    result = hqc("bench", *(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("hqc: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_export_whose_manifest_leaves_the_model_out_is_refused(done: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(done.work / "w" / "integer", tmp_path / "export")
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    del manifest["files"]["model.onnx"]
    (tmp_path / "export" / "manifest.json").write_text(json.dumps(manifest))
    result = hqc("bench", tmp_path / "export", "--float", done.work / "w" / "float.hqc", *AS_IT_IS)
    assert result.exit_code == 2
    assert "lists no model.onnx" in result.stderr


# ---- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_a_peer_that_fails_is_reported_and_the_others_run(
    done: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    export_program(load_program(done.work / "w" / "float.hqc"), "onnxruntime", tmp_path / "nan")
    model = onnx.load(tmp_path / "nan" / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("conv_out.bias"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(list(tensor.dims), np.nan, np.float32), tensor.name))
    onnx.save(model, tmp_path / "nan.onnx")

    def explode(*_: Any) -> Built:
        raise RuntimeError("the tool\nbroke")

    broken = {
        "explodes": Peer("raises", explode),
        "refused": Peer("no model", lambda *_: Built("onnxruntime", tmp_path / "bad.onnx")),
        "nan": Peer("no numbers", lambda *_: Built("onnxruntime", tmp_path / "nan.onnx")),
    }
    monkeypatch.setattr(peers_module, "PEERS", {**peers_module.PEERS, **broken})
    monkeypatch.setattr("hqc.evaluation.bench.run.PEERS", peers_module.PEERS)
    against = peers_module.find_peers("explodes,refused,torch,nan")
    result = bench(
        str(done.work / "w" / "integer"),
        against,
        Workspace(tmp_path / "w"),
        float_model=str(done.work / "w" / "float.hqc"),
        timing=TIMING,
    )
    assert list(result.peers) == ["torch"]
    assert result.failed["explodes"] == "RuntimeError: the tool broke"
    assert "onnxruntime refuses it" in result.failed["refused"]
    assert result.failed["nan"] == "its output holds NaN or infinity"
    assert result.to_dict()["failed"].keys() == broken.keys()


def test_onnxruntimes_tool_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    np.savez(tmp_path / "c.npz", **{"0.sample": np.zeros(1, np.float32)})
    with pytest.raises(EvaluationError, match=r"quantize_static failed: .*Error"):
        run_tool(ONNXRUNTIME, tmp_path / "bad.onnx", tmp_path / "c.npz", tmp_path, "full")


def test_a_process_that_dies_is_an_error_with_its_signal(tmp_path: Path) -> None:
    with Contender("victim", "torch", tmp_path) as contender:
        contender._process.kill()
        contender._process.wait()
        with pytest.raises(EvaluationError, match="killed by signal 9"):
            contender.run()


def test_a_contender_that_is_left_ends() -> None:
    with Contender("idle", "torch", Path("nowhere")) as contender:
        process = contender._process
        assert process.poll() is None
    assert process.returncode is not None


@pytest.mark.usefixtures("here")
def test_median_milliseconds_of_artefacts(done: SimpleNamespace) -> None:
    work = done.work / "w"
    times = median_milliseconds({"float": work / "float.hqc", "integer": work / "integer"}, timing=TIMING)
    assert times.keys() == {"float", "integer"}
    assert min(times.values()) > 0
