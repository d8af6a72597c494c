"""Quantised denoisers that diffusers' own `from_pretrained` loads: against the program, and folders from a stranger."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from denoisers import captured_denoiser
from diffusers.quantizers import auto
from quantised_denoisers import GRID, quantised
from safetensors.torch import load_file, save_file
from test_cli import ok
from torch import Tensor, nn

import hqc.runtimes
from hqc.capture.diffusers_models import Denoiser
from hqc.errors import ArtefactError, EvaluationError, ExportError
from hqc.export.reference import verification_inputs
from hqc.integrations.diffusers import HqcConfig, HqcQuantizer, export_diffusers
from hqc.integrations.diffusers.config import SiteForm
from hqc.integrations.diffusers.modules import HqcConv2d, HqcLayer, HqcLinear
from hqc.manifests import check_manifest
from hqc.passes import InsertQdq, InsertSmoothing, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Program
from hqc.running import run_module
from hqc.storage import save_program

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(folder: Path, **options: Any) -> Any:
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder, **options)


def layers(model: nn.Module) -> dict[str, HqcLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, HqcLayer)}


@torch.no_grad()
def called(model: nn.Module, program: Program, args: tuple[Tensor, ...]) -> Tensor:
    return Denoiser(model, [spec.name for spec in program.inputs])(*args)


@torch.no_grad()
def near(found: Tensor, program: Program, args: tuple[Tensor, ...]) -> None:
    """As the program itself, but for the samples in which a code lies on a rounding boundary: those at most as far as
    the quantisation error."""
    wanted = run_module(program.module(), *args)
    errors = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert float(errors.min()) <= 1e-5
    assert float(errors.max()) <= 0.5


@pytest.fixture(scope="module")
def program() -> Program:
    return quantised("sd15")


@pytest.fixture(scope="module")
def written(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "unet"
    export_diffusers(program, folder)
    return folder


def test_diffusers_knows_the_method() -> None:
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hqc"] is HqcConfig
    assert auto.AUTO_QUANTIZER_MAPPING["hqc"] is HqcQuantizer


def test_layers_are_integer_products(program: Program, written: Path) -> None:
    model = load(written)
    found = layers(model)
    assert set(found) == {plan.site for plan in program.plan.quantised}
    assert {type(layer) for layer in found.values()} == {HqcConv2d, HqcLinear}
    assert all(layer.weight_codes.dtype in (torch.int8, torch.uint8) for layer in found.values())
    assert not any(name.rpartition(".")[0] in found for name, _ in model.named_parameters())
    assert any(layer.weight_codes.dtype == torch.uint8 for layer in found.values())


def test_each_sample_has_its_own_timestep(program: Program, written: Path) -> None:
    model, args = load(written), verification_inputs(program, 4)
    together = called(model, program, args)
    near(together, program, args)
    for i in range(4):
        alone = called(model, program, tuple(value[i : i + 1] for value in args))
        assert float((alone - together[i : i + 1]).norm() / alone.norm()) <= 1e-5
    assert not torch.allclose(together, called(model, program, (args[0], args[1].flip(0), *args[2:])))


def test_one_timestep_for_all(program: Program, written: Path) -> None:
    """As pipelines call it: a number, or a tensor without axes."""
    model, (sample, _, condition) = load(written), verification_inputs(program, 2)
    with torch.no_grad():
        found = [model(sample, t, encoder_hidden_states=condition).sample for t in (600, torch.tensor(600))]
    near(found[0], program, (sample, torch.full((2,), 600.0), condition))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "bits", "options"),
    [
        pytest.param("sdxl", "w8a8", {}, id="sdxl, two digits"),
        pytest.param("sd3", "w4a4", {"activation": "asymmetric", "weight": "asymmetric"}, id="sd3, asymmetric"),
        pytest.param("pixart", "w4a4", {"static": True}, id="pixart, one row"),
        pytest.param("labelled", "w4a4", {"rotated": False}, id="labelled, unrotated"),
    ],
)
def test_other_denoisers(name: str, bits: str, options: dict[str, Any], tmp_path: Path) -> None:
    program = quantised(name, bits, **options)
    report = export_diffusers(program, tmp_path / "x")
    assert report.network.forced_error <= 1e-5
    # Of eight bits so many codes lie on boundaries that four samples in ten hold one, on some CPUs the first four all.
    model, args = load(tmp_path / "x"), verification_inputs(program, 12)
    near(called(model, program, args), program, args)
    assert bits == "w4a4" or any(layer.weight_high is not None for layer in layers(model).values())


def test_saved_again_it_is_the_same(program: Program, written: Path, tmp_path: Path) -> None:
    model = load(written)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["quant_method"] == "hqc"
    first, second = (load_file(folder / WEIGHTS) for folder in (written, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    args = verification_inputs(program, 2)
    assert torch.equal(called(load(tmp_path / "again"), program, args), called(model, program, args))


def test_in_half_precision_scales_stay_exact(program: Program, written: Path) -> None:
    model = load(written, torch_dtype=torch.bfloat16)
    stored = load_file(written / WEIGHTS)
    for name, layer in layers(model).items():
        assert torch.equal(layer.activation_scale, stored[f"{name}.activation_scale"])
    assert torch.equal(model.hqc_timesteps.grid, torch.tensor(GRID))
    assert model.dtype == torch.bfloat16
    args = verification_inputs(program, 2)
    with torch.no_grad():
        output = model(args[0].bfloat16(), args[1], encoder_hidden_states=args[2].bfloat16()).sample
    assert output.dtype == torch.bfloat16
    layer = next(iter(layers(model).values()))
    nn.Module.to(layer, torch.float16)
    assert layer.weight_scale.dtype == torch.float32


def test_a_layer_alone_has_no_timestep(program: Program, written: Path) -> None:
    model = load(written)
    layer = next(one for one in layers(model).values() if isinstance(one, HqcLinear))
    with pytest.raises(EvaluationError, match="outside a call of its denoiser"):
        layer(torch.zeros(1, layer.shape[-1]))
    called(model, program, verification_inputs(program, 2))
    with pytest.raises(EvaluationError, match="outside a call of its denoiser"):
        layer(torch.zeros(1, layer.shape[-1]))


def test_hqc_itself_says_who_loads_it(written: Path) -> None:
    with pytest.raises(ArtefactError, match=r"is a denoiser for diffusers\. Load it with from_pretrained"):
        hqc.runtimes.load(written)


def test_the_manifest_lists_every_file(written: Path) -> None:
    assert set(check_manifest(written, "hqc-diffusers")["files"]) == {"config.json", "plan.json", WEIGHTS}


# ---- what cannot be written ----------------------------------------------------------------------------------------


def smoothed() -> Program:
    passes = [SelectLayers(bits="w4a4"), InsertSmoothing(), InsertQdq(GRID)]
    return run_pipeline(captured_denoiser("sd15"), passes)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: captured_denoiser("sd15"), "the program is captured"),
        (smoothed, "insert_smoothing rewrote the graph between layers, at "),
        (lambda: quantised("dit"), "site .*@2 is a part of a layer, or a second call of it"),
    ],
    ids=["captured", "smoothed", "called twice"],
)
def test_what_is_no_rewriting_by_layer_is_refused(make: Callable[[], Program], match: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"target diffusers: {match}") as caught:
        export_diffusers(make(), tmp_path / "x")
    assert len(str(caught.value)) <= 300
    assert list(tmp_path.iterdir()) == []


def test_models_of_no_class_of_diffusers_are_refused(captured: Callable[[str], Program], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="takes a denoiser of diffusers; the program is none"):
        export_diffusers(captured("two_sites"), tmp_path / "x")


# ---- folders from a stranger ---------------------------------------------------------------------------------------

CONV, LINEAR = "down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def config_change(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        change(data["quantization_config"])
        (folder / "config.json").write_text(json.dumps(data))

    return apply


def tensor_change(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "codes of another shape": (
        tensor_change(lambda t: t.update({f"{CONV}.weight_codes": t[f"{CONV}.weight_codes"][:-1].clone()})),
        rf"{CONV}.weight_codes: is uint8 \[31, 3, 3, 16\]; expected uint8 \[32, 3, 3, 16\]",
    ),
    "codes that are floats": (
        tensor_change(lambda t: t.update({f"{CONV}.weight_codes": t[f"{CONV}.weight_codes"].float()})),
        "weight_codes: is float32",
    ),
    "no codes": (tensor_change(lambda t: t.pop(f"{CONV}.weight_codes")), f"have no {CONV}.weight_codes"),
    "no float weight": (tensor_change(lambda t: t.pop("conv_norm_out.weight")), "have no conv_norm_out.weight"),
    "a scale of nothing": (tensor_change(lambda t: t[f"{LINEAR}.weight_scale"].zero_()), "a scale that is not above 0"),
    "a scale that is no number": (
        tensor_change(lambda t: t[f"{LINEAR}.activation_scale"].fill_(float("nan"))),
        "a scale that is not above 0",
    ),
    "timesteps that are no numbers": (
        tensor_change(lambda t: t["hqc_timesteps.grid"].fill_(float("inf"))),
        "timesteps that are no numbers",
    ),
    "codes that leave int8": (
        tensor_change(lambda t: t[f"{CONV}.weight_codes"].fill_(0x77)),
        f"layer {CONV}: has packed codes that leave int8",
    ),
    "a site that is none": (
        config_change(lambda c: c["sites"].update({"conv_in.nothing": c["sites"][CONV]})),
        "site conv_in.nothing: is no layer of this denoiser",
    ),
    "a site that is a norm": (
        config_change(lambda c: c["sites"].update({"conv_norm_out": c["sites"][CONV]})),
        "site conv_norm_out: names no linear layer",
    ),
    "a site that is inside a site": (
        config_change(lambda c: c["sites"].update({f"{CONV}.weight": c["sites"][CONV]})),
        "is no layer of this denoiser",
    ),
    "an order that is none": (config_change(lambda c: c["sites"][CONV].update(block=48)), "a rotation of no order"),
    "codes beyond int8": (config_change(lambda c: c["sites"][CONV].update(low=-999)), "outside -128…127"),
    "another form": (config_change(lambda c: c["sites"][CONV].update(form="int2")), "has the form 'int2'"),
    "a form of other fields": (config_change(lambda c: c["sites"][CONV].update(code="x")), "has other fields"),
    "a field that is none": (config_change(lambda c: c.update(run="x")), "quantization_config: has run"),
    "no sites": (config_change(lambda c: c.update(sites=[])), "names no sites"),
    "rows without end": (config_change(lambda c: c.update(rows=10**9)), "has no number of rows"),
    "pickled weights": (pickled, "is no safetensors file"),
}


# diffusers advises safetensors where it reads a pickle.
@pytest.mark.filterwarnings("ignore:.*safetensors.*")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_is_refused_in_a_line(kind: str, written: Path, tmp_path: Path) -> None:
    change, match = HOSTILE[kind]
    folder = Path(shutil.copytree(written, tmp_path / "x"))
    change(folder)
    with pytest.raises(ArtefactError, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(("channels", "code", "fits"), [(2**17, 127, True), (2**18, 127, False), (2**18, 1, True)])
def test_sums_past_int32_are_refused(channels: int, code: int, fits: bool) -> None:
    layer = HqcLinear(SiteForm("int8", low=-127, high=127), (1, channels), 1, bias=False)
    layer.weight_codes.fill_(code)
    layer.weight_scale.fill_(1.0)
    layer.activation_scale.fill_(1.0)
    if fits:
        layer.check("wide")
    else:
        with pytest.raises(ArtefactError, match=r"layer wide: has accumulators that may reach \d+, past int32"):
            layer.check("wide")


def test_other_methods_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import hqc.integrations.diffusers as ours

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "hqc", "another")
    importlib.reload(ours)
    assert auto.AUTO_QUANTIZER_MAPPING["hqc"] == "another"


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "q.hqc")
    command = ("export", tmp_path / "q.hqc", "--target", "diffusers", "-o", tmp_path / "unet")
    said = json.loads(ok(*command, "--json").stdout)
    assert (said["target"], said["kind"]) == ("diffusers", "UNet2DConditionModel")
    assert said["sites"] == len(layers(load(tmp_path / "unet")))
    assert "integer layers" in ok(*command, "--force").stdout
