"""Hub ids and single files: resolved from a cache that the test writes, or refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from denoisers import captured_denoiser, denoiser
from huggingface_hub import constants
from safetensors.torch import save_file

from hqc.capture import find_source, trace
from hqc.capture.hub import is_hub_id
from hqc.capture.ldm.names import unet_name
from hqc.errors import CaptureError

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
    with pytest.raises(CaptureError, match="diffusers could not load it"):
        find_source("tiny/pickled")


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


def test_a_file_without_configuration_says_whose_it_needs(tmp_path, cache: Path) -> None:
    _, file, _ = _saved_as_one_file(tmp_path)
    with pytest.raises(CaptureError, match=r"needs the configuration of stable-diffusion-v1-5/.*Give it with --config"):
        find_source(str(file))


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


def test_files_that_are_none(tmp_path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    (tmp_path / "c.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(CaptureError, match="is not a safetensors file"):
        find_source(str(tmp_path / "x.safetensors"))
    with pytest.raises(CaptureError, match="no such file"):
        find_source(str(tmp_path / "y.safetensors"))
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(CaptureError, match="which may hold code"):
        find_source(str(tmp_path / "x.ckpt"), config=tmp_path / "c.json")


def test_a_traced_hub_model_runs(cache: Path) -> None:
    denoiser("dit").save_pretrained(_put(cache, "tiny/dit"))
    program = trace("tiny/dit")
    args = program.example_inputs(2)
    _equal(program.module()(*args), captured_denoiser("dit").module()(*args))
