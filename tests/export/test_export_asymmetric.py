"""Asymmetric ranges in every ONNX target: int64 with explicit zero points, other implementations, mixed timesteps."""

import numpy as np
import onnx
import pytest
import torch
from integer_oracle import MatMulIntegerToFloat, asymmetric_conv, rotated
from onnx.reference import ReferenceEvaluator
from tensorrt_exports import Build, attributes, builder, constants, producers, read
from zoo import ROTATIONS

from hqc.errors import ExportError
from hqc.export import TensorRtOptions, export_program
from hqc.export.lowering import OUTPUT
from hqc.export.model import onnx_from_program, save_model
from hqc.export.ort_session import open_session
from hqc.export.prepare import prepare
from hqc.export.reference import ForcedRun, verification_inputs
from hqc.export.tensorrt.forms import Form
from hqc.export.tensorrt.plugin_fit import rotation_obstacle
from hqc.export.watched import WatchedModel, heard
from hqc.ops.weight_codes import fits_int4, int4_offsets
from hqc.passes import FreezeIntegers, MergeLora, RotateWeights
from hqc.pipeline import run_pipeline
from hqc.program import is_op
from hqc.sites import quantised_sites, rotation_of

ops = torch.ops.hqc
TARGETS = ("portable", "onnxruntime")
# float32 sums in another order, the codes being equal.
EQUAL_CODES = 5e-6
PARTED = np.sqrt(2)
"""Without equal codes: a value on a rounding boundary may fall either way; see `hqc.export.verification`."""


def relative(found, wanted) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def inputs(program, batch=4):
    args = verification_inputs(program, batch)
    return args, {s.name: a.numpy() for s, a in zip(program.inputs, args, strict=True)}


# ---- integers ------------------------------------------------------------------------------------------------------


def whole_zeros(program, name: str, bits: int) -> np.ndarray:
    return np.clip(np.rint(program.state[name].numpy()), 0, 2**bits - 1).astype(np.int64)


def unsigned_weight(program, site: str) -> tuple[np.ndarray, np.ndarray]:
    """(w, z_w) of a site: w = clip(round(W/s) + z_w, 0, 2ⁿ-1) of the merged weight."""
    state, bits = program.state, program.plan[site].weight_bits
    weight = state[f"{site}.weight"]
    weight = (weight + (state[f"{site}.lora_b"] @ state[f"{site}.lora_a"]).view(weight.shape)).numpy()
    zero, top = whole_zeros(program, f"{site}.weight_zero", bits + 1), np.array([2**bits - 1])
    if program.plan[site].weight_mixed:
        top = state[f"{site}.weight_top"].numpy().astype(np.int64)
        assert set(top) == {2**b - 1 for b in (bits - 1, bits, bits + 1)}
    shape = (-1, *[1] * (weight.ndim - 1))
    assert (zero <= top).all()
    levels = np.rint(weight * (np.float32(1) / state[f"{site}.weight_scale"].numpy()).reshape(shape))
    return np.clip(levels + zero.reshape(shape), 0, top.reshape(shape)).astype(np.int64), zero


def oracle(program, prepared, site, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A site's output from its codes c: q = c + z, then the four sums of (q - z)·(w - z_w) over int64."""
    plan, state = program.plan[site.site], prepared.state
    zero = whole_zeros(program, f"{site.site}.activation_zero_table", plan.activation_bits)[rows]
    q = codes + zero.reshape(-1, *[1] * (codes.ndim - 1))
    assert 0 <= q.min() < q.max() <= 2**plan.activation_bits - 1
    w, w_zero = unsigned_weight(program, site.site)
    if plan.block:  # H does not leave a zero point as it is: it is taken off before
        w, w_zero = rotated(w - w_zero.reshape(-1, *[1] * (w.ndim - 1)), plan.block), np.zeros_like(w_zero)
    product = site.products[0].node
    image = is_op(product, ops.int_conv2d.default)
    if image:
        acc = asymmetric_conv(q, zero, w, w_zero, *product.args[2:5])
    else:
        flat = q.reshape(len(q), -1, q.shape[-1]).swapaxes(1, 2)[..., None]
        acc = asymmetric_conv(flat, zero, w[..., None, None], w_zero, (1, 1), (0, 0), (1, 1))
        acc = acc[..., 0].swapaxes(1, 2).reshape(*codes.shape[:-1], -1)
    channel = (1, -1, 1, 1) if image else (-1,)
    scale = state[str(site.layer.args[2].target)].numpy().reshape(channel)
    sample = state[f"{site.site}.activation_scale_table"].numpy()[rows].reshape(-1, *[1] * (acc.ndim - 1))
    y = acc.astype(np.float32) * scale * sample
    bias = site.layer.args[3]
    return y if bias is None else y + state[str(bias.target)].numpy().reshape(channel)


@pytest.mark.parametrize("bits", ["w4a4", "w2a2", "w7a7", "w3a6"])
@pytest.mark.parametrize("model", ["two_sites", "odd_channels", "geometry", "shared_input"])
def test_every_site_equals_explicit_zero_points(quantised, tmp_path, model, bits) -> None:
    """Padded borders, stride 2, dilation, and samples at different timesteps, in onnxruntime."""
    _check_sites(quantised(model, bits, ranges="asymmetric"), tmp_path)


@pytest.mark.parametrize(("model", "bits"), [("two_sites", "w4a4"), ("geometry", "w2a4"), ("odd_channels", "w6a6")])
def test_channels_of_mixed_bits_equal_explicit_zero_points(quantised, tmp_path, model, bits) -> None:
    _check_sites(quantised(model, bits, ranges="mixed"), tmp_path)


@pytest.mark.parametrize(
    ("bits", "ranges", "kinds"),
    [("w4a4", "asymmetric", {"INT4"}), ("w4a4", "mixed", {"INT4", "INT8"}), ("w6a6", "asymmetric", {"INT8"})],
)
def test_codes_of_four_bits_are_half_a_byte_wherever_they_lie(exported, tmp_path, bits, ranges, kinds) -> None:
    """Where channels have mixed bits, those of more than four are bytes; ONNX Runtime folds what puts them together."""
    program, folder, _ = exported("wide_channels", bits, "onnxruntime", ranges=ranges)
    frozen = run_pipeline(program, [MergeLora(), FreezeIntegers()])
    sites = [plan.site for plan in program.plan.quantised if plan.weight_bits < 8]
    assert not any(fits_int4(frozen.state[f"{site}.weight_codes"]) for site in sites)
    stored = {one.name: one for one in onnx.load(str(folder / "model.onnx")).graph.initializer}
    for site in sites:
        parts = [stored[name] for end in ("", ".wide") if (name := f"{site}.weight_codes{end}") in stored]
        assert {onnx.TensorProto.DataType.Name(part.data_type) for part in parts} == kinds
        assert sum(np.prod(part.dims) for part in parts) == frozen.state[f"{site}.weight_codes"].numel()
        if bits == "w4a4":
            narrow = int4_offsets(frozen.state[f"{site}.weight_codes"])[1].sum()
            assert parts[0].dims[-1] == narrow
            assert len(parts[0].raw_data) == np.prod(parts[0].dims) // 2
    path = tmp_path / "optimised.onnx"
    open_session(folder / "model.onnx", threads=1, save_to=path)
    graph = onnx.load(str(path)).graph
    weights = {one.name for one in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) >= len(sites)
    assert all(node.input[1] in weights for node in products)


def _check_sites(program, tmp_path) -> None:
    prepared = prepare(program, "onnxruntime")
    proto, taps = onnx_from_program(prepared, "onnxruntime", 21)
    _, feeds = inputs(program)
    names = {n for tap in taps.values() for n in (tap.codes.name, tap.output.name)}
    with WatchedModel(save_model(proto, tmp_path), list(taps.values())) as watched:
        values = watched.run(names, feeds)
    rows = np.abs(feeds["timestep"][:, None] - np.array(prepared.plan.timesteps)[None]).argmin(1)
    assert len(set(rows)) > 2
    for site in quantised_sites(prepared):
        tap = taps[site.site]
        codes = heard(tap.codes, values).numpy().astype(np.int64) - tap.zero_point
        found, wanted = heard(tap.output, values).numpy(), oracle(program, prepared, site, codes, rows)
        if len(site.products) == 2 and site.products[1].factor != 1:  # two digits, added as floats
            assert np.abs(found - wanted).max() <= 2**-21 * np.abs(wanted).max(), site.site
        else:
            assert np.array_equal(found, wanted), site.site


def test_seven_bits_have_the_smaller_digit(exported) -> None:
    """Codes q - z up to 127 are unsigned ones up to 255: a weight's digit holds 64 then, as the export checks."""
    _, folder, report = exported("two_sites", "w4a7", "onnxruntime", ranges="asymmetric")
    assert report.verification is not None
    names = {v for n in onnx.load(str(folder / "model.onnx")).graph.node for v in n.output}
    assert {name for name in names if name.endswith(".weight_matrix_1")}


@pytest.mark.parametrize("target", ["portable", "onnxruntime", "tensorrt"])
@pytest.mark.parametrize("rotation", ["regular 64", "sylvester 32 double"])
@pytest.mark.parametrize("bits", ["w4a4", "w2a4"])
def test_mixed_bits_in_every_target(exported, bits, rotation, target) -> None:
    """int8 holds the codes of every channel; codes and outputs are checked site by site."""
    program, _, report = exported("wide_channels", bits, target, rotation=ROTATIONS[rotation], ranges="mixed")
    assert len(report.verification.sites) == len(program.plan.quantised)
    assert all(plan.weight_mixed for plan in program.plan.quantised)
    assert program.plan.quantised[0].widths == f"w{bits[1]}±*a4*"
    if target == "tensorrt":
        assert {layer.weight_bits_stored for layer in report.layers} <= {8, 16}


@pytest.mark.parametrize("target", ["portable", "onnxruntime", "tensorrt"])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_every_rotation(exported, rotation, target) -> None:
    """Regular rotations, wide blocks, weights that were rotated before: codes and outputs are checked site by site."""
    program, _, report = exported("wide_channels", "w4a4", target, rotation=ROTATIONS[rotation], ranges="asymmetric")
    assert len(report.verification.sites) == len(program.plan.quantised)
    assert not any(plan.weight_symmetric or plan.activation_symmetric for plan in program.plan.quantised)


# ---- other implementations of the same file -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "target"),
    [*((m, t) for m in ("two_sites", "geometry", "shared_input") for t in TARGETS), ("without_attention", "portable")],
)
def test_reference_evaluator_equals_torch(exported, model, target) -> None:
    program, folder, _ = exported(model, "w4a4", target, ranges="asymmetric")
    _, taps = onnx_from_program(prepare(program, target), target, 21)
    proto = onnx.load(str(folder / "model.onnx"))
    args, feeds = inputs(program)
    kind = onnx.TensorProto.UINT8 if target == "onnxruntime" else onnx.TensorProto.INT8
    names = sorted({tap.codes.name for tap in taps.values()})
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in names)
    output, *found = ReferenceEvaluator(proto, new_ops=[MatMulIntegerToFloat]).run([OUTPUT, *names], feeds)
    values = dict(zip(names, (np.asarray(v) for v in found), strict=True))
    forced = ForcedRun(
        program, {site: heard(tap.codes, values).to(torch.int16) - tap.zero_point for site, tap in taps.items()}
    )
    assert relative(output, forced.run(*args).numpy()) <= EQUAL_CODES
    assert max(forced.distance.values()) <= 1e-3  # of a step past a rounding boundary


@pytest.mark.parametrize(
    ("model", "target"),
    [*((m, t) for m in ("two_sites", "geometry") for t in TARGETS), ("cross_attention", "onnxruntime")],
)
def test_optimisation_levels_agree(exported, model, target) -> None:
    program, folder, report = exported(model, "w4a4", target, ranges="asymmetric")
    args, feeds = inputs(program, 8)
    wanted = program.module()(*args).numpy()
    step = report.verification.network.quantisation_error
    for level in ("disabled", "basic", "extended", "all"):
        found = open_session(folder / "model.onnx", threads=1, optimisation=level).run(None, feeds)[0]
        errors = sorted(relative(a, b) for a, b in zip(found, wanted, strict=True))
        assert errors[len(errors) // 2] <= EQUAL_CODES, level
        assert errors[-1] <= PARTED * step, level


@pytest.mark.parametrize("target", TARGETS)
def test_a_mixed_batch_equals_its_samples_one_by_one(exported, target) -> None:
    program, folder, report = exported("two_sites", "w4a4", target, ranges="asymmetric")
    _, feeds = inputs(program, 8)
    session = open_session(folder / "model.onnx", threads=1)
    together = session.run(None, feeds)[0]
    alone = [session.run(None, {k: v[i : i + 1] for k, v in feeds.items()})[0] for i in range(8)]
    errors = sorted(relative(a, b[0]) for a, b in zip(together, alone, strict=True))
    assert errors[4] <= EQUAL_CODES
    assert errors[-1] <= PARTED * report.verification.network.quantisation_error


@pytest.mark.parametrize(
    ("target", "plugins"), [*((t, "none") for t in TARGETS), ("tensorrt", "none"), ("tensorrt", "qdp")]
)
def test_one_timestep_for_the_batch(quantised, captured, tmp_path, target, plugins) -> None:
    program = quantised("two_sites", "w4a4", ranges="asymmetric")
    options = {"tensorrt": TensorRtOptions(plugins=plugins, plugin_archs=())} if target == "tensorrt" else {}
    folder = tmp_path / "one"
    export_program(program, target, folder, float_program=captured("two_sites"), one_timestep=True, **options)
    args, feeds = inputs(program, 1)
    if target != "tensorrt":
        found = open_session(folder / "model.onnx", threads=1).run(None, feeds)[0]
        assert relative(found, program.module()(*args).numpy()) <= EQUAL_CODES


# ---- TensorRT ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def build(captured, quantised, tmp_path_factory) -> Build:
    return builder(captured, quantised, tmp_path_factory.mktemp("asymmetric"))


@pytest.mark.parametrize("plugins", ["none", "qdp"])
@pytest.mark.parametrize("bits", ["w4a4", "w7a7", "w4a3"])
@pytest.mark.parametrize("model", ["two_sites", "geometry", "shared_input", "odd_channels"])
def test_tensorrt(build, model, bits, plugins) -> None:
    program, folder, report = build(model, bits, ranges="asymmetric", dtype="fp32", plugins=plugins)
    network = report.verification.network
    plugged = {n.op_type for n in read(folder).graph.node if n.domain == "hqc"}
    assert ("HadamardQuantizeBounded" in plugged) == (plugins == "qdp" and bool(program.plan.quantised[0].block))
    assert network.forced_error <= EQUAL_CODES
    assert network.free_error <= max(0.1 * network.quantisation_error, 1e-5)
    assert len(report.verification.sites) == len(program.plan.quantised)


@pytest.mark.parametrize("options", [{"image_rotation": "matmul"}, {"token_rotation": "conv"}])
def test_tensorrt_rotations(build, options) -> None:
    _, _, report = build("two_sites", "w4a4", ranges="asymmetric", dtype="fp32", **options)
    assert report.verification.network.forced_error <= EQUAL_CODES


def test_tensorrt_plugins_of_mixed_bits(build) -> None:
    """Codes that do not fit four bits are int8 products between the plugin's rotations."""
    _, folder, report = build("two_sites", "w4a4", ranges="mixed", dtype="fp32", plugins="qdp")
    assert report.verification.network.forced_error <= EQUAL_CODES
    assert Form.INT4_PLUGIN not in {layer.form for layer in report.layers}
    assert {n.op_type for n in read(folder).graph.node if n.domain == "hqc"} == {"HadamardQuantizeBounded"}


@pytest.mark.parametrize("plugins", ["none", "qdp"])
def test_tensorrt_in_half_precision(build, plugins) -> None:
    _, _, report = build("geometry", "w4a4", ranges="asymmetric", dtype="fp16", plugins=plugins)
    assert report.twin.network.forced_error <= EQUAL_CODES
    assert report.verification.network.forced_error <= 16 * 2.0**-11


def test_tensorrt_clips_between_looked_up_bounds(build) -> None:
    """Every quantiser reads Min(Max(level, low[t]·s₀), high[t]·s₀): no Clip is left."""
    _, folder, _ = build("two_sites", "w4a4", ranges="asymmetric", dtype="fp32")
    graph = read(folder).graph
    made = producers(graph)
    quantisers = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert quantisers
    for node in quantisers:
        least = made[node.input[0]]
        assert least.op_type == "Min"
        assert made[least.input[0]].op_type == "Max"
        assert {made[least.input[1]].op_type, made[made[least.input[0]].input[1]].op_type} == {"Gather"}
    assert all(attributes(n).get("axis", 0) == 0 for n in graph.node if n.op_type == "Gather")
    assert not [n for n in graph.node if n.op_type == "Clip"]


@pytest.mark.parametrize("rotation", ["sylvester 32 double", "regular 64"])
def test_a_plugin_is_told_scale_and_bounds_of_every_timestep(build, rotation) -> None:
    program, folder, report = build(
        "wide_channels", "w4a4", ranges="asymmetric", rotation=ROTATIONS[rotation], dtype="fp32", plugins="qdp"
    )
    assert {layer.rotation for layer in report.layers} == {"plugin"}
    assert not any("standard operators" in layer.reason for layer in report.layers)
    graph = read(folder).graph
    stored, made = constants(graph), producers(graph)
    nodes = {n.name.split(".codes")[0]: n for n in graph.node if n.op_type == "HadamardQuantizeBounded"}
    assert nodes.keys() == {plan.site for plan in program.plan.quantised}
    for site, node in nodes.items():
        values = attributes(node)
        assert (values["block"], values["regular"]) == (program.plan[site].block, int("regular" in rotation))
        table = stored[made[node.input[1]].input[0]]
        zero = whole_zeros(program, f"{site}.activation_zero_table", 4)
        scale = program.state[f"{site}.activation_scale_table"].numpy()
        assert np.array_equal(table, np.stack([np.float32(1) / scale, -zero, 15 - zero], 1, dtype=np.float32))


def test_a_site_that_wants_other_rows_of_bounds_keeps_standard_operators(quantised) -> None:
    prepared = prepare(quantised("two_sites", "w4a4", ranges="asymmetric"), "tensorrt")
    site = next(quantised_sites(prepared))
    turn, options = rotation_of(site.quantiser.args[0]), TensorRtOptions(plugins="qdp", plugin_archs=())
    assert rotation_obstacle(site, turn, options) == ""
    low = site.bounds.lookups.low
    low.update_arg(2, low.args[2].args[0])
    assert rotation_obstacle(site, turn, options) == "its range of codes is looked up by another row than its scale"


def test_plugins_say_why_they_do_not_take_a_product(build) -> None:
    _, _, report = build("two_sites", "w4a4", ranges="asymmetric", dtype="fp32", plugins="qdp")
    assert any("not the int4 plugin: codes" in layer.reason for layer in report.layers)


def test_the_int4_plugin_takes_codes_that_fit(quantised, captured, tmp_path) -> None:
    """Zero points in the middle: codes within -8…7 beside looked-up ranges of activations."""
    program = quantised("two_sites", "w4a4", ranges="asymmetric")
    middle = {name: torch.full_like(t, 8.0) if name.endswith("weight_zero") else t for name, t in program.state.items()}
    options = TensorRtOptions(dtype="fp32", plugins="qdp", plugin_archs=())
    report = export_program(
        program.evolve(state=middle),
        "tensorrt",
        tmp_path / "plugin",
        float_program=captured("two_sites"),
        tensorrt=options,
    )
    assert {layer.form for layer in report.layers} == {Form.INT4_PLUGIN}
    assert report.verification.network.forced_error <= EQUAL_CODES


def test_weight_only_needs_symmetric_weights(quantised, tmp_path) -> None:
    options = TensorRtOptions(weight_only=("head",), plugin_archs=())
    with pytest.raises(ExportError, match="matches no linear layer with symmetric 4-bit weights"):
        export_program(
            quantised("two_sites", "w4a4", ranges="asymmetric"), "tensorrt", tmp_path / "out", tensorrt=options
        )


# ---- programs ------------------------------------------------------------------------------------------------------


def test_an_integer_program_exports_too(quantised, exported, captured, tmp_path) -> None:
    program, folder, _ = exported("two_sites", "w4a4", "onnxruntime", ranges="asymmetric")
    prepared = run_pipeline(program, [MergeLora(), FreezeIntegers(), RotateWeights()])
    export_program(prepared, "onnxruntime", tmp_path / "again", float_program=captured("two_sites"))
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
