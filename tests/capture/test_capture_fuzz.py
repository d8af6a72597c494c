"""Configurations of others with one thing changed: a model is found, or refused in one line.

A denoiser's config.json, a pipeline's model_index.json and scheduler, and the YAML of an original checkpoint.
HQC_FUZZ_CONFIGS is how many changes are tried of each.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import ldm_original
import pytest
import test_mutations
import tiny_pipeline
import yaml
from safetensors.torch import save_file

from hqc.capture import find_source
from hqc.errors import LONGEST_LINE, LONGEST_LIST, HqcError
from hqc.runtimes.model import _load_pipeline
from hqc.runtimes.pipeline_files import check_pipeline
from hqc.sampling.task import require_steps

CHANGES = int(os.environ.get("HQC_FUZZ_CONFIGS", "60"))
SEED = os.environ.get("HQC_FUZZ_SEED", "0")
VALUES = (
    *(0, 1, -1, 2, 3, 7, 32, 1000, 2**15, 2**20, 2**31, 2**62, 1.5, -0.5, 1e300, True, False, None, "", "x", "../x"),
    *("float16", "silu", "UNet2DModel", "AttnDownBlock2D", "epsilon", "leading", "scaled_linear", [], {}, [[]], [1, 2]),
    *(["x"], [None, None], ["diffusers", "UNet2DModel"], ["os", "system"], {"a": 1}),
)


def changed(data: Any, draw: random.Random) -> tuple[Any, str]:
    """A copy with one thing changed, and what that is."""
    data = json.loads(json.dumps(data))
    path = draw.choice(list(test_mutations.places(data)))
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    kind = draw.random()
    if kind < 0.15:
        del parent[path[-1]]
        return data, f"{path} deleted"
    if kind < 0.25 and isinstance(parent, list):
        parent.insert(path[-1], parent[path[-1]])
        return data, f"{path} repeated"
    parent[path[-1]] = draw.choice(VALUES)
    return data, f"{path}: {parent[path[-1]]!r}"


def refused(error: HqcError, what: str) -> bool:
    assert len(error.line) <= (LONGEST_LIST if error.lists else LONGEST_LINE), what
    assert "Report a bug" not in error.line, what
    return True


def tried(function: Any, what: str) -> bool:
    """Whether it is refused; anything but a refusal is an error."""
    try:
        function()
    except HqcError as error:
        return refused(error, what)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return False


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline.save_tiny_pipeline(tmp_path_factory.mktemp("configs") / "pipeline")


@pytest.mark.filterwarnings("ignore")  # diffusers warns of what it makes of some
@pytest.mark.parametrize("name", ["unet/config.json", "model_index.json", "scheduler/scheduler_config.json"])
def test_a_changed_configuration_of_diffusers(name: str, pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline, folder)
    data, draw = json.loads((folder / name).read_text()), random.Random(f"{name} {SEED}")
    count = 0
    for _ in range(CHANGES):
        new, what = changed(data, draw)
        (folder / name).write_text(json.dumps(new))
        count += tried(lambda: _use(folder, name), f"{name} {what}")
    assert count > 0


def _use(folder: Path, name: str) -> None:
    if name.startswith("unet"):
        find_source(str(folder))
        return
    check_pipeline(folder)
    pipe = _load_pipeline(folder, None)  # type: ignore[arg-type]  # any denoiser
    require_steps(pipe.scheduler, 2)


@pytest.mark.filterwarnings("ignore")
def test_a_changed_yaml_of_a_checkpoint(tmp_path: Path) -> None:
    data = ldm_original.tiny_config("bedroom")
    draw, count = random.Random(f"yaml {SEED}"), 0
    checkpoint = tmp_path / "model.safetensors"
    save_file(dict(ldm_original.make_checkpoint(data)), checkpoint)
    for _ in range(CHANGES):
        new, what = changed(data, draw)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(new))
        count += tried(lambda: find_source(str(checkpoint), config=tmp_path / "c.yaml"), f"yaml {what}")
    assert count > CHANGES // 10
