"""Pipelines from strangers: only known libraries and plain configurations reach diffusers; no code of theirs runs."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from hqc.errors import ArtefactError, RuntimeMissingError
from hqc.models import digits_path
from hqc.program import Program
from hqc.runtimes.model import load
from hqc.runtimes.pipeline_files import check_pipeline, read_index
from hqc.storage import copy_pipeline, load_program, save_program


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(digits_path(), tmp_path / "digits", ignore=shutil.ignore_patterns("unet", "classifier"))
    return tmp_path / "digits"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_the_bundled_pipeline_passes(folder: Path) -> None:
    assert check_pipeline(folder)["_class_name"] == "ClassConditionalLDMPipeline"
    assert check_pipeline(digits_path()) == read_index(digits_path())


INDEXES: dict[str, tuple[Callable[[Any], object], str]] = {
    "folder's module": (lambda i: i.update(scheduler=["evil", "Evil"]), "its scheduler is evil.Evil; expected"),
    "other package": (lambda i: i.update(scheduler=["subprocess", "Popen"]), "its scheduler is subprocess.Popen"),
    "path": (lambda i: i.update(scheduler=["../evil", "Evil"]), "its scheduler is ../evil.Evil"),
    "submodule": (lambda i: i.update(scheduler=["diffusers.utils", "Evil"]), "diffusers.utils.Evil"),
    "dunder": (lambda i: i.update(scheduler=["__loader__", "Evil"]), "its scheduler is __loader__.Evil"),
    "unknown class": (lambda i: i.update(scheduler=["diffusers", "EvilScheduler"]), "diffusers.EvilScheduler"),
    "function": (lambda i: i.update(scheduler=["diffusers", "load_image"]), "diffusers.load_image"),
    "own": (lambda i: i.update(vae=["hqc.models.ldm", "Tensor"]), "its vae is hqc.models.ldm.Tensor"),
    "auto": (lambda i: i.update(vae=["transformers", "AutoModel"]), "its vae is transformers.AutoModel"),
    "number": (lambda i: i.update(vae=[1, 2]), "its vae is 1.2"),
    "half": (lambda i: i.update(vae=["diffusers", None]), "its vae is diffusers.None"),
    "three": (lambda i: i.update(vae=["a", "b", "c"]), "has a part 'vae' that is not [library, class]"),
    "part path": (lambda i: i.update({"../vae": ["diffusers", "AutoencoderKL"]}), "has a part '../vae'"),
    "mapping": (lambda i: i.update(vae={}), "has a mapping as 'vae'"),
    "class list": (lambda i: i.update(_class_name=["pipeline", "Evil"]), "names the class"),
    "no class": (lambda i: i.pop("_class_name"), "names the class 'None'"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_asks_for_something_else_is_refused(case: str, folder: Path) -> None:
    change, message = INDEXES[case]
    edit(folder / "model_index.json", change)
    with pytest.raises(ArtefactError, match=re.escape(message)) as caught:
        check_pipeline(folder)
    assert "\n" not in str(caught.value)


CONFIGS: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "auto_map": ("vae/config.json", lambda c: c.update(auto_map={"AutoModel": "evil.Evil"}), "asks for code"),
    "nested": ("vae/config.json", lambda c: c.update(a=[{"auto_map": {"a": "b"}}]), "asks for code of its own"),
    "custom": ("scheduler/scheduler_config.json", lambda c: c.update(custom_pipeline="evil"), "asks for code"),
    "class": ("vae/config.json", lambda c: c.update(_class_name="../Evil"), "names the class '../Evil'"),
    "layers": ("vae/config.json", lambda c: c.update(layers_per_block=10**9), "as 'layers_per_block'"),
    "channels": ("vae/config.json", lambda c: c.update(block_out_channels=[10**9]), "as 'block_out_channels'"),
    "steps": (
        "scheduler/scheduler_config.json",
        lambda c: c.update(num_train_timesteps=10**12),
        "has 1000000000000 as 'num_train_timesteps'",
    ),
    "entries": ("vae/config.json", lambda c: c.update(a=[0] * 70_000), "has 70000 entries"),
    "infinite": ("vae/config.json", lambda c: c.update(scaling_factor=float("inf")), "has inf as 'scaling_factor'"),
    "deep": ("vae/config.json", lambda c: c.update(a=json.loads("[" * 30 + "]" * 30)), "is nested more than"),
    "large": ("vae/config.json", lambda c: c.update(a="x" * 2**24), "has more than 16777216 bytes"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_without_bounds_is_refused(case: str, folder: Path) -> None:
    name, change, message = CONFIGS[case]
    edit(folder / name, change)
    with pytest.raises(ArtefactError, match=re.escape(message)):
        check_pipeline(folder)


def test_the_usual_schedulers_configurations_are_taken(folder: Path) -> None:
    """Karras and DPM-Solver have -inf where they cut nothing off; NaN is nowhere right."""
    classes = (
        diffusers.DPMSolverMultistepScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.UniPCMultistepScheduler,
    )
    for scheduler in (kind() for kind in classes):
        scheduler.save_pretrained(folder / "scheduler")
        check_pipeline(folder)
    edit(folder / "scheduler/scheduler_config.json", lambda c: c.update(lambda_min_clipped=float("nan")))
    with pytest.raises(ArtefactError, match="has nan as 'lambda_min_clipped'"):
        check_pipeline(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff", "5"], ids=lambda text: text[:3])
@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json"])
def test_what_is_no_json_is_refused(name: str, text: str, folder: Path) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtefactError, match="is no configuration"):
        check_pipeline(folder)


def test_parts_that_are_not_loaded_may_be_anything(folder: Path) -> None:
    edit(folder / "model_index.json", lambda i: i.update(safety=["some_package", "Checker"]))
    with pytest.raises(ArtefactError, match=r"its safety is some_package\.Checker"):
        check_pipeline(folder)
    check_pipeline(folder, ["vae", "scheduler"])


def test_an_old_diffusers_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "__version__", "0.37.1")
    with pytest.raises(RuntimeMissingError, match=r"diffusers 0\.37\.1: runs code .* Install diffusers>=0\.38"):
        check_pipeline(folder)


def test_a_configuration_that_diffusers_does_not_take_is_one_line(
    captured: Callable[[str], Program], folder: Path, tmp_path: Path
) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", lambda c: c.update(beta_schedule={"a": "b"}))
    save_program(captured("two_sites"), tmp_path / "p.hqc", pipeline=folder)
    with pytest.raises(ArtefactError, match="diffusers could not load the pipeline") as caught:
        load(tmp_path / "p.hqc").pipeline()
    assert "\n" not in str(caught.value)


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def artefact(captured: Callable[[str], Program], folder: Path, tmp_path: Path) -> Path:
    save_program(captured("two_sites"), tmp_path / "p.hqc", pipeline=folder)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text("PRIVATE KEY")
    return tmp_path / "p.hqc"


LINKS: dict[str, tuple[str, str]] = {
    "file": ("pipeline/notes.txt", "secret/id_rsa"),
    "folder": ("pipeline/more", "secret"),
    "nested": ("pipeline/vae/more", "secret"),
    "inside": ("pipeline/again.json", "p.hqc/pipeline/model_index.json"),
    "dangling": ("pipeline/nothing", "nowhere"),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_in_a_pipeline_are_refused(case: str, artefact: Path, tmp_path: Path) -> None:
    name, target = LINKS[case]
    (artefact / name).symlink_to(tmp_path / target)
    with pytest.raises(ArtefactError, match="is a link") as caught:
        load_program(artefact)
    assert caught.value.where == str(artefact / name)
    with pytest.raises(ArtefactError, match="is a link"):
        copy_pipeline(artefact / "pipeline", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_pipeline_that_is_a_link_is_refused(artefact: Path, tmp_path: Path) -> None:
    shutil.move(artefact / "pipeline", tmp_path / "elsewhere")
    (artefact / "pipeline").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="is a link"):
        load_program(artefact)


def test_links_of_the_users_own_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    """As in the cache of the hub, whose snapshots are links."""
    shutil.move(folder / "vae", tmp_path / "blob")
    (folder / "vae").symlink_to(tmp_path / "blob")
    copy_pipeline(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "vae" / "config.json").is_file()
    assert not (tmp_path / "copy" / "vae").is_symlink()
