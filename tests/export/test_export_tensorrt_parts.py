"""The parts of the TensorRT export against int64, torch and doctored programs; faults that verification must find."""

import dataclasses
import sys

import numpy as np
import onnx
import pytest
import torch
from integer_oracle import conv, rotated
from onnx.reference import ReferenceEvaluator
from tensorrt_exports import Build, attributes, builder, constants, feeds_of, producers, read, relative

from hqc.errors import ArtefactError, ExportError, RuntimeMissingError
from hqc.export import TensorRtOptions, export_program
from hqc.export.lowering import OUTPUT
from hqc.export.ort_session import open_session
from hqc.export.prepare import prepare
from hqc.export.tensorrt.emulation import write_emulated
from hqc.export.tensorrt.forms import Form
from hqc.export.tensorrt.functions import PLUGIN_ATTRIBUTES, PLUGIN_NODES, plugin_functions
from hqc.export.tensorrt.precision import full_precision_nodes
from hqc.export.tensorrt.surgery import structure_problems
from hqc.export.tensorrt.weights import int8_digits
from hqc.export.tensorrt.writing import reference_program, verify_tensorrt, write_tensorrt
from hqc.export.watched import WatchedModel, heard
from hqc.ops import hadamard, pack_int4, rotate_codes
from hqc.passes import FreezeIntegers, MergeLora
from hqc.pipeline import run_pipeline
from hqc.program import is_op
from hqc.runtimes import load
from hqc.sites import quantised_sites

PLUGINS = ("none", "qdp")
TYPES = onnx.TensorProto
ops = torch.ops.hqc


@pytest.fixture(scope="module")
def build(captured, quantised, tmp_path_factory) -> Build:
    return builder(captured, quantised, tmp_path_factory.mktemp("tensorrt"))


def written(program, folder, **options):
    chosen = TensorRtOptions(**options, plugin_archs=())
    return (
        write_tensorrt(program, folder, chosen, opset=21, one_timestep=False, external_data_bytes=2**28),
        chosen,
    )


# ---- sites against int64 -------------------------------------------------------------------------------------------


def oracle(prepared, site, codes, row) -> np.ndarray:
    """y = acc·s_w·s_a + bias with acc in int64, everything else in float64."""
    plan, state, layer = prepared.plan[site.site], prepared.state, site.layer
    weight = rotated(state[f"{site.site}.weight_codes"].numpy(), plan.block)
    product = site.products[0].node
    if is_op(product, ops.int_conv2d.default):
        acc, channel = conv(codes, weight, *product.args[2:5]), (1, -1, 1, 1)
    else:
        acc, channel = codes.astype(np.int64) @ weight.T, (-1,)
    scale = state[str(layer.args[2].target)].double().numpy().reshape(channel)
    sample = state[f"{site.site}.activation_scale_table"].double().numpy()[row].reshape(-1, *[1] * (acc.ndim - 1))
    y = acc * scale * sample
    return y if layer.args[3] is None else y + state[str(layer.args[3].target)].double().numpy().reshape(channel)


def assert_sites_equal_int64(program, folder, sample=None, *, levels=2, **options) -> list[np.ndarray]:
    model, _ = written(program, folder, dtype="fp32", **options)
    prepared = prepare(program, "tensorrt")
    feeds = feeds_of(program, 4) | ({} if sample is None else {"sample": sample})
    row = np.abs(feeds["timestep"][:, None] - np.array(prepared.plan.timesteps)[None]).argmin(1)
    assert len(set(row)) > 1
    names = {n for tap in model.taps.values() for n in (tap.codes.name, tap.output.name)}
    with WatchedModel(model.path, list(model.taps.values())) as watched:
        values = watched.run(names, feeds)
    found = []
    for site in quantised_sites(prepared):
        tap = model.taps[site.site]
        codes = heard(tap.codes, values).numpy().astype(np.int64)
        assert len(np.unique(codes)) >= levels
        found.append(codes)
        wanted = oracle(prepared, site, codes, row)
        # float32 sums of up to 288 products; an error of saturation would be a percent and more.
        assert relative(heard(tap.output, values).numpy(), wanted) <= 1e-6, site.site
    return found


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("bits", ["w4a4", "w8a8", "w2a2"])
@pytest.mark.parametrize("model", ["two_sites", "odd_channels", "geometry"])
def test_every_site_equals_int64(quantised, tmp_path, model, bits, plugins) -> None:
    assert_sites_equal_int64(quantised(model, bits), tmp_path, plugins=plugins)


@pytest.mark.parametrize("pattern", [127, -128], ids=["largest", "smallest"])
@pytest.mark.parametrize("model", ["two_sites", "odd_channels", "shared_input"])
def test_eight_bit_products_do_not_saturate(quantised, tmp_path, model, pattern) -> None:
    """All codes at their largest: ONNX Runtime's own 8-bit kernels lose up to a fifth of this without VNNI."""
    program = run_pipeline(quantised(model, "w8a8"), [MergeLora(), FreezeIntegers()])
    state = {
        name: torch.full_like(tensor, pattern) if name.endswith("weight_codes") else tensor
        for name, tensor in program.state.items()
    }
    block = next(iter(program.plan.quantised)).block
    sample = np.zeros((4, *program.inputs[0].shape[1:]), dtype=np.float32)
    # A peak a block rotates to a constant vector: all codes at the limit.
    sample[:, ::block] = 1e4
    codes = assert_sites_equal_int64(program.evolve(state=state), tmp_path, sample, levels=1)
    assert (np.abs(codes[0]) == 127).mean() > 0.9


def test_sessions_run_pairs_as_written(build) -> None:
    _, folder, _ = build("two_sites", "w8a8", dtype="fp32")
    options = open_session(folder / "model.onnx", threads=1).get_session_options()
    for key, value in (
        ("session.disable_quant_qdq", "1"),
        ("session.x64quantprecision", "1"),
        ("session.qdq_matmulnbits_accuracy_level", "0"),
    ):
        assert options.get_session_config_entry(key) == value


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "count"), [(-128, 127, 1), (-128, 128, 2), (-256, 254, 2), (-257, 0, 2), (-32_896, 32_639, 2)]
)
def test_digits_are_exact(low, high, count) -> None:
    total = torch.arange(low, high + 1, dtype=torch.int32)
    digits = int8_digits(total, "x")
    assert len(digits) == count
    assert all(digit.codes.dtype == torch.int8 for digit in digits)
    assert torch.equal(sum(digit.codes.to(torch.int32) * digit.factor for digit in digits), total)


@pytest.mark.parametrize("outlier", [-32_897, 32_640])
def test_weights_past_two_digits_are_refused(outlier) -> None:
    with pytest.raises(ExportError, match=r"site x: its weight codes span .*, past two int8 digits"):
        int8_digits(torch.tensor([0, outlier], dtype=torch.int32), "x")


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
def test_integer_programs_export_the_same(quantised, build, tmp_path, bits, plugins) -> None:
    """Digits that x86 needs are summed up again; packed codes are unpacked: the weights are those of the fake one."""
    program, folder, _ = build("odd_channels", bits, dtype="fp32", plugins=plugins)
    integer = prepare(quantised("odd_channels", bits), "onnxruntime")
    export_program(
        integer, "tensorrt", tmp_path / "x", tensorrt=TensorRtOptions(dtype="fp32", plugins=plugins, plugin_archs=())
    )
    left, right = (constants(read(f).graph) for f in (folder, tmp_path / "x"))
    weights = [name for name in left if ".weight_" in name]
    assert weights
    assert all(np.array_equal(left[name], right[name]) for name in weights)
    feeds = feeds_of(program, 4)
    found, wanted = (
        open_session(f / "model.onnx", threads=1).run([OUTPUT], feeds)[0] for f in (tmp_path / "x", folder)
    )
    assert np.array_equal(found, wanted)


# ---- plugin bodies -------------------------------------------------------------------------------------------------


def call(name: str, inputs: dict[str, np.ndarray], kind: int, **attribute: int) -> np.ndarray:
    """A plugin node on its own, by its body, in ONNX Runtime and in ONNX's reference: the same."""
    values = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in inputs.items()
    ]
    node = onnx.helper.make_node(name, list(inputs), ["y"], domain="hqc", **PLUGIN_ATTRIBUTES, **attribute)
    graph = onnx.helper.make_graph([node], "g", values, [onnx.helper.make_tensor_value_info("y", kind, None)])
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("hqc", 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    for function in plugin_functions({name}, 21):
        model.functions.append(onnx_function(function))
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, inputs)[0]
    reference = np.asarray(ReferenceEvaluator(model).run(None, inputs)[0])
    assert found.dtype == reference.dtype
    if found.dtype == np.int8:
        assert (found != reference).mean() <= 1e-3  # a level on a rounding boundary
    else:
        assert relative(found.astype(np.float64), reference.astype(np.float64)) <= 1e-3
    return found


def onnx_function(function) -> onnx.FunctionProto:
    import onnx_ir as ir

    return ir.serde.serialize_function(function)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("block", "regular"), [(1, 0), (8, 0), (32, 0), (256, 0), (16, 1), (32, 1), (64, 1), (256, 1)])
@pytest.mark.parametrize("shape", [(3, 256), (2, 5, 256), (2, 256, 3, 2)], ids=str)
def test_hadamard_quantize_body(shape, block, regular, dtype) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal(shape).astype(dtype)
    inverse = np.linspace(2, 6, shape[0]).astype(np.float32)
    axis = 1 if len(shape) == 4 else -1
    numbers = {"block": block, "low": -7, "high": 5, "channel_axis": axis, "regular": regular}
    found = call("HadamardQuantize", {"x": x, "inv_scale": inverse}, TYPES.INT8, **numbers)
    real = torch.from_numpy(x).float()
    levels = (hadamard(real, block, axis, bool(regular)) if block > 1 else real) * torch.from_numpy(inverse).view(
        -1, *[1] * (x.ndim - 1)
    )
    wanted = levels.round().clamp(-7, 5)
    assert (torch.from_numpy(found).float() != wanted).float().mean() <= 1e-3  # on a rounding boundary
    assert set(np.unique(found)) == set(range(-7, 6))


@pytest.mark.parametrize(("block", "regular"), [(1, 0), (32, 0), (64, 1)])
@pytest.mark.parametrize("shape", [(3, 256), (3, 5, 256), (3, 256, 3, 2)], ids=str)
def test_hadamard_quantize_bounded_body(shape, block, regular) -> None:
    """Every sample is clipped to its own codes."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    step = np.array([[4, -15, 0], [5, -3, 12], [6, 0, 15]], np.float32)
    axis = 1 if len(shape) == 4 else -1
    numbers = {"block": block, "channel_axis": axis, "regular": regular}
    found = call("HadamardQuantizeBounded", {"x": x, "step": step}, TYPES.INT8, **numbers)
    real = torch.from_numpy(x)
    turned = hadamard(real, block, axis, bool(regular)) if block > 1 else real
    for codes, values, (inverse, low, high) in zip(found, turned, step, strict=True):
        wanted = (values * inverse).round().clamp(low, high)
        assert (torch.from_numpy(codes).float() != wanted).float().mean() <= 2e-3  # on a rounding boundary
        assert (codes.min(), codes.max()) == (wanted.min(), wanted.max())


@pytest.mark.parametrize("out", [TYPES.FLOAT, TYPES.FLOAT16])
@pytest.mark.parametrize(("block", "regular"), [(1, 0), (16, 0), (16, 1), (32, 1)])
@pytest.mark.parametrize("leading", [(3,), (2, 5)], ids=str)
def test_int4_linear_body(leading, block, regular, out) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, 32), generator=generator, dtype=torch.int8)
    q = torch.randint(-7, 8, (*leading, 32), generator=generator, dtype=torch.int8)
    scale_w, scale_a, bias = torch.rand(6), torch.rand(leading[0]), torch.rand(6)
    packed = pack_int4(codes).view(6, 16).numpy().view(np.int8)
    inputs = {"q": q, "weight": packed, "scale_w": scale_w, "scale_a": scale_a, "bias": bias}
    numbers = {"block": block, "out_type": out, "regular": regular}
    found = call("Int4Linear", {n: np.asarray(a) for n, a in inputs.items()}, out, **numbers)
    weight = rotate_codes(codes, block, bool(regular)).double() if block > 1 else codes.double()
    acc = q.double() @ weight.T
    wanted = acc * scale_w * scale_a.view(-1, *[1] * len(leading)) + bias
    assert relative(found.astype(np.float64), wanted.numpy()) <= (1e-6 if out == TYPES.FLOAT else 5e-4)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize(("block", "regular"), [(1, 0), (8, 0), (16, 1)])
def test_int4_conv_body(kernel, stride, padding, block, regular) -> None:
    """Weights lie as kh, kw, C; the window is square; odd sizes end where torch ends."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (5, 16, kernel, kernel), generator=generator, dtype=torch.int8)
    q = torch.randint(-7, 8, (2, 16, 7, 6), generator=generator, dtype=torch.int8)
    scale_w, scale_a, bias = torch.rand(5), torch.rand(2), torch.rand(5)
    packed = pack_int4(codes.permute(0, 2, 3, 1).contiguous()).view(5, -1).numpy().view(np.int8)
    inputs = {"q": q, "weight": packed, "scale_w": scale_w, "scale_a": scale_a, "bias": bias}
    sizes = {"kernel": kernel, "stride": stride, "padding": padding, "block": block, "out_type": TYPES.FLOAT}
    sizes["regular"] = regular
    found = call("Int4Conv", {n: np.asarray(a) for n, a in inputs.items()}, TYPES.FLOAT, **sizes)
    weight = rotate_codes(codes, block, bool(regular)).double() if block > 1 else codes.double()
    acc = torch.nn.functional.conv2d(q.double(), weight, stride=stride, padding=padding)
    wanted = acc * scale_w.view(-1, 1, 1) * scale_a.view(-1, 1, 1, 1) + bias.view(-1, 1, 1)
    assert found.shape == tuple(wanted.shape)
    assert relative(found, wanted.numpy()) <= 1e-6


def test_bodies_hold_no_quantiser() -> None:
    for function in map(onnx_function, plugin_functions(set(PLUGIN_NODES), 21)):
        assert not {n.op_type for n in function.node} & {"QuantizeLinear", "DequantizeLinear"}


# ---- types ---------------------------------------------------------------------------------------------------------


def test_what_stays_in_full_precision(quantised) -> None:
    program = prepare(quantised("tied_time_embedding", "w4a4"), "tensorrt")
    full = full_precision_nodes(program)
    names = {str(node.target) for node in full if node.op == "call_function"}
    assert {"aten.sin.default", "aten.cos.default", "hqc.rescale.default", "hqc.nearest_timestep.default"} <= names
    assert "aten.silu.default" not in names


def test_float16_rotation_would_move_codes() -> None:
    """Why sites compute in float32: one rounding of the rotated value to float16 changes 8-bit codes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 32, generator=generator).half().float()
    turned = hadamard(x, 32, -1)
    scale = turned.abs().max() / 127
    flipped = [(turned.half().float() / s).round() != (turned / s).round() for s in (scale, scale * 127 / 7)]
    shares = [float(one.float().mean()) for one in flipped]
    assert 1e-3 < shares[0] < 5e-2
    assert shares[1] < shares[0] / 5


def test_weights_past_float16_are_refused(captured, tmp_path) -> None:
    program = captured("two_sites")
    state = {n: t * 1e7 if n == "head.weight" else t for n, t in program.state.items()}
    with pytest.raises(
        ExportError, match=r"weight head\.weight: reaches .* past what float16 holds\. Export with bf16"
    ):
        export_program(program.evolve(state=state), "tensorrt", tmp_path / "x")
    export_program(program.evolve(state=state), "tensorrt", tmp_path / "y", tensorrt=TensorRtOptions(dtype="bf16"))
    assert [p.name for p in tmp_path.iterdir()] == ["y"]


def test_activations_past_float16_are_refused(captured, tmp_path) -> None:
    program = captured("two_sites")
    state = {n: t * (5e4 / t.abs().max()) if n == "conv.weight" else t for n, t in program.state.items()}
    with pytest.raises(ExportError, match=r"dtype fp16: its range is left .* --dtype bf16"):
        export_program(program.evolve(state=state), "tensorrt", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("half", [TYPES.FLOAT16, TYPES.BFLOAT16])
def test_emulation_rounds(tmp_path, half) -> None:
    """One rounding for each operator, of values and of stored weights, and none where values only move."""
    import ml_dtypes

    dtype = {TYPES.FLOAT16: np.float16, TYPES.BFLOAT16: ml_dtypes.bfloat16}[half]
    kind = {TYPES.FLOAT16: "float16", TYPES.BFLOAT16: "bfloat16"}[half]
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[N, 3] x) => (float[3, N] y) {{
            h = Cast <to = {half}> (x)
            s = Mul (h, w)
            t = Transpose <perm = [1, 0]> (s)
            y = Cast <to = 1> (t)
        }}""")
    weight = np.array([1.1, 2.3, 3.7], np.float32).astype(dtype)
    tensor = onnx.helper.make_tensor("w", half, [3], weight.tobytes(), raw=True)
    model.graph.initializer.append(tensor)
    onnx.save(model, str(tmp_path / "model.onnx"))
    path = write_emulated(tmp_path / "model.onnx", half)
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    found = open_session(path, threads=1).run(None, {"x": x})[0]
    exact = x.astype(dtype).astype(np.float32) * weight.astype(np.float32)
    assert np.array_equal(found, exact.astype(dtype).astype(np.float32).T), kind
    assert not np.array_equal(found, exact.T)
    assert sum(n.op_type == "Cast" for n in onnx.load(str(path)).graph.node) == 7, (
        "of the weight; of the first two nodes two each; the casts that were there"
    )


# ---- INT4 weight-only ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_weight_only(build, dtype) -> None:
    program, folder, report = build("tied_time_embedding", "w4a4", dtype=dtype, weight_only=("*embedding*", "second"))
    forms = {layer.site: layer.form for layer in report.layers}
    chosen = {site for site, form in forms.items() if form is Form.INT4_WEIGHT_ONLY}
    assert chosen == {"time_embedding.0", "time_embedding.2", "second"} <= forms.keys()
    assert len(forms) > len(chosen)
    graph = read(folder).graph
    stored, made = {t.name: t for t in graph.initializer}, producers(graph)
    real = TYPES.FLOAT16 if dtype == "fp16" else TYPES.FLOAT
    for site, channels, block in (("time_embedding.0", 16, 0), ("time_embedding.2", 32, 16), ("second", 32, 16)):
        (product,) = (n for n in graph.node if n.op_type == "MatMul" and n.name.startswith(f"{site}/"))
        pair = made[product.input[1]]
        codes, scale, zero = (stored[name] for name in pair.input)
        assert codes.data_type == zero.data_type == TYPES.INT4
        assert codes.dims[0] == channels
        assert scale.data_type == real
        assert attributes(pair).get("block_size", 0) == block
        assert attributes(pair)["axis"] == (0 if block else 1)
        assert list(scale.dims) == ([channels // block, codes.dims[1]] if block else [codes.dims[1]])
    reference = reference_program(program, TensorRtOptions(weight_only=("*embedding*", "second")))
    args = [torch.from_numpy(a) for a in feeds_of(program, 4).values()]
    changed, before = reference.module()(*args), program.module()(*args)
    assert relative(changed.numpy(), before.numpy()) > 1e-3
    if dtype == "fp32":
        found = open_session(folder / "model.onnx", threads=1).run([OUTPUT], feeds_of(program, 4))[0]
        assert relative(found, changed.numpy()) <= 1e-6


@pytest.mark.parametrize("stage", ["frozen", "rotated", "packed"])
def test_weight_only_from_every_stage(quantised, tmp_path, stage) -> None:
    program = quantised("shared_input", "w4a4")
    if stage == "frozen":
        program = run_pipeline(program, [MergeLora(), FreezeIntegers()])
    else:
        program = prepare(program, "tensorrt" if stage == "rotated" else "onnxruntime")
    options = TensorRtOptions(dtype="fp32", weight_only=("to_q",))
    report = export_program(program, "tensorrt", tmp_path / "x", tensorrt=options)
    assert [layer.form for layer in report.layers] == [Form.INT4_WEIGHT_ONLY, Form.INT8_GEMM, Form.INT8_GEMM]
    assert report.verification.network.forced_error <= 2e-6


@pytest.mark.parametrize(("bits", "pattern"), [("w4a4", "conv"), ("w4a4", "nothing*"), ("w8a8", "head")])
def test_weight_only_patterns_that_match_nothing(quantised, tmp_path, bits, pattern) -> None:
    with pytest.raises(ExportError, match=r"weight-only .* matches no linear layer with symmetric 4-bit weights"):
        export_program(
            quantised("two_sites", bits), "tensorrt", tmp_path / "x", tensorrt=TensorRtOptions(weight_only=(pattern,))
        )
    assert list(tmp_path.iterdir()) == []


# ---- doctored programs ---------------------------------------------------------------------------------------------


def with_range(program, low, high):
    """The program with another code range at every activation quantiser."""
    from hqc.program import copy_graph

    graph = copy_graph(program.graph)
    for node in graph.nodes:
        if node.meta.get("role") == "activation_quantizer":
            node.args = (*node.args[:2], low, high)
    return program.evolve(graph=graph)


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_asymmetric_codes_that_fit_int8_are_exact(quantised, captured, tmp_path, plugins, dtype) -> None:
    """q − z of an asymmetric 4-bit quantiser with z = 3: no zero point, zero padding stays code 0."""
    program = with_range(quantised("two_sites", "w4a4"), -3, 12)
    options = TensorRtOptions(dtype=dtype, plugins=plugins, plugin_archs=())
    report = export_program(program, "tensorrt", tmp_path / "x", float_program=captured("two_sites"), tensorrt=options)
    assert (report.twin or report.verification).network.forced_error <= 2e-6
    session, feeds = open_session(tmp_path / "x" / "model.onnx", threads=1), feeds_of(program, 4)
    with WatchedModel(tmp_path / "x" / "model.onnx", [], values=["conv.codes"]) as watched:
        codes = watched.run({"conv.codes"}, feeds)["conv.codes"]
    assert codes.min() == -3
    assert 7 < codes.max() <= 12, "past what a symmetric quantiser of 4 bits has"
    symmetric = open_session(
        export_program(quantised("two_sites", "w4a4"), "tensorrt", tmp_path / "y", tensorrt=options).folder
        / "model.onnx",
        threads=1,
    )
    assert relative(session.run([OUTPUT], feeds)[0], symmetric.run([OUTPUT], feeds)[0]) > 1e-2


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (
            0,
            255,
            r"asymmetric quantiser with codes 0…255 does not fit int8 without a zero point, which TensorRT refuses",
        ),
        (-3, 252, r"codes -3…252 does not fit int8"),
        (1, 14, r"its codes 1…14 leave out 0"),
        (-3.0, 12.5, r"its code range ends at -3\.0, no whole number"),
    ],
)
def test_asymmetric_codes_that_do_not_fit_are_refused(quantised, tmp_path, low, high, message) -> None:
    with pytest.raises(ExportError, match=message):
        export_program(with_range(quantised("two_sites", "w4a4"), low, high), "tensorrt", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_unsigned_weight_codes_are_whole_numbers_too(quantised, tmp_path) -> None:
    """0…255 in uint8 without a zero point: two int8 digits, nothing lost."""
    program = run_pipeline(quantised("two_sites", "w8a8"), [MergeLora(), FreezeIntegers()])
    shifted = {n: (t.to(torch.int16) + 128).to(torch.uint8) for n, t in program.state.items() if "weight_codes" in n}
    report = export_program(
        program.evolve(state={**program.state, **shifted}),
        "tensorrt",
        tmp_path / "x",
        tensorrt=TensorRtOptions(dtype="fp32"),
    )
    assert {layer.two_digits for layer in report.layers} == {True}
    assert report.verification.network.forced_error <= 2e-6


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_accumulators_past_int32_run_in_floating_point(quantised, tmp_path, monkeypatch, dtype) -> None:
    """Their codes are rounded in float32: a Q/DQ pair would be built to an int8 product, which overflows."""
    monkeypatch.setattr("hqc.passes.rotate_weights._INT32_LIMIT", 1000)
    report = export_program(
        quantised("two_sites", "w8a8"), "tensorrt", tmp_path / "x", tensorrt=TensorRtOptions(dtype=dtype)
    )
    assert [layer.form for layer in report.layers] == [Form.FLOAT, Form.FLOAT]
    assert all("past int32; its int8 weights are dequantised" in layer.reason for layer in report.layers)
    kinds = [n.op_type for n in read(tmp_path / "x").graph.node]
    assert "QuantizeLinear" not in kinds
    assert kinds.count("Round") == 2
    assert len(report.verification.sites) == 2


# ---- faults that verification must find ----------------------------------------------------------------------------


def _scale_weight(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(("weight_int8_scale", "weight_rotated_scale")):
            tensor.raw_data = (1.001 * np.frombuffer(tensor.raw_data, np.float32)).astype(np.float32).tobytes()


def _scale_activation(proto: onnx.ModelProto) -> None:
    tables = {n.input[0] for n in proto.graph.node if n.op_type == "Gather" and n.name.startswith("conv.input_scale")}
    for tensor in proto.graph.initializer:
        if tensor.name in tables:
            tensor.raw_data = (1.01 * np.frombuffer(tensor.raw_data, np.float32)).astype(np.float32).tobytes()


def _flip_a_code(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name in ("conv.weight_int8", "conv.weight_packed_rows"):
            tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]


def _saturate(proto: onnx.ModelProto) -> None:
    """The product cut off where sums in int16 would be, as by kernels that saturate."""
    made = producers(proto.graph)
    node = made.get("conv.product") or made["conv"]
    node.output[0] += ".whole"
    name = node.output[0].removesuffix(".whole")
    bounds = [onnx.numpy_helper.from_array(np.float32(v), f"bound{v}") for v in (-0.5, 0.5)]
    proto.graph.initializer.extend(bounds)
    cut = onnx.helper.make_node("Clip", [f"{name}.whole", "bound-0.5", "bound0.5"], [name], name="cut")
    proto.graph.node.insert(list(proto.graph.node).index(node) + 1, cut)


def _wrong_activation(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type = "Tanh"


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_scale_weight, "conv: the output differs"),
        (_scale_activation, "conv: .* codes differ away from a rounding boundary"),
        (_flip_a_code, "conv: the output differs"),
        (_saturate, "conv: the output differs"),
        (_wrong_activation, "past its rounding boundary"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faults_are_found(quantised, captured, tmp_path, plugins, dtype, fault, message) -> None:
    program = quantised("two_sites", "w4a4")
    model, options = written(program, tmp_path, dtype=dtype, plugins=plugins)
    model = dataclasses.replace(model, twin=None)
    given = {"float_program": captured("two_sites"), "batch": 4}
    verify_tensorrt(model, program, options, **given)
    proto = onnx.load(str(model.path))
    before = proto.SerializeToString()
    fault(proto)
    assert proto.SerializeToString() != before
    onnx.save(proto, str(model.path))
    if dtype == "fp16" and plugins == "qdp" and fault is _saturate:
        return  # a float32 bound does not fit a float16 output
    with pytest.raises(ExportError, match=message):
        verify_tensorrt(model, program, options, **given)


def test_a_fault_of_the_twin_is_found(quantised, tmp_path) -> None:
    model, options = written(quantised("two_sites", "w4a4"), tmp_path, dtype="fp16")
    proto = onnx.load(str(model.twin.path))
    _scale_weight(proto)
    onnx.save(proto, str(model.twin.path))
    with pytest.raises(ExportError, match="the output differs"):
        verify_tensorrt(model, quantised("two_sites", "w4a4"), options, float_program=None, batch=4)


def _node(proto, kind):
    return next(n for n in proto.graph.node if n.op_type == kind)


def _zero_point(proto) -> None:
    name = _node(proto, "QuantizeLinear").input[2]
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.helper.make_tensor(name, TYPES.INT8, [], [3]))


def _unsigned(proto) -> None:
    name = _node(proto, "QuantizeLinear").input[2]
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.helper.make_tensor(name, TYPES.UINT8, [], [0]))


def _runtime_scale(proto) -> None:
    _node(proto, "QuantizeLinear").input[1] = "conv.input_scale"


def _banned(proto) -> None:
    _node(proto, "MatMul").op_type = "MatMulInteger"


def _foreign(proto) -> None:
    _node(proto, "MatMul").domain = "com.microsoft"


def _same_name(proto) -> None:
    proto.graph.node[1].name = proto.graph.node[0].name


def _no_zero_points(proto) -> None:
    del _node(proto, "DequantizeLinear").input[2]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_zero_point, "has a zero point that is not zero"),
        (_unsigned, "quantises to UINT8"),
        (_runtime_scale, "not constant"),
        (_banned, "is a MatMulInteger"),
        (_foreign, "is of domain com.microsoft"),
        (_same_name, "names several nodes"),
        (_no_zero_points, "not constant"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_structure_that_tensorrt_refuses(build, fault, message) -> None:
    _, folder, _ = build("two_sites", "w4a4", dtype="fp16")
    proto = read(folder)
    assert structure_problems(proto) == []
    fault(proto)
    assert any(message in problem for problem in structure_problems(proto))


# ---- refusals, files, sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "dtype 'fp8': unknown; there are fp16, bf16, fp32"),
        ({"plugins": "all"}, "plugins 'all': unknown; there are none, qdp"),
        ({"image_rotation": "fft"}, "image_rotation 'fft': unknown"),
        ({"token_rotation": "fft"}, "token_rotation 'fft': unknown"),
        ({"plugin_archs": ("sm_75",)}, "plugins for sm_75: there are kernels for sm_80, sm_86"),
    ],
)
def test_options_that_do_not_exist(options, message) -> None:
    with pytest.raises(ExportError, match=message):
        TensorRtOptions(**options)


def test_refusals(captured, quantised, tmp_path) -> None:
    with pytest.raises(ExportError, match="target portable: takes no options of TensorRT"):
        export_program(captured("two_sites"), "portable", tmp_path / "x", tensorrt=TensorRtOptions())
    with pytest.raises(ExportError, match="opset 20"):
        export_program(captured("two_sites"), "tensorrt", tmp_path / "x", opset=20)
    with pytest.raises(ExportError, match="target tensorrt: the program is packed but not rotated"):
        export_program(prepare(quantised("two_sites", "w4a4"), "portable"), "tensorrt", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_graphsurgeon(captured, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    with pytest.raises(RuntimeMissingError, match="pip install onnx-graphsurgeon"):
        export_program(captured("two_sites"), "tensorrt", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [22, 24])
@pytest.mark.parametrize("plugins", PLUGINS)
def test_later_opsets(quantised, captured, tmp_path, opset, plugins) -> None:
    """From 22 on ONNX has convolutions in bfloat16."""
    report = export_program(
        quantised("awkward", "w4a4"),
        "tensorrt",
        tmp_path / "x",
        opset=opset,
        float_program=captured("awkward"),
        tensorrt=TensorRtOptions(dtype="bf16", plugins=plugins, plugin_archs=()),
    )
    assert report.twin.network.forced_error <= 2e-6
    proto = read(tmp_path / "x")
    assert {o.domain: o.version for o in proto.opset_import}[""] == opset
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    grouped = next(n for n in proto.graph.node if n.name.startswith("grouped/"))
    assert kinds[grouped.input[1]] == TYPES.BFLOAT16


@pytest.mark.parametrize("plugins", PLUGINS)
def test_external_data(build, quantised, captured, tmp_path, monkeypatch, plugins) -> None:
    monkeypatch.setattr("hqc.export.model._SMALL_TENSOR", 256)
    program, plain, _ = build("geometry", "w4a4", dtype="fp16", plugins=plugins)
    report = export_program(
        quantised("geometry", "w4a4"),
        "tensorrt",
        tmp_path / "a",
        float_program=captured("geometry"),
        external_data_bytes=0,
        tensorrt=TensorRtOptions(plugins=plugins, plugin_archs=()),
    )
    assert report.twin.network.forced_error <= 2e-6
    moved = (tmp_path / "a").rename(tmp_path / "b")
    assert {p.name for p in moved.iterdir()} >= {"model.onnx", "model.onnx.data", "report.json"}
    tensors = onnx.load(str(moved / "model.onnx"), load_external_data=False).graph.initializer
    assert any(t.data_location == TYPES.EXTERNAL for t in tensors)
    sessions = (open_session(f / "model.onnx", threads=1) for f in (plain, moved))
    assert np.array_equal(*(s.run([OUTPUT], feeds_of(program, 4))[0] for s in sessions))


def test_a_large_model_with_plugins_is_verified_as_it_is_written(
    build, quantised, captured, tmp_path, monkeypatch
) -> None:
    """Nothing is folded, and the figures are the same but for the order of float additions."""
    _, _, folded = build("geometry", "w4a4", dtype="fp16", plugins="qdp")
    levels = []
    monkeypatch.setattr("hqc.export.tensorrt.writing.LARGE_MODEL", 0)
    monkeypatch.setattr(
        "hqc.export.verification.open_session",
        lambda model, **options: levels.append(options["optimisation"]) or open_session(model, **options),
    )
    report = export_program(
        quantised("geometry", "w4a4"),
        "tensorrt",
        tmp_path / "x",
        float_program=captured("geometry"),
        tensorrt=TensorRtOptions(plugins="qdp", plugin_archs=()),
    )
    assert levels == ["disabled"] * 4  # of the twin and of the file: the copy, and itself
    assert report.twin.network.forced_error <= 2e-6
    assert report.verification.network.quantisation_error == pytest.approx(
        folded.verification.network.quantisation_error, rel=1e-3
    )


def test_the_same_input_gives_the_same_bytes(build, quantised, captured, tmp_path) -> None:
    _, folder, _ = build("geometry", "w4a4", dtype="fp16", plugins="qdp")
    options = TensorRtOptions(plugins="qdp", plugin_archs=())
    export_program(quantised("geometry", "w4a4"), "tensorrt", tmp_path / "x", tensorrt=options)
    assert (tmp_path / "x" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


@pytest.mark.parametrize("plugins", PLUGINS)
def test_onnx_runtime_runs_the_export(build, plugins) -> None:
    program, folder, _ = build("two_sites", "w4a4", dtype="fp16", plugins=plugins)
    model = load(folder, threads=1)
    args = [torch.from_numpy(a) for a in feeds_of(program, 4).values()]
    assert relative(model.session(*args).numpy(), program.module()(*args).numpy()) < 5e-2  # a flipped code or two


def test_bfloat16_needs_an_engine(build) -> None:
    _, folder, _ = build("two_sites", "w4a4", dtype="bf16")
    with pytest.raises(RuntimeMissingError, match=r"in bfloat16, which it has no kernels for\. Build an engine"):
        load(folder)


def test_a_damaged_export_is_refused(build, tmp_path) -> None:
    import shutil

    _, folder, _ = build("two_sites", "w4a4", dtype="fp16")
    copy = shutil.copytree(folder, tmp_path / "x")
    (copy / "report.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"report\.json"):
        load(copy)
