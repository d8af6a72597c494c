"""The integer products of the onnxruntime target against numpy int64: equal, not close."""

import numpy as np
import onnx
import pytest
import torch
from integer_oracle import conv, rotated, saturated_pair_sum
from zoo import ROTATIONS

from hqc.export import export_program
from hqc.export.model import onnx_from_program, save_model
from hqc.export.prepare import prepare
from hqc.export.reference import verification_inputs
from hqc.export.site_checks import saturating_pairs
from hqc.export.watched import WatchedModel, constants, heard
from hqc.passes import FreezeIntegers, MergeLora
from hqc.pipeline import run_pipeline
from hqc.program import is_op
from hqc.sites import quantised_sites


def watched_sites(program, tmp_path, sample=None):
    """(site, codes, output, feeds) of every integer site, as onnxruntime computed them."""
    prepared = prepare(program, "onnxruntime")
    model, taps = onnx_from_program(prepared, "onnxruntime", 21)
    path = save_model(model, tmp_path)
    args = verification_inputs(program, 4)
    feeds = {s.name: a.numpy() for s, a in zip(program.inputs, args, strict=True)}
    if sample is not None:
        feeds["sample"] = sample
    names = {n for tap in taps.values() for n in (tap.codes.name, tap.output.name)}
    with WatchedModel(path, list(taps.values())) as watched:
        values = watched.run(names, feeds)
    values |= constants(path, [name for tap in taps.values() for name in tap.weights])
    return prepared, taps, values, feeds


def oracle(prepared, site, codes, row):
    """y = acc·s_w·s_a + bias with acc in int64, each factor rounded once to float32."""
    plan, state = prepared.plan[site.site], prepared.state
    layer = site.layer
    name = next(n for n in (f"{site.site}.weight_codes", f"{site.site}.weight_packed") if n in state)
    weight_node = site.products[0].node.args[1]
    block = 0 if plan.weight_rotated else plan.block
    stored = unpack(state[name].numpy(), weight_node.meta["shape"])
    weight = rotated(stored, block, regular=plan.rotation == "regular")
    product = site.products[0].node
    if is_op(product, torch.ops.hqc.int_conv2d.default):
        acc, channel = conv(codes, weight, *product.args[2:5]), (1, -1, 1, 1)
    else:
        acc, channel = codes.astype(np.int64) @ weight.T, (-1,)
    assert np.abs(acc).max() < 2**31
    scale = state[str(layer.args[2].target)].numpy().reshape(channel)
    sample = state[f"{site.site}.activation_scale_table"].numpy()[row].reshape(-1, *[1] * (acc.ndim - 1))
    y = acc.astype(np.float32) * scale * sample
    return y if layer.args[3] is None else y + state[str(layer.args[3].target)].numpy().reshape(channel)


def assert_equal(found, wanted, site):
    """To the bit; where two digits are added as floats, to the rounding of the larger one."""
    if len(site.products) == 2 and site.products[1].factor != 1:
        assert np.abs(found - wanted).max() <= 2**-21 * np.abs(wanted).max(), site.site
    else:
        assert np.array_equal(found, wanted), site.site


def unpack(stored, shape):
    if stored.dtype != np.uint8:
        return stored
    nibbles = np.stack([stored & 15, stored >> 4], 1).reshape(-1)[: int(np.prod(shape))].astype(np.int64)
    return np.where(nibbles > 7, nibbles - 16, nibbles).reshape(shape)


@pytest.mark.parametrize("bits", ["w4a4", "w2a2", "w8a8", "w5a7"])
@pytest.mark.parametrize("model", ["two_sites", "odd_channels", "geometry", "shared_input", "shared_weights"])
def test_every_site_equals_int64(quantised, tmp_path, model, bits) -> None:
    assert_every_site_equals_int64(quantised(model, bits), tmp_path)


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_every_site_equals_int64_with_other_rotations(quantised, tmp_path, rotation, bits) -> None:
    """`wide_channels` has a strided and padded convolution of 256 channels and linear layers of 64 and 32."""
    assert_every_site_equals_int64(quantised("wide_channels", bits, ROTATIONS[rotation]), tmp_path)


def test_strides_dilations_and_uneven_padding_with_a_regular_rotation(quantised, tmp_path) -> None:
    assert_every_site_equals_int64(quantised("geometry", "w4a4", ROTATIONS["regular 16"]), tmp_path)


def assert_every_site_equals_int64(program, tmp_path) -> None:
    prepared, taps, values, feeds = watched_sites(program, tmp_path)
    row = np.abs(feeds["timestep"][:, None] - np.array(prepared.plan.timesteps)[None]).argmin(1)
    assert len(set(row)) > 1
    for site in quantised_sites(prepared):
        tap = taps[site.site]
        codes = heard(tap.codes, values).numpy().astype(np.int64) - tap.zero_point
        assert len(np.unique(codes)) > 1
        assert_equal(heard(tap.output, values).numpy(), oracle(prepared, site, codes, row), site)


PATTERNS = {
    "all at the upper end": lambda k: np.full_like(k, 127),
    "all at the lower end": lambda k: np.full_like(k, -128),
    "digit limit": lambda k: np.full_like(k, -64),
    "above the digit limit": lambda k: np.full_like(k, 64),
    "alternating": lambda k: np.where(k % 2 == 0, 127, -128),
    "pairs": lambda k: np.where(k // 2 % 2 == 0, -64, 63),
}


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("model", ["two_sites", "odd_channels", "shared_input"])
def test_eight_bit_products_do_not_saturate(quantised, tmp_path, model, pattern, sign) -> None:
    """All activation codes at their largest, all weights at theirs: the worst case of a u8×s8 multiply-add."""
    program = run_pipeline(quantised(model, "w8a8"), [MergeLora(), FreezeIntegers()])
    state = dict(program.state)
    for name, tensor in state.items():
        if name.endswith("weight_codes"):
            index = np.arange(tensor[0].numel()).reshape(tensor[0].shape)
            state[name] = torch.from_numpy(
                np.broadcast_to(PATTERNS[pattern](index), tensor.shape).astype(np.int8).copy()
            )
    first = next(iter(program.plan.quantised))
    block = first.block or 1
    spec = program.inputs[0]
    sample = np.zeros((4, *spec.shape[1:]), dtype=np.float32)
    # A constant vector rotates to one peak a block; a peak rotates to a constant vector: all codes at the limit.
    sample[:, ::block] = sign * 1e4
    prepared, taps, values, feeds = watched_sites(program.evolve(state=state), tmp_path, sample)
    row = np.abs(feeds["timestep"][:, None] - np.array(prepared.plan.timesteps)[None]).argmin(1)
    largest = 0
    for site in quantised_sites(prepared):
        tap = taps[site.site]
        codes = heard(tap.codes, values).numpy().astype(np.int64) - tap.zero_point
        largest = max(largest, int((np.abs(codes) == 127).mean() * 100))
        assert_equal(heard(tap.output, values).numpy(), oracle(prepared, site, codes, row), site)
        assert all(saturating_pairs(values[name], tap.largest_code) == 0 for name in tap.weights)
    assert largest == 100


def test_the_saturation_check_finds_what_the_hardware_would_lose() -> None:
    codes = np.full((1, 2), 255)
    for weight, lost in ((64, False), (65, True), (127, True), (-64, False), (-65, True)):
        matrix = np.full((2, 1), weight, dtype=np.int8)
        exact = codes.astype(np.int64) @ matrix.astype(np.int64)
        assert (saturated_pair_sum(codes, matrix) != exact).any() == lost
        assert (saturating_pairs(matrix, 255) > 0) == lost


@pytest.mark.parametrize("model", ["two_sites", "odd_channels"])
def test_digits_are_two_where_one_does_not_fit(exported, model) -> None:
    _, folder, _ = exported(model, "w8a8", "onnxruntime")
    names = {v for n in onnx.load(str(folder / "model.onnx")).graph.node for v in n.output}
    halves = {name for name in names if name.endswith(".weight_matrix_1")}
    assert halves
    assert {name.replace("_1", "_0") for name in halves} <= names


def test_integer_programs_export_too(quantised, exported, captured, tmp_path) -> None:
    """Prepared by hand or by the export, the file is the same."""
    program, folder, _ = exported("two_sites", "w4a4", "onnxruntime")
    prepared = prepare(program, "onnxruntime")
    export_program(prepared, "onnxruntime", tmp_path / "again", float_program=captured("two_sites"))
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
