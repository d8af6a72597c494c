"""examples/digits/train.py: the smoke test, and that a resumed run equals an unbroken one."""

import importlib.util
import json
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator

from hqc.models.digits_data import DigitSplit, load_digit_split

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "examples" / "digits" / "train.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("digits_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Four steps of training need no more: a model of so few draws nothing yet.
    module.SAMPLING_STEPS = 2
    module.load_digit_split = lambda: DigitSplit(*(part[:100] for part in astuple(load_digit_split())))
    return module


def quick(script, work_dir, out, *more):
    script.main(["--quick", "--work-dir", str(work_dir), "--out", str(out), *more])


@pytest.fixture(scope="module")
def unbroken(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    quick(script, folder / "work", folder / "out")
    return folder / "out"


def weights(folder):
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_quick_run_writes_a_whole_folder(unbroken):
    files = {str(path.relative_to(unbroken)) for path in unbroken.rglob("*") if path.is_file()}
    assert {"model_index.json", "training.json", "samples.png", "classifier/model.safetensors"} <= files
    assert json.loads((unbroken / "training.json").read_text())["settings"]["seed"] == 0


def test_resumed_run_equals_the_unbroken_one(script, unbroken, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    for _ in range(3):  # stops inside the classifier, then inside the autoencoder, then inside the UNet
        quick(script, work, out, "--resume", "--stop-at", "2")
        assert not out.exists()
    assert torch.load(work / "unet.pt", weights_only=True)["step"] == 2
    quick(script, work, out, "--resume")
    found, expected = weights(out), weights(unbroken)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_another_seed_gives_other_weights(script, unbroken, tmp_path):
    quick(script, tmp_path / "work", tmp_path / "out", "--seed", "1")
    found, expected = weights(tmp_path / "out"), weights(unbroken)
    name = next(name for name in expected if "conv_in.weight" in name)
    assert not torch.equal(found[name], expected[name])


def test_augmentation_moves_images_but_stays_in_range(script):
    images = torch.rand(4, 1, 32, 32, generator=Generator().manual_seed(0)) * 2 - 1
    moved = script.augment(images, Generator().manual_seed(1))
    assert moved.shape == images.shape
    assert moved.min() >= -1
    assert moved.max() <= 1
    assert (moved - images).abs().mean() > 0.05


@pytest.mark.parametrize(("step", "share"), [(0, 1 / 30), (29, 1.0), (999, 0.02)])
def test_learning_rate_warms_up_and_decays(script, step, share):
    assert script.learning_rate(step, 1000, 1.0) == pytest.approx(share, abs=1e-3)
