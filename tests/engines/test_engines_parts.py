"""The parts of a build that need no builder: architectures, profiles, the ONNX side, layer lists, keys."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import engine_graphs as graphs
import onnx
import pytest
from onnx import TensorProto, helper

from hqc.engines import BatchProfile, BuildOptions, engine_key
from hqc.engines.architectures import DEFAULT, KNOWN, RTX, arch_name, capability, check_rtx, parse_archs
from hqc.engines.builders import find_builder, package_version
from hqc.engines.cache import timing_cache
from hqc.engines.key import onnx_digest, plugins_digest
from hqc.engines.layers import EngineLayer, LayerTensor, coverage, engine_layers
from hqc.engines.network import Product, read_network, site_of
from hqc.engines.record import engine_name
from hqc.errors import ArtefactError, ExportError

# ---- architectures and profiles ------------------------------------------------------------------------------------


def test_architectures() -> None:
    assert parse_archs(" sm_80,SM_120, sm_80 ,") == ("sm_80", "sm_120")
    assert all(arch_name(capability(arch)) == arch for arch in KNOWN)
    assert capability("sm_103") == (10, 3)
    assert set(DEFAULT) < set(RTX) < set(KNOWN)
    assert engine_name("rtx", "sm_80") == "rtx_sm80"


@pytest.mark.parametrize("text", ["", " , "])
def test_no_architecture(text: str) -> None:
    with pytest.raises(ExportError, match="--arch: names no architecture"):
        parse_archs(text)


def test_unknown_architectures_are_named_together() -> None:
    with pytest.raises(ExportError, match=r"architecture sm_81, gtx: is not known\. Give some of sm_75, sm_80"):
        parse_archs("sm_80,sm_81,gtx")


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_87"])
def test_what_rtx_does_not_build_for(arch: str) -> None:
    with pytest.raises(ExportError, match=rf"{arch} \(\w+: .*TensorRT-RTX builds for sm_75, .*--engine trt"):
        check_rtx(("sm_80", arch))


def test_profiles() -> None:
    assert BatchProfile.of(1, None, 8) == BatchProfile(1, 2, 8) == BatchProfile()
    assert BatchProfile.of(1, None, 1) == BatchProfile(1, 1, 1)
    assert BatchProfile.of(4, None, 8) == BatchProfile(4, 4, 8)
    assert BatchProfile.of(1, 6, 8).opt == 6


@pytest.mark.parametrize(("low", "opt", "high"), [(0, 1, 2), (3, 2, 4), (1, 5, 4), (4, None, 2)])
def test_no_profile(low: int, opt: int | None, high: int) -> None:
    with pytest.raises(ExportError, match=r"profile of batches .*: is no range; expected 1 ≤ min ≤ opt ≤ max"):
        BatchProfile.of(low, opt, high)


def test_unknown_builder() -> None:
    with pytest.raises(ExportError, match=r"builder 'tvm': is not known\. Give rtx or trt"):
        find_builder("tvm")
    assert package_version("no-such-distribution-anywhere") is None


# ---- the ONNX side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        pytest.param(
            lambda: graphs.conv_model(digits=2),
            [(f"{graphs.CONV}.{i}/Conv", "Conv", "int8", "int8", f"{graphs.CONV}.weight_q_{i}") for i in range(2)],
            id="two digits",
        ),
        pytest.param(
            graphs.linear_model,
            [(f"{graphs.LINEAR}/MatMul", "MatMul", "int8", "int8", f"{graphs.LINEAR}.weight_q")],
            id="linear",
        ),
        pytest.param(
            lambda: graphs.linear_model(int4=True),
            [(f"{graphs.LINEAR}/MatMul", "MatMul", "float", "int4", f"{graphs.LINEAR}.q")],
            id="weight-only",
        ),
        pytest.param(graphs.integer_conv_model, [], id="no Q/DQ form"),
    ],
)
def test_products(tmp_path, make: Callable[[], onnx.ModelProto], wanted: list[tuple[str, ...]]) -> None:  # type: ignore[no-untyped-def]
    onnx.save(make(), tmp_path / "m.onnx")
    network = read_network(tmp_path / "m.onnx")
    assert [dataclasses.astuple(product) for product in network.products] == wanted
    assert network.opset == 21
    assert network.producer == "hqc"
    assert network.plugins == network.data_files == ()


def test_codes_are_found_behind_moves_and_casts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """INT4 codes cast to int8 and transposed, int8 codes transposed after dequantising, a type given by attribute."""
    g = graphs.Graph()
    g.initializers.append(helper.make_tensor("w4", TensorProto.INT4, [4, 6], [1] * 24))
    scale = g.weight("s", graphs.hadamard(1)[0, 0])
    wide = g.op("Transpose", g.op("Cast", "w4", name="w8", to=TensorProto.INT8), name="w8t", perm=[1, 0])
    weight = g.op("DequantizeLinear", wide, scale, name="w")
    codes = g.op("QuantizeLinear", "x", scale, name="q", output_dtype=TensorProto.INT8)
    real = g.op("Transpose", g.op("DequantizeLinear", codes, scale, name="d"), name="dt", perm=[0, 1])
    g.op("MatMul", real, weight, name="y")
    onnx.save(g.model([("x", TensorProto.FLOAT, ["N", 6])], ("y", TensorProto.FLOAT, ["N", 4])), tmp_path / "m.onnx")
    assert read_network(tmp_path / "m.onnx").products == (Product("y/MatMul", "MatMul", "int8", "int8", "w4"),)


def test_sites_by_the_longest_name() -> None:
    sites = ("a.to_q", "a.to_q@2", "a", "b.conv", "b.conv_shortcut")
    assert site_of("a.to_q@2.codes/QuantizeLinear", sites) == "a.to_q@2"
    assert site_of("a.to_q_1/MatMul", sites) == "a.to_q"
    assert site_of("b.conv_shortcut/Conv", sites) == "b.conv_shortcut"
    assert site_of("b.convolved/Conv", sites) == ""
    assert site_of("", sites) == ""


# ---- layer lists ---------------------------------------------------------------------------------------------------

LOG = """Layers:
Name: c/Conv_myl0_4, LayerType: correlation, Inputs: [ { Name: q, Dimensions: [-1,64,8,8], Strides: [4096,1,512,64], \
StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], Constants: [ { Name: k, Dimensions: \
[64,64,3,3], Strides: [576,1,192,64], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }, \
{ Name: s, Dimensions: [], Datatype: Float, Format: Row major linear format }], Outputs: [ { Name: y, Dimensions: \
[-1,64,8,8], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: t, StreamId: 0, Metadata: \
[ONNX Layer: c/Conv]\x1f[ONNX Layer: c.real/DequantizeLinear]\x1f[ONNX Layer: other[0]/Conv]
Name: wait_5, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , EventId: 1, Metadata:\x20

I/O Tensors:
 Name: x, IOMode: Input, DataType: Half, Dimensions: [-1,64,8,8]
"""

INSPECTOR = """Layers:
Name: c/Conv + act, LayerType: CaskConvolution, Inputs: [ { Name: q, Location: Device, Dimensions: [2,64,8,8], \
Format/Datatype: Thirty-two wide channel vectorized row major INT8 format }], Outputs: [ { Name: y, Location: Device, \
Dimensions: [2,64,8,8], Format/Datatype: Row major linear FP16 format }], ParameterType: Convolution, Kernel: [3,3], \
Weights: {"Type": "Int8", "Count": 36864}, TacticName: t, StreamId: 0, Metadata: [ONNX Layer: c/Conv]\x1e[ONNX Layer: a]

Bindings:
x
"""


def test_the_log_of_tensorrt_rtx() -> None:
    layer, wait = engine_layers(LOG, ["c"])
    assert (layer.name, layer.kind, layer.sites) == ("c/Conv_myl0_4", "correlation", ("c",))
    assert layer.nodes == ("c/Conv", "c.real/DequantizeLinear", "other[0]/Conv")
    assert layer.inputs == (LayerTensor("q", "Int8", "NHWC", (-1, 64, 8, 8)),)
    assert [str(tensor) for tensor in layer.constants] == [
        "Int8 NHWC [64,64,3,3]",
        "Float Row major linear format []",
    ]
    assert layer.outputs[0].dtype == "Float"
    assert (wait.kind, wait.inputs, wait.nodes) == ("wait", (), ())
    assert coverage((layer, wait), [Product("c/Conv", "Conv", "int8", "int8")]).int8 == 1


def test_a_product_belongs_to_the_site_of_its_weight() -> None:
    products = [Product("c/Conv", "Conv", "int8", "int8", "down.conv1.weight_int8")]
    layer, _ = engine_layers(LOG, ["down.conv1", "other"], products)
    assert layer.sites == ("down.conv1",)


def test_the_other_form_of_tensorrt() -> None:
    """As NVIDIA's documentation shows the inspector's one-line form; TensorRT itself was not at hand."""
    (layer,) = engine_layers(INSPECTOR, ["c"])
    assert (layer.name, layer.kind) == ("c/Conv + act", "CaskConvolution")
    assert layer.nodes == ("c/Conv", "a")
    assert (layer.inputs[0].dtype, layer.outputs[0].dtype) == ("Int8", "Half")
    assert layer.inputs[0].shape == (2, 64, 8, 8)


@pytest.mark.parametrize("text", ["", "no list", "Layers:", "Layers:\n", "Layers:\n\nI/O Tensors:\n"])
def test_no_layer_list_is_an_error(text: str) -> None:
    with pytest.raises(ExportError, match="the builder's layer list: is missing"):
        engine_layers(text)


def test_a_list_in_another_form_is_an_error() -> None:
    with pytest.raises(ExportError, match="has a line that hqc cannot read: 'Layer\\(conv\\): c'"):
        engine_layers("Layers:\nLayer(conv): c")


def _kernel(kind: str, inputs: str, constants: str, *nodes: str) -> EngineLayer:
    def tensors(types: str) -> tuple[LayerTensor, ...]:
        return tuple(LayerTensor("t", dtype, "Linear", ()) for dtype in types.split())

    return EngineLayer(f"{kind}_0", kind, tensors(inputs), tensors(constants), (), nodes)


@pytest.mark.parametrize(
    ("kernels", "why"),
    [
        pytest.param([_kernel("gemm", "Int8", "Int8 Float", "p")], "", id="int8"),
        pytest.param([_kernel("gemm", "Int8 Int8", "Float", "p")], "", id="weight computed before"),
        pytest.param([_kernel("gemm", "Int8", "Int8", "p"), _kernel("kgen", "Float", "", "p")], "", id="epilogue"),
        pytest.param([_kernel("gemm", "Int8", "Float", "p")], "gemm kernel gemm_0 reads Int8, Float", id="weight"),
        pytest.param([_kernel("gemm", "Half", "Int8 Int8", "p")], "reads Half, Int8, Int8", id="activations"),
        pytest.param([_kernel("gemm", "Float", "Float", "p"), _kernel("kgen", "", "", "p")], "gemm_0", id="float"),
        pytest.param([_kernel("kgen", "", "", "p")], "kgen kernel kgen_0 reads nothing", id="nothing"),
        pytest.param([_kernel("gemm", "Int8", "Int8", "q")], "no kernel names it", id="not there"),
        pytest.param([_kernel("PluginV3", "Int8", "", "p")], "", id="plugin"),
        pytest.param([_kernel("PluginV3", "Half", "", "p")], "reads Half", id="plugin in float"),
    ],
)
def test_exceptions(kernels: list[EngineLayer], why: str) -> None:
    found = coverage(kernels, [Product("p", "MatMul", "int8", "int8", "a.weight")])
    assert found.products == 1
    assert found.int8 == (0 if why else 1)
    assert len(found.exceptions) == (1 if why else 0)
    assert all(weight == "a.weight" and why in said for weight, said in found.exceptions)
    assert found.to_dict()["quantised_products"] == 1


def test_products_of_plugins(tmp_path: Path) -> None:
    model = graphs.plugin_model()
    names = ["q", "w4", "scale", "scales", "bias"]
    model.graph.node.append(
        onnx.helper.make_node("Int4Linear", names, ["unused too"], name="l/Int4Linear", domain="hqc")
    )
    onnx.save(model, tmp_path / "m.onnx")
    network = read_network(tmp_path / "m.onnx")
    assert network.plugins == ("HadamardQuantize", "Int4Linear")
    assert network.products[-1] == Product("l/Int4Linear", "Int4Linear", "int8", "int4", "w4")


# ---- keys ----------------------------------------------------------------------------------------------------------

KEY = {
    "onnx": "a" * 64,
    "builder": "trt",
    "builder_version": "10.16.1.11",
    "compute_capability": (9, 0),
    "options": BuildOptions(),
    "plugins": "b" * 64,
}


@pytest.mark.parametrize(
    "change",
    [
        {"onnx": "c" * 64},
        {"builder": "rtx"},
        {"builder_version": "10.16.1.12"},
        {"compute_capability": (8, 9)},
        {"options": BuildOptions(BatchProfile(1, 2, 4))},
        {"options": BuildOptions(BatchProfile(1, 1, 8))},
        {"options": BuildOptions(workspace_bytes=1)},
        {"options": BuildOptions(tf32=False)},
        {"plugins": ""},
    ],
    ids=str,
)
def test_whatever_an_engine_depends_on_changes_its_key(change: dict[str, object]) -> None:
    assert engine_key(**KEY) == engine_key(**KEY)  # type: ignore[arg-type]
    assert engine_key(**KEY) != engine_key(**{**KEY, **change})  # type: ignore[arg-type]


def test_the_version_of_hqc_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine_key(**KEY)  # type: ignore[arg-type]
    monkeypatch.setattr("hqc.engines.key.__version__", "9.9")
    assert engine_key(**KEY) != before  # type: ignore[arg-type]


def test_digests() -> None:
    files = {name: {"sha256": name * 2} for name in ("model.onnx", "model.onnx.data", "plugins/a.ptx", "plan.json")}
    both = onnx_digest(files, "model.onnx", "model.onnx.data")
    assert both == onnx_digest(files, "model.onnx.data", "model.onnx")
    assert both != onnx_digest(files, "model.onnx")
    changed = {**files, "model.onnx.data": {"sha256": "x"}}
    assert onnx_digest(changed, "model.onnx", "model.onnx.data") != both
    with pytest.raises(ArtefactError, match="does not list other"):
        onnx_digest(files, "other")
    assert plugins_digest({"plan.json": files["plan.json"]}) == ""
    assert plugins_digest(files) != plugins_digest({**files, "plugins/b.ptx": {"sha256": "y"}})


def test_timings_of_other_plugins_are_kept_apart(tmp_path: Path) -> None:
    places = {timing_cache(tmp_path, "sm_90", "10.16", plugins) for plugins in ("", "a" * 64, "b" * 64)}
    assert len(places) == 3
    assert timing_cache(tmp_path, "sm_90", "10.16") in places
