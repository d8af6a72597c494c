"""Models for Triton Inference Server: config.pbtxt as protobuf's own parser reads it, against the model's own ports."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from denoisers import captured_denoiser
from google.protobuf import text_format
from model_config import DATA_TYPES, KINDS, MODEL_CONFIG
from test_cli import ok, refused

from hqc.engines.options import BatchProfile, BuildOptions
from hqc.engines.record import EngineRecord, build_text, engine_name, folder_digest
from hqc.errors import ArtefactError, ExportError, HqcError
from hqc.export import export_program
from hqc.manifests import check_manifest, read_json
from hqc.program import Program
from hqc.triton_server import ModelConfig, Port, write_triton_model

ELEMENTS = {1: "TYPE_FP32", 7: "TYPE_INT64", 9: "TYPE_BOOL", 10: "TYPE_FP16"}


def parsed(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), MODEL_CONFIG())


def shapes(ports: Any, batched: bool) -> dict[str, tuple[str, list[int]]]:
    """What Triton calls the model with: `dims`, or what they are reshaped to, behind the batch."""
    front = [-1] if batched else []
    return {
        p.name: (DATA_TYPES[p.data_type], front + list(p.reshape.shape if p.HasField("reshape") else p.dims))
        for p in ports
    }


def own_shapes(values: Any) -> dict[str, tuple[str, list[int]]]:
    kinds = {value.name: value.type.tensor_type for value in values}
    return {
        name: (ELEMENTS[kind.elem_type], [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim])
        for name, kind in kinds.items()
    }


def check_ports(folder: Path, model: Path) -> Any:
    """Inputs and outputs are those of the model; `dims` are never empty, as Triton demands."""
    config, graph = parsed(folder), onnx.load(model, load_external_data=False).graph
    assert shapes(config.input, config.max_batch_size > 0) == own_shapes(graph.input)
    assert shapes(config.output, config.max_batch_size > 0) == own_shapes(graph.output)
    assert all(len(port.dims) > 0 for port in (*config.input, *config.output))
    return config


@pytest.fixture(scope="module")
def exports(captured: Callable[[str], Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, program = tmp_path_factory.mktemp("exports"), captured("cross_attention")
    export_program(program, "portable", root / "portable", verify_batch=1)
    export_program(program, "onnxruntime", root / "data", external_data_bytes=1000, verify_batch=1)
    export_program(program, "onnxruntime", root / "once", one_timestep=True, names="optimum", verify_batch=1)
    export_program(captured("two_sites"), "tensorrt", root / "rt", verify_batch=1)
    return root


def test_a_model_for_onnx_runtime(exports: Path, tmp_path: Path) -> None:
    written = write_triton_model(exports / "data", tmp_path / "unet")
    config = check_ports(tmp_path / "unet", exports / "data" / "model.onnx")
    assert (config.name, config.platform, config.backend) == ("unet", "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 8
    assert config.HasField("dynamic_batching")
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, KINDS["KIND_CPU"])]
    timestep = next(port for port in config.input if port.name == "timestep")
    assert (list(timestep.dims), list(timestep.reshape.shape), timestep.HasField("reshape")) == ([1], [], True)
    assert written.files == ("1/model.onnx", "1/model.onnx.data")
    assert f"--model-repository={tmp_path}" in str(written)


def test_what_lies_in_the_version_runs_as_the_export(exports: Path, tmp_path: Path) -> None:
    write_triton_model(exports / "data", tmp_path / "unet")
    random = np.random.default_rng(0)
    feeds = {"sample": (2, 3, 8, 8), "timestep": (2,), "condition": (2, 2, 32)}
    given = {name: random.random(shape, np.float32) for name, shape in feeds.items()}
    models = (exports / "data" / "model.onnx", tmp_path / "unet" / "1" / "model.onnx")
    sessions = [onnxruntime.InferenceSession(str(m), providers=["CPUExecutionProvider"]) for m in models]
    wanted, found = (session.run(None, given)[0] for session in sessions)
    assert np.array_equal(wanted, found)


def test_an_input_without_a_batch_turns_batching_off(exports: Path, tmp_path: Path) -> None:
    written = write_triton_model(exports / "once", tmp_path / "unet")
    config = check_ports(tmp_path / "unet", exports / "once" / "model.onnx")
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert [list(p.dims) for p in config.input if p.name == "timestep"] == [[1]]
    assert [list(p.dims) for p in config.input if p.name == "sample"] == [[-1, 3, 8, 8]]
    assert "batching off: timestep without a batch dimension" in str(written)
    with pytest.raises(ExportError, match=r"--max-batch-size 4: batching is off: timestep without a batch dimension"):
        write_triton_model(exports / "once", tmp_path / "other", max_batch_size=4)


def test_inputs_that_samples_share(tmp_path: Path) -> None:
    """Flux has places of tokens for a whole batch."""
    export_program(captured_denoiser("flux"), "portable", tmp_path / "flux", verify_batch=1)
    written = write_triton_model(tmp_path / "flux", tmp_path / "model")
    config = check_ports(tmp_path / "model", tmp_path / "flux" / "model.onnx")
    assert config.max_batch_size == 0
    assert "img_ids" in written.note


@pytest.mark.parametrize(("device", "kind"), [(None, "KIND_CPU"), ("cpu", "KIND_CPU"), ("gpu", "KIND_GPU")])
def test_a_portable_export_runs_where_it_is_told(exports: Path, tmp_path: Path, device: Any, kind: str) -> None:
    write_triton_model(exports / "portable", tmp_path / "x", max_batch_size=3, device=device)
    config = parsed(tmp_path / "x")
    assert (config.max_batch_size, config.instance_group[0].kind) == (3, KINDS[kind])


def test_the_manifest_says_what_was_written(exports: Path, tmp_path: Path) -> None:
    write_triton_model(exports / "data", tmp_path / "x")
    manifest = check_manifest(tmp_path / "x", "hqc-triton")
    assert set(manifest["files"]) == {"1/model.onnx", "1/model.onnx.data", "config.pbtxt"}
    source = read_json(exports / "data" / "manifest.json")
    for name in ("model.onnx", "model.onnx.data"):
        assert manifest["files"][f"1/{name}"] == source["files"][name]
    assert manifest["export"]["origin"] == source["origin"]


# ---- engines -------------------------------------------------------------------------------------------------------


def add_engine(folder: Path, arch: str, batches: tuple[int, int, int] = (1, 2, 4), **changes: Any) -> bytes:
    """An engine as build.json has it; what is in the plan is the builder's."""
    builder = changes.get("builder", "trt")
    file, data = f"engine_{engine_name(builder, arch)}.plan", f"plan for {arch}".encode()
    (folder / file).write_bytes(data)
    facts: dict[str, Any] = {
        "file": file,
        "builder": builder,
        "builder_version": "10.16.1",
        "arch": arch,
        "onnx": folder_digest(folder),
        "key": "k",
        "options": BuildOptions(BatchProfile(*batches)).to_dict(),
        "shapes": {"sample": [[size, 32, 4, 4] for size in batches], "timestep": [[size] for size in batches]},
        "dtypes": {"sample": "float", "timestep": "float", "output": "half"},
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_bytes": len(data),
        "seconds": 1.0,
        "peak_resident_bytes": 1,
    }
    made = EngineRecord(**{**facts, **changes})
    path = folder / "build.json"
    there = json.loads(path.read_text())["engines"] if path.exists() else {}
    records = {name: EngineRecord(**entry) for name, entry in there.items()}
    path.write_text(build_text({**records, made.name: made}, {}), encoding="utf-8")
    return data


@pytest.fixture
def engines(exports: Path) -> Path:
    folder = exports / "rt"
    for file in (folder / "build.json", *folder.glob("*.plan")):
        file.unlink(missing_ok=True)
    return folder


def test_an_engine(engines: Path, tmp_path: Path) -> None:
    data = add_engine(engines, "sm_90")
    add_engine(engines, "sm_86", builder="rtx")
    written = write_triton_model(engines, tmp_path / "unet")
    config = parsed(tmp_path / "unet")
    assert (config.platform, config.backend, config.max_batch_size) == ("tensorrt_plan", "tensorrt", 4)
    assert [group.kind for group in config.instance_group] == [KINDS["KIND_GPU"]]
    assert written.files == ("1/model.plan",)
    assert (tmp_path / "unet" / "1" / "model.plan").read_bytes() == data
    assert DATA_TYPES[config.output[0].data_type] == "TYPE_FP16"
    assert len(config.cc_model_filenames) == 0


def test_several_engines_by_compute_capability(engines: Path, tmp_path: Path) -> None:
    wanted = {"9.0": add_engine(engines, "sm_90"), "10.0": add_engine(engines, "sm_100", (1, 2, 3))}
    write_triton_model(engines, tmp_path / "unet")
    config, version = parsed(tmp_path / "unet"), tmp_path / "unet" / "1"
    assert config.max_batch_size == 3
    assert {key: (version / file).read_bytes() for key, file in config.cc_model_filenames.items()} == wanted


def test_what_triton_cannot_take(exports: Path, engines: Path, tmp_path: Path) -> None:
    def refuses(kind: type[HqcError], match: str, export: Path, **options: Any) -> None:
        with pytest.raises(kind, match=match) as caught:
            write_triton_model(export, tmp_path / "x", **options)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    refuses(ExportError, "builder, whose forms .* holds no engine by TensorRT. Run `hqc build-engine", engines)
    refuses(ExportError, "--device cpu: .* is for TensorRT", engines, device="cpu")
    refuses(ExportError, "--device gpu: .* for CPUs alone", exports / "data", device="gpu")
    add_engine(engines, "sm_90", (2, 2, 4))
    refuses(ExportError, "takes batches from 2, and Triton sends single samples", engines)
    add_engine(engines, "sm_90")
    refuses(ExportError, "--max-batch-size 5: the engine takes at most 4 samples", engines, max_batch_size=5)
    (engines / "engine_trt_sm90.plan").write_bytes(b"plan for sm_89")
    refuses(ArtefactError, "is damaged", engines)
    add_engine(engines, "sm_90", options={})
    refuses(ArtefactError, "has a record without batches", engines)


def test_plugin_nodes_need_an_engine_that_holds_them(engines: Path, tmp_path: Path) -> None:
    manifest = read_json(engines / "manifest.json")
    changed = {**manifest, "tensorrt": {**manifest["tensorrt"], "plugins": "qdp"}}
    (engines / "manifest.json").write_text(json.dumps(changed), encoding="utf-8")
    try:
        with pytest.raises(ExportError, match="has plugin nodes, which ONNX Runtime does not run"):
            write_triton_model(engines, tmp_path / "x")
        add_engine(engines, "sm_90", builder_version="10.8.0")
        with pytest.raises(ExportError, match=r"is by TensorRT 10\.8\.0, whose plugins are Python"):
            write_triton_model(engines, tmp_path / "x")
        add_engine(engines, "sm_90", builder_version="10.9.0.34")
        write_triton_model(engines, tmp_path / "x")
    finally:
        (engines / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


# ---- the text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", 'quote" and \\', "new\nline", "größe", "火"])
def test_any_name_is_read_back(name: str) -> None:
    ports = (Port(name, "TYPE_FP32", (None, 4)),)
    text = ModelConfig(name, "onnxruntime_onnx", ports, ports, 2, gpu=False).text()
    assert text.isascii()
    found = text_format.Parse(text, MODEL_CONFIG())
    assert (found.name, found.input[0].name) == (name, name)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command(exports: Path, tmp_path: Path) -> None:
    command = ("export", exports / "data", "--target", "triton", "-o", tmp_path / "unet")
    said = json.loads(ok(*command, "--json").stdout)
    assert (said["name"], said["max_batch_size"], said["device"]) == ("unet", 8, "cpu")
    assert "already exists" in refused(tmp_path, *command)
    ok(*command, "--max-batch-size", "2", "--force")
    assert parsed(tmp_path / "unet").max_batch_size == 2
