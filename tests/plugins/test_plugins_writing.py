"""`write_plugins`: the kernels of a model, compiled without a GPU, and what is said of them."""

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from plugin_models import model

from hqc.engines.key import plugins_digest
from hqc.errors import ExportError
from hqc.plugins import plugin_nodes, write_plugins, writing
from hqc.plugins.hqc_qdp import table
from hqc.plugins.hqc_qdp.table import read_table
from hqc.plugins.tactics import Tactic, tactics
from hqc.plugins.writing import MAX_SHARED_BYTES, variants_of
from hqc.storage import write_manifest

triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton has no wheel for this platform")
ARCHS = ("sm_80", "sm_100")
NODES = ("tokens", "tokens bounded", "linear")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export folder with the kernels of two nodes for two architectures."""
    folder = tmp_path_factory.mktemp("export")
    onnx.save(model(NODES), str(folder / "model.onnx"))
    files = write_plugins(folder, folder / "model.onnx", ARCHS)
    assert {path for path in (folder / "plugins").rglob("*") if path.is_file()} == set(files)
    return folder


def _plugins(export: Path) -> dict[str, Any]:
    return json.loads((export / "plugins" / "plugins.json").read_text(encoding="utf-8"))


@triton
def test_every_variant_has_kernels_and_every_kernel_is_used(export: Path) -> None:
    data = _plugins(export)
    assert sorted(data["variants"]) == [
        "HadamardQuantize fp16 tokens channels=64 block=32 low=-7 high=7",
        "HadamardQuantizeBounded fp16 tokens channels=64 block=32",
        "Int4Linear fp16 channels=64 outputs=96 block=32",
    ]
    assert [len(names) for _, names in sorted(data["variants"].items())] == [2, 2, 2]
    assert {name for names in data["variants"].values() for name in names} == set(data["kernels"])


@triton
def test_every_entry_point_is_what_the_launch_passes(export: Path) -> None:
    data, dims = _plugins(export), {"hadamard_quantize": (3, 77, 64), "int_gemm": (3, 77, 64)}
    variants = {key: variant for key, (variant, _) in variants_of(plugin_nodes(model(NODES))).items()}
    inputs = {"hadamard_quantize": 2, "int_gemm": 5}
    checked = 0
    for key, names in data["variants"].items():
        for name in names:
            kernel = data["kernels"][name]
            launch = variants[key].launch(dims[kernel["kernel"]], tuple(kernel["tile"]), lambda a, b: -(-a // b))
            # Inputs, integers, the output, and triton's two scratch pointers, for which TensorRT passes null.
            kinds = ["u64"] * inputs[kernel["kernel"]] + ["u32"] * len(launch.integers) + ["u64"] * 3
            assert kernel["parameters"] == len(kinds)
            for arch, build in kernel["archs"].items():
                text = (export / "plugins" / build["file"]).read_text(encoding="utf-8")
                assert re.findall(r"\.visible \.entry (\w+)\(", text) == [build["entry"]] == [name], (name, arch)
                assert re.findall(r"^\s*\.param \.(\w+)", text, re.MULTILINE) == kinds
                checked += 1
    assert checked == 12


@triton
def test_files_have_the_digests_targets_and_isa_that_are_said(export: Path) -> None:
    for kernel in _plugins(export)["kernels"].values():
        assert list(kernel["archs"]) == list(ARCHS)
        for build in kernel["archs"].values():
            ptx = (export / "plugins" / build["file"]).read_bytes()
            assert hashlib.sha256(ptx).hexdigest() == build["sha256"]
            assert f".version {build['ptx_isa']}\n.target {build['target']}\n" in ptx.decode()
            assert build["shared_bytes"] <= MAX_SHARED_BYTES
            assert build["spills"] == 0
        if kernel["kernel"] == "int_gemm":
            assert {build["instruction"] for build in kernel["archs"].values()} == {"mma.sync"}


@triton
def test_no_kernel_needs_tensor_memory(export: Path) -> None:
    assert all("tcgen05" not in path.read_text(encoding="utf-8") for path in (export / "plugins").glob("*.ptx"))


def _compiled(arch: str, *, shared: int = 0, tensor_memory: int = 0) -> SimpleNamespace:
    return SimpleNamespace(arch=arch, shared_bytes=shared, tensor_memory=tensor_memory)


def _tactic() -> Tactic:
    (_, (variant, places)), *_ = sorted(variants_of(plugin_nodes(model(("tokens", "linear")))).items(), reverse=True)
    return tactics(variant, places)[0]


def test_one_that_does_gives_way_to_sm_80(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        writing, "_fitting", lambda tactic, arch: _compiled(arch, tensor_memory=128 * (arch == "sm_100"))
    )
    assert writing._build("k", _tactic(), "sm_100").file == "k_sm80.ptx"
    assert writing._build("k", _tactic(), "sm_90").file == "k_sm90.ptx"


def test_stages_are_dropped_until_shared_memory_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tactic, asked = _tactic(), []
    assert tactic.options.num_stages == 4

    def compile_kernel(kernel: str, dtype: str, options: dict[str, Any], arch: str) -> SimpleNamespace:
        asked.append(options["num_stages"])
        return _compiled(arch, shared=20_000 * options["num_stages"])

    monkeypatch.setattr(writing, "compile_kernel", compile_kernel)
    assert writing._fitting.__wrapped__(tactic, "sm_90").shared_bytes == 40_000
    assert asked == [4, 3, 2]
    monkeypatch.setattr(writing, "compile_kernel", lambda *_: _compiled("sm_90", shared=50_000))
    with pytest.raises(ExportError, match="takes 50000 bytes of shared memory, a plugin has 49152"):
        writing._fitting.__wrapped__(tactic, "sm_90")


@triton
def test_what_was_written_can_be_read(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "driver_cuda", lambda: None)
    found = read_table(export / "plugins", (8, 0))
    kernels = found.tactics("Int4Linear fp16 channels=64 outputs=96 block=32")
    assert [kernel.tile for kernel in kernels] == [(64, 64), (32, 32)]
    assert len({kernel.ptx for kernel in kernels}) == 2


@triton
def test_the_python_beside_it_needs_nothing_of_hqc(export: Path) -> None:
    code = "import hqc_qdp, hqc_qdp.nodes, sys; assert not {'hqc', 'torch', 'onnx'} & {*sys.modules}"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; hqc_qdp.register()"],
        cwd=export / "plugins",
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "tensorrt cannot be imported" in done.stderr or "no NVIDIA driver" in done.stderr, done.stderr


@triton
def test_the_digest_of_an_engines_key_covers_kernels_and_python(export: Path) -> None:
    write_manifest(export, "hqc-export", {})
    files = json.loads((export / "manifest.json").read_text(encoding="utf-8"))["files"]
    before = plugins_digest(files)
    for name in ("plugins/plugins.json", "plugins/hqc_qdp/quick.py", next(n for n in files if n.endswith(".ptx"))):
        changed = {**files, name: {**files[name], "sha256": "0" * 64}}
        assert plugins_digest(changed) != before


def test_a_model_without_plugins_gets_no_folder(tmp_path: Path) -> None:
    plain = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    onnx.save(plain, str(tmp_path / "model.onnx"))
    assert write_plugins(tmp_path, tmp_path / "model.onnx") == []
    assert not (tmp_path / "plugins").exists()


def test_nodes_are_read_with_their_sizes_and_types() -> None:
    found = {node.name: node for node in plugin_nodes(model())}
    window = {"kernel": 3, "stride": 1, "padding": 1}
    assert found["site"].attributes == {"block": 32, **window, "out_type": 10, "regular": 0}
    assert found["site"].dims == ((None, 64, 8, 8), (96, 288), (96,), (None,), (96,))
    assert found["site"].types == ("int8", "int8", "fp32", "fp32", "fp32")
    assert found["line.codes"].types == ("fp16", "fp32")
    (bounded,) = plugin_nodes(model(("tokens bounded",)))
    assert (bounded.dims, bounded.types) == (((None, 77, 64), (None, 3)), ("fp16", "fp32"))
    assert bounded.attributes == {"block": 32, "channel_axis": -1, "regular": 0}
    assert sorted(variants_of(list(found.values()))) == [
        "HadamardQuantize fp16 nchw channels=64 block=32 low=-7 high=7",
        "HadamardQuantize fp16 nhwc channels=64 block=32 low=-7 high=7",
        "HadamardQuantize fp16 tokens channels=64 block=32 low=-7 high=7",
        "Int4Conv fp16 channels=64 outputs=96 block=32 kernel=3 stride=1 padding=1",
        "Int4Linear fp16 channels=64 outputs=96 block=32",
    ]


def test_weights_that_tensorrt_would_widen_are_refused() -> None:
    nodes = plugin_nodes(model(weight=np.uint8))
    with pytest.raises(ExportError, match=r"node site, Int4Conv: takes int8, uint8, .* expected int8, int8"):
        variants_of(nodes)


def test_a_node_that_is_no_plugin_is_refused() -> None:
    strange = model(("tokens",))
    strange.graph.node[0].op_type = "Rotate"
    with pytest.raises(ExportError, match=r"node line\.codes, Rotate: is no plugin"):
        plugin_nodes(strange)


def test_a_node_without_an_attribute_or_a_type_is_refused() -> None:
    lacking = model(("tokens",))
    kept = [a for a in lacking.graph.node[0].attribute if a.name != "block"]
    del lacking.graph.node[0].attribute[:]
    lacking.graph.node[0].attribute.extend(kept)
    with pytest.raises(ExportError, match="lacks block"):
        plugin_nodes(lacking)
    untyped = model(("tokens", "linear"))
    untyped.graph.node[1].input[0] = "nothing"
    with pytest.raises(ExportError, match="the type or the sizes of nothing are not known"):
        plugin_nodes(untyped)
