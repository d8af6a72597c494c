"""Bad checkpoints and configurations: one line that says what is wrong, exit status 2, nothing written."""

import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ldm_original as original
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from safetensors.torch import save_file

from hqc.capture import find_source
from hqc.capture.ldm.checkpoint import read_checkpoint
from hqc.capture.ldm.config import read_config
from hqc.capture.ldm.first_stage import build_vae
from hqc.capture.ldm.unet import build_unet
from hqc.cli import main
from hqc.errors import CaptureError, MemoryShortError

CONFIG = original.tiny_config("bedroom")


@pytest.fixture(scope="module")
def weights() -> original.Weights:
    return original.make_checkpoint(CONFIG)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return original.save_config(CONFIG, tmp_path / "config.yaml")


def refused(folder: Path, *arguments: object) -> str:
    """What `hqc trace` says; the folder holds afterwards what it held before."""
    before = sorted(folder.rglob("*"))
    result = CliRunner(catch_exceptions=False).invoke(
        main, ["trace", *map(str, arguments), "-o", str(folder / "out.hqc")]
    )
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("hqc: ")
    assert result.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    return result.stderr.removeprefix("hqc: ").rstrip("\n")


def changed(weights: original.Weights, folder: Path, **changes: Any) -> Path:
    """A checkpoint with some tensors replaced; None leaves one out."""
    state = {key: tensor for key, tensor in {**weights, **changes}.items() if tensor is not None}
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", ["model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_in.bias"])
def test_values_that_are_not_finite_are_named_as_in_the_file(
    part: str, dtype: torch.dtype, weights: original.Weights, settings: Path, tmp_path: Path
) -> None:
    damaged = torch.zeros_like(weights[part], dtype=dtype)
    damaged[1] = float("inf")
    path = changed(weights, tmp_path, **{part: damaged})
    said = refused(tmp_path, path, "--config", settings)
    assert said.startswith(f"{path}: has weights that are NaN or infinite: {part} (1 in the first, at [1]). ")


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_missing_extra_and_wrong_keys_are_listed(weights: original.Weights, settings: Path, tmp_path: Path) -> None:
    unet = "model.diffusion_model"
    path = changed(
        weights,
        tmp_path,
        **{
            f"{unet}.input_blocks.1.0.in_layers.2.weight": None,
            f"{unet}.input_blocks.1.0.in_layer.2.weight": torch.zeros(2),
            f"{unet}.out.2.bias": torch.zeros(7),
            "first_stage_model.decoder.conv_in.bias": None,
            "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(3),  # left by training: no weight of ours
        },
    )
    said = refused(tmp_path, path, "--config", settings)
    assert said == (
        f"{path}: does not fit {settings}: 2 keys missing: {unet}.input_blocks.1.0.in_layers.2.weight "
        f"(nearest: {unet}.input_blocks.1.0.in_layer.2.weight), first_stage_model.decoder.conv_in.bias; "
        f"1 key not in the configuration: {unet}.input_blocks.1.0.in_layer.2.weight; "
        f"1 key of another shape: {unet}.out.2.bias [7], expected [3]. Give the configuration that belongs to it."
    )


def test_long_lists_are_cut(weights: original.Weights, settings: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {k: t for k, t in weights.items() if k.startswith("model.")}}, path)
    said = refused(tmp_path, path, "--config", settings)
    count = sum(key.startswith("first_stage_model.") for key in weights)
    assert f"{count} keys missing: first_stage_model.encoder.conv_in.weight, " in said
    assert said.count("first_stage_model.") == 3
    assert f" … ({count - 3} more)" in said


def test_a_configuration_of_another_model(weights: original.Weights, tmp_path: Path) -> None:
    path = changed(weights, tmp_path)
    other = original.save_config(original.tiny_config("bedroom", channel_mult=[1, 1]), tmp_path / "other.yaml")
    assert "keys of another shape: model.diffusion_model." in refused(tmp_path, path, "--config", other)
    classes = original.save_config(original.tiny_config("imagenet"), tmp_path / "classes.yaml")
    assert "keys missing: model.diffusion_model.input_blocks.3.1.proj_in.weight" in refused(
        tmp_path, path, "--config", classes
    )
    later = original.tiny_config("bedroom")
    later["model"]["params"]["linear_end"] = 0.012
    said = refused(tmp_path, path, "--config", original.save_config(later, tmp_path / "later.yaml"))
    assert "a noise schedule whose ᾱ differs" in said
    later["model"]["params"]["timesteps"] = 500
    said = refused(tmp_path, path, "--config", original.save_config(later, tmp_path / "later.yaml"))
    assert "has 1000 timesteps; " in said


def test_averages_of_some_weights_only(settings: Path, tmp_path: Path) -> None:
    weights = original.make_checkpoint(CONFIG, ema=True)
    path = changed(weights, tmp_path, **{"model_ema.diffusion_modelout2bias": None})
    assert "1 key missing: model.diffusion_model.out.2.bias" in refused(tmp_path, path, "--config", settings)


def test_integer_weights(weights: original.Weights, settings: Path, tmp_path: Path) -> None:
    path = changed(weights, tmp_path, **{"model.diffusion_model.out.2.bias": torch.zeros(3, dtype=torch.int8)})
    assert "1 key no floating-point tensor: model.diffusion_model.out.2.bias torch.int8" in refused(
        tmp_path, path, "--config", settings
    )


def test_names_from_the_file_are_printed_safely(weights: original.Weights, settings: Path, tmp_path: Path) -> None:
    hostile = {"x.\x1b[2J\n": torch.zeros(1), "y." + "z" * 10_000: torch.zeros(1)}
    said = refused(tmp_path, changed(weights, tmp_path, **hostile), "--config", settings)
    assert "2 keys not in the configuration: x.\\x1b[2J\\n, y.zzz" in said
    assert len(said) < 1000


def test_a_measured_scale_that_is_not_there(tmp_path: Path) -> None:
    config = original.tiny_config("church")
    path = changed(original.make_checkpoint(config), tmp_path, scale_factor=None)
    said = refused(tmp_path, path, "--config", original.save_config(config, tmp_path / "c.yaml"))
    assert "has no scale_factor, which scale_by_std asks for" in said


# ---- files ---------------------------------------------------------------------------------------------------------


class Attack:
    """Unpickles into a call of os.system."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_named_and_not_run(zipped: bool, settings: Path, tmp_path: Path) -> None:
    path, target = tmp_path / "model.ckpt", tmp_path / "attacked"
    data = {"state_dict": {"a": torch.zeros(2)}, "x": Attack(target)}
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    said = refused(tmp_path, path, "--config", settings)
    assert f"{path}: is a pickle that calls {os.system.__module__}.system, and hqc runs no code from a file" in said
    assert not target.exists()


def test_a_bare_pickle_is_refused(settings: Path, tmp_path: Path) -> None:
    path, target = tmp_path / "model.ckpt", tmp_path / "attacked"
    path.write_bytes(pickle.dumps({"state_dict": Attack(target)}))
    refused(tmp_path, path, "--config", settings)
    assert not target.exists()


def test_what_lightning_leaves_is_harmless(
    weights: original.Weights, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callbacks are kept under their class; the class is replaced by an empty one, and Lightning is not needed."""
    import sys
    from types import ModuleType

    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = ModuleType(name)
    callback = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, module)
    path = tmp_path / "model.ckpt"
    torch.save({"callbacks": {callback: {"monitor": "val/loss"}}, "state_dict": dict(weights)}, path)
    monkeypatch.undo()
    assert find_source(str(path), config=settings).notes["weights"] == "model"


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_files(suffix: str, share: float, weights: original.Weights, settings: Path, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    save_file(dict(weights), path) if suffix == ".safetensors" else torch.save(dict(weights), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert f"{path}: is truncated or no checkpoint (" in refused(tmp_path, path, "--config", settings)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", b"{}", b"\x00" * 64, b"\xff" * 64])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_files_that_are_something_else(suffix: str, content: bytes, settings: Path, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    refused(tmp_path, path, "--config", settings)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ([1, 2], "holds a list; expected a state_dict"),
        ({"state_dict": 5}, "holds a int; expected a state_dict"),
        ({"state_dict": {"epoch": 3, 4: torch.zeros(1)}}, "holds no named tensors"),
    ],
)
def test_files_without_weights(data: Any, found: str, tmp_path: Path) -> None:
    torch.save(data, tmp_path / "model.ckpt")
    with pytest.raises(CaptureError, match=found):
        read_checkpoint(tmp_path / "model.ckpt")


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    buffer, path = io.BytesIO(), tmp_path / "model.ckpt"
    torch.save({"a": torch.zeros(1000)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    with pytest.raises(CaptureError, match="has compressed members"):
        read_checkpoint(path)


def test_folders_missing_files_and_missing_options(settings: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder.ckpt"
    folder.mkdir()
    assert "is a folder; expected a checkpoint file" in refused(tmp_path, folder, "--config", settings)
    assert "is a folder without model_index.json" in refused(tmp_path, folder)
    assert "no such file" in refused(tmp_path, tmp_path / "none.ckpt", "--config", settings)
    assert "no such file" in refused(tmp_path, tmp_path / "none.ckpt")
    assert "takes no --config" in refused(tmp_path, "digits", "--config", settings)
    assert "takes no --outliers" in refused(tmp_path, "digits", "--outliers")
    assert "cannot be read (No such file or directory)" in refused(
        tmp_path, tmp_path / "none.ckpt", "--config", tmp_path / "none.yaml"
    )


# ---- configurations ------------------------------------------------------------------------------------------------


def problem(content: str | bytes, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CaptureError) as caught:
        read_config(path)
    assert caught.value.where == str(path)
    assert "\n" not in str(caught.value)
    return caught.value.found


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (BOMB, "is not plain YAML (line 2 has an alias)"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor for the tag"),
        ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("[" * 5000, "is nested more than 32 deep"),
        ("a: [", "is not plain YAML (while parsing a flow node"),
        ("model: {params: " + "x" * 300_000 + "}", "is larger than 256 KiB"),
        ("a: " + "9" * 5000, "is not plain YAML"),
        (b"\xff\xfe\x00", "is not plain YAML"),
        ("", "has no model.params"),
        ("5", "has no model.params"),
        ("model: []", "has no model.params"),
        ("model: {params: 5}", "model.params: 5: expected a mapping"),
    ],
    ids=["bomb", "call", "name", "deep", "open", "large", "number", "bytes", "empty", "scalar", "list", "params"],
)
def test_hostile_yaml(content: str | bytes, found: str, tmp_path: Path) -> None:
    assert found in problem(content, tmp_path)


def unet_problem(tmp_path: Path, kind: str = "bedroom", **options: Any) -> str:
    return problem(yaml.safe_dump(original.tiny_config(kind, **options)), tmp_path)


UNET = "model.params.unet_config.params"


@pytest.mark.parametrize(
    ("kind", "options", "found"),
    [
        (
            "bedroom",
            {"num_resblocks": 2},
            f"{UNET}.num_resblocks: hqc does not know this option (nearest: num_res_blocks)",
        ),
        ("bedroom", {"model_channels": "many"}, f"{UNET}.model_channels: 'many': Input should be a valid integer"),
        ("bedroom", {"model_channels": 10**9}, f"{UNET}.model_channels: 1000000000: Input should be less than"),
        ("bedroom", {"model_channels": 33}, f"{UNET}.model_channels: 33: Input should be a multiple of 32"),
        ("bedroom", {"num_res_blocks": 10**6}, f"{UNET}.num_res_blocks: 1000000: Input should be less than"),
        ("bedroom", {"channel_mult": [1] * 99}, f"{UNET}.channel_mult: "),
        ("bedroom", {"num_heads": 4}, f"{UNET}: give one of num_heads and num_head_channels"),
        ("bedroom", {"num_head_channels": 48}, f"{UNET}: 48 does not divide 32 channels into heads"),
        ("bedroom", {"num_head_channels": 0}, f"{UNET}: 0 does not divide 32 channels into heads"),
        ("bedroom", {"image_size": 9}, f"{UNET}: image_size 9 cannot be halved 1 times"),
        ("bedroom", {"num_classes": 10}, f"{UNET}.num_classes: 10: Input should be None"),
        ("bedroom", {"use_new_attention_order": True}, f"{UNET}.use_new_attention_order: True: Input should be False"),
        ("bedroom", {"in_channels": 5}, "model.params: the first stage's embed_dim is not the denoiser's in_channels"),
        ("imagenet", {"context_dim": 25}, "model.params: embed_dim 24 is not context_dim 25"),
        ("imagenet", {"context_dim": None}, f"{UNET}: use_spatial_transformer and context_dim go together"),
        ("imagenet", {"resblock_updown": True}, f"{UNET}: resblock_updown with use_spatial_transformer"),
        ("church", {"num_heads_upsample": 2}, f"{UNET}: num_heads_upsample differs from num_heads"),
    ],
)
def test_denoisers_that_are_not_converted(kind: str, options: dict[str, Any], found: str, tmp_path: Path) -> None:
    assert found in unet_problem(tmp_path, kind, **options)


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("unet_config.target", "ldm.models.Transformer", "model.params.unet_config.target: 'ldm.models.Transformer'"),
        ("unet_config", None, "model.params.unet_config: None: expected a mapping"),
        ("first_stage_config.target", "ldm.models.autoencoder.IdentityFirstStage", "expected VQModelInterface or"),
        ("first_stage_config.target", "ldm.models.autoencoder.AutoencoderKL", "double_z is False for a AutoencoderKL"),
        ("first_stage_config.params.n_embed", None, "n_embed is missing"),
        ("first_stage_config.params.remap", "x.npy", "first_stage_config.params.remap: 'x.npy': Input should be None"),
        ("first_stage_config.params.ddconfig.ch_mul", 1, "hqc does not know this option (nearest: ch_mult)"),
        ("first_stage_config.params.ddconfig.attn_type", "linear", "Input should be 'vanilla'"),
        (
            "cond_stage_config",
            "__is_first_stage__",
            "cond_stage_config: '__is_first_stage__': expected a mapping",
        ),
        ("cond_stage_config", {"target": "x.BERTEmbedder", "params": {}}, "cond_stage_config.target: 'x.BERTEmbedder'"),
        ("beta_schedule", "cosine", "model.params.beta_schedule: 'cosine': Input should be 'linear'"),
        ("parameterization", "x0", "model.params.parameterization: 'x0': Input should be 'eps'"),
        ("linear_start", float("nan"), "model.params.linear_start: nan: Input should be less than 1"),
        ("scale_factor", 0, "model.params.scale_factor: 0: Input should be greater than 0"),
    ],
)
def test_models_that_are_not_converted(path: str, value: Any, found: str, tmp_path: Path) -> None:
    config = original.tiny_config("bedroom")
    *steps, last = ["model", "params", *path.split(".")]
    place: Any = config
    for step in steps:
        place = place[step]
    place[last] = value
    assert found in problem(yaml.safe_dump(config), tmp_path)


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value below a node of the configuration."""
    steps = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in steps for found in ((*path, key), *_places(value, (*path, key)))]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings_of(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["imagenet", "bedroom", "church"]), data=st.data(), value=VALUES)
def test_any_value_anywhere_is_taken_or_refused(
    kind: str, data: st.DataObject, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = original.tiny_config(kind)
    *steps, last = data.draw(st.sampled_from(_places(config["model"], ("model",))))
    place: Any = config
    for step in steps:
        place = place[step]
    place[last] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    try:
        found = read_config(path)
    except CaptureError as error:
        said = str(error)
    else:  # what is taken can be built, without weights
        said = f"{type(build_unet(found.unet)).__name__} {type(build_vae(found, 1.0)).__name__}"
    assert said
    assert "\n" not in said


# ---- memory --------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_said_before_it_starts(
    weights: original.Weights, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(weights, tmp_path)
    monkeypatch.setattr("hqc.memory.available_bytes", lambda: 1000)
    said = refused(tmp_path, path, "--config", settings)
    assert said.startswith(f"tracing {path}: needs about ")
    assert " of memory and 1.0 kB are available. " in said
    with pytest.raises(MemoryShortError):
        find_source("arch:ldm8-church")
    monkeypatch.setenv("HQC_IGNORE_MEMORY", "1")
    assert find_source(str(path), config=settings).notes["weights"] == "model"


def test_the_temporary_pipeline_does_not_outlive_a_failure(
    weights: original.Weights, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr("diffusers.VQModel.save_pretrained", full)
    said = refused(tmp_path, changed(weights, tmp_path), "--config", settings)
    assert "could not be written" in said
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_damaged_bytes_are_a_line(zipped: bool, tmp_path: Path) -> None:
    """torch's readers raise whatever a changed byte makes them raise (struct.error, AssertionError, BadZipFile)."""
    state = {"state_dict": {f"model.a{i}.weight": torch.ones(4, 3) for i in range(4)}, "epoch": 3}
    torch.save(state, tmp_path / "whole.ckpt", _use_new_zipfile_serialization=zipped)
    whole, path, draw = (tmp_path / "whole.ckpt").read_bytes(), tmp_path / "damaged.ckpt", random.Random(7)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 2, 8))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data if draw.random() < 0.8 else data[: draw.randrange(len(data))])
        with suppress(CaptureError):
            read_checkpoint(path)
