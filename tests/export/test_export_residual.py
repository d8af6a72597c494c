"""Binary codes beside a weight's own: two integer products of the same activation codes, in every target."""

import numpy as np
import pytest
import torch
from integer_oracle import conv, rotated
from zoo import ROTATIONS

from hqc.export import export_program
from hqc.export.model import onnx_from_program, save_model
from hqc.export.prepare import prepare
from hqc.export.reference import verification_inputs
from hqc.export.watched import WatchedModel, heard
from hqc.passes import FreezeIntegers, MergeLora, RotateWeights
from hqc.pipeline import run_pipeline
from hqc.program import Program, is_op
from hqc.site_names import main_site, residual_site
from hqc.sites import quantised_sites
from hqc.storage import load_program, save_program

ops = torch.ops.hqc


def codes_of(program: Program, site: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(c, r, α) of a site in numpy: c = q - z of the merged weight, r = sign(W - s·c) of salient channels, else 0."""
    state = {key.removeprefix(f"{site}."): t.numpy() for key, t in program.state.items() if key.startswith(f"{site}.")}
    weight = state["weight"] + (torch.tensor(state["lora_b"]) @ torch.tensor(state["lora_a"])).numpy().reshape(
        state["weight"].shape
    )
    shape = (-1, *[1] * (weight.ndim - 1))
    zero = np.minimum(np.maximum(state["weight_zero"], 0), state["weight_top"])
    zero, top, scale = (v.reshape(shape) for v in (np.rint(zero), state["weight_top"], state["weight_scale"]))
    c = np.clip(np.rint(weight * (np.float32(1) / scale)), -zero, top - zero)
    salient = state["weight_salient"].reshape(shape)
    r = np.sign(weight - c.astype(np.float32) * scale) * salient
    return c.astype(np.int64), r.astype(np.int64), state["weight_residual_scale"] * state["weight_salient"]


def int64_output(program: Program, prepared: Program, site, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A product's output from activation codes: the sum over int64, then its scales and its bias in float32."""
    plan, main = program.plan[main_site(site.site)], main_site(site.site)
    c, r, step = codes_of(program, main)
    is_residual = site.site != main
    weight = rotated(r if is_residual else c, 0 if plan.weight_rotated else plan.block)
    product = site.products[0].node
    image = is_op(product, ops.int_conv2d.default)
    if image:
        acc = conv(codes, weight, *product.args[2:5])
    else:
        flat = codes.reshape(len(codes), -1, codes.shape[-1]).swapaxes(1, 2)[..., None]
        acc = conv(flat, weight[..., None, None], (1, 1), (0, 0), (1, 1))
        acc = acc[..., 0].swapaxes(1, 2).reshape(*codes.shape[:-1], -1)
    channel = (1, -1, 1, 1) if image else (-1,)
    scale = np.where(step > 0, step, 1) if is_residual else program.state[f"{main}.weight_scale"].numpy()
    if plan.block and not plan.weight_rotated:
        scale = scale.astype(np.float32) * np.float32(plan.block**-0.5)
    sample = program.state[f"{main}.activation_scale_table"].numpy()[rows].reshape(-1, *[1] * (acc.ndim - 1))
    y = acc.astype(np.float32) * scale.astype(np.float32).reshape(channel) * sample
    bias = site.layer.args[3]
    assert not (is_residual and bias is not None)
    return y if bias is None else y + prepared.state[str(bias.target)].numpy().reshape(channel)


@pytest.mark.parametrize(
    ("model", "bits"), [("two_sites", "w4a4"), ("geometry", "w2a4"), ("odd_channels", "w6a6"), ("shared_input", "w3a3")]
)
def test_both_products_equal_int64(quantised, tmp_path, model, bits) -> None:
    """Padded borders, stride 2, dilation, samples at different timesteps, in onnxruntime."""
    program = quantised(model, bits, ranges="residual")
    prepared = prepare(program, "onnxruntime")
    proto, taps = onnx_from_program(prepared, "onnxruntime", 21)
    args = verification_inputs(program, 4)
    feeds = {s.name: a.numpy() for s, a in zip(program.inputs, args, strict=True)}
    layers = {site.site: site for site in quantised_sites(prepared)}
    assert set(layers) == {name for plan in program.plan.quantised for name in (plan.site, residual_site(plan.site))}
    names = {n for tap in taps.values() for n in (tap.codes.name, tap.output.name)}
    with WatchedModel(save_model(proto, tmp_path), list(taps.values())) as watched:
        values = watched.run(names, feeds)
    rows = np.abs(feeds["timestep"][:, None] - np.array(prepared.plan.timesteps)[None]).argmin(1)
    for name, tap in taps.items():
        codes = heard(tap.codes, values).numpy().astype(np.int64) - tap.zero_point
        wanted = int64_output(program, prepared, layers[name], codes, rows)
        if main_site(name) == name:  # its tap is behind the sum of both
            wanted = wanted + int64_output(program, prepared, layers[residual_site(name)], codes, rows)
        found = heard(tap.output, values).numpy()
        assert np.abs(found - wanted).max() <= 2**-21 * np.abs(wanted).max(), name
        assert bool(wanted.any())


@pytest.mark.parametrize("target", ["portable", "onnxruntime", "tensorrt"])
@pytest.mark.parametrize("rotation", ["regular 64", "sylvester 32 double"])
def test_every_target_has_it(exported, rotation, target) -> None:
    """Codes and outputs are checked site by site, and the whole network."""
    program, _, report = exported("wide_channels", "w3a4", target, rotation=ROTATIONS[rotation], ranges="residual")
    assert {check.site for check in report.verification.sites} == {plan.site for plan in program.plan.quantised}
    assert program.plan.quantised[0].widths == "w3+*a4*"
    if target == "tensorrt":
        forms = {layer.site: layer for layer in report.layers}
        assert all(forms[residual_site(plan.site)].integer for plan in program.plan.quantised)


def test_the_frozen_form_is_two_layers_of_the_same_codes(quantised) -> None:
    program = quantised("two_sites", "w4a4", ranges="residual")
    again = run_pipeline(program, [MergeLora(), FreezeIntegers()], check_numerics=True)
    frozen = run_pipeline(again, [RotateWeights()], check_numerics=True)
    sites = {site.site: site for site in quantised_sites(frozen)}
    for plan in program.plan.quantised:
        own, beside = sites[plan.site], sites[residual_site(plan.site)]
        assert own.quantiser is beside.quantiser
        c, r, step = codes_of(program, plan.site)
        assert np.array_equal(frozen.state[f"{plan.site}.weight_codes"].numpy(), c)
        assert np.array_equal(frozen.state[f"{residual_site(plan.site)}.weight_codes"].numpy(), r)
        assert np.array_equal(np.abs(r).reshape(len(r), -1).max(1) > 0, step > 0)
        scale = again.state[f"{residual_site(plan.site)}.weight_scale"].numpy()
        assert np.array_equal(scale, np.where(step > 0, step, 1).astype(np.float32))
    assert [plan.site for plan in again.plan.sites] == [
        name for plan in program.plan.sites for name in (plan.site, residual_site(plan.site))
    ]


def test_an_integer_program_is_stored_and_exported_again(quantised, tmp_path) -> None:
    """Its sites are then those of both products, and the reference is the integer program itself."""
    program = run_pipeline(quantised("two_sites", "w4a4", ranges="residual"), [MergeLora(), FreezeIntegers()])
    save_program(program, tmp_path / "frozen.hqc")
    again = load_program(tmp_path / "frozen.hqc")
    report = export_program(again, "onnxruntime", tmp_path / "x.onnx")
    assert {check.site for check in report.verification.sites} == {plan.site for plan in again.plan.quantised}


def test_without_salient_channels_there_is_one_product(quantised) -> None:
    program = quantised("two_sites", "w4a4", ranges="residual")
    none = {key: torch.zeros_like(t) if key.endswith("weight_salient") else t for key, t in program.state.items()}
    frozen = run_pipeline(program.evolve(state=none), [MergeLora(), FreezeIntegers()], check_numerics=True)
    assert [plan.site for plan in frozen.plan.sites] == [plan.site for plan in program.plan.sites]
