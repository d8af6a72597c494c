"""Every zoo model for TensorRT: each export verifies itself; here is what it must have measured, and written."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from tensorrt_exports import Build, attributes, builder, constants, feeds_of, producers, read, relative
from zoo import PLAIN, ROTATIONS, SHAPES

from hqc.capture import capture_module
from hqc.export import TensorRtOptions, export_program
from hqc.export.lowering import OUTPUT
from hqc.export.ort_session import open_session, run_session
from hqc.export.tensorrt.forms import FLOAT16_MAX, Form
from hqc.export.tensorrt.surgery import structure_problems
from hqc.export.tensorrt.writing import write_tensorrt
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import InputSpec
from hqc.storage import check_manifest

PLUGINS = ("none", "qdp")
# float32 sums of at most 288 terms in another order, through at most 40 layers; given the codes nothing else differs.
EQUAL_CODES = 2e-6
TYPES = onnx.TensorProto
HALF = {"fp16": TYPES.FLOAT16, "bf16": TYPES.BFLOAT16}
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}


@pytest.fixture(scope="session")
def build(captured, quantised, tmp_path_factory) -> Build:
    return builder(captured, quantised, tmp_path_factory.mktemp("tensorrt"))


def check(report, program) -> None:
    figures = report.verification
    exact = figures if report.twin is None else report.twin
    assert exact.network.forced_error <= EQUAL_CODES
    assert len(figures.sites) == len(program.plan.quantised)
    if figures.sites:
        assert sum(site.codes for site in figures.sites) > 0
        # Something was quantised, so that the comparison means something.
        assert figures.network.quantisation_error > 1e-3


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("bits", [None, "w4a4", "w8a8", "w4a3"])
@pytest.mark.parametrize("model", PLAIN)
def test_plain_models(build, model, bits, plugins) -> None:
    program, _, report = build(model, bits, dtype="fp32", plugins=plugins)
    check(report, program)
    assert report.twin is None
    network = report.verification.network
    assert network.free_error <= max(0.1 * (network.quantisation_error or 0), 1e-5)


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("model", PLAIN)
def test_half_precision(build, model, dtype, plugins) -> None:
    """Sites are exact but for the type that a plugin writes; the network is off by roundings, and it is off."""
    program, folder, report = build(model, "w4a4", dtype=dtype, plugins=plugins)
    check(report, program)
    plugged = {layer.site for layer in report.layers if layer.form is Form.INT4_PLUGIN}
    assert bool(plugged) == (plugins == "qdp")
    for site in report.verification.sites:
        assert site.output_error <= 1e-6 + (ROUNDING[dtype] if site.site in plugged else 0), site.site
    assert 0 < report.verification.network.forced_error <= 16 * ROUNDING[dtype]
    kinds = {v.type.tensor_type.elem_type for v in read(folder).graph.value_info}
    assert HALF[dtype] in kinds


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_other_rotations(build, rotation, bits, plugins) -> None:
    one = ROTATIONS[rotation]
    program, folder, report = build("wide_channels", bits, rotation=one, dtype="fp32", plugins=plugins)
    check(report, program)
    assert [(layer.block, layer.kind) for layer in report.layers] == [(p.block, p.rotation) for p in program.plan.sites]
    assert any("times H" in layer.reason for layer in report.layers) is not one.weights
    nodes = [n for n in read(folder).graph.node if n.domain == "hqc"]
    told = {(n.op_type, attributes(n)["block"], attributes(n)["regular"]) for n in nodes}
    if plugins == "none":
        assert not nodes
    for op, block, regular in told:
        back = one.weights and op != "HadamardQuantize"
        assert (block == 1 and regular == 0) if back else (regular == (one.kind == "regular"))
    assert plugins == "none" or {op for op, *_ in told} >= {"HadamardQuantize"}


@pytest.mark.parametrize("by", ["conv", "matmul"])
def test_a_regular_rotation_in_half_precision_either_way(build, by) -> None:
    how = {"image_rotation": by, "token_rotation": by}
    program, _, report = build("wide_channels", "w4a4", rotation=ROTATIONS["regular 64"], dtype="fp16", **how)
    check(report, program)
    assert {layer.rotation for layer in report.layers} == {by}


@pytest.mark.parametrize("rotation", ["regular 64", "regular 64 double"])
def test_weight_only_sites_keep_the_rotation_of_their_weight(build, rotation) -> None:
    """op(x, W) where the codes are of W; op(Ĥ·x, W·Ĥ) where they are of W·Ĥ."""
    options = {"dtype": "fp32", "weight_only": ("left", "right")}
    program, folder, report = build("wide_channels", "w4a4", rotation=ROTATIONS[rotation], **options)
    exact = report.verification if report.twin is None else report.twin
    assert exact.network.forced_error <= EQUAL_CODES
    forms = {layer.site: layer.form for layer in report.layers}
    assert forms["left"] is forms["right"] is Form.INT4_WEIGHT_ONLY
    graph = read(folder).graph
    matrices = {name for name in constants(graph) if name.startswith("hadamard_")}
    rotated = [node for node in graph.node if matrices & set(node.input)]
    assert len(rotated) == 2 + ROTATIONS[rotation].weights, "conv and head, and the one that both read"
    assert program.plan["left"].weight_rotated is ROTATIONS[rotation].weights


@pytest.mark.parametrize(
    "model",
    [pytest.param(name, marks=pytest.mark.long) if name in ("seamless", "odd_sides") else name for name in SHAPES],
)
def test_sizes_edges_and_attention_of_other_shapes(build, model) -> None:
    program, _, report = build(model, "w4a4", dtype="fp32")
    check(report, program)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("cross_attention", {"dtype": "fp16"}),
        pytest.param("unconditional", {"dtype": "fp32", "plugins": "qdp"}, marks=pytest.mark.long),
        ("without_attention", {"dtype": "bf16"}),
    ],
)
def test_unets(build, model, options) -> None:
    program, folder, report = build(model, "w4a4", **options)
    check(report, program)
    forms = Counter(layer.form for layer in report.layers)
    assert forms[Form.INT8_CONV] + forms[Form.INT4_PLUGIN] > 10
    assert forms[Form.INT8_CONV_TWO_DIGITS] > 0  # 8-bit shortcuts
    assert sum(forms.values()) == len(program.plan.sites)
    norms = [n for n in read(folder).graph.node if n.op_type in ("GroupNormalization", "LayerNormalization")]
    assert norms
    assert all(attributes(n).get("stash_type", 1) == TYPES.FLOAT for n in norms)


def test_a_float_model_in_half_precision(build) -> None:
    _, folder, report = build("cross_attention", None, dtype="fp16")
    assert {layer.form for layer in report.layers} == {Form.FLOAT}
    assert 1e-5 < report.verification.network.free_error <= 16 * ROUNDING["fp16"]
    stored = Counter(t.data_type for t in read(folder).graph.initializer if len(t.dims) > 1)
    assert stored[TYPES.FLOAT16] > stored[TYPES.FLOAT]


# ---- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("model", ["geometry", "shared_weights", "odd_channels", "tied_time_embedding"])
def test_structure(build, model, plugins) -> None:
    program, folder, _ = build(model, "w4a4", dtype="fp16", plugins=plugins)
    proto = read(folder)
    assert structure_problems(proto) == []
    imports = {o.domain: o.version for o in proto.opset_import}
    assert imports == ({"": 21} if plugins == "none" else {"": 21, "hqc": 1})
    assert {n.domain for n in proto.graph.node} == imports.keys()
    names = [n.name for n in proto.graph.node]
    assert len(set(names)) == len(names)
    assert all(names)
    functions = [f.name for f in proto.functions]
    used = {n.op_type for n in proto.graph.node if n.domain}
    assert sorted(functions) == sorted(used)
    assert [v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)] == [TYPES.FLOAT] * 3
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input]
    assert dims == [list(spec.shape) for spec in program.inputs]


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
@pytest.mark.parametrize("model", ["geometry", "odd_channels"])
def test_pairs_are_what_tensorrt_builds_to_int8(build, model, bits) -> None:
    """Constant positive scales, zero points of zeros, one for an activation and one a channel for a weight."""
    program, folder, _ = build(model, bits, dtype="fp16")
    graph = read(folder).graph
    stored, made = constants(graph), producers(graph)
    pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len([n for n in pairs if n.op_type == "QuantizeLinear"]) == len(program.plan.quantised)
    for node in pairs:
        scale, zero = (stored[name] for name in node.input[1:])
        assert scale.dtype == np.float32
        assert (scale > 0).all()
        assert zero.dtype == np.int8
        assert not zero.any()
        assert zero.shape == scale.shape
        weight = node.input[0] in stored
        assert scale.ndim == (1 if weight else 0)
        if weight:
            assert stored[node.input[0]].dtype == np.int8
    for node in graph.node:
        if node.op_type in ("Conv", "MatMul") and ".product" in node.name:
            left, right = (made[name] for name in node.input)
            assert left.op_type == right.op_type == "DequantizeLinear"
            axis = 0 if node.op_type == "Conv" else 1
            assert attributes(right)["axis"] == axis
            assert len(node.input) == 2  # the bias stands behind the timestep's scale


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("plugins", PLUGINS)
def test_scale_tables_are_constant_and_float32(build, plugins, dtype) -> None:
    program, folder, _ = build("geometry", "w4a4", dtype=dtype, plugins=plugins)
    graph = read(folder).graph
    stored = constants(graph)
    lookups = [n for n in graph.node if n.op_type == "Gather"]
    assert len(lookups) == 2 * len(program.plan.quantised)
    for node in lookups:
        assert stored[node.input[0]].dtype == np.float32
        assert stored[node.input[0]].shape[0] == len(program.plan.timesteps)


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
@pytest.mark.parametrize("model", ["geometry", "two_sites", "shared_weights"])
def test_static_scales(build, quantised, model, bits) -> None:
    """Powers of two near the table's median; the worst product of dequantised operands stays in float16."""
    program, folder, report = build(model, bits, dtype="fp16")
    graph = read(folder).graph
    stored, made = constants(graph), producers(graph)
    for layer in report.layers:
        table = program.state[f"{layer.site}.activation_scale_table"]
        assert np.log2(layer.static_scale) % 1 == 0
        assert 2**-0.5 <= layer.static_scale / float(table.median()) <= 2**0.5
        top = 2 ** (program.plan[layer.site].activation_bits - 1) - 1
        products = [n for n in graph.node if n.name.startswith(f"{layer.site}.product") and n.op_type != "Add"]
        assert len(products) == (2 if layer.two_digits else 1)
        for product in products:
            weight = made[product.input[1]]
            codes, scale = (stored[name].astype(np.float64) for name in weight.input[:2])
            rows = codes.reshape(len(codes), -1) if product.op_type == "Conv" else codes.T
            worst = (np.abs(rows).sum(1) * scale).max() * top * layer.static_scale
            assert 0 < worst <= FLOAT16_MAX / 2
            assert layer.overflow_margin <= FLOAT16_MAX / worst * 1.001


def test_plugin_nodes_carry_numbers_and_two_names(build) -> None:
    _, folder, report = build("geometry", "w4a4", dtype="fp16", plugins="qdp")
    proto = read(folder)
    nodes = [n for n in proto.graph.node if n.domain == "hqc"]
    assert Counter(n.op_type for n in nodes) == {"HadamardQuantize": 5, "Int4Conv": 1, "Int4Linear": 1}
    own = {
        "HadamardQuantize": {"block", "low", "high", "channel_axis", "regular"},
        "Int4Linear": {"block", "out_type", "regular"},
        "Int4Conv": {"block", "kernel", "stride", "padding", "out_type", "regular"},
    }
    for node in nodes:
        values = attributes(node)
        names = {key: values.pop(key) for key in ("plugin_namespace", "plugin_version")}
        assert names == {"plugin_namespace": b"hqc", "plugin_version": b"1"}
        assert values.pop("aot") == 1
        assert values.keys() == own[node.op_type]
        assert all(isinstance(value, int) for value in values.values())
        assert values.get("out_type", TYPES.FLOAT16) == TYPES.FLOAT16
    for function in proto.functions:
        assert set(function.attribute) == own[function.name] | {"plugin_namespace", "plugin_version", "aot"}
    packed = {t.name: t for t in proto.graph.initializer if t.name.endswith("weight_packed_rows")}
    assert {(t.data_type, tuple(t.dims)) for t in packed.values()} == {(TYPES.INT8, (32, 144)), (TYPES.INT8, (8, 8))}
    assert [layer.weight_bits_stored for layer in report.layers] == [4, 8, 8, 8, 4]


@pytest.mark.parametrize("plugins", PLUGINS)
def test_sites_that_read_one_tensor_share_its_codes(build, captured, quantised, tmp_path, plugins) -> None:
    """Where their scales are equal, which they are after calibration."""
    program, apart, _ = build("shared_input", "w4a4", dtype="fp32", plugins=plugins)
    table = program.state["to_q.activation_scale_table"]
    state = {n: table if n.endswith("activation_scale_table") else t for n, t in program.state.items()}
    options = TensorRtOptions(dtype="fp32", plugins=plugins, plugin_archs=())
    export_program(program.evolve(state=state), "tensorrt", tmp_path / "x", tensorrt=options)
    counts = [Counter(n.op_type for n in read(folder).graph.node) for folder in (apart, tmp_path / "x")]
    assert [c["QuantizeLinear"] + c["HadamardQuantize"] for c in counts] == [3, 1]


def test_report_and_manifest(build) -> None:
    program, folder, report = build("geometry", "w8a8", dtype="bf16", plugins="qdp")
    manifest = check_manifest(folder, "hqc-export")
    assert set(manifest["files"]) == {"model.onnx", "plan.json", "report.json"}
    assert manifest["target"] == "tensorrt"
    assert manifest["tensorrt"]["dtype"] == "bf16"
    data = json.loads((folder / "report.json").read_text())
    assert data["options"] == manifest["tensorrt"]
    assert [layer["site"] for layer in data["layers"]] == [plan.site for plan in program.plan.sites]
    assert all(layer["reason"] for layer in data["layers"])
    assert sum(data["forms"].values()) == len(program.plan.sites)
    assert any("sm_75 to sm_89" in line for line in data["hardware"])
    assert data["float32_twin"]["network"]["forced_error"] <= EQUAL_CODES
    assert "int8 conv, two digits" in str(report)


# ---- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_batch_may_mix_timesteps(build, dtype, plugins) -> None:
    """Each sample has its own timestep's scale, alone or in a batch; one timestep for all gives another result."""
    program, folder, _ = build("two_sites", "w4a4", dtype=dtype, plugins=plugins)
    session, feeds = open_session(folder / "model.onnx", threads=1), feeds_of(program, 8)
    assert len(set(feeds["timestep"])) == 4
    together = session.run([OUTPUT], feeds)[0]
    alone = [session.run([OUTPUT], {n: a[i : i + 1] for n, a in feeds.items()})[0] for i in range(8)]
    assert np.array_equal(together, np.concatenate(alone))
    same = session.run([OUTPUT], feeds | {"timestep": np.full(8, feeds["timestep"][0])})[0]
    assert relative(same, together) > 1e-2
    wanted = program.module()(*(torch.from_numpy(a) for a in feeds.values())).numpy()
    # float32: the same codes, sums in another order; float16: a code in a thousand is another, a tenth of the noise.
    assert relative(together, wanted) <= (1e-6 if dtype == "fp32" else 5e-2)


@pytest.mark.parametrize("plugins", PLUGINS)
def test_one_timestep_a_call(build, plugins) -> None:
    program, folder, report = build("tied_time_embedding", "w4a4", dtype="fp32", plugins=plugins, one_timestep=True)
    check(report, program)
    session, feeds = open_session(folder / "model.onnx", threads=1), feeds_of(program, 8)
    assert session.get_inputs()[1].shape == [1]
    each = open_session(
        build("tied_time_embedding", "w4a4", dtype="fp32", plugins=plugins)[1] / "model.onnx", threads=1
    )
    found, wanted = (run_session(s, [OUTPUT], feeds)[0] for s in (session, each))
    assert relative(found, wanted) <= 1e-6


@pytest.mark.parametrize("rotation", ["conv", "matmul"])
def test_rotations_agree(build, rotation) -> None:
    """Images and tokens, each either way: the same codes but at a boundary, and the operators that were asked for."""
    _, folder, report = build("two_sites", "w4a4", dtype="fp32", image_rotation=rotation, token_rotation=rotation)
    assert {layer.rotation for layer in report.layers} == {rotation}
    kinds = {n.op_type for n in read(folder).graph.node if ".rotated" in n.name}
    assert kinds == {"Conv" if rotation == "conv" else "MatMul"}
    program, other, _ = build("two_sites", "w4a4", dtype="fp32")
    feeds = feeds_of(program, 8)
    found, wanted = (open_session(f / "model.onnx", threads=1).run([OUTPUT], feeds)[0] for f in (folder, other))
    assert relative(found, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize(("model", "bits"), [("shared_input", "w4a4"), ("two_sites", "w8a8"), ("geometry", "w4a4")])
def test_reference_evaluator_agrees(build, model, bits, plugins, dtype) -> None:
    """Another implementation of the same file; in float32 it rounds to the same codes, in float16 to nearly all."""
    program, folder, report = build(model, bits, dtype=dtype, plugins=plugins)
    feeds = feeds_of(program, 2)
    found = ReferenceEvaluator(read(folder)).run([OUTPUT], feeds)[0]
    wanted = program.module()(*(torch.from_numpy(a) for a in feeds.values())).numpy()
    noise = report.verification.network.quantisation_error
    assert relative(found, wanted) <= (1e-5 if dtype == "fp32" else noise)
    assert noise > 1e-3


@pytest.mark.slow
def test_digits(captured, tmp_path) -> None:
    import hqc

    program = captured("digits")
    few = {"sampler.num_inference_steps": 2, "calibrate_activations.samples": 2}
    student = hqc.ptq(program, "rtn", "w4a4", hadamard=True, settings=few)
    # Int8 products of UNets are verified above: here the file is written, to be counted and weighed.
    options = {"opset": 21, "one_timestep": False, "external_data_bytes": 2**31}
    plain = write_tensorrt(student, tmp_path, TensorRtOptions(dtype="fp32"), **options)
    assert Counter(layer.form for layer in plain.forms) == {
        Form.INT8_CONV: 34,
        Form.INT8_CONV_TWO_DIGITS: 10,
        Form.INT8_GEMM: 45,
    }
    options = TensorRtOptions(plugins="qdp", plugin_archs=())
    plugged = export_program(
        student, "tensorrt", tmp_path / "x", float_program=program, verify_batch=2, tensorrt=options
    )
    assert Counter(layer.form for layer in plugged.layers)[Form.INT4_PLUGIN] == 75
    assert plugged.size_bytes < 0.6 * plain.path.stat().st_size
    assert plugged.twin.network.forced_error <= EQUAL_CODES
    assert plugged.verification.network.free_error < plugged.verification.network.quantisation_error


class _SharedView(torch.nn.Module):
    """One view of a layer's result is read as heads, in half precision, and by the rotation in front of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        tokens = self.first(sample * (1 + timestep.view(-1, 1, 1) / 1000))
        heads = torch.tanh(tokens.view(-1, 4, 2, 32))
        return self.second(tokens) + heads.flatten(2)


def test_a_shared_view_is_as_precise_as_a_quantiser_needs(tmp_path) -> None:
    """Else the quantiser reads what half precision has rounded, and codes differ away from any boundary."""
    torch.manual_seed(3)
    program = capture_module(_SharedView(), (InputSpec("sample", ("N", 4, 64)), InputSpec("timestep", ("N",))))
    program = run_pipeline(program, [SelectLayers(bits="w8a8", rules="all"), InsertHadamard(), InsertQdq((0.0, 500.0))])
    assert len(program.plan.quantised) == 2
    state = {k: t * 0.02 if k.endswith("activation_scale_table") else t for k, t in program.state.items()}
    report = export_program(program.evolve(state=state), "tensorrt", tmp_path / "x")
    assert all(site.output_error <= 1e-6 for site in report.verification.sites)
    assert sum(site.flipped for site in report.verification.sites) == 0
