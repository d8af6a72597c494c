"""Engines that TensorRT-RTX really builds, for four architectures, on a machine without a GPU; and what it refuses."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import engine_graphs as graphs
import onnx
import pytest
from onnx import TensorProto

from hqc.engines import BatchProfile, BuildOptions, EngineReport, build_engines, load_plan
from hqc.engines import build as build_module
from hqc.errors import ArtefactError, ExportError, HqcError
from hqc.storage import check_manifest

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="TensorRT-RTX has no wheel for macOS")

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_120")
QUICK = ("sm_86",)


def tree(folder: Path) -> dict[str, str]:
    """Every file below, hidden ones too, with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Made:
    folder: Path
    report: EngineReport


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A convolution in two digits, its weights in a file of their own, built for four architectures."""
    folder = graphs.save_export(tmp_path_factory.mktemp("rtx") / "conv", graphs.conv_model(digits=2), external=True)
    return Made(folder, build_engines(folder, archs=ARCHS))


# ---- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_every_quantised_product_runs_on_int8(made: Made, arch: str) -> None:
    engine = next(engine for engine in made.report.engines if engine.record.arch == arch)
    assert (engine.coverage.products, engine.coverage.int8, engine.coverage.exceptions) == (2, 2, ())
    for node in (f"{graphs.CONV}.0/Conv", f"{graphs.CONV}.1/Conv"):
        (kernel,) = [layer for layer in engine.layers if node in layer.nodes]
        assert [tensor.dtype for tensor in kernel.inputs] == ["Int8"]
        assert [tensor.format for tensor in kernel.inputs] == ["NHWC"]
        assert kernel.constants[0].dtype == "Int8"
        assert kernel.constants[0].shape == (64, 64, 3, 3)
        assert [tensor.dtype for tensor in kernel.outputs] == ["Float"]
        assert kernel.sites == (graphs.CONV,)


def test_scaling_clipping_and_quantising_are_one_kernel(made: Made) -> None:
    (kernel,) = [layer for layer in made.report.engines[0].layers if f"{graphs.CONV}.clipped/Clip" in layer.nodes]
    assert {f"{graphs.CONV}.{step}" for step in ("scaled/Mul", "row/Gather", "codes/QuantizeLinear")} < {*kernel.nodes}
    assert kernel.outputs[0].dtype == "Int8"


def test_the_folder_holds_what_build_json_says(made: Made) -> None:
    build = json.loads((made.folder / "build.json").read_text())
    names = ["rtx_sm120", "rtx_sm80", "rtx_sm86", "rtx_sm89"]
    assert list(build["engines"]) == names
    keys = {entry["key"] for entry in build["engines"].values()}
    assert len(keys) == 4
    for name in names:
        entry, plan = build["engines"][name], made.folder / f"engine_{name}.plan"
        assert entry["file"] == plan.name
        assert entry["size_bytes"] == plan.stat().st_size > 300_000
        assert entry["sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()
        assert entry["shapes"]["x"] == [[1, 64, 8, 8], [2, 64, 8, 8], [8, 64, 8, 8]]
        assert entry["shapes"]["timestep"] == [[1], [2], [8]]
        assert entry["dtypes"] == {"x": "half", "timestep": "int64", "y": "half"}
        assert entry["options"] == {"profile": {"min": 1, "opt": 2, "max": 8}, "workspace_bytes": None, "tf32": True}
        assert entry["builder_version"].startswith("1.")
        assert entry["seconds"] > 0
        assert entry["peak_resident_bytes"] > 100_000_000  # the builder's library alone is larger
    assert set(build["onnx"]["files"]) == {"model.onnx", "model.onnx.data"}
    for name, digest in build["onnx"]["files"].items():
        assert digest == hashlib.sha256((made.folder / name).read_bytes()).hexdigest()
    assert not [path for path in made.folder.iterdir() if path.name.startswith(".")]


def test_the_report_keeps_what_it_had_and_the_manifest_still_holds(made: Made) -> None:
    report = json.loads((made.folder / "report.json").read_text())
    assert report["layers"] == [{"site": graphs.CONV}]
    engine = report["engines"]["rtx_sm89"]
    assert engine["quantised_products"] == engine["int8"] == 2
    product = next(layer for layer in engine["layers"] if f"{graphs.CONV}.0/Conv" in layer["nodes"])
    assert product["inputs"] == ["Int8 NHWC [-1,64,8,8]"]
    assert product["kind"] == "correlation"
    manifest = check_manifest(made.folder, "hqc-export")
    assert manifest["target"] == "tensorrt"
    assert "report.json" in manifest["files"]


def test_the_report_prints(made: Made) -> None:
    lines = str(made.report).splitlines()
    assert lines[0].startswith(f"{made.folder}: 4 engines, ")
    assert "engine_rtx_sm80.plan: sm_80, " in lines[1]
    assert lines[1].endswith("INT8 in 2 of 2 quantised products")


# ---- other forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "product"),
    [
        pytest.param(lambda: graphs.linear_model(), f"{graphs.LINEAR}/MatMul", id="linear"),
        pytest.param(lambda: graphs.conv_model(stride=2), f"{graphs.CONV}.0/Conv", id="stride 2"),
        pytest.param(lambda: graphs.conv_model(kernel=1), f"{graphs.CONV}.0/Conv", id="1×1"),
        pytest.param(lambda: graphs.conv_model(half=False), f"{graphs.CONV}.0/Conv", id="float32"),
    ],
)
def test_forms(tmp_path: Path, model: Callable[[], onnx.ModelProto], product: str) -> None:
    (engine,) = build_engines(graphs.save_export(tmp_path / "x", model()), archs=QUICK).engines
    assert (engine.coverage.products, engine.coverage.int8) == (1, 1)
    (kernel,) = [layer for layer in engine.layers if product in layer.nodes and layer.kind != "kgen"]
    assert kernel.kind == ("gemm" if product.endswith("MatMul") else "correlation")
    assert kernel.inputs[0].dtype == kernel.constants[0].dtype == "Int8"


def test_a_weight_only_product_is_listed_apart(tmp_path: Path) -> None:
    (engine,) = build_engines(graphs.save_export(tmp_path / "x", graphs.linear_model(int4=True)), archs=QUICK).engines
    assert (engine.coverage.products, engine.coverage.exceptions) == (0, ())
    ((weight, how),) = engine.coverage.weight_only
    assert weight == f"{graphs.LINEAR}.q"
    assert "gemm kernel" in how
    assert any(tensor.dtype == "Int4" for layer in engine.layers for tensor in layer.constants)


def test_an_architecture_without_int8_convolutions_is_an_exception_in_the_report(tmp_path: Path) -> None:
    report = build_engines(graphs.save_export(tmp_path / "x", graphs.conv_model()), archs=("sm_75",))
    found = report.engines[0].coverage
    assert (found.products, found.int8) == (1, 0)
    ((weight, why),) = found.exceptions
    assert weight == f"{graphs.CONV}.weight_q_0"
    assert "correlation kernel" in why
    assert "Float" in why
    assert f"  not INT8: {weight}: {why}" in str(report)


def test_another_profile_and_workspace(tmp_path: Path) -> None:
    folder = graphs.save_export(tmp_path / "x", graphs.conv_model())
    options = BuildOptions(BatchProfile(2, 4, 4), workspace_bytes=64 * 2**20, tf32=False)
    (engine,) = build_engines(folder, archs=QUICK, options=options).engines
    assert engine.record.shapes["timestep"] == [[2], [4], [4]]
    assert engine.record.options["tf32"] is False


def test_a_model_of_one_batch_takes_that_batch_only(tmp_path: Path) -> None:
    folder = graphs.save_export(tmp_path / "x", graphs.conv_model(batch=2))
    before = tree(folder)
    with pytest.raises(ExportError, match="profile of batches 1…2…8: lies outside what was exported: batches of 2"):
        build_engines(folder, archs=QUICK)
    assert tree(folder) == before
    (engine,) = build_engines(folder, archs=QUICK, options=BuildOptions(BatchProfile(2, 2, 2))).engines
    assert engine.record.shapes == {}


# ---- once more -----------------------------------------------------------------------------------------------------


def test_what_is_there_is_kept_without_force(tmp_path: Path) -> None:
    folder = graphs.save_export(tmp_path / "x", graphs.conv_model())
    build_engines(folder, archs=QUICK)
    before = tree(folder)
    with pytest.raises(ArtefactError, match=r"already holds engine_rtx_sm86\.plan\. Give --force"):
        build_engines(folder, archs=("sm_80", "sm_86"))
    assert tree(folder) == before
    build_engines(folder, archs=("sm_80",))
    assert sorted(json.loads((folder / "report.json").read_text())["engines"]) == ["rtx_sm80", "rtx_sm86"]
    again = build_engines(folder, archs=QUICK, options=BuildOptions(BatchProfile(1, 1, 1)), force=True)
    assert load_plan(folder, "sm_86").record == again.engines[0].record
    assert load_plan(folder, "sm_80").record.shapes["timestep"] == [[1], [2], [8]]


def test_the_cache_gives_the_same_engine_again(tmp_path: Path) -> None:
    first, second = (graphs.save_export(tmp_path / name, graphs.conv_model()) for name in "ab")
    cache = tmp_path / "cache"
    built = build_engines(first, archs=QUICK, cache=cache).engines[0]
    kept = build_engines(second, archs=QUICK, cache=cache).engines[0]
    assert (built.cached, kept.cached) == (False, True)
    assert kept.record == built.record
    assert kept.layers == built.layers
    assert load_plan(second, "sm_86").data == load_plan(first, "sm_86").data
    other = BuildOptions(BatchProfile(1, 1, 4))
    assert not build_engines(second, archs=QUICK, cache=cache, options=other, force=True).engines[0].cached
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_cache_is_refused_and_force_replaces_the_entry(tmp_path: Path) -> None:
    folder, cache = graphs.save_export(tmp_path / "a", graphs.conv_model()), tmp_path / "cache"
    build_engines(folder, archs=QUICK, cache=cache)
    (plan,) = cache.glob("*/engine.plan")
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    other = graphs.save_export(tmp_path / "b", graphs.conv_model())
    before = tree(other)
    with pytest.raises(ArtefactError, match=r"engine\.plan: is damaged\. Remove its folder, or build with --force"):
        build_engines(other, archs=QUICK, cache=cache)
    assert tree(other) == before
    assert not build_engines(other, archs=QUICK, cache=cache, force=True).engines[0].cached
    third = graphs.save_export(tmp_path / "c", graphs.conv_model())
    assert build_engines(third, archs=QUICK, cache=cache).engines[0].cached


# ---- what the builder refuses, and what takes it down --------------------------------------------------------------


def zero_point_model() -> onnx.ModelProto:
    """A quantiser that is not symmetric."""
    model = graphs.conv_model()
    for tensor in model.graph.initializer:
        if tensor.name == f"{graphs.CONV}.zero":
            tensor.raw_data = b"\x01"
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        pytest.param(
            graphs.integer_conv_model,
            r"refuses node block\.conv1/QLinearConv \(QLinearConv\) \(parse\): UNSUPPORTED_NODE: checkQLinearConv",
            id="integer operator",
        ),
        pytest.param(zero_point_model, "refuses node .*Non-zero zero point is not supported", id="zero point"),
        pytest.param(
            graphs.runtime_scale_model, r"crashed \(SIG\w+\); last it said: \w+ \S+", id="crash on a runtime scale"
        ),
    ],
)
def test_a_bad_graph_is_one_clear_line(tmp_path: Path, model: Callable[[], onnx.ModelProto], said: str) -> None:
    folder = graphs.save_export(tmp_path / "x", model())
    before = tree(folder)
    with pytest.raises(ExportError, match=said) as raised:
        build_engines(folder, archs=("sm_89", "sm_86"))
    assert f"{folder / 'model.onnx'} for sm_89: TensorRT-RTX " in str(raised.value)
    assert "\n" not in str(raised.value)
    assert tree(folder) == before


def test_a_failure_at_the_second_architecture_leaves_nothing_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = graphs.save_export(tmp_path / "x", graphs.conv_model())
    before, real, started = tree(folder), build_module.run_builder, []

    def second_fails(builder: object, request: object, *, where: str) -> object:
        if started.count("sm_80") and len(started) == 2:
            raise ExportError(where, "out of luck", "Try again.")
        return real(builder, request, where=where)  # type: ignore[arg-type]

    monkeypatch.setattr(build_module, "run_builder", second_fails)
    with pytest.raises(ExportError, match="out of luck"):
        build_engines(folder, archs=("sm_80", "sm_86"), on_start=started.append)
    assert started == ["sm_80", "sm_86"]
    assert tree(folder) == before


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = graphs.save_export(tmp_path / "x", graphs.conv_model())
    before = tree(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_module, "_extend_report", full)
    with pytest.raises(ArtefactError, match=r"could not be written \(.*No space left on device\)"):
        build_engines(folder, archs=QUICK)
    assert tree(folder) == before


# ---- folders that are not what they should be ----------------------------------------------------------------------


def _foreign(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.producer_name = "pytorch"
    _replace_model(folder, model)


def _free_width(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "W"
    _replace_model(folder, model)


def _replace_model(folder: Path, model: onnx.ModelProto) -> None:
    """With the manifest that fits."""
    data = model.SerializeToString()
    (folder / "model.onnx").write_bytes(data)
    _edit_manifest(folder, "model.onnx", {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})


def _edit_manifest(folder: Path, file: str, entry: dict[str, object] | None, **changes: object) -> None:
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    manifest["files"] = {k: v for k, v in {**manifest["files"], file: entry}.items() if v is not None}
    path.write_text(json.dumps(manifest))


def _not_onnx(folder: Path) -> None:
    data = b"no model at all"
    (folder / "model.onnx").write_bytes(data)
    _edit_manifest(folder, "model.onnx", {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})


def _truncated(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])


def _same(entry: str) -> Callable[[Path], dict[str, object]]:
    return lambda folder: json.loads((folder / "manifest.json").read_text())["files"][entry]  # type: ignore[no-any-return]


def _older(folder: Path) -> None:
    _edit_manifest(folder, "model.onnx", _same("model.onnx")(folder), version=99)


def _other_target(folder: Path) -> None:
    _edit_manifest(folder, "model.onnx", _same("model.onnx")(folder), target="onnxruntime")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(_foreign, "was written by 'pytorch'", id="of another program"),
        pytest.param(_free_width, "input x: has a size besides the batch that is not fixed", id="free width"),
        pytest.param(_not_onnx, "is not an ONNX model", id="no model"),
        pytest.param(_truncated, "is truncated or changed", id="truncated"),
        pytest.param(_older, "has format version 99; this hqc reads 1", id="of another hqc"),
        pytest.param(_other_target, "is an export for 'onnxruntime'. Export with --target tensorrt", id="target"),
        pytest.param(lambda f: (f / "manifest.json").unlink(), "has no manifest.json", id="no export"),
        pytest.param(lambda f: _edit_manifest(f, "model.onnx", None), "does not list model.onnx", id="unlisted"),
    ],
)
def test_a_folder_that_is_no_whole_export(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    folder = graphs.save_export(tmp_path / "x", graphs.conv_model())
    damage(folder)
    before = tree(folder)
    with pytest.raises(HqcError, match=said):
        build_engines(folder, archs=QUICK)
    assert tree(folder) == before


def test_plugin_nodes_are_refused_before_the_builder_meets_them(tmp_path: Path) -> None:
    folder = graphs.save_export(tmp_path / "x", graphs.plugin_model())
    with pytest.raises(ExportError, match=r"plugin nodes \(HadamardQuantize\), and TensorRT-RTX takes no plugins"):
        build_engines(folder, archs=QUICK)


def test_unlisted_external_data_is_refused(tmp_path: Path) -> None:
    folder = graphs.save_export(tmp_path / "x", graphs.conv_model(), external=True)
    _edit_manifest(folder, "model.onnx.data", None)
    with pytest.raises(ArtefactError, match=r"does not list model\.onnx\.data"):
        build_engines(folder, archs=QUICK)


# ---- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """The folder that was built, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in made.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_plan_is_loaded(made: Made) -> None:
    plan = load_plan(made.folder, "sm_120")
    assert plan.data == (made.folder / "engine_rtx_sm120.plan").read_bytes()
    assert plan.record.builder == "rtx"


def test_an_engine_that_is_not_there(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"holds engines rtx_sm120, .*, none for sm_75 by rtx\. Run `hqc build-"):
        load_plan(made.folder, "sm_75")
    empty = graphs.save_export(tmp_path / "x", graphs.conv_model())
    with pytest.raises(ArtefactError, match="holds no engine for sm_90 by trt"):
        load_plan(empty, "sm_90", builder="trt")


def test_a_corrupted_plan(copy: Path) -> None:
    plan = copy / "engine_rtx_sm86.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"is damaged: its sha256 is not that of build\.json\. Run .*--force"):
        load_plan(copy, "sm_86")
    plan.write_bytes(data[:-1])
    with pytest.raises(ArtefactError, match="is truncated or changed"):
        load_plan(copy, "sm_86")
    plan.unlink()
    with pytest.raises(ArtefactError, match="cannot be read"):
        load_plan(copy, "sm_86")


def test_a_plan_of_another_model(copy: Path) -> None:
    _edit_manifest(copy, "model.onnx", {"sha256": "0" * 64, "size": 1})
    with pytest.raises(ArtefactError, match="was built from another model"):
        load_plan(copy, "sm_86")


def _set(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _elsewhere(path: Path) -> None:
    data = json.loads(path.read_text())
    data["engines"]["rtx_sm86"]["file"] = "../engine.plan"
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(lambda path: path.write_text("{"), "cannot be read", id="no JSON"),
        pytest.param(lambda path: path.write_text("[]"), "cannot be read", id="a list"),
        pytest.param(_set(version=2), "version 2; this hqc reads 1", id="version"),
        pytest.param(_set(engines={"rtx_sm86": {}}), "cannot be read", id="no fields"),
        pytest.param(_elsewhere, r"names '\.\./engine\.plan'", id="outside"),
    ],
)
def test_a_damaged_build_json(copy: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(copy / "build.json")
    with pytest.raises(ArtefactError, match=said):
        load_plan(copy, "sm_86")


def test_what_the_graphs_hold() -> None:
    """The test's own graphs are what they claim: else the refusals above would prove nothing."""
    kinds = {node.op_type for node in graphs.conv_model().graph.node}
    assert {"Gather", "Mul", "Clip", "QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds
    scale = graphs.runtime_scale_model().graph.input[-1]
    assert scale.name == "scale"
    assert scale.type.tensor_type.elem_type == TensorProto.FLOAT
