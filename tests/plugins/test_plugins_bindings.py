"""The plugins in TensorRT's real Python bindings, without a GPU; opt in with HQC_TRT_BINDINGS=FOLDER.

scripts/trt_bindings.py makes the folder.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = os.environ.get("HQC_TRT_BINDINGS")
SITES = sorted(path for path in Path(ROOT).iterdir() if (path / "tensorrt_bindings").is_dir()) if ROOT else []
REASON = "set HQC_TRT_BINDINGS to a folder that scripts/trt_bindings.py made"

pytestmark = pytest.mark.skipif(not SITES, reason=REASON)

# Batch 3; see CASES in bindings_probe.py.
LAUNCHES = {
    "image": [([64, 63], [1, 1, 3]), ([64, 63], [2, 4, 3])],
    "image last": [([189, 64, 63], [3, 1, 1]), ([189, 64, 63], [12, 2, 1])],
    "tokens": [([231, 192, 77], [4, 3, 1]), ([231, 192, 77], [15, 6, 1])],
    "tokens bounded": [([231, 192, 77], [4, 3, 1]), ([231, 192, 77], [15, 6, 1])],
    "linear": [([231, 192, 96, 77], [8, 1, 1]), ([231, 192, 96, 77], [45, 1, 1])],
    "conv": [([60, 9, 7, 64, 96, 5, 4], [2, 1, 1]), ([60, 9, 7, 64, 96, 5, 4], [12, 1, 1])],
}
OUTPUTS = {
    "image": ("INT8", [3, 64, 9, 7]),
    "image last": ("INT8", [3, 64, 9, 7]),
    "tokens": ("INT8", [3, 77, 192]),
    "tokens bounded": ("INT8", [3, 77, 192]),
    "linear": ("BF16", [3, 77, 96]),
    "conv": ("HALF", [3, 96, 5, 4]),
}


@pytest.fixture(scope="module", params=SITES, ids=[path.name for path in SITES])
def probed(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the plugins did in one version of the bindings."""
    return _probe(request.param)


@cache
def _probe(site: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(site), "LD_LIBRARY_PATH": str(site / "lib")}
    script = Path(__file__).with_name("bindings_probe.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])  # TensorRT's logger writes before it


def test_the_creators_are_in_the_registry_once(probed: dict[str, Any]) -> None:
    assert probed["versions"] == ["1"]
    assert probed["creators"] == {
        "HadamardQuantize": [[name, "INT32"] for name in ("block", "low", "high", "channel_axis", "regular")],
        "HadamardQuantizeBounded": [[name, "INT32"] for name in ("block", "channel_axis", "regular")],
        "Int4Linear": [["block", "INT32"], ["out_type", "INT32"], ["regular", "INT32"]],
        "Int4Conv": [[name, "INT32"] for name in ("block", "kernel", "stride", "padding", "out_type", "regular")],
    }


def test_ahead_of_time_from_10_9_on(probed: dict[str, Any]) -> None:
    version = tuple(int(part) for part in probed["version"].split(".")[:2])
    assert probed["ahead of time"] == (version >= (10, 9))
    kinds = {case["class"] for case in probed["cases"].values()}
    assert kinds == {"_TemplateAOTPlugin" if version >= (10, 9) else "HqcPlugin"}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_have_their_type_and_sizes(case: str, probed: dict[str, Any]) -> None:
    found = probed["cases"][case]
    assert (found["output types"], found["output shape"]) == ([OUTPUTS[case][0]], OUTPUTS[case][1])


@pytest.mark.parametrize("case", LAUNCHES)
def test_every_tactic_is_launched_with_its_kernel_grid_and_integers(case: str, probed: dict[str, Any]) -> None:
    found = probed["cases"][case]
    assert found["tactics"] == [1, 2]
    assert [(entry["integers"], entry["grid"]) for entry in found["launches"]] == LAUNCHES[case]
    settings = [(entry["entry"], entry["ptx"], entry["threads"], entry["shared"]) for entry in found["launches"]]
    assert settings == [("entry0", "ptx0", 128, 0), ("entry1", "ptx1", 160, 100)]


def test_formats_are_offered(probed: dict[str, Any]) -> None:
    if not probed["ahead of time"]:
        assert all(all(case["supported"]) and not case["refused"] for case in probed["cases"].values())
        return
    image = probed["cases"]["image"]["formats"]
    assert [[layout for _, layout in way] for way in image] == [
        ["LINEAR", "LINEAR", "HWC16"],
        ["HWC8", "LINEAR", "HWC16"],
    ]
    conv = probed["cases"]["conv"]["formats"]
    assert conv == [[["INT8", "HWC16"], ["INT8", "LINEAR"], *[["FLOAT", "LINEAR"]] * 3, ["HALF", "HWC8"]]]


def test_a_plugin_of_an_engine_is_made_again_from_its_fields(probed: dict[str, Any]) -> None:
    if probed["ahead of time"]:
        assert all("fields" not in case for case in probed["cases"].values())
        return
    assert probed["cases"]["conv"]["fields"] == {
        "block": 32,
        "kernel": 3,
        "stride": 2,
        "padding": 1,
        "out_type": 10,
        "regular": 0,
    }
    assert probed["cases"]["conv"]["clone"] == ["HqcPlugin", "Int4Conv"]
    assert probed["cases"]["conv"]["launches"][0]["pointers"] == [1, 2, 3, 4, 5, 99]
