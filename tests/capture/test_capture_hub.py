"""Hub ids and single files: resolved from a cache that the test writes, or refused in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import LATENT_SIZES, TOKENS, captured_denoiser, denoiser
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hqc.capture import find_source, trace
from hqc.capture.hub import is_hub_id
from hqc.capture.ldm.names import unet_name
from hqc.cli import main
from hqc.errors import CaptureError, MemoryShortError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and no hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def _put(cache: Path, name: str, commit: str = COMMIT, ref: str = "main") -> Path:
    """The folder of a snapshot in the cache's own layout."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("text", "is_id"),
    [("owner/name", True), ("stabilityai/sdxl-turbo", True), ("a/b/c", False), ("/a/b", False), ("name", False)],
)
def test_ids(text: str, is_id: bool) -> None:
    assert is_hub_id(text) == is_id
    assert not is_hub_id("../name")


def test_a_model_from_the_cache(cache: Path) -> None:
    denoiser("sd15").save_pretrained(_put(cache, "tiny/model"))
    source = find_source("tiny/model", condition_length=5)
    assert (source.origin.source, source.origin.revision, source.origin.pipeline) == ("tiny/model", COMMIT, "")
    args = captured_denoiser("sd15").example_inputs(2)
    with torch.no_grad():
        _equal(source.module(*args), denoiser("sd15")(*args, return_dict=False)[0])


def test_a_pipeline_from_the_cache_at_a_revision(cache: Path) -> None:
    other = COMMIT[::-1]
    for name, ref, commit in (("sd15", "main", COMMIT), ("dit", "other", other)):
        folder = _put(cache, "tiny/pipe", commit, ref)
        part = "transformer" if name == "dit" else "unet"
        denoiser(name).save_pretrained(folder / part)
        (folder / "model_index.json").write_text(
            json.dumps({"_class_name": "DiffusionPipeline", part: ["diffusers", type(denoiser(name)).__name__]})
        )
    assert find_source("tiny/pipe").origin.kind == "UNet2DConditionModel"
    found = find_source("tiny/pipe", revision="other")
    assert (found.origin.kind, found.origin.revision) == ("DiTTransformer2DModel", other)
    assert found.pipeline is not None


def test_out_of_reach(cache: Path) -> None:
    with pytest.raises(CaptureError) as caught:
        find_source("runwayml/stable-diffusion-v1-5")
    assert str(caught.value) == (
        "source 'runwayml/stable-diffusion-v1-5': is not a local folder, not in the local cache, and the hub cannot be "
        "reached. Connect, or run `hf download runwayml/stable-diffusion-v1-5` where there is a connection and give "
        "that folder."
    )


def test_pickled_weights_are_not_taken(cache: Path) -> None:
    folder = _put(cache, "tiny/pickled")
    denoiser("sd15").save_pretrained(folder, safe_serialization=False)
    assert list(folder.glob("*.bin"))
    with pytest.raises(CaptureError, match=r"has its weights as diffusion_pytorch_model\.bin only, a pickle.*Convert"):
        find_source("tiny/pickled")


def test_variants_of_weights(tmp_path) -> None:
    """The plain weights, else the only variant, else the one that is asked for."""
    unet = denoiser("sd15")
    unet.save_pretrained(tmp_path, variant="fp16")
    assert find_source(str(tmp_path)).notes == {"variant": "fp16"}
    twice = denoiser("sd15")
    with torch.no_grad():
        twice.conv_in.bias.fill_(2)
    twice.save_pretrained(tmp_path, variant="non_ema")
    with pytest.raises(CaptureError, match="has its weights as fp16, non_ema only"):
        find_source(str(tmp_path))
    found = find_source(str(tmp_path), variant="non_ema")
    assert float(found.module.unet.conv_in.bias.detach().min()) == 2
    unet.save_pretrained(tmp_path)
    assert find_source(str(tmp_path)).notes == {"weights": "diffusion_pytorch_model"}
    with pytest.raises(CaptureError, match="has no safetensors weights of variant bf16; it has fp16, non_ema"):
        find_source(str(tmp_path), variant="bf16")
    with pytest.raises(CaptureError, match="takes no --variant"):
        find_source("digits", variant="fp16")


def test_a_revision_belongs_to_an_id(tmp_path) -> None:
    with pytest.raises(CaptureError, match="takes no --revision"):
        find_source("digits", revision="main")


# ---- single files --------------------------------------------------------------------------------------------------

# diffusers' converter knows the names of a UNet of Stable Diffusion 1.x by its four levels.
CONFIG = {
    "sample_size": 8,
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 2,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def _saved_as_one_file(folder: Path) -> tuple[torch.nn.Module, Path, Path]:
    """A UNet in the single-file form that keeps diffusers' names, with its config.json beside it."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(60)
    unet = UNet2DConditionModel(**CONFIG).eval()
    unet.save_pretrained(folder / "saved")
    file = folder / "model.safetensors"
    shutil.copyfile(folder / "saved" / "diffusion_pytorch_model.safetensors", file)
    return unet, file, folder / "saved" / "config.json"


def test_a_single_file_with_its_configuration(tmp_path) -> None:
    unet, file, config = _saved_as_one_file(tmp_path)
    source = find_source(str(file), config=config, condition_length=3)
    assert source.origin.source == str(file.resolve())
    sample, condition = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 32)
    with torch.no_grad():
        wanted = unet(sample, torch.tensor([3.0, 900.0]), condition, return_dict=False)[0]
        found = source.module(sample, torch.tensor([3.0, 900.0]), condition)
    _equal(found, wanted)


def _equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Up to float32 rounding: weights that lie elsewhere in memory may take another kernel."""
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert wanted.norm() > 0


def test_the_original_names_of_stable_diffusion(tmp_path) -> None:
    """The same weights under the original code's names, which hqc's own reader of those checkpoints knows."""
    unet, file, config = _saved_as_one_file(tmp_path)
    attended = [True, True, True, False]
    original = {unet_name(name, 2, attended): tensor for name, tensor in unet.state_dict().items()}
    save_file({f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in original.items()}, file)
    source = find_source(str(file), config=config, condition_length=3)
    args = (torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), torch.randn(2, 3, 32))
    with torch.no_grad():
        _equal(source.module(*args), unet(*args, return_dict=False)[0])


def _both(unet: torch.nn.Module, form: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state_dict in the original or in diffusers' names, and its average: everything twice as large."""
    names = {n: n for n in unet.state_dict()}
    if form != "diffusers":
        names = {n: f"model.diffusion_model.{unet_name(n, 2, [True, True, True, False])}" for n in names}
    raw = {names[n]: tensor.clone() for n, tensor in unet.state_dict().items()}
    return raw, {name: 2 * tensor for name, tensor in raw.items()}


def _flat(name: str) -> str:
    return "model_ema." + name.removeprefix("model.").replace(".", "")


@pytest.mark.parametrize("asked", [None, "raw", "ema"])
@pytest.mark.parametrize(
    "form", ["original.safetensors", "original.ckpt", "diffusers.safetensors", "dotted.safetensors", "sets.ckpt"]
)
def test_the_averaged_weights_are_taken_unless_the_raw_ones_are_asked_for(form: str, asked: Any, tmp_path) -> None:
    unet, _, config = _saved_as_one_file(tmp_path)
    raw, average = _both(unet, form.split(".")[0])
    file = tmp_path / form
    named = {"ema." + n if form.startswith("dotted") else _flat(n): t for n, t in average.items()}
    if form == "sets.ckpt":
        torch.save({"model": raw, "ema": average, "opt": {"state": {}, "step": 3}}, file)
    elif form.endswith("ckpt"):
        torch.save({"state_dict": {**raw, **named, "model_ema.decay": torch.tensor(0.99)}}, file)
    else:
        save_file({**raw, **named, "model_ema.num_updates": torch.tensor(7)}, file)
    source = find_source(str(file), config=config, condition_length=3, weights=asked)
    assert source.notes["weights"] == ("model" if asked == "raw" else "model_ema")
    factor = 1 if asked == "raw" else 2
    assert torch.equal(source.module.unet.conv_in.weight, factor * unet.conv_in.weight)


def test_one_set_of_weights(tmp_path) -> None:
    """Averages alone are enough, whatever names they had; the set that is not there is refused."""
    unet, _, config = _saved_as_one_file(tmp_path)
    file, options = tmp_path / "one.safetensors", {"config": config, "condition_length": 3}
    for form in ("original", "diffusers"):
        raw, average = _both(unet, form)
        save_file({_flat(name): tensor for name, tensor in average.items()}, file)
        source = find_source(str(file), **options)
        assert source.notes["weights"] == "model_ema"
        assert torch.equal(source.module.unet.conv_in.weight, 2 * unet.conv_in.weight)
        with pytest.raises(CaptureError, match="has averaged weights alone"):
            find_source(str(file), weights="raw", **options)
    save_file(raw, file)
    with pytest.raises(CaptureError, match="has no averaged weights"):
        find_source(str(file), weights="ema", **options)
    with pytest.raises(CaptureError, match="takes no --weights"):
        find_source("digits", weights="ema")


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_transformer_as_a_single_file(name: str, tmp_path) -> None:
    model = denoiser(name)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "model.safetensors"
    shutil.copyfile(tmp_path / "saved" / "diffusion_pytorch_model.safetensors", file)
    size = LATENT_SIZES.get(name)
    source = find_source(
        str(file), config=tmp_path / "saved" / "config.json", condition_length=TOKENS, latent_size=size
    )
    program = captured_denoiser(name)
    assert source.inputs == program.inputs
    args = program.example_inputs(2)
    with torch.no_grad():
        _equal(source.module(*args), program.module()(*args))


def test_a_file_without_configuration_says_whose_it_needs(tmp_path, cache: Path) -> None:
    _, file, _ = _saved_as_one_file(tmp_path)
    with pytest.raises(CaptureError, match=r"needs the configuration of stable-diffusion-v1-5/.*Give it with --config"):
        find_source(str(file))


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_published_sizes_need_no_configuration(form: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 1 and XL are known by their shapes: neither a YAML nor the hub is asked."""
    unet, _, _ = _saved_as_one_file(tmp_path)
    monkeypatch.setattr("hqc.capture.single_file.empty_architecture", lambda name: type(unet)(**CONFIG).to("meta"))
    raw, average = _both(unet, "original")
    tensors = {**raw, **{_flat(name): tensor for name, tensor in average.items()}, "first_stage_model.x": torch.ones(1)}
    file = tmp_path / f"sd.{form}"
    save_file(tensors, file) if form == "safetensors" else torch.save({"state_dict": tensors}, file)
    source = find_source(str(file), condition_length=3)
    assert source.notes["weights"] == "model_ema"
    assert torch.equal(source.module.unet.conv_in.weight, 2 * unet.conv_in.weight)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"_class_name": "AutoencoderKL"}', "configures a AutoencoderKL; expected UNet2DConditionModel or"),
        ("[]", "is no diffusers configuration"),
        ('{"_class_name": "UNet2DConditionModel", "block_out_channels": [8]}', "does not fit the configuration"),
    ],
    ids=["another class", "no object", "another shape"],
)
def test_configurations_that_do_not_fit(config: str, message: str, tmp_path) -> None:
    _, file, _ = _saved_as_one_file(tmp_path)
    (tmp_path / "c.json").write_text(config)
    with pytest.raises(CaptureError, match=message):
        find_source(str(file), config=tmp_path / "c.json")


# ---- weights that are not the configuration's ----------------------------------------------------------------------

FIRST, MIDDLE = "conv_in.weight", "mid_block.resnets.0.conv1.weight"
CHANGES = {
    "missing": ({FIRST: None}, f"1 key missing: {FIRST}"),
    "renamed": (
        {FIRST: None, "conv_im.weight": torch.zeros(2)},
        f"1 key missing: {FIRST} (nearest: conv_im.weight); 1 key not in the configuration: conv_im.weight",
    ),
    "extra": ({"mid_block.x.y": torch.zeros(2)}, "1 key not in the configuration: mid_block.x.y"),
    "shapes": (
        {FIRST: torch.zeros(3, 4, 3, 3), MIDDLE: torch.zeros(1)},
        f"2 keys of another shape: {FIRST} [3, 4, 3, 3], expected [32, 4, 3, 3], {MIDDLE} [1], expected [32, 32, 3, 3]",
    ),
}


def _say(folder: Path, *arguments: object) -> list[str]:
    return ["trace", *map(str, arguments), "-o", str(folder / "x.hqc")]


def _change(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    state = {name: tensor for name, tensor in {**load_file(path), **changes}.items() if tensor is not None}
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("source", ["folder", "file"])
def test_keys_that_do_not_fit_are_listed(source: str, change: str, tmp_path, capfd) -> None:
    """diffusers draws what is missing at random and drops what is too much."""
    changes, said = CHANGES[change]
    _, file, config = _saved_as_one_file(tmp_path)
    folder = config.parent
    path, options = (file, {"config": config}) if source == "file" else (folder, {})
    _change(file if source == "file" else folder / "diffusion_pytorch_model.safetensors", changes)
    with pytest.raises(CaptureError) as caught:
        find_source(str(path), condition_length=3, **options)
    assert str(caught.value) == f"{path}: does not fit {config}: {said}. Give the configuration that belongs to it."
    assert capfd.readouterr().err == ""


def test_keys_in_the_original_names(tmp_path) -> None:
    """Converted by diffusers first; they are said as it names them."""
    unet, file, config = _saved_as_one_file(tmp_path)
    original = {unet_name(n, 2, [True, True, True, False]): t for n, t in unet.state_dict().items()}
    whole = {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in original.items()}
    block = "model.diffusion_model.middle_block.0"
    save_file({n: t for n, t in whole.items() if n != f"{block}.in_layers.2.weight"}, file)
    said = "does not fit .*: 1 key missing: mid_block.resnets.0.conv1.weight\\."
    with pytest.raises(CaptureError, match=said):
        find_source(str(file), config=config)
    save_file({**whole, f"{block}.in_layers.9.weight": torch.zeros(2), "first_stage_model.x": torch.zeros(1)}, file)
    with pytest.raises(CaptureError, match=r"1 key not in the configuration: mid_block\.resnets\.0\.in_layers\.9"):
        find_source(str(file), config=config)
    save_file({n: t for n, t in whole.items() if "time_embed.0.weight" not in n}, file)
    with pytest.raises(CaptureError, match=r": 1 key missing: time_embedding\.linear_1\.weight\."):
        find_source(str(file), config=config)


def test_one_line_and_nothing_written(tmp_path, capfd) -> None:
    """Of a folder by a process of its own, whose libraries are new; of a file here."""
    _, file, config = _saved_as_one_file(tmp_path)
    _change(config.parent / "diffusion_pytorch_model.safetensors", {FIRST: None})
    _change(file, {"mid_block.x.y": torch.zeros(2)})
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "hqc.cli", *_say(tmp_path, config.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f": 1 key missing: {FIRST}. " in done.stderr
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(_say(tmp_path, file, "--config", config))
    found = capfd.readouterr()
    assert (ended.value.code, found.out, found.err.count("\n")) == (2, "", 1), found.err
    assert "1 key not in the configuration: mid_block.x.y. " in found.err
    assert sorted(tmp_path.rglob("*")) == before


def test_names_of_early_attention_blocks_are_known(tmp_path) -> None:
    """What diffusers itself renames is not missing: query, key, value and proj_attn of the first UNet2DModels."""
    from diffusers import UNet2DModel

    torch.manual_seed(61)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    unet.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(path)
    for new, old in early.items():
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    assert sum(".query." in name for name in state) == 8  # four blocks
    save_file(state, path, {"format": "pt"})
    source = find_source(str(tmp_path))
    args = (torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0]))
    with torch.no_grad():
        _equal(source.module(*args), unet(*args, return_dict=False)[0])
    _change(path, {"conv_in.bias": None})  # and what is missing besides is all that is said
    with pytest.raises(CaptureError, match=r"json: 1 key missing: conv_in\.bias\. "):
        find_source(str(tmp_path))


def test_a_single_file_is_counted_before_it_is_loaded(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file, config = _saved_as_one_file(tmp_path)
    monkeypatch.setattr("hqc.memory.available_bytes", lambda: 1000)
    with pytest.raises(MemoryShortError, match=r"tracing .*model\.safetensors: needs about 4"):
        find_source(str(file), config=config)


def test_files_that_are_none(tmp_path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    (tmp_path / "c.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(CaptureError, match="is truncated or no checkpoint"):
        find_source(str(tmp_path / "x.safetensors"))
    with pytest.raises(CaptureError, match="no such file"):
        find_source(str(tmp_path / "y.safetensors"))
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(CaptureError, match="is truncated or no checkpoint"):
        find_source(str(tmp_path / "x.ckpt"), config=tmp_path / "c.json")


def test_a_traced_hub_model_runs(cache: Path) -> None:
    denoiser("dit").save_pretrained(_put(cache, "tiny/dit"))
    program = trace("tiny/dit")
    args = program.example_inputs(2)
    _equal(program.module()(*args), captured_denoiser("dit").module()(*args))
